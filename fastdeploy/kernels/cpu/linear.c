/* y = x W^T + b for a weight in panels. */
#include <stdlib.h>

#include "parallel.h"
#include "tile.h"

struct linear {
    const void *panels; /* [ceil(n_out / PANEL)][n_in][PANEL] */
    long n_in, n_out, type;
};

struct call {
    const struct linear *layer;
    const float *x, *bias; /* bias [n_out], or null */
    float *blocked;        /* x in blocks */
    float *y;
    struct blocks cut;
    long n_together; /* blocks that a piece of panels is multiplied with before the next piece comes */
    long n_panels, panels_at_once, n_pieces;
};

/* What stays in a core's second-level cache while panels pass by; what one thread interleaves as fast as several. */
enum { CACHED_FLOATS = 160 << 10, SERIAL_FLOATS = 16 << 10 };

static void interleave_blocks(const void *argument, long first, long last)
{
    const struct call *call = argument;
    const long n_in = call->layer->n_in;
    for (long b = first; b < last; b++) {
        const long row = block_first(call->cut, b);
        fd_interleave(call->x + row * n_in, n_in, 0, block_rows(call->cut, b), n_in, call->blocked + row * n_in);
    }
}

static void multiply_panel(const struct call *call, long p, long first_block, long last_block)
{
    const struct linear *layer = call->layer;
    const long n_in = layer->n_in, n_out = layer->n_out, n = n_out - p * PANEL < PANEL ? n_out - p * PANEL : PANEL;
    const char *panel = (const char *)layer->panels + p * n_in * PANEL * fd_weight_bytes[layer->type];
    float out[MAX_ROWS * PANEL], bias[PANEL] = {0};
    for (long o = 0; call->bias && o < n; o++)
        bias[o] = call->bias[p * PANEL + o];
    for (long b = first_block; b < last_block; b++) {
        const long row = block_first(call->cut, b), n_rows = block_rows(call->cut, b);
        fd_tiles[layer->type][n_rows](panel, call->blocked + row * n_in, n_in, out);
        for (long r = 0; r < n_rows; r++) {
            float *y = call->y + (row + r) * n_out + p * PANEL;
            for (long o = 0; o < n; o++)
                y[o] = out[r * PANEL + o] + bias[o];
        }
    }
}

/* Item i: piece i % n_pieces of the panels, times the blocks of group i / n_pieces. */
static void multiply_pieces(const void *argument, long first, long last)
{
    const struct call *call = argument;
    for (long i = first; i < last; i++) {
        const long block = i / call->n_pieces * call->n_together, piece = i % call->n_pieces;
        const long end = block + call->n_together < call->cut.count ? block + call->n_together : call->cut.count;
        const long panel = piece * call->panels_at_once, left = call->n_panels - panel;
        for (long p = panel; p < panel + (left < call->panels_at_once ? left : call->panels_at_once); p++)
            multiply_panel(call, p, block, end);
    }
}

/* x [n_rows][n_in], y [n_rows][n_out]; returns 0, or 1 when there is no memory. */
int fd_linear(const struct linear *layer, const float *x, const float *bias, float *y, long n_rows)
{
    const long n_in = layer->n_in, n_panels = (layer->n_out + PANEL - 1) / PANEL;
    if (!n_rows || !n_panels)
        return 0;
    struct call call = {.layer = layer, .x = x, .bias = bias, .y = y, .cut = fd_cut(n_rows), .n_panels = n_panels};
    /* One row is a block as it is. */
    call.blocked = n_rows == 1 ? (float *)x : malloc(n_rows * n_in * sizeof(float) + 1);
    if (!call.blocked)
        return 1;
    if (n_rows > 1)
        fd_parallel(interleave_blocks, &call, call.cut.count, n_rows * n_in > SERIAL_FLOATS ? 1 : call.cut.count);
    call.n_together = CACHED_FLOATS / (call.cut.size * n_in + 1);
    call.n_together = call.n_together < 1 ? 1 : call.n_together;
    call.panels_at_once = fd_piece(n_panels);
    call.n_pieces = (n_panels + call.panels_at_once - 1) / call.panels_at_once;
    const long n_groups = (call.cut.count + call.n_together - 1) / call.n_together;
    fd_parallel(multiply_pieces, &call, n_groups * call.n_pieces, 1);
    if (n_rows > 1)
        free(call.blocked);
    return 0;
}

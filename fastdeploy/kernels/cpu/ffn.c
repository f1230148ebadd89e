/* Gated feed-forward networks, each applied to the rows routed to it: down(silu(gate(x)) * up(x)) * weight, summed.
 *
 * A dense network is one expert that every row is routed to with weight 1.
 */
#include <stdlib.h>
#include <string.h>

#include "parallel.h"
#include "tile.h"

struct ffn {
    const void *gate, *up; /* [experts][ceil(width / PANEL)][hidden][PANEL] */
    const void *down;      /* [experts][ceil(hidden / PANEL)][width][PANEL] */
    long n_experts, hidden, width, type;
};

/* The rows of one expert: `cut` blocks, which begin at row `first` among the routed rows. */
struct share {
    long expert, first;
    struct blocks cut;
};

struct call {
    const struct ffn *layer;
    const float *x;
    float *y;
    long n_tokens, n_shares, n_routed;
    struct share *shares; /* of the experts that have rows */
    long *token;          /* [routed], by expert */
    float *weight;        /* [routed] */
    float *in, *middle;   /* blocks of inputs [routed][hidden] and of gated values [routed][width] */
};

/* Tokens worked on together, which bounds the memory for blocks. */
enum { MAX_TOKENS = 512 };

static long n_panels(long n) { return (n + PANEL - 1) / PANEL; }

static void interleave_shares(const void *argument, long first, long last)
{
    const struct call *call = argument;
    const long hidden = call->layer->hidden;
    for (long s = first; s < last; s++)
        for (long b = 0; b < call->shares[s].cut.count; b++) {
            const long row = call->shares[s].first + block_first(call->shares[s].cut, b);
            fd_interleave(call->x, hidden, call->token + row, block_rows(call->shares[s].cut, b), hidden,
                          call->in + row * hidden);
        }
}

/* One panel of gate and up of one expert, over all its rows. */
static void gate_panel(const struct call *call, const struct share *share, long p)
{
    const struct ffn *layer = call->layer;
    const long width = layer->width, panels = n_panels(width);
    const long offset = (share->expert * panels + p) * layer->hidden * PANEL * fd_weight_bytes[layer->type];
    const long n = width - p * PANEL < PANEL ? width - p * PANEL : PANEL;
    float gate[MAX_ROWS * PANEL], up[MAX_ROWS * PANEL];
    for (long b = 0; b < share->cut.count; b++) {
        const long row = share->first + block_first(share->cut, b), n_rows = block_rows(share->cut, b);
        const fd_tile tile = fd_tiles[layer->type][n_rows];
        const float *in = call->in + row * layer->hidden;
        tile((const char *)layer->gate + offset, in, layer->hidden, gate);
        tile((const char *)layer->up + offset, in, layer->hidden, up);
        float *middle = call->middle + row * width + p * PANEL * n_rows;
        for (long r = 0; r < n_rows; r++) {
            const vec weight = v_set(call->weight[row + r]);
            for (long v = 0; v < PANEL; v += LANES) {
                const vec g = v_silu(v_load(gate + r * PANEL + v));
                v_store(gate + r * PANEL + v, v_mul(v_mul(g, v_load(up + r * PANEL + v)), weight));
            }
            for (long i = 0; i < n; i++)
                middle[i * n_rows + r] = gate[r * PANEL + i];
        }
    }
}

static void gate_panels(const void *argument, long first, long last)
{
    const struct call *call = argument;
    const long panels = n_panels(call->layer->width);
    for (long i = first; i < last; i++)
        gate_panel(call, call->shares + i / panels, i % panels);
}

/* Panels [first, last) of the outputs of all tokens: zero, then every expert's part in turn. */
static void down_panels(const void *argument, long first, long last)
{
    const struct call *call = argument;
    const struct ffn *layer = call->layer;
    const long hidden = layer->hidden, width = layer->width;
    float out[MAX_ROWS * PANEL];
    for (long p = first; p < last; p++) {
        const long n = hidden - p * PANEL < PANEL ? hidden - p * PANEL : PANEL;
        for (long t = 0; t < call->n_tokens; t++)
            memset(call->y + t * hidden + p * PANEL, 0, n * sizeof(float));
        for (long s = 0; s < call->n_shares; s++) {
            const struct share *share = call->shares + s;
            const char *panel = (const char *)layer->down +
                                (share->expert * n_panels(hidden) + p) * width * PANEL * fd_weight_bytes[layer->type];
            for (long b = 0; b < share->cut.count; b++) {
                const long row = share->first + block_first(share->cut, b), n_rows = block_rows(share->cut, b);
                fd_tiles[layer->type][n_rows](panel, call->middle + row * width, width, out);
                for (long r = 0; r < n_rows; r++) {
                    float *y = call->y + call->token[row + r] * hidden + p * PANEL;
                    for (long i = 0; i < n; i++)
                        y[i] += out[r * PANEL + i];
                }
            }
        }
    }
}

/* Sort what is routed by expert; ids outside [0, n_experts) are somebody else's. */
static void share_out(struct call *call, const int64_t *experts, const float *weights, long k)
{
    const long n_experts = call->layer->n_experts;
    call->n_shares = call->n_routed = 0;
    for (long e = 0; e < n_experts; e++) {
        const long first = call->n_routed;
        for (long i = 0; i < call->n_tokens * k; i++)
            if (!experts || experts[i] == e) {
                call->token[call->n_routed] = i / k;
                call->weight[call->n_routed++] = weights ? weights[i] : 1.0f;
            }
        if (call->n_routed > first)
            call->shares[call->n_shares++] = (struct share){e, first, fd_cut(call->n_routed - first)};
    }
}

/* x, y [n_tokens][hidden]; experts, weights [n_tokens][k], or null for the one expert of a dense network.
 * Returns 0, or 1 when there is no memory.
 */
int fd_ffn(const struct ffn *layer, const float *x, float *y, long n_tokens, const int64_t *experts,
           const float *weights, long k)
{
    const long n_together = n_tokens < MAX_TOKENS ? n_tokens : MAX_TOKENS, n_rows = n_together * k;
    const long n_floats = n_rows * (layer->hidden + layer->width);
    char *memory = malloc(n_floats * sizeof(float) + layer->n_experts * sizeof(struct share) +
                          n_rows * (sizeof(long) + sizeof(float)));
    if (!memory)
        return 1;
    struct call call = {.layer = layer, .shares = (struct share *)memory};
    call.token = (long *)(call.shares + layer->n_experts);
    call.weight = (float *)(call.token + n_rows);
    call.in = call.weight + n_rows;
    call.middle = call.in + n_rows * layer->hidden;
    for (long t = 0; t < n_tokens; t += n_together) {
        call.x = x + t * layer->hidden;
        call.y = y + t * layer->hidden;
        call.n_tokens = n_tokens - t < n_together ? n_tokens - t : n_together;
        share_out(&call, experts ? experts + t * k : 0, weights ? weights + t * k : 0, k);
        fd_parallel(interleave_shares, &call, call.n_shares, call.n_routed > MAX_ROWS ? 1 : call.n_shares);
        const long n_gates = call.n_shares * n_panels(layer->width), n_downs = n_panels(layer->hidden);
        fd_parallel(gate_panels, &call, n_gates, fd_piece(n_gates));
        fd_parallel(down_panels, &call, n_downs, fd_piece(n_downs));
    }
    free(memory);
    return 0;
}

/* The inner product of everything here: one panel of weights times a block of rows.
 *
 * A panel holds PANEL outputs: for each input, its PANEL weights side by side. A block holds up to MAX_ROWS rows of
 * inputs: for each input, the rows' values side by side. Both are then read from front to end.
 */
#ifndef FD_TILE_H
#define FD_TILE_H

#include "vectors.h"

#if LANES == 16
#define MAX_ROWS 16
#else
#define MAX_ROWS 6
#endif

enum weight_type { F32, F16, BF16, N_TYPES };

/* out[n_rows][PANEL] = block [n_in][n_rows] times panel [n_in][PANEL] */
typedef void (*fd_tile)(const void *panel, const float *block, long n_in, float *out);

/* By weight type and number of rows, 1 to MAX_ROWS. */
extern const fd_tile fd_tiles[N_TYPES][MAX_ROWS + 1];

extern const long fd_weight_bytes[N_TYPES];

/* Rows in blocks of nearly equal size: `count` blocks, the first `n_long` of them with `size` rows, the rest with one less. */
struct blocks {
    long count, n_long, size;
};

struct blocks fd_cut(long n_rows);

/* First row of block `b`, and how many rows it has. */
INLINE long block_first(struct blocks cut, long b)
{
    return b * cut.size - (b > cut.n_long ? b - cut.n_long : 0);
}
INLINE long block_rows(struct blocks cut, long b)
{
    return cut.size - (b >= cut.n_long);
}

/* Interleave rows into a block: block[i][r] = row_r[i]; `rows` may be any of x, `stride` floats apart. */
void fd_interleave(const float *x, long stride, const long *rows, long n_rows, long n_in, float *block);

#endif

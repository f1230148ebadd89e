#include "tile.h"

#include <string.h>

const long fd_weight_bytes[N_TYPES] = {4, 2, 2};

/* Bytes that loads run ahead of use: hardware stops fetching ahead at each page of 4 KiB. */
enum { AHEAD = 4096 };

INLINE vec load_weights(const void *panel, long i, enum weight_type type)
{
    switch (type) {
    case F32:
        return v_load((const float *)panel + i);
    case F16:
        return v_load_f16((const uint16_t *)panel + i);
    default:
        return v_load_bf16((const uint16_t *)panel + i);
    }
}

/* `chains` sums run side by side for each output of each row, because an addition waits for the one before it. */
INLINE void tile(const void *panel, const float *block, long n_in, float *out, enum weight_type type, int n_rows,
                 int chains)
{
    vec sum[8][VECTORS][MAX_ROWS];
    long i = 0;
    for (int c = 0; c < chains; c++)
        for (int v = 0; v < VECTORS; v++)
            for (int r = 0; r < n_rows; r++)
                sum[c][v][r] = v_set(0.0f);
    for (; i + chains <= n_in; i += chains) {
#pragma GCC unroll 8
        for (int c = 0; c < chains; c++) {
            const long at = (i + c) * PANEL;
            if (type == F32 || c % 2 == 0)
                _mm_prefetch((const char *)panel + at * (type == F32 ? 4 : 2) + AHEAD, _MM_HINT_T0);
            vec w[VECTORS];
            for (int v = 0; v < VECTORS; v++)
                w[v] = load_weights(panel, at + v * LANES, type);
#pragma GCC unroll 16
            for (int r = 0; r < n_rows; r++) {
                const vec x = v_set(block[(i + c) * n_rows + r]);
                for (int v = 0; v < VECTORS; v++)
                    sum[c][v][r] = v_fma(w[v], x, sum[c][v][r]);
            }
        }
    }
    for (; i < n_in; i++)
        for (int v = 0; v < VECTORS; v++) {
            vec w = load_weights(panel, i * PANEL + v * LANES, type);
#pragma GCC unroll 16
            for (int r = 0; r < n_rows; r++)
                sum[0][v][r] = v_fma(w, v_set(block[i * n_rows + r]), sum[0][v][r]);
        }
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            vec total = sum[0][v][r];
#pragma GCC unroll 8
            for (int c = 1; c < chains; c++)
                total = v_add(total, sum[c][v][r]);
            v_store(out + r * PANEL + v * LANES, total);
        }
}

#define CHAINS(n) ((n) >= 5 ? 1 : (n) >= 3 ? 2 : (n) == 2 ? 4 / VECTORS * 1 : 8 / VECTORS)

#define TILE(type, n)                                                                     \
    static void tile_##type##_##n(const void *panel, const float *block, long n_in, float *out) \
    {                                                                                     \
        tile(panel, block, n_in, out, type, n, CHAINS(n));                                \
    }

#define UP_TO_6(DO, type) DO(type, 1) DO(type, 2) DO(type, 3) DO(type, 4) DO(type, 5) DO(type, 6)
#define NAME(type, n) tile_##type##_##n,
#if MAX_ROWS == 16
#define ALL(DO, type)                                                                                     \
    UP_TO_6(DO, type)                                                                                     \
    DO(type, 7) DO(type, 8) DO(type, 9) DO(type, 10) DO(type, 11) DO(type, 12) DO(type, 13) DO(type, 14)  \
    DO(type, 15) DO(type, 16)
#else
#define ALL(DO, type) UP_TO_6(DO, type)
#endif

ALL(TILE, F32)
ALL(TILE, F16)
ALL(TILE, BF16)

const fd_tile fd_tiles[N_TYPES][MAX_ROWS + 1] = {
    {0, ALL(NAME, F32)},
    {0, ALL(NAME, F16)},
    {0, ALL(NAME, BF16)},
};

struct blocks fd_cut(long n_rows)
{
    long count = (n_rows + MAX_ROWS - 1) / MAX_ROWS;
    long size = count ? (n_rows + count - 1) / count : 0;
    return (struct blocks){count, n_rows - count * (size - 1), size};
}

void fd_interleave(const float *x, long stride, const long *rows, long n_rows, long n_in, float *block)
{
    long r = 0;
    for (; r + 4 <= n_rows; r += 4) {
        const float *a = x + (rows ? rows[r] : r) * stride, *b = x + (rows ? rows[r + 1] : r + 1) * stride;
        const float *c = x + (rows ? rows[r + 2] : r + 2) * stride, *d = x + (rows ? rows[r + 3] : r + 3) * stride;
        long i = 0;
        for (; i + 4 <= n_in; i += 4) {
            __m128 p = _mm_loadu_ps(a + i), q = _mm_loadu_ps(b + i), s = _mm_loadu_ps(c + i), t = _mm_loadu_ps(d + i);
            _MM_TRANSPOSE4_PS(p, q, s, t);
            float *to = block + i * n_rows + r;
            _mm_storeu_ps(to, p);
            _mm_storeu_ps(to + n_rows, q);
            _mm_storeu_ps(to + 2 * n_rows, s);
            _mm_storeu_ps(to + 3 * n_rows, t);
        }
        for (; i < n_in; i++) {
            float *to = block + i * n_rows + r;
            to[0] = a[i], to[1] = b[i], to[2] = c[i], to[3] = d[i];
        }
    }
    for (; r < n_rows; r++) {
        const float *a = x + (rows ? rows[r] : r) * stride;
        if (n_rows == 1)
            memcpy(block, a, n_in * sizeof(float));
        else
            for (long i = 0; i < n_in; i++)
                block[i * n_rows + r] = a[i];
    }
}

/* RMSNorm of rows, maybe of a sum. */
#include "parallel.h"
#include "vectors.h"

struct call {
    const float *x, *residual, *weight;
    float *sum, *y, eps;
    long n;
};

/* Floats below which threads cost more than they save. */
enum { SERIAL_FLOATS = 32 << 10 };

static void norm_rows(const void *argument, long first, long last)
{
    const struct call *call = argument;
    const long n = call->n;
    for (long row = first; row < last; row++) {
        const float *x = call->x + row * n;
        float *y = call->y + row * n, squares = 0.0f;
        if (call->residual) {
            float *sum = call->sum + row * n;
            for (long i = 0; i < n; i++)
                sum[i] = x[i] + call->residual[row * n + i];
            x = sum;
        }
        vec even = v_set(0.0f), odd = even;
        long i = 0;
        for (; i + 2 * LANES <= n; i += 2 * LANES) {
            const vec a = v_load(x + i), b = v_load(x + i + LANES);
            even = v_fma(a, a, even);
            odd = v_fma(b, b, odd);
        }
        for (; i < n; i++)
            squares += x[i] * x[i];
        squares += v_sum(v_add(even, odd));
        const float scale = 1.0f / sqrtf(squares / n + call->eps);
        const vec scales = v_set(scale);
        for (i = 0; i + LANES <= n; i += LANES)
            v_store(y + i, v_mul(v_mul(v_load(x + i), scales), v_load(call->weight + i)));
        for (; i < n; i++)
            y[i] = x[i] * scale * call->weight[i];
    }
}

/* y = x / sqrt(mean(x^2) + eps) * weight over rows of n; with a residual, of sum = x + residual. */
void fd_rms_norm(const float *x, const float *residual, const float *weight, float *sum, float *y, long n_rows, long n,
                 float eps)
{
    const struct call call = {x, residual, weight, sum, y, eps, n};
    fd_parallel(norm_rows, &call, n_rows, n_rows * n > SERIAL_FLOATS ? fd_piece(n_rows) : n_rows);
}

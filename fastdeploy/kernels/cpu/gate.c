/* From the router's logits to experts: softmax, the k best of score plus bias, their scores as weights. */
#include "parallel.h"
#include "vectors.h"

struct gate {
    const float *bias; /* [n_experts], steers the choice only; or null */
    long n_experts, k;
    float norm_min; /* weights are divided by their sum, or by this if that is less; negative: they are not */
};

struct call {
    const struct gate *gate;
    float *logits;
    int64_t *experts;
    float *weights;
};

/* Rows below which threads cost more than they save. */
enum { SERIAL_ROWS = 64 };

static void softmax(float *x, long n)
{
    float largest = x[0], total = 0.0f;
    for (long i = 1; i < n; i++)
        largest = x[i] > largest ? x[i] : largest;
    for (long i = 0; i < n; i++)
        total += x[i] = expf(x[i] - largest);
    for (long i = 0; i < n; i++)
        x[i] /= total;
}

/* The k best, best first, of equal ones the lowest id. */
static void choose(const struct gate *gate, const float *score, int64_t *experts, float *weights)
{
    float total = 0.0f;
    for (long j = 0; j < gate->k; j++) {
        long best = -1;
        float best_score = 0.0f;
        for (long e = 0; e < gate->n_experts; e++) {
            const float s = score[e] + (gate->bias ? gate->bias[e] : 0.0f);
            int taken = 0;
            for (long i = 0; i < j; i++)
                taken |= experts[i] == e;
            if (!taken && (best < 0 || s > best_score)) {
                best = e;
                best_score = s;
            }
        }
        experts[j] = best;
        weights[j] = score[best];
        total += score[best];
    }
    if (gate->norm_min >= 0.0f) {
        total = total < gate->norm_min ? gate->norm_min : total;
        for (long j = 0; j < gate->k; j++)
            weights[j] /= total;
    }
}

static void choose_rows(const void *argument, long first, long last)
{
    const struct call *call = argument;
    const struct gate *gate = call->gate;
    for (long row = first; row < last; row++) {
        float *score = call->logits + row * gate->n_experts;
        softmax(score, gate->n_experts);
        choose(gate, score, call->experts + row * gate->k, call->weights + row * gate->k);
    }
}

/* logits [n_rows][n_experts] become scores; experts, weights [n_rows][k] */
void fd_choose_experts(const struct gate *gate, float *logits, int64_t *experts, float *weights, long n_rows)
{
    const struct call call = {gate, logits, experts, weights};
    fd_parallel(choose_rows, &call, n_rows, n_rows > SERIAL_ROWS ? fd_piece(n_rows) : n_rows);
}

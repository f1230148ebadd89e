/* Attention of sequences with one new token each, over float32 pages that are read where they lie; and how longer chunks
 * get their keys and values into pages.
 *
 * A page is [2 * n_kv_heads][page_tokens][head_dim], keys before values, so that all is read front to back. One piece of work is a sequence and a key head
 * with its query heads: it rotates the new query and key, stores key and value, and goes through the context once.
 */
#include <string.h>

#include "parallel.h"
#include "vectors.h"

/* Tokens scored before their values are added up; Python does not send larger groups of query heads. */
enum { BLOCK = 64, MAX_GROUP_FLOATS = 4096 };
/* Query heads worked on together, as many as there are registers for. */
#if LANES == 16
#define HEADS 4
#else
#define HEADS 2
#endif

struct shape {
    long n_heads, n_kv_heads, head_dim, page_tokens;
    float scale;
};

struct batch {
    const struct shape *shape;
    long n_sequences, table_stride;
    const int32_t *page_table; /* [n_sequences][table_stride] */
    const int32_t *n_context;  /* [n_sequences], the new token included */
    const int64_t *rows;       /* [n_sequences], where each new token is among the step's tokens */
};

struct call {
    const struct batch *batch;
    const float *qkv;      /* [tokens][n_heads + 2 n_kv_heads][head_dim] */
    const float *rotation; /* [tokens][head_dim / 2] pairs cosine, sine */
    float *pages, *out;    /* out [tokens][n_heads][head_dim] */
};

static void rotate(const float *x, const float *rotation, long n, float scale, float *y)
{
    for (long i = 0; i < n; i += 2) {
        const float c = rotation[i] * scale, s = rotation[i + 1] * scale, a = x[i], b = x[i + 1];
        y[i] = a * c - b * s;
        y[i + 1] = a * s + b * c;
    }
}

/* score[h][t] = q_h . k_t; the values are fetched meanwhile. */
INLINE void score_keys(const float *q, const float *k, long to_value, long n_tokens, long n, int n_heads,
                       float (*score)[BLOCK])
{
    for (long t = 0; t < n_tokens; t += 4) {
        /* At the end the last key stands in for those that are missing: its scores are overwritten. */
        const float *key[4];
        for (int j = 0; j < 4; j++)
            key[j] = k + (t + j < n_tokens ? t + j : n_tokens - 1) * n;
        vec sum[HEADS][4];
        for (int h = 0; h < n_heads; h++)
            for (int j = 0; j < 4; j++)
                sum[h][j] = v_set(0.0f);
        for (long i = 0; i < n; i += LANES) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const vec x = v_load(key[j] + i);
                _mm_prefetch((const char *)(key[j] + to_value + i), _MM_HINT_T1);
#pragma GCC unroll 4
                for (int h = 0; h < n_heads; h++)
                    sum[h][j] = v_fma(x, v_load(q + h * n + i), sum[h][j]);
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < n_heads; h++)
            _mm_storeu_ps(score[h] + t, v_sums(sum[h][0], sum[h][1], sum[h][2], sum[h][3]));
    }
}

/* Scores [BLOCK] become weights e^(score - largest), their sum is added to `total`; returns what earlier sums shrink by. */
static float weigh(float *score, long n_tokens, float *largest, float *total)
{
    const long n_padded = (n_tokens + LANES - 1) / LANES * LANES;
    for (long t = n_tokens; t < n_padded; t++)
        score[t] = -INFINITY;
    vec top = v_load(score);
    for (long t = LANES; t < n_padded; t += LANES)
        top = v_max(top, v_load(score + t));
    const float before = *largest, now = v_largest(top) > before ? v_largest(top) : before;
    for (long t = 0; t < n_padded; t += LANES)
        v_store(score + t, v_exp(v_add(v_load(score + t), v_set(-now))));
    for (long t = n_tokens; t < n_padded; t++)
        score[t] = 0.0f;
    vec sum = v_set(0.0f);
    for (long t = 0; t < n_padded; t += LANES)
        sum = v_add(sum, v_load(score + t));
    const float shrink = before == -INFINITY ? 0.0f : expf(before - now);
    *total = *total * shrink + v_sum(sum);
    *largest = now;
    return shrink;
}

/* out_h = out_h * shrink_h + sum of weight[h][t] * v_t, over floats [i, i + n_vectors * LANES) of each.
 * What `next` points to is fetched meanwhile.
 */
INLINE void add_columns(float (*weight)[BLOCK], const float *v, const float *next, long n_tokens, long n, const float *shrink,
                        float *out, long i, int n_vectors, int n_heads)
{
    vec sum[HEADS][4];
    for (int h = 0; h < n_heads; h++)
        for (int c = 0; c < n_vectors; c++)
            sum[h][c] = v_mul(v_load(out + h * n + i + c * LANES), v_set(shrink[h]));
    for (long t = 0; t < n_tokens; t++) {
        vec x[4];
#pragma GCC unroll 4
        for (int c = 0; c < n_vectors; c++) {
            x[c] = v_load(v + t * n + i + c * LANES);
            _mm_prefetch((const char *)(next + t * n + i + c * LANES), _MM_HINT_T1);
        }
#pragma GCC unroll 4
        for (int h = 0; h < n_heads; h++) {
            const vec w = v_set(weight[h][t]);
#pragma GCC unroll 4
            for (int c = 0; c < n_vectors; c++)
                sum[h][c] = v_fma(w, x[c], sum[h][c]);
        }
    }
    for (int h = 0; h < n_heads; h++)
        for (int c = 0; c < n_vectors; c++)
            v_store(out + h * n + i + c * LANES, sum[h][c]);
}

/* One block of tokens for `n_heads` query heads that share a key head. */
INLINE void attend_block(const float *q, const float *k, const float *next, long to_value, long n_tokens,
                         long n, float *largest, float *total, float *out, int n_heads)
{
    float score[HEADS][BLOCK], shrink[HEADS];
    score_keys(q, k, to_value, n_tokens, n, n_heads, score);
    for (int h = 0; h < n_heads; h++)
        shrink[h] = weigh(score[h], n_tokens, largest + h, total + h);
    long i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        add_columns(score, k + to_value, next, n_tokens, n, shrink, out, i, 4, n_heads);
    for (; i < n; i += LANES)
        add_columns(score, k + to_value, next, n_tokens, n, shrink, out, i, 1, n_heads);
}

#define ATTEND(n_heads)                                                                                           \
    static void attend_##n_heads(const float *q, const float *k, const float *next, long to_value, long n_tokens, \
                                 long n, float *largest, float *total, float *out)                                        \
    {                                                                                                             \
        attend_block(q, k, next, to_value, n_tokens, n, largest, total, out, n_heads);                          \
    }
ATTEND(1)
ATTEND(2)
#if HEADS == 4
ATTEND(3)
ATTEND(4)
static void (*const attend_heads[])(const float *, const float *, const float *, long, long, long, float *, float *, float *) = {
    0, attend_1, attend_2, attend_3, attend_4};
#else
static void (*const attend_heads[])(const float *, const float *, const float *, long, long, long, float *, float *, float *) = {
    0, attend_1, attend_2};
#endif

static void attend(const struct call *call, long sequence, long kv_head)
{
    const struct batch *batch = call->batch;
    const struct shape *s = batch->shape;
    const long n = s->head_dim, group = s->n_heads / s->n_kv_heads, to_value = s->n_kv_heads * s->page_tokens * n;
    const long page_floats = 2 * to_value, head = kv_head * s->page_tokens * n;
    const long row = batch->rows[sequence], n_context = batch->n_context[sequence];
    const int32_t *table = batch->page_table + sequence * batch->table_stride;
    const float *qkv = call->qkv + row * (s->n_heads + 2 * s->n_kv_heads) * n, *rotation = call->rotation + row * n;
    float q[MAX_GROUP_FLOATS], largest[MAX_GROUP_FLOATS / 8], total[MAX_GROUP_FLOATS / 8];
    float *out = call->out + (row * s->n_heads + kv_head * group) * n;

    for (long h = 0; h < group; h++) {
        rotate(qkv + (kv_head * group + h) * n, rotation, n, s->scale, q + h * n);
        largest[h] = -INFINITY;
        total[h] = 0.0f;
    }
    memset(out, 0, group * n * sizeof(float));
    const long last = n_context - 1;
    float *key = call->pages + table[last / s->page_tokens] * page_floats + head + last % s->page_tokens * n;
    rotate(qkv + (s->n_heads + kv_head) * n, rotation, n, 1.0f, key);
    memcpy(key + to_value, qkv + (s->n_heads + s->n_kv_heads + kv_head) * n, n * sizeof(float));

    const float *k = call->pages + table[0] * page_floats + head, *next;
    for (long t = 0, n_tokens; t < n_context; t += n_tokens, k = next) {
        const long left = s->page_tokens - t % s->page_tokens;
        n_tokens = n_context - t < left ? n_context - t : left;
        n_tokens = n_tokens < BLOCK ? n_tokens : BLOCK;
        next = k + n_tokens * n;
        if (n_tokens == left && t + n_tokens < n_context)
            next = call->pages + table[(t + n_tokens) / s->page_tokens] * page_floats + head;
        for (long h = 0; h < group; h += HEADS)
            attend_heads[group - h < HEADS ? group - h : HEADS](q + h * n, k, next, to_value, n_tokens, n, largest + h,
                                                                total + h, out + h * n);
    }
    for (long h = 0; h < group; h++)
        for (long i = 0; i < n; i += LANES)
            v_store(out + h * n + i, v_div(v_load(out + h * n + i), v_set(total[h])));
}

static void attend_some(const void *argument, long first, long last)
{
    const struct call *call = argument;
    const long n_kv_heads = call->batch->shape->n_kv_heads;
    for (long i = first; i < last; i++)
        attend(call, i / n_kv_heads, i % n_kv_heads);
}

void fd_decode(const struct batch *batch, const float *qkv, const float *rotation, float *pages, float *out)
{
    const struct call call = {batch, qkv, rotation, pages, out};
    fd_parallel(attend_some, &call, batch->n_sequences * batch->shape->n_kv_heads, 1);
}

struct rows {
    const struct shape *shape;
    float *qkv;            /* [rows][n_heads + 2 n_kv_heads][head_dim] */
    const float *rotation; /* [rows][head_dim / 2] pairs */
    float *pages;
    const int64_t *slots; /* [rows] page * page_tokens + offset */
};

static void store_rows(const void *argument, long first, long last)
{
    const struct rows *rows = argument;
    const struct shape *s = rows->shape;
    const long n = s->head_dim, n_kv = s->n_kv_heads, run = s->page_tokens * n;
    for (long row = first; row < last; row++) {
        float *head = rows->qkv + row * (s->n_heads + 2 * n_kv) * n;
        const long page = rows->slots[row] / s->page_tokens, offset = rows->slots[row] % s->page_tokens;
        float *to = rows->pages + page * 2 * n_kv * run + offset * n;
        for (long h = 0; h < s->n_heads; h++, head += n)
            rotate(head, rows->rotation + row * n, n, 1.0f, head);
        for (long h = 0; h < n_kv; h++, head += n, to += run)
            rotate(head, rows->rotation + row * n, n, 1.0f, to);
        for (long h = 0; h < n_kv; h++, head += n, to += run)
            memcpy(to, head, n * sizeof(float));
    }
}

/* Rotate the queries of all rows in place, and put rotated keys, and values, into pages. */
void fd_store(const struct shape *shape, float *qkv, const float *rotation, float *pages, const int64_t *slots,
              long n_rows)
{
    const struct rows rows = {shape, qkv, rotation, pages, slots};
    fd_parallel(store_rows, &rows, n_rows, fd_piece(n_rows));
}

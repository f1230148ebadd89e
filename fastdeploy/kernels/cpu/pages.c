/* Check values of KV pages, and copies of pages that are checked on the way. */
#include <immintrin.h>
#include <stdint.h>

/* A run of key heads in n_pages pages of one layer, at two places. Strides in words of 8 bytes: from page to page and
   from the keys to the values; the words of a head, and its heads, lie one after the other. */
struct page_copy {
    const uint64_t *from;
    uint64_t *to; /* NULL: nothing is copied */
    const int64_t *from_ids, *to_ids;
    long n_pages, n_heads, n_words;
    long from_page_stride, from_values, to_page_stride, to_values;
};

/* What kernels/page_copy_ref.py says; the same in every implementation. */
static const uint64_t KEY_STEP = 0x9E3779B97F4A7C15u;
enum { LANES = 4, STEP = 4 * LANES }; /* words of a vector, and of one turn of the loop */

static uint64_t term(uint64_t x, uint64_t key)
{
    const uint64_t y = x ^ key;
    return (y & 0xFFFFFFFFu) * (y >> 32) + (x << 32 | x >> 32);
}

static __m256i terms(__m256i x, __m256i key)
{
    const __m256i y = _mm256_xor_si256(x, key);
    return _mm256_add_epi64(_mm256_mul_epu32(y, _mm256_srli_epi64(y, 32)), _mm256_shuffle_epi32(x, 0xB1));
}

/* Check and copy n_words that are numbers first.. of a head. What was read once is what is both written and checked:
   the source may change meanwhile. Stores go around the caches, as the pages are not read soon and the caches belong
   to whoever computes. */
static uint64_t copy_block(const uint64_t *restrict from, uint64_t *restrict to, long n_words, uint64_t first)
{
    const int streams = to && (uintptr_t)to % sizeof(__m256i) == 0;
    const __m256i lane_step = _mm256_set1_epi64x(LANES * KEY_STEP), turn_step = _mm256_set1_epi64x(STEP * KEY_STEP);
    const uint64_t key = (first + 1) * KEY_STEP;
    __m256i keys[4], sums[4];
    keys[0] = _mm256_setr_epi64x(key, key + KEY_STEP, key + 2 * KEY_STEP, key + 3 * KEY_STEP);
    for (int j = 0; j < 4; j++) {
        sums[j] = _mm256_setzero_si256();
        if (j)
            keys[j] = _mm256_add_epi64(keys[j - 1], lane_step);
    }
    long i = 0;
    for (; i + STEP <= n_words; i += STEP)
        for (int j = 0; j < 4; j++) {
            const __m256i x = _mm256_loadu_si256((const __m256i *)(from + i) + j);
            sums[j] = _mm256_add_epi64(sums[j], terms(x, keys[j]));
            keys[j] = _mm256_add_epi64(keys[j], turn_step);
            if (streams)
                _mm256_stream_si256((__m256i *)(to + i) + j, x);
            else if (to)
                _mm256_storeu_si256((__m256i *)(to + i) + j, x);
        }
    uint64_t lanes[LANES], sum = 0;
    const __m256i pairs = _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
    _mm256_storeu_si256((__m256i *)lanes, pairs);
    for (int j = 0; j < LANES; j++)
        sum += lanes[j];
    for (; i < n_words; i++) {
        const uint64_t x = from[i];
        sum += term(x, key + (uint64_t)i * KEY_STEP);
        if (to)
            to[i] = x;
    }
    return sum;
}

/* checks [n_pages, n_heads], of what lies at `to` after the copy. */
void fd_copy_pages(const struct page_copy *copy, uint64_t *checks)
{
    const long words = copy->n_words;
    for (long page = 0; page < copy->n_pages; page++) {
        const uint64_t *from = copy->from + copy->from_ids[page] * copy->from_page_stride;
        uint64_t *to = copy->to ? copy->to + copy->to_ids[page] * copy->to_page_stride : NULL;
        for (long head = 0; head < copy->n_heads; head++) {
            const long at = head * words;
            uint64_t sum = copy_block(from + at, to ? to + at : NULL, words, 0);
            sum += copy_block(from + copy->from_values + at, to ? to + copy->to_values + at : NULL, words, words);
            checks[page * copy->n_heads + head] = sum;
        }
    }
    _mm_sfence(); /* what went around the caches is there for all when the caller says so */
}

/* One vector of floats, as wide as the instruction set that this is compiled for: AVX-512, or AVX2 with FMA and F16C.
 *
 * Weights come in panels of PANEL outputs: VECTORS vectors make a panel.
 */
#ifndef FD_VECTORS_H
#define FD_VECTORS_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#define PANEL 16
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)

#define LANES 16
typedef __m512 vec;

INLINE vec v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, vec x) { _mm512_storeu_ps(p, x); }
INLINE vec v_set(float x) { return _mm512_set1_ps(x); }
INLINE vec v_add(vec x, vec y) { return _mm512_add_ps(x, y); }
INLINE vec v_mul(vec x, vec y) { return _mm512_mul_ps(x, y); }
INLINE vec v_div(vec x, vec y) { return _mm512_div_ps(x, y); }
INLINE vec v_max(vec x, vec y) { return _mm512_max_ps(x, y); }
INLINE vec v_min(vec x, vec y) { return _mm512_min_ps(x, y); }
INLINE vec v_fma(vec x, vec y, vec z) { return _mm512_fmadd_ps(x, y, z); }
INLINE vec v_round(vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec v_exp2i(vec n)
{
    __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
}
INLINE vec v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vec v_load_bf16(const uint16_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE __m256 v_folded(vec x)
{
    return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}
INLINE float v_sum(vec x) { return _mm512_reduce_add_ps(x); }
INLINE float v_largest(vec x) { return _mm512_reduce_max_ps(x); }

#else

#define LANES 8
typedef __m256 vec;

INLINE vec v_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void v_store(float *p, vec x) { _mm256_storeu_ps(p, x); }
INLINE vec v_set(float x) { return _mm256_set1_ps(x); }
INLINE vec v_add(vec x, vec y) { return _mm256_add_ps(x, y); }
INLINE vec v_mul(vec x, vec y) { return _mm256_mul_ps(x, y); }
INLINE vec v_div(vec x, vec y) { return _mm256_div_ps(x, y); }
INLINE vec v_max(vec x, vec y) { return _mm256_max_ps(x, y); }
INLINE vec v_min(vec x, vec y) { return _mm256_min_ps(x, y); }
INLINE vec v_fma(vec x, vec y, vec z) { return _mm256_fmadd_ps(x, y, z); }
INLINE vec v_round(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec v_exp2i(vec n)
{
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
INLINE vec v_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE vec v_load_bf16(const uint16_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE __m256 v_folded(vec x) { return x; }
INLINE __m128 v_halves(vec x, int want_largest)
{
    __m128 low = _mm256_castps256_ps128(x), high = _mm256_extractf128_ps(x, 1);
    return want_largest ? _mm_max_ps(low, high) : _mm_add_ps(low, high);
}
INLINE float v_sum(vec x)
{
    __m128 y = v_halves(x, 0);
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
INLINE float v_largest(vec x)
{
    __m128 y = v_halves(x, 1);
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

#endif

#define VECTORS (PANEL / LANES)

/* The sums of four vectors. */
INLINE __m128 v_sums(vec a, vec b, vec c, vec d)
{
    __m256 ab = _mm256_hadd_ps(v_folded(a), v_folded(b)), cd = _mm256_hadd_ps(v_folded(c), v_folded(d));
    __m256 abcd = _mm256_hadd_ps(ab, cd);
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

/* e^x to about 1e-7, for x clamped to [-87, 88]: 2^n times a polynomial in what is left of x.
 *
 * Of two operands one of which is NaN, max and min give the second: so NaN stays NaN.
 */
INLINE vec v_exp(vec x)
{
    x = v_min(v_set(88.0f), v_max(v_set(-87.0f), x));
    vec n = v_round(v_mul(x, v_set(1.44269504089f)));
    /* log(2) in two parts, the first with enough trailing zeros for n times it to be exact. */
    vec r = v_fma(n, v_set(-0.693359375f), x);
    r = v_fma(n, v_set(2.12194440e-4f), r);
    vec p = v_set(1.0f / 5040);
    p = v_fma(p, r, v_set(1.0f / 720));
    p = v_fma(p, r, v_set(1.0f / 120));
    p = v_fma(p, r, v_set(1.0f / 24));
    p = v_fma(p, r, v_set(1.0f / 6));
    p = v_fma(p, r, v_set(0.5f));
    p = v_fma(p, r, v_set(1.0f));
    p = v_fma(p, r, v_set(1.0f));
    return v_mul(p, v_exp2i(n));
}

/* x / (1 + e^-x) */
INLINE vec v_silu(vec x)
{
    return v_div(x, v_add(v_set(1.0f), v_exp(v_mul(x, v_set(-1.0f)))));
}

#endif

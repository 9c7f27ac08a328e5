// Vectors of W floats, written with the compiler's vector extensions so that one source serves every instruction set.
// Included only by isa.cpp, once for each instruction set; everything is static, so that no two copies can be mixed up.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
static constexpr int W = 16;
#elif defined(__AVX2__)
#include <immintrin.h>
static constexpr int W = 8;
#else
static constexpr int W = 4;
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#endif

namespace {

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef int8_t vb __attribute__((vector_size(W)));
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef int8_t vb_any __attribute__((vector_size(W), aligned(1), may_alias));

// f(0), f(1), ... f(N - 1) with constants for arguments. An array indexed so is a set of registers from the start; in a
// loop with a pragma it becomes one late, and sometimes not at all.
template <class F, int... I>
INLINE void unroll_of(F f, std::integer_sequence<int, I...>) { (f(std::integral_constant<int, I>{}), ...); }
template <int N, class F>
INLINE void unroll(F f) { unroll_of(f, std::make_integer_sequence<int, N>{}); }
#define EACH(i) [&](auto i) __attribute__((always_inline))

// Rows of a tile; a build with sanitizers, where every variant takes long to compile, has tiles of fewer.
#ifndef NEX_MOST_ROWS
#define NEX_MOST_ROWS 12
#endif
constexpr int at_most(int rows) { return rows < NEX_MOST_ROWS ? rows : NEX_MOST_ROWS; }

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE vf splat(float x) { return x - vf{}; }
INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
INLINE void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }
INLINE vi bits(vf v) { return reinterpret_cast<vi>(v); }
INLINE vf from_bits(vi v) { return reinterpret_cast<vf>(v); }
INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

// The first n < W floats; the other lanes are 0, and nothing behind them is read or written.
INLINE vf load_first(const float* p, int n) {
    vf v{};
    std::memcpy(&v, p, size_t(n) * 4);
    return v;
}
INLINE void store_first(float* p, vf v, int n) { std::memcpy(p, &v, size_t(n) * 4); }

// What a number is stored as: float, bfloat16 or int8 (its scale is applied by whoever reads it).
struct bf16 {
    uint16_t bits;
};
INLINE vf widen(vh h) { return from_bits(reinterpret_cast<vi>(__builtin_convertvector(h, vu) << 16)); }
INLINE vf widen(vb b) { return __builtin_convertvector(__builtin_convertvector(b, vi), vf); }
INLINE vf load(const bf16* p) { return widen(*reinterpret_cast<const vh_any*>(p)); }
INLINE vf load(const int8_t* p) { return widen(*reinterpret_cast<const vb_any*>(p)); }
struct half {
    uint16_t bits;
};
INLINE vf load(const half* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__ARM_NEON)
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
#endif
}
INLINE vf load_first(const bf16* p, int n) {
    vh h{};
    std::memcpy(&h, p, size_t(n) * 2);
    return widen(h);
}
INLINE vf load_first(const int8_t* p, int n) {
    vb b{};
    std::memcpy(&b, p, size_t(n));
    return widen(b);
}

// Round to nearest even; a NaN stays a NaN, whatever its payload.
INLINE bf16 to_bf16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    if (x != x) return {uint16_t((u >> 16) | 0x40)};
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

INLINE float sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#elif defined(__AVX2__)
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

INLINE bool any_nan(vf v) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0;
#else
    const float total = sum(v * 0.0f);
    return total != total;
#endif
}

INLINE float largest(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#elif defined(__AVX2__)
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
#else
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
#endif
}

// Columns become rows: blocks off the diagonal change places, from the largest to the smallest.
template <int STEP>
INLINE void swap_blocks(vf* square) {
    vi first{}, second{};
    for (int l = 0; l < W; ++l) {
        first[l] = (l & STEP) == 0 ? l : l - STEP + W;
        second[l] = (l & STEP) == 0 ? l + STEP : l + W;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
        if ((i & STEP) != 0) continue;
        vf a = square[i], b = square[i + STEP];
        square[i] = __builtin_shuffle(a, b, first);
        square[i + STEP] = __builtin_shuffle(a, b, second);
    }
}
INLINE void transpose(vf* square) {
    if (W >= 16) swap_blocks<W >= 16 ? 8 : 1>(square);
    if (W >= 8) swap_blocks<W >= 8 ? 4 : 1>(square);
    swap_blocks<2>(square);
    swap_blocks<1>(square);
}

// e^x for x <= 88.7: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial of degree 6 in r (the coefficients of Cephes'
// expf). Within 2 units in the last place; 0 below -87.3, so also for -infinity; NaN stays NaN.
INLINE vf exponential(vf x) {
    const vf round = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
    vf shifted = x * 1.44269504088896341f + round;
    vf n = shifted - round;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vi exponent = bits(shifted) - bits(round);
    vf scaled = p * from_bits((exponent + 127) << 23);
    return select(x < splat(-87.3f), vf{}, scaled);
}

// x / (1 + e^-x); 0 below -87, where it is smaller than 2e-36 in size and the exponential would leave its range.
INLINE vf silu(vf x) { return select(x < splat(-87.0f), vf{}, x / (1.0f + exponential(-x))); }

}  // namespace

// Four products of 8-bit integers at a time, by instruction set.
//
// Four numbers of k go together: one 32-bit lane of an output's weights times four bytes of x.
#pragma once
#include "vec.h"

namespace {

// Dot8: weights -127 .. 127. Dot4: weights 0 .. 15. GROUPS: of four numbers in a block. LANES: accumulators a panel.
// Group: four numbers of x as they are kept in a tile. begin: a sum before the first product, from x's total.
// KEPT: registers hold the float sums of a tile as well, so that they stay there from the first block to the last.

#if defined(__AVX512VNNI__)
// One side of the products is without sign: weights are moved up by 128, which is taken off again before it is added.
struct Dot8 {
    typedef int32_t Group;
    typedef __m512i Sum;
    static constexpr int LANES = 1, ROWS = at_most(6), PANELS = 2, GROUPS = 16;
    static constexpr bool KEPT = true;
    INLINE Sum begin(const float* x_total) { return _mm512_castps_si512(_mm512_set1_ps(*x_total)); }
    INLINE __m512i weights(const int8_t* p, int) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }
    INLINE __m512i numbers(Group g) { return _mm512_set1_epi32(g); }
    INLINE Sum add(Sum s, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(s, w, x); }
    INLINE vi total(const Sum* s, int) { return reinterpret_cast<vi>(s[0]); }
};
struct Dot4 : Dot8 {
    static constexpr int GROUPS = 8;
    INLINE Sum begin(const float*) { return Sum{}; }
    INLINE __m512i weights(const int8_t* p, int) { return _mm512_loadu_si512(p); }
    INLINE __m512i low(__m512i both) { return _mm512_and_si512(both, _mm512_set1_epi8(15)); }
    INLINE __m512i high(__m512i both) { return low(_mm512_srli_epi16(both, 4)); }
};
#elif defined(__AVX2__)
// 8 bits by 8 bits do not fit the 16-bit sums of maddubs, so these are widened to 16 first. Every sum is of two of the
// four products: `total` adds neighbours.
struct Dot8 {
    typedef int64_t Group;
    static constexpr int GROUPS = 16;
    static constexpr bool KEPT = false;
#if defined(__AVX512F__)
    typedef __m512i Sum;
    static constexpr int LANES = 2, ROWS = at_most(12), PANELS = 1;
    INLINE __m512i weights(const int8_t* p, int lane) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + lane));
    }
    INLINE __m512i numbers(Group g) { return _mm512_set1_epi64(g); }
    INLINE Sum add(Sum s, __m512i w, __m512i x) { return _mm512_add_epi32(s, _mm512_madd_epi16(w, x)); }
    INLINE vi total(const Sum* s, int) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        return reinterpret_cast<vi>(_mm512_add_epi32(_mm512_permutex2var_epi32(s[0], even, s[1]),
                                                     _mm512_permutex2var_epi32(s[0], odd, s[1])));
    }
#else
    typedef __m256i Sum;
    static constexpr int LANES = 4, ROWS = at_most(2), PANELS = 1;
    INLINE __m256i weights(const int8_t* p, int lane) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + lane));
    }
    INLINE __m256i numbers(Group g) { return _mm256_set1_epi64x(g); }
    INLINE Sum add(Sum s, __m256i w, __m256i x) { return _mm256_add_epi32(s, _mm256_madd_epi16(w, x)); }
    INLINE vi total(const Sum* s, int v) {
        return reinterpret_cast<vi>(_mm256_permute4x64_epi64(_mm256_hadd_epi32(s[2 * v], s[2 * v + 1]), 0xd8));
    }
#endif
    INLINE Sum begin(const float*) { return Sum{}; }
};
// 4 bits by 8 bits do fit: a whole block is summed in 16 bits (8 * 2 * 15 * 127 < 2^15).
struct Dot4 {
    typedef int32_t Group;
    static constexpr int GROUPS = 8;
    static constexpr bool KEPT = false;
#if defined(__AVX512F__)
    typedef __m512i Sum;
    static constexpr int LANES = 1, ROWS = at_most(12), PANELS = 2;
    INLINE __m512i weights(const int8_t* p, int) { return _mm512_loadu_si512(p); }
    INLINE __m512i numbers(Group g) { return _mm512_set1_epi32(g); }
    INLINE Sum add(Sum s, __m512i w, __m512i x) { return _mm512_add_epi16(s, _mm512_maddubs_epi16(w, x)); }
    INLINE vi total(const Sum* s, int) { return reinterpret_cast<vi>(_mm512_madd_epi16(s[0], _mm512_set1_epi16(1))); }
#else
    typedef __m256i Sum;
    static constexpr int LANES = 2, ROWS = at_most(6), PANELS = 1;
    INLINE __m256i weights(const int8_t* p, int lane) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + lane);
    }
    INLINE __m256i numbers(Group g) { return _mm256_set1_epi32(g); }
    INLINE Sum add(Sum s, __m256i w, __m256i x) { return _mm256_add_epi16(s, _mm256_maddubs_epi16(w, x)); }
    INLINE vi total(const Sum* s, int v) { return reinterpret_cast<vi>(_mm256_madd_epi16(s[v], _mm256_set1_epi16(1))); }
#endif
    INLINE Sum begin(const float*) { return Sum{}; }
};
#else
struct Dot8 {
    typedef int32_t Group;
    typedef vi Sum;
    static constexpr int LANES = 4, ROWS = at_most(6), PANELS = 1, GROUPS = 16;
    static constexpr bool KEPT = false;
    INLINE Sum begin(const float*) { return Sum{}; }
    INLINE vi weights(const int8_t* p, int lane) { return bits(load(reinterpret_cast<const float*>(p) + lane * W)); }
    INLINE vi numbers(Group g) { return vi{} + g; }
    INLINE Sum add(Sum s, vi w, vi x) {
#if defined(__ARM_FEATURE_DOTPROD)
        return vdotq_s32(s, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
#else
        unroll<4>(EACH(j) { s += ((w << (24 - 8 * j)) >> 24) * ((x << (24 - 8 * j)) >> 24); });
        return s;
#endif
    }
    INLINE vi total(const Sum* s, int v) { return s[v]; }
};
struct Dot4 : Dot8 {
    static constexpr int GROUPS = 8;
};
#endif

}  // namespace

// Linear maps with integer arithmetic: rows of x are quantised to 8 bits on the fly and multiplied by weights of 8 or 4
// bits. Tiles as in gemm.h, other inner loops, and a tile's sums leave for `out` before the next one begins.
//
// x = a * scale of a block of 64 (INT8) or 32 (Q4) numbers of a row: one scale a row would lose what lies beside an
// outlier. A block's products are summed as integers, then scaled into float sums. INT8 has one scale an output, which
// comes at the end; Q4 has one a block, and a minimum that is multiplied by the sum of x's block.
//
// Four numbers of k go together: one 32-bit lane of an output's weights times four bytes of x.
#pragma once
#include "gemm.h"

namespace {

static constexpr int64_t SHARE_BYTES = 512 << 10;  // of integers of x that a task reads, at most
static constexpr int64_t SHARE_TILES = 16;         // with fewer tiles each, threads share out weights and not rows

// ---- four products at a time, by instruction set -------------------------------------------------------------------
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
        each<4>(EACH(j) { s += ((w << (24 - 8 * j)) >> 24) * ((x << (24 - 8 * j)) >> 24); });
        return s;
#endif
    }
    INLINE vi total(const Sum* s, int v) { return s[v]; }
};
struct Dot4 : Dot8 {
    static constexpr int GROUPS = 8;
};
#endif

// acc [ROWS][N] += a group of each row, `stride` apart, times a group of panels [16][4], as many as the registers hold.
template <class D, int ROWS, class Sums>
INLINE void add_group(const typename D::Group* tile, int64_t stride, const int8_t* first, const int8_t* second, Sums& acc) {
    constexpr int N = D::PANELS * D::LANES;
    auto weights = [&](int v) __attribute__((always_inline)) {
        return v < D::LANES ? D::weights(first, v) : D::weights(second, v - D::LANES);
    };
    if constexpr (ROWS < N) {  // the smaller side stays in registers
        decltype(D::numbers(0)) x[ROWS];
        each<ROWS>(EACH(r) { x[r] = D::numbers(tile[r * stride]); });
        each<N>(EACH(v) {
            const auto w = weights(v);
            each<ROWS>(EACH(r) { acc[r][v] = D::add(acc[r][v], w, x[r]); });
        });
    } else {
        decltype(D::numbers(0)) w[N];
        each<N>(EACH(v) { w[v] = weights(v); });
        each<ROWS>(EACH(r) {
            const auto x = D::numbers(tile[r * stride]);
            each<N>(EACH(v) { acc[r][v] = D::add(acc[r][v], w[v], x); });
        });
    }
}

// What a tile of rows is multiplied by, for one or two panels. scales: Q4 [blocks][16], INT8 [16].
struct Panels {
    const int8_t *first, *second;
    const float *first_scales, *second_scales;
};

// multiply_blocks where registers hold all sums. A block is unrolled: with as many rows as fit, each product waits for
// none of the others.
template <class D, int ROWS>
static void multiply_kept(const typename D::Group* tile, int64_t stride, int64_t groups, const Panels& w,
                          const float* x_scales, const float* x_totals, float* sums) {
    constexpr int N = D::PANELS;
    constexpr bool Q4 = D::GROUPS == 8;
    const int8_t *first = w.first, *second = w.second;
    vf total[ROWS][N];
    each<ROWS>(EACH(r) { each<N>(EACH(p) { total[r][p] = Q4 ? load(sums + r * 2 * PANEL + p * PANEL) : vf{}; }); });
    for (int64_t from = 0, b = 0; from < groups; from += D::GROUPS, ++b) {
        typename D::Sum acc[ROWS][N];
        each<ROWS>(EACH(r) {
            const auto start = D::begin(x_totals + b * ROWS + r);
            each<N>(EACH(p) { acc[r][p] = start; });
        });
        const int count = groups - from < D::GROUPS ? int(groups - from) : D::GROUPS;
        const typename D::Group* x = tile + from;
        for (int g = 0; g < count; ++g, ++x, first += 4 * PANEL, second += 4 * PANEL)
            add_group<D, ROWS>(x, stride, first, second, acc);
        vf scale[N];
        if (Q4) each<N>(EACH(p) { scale[p] = load((p == 0 ? w.first_scales : w.second_scales) + b * PANEL); });
        each<ROWS>(EACH(r) {
            const vf x_scale = splat(x_scales[b * ROWS + r]);
            each<N>(EACH(p) {
                const vf value = __builtin_convertvector(D::total(&acc[r][p], 0), vf);
                total[r][p] += Q4 ? value * scale[p] * x_scale : value * x_scale;
            });
        });
    }
    if (!Q4) {
        vf scale[N];
        each<N>(EACH(p) { scale[p] = load(p == 0 ? w.first_scales : w.second_scales); });
        each<ROWS>(EACH(r) { each<N>(EACH(p) { total[r][p] *= scale[p]; }); });
    }
    each<ROWS>(EACH(r) { each<N>(EACH(p) { store(sums + r * 2 * PANEL + p * PANEL, total[r][p]); }); });
}

// sums [ROWS][32] of rows of x [groups], `stride` groups apart, times panels [groups][16][4], block by block: each scaled
// by x_scales [blocks][ROWS] and by the panels' scales. Q4: added to the sums. x_totals [blocks][ROWS]: for `begin`.
template <class D, int ROWS>
static void multiply_blocks(const typename D::Group* tile, int64_t stride, int64_t groups, const Panels& w,
                            const float* x_scales, const float* x_totals, float* sums) {
    constexpr int N = D::PANELS * D::LANES;
    if (D::GROUPS != 8) for (int r = 0; r < ROWS; ++r) std::memset(sums + r * 2 * PANEL, 0, D::PANELS * PANEL * 4);
    for (int64_t from = 0, b = 0; from < groups; from += D::GROUPS, ++b) {
        typename D::Sum acc[ROWS][N];
        each<ROWS>(EACH(r) {
            const auto start = D::begin(x_totals + b * ROWS + r);
            each<N>(EACH(v) { acc[r][v] = start; });
        });
        const int64_t past = from + D::GROUPS < groups ? from + D::GROUPS : groups;
        for (int64_t g = from; g < past; ++g)
            add_group<D, ROWS>(tile + g, stride, w.first + g * 4 * PANEL, w.second + g * 4 * PANEL, acc);
        // through memory: else the compiler has too few registers for what follows and takes them from the loop above
        alignas(64) int32_t found[ROWS][D::PANELS * PANEL];
        each<ROWS>(EACH(r) {
            each<D::PANELS>(EACH(p) {
                typename D::Sum part[D::LANES];
                each<D::LANES>(EACH(i) { part[i] = acc[r][p * D::LANES + i]; });
                each<PANEL_VECTORS>(EACH(v) {
                    const vi total = D::total(part, v);
                    std::memcpy(found[r] + p * PANEL + v * W, &total, sizeof(total));
                });
            });
        });
        __asm__ volatile("" ::: "memory");
        for (int v = 0; v < D::PANELS * PANEL; v += W) {
            const float* scales = v < PANEL ? w.first_scales + v : w.second_scales + v - PANEL;
            const vf scale = D::GROUPS == 8 ? load(scales + b * PANEL) : vf{};
            for (int r = 0; r < ROWS; ++r) {
                vf value = __builtin_convertvector(bits(load(reinterpret_cast<const float*>(found[r] + v))), vf);
                if (D::GROUPS == 8) value *= scale;
                float* sum = sums + r * 2 * PANEL + v;
                store(sum, load(sum) + value * splat(x_scales[b * ROWS + r]));
            }
        }
    }
    if (D::GROUPS == 8) return;
    for (int v = 0; v < D::PANELS * PANEL; v += W) {
        const vf scale = load(v < PANEL ? w.first_scales + v : w.second_scales + v - PANEL);
        for (int r = 0; r < ROWS; ++r) store(sums + r * 2 * PANEL + v, load(sums + r * 2 * PANEL + v) * scale);
    }
}

template <class D, int ROWS>
static void multiply_tile(const typename D::Group* tile, int64_t stride, int64_t groups, const Panels& w,
                          const float* x_scales, const float* x_totals, float* sums) {
    if constexpr (D::KEPT) multiply_kept<D, ROWS>(tile, stride, groups, w, x_scales, x_totals, sums);
    else multiply_blocks<D, ROWS>(tile, stride, groups, w, x_scales, x_totals, sums);
}

// Groups of a row of x: whole blocks, filled up with zeros.
template <class D>
INLINE int64_t stride_of(int64_t k) { return round_up((k + 3) / 4, D::GROUPS); }

// Where a tile's integers, scales and block sums lie.
template <class D>
struct IntegerTile {
    typename D::Group* groups;  // [height][stride]
    float* scales;              // [blocks][height]
    float* totals;              // [blocks][height]: Q4: the sum of the integers times the scale; INT8: -128 times that
                                // sum, the bits of an int32
};

// Q4 without unpacking it first, for a single tile: sums [ROWS][32] of x times two panels as they are kept.
template <class D, int ROWS>
static void multiply_packed(const NexWeight& w, const int64_t* panel, const IntegerTile<D>& x, float* sums) {
    constexpr int N = 2;
    const int64_t blocks = w.k / 32;
    const int8_t* data[N];
    const half *scales[N], *minima[N];
    each<N>(EACH(p) {
        data[p] = static_cast<const int8_t*>(w.data) + panel[p] * panel_bytes(w);
        scales[p] = static_cast<const half*>(w.scale) + panel[p] * blocks * PANEL;
        minima[p] = static_cast<const half*>(w.minimum) + panel[p] * blocks * PANEL;
    });
    vf total[ROWS][N] = {};
    for (int64_t b = 0; b < blocks; ++b) {
        typename D::Sum acc[ROWS][N] = {};
        each<4>(EACH(i) {
            decltype(D::numbers(0)) low[N], high[N];
            each<N>(EACH(p) {
                const auto both = D::weights(data[p] + (4 * b + i) * 4 * PANEL, 0);
                low[p] = D::low(both), high[p] = D::high(both);
            });
            each<ROWS>(EACH(r) {
                const typename D::Group* at = x.groups + r * stride_of<D>(w.k) + 8 * b + 2 * i;
                const auto first = D::numbers(at[0]), second = D::numbers(at[1]);
                each<N>(EACH(p) { acc[r][p] = D::add(D::add(acc[r][p], low[p], first), high[p], second); });
            });
        });
        each<N>(EACH(p) {
            const vf scale = load(scales[p] + b * PANEL), minimum = load(minima[p] + b * PANEL);
            each<ROWS>(EACH(r) {
                const vf value = __builtin_convertvector(D::total(&acc[r][p], 0), vf);
                total[r][p] += value * scale * splat(x.scales[b * ROWS + r]) + minimum * splat(x.totals[b * ROWS + r]);
            });
        });
    }
    each<ROWS>(EACH(r) { each<N>(EACH(p) { store(sums + r * 2 * PANEL + p * PANEL, total[r][p]); }); });
}

#define NEX_CASES(FUNCTION) \
    NEX_CASE(FUNCTION, 1) NEX_CASE(FUNCTION, 2) NEX_CASE(FUNCTION, 3) NEX_CASE(FUNCTION, 4) NEX_CASE(FUNCTION, 5) \
    NEX_CASE(FUNCTION, 6) NEX_CASE(FUNCTION, 7) NEX_CASE(FUNCTION, 8) NEX_CASE(FUNCTION, 9) NEX_CASE(FUNCTION, 10) \
    NEX_CASE(FUNCTION, 11) NEX_CASE(FUNCTION, 12)
#define NEX_CASE(FUNCTION, R) \
    case R: return FUNCTION<D, (R <= D::ROWS ? R : 1)>;

template <class D>
static auto multiply_tile_for(int rows)
    -> void (*)(const typename D::Group*, int64_t, int64_t, const Panels&, const float*, const float*, float*) {
    switch (rows) { NEX_CASES(multiply_tile) }
    return nullptr;
}

template <class D>
static auto multiply_packed_for(int rows) -> void (*)(const NexWeight&, const int64_t*, const IntegerTile<D>&, float*) {
    switch (rows) { NEX_CASES(multiply_packed) }
    return nullptr;
}
#undef NEX_CASE
#undef NEX_CASES

// ---- x in integers ---------------------------------------------------------------------------------------------------

// W numbers as their groups keep them.
INLINE void put_numbers(int32_t* to, vi q) {
    const vb bytes = __builtin_convertvector(q, vb);
    std::memcpy(to, &bytes, sizeof(bytes));
}
INLINE void put_numbers(int64_t* to, vi q) {
    const vh wide = __builtin_convertvector(q, vh);
    std::memcpy(to, &wide, sizeof(wide));
}

// Rows of x, normalised, as integers of `block` numbers a scale. A block with a NaN or an infinity gets a NaN for a scale.
template <class D>
static void quantise_tile(const NexLinear& op, int64_t row, int height, const IntegerTile<D>& to) {
    constexpr int BLOCK = 4 * D::GROUPS, N = BLOCK / W;
    const int64_t k = op.weight->k;
    for (int r = 0; r < height; ++r) {
        const float* x = op.x + (row + r) * op.x_stride;
        const vf factor = splat(op.norm == nullptr ? 1.0f : inverse_rms(x, k, op.eps));
        for (int64_t b = 0, at = 0; at < k; ++b, at += BLOCK) {
            const float *from = x + at, *norm = op.norm == nullptr ? nullptr : op.norm + at;
            float last[BLOCK], last_norm[BLOCK];  // filled up with zeros
            if (at + BLOCK > k) {
                for (int64_t i = 0; i < BLOCK; ++i) {
                    last[i] = at + i < k ? from[i] : 0.0f;
                    last_norm[i] = norm != nullptr && at + i < k ? norm[i] : 0.0f;
                }
                from = last;
                if (norm != nullptr) norm = last_norm;
            }
            vf v[N];
            each<N>(EACH(i) { v[i] = load(from + i * W); });
            if (norm != nullptr) each<N>(EACH(i) { v[i] = v[i] * factor * load(norm + i * W); });
            const vi infinity = vi{} + 0x7f800000;
            vi peak{};  // as integers, sizes are in the order of their numbers, and a NaN is larger than infinity
            each<N>(EACH(i) {
                const vi size = bits(v[i]) & 0x7fffffff;
                peak = size > peak ? size : peak;
            });
            const float size = largest(from_bits(peak < infinity ? peak : infinity));
            const bool odd = size == __builtin_inff();
            const float scale = odd ? __builtin_nanf("") : size / 127.0f, inverse = size > 0.0f && !odd ? 127.0f / size : 0.0f;
            const vf round = splat(12582912.0f);  // see exponential
            vi total{};
            each<N>(EACH(i) {
                const vi q = odd ? vi{} : bits(v[i] * inverse + round) - bits(round);
                total += q;
                put_numbers(to.groups + r * stride_of<D>(k) + (at + i * W) / 4, q);
            });
            to.scales[b * height + r] = scale;
            const float whole = sum(__builtin_convertvector(total, vf));
            const int32_t moved = -128 * int32_t(whole);
            if (D::GROUPS == 8) to.totals[b * height + r] = whole * scale;
            else std::memcpy(to.totals + b * height + r, &moved, 4);
        }
    }
}

// ---- tasks -------------------------------------------------------------------------------------------------------------

// Integers of a Q4 panel [k / 4][16][4].
static void unpack_integers(const NexWeight& w, int64_t panel, int8_t* out) {
    const uint8_t* from = static_cast<const uint8_t*>(w.data) + panel * panel_bytes(w);
    for (int64_t i = 0; i < w.k / 8; ++i)
        for (int j = 0; j < 4 * PANEL; ++j) {
            out[i * 8 * PANEL + j] = int8_t(from[i * 4 * PANEL + j] & 15);
            out[i * 8 * PANEL + 4 * PANEL + j] = int8_t(from[i * 4 * PANEL + j] >> 4);
        }
}

// Halves as floats.
static void unpack_halves(const void* from, int64_t at, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += W) store(out + i, load(static_cast<const half*>(from) + at + i));
}

// Two panels of Q4, unpacked: integers [k / 4][16][4], scales and minima [k / 32][16].
struct Unpacked {
    float *scales[2], *minima[2];
    int8_t* numbers[2];

    static int64_t bytes(int64_t k) { return 2 * (k * PANEL + 2 * k / 32 * PANEL * 4); }
    Unpacked(char* memory, int64_t k) {
        auto take = [&](int64_t size) {
            char* taken = memory;
            memory += size;
            return taken;
        };
        for (int p = 0; p < 2; ++p) {
            scales[p] = reinterpret_cast<float*>(take(k / 32 * PANEL * 4));
            minima[p] = reinterpret_cast<float*>(take(k / 32 * PANEL * 4));
            numbers[p] = reinterpret_cast<int8_t*>(take(k * PANEL));
        }
    }
    void fill(const NexWeight& w, int p, int64_t panel) const {
        const int64_t size = w.k / 32 * PANEL;
        unpack_integers(w, panel, numbers[p]);
        unpack_halves(w.scale, panel * size, size, scales[p]);
        unpack_halves(w.minimum, panel * size, size, minima[p]);
    }
};

// sums of a tile += its integers times a pair of panels; one panel at a time where the registers hold no more.
template <class D>
static void multiply_panels(int height, const IntegerTile<D>& x, int64_t k, Panels w, float* sums) {
    auto kernel = multiply_tile_for<D>(height);
    const int64_t stride = stride_of<D>(k), groups = (k + 3) / 4;
    const Panels other{w.second, w.second, w.second_scales, w.second_scales};
    if (w.second == nullptr) w.second = w.first, w.second_scales = w.first_scales;  // into columns that do not matter
    kernel(x.groups, stride, groups, w, x.scales, x.totals, sums);
    if (other.first != nullptr && D::PANELS == 1) kernel(x.groups, stride, groups, other, x.scales, x.totals, sums + PANEL);
}

// A pair of panels, the second < 0 if there is one only, times the tiles t0 .. t1 of x.
template <class D>
static void int8_task(const NexLinear& op, const Tiles& tiles, const IntegerTile<D>* copied, int64_t pair,
                      const int64_t (&panel)[2], int64_t t0, int64_t t1) {
    const NexWeight& w = *op.weight;
    const int8_t* data = static_cast<const int8_t*>(w.data);
    const float* scales = static_cast<const float*>(w.scale);
    const bool two = panel[1] >= 0;
    const Panels panels{data + panel[0] * panel_bytes(w), two ? data + panel[1] * panel_bytes(w) : nullptr,
                        scales + panel[0] * PANEL, two ? scales + panel[1] * PANEL : nullptr};
    alignas(64) float sums[D::ROWS * 2 * PANEL];
    for (int64_t t = t0; t < t1; ++t) {
        multiply_panels<D>(tiles.height(t), copied[t], w.k, panels, sums);
        finish(op, pair, tiles.begin(t), tiles.height(t), sums);
    }
}

template <class D>
static void q4_task(const NexLinear& op, const Tiles& tiles, const IntegerTile<D>* copied, int64_t pair,
                    const int64_t (&panel)[2], int64_t t0, int64_t t1, const Unpacked& to) {
    const NexWeight& w = *op.weight;
    const bool two = panel[1] >= 0;
    alignas(64) float sums[D::ROWS * 2 * PANEL];
    if constexpr (D::KEPT) {
        if (t1 - t0 == 1) {
            const int64_t both[2] = {panel[0], two ? panel[1] : panel[0]};  // one: into columns that do not matter
            multiply_packed_for<D>(tiles.height(t0))(w, both, copied[t0], sums);
            return finish(op, pair, tiles.begin(t0), tiles.height(t0), sums);
        }
    }
    for (int p = 0; p < (two ? 2 : 1); ++p) to.fill(w, p, panel[p]);
    const Panels panels{to.numbers[0], two ? to.numbers[1] : nullptr, to.scales[0], two ? to.scales[1] : nullptr};
    for (int64_t t = t0; t < t1; ++t) {
        // the minima times the sums of x: an ordinary product over blocks
        multiply_pair(tiles.height(t), copied[t].totals, w.k / 32, to.minima[0], two ? to.minima[1] : nullptr, sums, false);
        multiply_panels<D>(tiles.height(t), copied[t], w.k, panels, sums);
        finish(op, pair, tiles.begin(t), tiles.height(t), sums);
    }
}

// Into how many shares the tiles are split: one for each thread, so that a row stays with the thread that rounded it,
// unless there are so few rows that the weights, which every share reads, are what takes time; and none larger than
// the second-level cache holds well.
static int64_t integer_shares(const Tiles& tiles, int64_t row_bytes, int64_t pairs, int threads) {
    const int64_t long_enough = tiles.count / SHARE_TILES < threads ? tiles.count / SHARE_TILES : threads;
    int64_t shares = (tiles.rows * row_bytes + SHARE_BYTES - 1) / SHARE_BYTES;
    shares = shares > long_enough ? shares : long_enough;
    while (shares < tiles.count && pairs * shares < 4 * threads && tiles.count / shares > 2) ++shares;
    return shares;
}

template <class D, bool Q4>
static void linear_integers(const NexLinear& op, const NexTeam& team) {
    const NexWeight& w = *op.weight;
    const Tiles tiles(op.rows, D::ROWS);
    const int64_t pairs = op.finish == NEX_GATED ? panels_of(w.n / 2) : (panels_of(w.n) + 1) / 2;
    const int64_t stride = stride_of<D>(w.k), blocks = stride / D::GROUPS;
    const bool shared = op.rows > PRIVATE_ROWS;
    // every tile: its groups, then scales and totals
    const int64_t row_bytes = round_up(stride * int64_t(sizeof(typename D::Group)) + 8 * blocks, 8);
    const int64_t shares = integer_shares(tiles, row_bytes, pairs, team.threads);
    static thread_local Scratch copies, locals;
    const size_t list_bytes = size_t(tiles.count) * sizeof(IntegerTile<D>), copy_bytes = list_bytes + size_t(op.rows * row_bytes);
    char* common = shared ? copies.get<char>(copy_bytes) : nullptr;
    auto lay_out = [&](char* memory) {
        auto* list = reinterpret_cast<IntegerTile<D>*>(memory);
        memory += list_bytes;
        for (int64_t t = 0; t < tiles.count; ++t) {
            const int64_t height = tiles.height(t);
            list[t].groups = reinterpret_cast<typename D::Group*>(memory);
            list[t].scales = reinterpret_cast<float*>(list[t].groups + stride * height);
            list[t].totals = list[t].scales + blocks * height;
            memory += height * row_bytes;
        }
        return list;
    };
    IntegerTile<D>* list = shared ? lay_out(common) : nullptr;
    if (shared)
        parallel_for(team, tiles.count, 1, [&](int64_t t) {
            quantise_tile<D>(op, tiles.begin(t), tiles.height(t), list[t]);
        });
    const int64_t together = together_of(pairs * shares, 2 * panel_bytes(w), op.rows, team.threads);
    parallel(team, pairs * shares, together, [&](NexClaims& claims) {
        const int64_t unpacked = Q4 ? Unpacked::bytes(w.k) : 0;
        char* memory = locals.get<char>(size_t(unpacked) + (shared ? 0 : copy_bytes));
        IntegerTile<D>* mine = list;
        if (!shared) {
            mine = lay_out(memory + unpacked);
            for (int64_t t = 0; t < tiles.count; ++t)
                quantise_tile<D>(op, tiles.begin(t), tiles.height(t), mine[t]);
        }
        for (int64_t task; (task = next(claims)) >= 0;) {
            const int64_t share = task / pairs, pair = task % pairs;
            const int64_t t0 = share * tiles.count / shares, t1 = (share + 1) * tiles.count / shares;
            const bool gated = op.finish == NEX_GATED;
            const int64_t first = gated ? pair : 2 * pair, next = gated ? pairs + pair : first + 1;
            const int64_t panel[2] = {first, gated || next < panels_of(w.n) ? next : -1};
            if constexpr (Q4) q4_task<D>(op, tiles, mine, pair, panel, t0, t1, Unpacked(memory, w.k));
            else int8_task<D>(op, tiles, mine, pair, panel, t0, t1);
        }
    });
}

}  // namespace

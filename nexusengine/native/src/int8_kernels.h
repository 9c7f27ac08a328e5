// Tiles of x in integers times panels of weights of 8 or 4 bits, for each number of rows.
#pragma once
#include "dot.h"
#include "weights.h"

namespace {

// acc [ROWS][N] += a group of each row, `stride` apart, times a group of panels [16][4], as many as the registers hold.
template <class D, int ROWS, class Sums>
INLINE void add_group(const typename D::Group* tile, int64_t stride, const int8_t* first, const int8_t* second, Sums& acc) {
    constexpr int N = D::PANELS * D::LANES;
    auto weights = [&](int v) __attribute__((always_inline)) {
        return v < D::LANES ? D::weights(first, v) : D::weights(second, v - D::LANES);
    };
    if constexpr (ROWS < N) {  // the smaller side stays in registers
        decltype(D::numbers(0)) x[ROWS];
        unroll<ROWS>(EACH(r) { x[r] = D::numbers(tile[r * stride]); });
        unroll<N>(EACH(v) {
            const auto w = weights(v);
            unroll<ROWS>(EACH(r) { acc[r][v] = D::add(acc[r][v], w, x[r]); });
        });
    } else {
        decltype(D::numbers(0)) w[N];
        unroll<N>(EACH(v) { w[v] = weights(v); });
        unroll<ROWS>(EACH(r) {
            const auto x = D::numbers(tile[r * stride]);
            unroll<N>(EACH(v) { acc[r][v] = D::add(acc[r][v], w[v], x); });
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
    unroll<ROWS>(EACH(r) { unroll<N>(EACH(p) { total[r][p] = Q4 ? load(sums + r * 2 * PANEL + p * PANEL) : vf{}; }); });
    for (int64_t from = 0, b = 0; from < groups; from += D::GROUPS, ++b) {
        typename D::Sum acc[ROWS][N];
        unroll<ROWS>(EACH(r) {
            const auto start = D::begin(x_totals + b * ROWS + r);
            unroll<N>(EACH(p) { acc[r][p] = start; });
        });
        const int count = groups - from < D::GROUPS ? int(groups - from) : D::GROUPS;
        const typename D::Group* x = tile + from;
        for (int g = 0; g < count; ++g, ++x, first += 4 * PANEL, second += 4 * PANEL)
            add_group<D, ROWS>(x, stride, first, second, acc);
        vf scale[N];
        if (Q4) unroll<N>(EACH(p) { scale[p] = load((p == 0 ? w.first_scales : w.second_scales) + b * PANEL); });
        unroll<ROWS>(EACH(r) {
            const vf x_scale = splat(x_scales[b * ROWS + r]);
            unroll<N>(EACH(p) {
                const vf value = __builtin_convertvector(D::total(&acc[r][p], 0), vf);
                total[r][p] += Q4 ? value * scale[p] * x_scale : value * x_scale;
            });
        });
    }
    if (!Q4) {
        vf scale[N];
        unroll<N>(EACH(p) { scale[p] = load(p == 0 ? w.first_scales : w.second_scales); });
        unroll<ROWS>(EACH(r) { unroll<N>(EACH(p) { total[r][p] *= scale[p]; }); });
    }
    unroll<ROWS>(EACH(r) { unroll<N>(EACH(p) { store(sums + r * 2 * PANEL + p * PANEL, total[r][p]); }); });
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
        unroll<ROWS>(EACH(r) {
            const auto start = D::begin(x_totals + b * ROWS + r);
            unroll<N>(EACH(v) { acc[r][v] = start; });
        });
        const int64_t past = from + D::GROUPS < groups ? from + D::GROUPS : groups;
        for (int64_t g = from; g < past; ++g)
            add_group<D, ROWS>(tile + g, stride, w.first + g * 4 * PANEL, w.second + g * 4 * PANEL, acc);
        // through memory: else the compiler has too few registers for what follows and takes them from the loop above
        alignas(64) int32_t found[ROWS][D::PANELS * PANEL];
        unroll<ROWS>(EACH(r) {
            unroll<D::PANELS>(EACH(p) {
                typename D::Sum part[D::LANES];
                unroll<D::LANES>(EACH(i) { part[i] = acc[r][p * D::LANES + i]; });
                unroll<PANEL_VECTORS>(EACH(v) {
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
    unroll<N>(EACH(p) {
        data[p] = static_cast<const int8_t*>(w.data) + panel[p] * panel_bytes(w);
        scales[p] = static_cast<const half*>(w.scale) + panel[p] * blocks * PANEL;
        minima[p] = static_cast<const half*>(w.minimum) + panel[p] * blocks * PANEL;
    });
    vf total[ROWS][N] = {};
    for (int64_t b = 0; b < blocks; ++b) {
        typename D::Sum acc[ROWS][N] = {};
        unroll<4>(EACH(i) {
            decltype(D::numbers(0)) low[N], high[N];
            unroll<N>(EACH(p) {
                const auto both = D::weights(data[p] + (4 * b + i) * 4 * PANEL, 0);
                low[p] = D::low(both), high[p] = D::high(both);
            });
            unroll<ROWS>(EACH(r) {
                const typename D::Group* at = x.groups + r * stride_of<D>(w.k) + 8 * b + 2 * i;
                const auto first = D::numbers(at[0]), second = D::numbers(at[1]);
                unroll<N>(EACH(p) { acc[r][p] = D::add(D::add(acc[r][p], low[p], first), high[p], second); });
            });
        });
        unroll<N>(EACH(p) {
            const vf scale = load(scales[p] + b * PANEL), minimum = load(minima[p] + b * PANEL);
            unroll<ROWS>(EACH(r) {
                const vf value = __builtin_convertvector(D::total(&acc[r][p], 0), vf);
                total[r][p] += value * scale * splat(x.scales[b * ROWS + r]) + minimum * splat(x.totals[b * ROWS + r]);
            });
        });
    }
    unroll<ROWS>(EACH(r) { unroll<N>(EACH(p) { store(sums + r * 2 * PANEL + p * PANEL, total[r][p]); }); });
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

}  // namespace

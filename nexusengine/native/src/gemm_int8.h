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
#include "int8_kernels.h"
#include "quantise.h"

namespace {

static constexpr int64_t SHARE_BYTES = 512 << 10;  // of integers of x that a task reads, at most
static constexpr int64_t SHARE_TILES = 16;         // with fewer tiles each, threads share out weights and not rows
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
static int64_t partitions(const Tiles& tiles, int64_t row_bytes, int64_t pairs, int threads) {
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
    const int64_t shares = partitions(tiles, row_bytes, pairs, team.threads);
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
    const int64_t together = claim_batch(pairs * shares, 2 * panel_bytes(w), op.rows, team.threads);
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

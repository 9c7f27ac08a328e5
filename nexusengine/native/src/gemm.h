// Linear maps: y = finish(norm(x) W^T + b), for one row and for thousands.
//
// x is copied once into tiles of a few rows [k][rows], normalised on the way; the weight lies in panels of 16 outputs
// [k][16] (weights.h). A tile of rows times a pair of panels is accumulated in registers. Weights that are not float are
// unpacked to float a piece at a time: memory traffic is theirs, arithmetic is float's. A task is a pair of panels and a
// share of the rows.
#pragma once
#include "rows.h"
#include "scratch.h"
#include "weights.h"

namespace {

static constexpr int TILE_ROWS = at_most(W == 16 ? 12 : 6);
static constexpr int TASK_TILES = 20;        // most tiles a task: its sums fit the first-level cache
static constexpr int PRIVATE_ROWS = 4;       // up to here every thread copies x for itself and none waits
static constexpr int64_t WIDE = 1024, PIECE = 128;  // numbers of k at a time: float weights, unpacked weights
static constexpr int64_t CLAIM_BYTES = 32 << 10;    // least bytes of weights, times rows, that a thread claims at a time

// sums [ROWS][32] (+)= tile [k][ROWS] times PANELS panels [k][16].
template <int ROWS, int PANELS>
static void multiply(const float* tile, int64_t k, const float* first, const float* second, float* sums, bool add) {
    constexpr int N = PANELS * PANEL_VECTORS;
    vf acc[ROWS][N];
    unroll<ROWS>(EACH(r) { unroll<N>(EACH(v) { acc[r][v] = add ? load(sums + r * 2 * PANEL + v * W) : vf{}; }); });
    for (int64_t i = 0; i < k; ++i) {
        vf b[N];
        unroll<N>(EACH(v) {
            b[v] = v < PANEL_VECTORS ? load(first + i * PANEL + v * W) : load(second + i * PANEL + (v - PANEL_VECTORS) * W);
        });
        unroll<ROWS>(EACH(r) {
            const vf x = splat(tile[i * ROWS + r]);
            unroll<N>(EACH(v) { acc[r][v] += x * b[v]; });
        });
    }
    unroll<ROWS>(EACH(r) { unroll<N>(EACH(v) { store(sums + r * 2 * PANEL + v * W, acc[r][v]); }); });
}

typedef void (*Multiply)(const float*, int64_t, const float*, const float*, float*, bool);

static constexpr int TOGETHER = W == 16 ? 2 : 1;  // panels that the registers hold

static Multiply multiply_for(int rows) {
#define NEX_CASE(R) \
    case R: return multiply<(R <= TILE_ROWS ? R : 1), TOGETHER>;
    switch (rows) {
        NEX_CASE(1) NEX_CASE(2) NEX_CASE(3) NEX_CASE(4) NEX_CASE(5) NEX_CASE(6)
        NEX_CASE(7) NEX_CASE(8) NEX_CASE(9) NEX_CASE(10) NEX_CASE(11) NEX_CASE(12)
    }
#undef NEX_CASE
    return nullptr;
}

// Both panels of a pair. second null: there is one, and what is in the other's columns does not matter.
static void multiply_pair(int rows, const float* tile, int64_t k, const float* first, const float* second, float* sums,
                          bool add) {
    const Multiply kernel = multiply_for(rows);
    kernel(tile, k, first, second != nullptr ? second : first, sums, add);
    if (second != nullptr && TOGETHER == 1) kernel(tile, k, second, second, sums + PANEL, add);
}

// Rows in tiles of nearly equal height.
struct Tiles {
    int64_t rows, count;
    Tiles(int64_t rows, int most) : rows(rows), count((rows + most - 1) / most) {}
    int64_t begin(int64_t t) const { return t * (rows / count) + (t < rows % count ? t : rows % count); }
    int height(int64_t t) const { return int(begin(t + 1) - begin(t)); }
};

// Into how many shares the tiles are split, so that there are tasks for every thread, and room for a task's sums.
static int64_t shares_of(const Tiles& tiles, int64_t pairs, int threads) {
    int64_t shares = (tiles.count + TASK_TILES - 1) / TASK_TILES;
    while (shares < tiles.count && pairs * shares < 4 * threads && tiles.count / shares > 2) ++shares;
    return shares;
}

// One tile of x as [k][height].
static void copy_tile(const NexLinear& op, int64_t row, int height, float* out) {
    const int64_t k = op.weight->k;
    for (int r = 0; r < height; ++r) {
        const float* x = op.x + (row + r) * op.x_stride;
        float* to = out + r;
        if (op.norm == nullptr) {
            for (int64_t i = 0; i < k; ++i) to[i * height] = x[i];
        } else {
            float factor = inverse_rms(x, k, op.eps);
            for (int64_t i = 0; i < k; ++i) to[i * height] = x[i] * factor * op.norm[i];
        }
    }
}

// What a task does at its end: sums [rows][32] of the pair of panels into out.
static void finish(const NexLinear& op, int64_t pair, int64_t row, int64_t rows, float* sums) {
    const NexWeight& w = *op.weight;
    if (op.finish == NEX_GATED) {
        const int64_t half = w.n / 2, at = pair * PANEL;
        const int64_t count = half - at < PANEL ? half - at : PANEL;
        for (int64_t r = 0; r < rows; ++r) {
            float* gate = sums + r * 2 * PANEL;
            const float* up = gate + PANEL;
            if (w.bias != nullptr)
                for (int64_t i = 0; i < count; ++i) gate[i] += w.bias[at + i], gate[PANEL + i] += w.bias[half + at + i];
            float* out = op.out + (row + r) * op.out_stride + at;
            if (count == PANEL) {
                for (int v = 0; v < PANEL; v += W) store(out + v, silu(load(gate + v)) * load(up + v));
                continue;
            }
            for (int v = 0; v < PANEL; v += W) store(gate + v, silu(load(gate + v)) * load(up + v));
            std::memcpy(out, gate, size_t(count) * 4);
        }
        return;
    }
    const int64_t at = pair * 2 * PANEL, count = w.n - at < 2 * PANEL ? w.n - at : 2 * PANEL;
    for (int64_t r = 0; r < rows; ++r) {
        float* sum = sums + r * 2 * PANEL;
        float* out = op.out + (row + r) * op.out_stride + at;
        if (w.bias != nullptr)
            for (int64_t i = 0; i < count; ++i) sum[i] += w.bias[at + i];
        const bool add = op.finish == NEX_ADD;
        if (count == 2 * PANEL)
            for (int v = 0; v < 2 * PANEL; v += W) store(out + v, add ? load(out + v) + load(sum + v) : load(sum + v));
        else if (add)
            for (int64_t i = 0; i < count; ++i) out[i] += sum[i];
        else
            std::memcpy(out, sum, size_t(count) * 4);
    }
}

// A pair of panels times the tiles t0 .. t1 of x.
static void linear_task(const NexLinear& op, const Tiles& tiles, const float* copied, int64_t pair, int64_t t0, int64_t t1,
                        float* sums, float* pieces) {
    const NexWeight& w = *op.weight;
    const int64_t half = panels_of(w.n / 2), all = op.finish == NEX_GATED ? 2 * half : panels_of(w.n);
    const int64_t first = op.finish == NEX_GATED ? pair : 2 * pair;
    const int64_t second = op.finish == NEX_GATED ? half + pair : first + 1;
    const bool plain = w.kind == NEX_F32, two = second < all;
    const int64_t step = plain ? WIDE : PIECE, row = tiles.begin(t0);
    for (int64_t k = 0; k < w.k; k += step) {
        const int64_t count = w.k - k < step ? w.k - k : step;
        const float *a, *b = nullptr;
        if (plain) {
            const float* data = static_cast<const float*>(w.data);
            a = data + (first * w.k + k) * PANEL;
            if (two) b = data + (second * w.k + k) * PANEL;
        } else {
            unpack(w, first, k, count, pieces);
            a = pieces;
            if (two) unpack(w, second, k, count, pieces + PIECE * PANEL), b = pieces + PIECE * PANEL;
        }
        for (int64_t t = t0; t < t1; ++t) {
            const int height = tiles.height(t);
            const float* tile = copied + tiles.begin(t) * w.k + k * height;
            multiply_pair(height, tile, count, a, b, sums + (tiles.begin(t) - row) * 2 * PANEL, k > 0);
        }
    }
    finish(op, pair, row, tiles.begin(t1) - row, sums);
}

// How many tasks of `bytes` of weights are claimed at a time: with few rows the weights' bytes are the work.
static int64_t claim_batch(int64_t tasks, int64_t bytes, int64_t rows, int threads) {
    const int64_t most = tasks / (4 * threads), enough = CLAIM_BYTES / (bytes * rows);
    const int64_t fewer = most < enough ? most : enough;
    return fewer > 1 ? fewer : 1;
}

static void linear_float(const NexLinear& op, const NexTeam& team) {
    const NexWeight& w = *op.weight;
    const Tiles tiles(op.rows, TILE_ROWS);
    const int64_t pairs = op.finish == NEX_GATED ? panels_of(w.n / 2) : (panels_of(w.n) + 1) / 2;
    const int64_t shares = shares_of(tiles, pairs, team.threads);
    const bool shared = op.rows > PRIVATE_ROWS;
    static thread_local Scratch copies, locals;
    float* common = shared ? copies.get<float>(size_t(op.rows * w.k)) : nullptr;
    if (shared)
        parallel_for(team, tiles.count, 1, [&](int64_t t) {
            copy_tile(op, tiles.begin(t), tiles.height(t), common + tiles.begin(t) * w.k);
        });
    const int64_t together = claim_batch(pairs * shares, 2 * panel_bytes(w), op.rows, team.threads);
    parallel(team, pairs * shares, together, [&](NexClaims& claims) {
        constexpr size_t sums_size = size_t(TASK_TILES) * TILE_ROWS * 2 * PANEL;
        const size_t own = shared ? 0 : size_t(op.rows * w.k + 15) / 16 * 16;
        float* sums = locals.get<float>(sums_size + 2 * PIECE * PANEL + own);
        float* pieces = sums + sums_size;
        float* copied = shared ? common : pieces + 2 * PIECE * PANEL;
        if (!shared)
            for (int64_t t = 0; t < tiles.count; ++t)
                copy_tile(op, tiles.begin(t), tiles.height(t), copied + tiles.begin(t) * w.k);
        for (int64_t task; (task = next(claims)) >= 0;) {
            const int64_t share = task / pairs, pair = task % pairs;
            linear_task(op, tiles, copied, pair, share * tiles.count / shares, (share + 1) * tiles.count / shares, sums,
                        pieces);
        }
    });
}

static void embed(const NexEmbed& op, const NexTeam& team) {
    const NexWeight& w = *op.weight;
    float* out = op.out;
    parallel_for(team, op.rows, 16, [&](int64_t r) {
        const int64_t panel = op.ids[r] / PANEL, lane = op.ids[r] % PANEL;
        float piece[32 * PANEL];
        if (w.kind == NEX_F32) {
            const float* from = static_cast<const float*>(w.data) + panel * w.k * PANEL + lane;
            for (int64_t k = 0; k < w.k; ++k) out[r * w.k + k] = from[k * PANEL];
            return;
        }
        for (int64_t k = 0; k < w.k; k += 32) {
            const int64_t count = w.k - k < 32 ? w.k - k : 32;
            unpack(w, panel, k, count, piece);
            for (int64_t i = 0; i < count; ++i) out[r * w.k + k + i] = piece[i * PANEL + lane];
        }
    });
}

}  // namespace

// What is done row by row: RMS norm; rotary embedding with the KV store.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace {

// 1 / sqrt(mean of squares + eps) (Zhang and Sennrich, arXiv 1910.07467).
INLINE float inverse_rms(const float* x, int64_t n, float eps) {
    vf total[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            vf v = load(x + i + j * W);
            total[j] += v * v;
        }
    float squares = sum((total[0] + total[1]) + (total[2] + total[3]));
    for (; i < n; ++i) squares += x[i] * x[i];
    return 1.0f / __builtin_sqrtf(squares / float(n) + eps);
}

static void rms_norm(const NexNorm& op, const NexTeam& team) {
    parallel_for(team, op.rows, 16, [&](int64_t r) {
        const float* from = op.x + r * op.dim;
        float* to = op.out + r * op.dim;
        const float factor = inverse_rms(from, op.dim, op.eps);
        for (int64_t i = 0; i < op.dim; ++i) to[i] = from[i] * factor * op.weight[i];
    });
}

static void take_rows(const NexTake& op, const NexTeam& team) {
    parallel_for(team, op.rows, 64, [&](int64_t r) {
        std::memcpy(op.out + r * op.columns, op.x + op.places[r] * op.columns, size_t(op.columns) * 4);
    });
}

// In one pass: a number that is not finite times 0 is a NaN, and shows in the sum. Of equal ones the first counts.
static int64_t argmax(const float* x, int64_t n) {
    constexpr int64_t STEP = 64;
    float highest = -__builtin_inff();
    int64_t block = 0;
    vf strange{};
    int64_t at = 0;
    for (; at + STEP <= n; at += STEP) {
        vf peak = load(x + at);
        strange += peak * 0.0f;
        for (int i = W; i < STEP; i += W) {
            vf v = load(x + at + i);
            strange += v * 0.0f;
            peak = larger(v, peak);
        }
        const float found = largest(peak);
        if (found > highest) highest = found, block = at;
    }
    float odd = sum(strange);
    int64_t place = block;
    while (place < n && place < block + STEP && x[place] != highest) ++place;
    for (; at < n; ++at) {
        odd += x[at] * 0.0f;
        if (x[at] > highest) highest = x[at], place = at;
    }
    return odd == 0.0f ? place : -1;
}

static void largest_of(const NexLargest& op, const NexTeam& team) {
    parallel_for(team, op.rows, 1, [&](int64_t r) { op.out[r] = argmax(op.x + r * op.columns, op.columns); });
}

// Pairs are (i, i + dim / 2): x may be out.
INLINE void rotate(const float* x, const float* cos, const float* sin, int64_t dim, float* out) {
    const int64_t half = dim / 2;
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(out + i, a * c - b * s);
        store(out + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        out[i] = a * cos[i] - b * sin[i];
        out[half + i] = b * cos[i] + a * sin[i];
    }
}

// Write one cache row. int8: round(x / scale), scale = largest / 127, behind the numbers; a row with a NaN or an infinity
// gets a NaN for a scale, so that it is not lost.
INLINE void store_row(const float* x, int64_t dim, int32_t kind, char* to) {
    if (kind == NEX_F32) {
        std::memcpy(to, x, size_t(dim) * 4);
    } else if (kind == NEX_BF16) {
        bf16* out = reinterpret_cast<bf16*>(to);
        for (int64_t i = 0; i < dim; ++i) out[i] = to_bf16(x[i]);
    } else {
        float largest = 0.0f, strange = 0.0f;
        for (int64_t i = 0; i < dim; ++i) {
            const float size = __builtin_fabsf(x[i]);
            largest = size > largest ? size : largest;
            strange += x[i] * 0.0f;
        }
        const float scale = largest / 127.0f + strange, inverse = largest > 0.0f && strange == 0.0f ? 127.0f / largest : 0.0f;
        int8_t* out = reinterpret_cast<int8_t*>(to);
        for (int64_t i = 0; i < dim; ++i) out[i] = strange == 0.0f ? int8_t(__builtin_lrintf(x[i] * inverse)) : int8_t(0);
        std::memcpy(to + dim, &scale, 4);
    }
}

static void rotate_store(const NexRotateStore& op, const NexTeam& team) {
    const int64_t width = (op.heads + 2 * op.kv_heads) * op.dim, half = op.dim / 2;
    parallel_for(team, op.tokens, 8, [&](int64_t t) {
        float* row = op.qkv + t * width;
        const float *cos = op.cos + op.positions[t] * half, *sin = op.sin + op.positions[t] * half;
        for (int64_t h = 0; h < op.heads + op.kv_heads; ++h) rotate(row + h * op.dim, cos, sin, op.dim, row + h * op.dim);
        const int64_t slot = op.slots[t];
        if (slot < 0) return;
        const int64_t offset = slot / op.cache.block_size * op.cache.block_bytes + slot % op.cache.block_size * op.cache.token_bytes;
        for (int64_t h = 0; h < op.kv_heads; ++h) {
            const int64_t at = offset + h * op.cache.head_bytes;
            const float* k = row + (op.heads + h) * op.dim;
            store_row(k, op.dim, op.cache.kind, static_cast<char*>(op.cache.k) + at);
            store_row(k + op.kv_heads * op.dim, op.dim, op.cache.kind, static_cast<char*>(op.cache.v) + at);
        }
    });
}

}  // namespace

// Rows of x as 8-bit integers, each block of numbers with a scale of its own.
#pragma once
#include "int8_kernels.h"
#include "rows.h"

namespace {

// W numbers as their groups keep them.
INLINE void store_groups(int32_t* to, vi q) {
    const vb bytes = __builtin_convertvector(q, vb);
    std::memcpy(to, &bytes, sizeof(bytes));
}
INLINE void store_groups(int64_t* to, vi q) {
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
            unroll<N>(EACH(i) { v[i] = load(from + i * W); });
            if (norm != nullptr) unroll<N>(EACH(i) { v[i] = v[i] * factor * load(norm + i * W); });
            const vi infinity = vi{} + 0x7f800000;
            vi peak{};  // as integers, sizes are in the order of their numbers, and a NaN is larger than infinity
            unroll<N>(EACH(i) {
                const vi size = bits(v[i]) & 0x7fffffff;
                peak = size > peak ? size : peak;
            });
            const float size = largest(from_bits(peak < infinity ? peak : infinity));
            const bool odd = size == __builtin_inff();
            const float scale = odd ? __builtin_nanf("") : size / 127.0f, inverse = size > 0.0f && !odd ? 127.0f / size : 0.0f;
            const vf round = splat(12582912.0f);  // see exponential
            vi total{};
            unroll<N>(EACH(i) {
                const vi q = odd ? vi{} : bits(v[i] * inverse + round) - bits(round);
                total += q;
                store_groups(to.groups + r * stride_of<D>(k) + (at + i * W) / 4, q);
            });
            to.scales[b * height + r] = scale;
            const float whole = sum(__builtin_convertvector(total, vf));
            const int32_t moved = -128 * int32_t(whole);
            if (D::GROUPS == 8) to.totals[b * height + r] = whole * scale;
            else std::memcpy(to.totals + b * height + r, &moved, 4);
        }
    }
}

}  // namespace

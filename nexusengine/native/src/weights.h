// Packed weights: rows (outputs) in panels of 16, so that 16 outputs are computed side by side; the last panel is filled
// up with zeros. Layout of a panel, k running first:
//   F32, BF16   [k][16]
//   INT8        [k / 4][16][4], k filled up to a multiple of 4; scale float [n]
//   Q4          [k / 8][16][4] bytes: the low half of byte j is number 8 i + j, the high half number 8 i + 4 + j;
//               scale and minimum half precision [k / 32][16]: number = scale * q + minimum. k is a multiple of 32.
// A weight used with NEX_GATED is two halves, each in panels of its own.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace {

static constexpr int PANEL = 16, PANEL_VECTORS = PANEL / W;

INLINE int64_t panels_of(int64_t n) { return (n + PANEL - 1) / PANEL; }

INLINE int64_t panel_bytes(const NexWeight& w) {
    switch (w.kind) {
        case NEX_F32: return w.k * PANEL * 4;
        case NEX_BF16: return w.k * PANEL * 2;
        case NEX_INT8: return (w.k + 3) / 4 * PANEL * 4;
        default: return w.k / 8 * PANEL * 4;
    }
}

// Numbers k0 .. k0 + count of a panel as floats [count][16]; k0 is a multiple of 32.
static void unpack(const NexWeight& w, int64_t panel, int64_t k0, int64_t count, float* out) {
    const char* base = static_cast<const char*>(w.data) + panel * panel_bytes(w);
    if (w.kind == NEX_F32) {
        std::memcpy(out, base + k0 * PANEL * 4, size_t(count) * PANEL * 4);
    } else if (w.kind == NEX_BF16) {
        const bf16* from = reinterpret_cast<const bf16*>(base) + k0 * PANEL;
        for (int64_t i = 0; i < count * PANEL; i += W) store(out + i, load(from + i));
    } else if (w.kind == NEX_INT8) {
        for (int v = 0; v < PANEL_VECTORS; ++v) {
            vf scale = load(static_cast<const float*>(w.scale) + panel * PANEL + v * W);
            for (int64_t k = 0; k < count; k += 4) {
                vi four = bits(load(reinterpret_cast<const float*>(base + (k0 + k) * PANEL) + v * W));
                for (int j = 0; j < 4 && k + j < count; ++j)
                    store(out + (k + j) * PANEL + v * W, __builtin_convertvector((four << (24 - 8 * j)) >> 24, vf) * scale);
            }
        }
    } else {
        for (int v = 0; v < PANEL_VECTORS; ++v) {
            for (int64_t k = 0; k < count; k += 32) {
                int64_t at = (panel * (w.k / 32) + (k0 + k) / 32) * PANEL + v * W;
                vf scale = load(static_cast<const half*>(w.scale) + at);
                vf minimum = load(static_cast<const half*>(w.minimum) + at);
                for (int64_t i = k; i < k + 32; i += 8) {
                    vi eight = bits(load(reinterpret_cast<const float*>(base + (k0 + i) / 2 * PANEL) + v * W));
                    for (int j = 0; j < 4; ++j) {
                        vi low = (eight >> (8 * j)) & 15, high = (eight >> (8 * j + 4)) & 15;
                        store(out + (i + j) * PANEL + v * W, __builtin_convertvector(low, vf) * scale + minimum);
                        store(out + (i + j + 4) * PANEL + v * W, __builtin_convertvector(high, vf) * scale + minimum);
                    }
                }
            }
        }
    }
}

}  // namespace

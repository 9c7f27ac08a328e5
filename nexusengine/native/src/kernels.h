// What the library computes, as plain structs and one table of functions for each instruction set. C layout: the same
// structs are declared in library.py. Sizes in elements unless a name says bytes; pointers never alias unless said so.
#pragma once
#include <cstdint>

#include "pool.h"

#define NEX_JOIN2(a, b) a##b
#define NEX_JOIN(a, b) NEX_JOIN2(a, b)

extern "C" {

// How a weight or a cache row is stored.
enum NexKind : int32_t {
    NEX_F32 = 0,
    NEX_BF16 = 1,
    NEX_INT8 = 2,  // weights: a scale an output row; cache rows: a scale a row, behind its D numbers
    NEX_Q4 = 3,    // weights only: blocks of 32 numbers of 4 bits with a scale and a minimum
};

// What a linear map does with its result.
enum NexFinish : int32_t {
    NEX_STORE = 0,  // out = x W^T + b
    NEX_ADD = 1,    // out += x W^T + b
    NEX_GATED = 2,  // out = silu(g) * u, where g and u are the first and second half of x W^T + b
};

// A packed weight `[n, k]`; see weights.h for the layouts. scale, minimum: by kind. bias `[n]` or null.
struct NexWeight {
    const void* data;
    const void* scale;
    const void* minimum;
    const float* bias;
    int64_t n, k;
    int32_t kind;
    int32_t int8_activations;  // rows are quantised on the fly and multiplied as integers
};

// y = finish(norm(x) W^T + b). norm null: x as it is; else RMS norm with these weights `[k]`.
struct NexLinear {
    const NexWeight* weight;
    const float* x;  // [rows, k]
    int64_t x_stride;
    int64_t rows;
    const float* norm;
    float* out;  // [rows, n], gated: [rows, n / 2]
    int64_t out_stride;
    float eps;
    int32_t finish;
};

// The paged cache of one layer: a row of D numbers at base + block * block_bytes + offset * token_bytes + head *
// head_bytes.
struct NexCache {
    void* k;
    void* v;
    int64_t block_bytes, token_bytes, head_bytes;
    int32_t kind;
    int32_t block_size;
};

// Rows of a weight by number, as float.
struct NexEmbed {
    const NexWeight* weight;
    const int64_t* ids;  // [rows]
    float* out;          // [rows, k]
    int64_t rows;
};

struct NexNorm {
    const float* x;  // [rows, dim]
    const float* weight;
    float* out;
    int64_t rows, dim;
    float eps;
};

// The largest number's place in each row; -1 where a number of the row is not finite.
struct NexLargest {
    const float* x;  // [rows, columns]
    int64_t* out;    // [rows]
    int64_t rows, columns;
};

// Rows of x by number.
struct NexTake {
    const float* x;  // [.., columns]
    const int64_t* places;
    float* out;  // [rows, columns]
    int64_t rows, columns;
};

// Rotate q in place, rotate k, and write k and v into the cache.
struct NexRotateStore {
    float* qkv;  // [tokens, (heads + 2 kv_heads) * dim]
    const float* cos;
    const float* sin;          // [positions, dim / 2]
    const int64_t* positions;  // [tokens]
    const int64_t* slots;      // [tokens], -1 is skipped
    NexCache cache;
    int64_t tokens, heads, kv_heads, dim;
};

// Causal attention, aligned at the bottom right. Rows as in attention/base.py.
struct NexAttention {
    const float* q;  // [tokens, heads, dim], stride in numbers between tokens
    int64_t q_stride;
    float* out;
    int64_t out_stride;
    NexCache cache;
    const int32_t* table;  // [rows, table_stride]
    int64_t table_stride;
    const int32_t* lengths;  // [rows]
    const int32_t* starts;   // [rows + 1]
    int64_t rows, heads, kv_heads, dim;
    float scale;
};

// What a call is, and the struct it is called with.
enum NexCallKind : int32_t {
    NEX_LINEAR = 0,
    NEX_EMBED = 1,
    NEX_NORM = 2,
    NEX_ROTATE_STORE = 3,
    NEX_ATTENTION = 4,
    NEX_LARGEST = 5,
    NEX_TAKE = 6,
};
struct NexCall {
    const void* arguments;
    int64_t kind;
};

// One instruction set's functions, by NexCallKind.
struct NexKernels {
    const char* name;
    void (*calls[7])(const void* arguments, const NexTeam& team);
};
}

// Causal attention straight from the block table, with the softmax kept online (Milakov and Gimelshein, arXiv 1805.02867):
// running maximum m, sum l and weighted values, rescaled when the maximum rises.
//
// Rows of one query are tasks of their own, with all heads together, so that memory is read in the order it lies; a long
// row is split over tasks and merged at the end. Longer queries are tasks of (row, KV head, some queries): the query
// heads of a group and their queries are packed into the rows of two small matrix products, and K and V are copied tile
// by tile, K transposed. Slots behind a row's length are never read.
#pragma once
#include "attention_decode.h"
#include "attention_prefill.h"

namespace {

struct Task {
    int32_t row, kv;         // kv < 0: a share of a row of one query
    int32_t first, last;     // keys of a share, queries of a chunk
    int64_t state;           // of a share: where its state lies
};

template <class T>
static void attention_of(const NexAttention& a, const NexTeam& team) {
    const int64_t dim = a.dim, padded = round_up(dim, W), wide = round_up(dim, 2 * W), group = a.heads / a.kv_heads;
    const int64_t state_size = round_up(2 * a.heads + a.heads * padded, 16);
    int64_t queries = QUERY_ROWS / group > 4 ? QUERY_ROWS / group : 4;
    int64_t tasks = 0, shares = 0, chunks = 0;
    auto chunks_of = [&](int64_t row) {
        const int64_t count = a.starts[row + 1] - a.starts[row];
        return count > 1 ? (count + queries - 1) / queries * a.kv_heads : 0;
    };
    for (;; queries /= 2) {
        chunks = 0;
        for (int64_t r = 0; r < a.rows; ++r) chunks += chunks_of(r);
        if (chunks == 0 || chunks >= 4 * team.threads || queries < 16) break;
    }
    constexpr int64_t share = SPLIT_TOKENS;
    for (int64_t r = 0; r < a.rows; ++r)
        if (a.starts[r + 1] - a.starts[r] == 1) shares += (a.lengths[r] + share - 1) / share;
    static thread_local Scratch task_memory, state_memory, local_memory;
    Task* list = task_memory.get<Task>(size_t(chunks + shares));
    float* states = state_memory.get<float>(size_t(shares * state_size));
    // chunks first, dealt to the threads by their keys: what is long must not begin last, nor all with one thread
    auto dealt = [&](int64_t i) {
        const int64_t thread = i % team.threads, more = chunks % team.threads;
        return thread * (chunks / team.threads) + (thread < more ? thread : more) + i / team.threads;
    };
    for (int64_t r = a.rows - 1; r >= 0; --r) {
        const int64_t count = a.starts[r + 1] - a.starts[r];
        if (count <= 1) continue;
        for (int64_t first = (count - 1) / queries * queries; first >= 0; first -= queries)
            for (int64_t kv = 0; kv < a.kv_heads; ++kv)
                list[dealt(tasks++)] = {int32_t(r), int32_t(kv), int32_t(first), int32_t(first + queries < count ? first + queries : count), 0};
    }
    int64_t states_used = 0, split = 0;
    for (int64_t r = 0; r < a.rows; ++r) {
        if (a.starts[r + 1] - a.starts[r] != 1) continue;
        split += a.lengths[r] > share;
        for (int64_t at = 0; at < a.lengths[r]; at += share, states_used += state_size)
            list[tasks++] = {int32_t(r), -1, int32_t(at), int32_t(at + share < a.lengths[r] ? at + share : a.lengths[r]), states_used};
    }
    const int64_t most_rows = queries * group;
    const int64_t score_rows = ROWS_TOGETHER > a.heads ? ROWS_TOGETHER : a.heads;
    const size_t local = size_t(score_rows * TOKENS + most_rows * (round_up(dim, 2 * W) + padded + 2) + a.heads * wide + 2 * TOKENS * padded + 8 * 16);
    parallel(team, tasks, 1, [&](NexClaims& claims) {
        float* memory = local_memory.get<float>(local);
        QueryScratch s;
        auto take = [&](int64_t size) {
            float* taken = memory;
            memory += round_up(size, 16);
            return taken;
        };
        s.scores = take(score_rows * TOKENS), s.mixed = take(most_rows * padded), s.queries = take(most_rows * round_up(dim, 2 * W));
        s.keys = take(TOKENS * padded), s.values = take(TOKENS * padded);
        s.maxima = take(most_rows), s.totals = take(most_rows);
        float* query = take(a.heads * wide);
        for (int64_t i; (i = next(claims)) >= 0;) {
            const Task& task = list[i];
            if (task.kv >= 0) {
                chunk_task<T>(a, task.row, task.kv, task.first, task.last, s);
                continue;
            }
            const float* from = a.q + a.starts[task.row] * a.q_stride;
            for (int64_t h = 0; h < a.heads; ++h) pack_query<T>(from + h * dim, dim, a.scale, query + h * wide);
            decode_split<T>(a, query, task.row, task.first, task.last, s.scores, states + task.state);
            if (task.first == 0 && task.last == a.lengths[task.row])
                merge_splits<typename Products<T>::Power>(a, a.starts[task.row], states + task.state, 1, state_size);
        }
    });
    // rows that were split: their states lie one behind the other
    if (split == 0) return;
    parallel_for(team, tasks - chunks, 4, [&](int64_t i) {
        const Task& task = list[chunks + i];
        const int64_t length = a.lengths[task.row];
        if (task.first == 0 && task.last < length)
            merge_splits<typename Products<T>::Power>(a, a.starts[task.row], states + task.state, (length + share - 1) / share, state_size);
    });
}

static void attention(const NexAttention& a, const NexTeam& team) {
    if (a.cache.kind == NEX_F32) attention_of<float>(a, team);
    else if (a.cache.kind == NEX_BF16) attention_of<bf16>(a, team);
    else attention_of<int8_t>(a, team);
}

}  // namespace

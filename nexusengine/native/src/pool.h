// Threads that share out the tasks of a call: the caller and helpers that claim what is left. See pool.cpp.
#pragma once
#include <cstdint>

extern "C" {

// Neighbouring tasks of a call that nobody has claimed yet, begin .. end, as begin << 32 | end. A cache line of its own,
// since many threads write it.
struct alignas(64) NexShare {
    uint64_t range;
};

static constexpr int NEX_MOST_SHARES = 64;

// The tasks of one call of `parallel`. Every thread begins with a share of its own, from its first task on, so that it
// reads one long piece of memory; then it takes from the end of others' shares. A core asks for memory ahead of what is
// read: pieces that alternate between cores are asked for twice (two cores, 18 kB each in turn: 20 GB/s, else 36).
struct NexTasks {
    NexShare shares[NEX_MOST_SHARES];
    int32_t count;                // of shares: as many as threads; changes only while there are no helpers
    alignas(64) int64_t together;  // claimed at a time, so that short ones are worth it
    void (*body)(void* context, struct NexClaims& claims);
    void* context;
};

// What one thread has claimed: `count` tasks so far, of which at .. end are still to do. share: the one it begins with.
struct NexClaims {
    NexTasks* tasks;
    int64_t at, end, count;
    int32_t share;
};

struct NexPool;

// Who computes a call: `threads` at most, the caller among them. pool null: the caller alone.
struct NexTeam {
    NexPool* pool;
    int threads;
};

// The calling thread's team until nex_pool_leave. If another thread has the helpers, the caller computes alone.
NexTeam nex_pool_enter(int threads);
void nex_pool_leave(const NexTeam& team);

// Calls body in this thread, and in helpers that are awake in time, until every task is claimed and finished.
void nex_pool_share(const NexTeam& team, int64_t tasks, int64_t together, void (*body)(void*, NexClaims&), void* context);
}

namespace {

// Claim of one share, from its beginning or its end; false when nothing of it is left.
static inline bool claim_of(NexShare& share, int64_t together, bool end, NexClaims& claims) {
    uint64_t range = __atomic_load_n(&share.range, __ATOMIC_RELAXED), rest;
    int64_t first, last, taken;
    do {
        first = int64_t(range >> 32), last = int64_t(range & 0xffffffffu);
        if (first >= last) return false;
        taken = last - first < together ? last - first : together;
        rest = end ? uint64_t(first) << 32 | uint64_t(last - taken) : uint64_t(first + taken) << 32 | uint64_t(last);
    } while (!__atomic_compare_exchange_n(&share.range, &range, rest, true, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED));
    claims.at = end ? last - taken : first;
    claims.end = claims.at + taken;
    claims.count += taken;
    return true;
}

// Claim what comes next; false when nothing is left. Tasks are claimed before they are looked at: as long as one is
// claimed and unfinished, the caller waits and nothing else in NexTasks changes.
static inline bool claim(NexTasks& tasks, int64_t together, NexClaims& claims) {
    if (claim_of(tasks.shares[claims.share], together, false, claims)) return true;
    for (int i = 1; i < tasks.count; ++i)
        if (claim_of(tasks.shares[(claims.share + i) % tasks.count], together, true, claims)) return true;
    return false;
}

// The next task of this thread, or -1.
static inline int64_t next(NexClaims& claims) {
    if (claims.at == claims.end && (claims.tasks == nullptr || !claim(*claims.tasks, claims.tasks->together, claims))) return -1;
    return claims.at++;
}

// body(claims) in every thread that takes part, with work for each: it asks `next` until there is none.
template <class Body>
static void parallel(const NexTeam& team, int64_t tasks, int64_t together, Body body) {
    if (team.pool == nullptr || tasks <= together) {
        NexClaims all{nullptr, 0, tasks, tasks, 0};
        if (tasks > 0) body(all);
        return;
    }
    auto call = [](void* context, NexClaims& claims) { (*static_cast<Body*>(context))(claims); };
    nex_pool_share(team, tasks, together, call, &body);
}

// one(i) for each i, `together` at a time.
template <class One>
static void parallel_for(const NexTeam& team, int64_t count, int64_t together, One one) {
    parallel(team, count, together, [&](NexClaims& claims) {
        for (int64_t i; (i = next(claims)) >= 0;) one(i);
    });
}

}  // namespace

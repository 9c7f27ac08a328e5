// Threads that share out the tasks of a call: the caller and helpers that claim what is left. See pool.cpp.
#pragma once
#include <cstdint>

extern "C" {

// The tasks of one call of `parallel`. What many threads write has a cache line of its own.
struct NexTasks {
    alignas(64) int64_t left;  // claimed by nobody yet; they are claimed from the first to the last
    alignas(64) int64_t total;
    int64_t together;  // claimed at a time, so that short ones are worth it
    void (*body)(void* context, struct NexClaims& claims);
    void* context;
};

// What one thread has claimed: `count` tasks so far, of which at .. end are still to do.
struct NexClaims {
    NexTasks* tasks;
    int64_t at, end, count;
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

// Claim what comes next; false when nothing is left. Tasks are claimed before they are looked at: as long as one is
// claimed and unfinished, the caller waits and nothing else in NexTasks changes.
static inline bool claim(NexTasks& tasks, int64_t together, NexClaims& claims) {
    int64_t left = __atomic_load_n(&tasks.left, __ATOMIC_RELAXED), taken;
    do {
        if (left <= 0) return false;
        taken = left < together ? left : together;
    } while (!__atomic_compare_exchange_n(&tasks.left, &left, left - taken, true, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED));
    const int64_t at = tasks.total - left;
    claims = {&tasks, at, at + taken, claims.count + taken};
    return true;
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
        NexClaims all{nullptr, 0, tasks, tasks};
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

// The helpers. Between two calls of a run they look for tasks for a moment and then sleep; between runs they sleep, so
// that they take nothing from what else computes. The caller never waits for a helper that has claimed nothing: one that
// is not scheduled costs only its share of the work, and one that loses its core within a task costs that task's rest.
//
// One word for each share says what is left of it, and a claim is one compare-and-swap of it. A helper that comes late,
// even in a later call than the one it woke for, claims a task of whatever call is there now, or none.
#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <cstdio>
#include <new>

#if defined(NEX_OLD_GLIBC)
// For a library that is to load under older C libraries than the one it is compiled with: since glibc 2.34 these have a
// second version, which is the same function.
#if defined(__x86_64__)
#define NEX_SINCE(name, version) __asm__(".symver " #name "," #name "@GLIBC_" version)
#else
#define NEX_SINCE(name, version) __asm__(".symver " #name "," #name "@GLIBC_2.17")
#endif
NEX_SINCE(pthread_create, "2.2.5");
NEX_SINCE(pthread_join, "2.2.5");
NEX_SINCE(pthread_sigmask, "2.2.5");
NEX_SINCE(pthread_setname_np, "2.12");
#endif

namespace {

constexpr int64_t HELPER_LOOKS_NS = 50'000;   // for tasks, before it sleeps: a few of the gaps within a run
constexpr int64_t CALLER_LOOKS_NS = 50'000;   // for the end of the helpers' tasks, before it sleeps
constexpr int PAUSES = 16;                    // between two looks at the clock
constexpr int MOST_HELPERS = 1023;

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

void wait_while(uint32_t* word, uint32_t value) { syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0); }
void wake(uint32_t* word, int count) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0); }

template <class T>
T read(const T& from) { return __atomic_load_n(&from, __ATOMIC_SEQ_CST); }
template <class T, class V>
void write(T& to, V value) { __atomic_store_n(&to, T(value), __ATOMIC_SEQ_CST); }

}  // namespace

struct NexPool {
    NexTasks tasks{};
    alignas(64) uint32_t finished = 0;  // tasks of the call that helpers have finished
    uint32_t caller_sleeps = 0;
    alignas(64) uint32_t calls = 0;  // how many there were: says that there may be tasks
    alignas(64) uint32_t wakes = 0;  // what helpers sleep on; counts how often they were woken
    uint32_t asleep = 0;             // not 0: some may be
    alignas(64) uint32_t running = 0;  // a run is in progress
    uint32_t ending = 0;
    uint32_t taken = 0;  // by the caller whose run it is
    int wanted = 0, helpers = 0;
    pthread_t threads[MOST_HELPERS];
};

struct Helper {
    NexPool* pool;
    int32_t share;
};

namespace {

NexPool* pool = nullptr;  // never freed: helpers look at it until the process ends

void* help(void* argument) {
    Helper* self = static_cast<Helper*>(argument);
    NexPool& p = *self->pool;
    const int32_t share = self->share;
    delete self;
    uint32_t seen = read(p.calls) - 1;  // the call that it was made for may be there already
    while (!read(p.ending)) {
        const int64_t until = now_ns() + HELPER_LOOKS_NS;
        bool found = false;
        do {
            for (int i = 0; i < PAUSES && !(found = read(p.calls) != seen); ++i) relax();
        } while (!found && read(p.running) && now_ns() < until);
        if (found) {
            seen = read(p.calls);
            NexClaims claims{&p.tasks, 0, 0, 0, share};
            if (!claim(p.tasks, 1, claims)) continue;  // one, since only now nothing else of the call can change
            p.tasks.body(p.tasks.context, claims);
            __atomic_fetch_add(&p.finished, uint32_t(claims.count), __ATOMIC_SEQ_CST);
            if (read(p.caller_sleeps)) wake(&p.finished, 1);
            continue;
        }
        const uint32_t wakes = read(p.wakes);
        write(p.asleep, 1);  // who adds tasks after this look at them sees it
        if (read(p.calls) == seen && !read(p.ending)) wait_while(&p.wakes, wakes);
    }
    return nullptr;
}

void wake_helpers(NexPool& p) {
    __atomic_fetch_add(&p.wakes, 1, __ATOMIC_SEQ_CST);
    wake(&p.wakes, INT_MAX);
}

// As many helpers as are wanted from now on. Signals are the business of other threads.
void employ(NexPool& p, int count) {
    write(p.ending, 1);
    wake_helpers(p);
    while (p.helpers > 0) pthread_join(p.threads[--p.helpers], nullptr);
    write(p.ending, 0);
    p.wanted = count;
    p.tasks.count = count + 1 < NEX_MOST_SHARES ? count + 1 : NEX_MOST_SHARES;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (p.helpers < count && p.helpers < MOST_HELPERS) {
        Helper* helper = new (std::nothrow) Helper{&p, (p.helpers + 1) % p.tasks.count};
        if (helper == nullptr) break;
        if (pthread_create(&p.threads[p.helpers], nullptr, help, helper) != 0) {
            delete helper;
            break;
        }
        pthread_setname_np(p.threads[p.helpers++], "nexusengine");
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (p.helpers < count) std::fprintf(stderr, "nexusengine: only %d of %d threads could be started\n", p.helpers + 1, count + 1);
}

// A child has its parent's memory but none of its helpers: it begins anew.
void forget() { write(pool, nullptr); }

NexPool* made_pool() {
    NexPool* p = read(pool);
    if (p != nullptr) return p;
    NexPool* fresh = new (std::nothrow) NexPool;
    if (fresh == nullptr) return nullptr;
    if (!__atomic_compare_exchange_n(&pool, &p, fresh, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
        delete fresh;
        return p;
    }
    static const int once = pthread_atfork(nullptr, nullptr, forget);
    (void)once;
    return fresh;
}

}  // namespace

extern "C" NexTeam nex_pool_enter(int threads) {
    NexPool* p = threads > 1 ? made_pool() : nullptr;
    if (p == nullptr || __atomic_exchange_n(&p->taken, 1, __ATOMIC_SEQ_CST) != 0) return {nullptr, 1};
    if (p->wanted != threads - 1) employ(*p, threads - 1);
    write(p->running, 1);
    return {p, threads};
}

extern "C" void nex_pool_leave(const NexTeam& team) {
    if (team.pool == nullptr) return;
    write(team.pool->running, 0);
    write(team.pool->taken, 0);
}

extern "C" void nex_pool_share(const NexTeam& team, int64_t tasks, int64_t together, void (*body)(void*, NexClaims&),
                               void* context) {
    NexPool& p = *team.pool;
    p.tasks.together = together, p.tasks.body = body, p.tasks.context = context;
    write(p.finished, 0);
    const int64_t shares = p.tasks.count;
    for (int64_t i = 0; i < shares; ++i)
        write(p.tasks.shares[i].range, uint64_t(i * tasks / shares) << 32 | uint64_t((i + 1) * tasks / shares));
    __atomic_fetch_add(&p.calls, 1, __ATOMIC_SEQ_CST);
    if (read(p.asleep)) {
        write(p.asleep, 0);
        wake_helpers(p);
    }
    NexClaims claims{&p.tasks, 0, 0, 0, 0};
    body(context, claims);
    const uint32_t others = uint32_t(tasks - claims.count);
    int64_t until = 0;
    for (int looks = 0; __atomic_load_n(&p.finished, __ATOMIC_ACQUIRE) != others; ++looks) {
        relax();
        if (looks % PAUSES != 0) continue;
        if (until == 0) until = now_ns() + CALLER_LOOKS_NS;
        if (now_ns() < until) continue;
        write(p.caller_sleeps, 1);
        const uint32_t finished = read(p.finished);
        if (finished != others) wait_while(&p.finished, finished);
        write(p.caller_sleeps, 0);
    }
}

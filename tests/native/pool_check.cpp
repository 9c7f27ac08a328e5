// The pool alone: every task is done exactly once, from one thread and from several at once, with changing numbers of
// helpers, and in a process that was forked from one with helpers. "fork" as argument: the last as well.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "pool.h"

static int failures = 0;

static void work(int threads, int runs, unsigned seed) {
    std::vector<int> done;
    for (int run = 0; run < runs; ++run) {
        const NexTeam team = nex_pool_enter(threads);
        for (int call = 0; call < 20; ++call) {
            seed = seed * 1664525u + 1013904223u;
            const int64_t tasks = 1 + (seed >> 16) % 70, together = 1 + (seed >> 9) % 4;
            int64_t total = 0;
            done.assign(size_t(tasks), 0);
            parallel(team, tasks, together, [&](NexClaims& claims) {
                int64_t sum = 0;
                for (int64_t i; (i = next(claims)) >= 0; sum += i) ++done[size_t(i)];
                __atomic_fetch_add(&total, sum, __ATOMIC_RELAXED);
            });
            bool wrong = total != tasks * (tasks - 1) / 2;  // also if one helper's tasks were not waited for
            for (int times : done) wrong |= times != 1;
            if (wrong) __atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED);
        }
        nex_pool_leave(team);
        if (run % 7 == 0) usleep(300);  // helpers fall asleep
    }
}

int main(int count, char** arguments) {
    for (int threads : {2, 4, 3, 1}) work(threads, 300, unsigned(threads));
    std::thread others[3];
    for (unsigned i = 0; i < 3; ++i) others[i] = std::thread(work, 4, 300, 5 + i);
    for (std::thread& other : others) other.join();
    if (count > 1 && std::strcmp(arguments[1], "fork") == 0) {
        const pid_t child = fork();
        if (child == 0) {
            work(3, 100, 8);
            _exit(failures != 0);
        }
        int status = 1;
        waitpid(child, &status, 0);
        failures += status != 0;
        work(3, 100, 9);
    }
    std::printf("%d failures\n", failures);
    return failures != 0;
}

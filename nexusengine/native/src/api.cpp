// The C interface, and the choice of an instruction set. The table of functions is chosen once, by name or as the best
// that this processor has; every call goes through it.
#include <cstring>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "kernels.h"

#if defined(NEX_SETS)  // tests build fewer
#elif defined(__x86_64__)
#define NEX_SETS(X) X(avx512bf16) X(avx512vnni) X(avx512) X(avx2)
#elif defined(__aarch64__)
#define NEX_SETS(X) X(neondot) X(neon)
#else
#define NEX_SETS(X)
#endif

#define NEX_DECLARE(set) extern "C" const NexKernels nex_kernels_##set;
NEX_SETS(NEX_DECLARE)

namespace {

#if defined(__x86_64__)
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool runs_avx512() {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool runs_avx512vnni() { return runs_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool runs_avx512bf16() { return runs_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
#elif defined(__aarch64__)
bool runs_neon() { return true; }
bool runs_neondot() { return (getauxval(AT_HWCAP) & (1UL << 20)) != 0; }  // HWCAP_ASIMDDP
#endif

const NexKernels* chosen = nullptr;
int threads = 1;

}  // namespace

#define NEX_EXPORT extern "C" __attribute__((visibility("default")))

// Version of the structs and functions here; library.py refuses another.
NEX_EXPORT int nex_abi() { return 3; }

// The n-th best instruction set that was compiled in and runs here, or null behind the last.
NEX_EXPORT const char* nex_available(int n) {
#define NEX_COUNT(set) \
    if (runs_##set() && n-- == 0) return #set;
    NEX_SETS(NEX_COUNT)
    return nullptr;
}

// Use the instruction set of this name; 0 if it cannot run here.
NEX_EXPORT int nex_choose(const char* name) {
#define NEX_CHOOSE(set) \
    if (runs_##set() && std::strcmp(name, #set) == 0) { \
        chosen = &nex_kernels_##set; \
        return 1; \
    }
    NEX_SETS(NEX_CHOOSE)
    return 0;
}

// Threads of every later run.
NEX_EXPORT void nex_set_threads(int count) { __atomic_store_n(&threads, count > 0 ? count : 1, __ATOMIC_RELAXED); }

// Calls in order, each done before the next begins. Of several threads that run at once one has helpers.
NEX_EXPORT void nex_run(const NexCall* calls, int64_t count) {
    const NexTeam team = nex_pool_enter(__atomic_load_n(&threads, __ATOMIC_RELAXED));
    for (int64_t i = 0; i < count; ++i) chosen->calls[calls[i].kind](calls[i].arguments, team);
    nex_pool_leave(team);
}

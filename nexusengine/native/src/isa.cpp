// Every kernel for one instruction set: compiled once for each, with NEX_ISA naming it. Attention is a unit of its own,
// so that two cores share the work of compiling.
#include "gemm.h"
#include "gemm_int8.h"
#include "rows.h"

#define NEX_TEXT2(a) #a
#define NEX_TEXT(a) NEX_TEXT2(a)

extern "C" void NEX_JOIN(nex_attention_, NEX_ISA)(const void* arguments, const NexTeam& team);

namespace {

static void linear(const NexLinear& op, const NexTeam& team) {
    if (op.rows <= 0) return;
    if (!op.weight->int8_activations) linear_float(op, team);
    else if (op.weight->kind == NEX_INT8) linear_integers<Dot8, false>(op, team);
    else linear_integers<Dot4, true>(op, team);
}

template <class T, void (*FUNCTION)(const T&, const NexTeam&)>
static void call(const void* arguments, const NexTeam& team) {
    FUNCTION(*static_cast<const T*>(arguments), team);
}

}  // namespace

extern "C" const NexKernels NEX_JOIN(nex_kernels_, NEX_ISA) = {
    NEX_TEXT(NEX_ISA),
    {
        call<NexLinear, linear>,
        call<NexEmbed, embed>,
        call<NexNorm, rms_norm>,
        call<NexRotateStore, rotate_store>,
        NEX_JOIN(nex_attention_, NEX_ISA),
        call<NexLargest, largest_of>,
        call<NexTake, take_rows>,
    },
};

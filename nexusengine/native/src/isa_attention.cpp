// Attention for one instruction set; see isa.cpp.
#include "attention.h"

extern "C" void NEX_JOIN(nex_attention_, NEX_ISA)(const void* arguments, const NexTeam& team) {
    attention(*static_cast<const NexAttention*>(arguments), team);
}

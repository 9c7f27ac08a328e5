"""The table of operations on the CPU kernels (nexusengine.native): float32 activations, packed weights.

Norms, residual additions and the gated activation are part of the linear maps, and rotation is part of the KV store, so
that a layer is six calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import torch

from nexusengine.attention.base import AttentionBackend, AttentionMeta
from nexusengine.config import Quantization
from nexusengine.layers.ops import TorchOps
from nexusengine.layers.rotary import RotaryEmbedding
from nexusengine.loading.gguf_file import Q4Blocks
from nexusengine.loading.weights import Stored
from nexusengine.native import Calls, Library, Prepared, structs
from nexusengine.native.cache import cache_of
from nexusengine.native.pack import PackedWeight, pack_float, pack_int8, pack_q4, q4_blocks

_STEPS = 512
"""Most recorded steps kept; there is one for each number of rows."""


class PackedMap:
    """A packed weight and the arguments of its calls, filled in once."""

    def __init__(self, packed: PackedWeight, gated: bool) -> None:
        self.packed = packed
        self.outputs = packed.n // 2 if gated else packed.n
        self.weight = packed.struct()
        self.arguments = structs.Linear(weight=ctypes.pointer(self.weight))
        self.call = Prepared(self.arguments)

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self.packed.tensors()


class NativeOps:
    """One thread calls it."""

    def __init__(self, eps: float, library: Library, quantization: Quantization = "none") -> None:
        self.name = f"native ({library.isa})"
        self.keeps_stored = quantization == "int4"
        self.cache_dtype: torch.dtype | None = None if quantization == "none" else torch.bfloat16
        self._quantization = quantization
        self._eps, self._library = eps, library
        self._torch = TorchOps(eps)
        self._rows: dict[tuple[str, int], torch.Tensor] = {}
        self._views: dict[tuple[str, int, int], torch.Tensor] = {}
        self._steps: dict[tuple[int, ...], tuple[Calls, torch.Tensor]] = {}
        self._embed, self._norm, self._store = structs.Embed(), structs.Norm(eps=eps), structs.RotateStore()
        self._embed_call, self._norm_call = Prepared(self._embed), Prepared(self._norm)
        self._store_call = Prepared(self._store)
        self._gather = structs.Take()
        self._gather_call = Prepared(self._gather)

    def takes(self, weight: Stored, *, head: bool = False) -> bool:
        return self.keeps_stored and isinstance(weight, Q4Blocks)

    def pack(
        self,
        weight: torch.Tensor | Stored,
        bias: torch.Tensor | None = None,
        *,
        gated: bool = False,
        head: bool = False,
    ) -> PackedMap:
        """Pack a map with the bits of the quantization.

        int4: 4-bit blocks are kept, other weights rounded to such; the head, and what is no multiple of 32 wide, has 8
        bits.
        """
        if isinstance(weight, Q4Blocks):
            return PackedMap(pack_q4(weight, bias, gated), gated)
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"the CPU kernels keep no {type(weight).__name__}")
        if self._quantization == "none":
            return PackedMap(pack_float(weight, bias, gated), gated)
        if self._quantization == "bf16":
            return PackedMap(pack_float(weight.bfloat16(), bias, gated), gated)
        if self._quantization == "int8" or head or weight.shape[1] % 32:
            return PackedMap(pack_int8(weight, bias, gated), gated)
        return PackedMap(pack_q4(q4_blocks(weight), bias, gated), gated)

    def finish(self) -> None:
        return

    def embed(self, ids: torch.Tensor, table: PackedMap) -> torch.Tensor:
        out = self.workspace("embed", ids, table.packed.k)
        a = self._embed
        a.weight, a.ids, a.out, a.rows = ctypes.pointer(table.weight), ids.data_ptr(), out.data_ptr(), out.shape[0]
        self._library.run(self._embed_call)
        return out

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = self.workspace("norm", x, x.shape[1])
        a = self._norm
        a.x, a.weight, a.out = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        a.rows, a.dim = x.shape
        self._library.run(self._norm_call)
        return out

    def linear(self, to: PackedMap, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        out = self.workspace("linear", x, to.outputs)
        self._run(to, x, norm, out, structs.STORE)
        return out

    def add_linear(self, to: PackedMap, x: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        self._run(to, x, None, into, structs.ADD)
        return into

    def gated(self, to: PackedMap, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        out = self.workspace("gated", x, to.outputs)
        self._run(to, x, norm, out, structs.GATED)
        return out

    def gather(self, use: str, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        out = self.workspace(f"gathered {use}", rows, x.shape[1])
        a = self._gather
        a.x, a.places, a.out = x.data_ptr(), rows.data_ptr(), out.data_ptr()
        a.rows, a.columns = out.shape
        self._library.run(self._gather_call)
        return out

    def logits(self, to: PackedMap, x: torch.Tensor) -> torch.Tensor:
        out = self.workspace("logits", x, to.outputs)
        self._run(to, x, None, out, structs.STORE)
        return out

    def rope_table(self, rotary: RotaryEmbedding, positions: torch.Tensor) -> tuple[RotaryEmbedding, torch.Tensor]:
        return rotary, positions

    def workspace(self, use: str, like: torch.Tensor, columns: int) -> torch.Tensor:
        """The same place for the same use and number of rows, until more rows are asked for than ever before.

        Then room is made for a power of two, so that steps of ever more tokens do not leave a trail of holes behind.
        """
        rows = like.shape[0]
        view = self._views.get((use, rows, columns))
        if view is not None:
            return view
        have = self._rows.get((use, columns))
        if have is None or have.shape[0] < rows:
            have = self._rows[use, columns] = torch.empty(1 << (rows - 1).bit_length(), columns)
            self._views = {key: kept for key, kept in self._views.items() if (key[0], key[2]) != (use, columns)}
            self._steps.clear()
        view = self._views[use, rows, columns] = have[:rows]
        return view

    def step(self, compute: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        """Run all calls of a step at once, so that the threads need not be woken for each.

        Steps are told apart by their inputs' addresses, rows and distances between rows: nothing else goes into the
        arguments of their calls.
        """
        key = tuple([number for t in inputs or () for number in (t.data_ptr(), t.shape[0], t.stride(0))])
        known = self._steps.get(key)
        if known is None:
            with self._library.recording() as recorded:
                result = compute()
            known = Calls(recorded), result
            if len(self._steps) == _STEPS:
                self._steps.clear()
            if key:
                self._steps[key] = known
        self._library.replay(known[0])
        return known[1]

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        rope_table: tuple[RotaryEmbedding, torch.Tensor],
        attention: AttentionBackend,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        heads: tuple[int, int, int],
    ) -> torch.Tensor:
        rotary, positions = rope_table
        if attention.name != "cpu":  # another backend may keep K and V in a way of its own
            cos_sin = rotary.at(positions)
            return self._torch.rotate_and_store(qkv, cos_sin, attention, k_cache, v_cache, meta, heads)
        count, kv_count, dim = heads
        a = self._store
        a.qkv, a.cos, a.sin = qkv.data_ptr(), rotary.cos.data_ptr(), rotary.sin.data_ptr()
        a.positions, a.slots = positions.data_ptr(), meta.slot_mapping.data_ptr()
        a.tokens, a.heads, a.kv_heads, a.dim = qkv.shape[0], count, kv_count, dim
        a.cache = cache_of(k_cache, v_cache, dim)
        self._library.run(self._store_call)
        return qkv[:, : count * dim].view(-1, count, dim)

    def _run(self, to: PackedMap, x: torch.Tensor, norm: torch.Tensor | None, out: torch.Tensor, finish: int) -> None:
        a = to.arguments
        a.x, a.x_stride, a.rows = x.data_ptr(), x.stride(0), x.shape[0]
        a.norm = None if norm is None else norm.data_ptr()
        a.out, a.out_stride = out.data_ptr(), out.stride(0)
        a.eps, a.finish = self._eps, finish
        self._library.run(to.call)

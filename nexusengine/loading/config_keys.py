"""Keys of a config.json that change what a model computes and that nothing here computes.

Models of a known architecture do not have them. A checkpoint that does is of another kind under a known name, and would
answer nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nexusengine.errors import ModelLoadError
from nexusengine.loading.shown import short

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # what is multiplied, added or cut
    "attention_multiplier": (1.0,), "clip_qkv": (), "embedding_multiplier": (1.0,), "scale_emb": (1.0,),
    "scale_depth": (), "dim_model_base": (), "query_pre_attn_scalar": (), "residual_multiplier": (1.0,),
    "scale_embedding": (False,), "normalize_embedding": (False,), "norm_add_unit_offset": (False,),
    # normalisation in other places
    "qk_layernorm": (False,), "qk_norm": (False,), "use_qk_norm": (False,), "use_post_norm": (False,),
    # positions
    "alibi": (False,), "no_rope_layers": ([],), "nope_layers": ([],), "no_rope_layer_interval": (0,),
    "rope_interleaved": (False,), "rope_interleave": (False,), "rotary_emb_interleaved": (False,),
    "rotary_pct": (1.0,), "rope_pct": (1.0,), "rotary_dim": (), "use_rope": (True,), "use_rotary_emb": (True,),
    "position_embedding_type": ("rope", "rotary", "absolute"),  # absolute: a default that nothing reads
    # another attention
    "attention_chunk_size": (), "attn_temperature_tuning": (False,), "kv_lora_rank": (), "q_lora_rank": (),
    "num_kv_shared_layers": (0,), "is_causal": (True,), "use_bidirectional_attention": (False,),
    "attention_sinks": (0, False), "use_differential_attention": (False,),
    # another way through the layers
    "parallel_attn": (False,), "use_parallel_residual": (False,), "parallel_residual": (False,),
    "num_experts": (0, 1), "num_local_experts": (0, 1), "n_routed_experts": (0, 1), "moe_num_experts": (0, 1),
    "cross_attention_layers": ([],), "add_cross_attention": (False,), "is_encoder_decoder": (False,),
    "num_loops": (1,), "num_recurrent_steps": (1,),
}  # fmt: skip
"""By key: the values with which it changes nothing."""
_SCALES = re.compile(
    r".*(_multipliers?|_soft_?cap(ping)?|logits?_(scale|scaling)|(attn|attention|residual)_scal(e|ing))"
)
_NEUTRAL_SCALES = (0, 1, False)


def refuse_uncomputed(values: Mapping[str, Any], where: str) -> None:
    """Refuse keys that would change the result and are not computed.

    Raises:
        ModelLoadError: naming the first such key and its value.
    """
    for key, value in values.items():
        if key in _NEUTRAL:
            neutral: tuple[Any, ...] = _NEUTRAL[key]
        elif _SCALES.fullmatch(key):
            neutral = _NEUTRAL_SCALES
        else:
            continue
        if key == "no_rope_layers" and isinstance(value, list) and all(flag == 1 for flag in value):
            continue  # 1 where a layer has rotary positions
        if value is not None and value not in neutral:
            raise ModelLoadError(f"{where}: {key} is {short(value)}, which is not supported")

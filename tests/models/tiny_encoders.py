"""A tiny random configuration of each class of text encoder that pipelines of diffusers have, and the inputs they give it.

Tests load this file by its path: the folder is no package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 200
WIDTH = 32
TOKENS = 12

T5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
CLIP = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": VOCABULARY - 1,
}
# A decoder of a language model.
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN_VL = {
    "text_config": {key: value for key, value in DECODER.items() if key != "head_dim"}
    | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}},
    "vision_config": {"depth": 2, "hidden_size": WIDTH, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": WIDTH},
    "image_token_id": 190,
    "video_token_id": 191,
    "vision_start_token_id": 192,
    "vision_end_token_id": 193,
}

# Class: its configuration, and the keywords of its call besides `input_ids`.
TINY: dict[str, tuple[dict, tuple[str, ...]]] = {
    "T5EncoderModel": (T5 | {"feed_forward_proj": "gated-gelu"}, ()),
    "UMT5EncoderModel": (T5, ("attention_mask",)),
    "CLIPTextModel": (CLIP, ("output_hidden_states",)),
    "CLIPTextModelWithProjection": (CLIP | {"projection_dim": 24}, ("output_hidden_states",)),
    "Qwen2_5_VLForConditionalGeneration": (QWEN_VL, ("attention_mask", "output_hidden_states")),
    "Qwen3Model": (DECODER, ("attention_mask", "output_hidden_states")),
    "Qwen3ForCausalLM": (DECODER | {"tie_word_embeddings": True}, ("attention_mask", "output_hidden_states")),
    "Gemma2Model": (DECODER | {"query_pre_attn_scalar": 16}, ("attention_mask", "output_hidden_states")),
    "LlamaModel": (DECODER, ("attention_mask", "output_hidden_states")),
    "BertModel": (CLIP | {"bos_token_id": None, "eos_token_id": None}, ("attention_mask",)),
}


def encoder(name: str, seed: int = 1, **changes: Any) -> Any:
    """A random model of a class of TINY, its weights in full precision; `changes` are entries of its configuration."""
    import transformers

    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**TINY[name][0] | changes)).eval().requires_grad_(False)
    for parameter in model.parameters():  # as they are made some are all zeros or ones, and hide what is done with them
        parameter.add_(0.02 * torch.randn(parameter.shape))
    return model


def inputs(name: str, seed: int = 3) -> dict[str, Any]:
    """What a pipeline calls an encoder with: two prompts, the second padded."""
    ids = torch.randint(3, 180, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = VOCABULARY - 1
    mask = torch.ones_like(ids)
    mask[1, TOKENS // 2 :] = 0
    given: dict[str, Any] = {"attention_mask": mask, "output_hidden_states": True}
    return {"input_ids": ids} | {key: given[key] for key in TINY[name][1]}


def outputs(model: Any, name: str) -> list[Tensor]:
    """All tensors that an encoder returns."""
    with torch.no_grad():
        found = model(**inputs(name), return_dict=True)
    values = (tuple(value) if isinstance(value, tuple | list) else (value,) for value in found.values())
    return [tensor for value in values for tensor in value if isinstance(tensor, Tensor)]


def tables(model: nn.Module) -> list[str]:
    """Paths of the embeddings of tokens, tied ones once."""
    found = {id(m.weight): n for n, m in reversed([*model.named_modules()]) if isinstance(m, nn.Embedding)}
    return [name for name in found.values() if model.get_submodule(name).num_embeddings == VOCABULARY]

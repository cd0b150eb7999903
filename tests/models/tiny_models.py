"""A tiny random configuration of each transformer class of diffusers that quantdit knows, and one that it does not.

Tests load this file by its path: the folder is no package.
"""

from __future__ import annotations

import torch
from torch import nn

from quantdit.recipes.sampling_plan import Size

# class: (config, size of the inputs).
TINY: dict[str, tuple[dict, Size]] = {
    "AuraFlowTransformer2DModel": (
        {
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "caption_projection_dim": 64,
            "pos_embed_max_size": 64,
        },
        Size(2, 1, 8, 8, 6),
    ),
    "ChromaTransformer2DModel": (
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "axes_dims_rope": (8, 12, 12),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 32,
            "approximator_layers": 2,
        },
        Size(2, 1, 8, 8, 6),
    ),
    "CogVideoXTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 48,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 6,
            "use_rotary_positional_embeddings": True,
        },
        Size(2, 3, 8, 8, 6),
    ),
    "CogView4Transformer2DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "text_embed_dim": 48,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "rope_axes_dim": (16, 16),
        },
        Size(2, 1, 8, 8, 16),
    ),
    "DiTTransformer2DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "norm_num_groups": 1,
            "sample_size": 8,
            "num_embeds_ada_norm": 10,
        },
        Size(2, 1, 8, 8),
    ),
    "Flux2Transformer2DModel": (
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (8, 8, 8, 8),
        },
        Size(2, 1, 8, 8, 6),
    ),
    "FluxTransformer2DModel": (
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "pooled_projection_dim": 24,
            "guidance_embeds": True,
            "axes_dims_rope": (8, 12, 12),
        },
        Size(2, 1, 8, 8, 6),
    ),
    "HunyuanVideoTransformer3DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 48,
            "pooled_projection_dim": 24,
            "rope_axes_dim": (8, 12, 12),
        },
        Size(2, 3, 8, 8, 6),
    ),
    "LTXVideoTransformer3DModel": (
        {
            "in_channels": 16,
            "out_channels": 16,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "cross_attention_dim": 64,
            "num_layers": 2,
            "caption_channels": 48,
        },
        Size(2, 2, 4, 4, 6),
    ),
    "LatteTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 64,
            "attention_bias": True,
            "sample_size": 8,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 48,
            "video_length": 3,
        },
        Size(2, 3, 8, 8, 6),
    ),
    "Lumina2Transformer2DModel": (
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 64,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 32,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (16, 16, 16),
            "cap_feat_dim": 48,
        },
        Size(2, 1, 8, 8, 6),
    ),
    "MochiTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "num_layers": 2,
            "pooled_projection_dim": 32,
            "in_channels": 4,
            "text_embed_dim": 48,
            "time_embed_dim": 16,
            "max_sequence_length": 16,
        },
        Size(2, 2, 8, 8, 6),
    ),
    "PixArtTransformer2DModel": (
        {
            # Resolution and aspect ratio take a third of the width each.
            "num_attention_heads": 3,
            "attention_head_dim": 32,
            "num_layers": 2,
            "cross_attention_dim": 96,
            # Of this one size, and only of it, the class takes resolution and aspect ratio.
            "sample_size": 128,
            "caption_channels": 48,
        },
        Size(2, 1, 8, 8, 6),
    ),
    "QwenImageTransformer2DModel": (
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "axes_dims_rope": (8, 12, 12),
        },
        Size(2, 1, 8, 8, 6),
    ),
    "SD3Transformer2DModel": (
        {
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 24,
            "out_channels": 4,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        Size(2, 1, 8, 8, 6),
    ),
    "SanaTransformer2DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 32,
            "cross_attention_dim": 64,
            "caption_channels": 48,
            "sample_size": 8,
        },
        Size(2, 1, 8, 8, 6),
    ),
    "WanTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 48,
            "freq_dim": 16,
            "ffn_dim": 128,
            "num_layers": 2,
        },
        Size(2, 3, 8, 8, 6),
    ),
    "ZImageTransformer2DModel": (
        {
            "in_channels": 4,
            "dim": 64,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 48,
            "axes_dims": [8, 12, 12],
            "axes_lens": [64, 16, 16],
        },
        Size(2, 1, 8, 8, 6),
    ),
}

# Not in ADAPTERS: block list and inputs are derived.
UNKNOWN: dict[str, tuple[dict, Size]] = {
    "CogView3PlusTransformer2DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "text_embed_dim": 48,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        Size(2, 1, 8, 8, 6),
    ),
}


def tiny(name: str) -> tuple[nn.Module, Size]:
    """Return a model of this class with seeded weights, and the size of inputs for it."""
    import diffusers

    config, size = (TINY | UNKNOWN)[name]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config).eval()
    for parameter in model.parameters():
        # Some classes leave parameters unset (Z-Image's padding tokens).
        if not bool(torch.isfinite(parameter).all()):
            nn.init.normal_(parameter, std=0.02)
    return model, size

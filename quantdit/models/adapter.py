"""`Adapter`: what quantdit knows of one transformer class, as data; and the derived adapter of a class it does not know."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn

from quantdit.recipes.rules import Layer

# Patterns over the path of a linear inside its block. The first that matches wins.
ROLES = (
    ("*emb.*", "embedder"),
    ("norm*linear*", "modulation"),
    ("*adaln*", "modulation"),
    ("*modulation*", "modulation"),
    ("img_mod.*", "modulation"),
    ("txt_mod.*", "modulation"),
    ("attn*", "attention"),
    ("attention*", "attention"),
    ("ff*", "feed_forward"),
    ("feed_forward*", "feed_forward"),
    ("*mlp*", "feed_forward"),
    # Of text encoders: T5, language models, BERT.
    ("*.SelfAttention.*", "attention"),
    ("self_attn*", "attention"),
    ("*.DenseReluDense.*", "feed_forward"),
    ("intermediate.*", "feed_forward"),
    ("output.*", "feed_forward"),
    # Of single-stream blocks: one linear takes attention and feed-forward together back to the stream.
    ("proj_out", "feed_forward"),
)


@dataclass(frozen=True)
class Input:
    """One argument of a transformer's forward, and how to make it up (quantdit/models/synthetic.py does).

    Attributes:
        name: the argument; `a.b` is entry b of a dictionary a.
        kind: one of
            `latent`: the noisy sample, which a sampler moves; normal.
            `timestep`: time times `value`. Time falls from 1000 (noise) to 0 (data) whatever the class counts like.
            `reversed_timestep`: (1000 - time) times `value`. Such a class predicts data minus noise.
            `text`: random token states with heavy tails and a few channels of far larger size; `value` is their scale.
            `padded_text`: the same, zero behind the end of each prompt.
            `pooled`: one random vector per prompt; normal, `value` is its scale.
            `mask`: 1 to the end of each prompt, then 0. Columns beyond the text tokens (joint masks) are 1.
            `classes`: random class numbers.
            `grid_ids`: row and column of each 2 x 2 patch in the columns 1 and 2 of a table that is otherwise zero.
            `token_ids`: the number of each text token in the last column of a table that is otherwise zero.
            `zeros`: zeros.
            `constant`: `value`; filled into a tensor if there is a shape.
            `size`: the first of `shape`, as a number.
            `pixels`: height and width in pixels, 8 a latent cell.
            `grid_shapes`: a list per sample of one (frames, rows, columns) in 2 x 2 patches.
            `rotary`: cosines and sines of CogVideoX's rotary positions.
        shape: numbers; names of `Size`; `cells` (all latent cells), `patches` (2 x 2 of them), `tokens+patches`; fields of the
            model's config.
        dtype: `model` for the model's own, or a name such as `float32`, `int64`.
        value: a number (or the config field that holds it), or any constant; what it means depends on the kind.
        when: the field of the model, or of its config, without which the argument is left out.
        listed: given as a list of one tensor per sample, without the batch dimension.
    """

    name: str
    kind: str
    shape: tuple[str | int, ...] = ()
    dtype: str = "model"
    value: Any = 1.0
    when: str = ""
    listed: bool = False


@dataclass(frozen=True)
class Adapter:
    """Where the blocks of a transformer are, what its linears do, and what its forward takes.

    Attributes:
        blocks: paths of all module lists that hold blocks. Their order says nothing: lists may run interleaved.
        roles: ordered (pattern over the path inside a block, role); the first match wins, otherwise `other`. Linears outside
            the blocks have the role `outside`.
        skip: patterns over the full paths of linears that are never quantized, whatever the recipe says.
        inputs: the arguments of forward, to make them up where no pipeline runs; empty if nobody knows how.
        shared: paths of modules inside blocks that run outside of them too, so that they have to stay in memory.
        scheduler: how a sample moves from noise along the model's predictions: `flow` (velocity, FlowMatchEulerDiscreteScheduler)
            or `epsilon` or `v` (DDIMScheduler of that prediction type).
    """

    blocks: tuple[str, ...]
    roles: tuple[tuple[str, str], ...] = ROLES
    skip: tuple[str, ...] = ()
    inputs: tuple[Input, ...] = ()
    shared: tuple[str, ...] = ()
    scheduler: str = "flow"


# Scale of token states by text encoder, to one digit: T5 normalises its last layer to a fraction of one, language models end on
# hidden states of a few units. The heavy tail comes on top.
T5 = 0.2
LLM = 2.0

IMAGE = ("batch", "in_channels", "height", "width")
VIDEO = ("batch", "in_channels", "frames", "height", "width")
FRAMES_FIRST = ("batch", "frames", "in_channels", "height", "width")
PACKED = ("batch", "patches", "in_channels")

# Schedulers with whole-numbered steps (DDIM, DPM, UniPC) pass int64, flow matching's Euler float32.
STEP = Input("timestep", "timestep", ("batch",), "int64")
FLOW_STEP = Input("timestep", "timestep", ("batch",), "float32")
FLOW_UNIT = Input("timestep", "timestep", ("batch",), value=1e-3)
REVERSED_UNIT = Input("timestep", "reversed_timestep", ("batch",), "float32", 1e-3)
GUIDANCE = Input("guidance", "constant", ("batch",), "float32", 3.5, when="guidance_embeds")
ROPE_IDS = (Input("img_ids", "grid_ids", ("patches", 3)), Input("txt_ids", "zeros", ("tokens", 3)))


def _text(width: str, scale: float, name: str = "encoder_hidden_states", kind: str = "text") -> Input:
    return Input(name, kind, ("batch", "tokens", width), value=scale)


ADAPTERS: dict[str, Adapter] = {
    "AuraFlowTransformer2DModel": Adapter(
        ("joint_transformer_blocks", "single_transformer_blocks"),
        inputs=(Input("hidden_states", "latent", IMAGE), _text("joint_attention_dim", T5), FLOW_UNIT),
    ),
    "ChromaTransformer2DModel": Adapter(
        # Not distilled_guidance_layer.layers, which make the modulation: few weights, and every block depends on them.
        ("transformer_blocks", "single_transformer_blocks"),
        inputs=(
            Input("hidden_states", "latent", PACKED),
            _text("joint_attention_dim", T5),
            Input("attention_mask", "mask", ("batch", "tokens+patches")),
            FLOW_UNIT,
            *ROPE_IDS,
        ),
    ),
    "CogVideoXTransformer3DModel": Adapter(
        ("transformer_blocks",),
        inputs=(
            Input("hidden_states", "latent", FRAMES_FIRST),
            # The table of learned or sinusoidal positions covers exactly this many text tokens.
            Input("encoder_hidden_states", "text", ("batch", "max_text_seq_length", "text_embed_dim"), value=T5),
            STEP,
            Input("image_rotary_emb", "rotary", dtype="float32", when="use_rotary_positional_embeddings"),
        ),
        scheduler="v",
    ),
    "CogView4Transformer2DModel": Adapter(
        ("transformer_blocks",),
        inputs=(
            Input("hidden_states", "latent", IMAGE),
            _text("text_embed_dim", LLM),
            FLOW_STEP,
            Input("original_size", "pixels", ("batch", 2)),
            Input("target_size", "pixels", ("batch", 2)),
            Input("crop_coords", "zeros", ("batch", 2)),
        ),
    ),
    "DiTTransformer2DModel": Adapter(
        ("transformer_blocks",),
        inputs=(
            Input("hidden_states", "latent", IMAGE),
            STEP,
            Input("class_labels", "classes", ("batch",), "int64", "num_embeds_ada_norm"),
        ),
        shared=("transformer_blocks.0.norm1.emb",),  # the last layer is modulated by it
        scheduler="epsilon",
    ),
    "Flux2Transformer2DModel": Adapter(
        ("transformer_blocks", "single_transformer_blocks"),
        inputs=(
            Input("hidden_states", "latent", PACKED),
            _text("joint_attention_dim", LLM),
            FLOW_UNIT,
            Input("guidance", "constant", ("batch",), "float32", 4.0, when="guidance_embeds"),
            Input("img_ids", "grid_ids", ("batch", "patches", 4), "int64"),
            Input("txt_ids", "token_ids", ("batch", "tokens", 4), "int64"),
        ),
    ),
    "FluxTransformer2DModel": Adapter(
        ("transformer_blocks", "single_transformer_blocks"),
        inputs=(
            Input("hidden_states", "latent", PACKED),
            _text("joint_attention_dim", T5),
            Input("pooled_projections", "pooled", ("batch", "pooled_projection_dim")),
            FLOW_UNIT,
            GUIDANCE,
            *ROPE_IDS,
        ),
    ),
    "HunyuanVideoTransformer3DModel": Adapter(
        ("context_embedder.token_refiner.refiner_blocks", "transformer_blocks", "single_transformer_blocks"),
        inputs=(
            Input("hidden_states", "latent", VIDEO),
            FLOW_STEP,
            _text("text_embed_dim", LLM),
            Input("encoder_attention_mask", "mask", ("batch", "tokens")),
            Input("pooled_projections", "pooled", ("batch", "pooled_projection_dim")),
            # The pipeline's default of 6, times 1000 as the pipeline passes it.
            Input("guidance", "constant", ("batch",), value=6000.0, when="guidance_embeds"),
        ),
    ),
    "LTXVideoTransformer3DModel": Adapter(
        ("transformer_blocks",),
        inputs=(
            Input("hidden_states", "latent", ("batch", "cells", "in_channels")),
            _text("caption_channels", T5),
            FLOW_STEP,
            Input("encoder_attention_mask", "mask", ("batch", "tokens"), "bool"),
            Input("num_frames", "size", ("frames",)),
            Input("height", "size", ("height",)),
            Input("width", "size", ("width",)),
            # Compression of the autoencoder: 8 frames at 25 a second, 32 x 32 pixels.
            Input("rope_interpolation_scale", "constant", value=(8 / 25, 32, 32)),
        ),
    ),
    "LatteTransformer3DModel": Adapter(
        ("transformer_blocks", "temporal_transformer_blocks"),
        inputs=(
            # The table of temporal positions covers exactly this many frames.
            Input("hidden_states", "latent", ("batch", "in_channels", "video_length", "height", "width")),
            STEP,
            _text("caption_channels", T5),
            Input("enable_temporal_attentions", "constant", value=True),
        ),
        scheduler="epsilon",
    ),
    "Lumina2Transformer2DModel": Adapter(
        ("noise_refiner", "context_refiner", "layers"),
        inputs=(
            Input("hidden_states", "latent", IMAGE),
            REVERSED_UNIT,
            _text("cap_feat_dim", LLM),
            Input("encoder_attention_mask", "mask", ("batch", "tokens"), "int64"),
        ),
    ),
    "MochiTransformer3DModel": Adapter(
        ("transformer_blocks",),
        inputs=(
            Input("hidden_states", "latent", VIDEO),
            _text("text_embed_dim", T5),
            Input("timestep", "reversed_timestep", ("batch",)),
            Input("encoder_attention_mask", "mask", ("batch", "tokens"), "bool"),
        ),
    ),
    "PixArtTransformer2DModel": Adapter(
        ("transformer_blocks",),
        inputs=(
            Input("hidden_states", "latent", IMAGE),
            _text("caption_channels", T5),
            STEP,
            Input("encoder_attention_mask", "mask", ("batch", "tokens"), "int64"),
            Input("added_cond_kwargs.resolution", "pixels", ("batch", 2), when="use_additional_conditions"),
            Input("added_cond_kwargs.aspect_ratio", "constant", ("batch", 1), when="use_additional_conditions"),
        ),
        scheduler="epsilon",
    ),
    "QwenImageTransformer2DModel": Adapter(
        ("transformer_blocks",),
        inputs=(
            Input("hidden_states", "latent", PACKED),
            _text("joint_attention_dim", LLM, kind="padded_text"),
            Input("encoder_hidden_states_mask", "mask", ("batch", "tokens"), "int64"),
            FLOW_UNIT,
            GUIDANCE,
            Input("img_shapes", "grid_shapes"),
        ),
    ),
    "SD3Transformer2DModel": Adapter(
        ("transformer_blocks",),
        inputs=(
            Input("hidden_states", "latent", IMAGE),
            _text("joint_attention_dim", T5),
            Input("pooled_projections", "pooled", ("batch", "pooled_projection_dim")),
            FLOW_STEP,
        ),
    ),
    "SanaTransformer2DModel": Adapter(
        # Its feed-forwards are convolutions, which quantdit leaves alone.
        ("transformer_blocks",),
        inputs=(
            Input("hidden_states", "latent", IMAGE),
            _text("caption_channels", LLM),
            Input("timestep", "timestep", ("batch",), "float32", "timestep_scale"),
            Input("encoder_attention_mask", "mask", ("batch", "tokens"), "int64"),
            Input("guidance", "constant", ("batch",), value=0.45, when="guidance_embeds"),
        ),
    ),
    "WanTransformer3DModel": Adapter(
        ("blocks",),
        inputs=(
            Input("hidden_states", "latent", VIDEO),
            # Wan 2.2 5B's pipeline passes one equal time per token instead; the blocks see the same values either way.
            STEP,
            _text("text_dim", T5, kind="padded_text"),
            # 257 states of CLIP's image encoder, in image-to-video models.
            Input("encoder_hidden_states_image", "text", ("batch", 257, "image_dim"), when="image_dim"),
        ),
    ),
    "ZImageTransformer2DModel": Adapter(
        ("noise_refiner", "context_refiner", "layers"),
        inputs=(
            Input("x", "latent", VIDEO, listed=True),
            Input("t", "reversed_timestep", ("batch",), "float32", 1e-3),
            Input("cap_feats", "text", ("batch", "tokens", "cap_feat_dim"), value=LLM, listed=True),
        ),
    ),
}

# Text encoders whose blocks cannot be told by their weights. Pipelines of Qwen-Image call all of Qwen2.5-VL and read its last
# hidden states, so they never use the head's logits. Those that edit images run the vision tower, those of text alone do not.
# Tower and head are outside the blocks, which presets leave in 16 bits.
ENCODER_ADAPTERS = {
    "Qwen2_5_VLForConditionalGeneration": Adapter(("model.language_model.layers",)),
    "Qwen2_5_VLModel": Adapter(("language_model.layers",)),
}

# A list whose blocks are this much lighter than those of the main list holds embedders or adapters.
LIGHT_BLOCK = 1 / 8

# Config fields that hold the width of token states, by the classes that diffusers has.
TEXT_WIDTHS = ("caption_channels", "text_dim", "text_embed_dim", "joint_attention_dim", "cap_feat_dim", "cross_attention_dim")

# What an argument of a class that nobody described probably is. One without a default must be here.
LIKELY_INPUTS = (
    STEP,
    GUIDANCE,
    Input("pooled_projections", "pooled", ("batch", "pooled_projection_dim"), when="pooled_projection_dim"),
    Input("encoder_attention_mask", "mask", ("batch", "tokens"), "int64"),
    Input("encoder_hidden_states_mask", "mask", ("batch", "tokens"), "int64"),
    Input("class_labels", "classes", ("batch",), "int64", "num_embeds_ada_norm", when="num_embeds_ada_norm"),
    Input("original_size", "pixels", ("batch", 2)),
    Input("target_size", "pixels", ("batch", 2)),
    Input("crop_coords", "zeros", ("batch", 2)),
    *ROPE_IDS,
    Input("img_shapes", "grid_shapes"),
    Input("num_frames", "size", ("frames",)),
    Input("height", "size", ("height",)),
    Input("width", "size", ("width",)),
)


def adapter_for(model: nn.Module) -> Adapter:
    """Return the adapter of the model's class, or derive one from its module lists and the names its forward takes.

    Raises:
        ValueError: the model has no list of blocks with linears, so there is nothing to stream.
    """
    known = (ADAPTERS | ENCODER_ADAPTERS).get(type(model).__name__)
    if known is not None:
        return known
    inputs, unknown = likely_inputs(model)
    return Adapter(_block_lists(model), inputs=() if unknown else inputs)


def _block_lists(model: nn.Module) -> tuple[str, ...]:
    """Return the outermost lists of blocks beside the one with the most weights in linears.

    Lists of bare linears, those of light blocks, and those deeper in the model (embedders') hold something else.
    """
    weights: dict[str, int] = {}
    heaviest: dict[str, int] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in weights)
        if isinstance(module, nn.ModuleList) and not inside and not any(isinstance(child, nn.Linear) for child in module):
            counts = [_linear_weights(child) for child in module]
            if sum(counts):
                weights[path], heaviest[path] = sum(counts), max(counts)
    if not weights:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks with linears; quantdit quantizes the blocks of diffusion transformers"
        )
    main = max(weights, key=lambda path: weights[path])
    parent = main.rpartition(".")[0]
    return tuple(path for path in weights if path.rpartition(".")[0] == parent and heaviest[path] >= LIGHT_BLOCK * heaviest[main])


def _linear_weights(module: nn.Module) -> int:
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def likely_inputs(model: nn.Module) -> tuple[tuple[Input, ...], tuple[str, ...]]:
    """Return what the arguments of the model's forward probably are, by their names, and those required that none can tell."""
    templates = {template.name: template for template in (*_likely_latent(model), *_likely_text(model), *LIKELY_INPUTS)}
    inputs, unknown = [], []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in templates:
            inputs.append(templates[name])
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            unknown.append(name)
    if not inputs:
        unknown.append("hidden_states")
    return tuple(inputs), tuple(unknown)


def _likely_latent(model: nn.Module) -> tuple[Input, ...]:
    """A sample enters through a convolution over its channels, a linear over those of a token, or one over those of a patch."""
    config = getattr(model, "config", None)
    channels, patch = getattr(config, "in_channels", 0), getattr(config, "patch_size", 1)
    patch_area = math.prod(patch[-2:]) if isinstance(patch, list | tuple) else (patch or 1) ** 2
    # Diffusers calls transformers of videos ...3DModel; some convolve frame by frame.
    is_video = "3D" in type(model).__name__
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d) and m.in_channels == channels]
    widths = {m.in_features for m in model.modules() if isinstance(m, nn.Linear)}
    if convolutions:
        is_video |= isinstance(convolutions[0], nn.Conv3d)
    elif channels in widths:
        return (Input("hidden_states", "latent", PACKED),)
    elif channels * patch_area not in widths:
        return ()
    return (Input("hidden_states", "latent", VIDEO if is_video else IMAGE),)


def _likely_text(model: nn.Module) -> tuple[Input, ...]:
    width = next((width for width in TEXT_WIDTHS if getattr(getattr(model, "config", None), width, None)), None)
    return () if width is None else (_text(width, T5),)


def blocks(model: nn.Module, adapter: Adapter) -> list[tuple[str, nn.Module]]:
    """Return (path, block), list after list."""
    lists = {path: cast(nn.ModuleList, model.get_submodule(path)) for path in adapter.blocks}
    return [(f"{path}.{index}", block) for path, listed in lists.items() for index, block in enumerate(listed)]


def layers(model: nn.Module, adapter: Adapter) -> list[Layer]:
    """Return every linear that may be quantized, those of blocks first, with its role; last a text encoder's table of words."""
    inside, outside = [], []
    prefixes = tuple(f"{path}." for path, _ in blocks(model, adapter))
    table = _table(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not any(fnmatchcase(name, pattern) for pattern in adapter.skip):
            if table is not None and module.weight is table.weight:
                continue  # the head of a language model that has one weight for both
            prefix = next((p for p in prefixes if name.startswith(p)), None)
            role = "outside" if prefix is None else _role(adapter, name[len(prefix) :])
            layer = Layer(name, role, module.out_features, module.in_features)
            (outside if prefix is None else inside).append(layer)
    named = [(name, module) for name, module in model.named_modules() if module is table and isinstance(module, nn.Embedding)]
    return inside + outside + [Layer(name, "words", words.num_embeddings, words.embedding_dim) for name, words in named]


def tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """Return by path the modules that look words up in a text encoder's table: T5 has two of one table."""
    table = _table(model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return {} if table is None else {name: module for name, module in found.items() if module.weight is table.weight}


def _table(model: Any) -> nn.Embedding | None:
    """Return the table of words of a model of transformers."""
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return table if isinstance(table, nn.Embedding) else None


def _role(adapter: Adapter, path: str) -> str:
    return next((role for pattern, role in adapter.roles if fnmatchcase(path, pattern)), "other")

"""ComfyUI export: one safetensors file whose layers are in formats that ComfyUI publishes, exactly or not at all.

Each quantized layer has its weight, its scales, and `comfy_quant`, a uint8 tensor of JSON (ComfyUI, comfy/ops.py, quant_ops.py;
comfy-kitchen, tensor/int8.py, w4a8_int8.py, both as of August 2026). `h` is ConvRot's regular Hadamard matrix in blocks.

    int8_tensorwise   weight int8 [out, in], weight_scale f32 [out, 1];  W h = scale weight   (h only with "convrot")
    asym_w4a8_int8    weight int8 [out, in/2], two codes a byte, the even column in the low bits; weight_codebook f32 [16],
                      weight_s_rel e4m3 [out, in/16], weight_s_channel f32 [out];
                      W h = s_channel round(s_rel codebook[weight])

Both quantize each token to int8 by its largest magnitude; "full_precision_matrix_mult" leaves activations alone. Every format of
ours that decodes to int8 is the first of these without loss, at 8 bits a weight; a symmetric table of 4 bits is the second.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from quantdit.checkpoints import checkpoint
from quantdit.layers.quant_linear import QuantLinear
from quantdit.system import files
from quantdit.tensors import hadamard
from quantdit.tensors.layer_spec import ActivationSpec, decodes_to_fp8

GROUP = 16  # columns that share an entry of weight_s_rel
BLOCKS = (16, 64)  # of ours, those that comfy-kitchen's kernels rotate by
ACTIVATIONS = (ActivationSpec(16), ActivationSpec(8))

# Class in diffusers -> (pattern, replacement) from its names to the original ones, which ComfyUI reads. The first that fits.
NAMES = {
    "WanTransformer3DModel": (
        (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
        (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
        (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
        (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
        (r"condition_embedder\.time_proj", "time_projection.1"),
        (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
        (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
        (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
        (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
        (r"(blocks\.\d+)\.attn1\.to_(q|k|v)", r"\1.self_attn.\2"),
        (r"(blocks\.\d+)\.attn2\.to_(q|k|v)", r"\1.cross_attn.\2"),
        (r"(blocks\.\d+)\.attn1\.to_out\.0", r"\1.self_attn.o"),
        (r"(blocks\.\d+)\.attn2\.to_out\.0", r"\1.cross_attn.o"),
        (r"(blocks\.\d+)\.attn1\.norm_(q|k)", r"\1.self_attn.norm_\2"),
        (r"(blocks\.\d+)\.attn2\.norm_(q|k)", r"\1.cross_attn.norm_\2"),
        (r"(blocks\.\d+)\.attn2\.add_(k|v)_proj", r"\1.cross_attn.\2_img"),
        (r"(blocks\.\d+)\.attn2\.norm_added_k", r"\1.cross_attn.norm_k_img"),
        (r"(blocks\.\d+)\.ffn\.net\.0\.proj", r"\1.ffn.0"),
        (r"(blocks\.\d+)\.ffn\.net\.2", r"\1.ffn.2"),
        (r"(blocks\.\d+)\.norm2", r"\1.norm3"),
        (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
        (r"scale_shift_table", "head.modulation"),
        (r"proj_out", "head.head"),
        (r"patch_embedding", "patch_embedding"),
    ),
}


def to_comfyui(folder: Path, output: Path, accept_config: bool = False) -> dict[str, int]:
    """Write the transformer of a quantized pipeline folder as one file for ComfyUI; returns the number of layers by format.

    `accept_config`: as `checkpoint.read_transformer` takes it.

    Raises:
        ValueError: `folder` is no quantdit checkpoint (CheckpointError), its class's names in ComfyUI are not known, a layer is
            not expressible in ComfyUI's formats, or `output` is there already or does not end in .safetensors.
        OSError: the output cannot be written.
    """
    if output.suffix != ".safetensors" or output.exists():
        raise ValueError(f"output {output} exists, or does not end in .safetensors; ComfyUI takes one file, choose its name")
    source = folder if (folder / "config.json").exists() else folder / "transformer"
    model = checkpoint.read_transformer(source, accept_config=accept_config)
    layers = checkpoint.quant_layers(model)
    original = _names(model)
    if dropped := checkpoint.describe_switches(model):
        what = " and ".join({"attention": "8-bit attention", "step_plan": "a step plan"}[key] for key in dropped)
        warnings.warn(
            files.Advice(f"ComfyUI has no {what}: its file computes every step, and attention in 16 bits"), stacklevel=2
        )
    tensors, counts = {}, {}
    for name, layer in layers.items():
        made, marker = express(name, layer)
        counts[marker["format"]] = counts.get(marker["format"], 0) + 1
        place = original[f"{name}.weight"].removesuffix(".weight")
        tensors |= {f"{place}.{key}": tensor for key, tensor in made.items()}
        tensors[f"{place}.comfy_quant"] = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
    own = checkpoint.own_keys(model)
    for key, tensor in model.state_dict().items():
        if key not in own:
            tensors[original[key]] = files.narrowest(tensor)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.part")
    try:
        save_file(tensors, part, {"format": "pt"})
        part.chmod(0o644)
        files.fsync(part)
        os.replace(part, output)
    except SafetensorError as error:  # which is no OSError, whatever the system said
        raise OSError(f"cannot write {output}: {error}; free some space or choose another output") from error
    finally:
        part.unlink(missing_ok=True)
    return counts


def express(name: str, layer: QuantLinear) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return a layer's tensors by ComfyUI's names but for its bias, and what `comfy_quant` says of them.

    Raises:
        ValueError: ComfyUI has no format for it.
    """
    _check(name, layer)
    spec = layer.layer_spec
    marker: dict[str, object] = {"full_precision_matrix_mult": True} if spec.activation.bits == 16 else {}
    q, block = layer.qtensor, spec.block
    integers = q.decode8()
    if block == 1:
        return {"weight": integers, "weight_scale": q.scale[:, None]}, {"format": "int8_tensorwise", **marker}
    column, sign = _to_regular(block)
    if bool((integers == -128).any()):
        raise ValueError(f"layer {name}: its codes reach -128, which ComfyUI's rotation would negate; use a table or int8")
    moved = integers.unflatten(1, (-1, block))[:, :, column] * sign
    moved = moved.flatten(1).contiguous()
    marker["convrot_groupsize"] = block
    shared = spec.weight.format == "table4" and spec.weight.codebook_rows == 1
    table = q.codebook[0] if shared and q.codebook is not None else None
    if table is not None and set(table.tolist()) == set((-table).tolist()) and not layer.in_features % GROUP:
        levels = table.sort().values
        codes = torch.searchsorted(levels.int(), moved.int()).to(torch.uint8)
        made = {
            "weight": (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8).contiguous(),
            "weight_codebook": levels.float(),
            "weight_s_rel": torch.ones(layer.out_features, layer.in_features // GROUP).to(torch.float8_e4m3fn),
            "weight_s_channel": q.scale,
        }
        return made, {"format": "asym_w4a8_int8", "group_size": GROUP, **marker}
    made = {"weight": moved, "weight_scale": q.scale[:, None]}
    return made, {"format": "int8_tensorwise", "convrot": True, **marker}


def _check(name: str, layer: QuantLinear) -> None:
    spec = layer.layer_spec
    regular = spec.rotation == "hadamard" and not spec.smoothed and spec.block in BLOCKS
    if regular:
        signs, expected = layer.transform.premultiplier, hadamard.regular_sign(layer.in_features, spec.block)
        regular = signs is not None and torch.equal(signs, expected.to(signs.device))
    reasons = (
        (spec.activation.edge_bits > 0, f"activations {spec.activation}", "edge_steps = 0"),
        (spec.rank > 0, "a low-rank branch", "low_rank = 0"),
        (spec.smoothed, "smoothed inputs", 'smooth = "none"'),
        (spec.rotation != "none" and not regular, f"the rotation {spec.rotation!r}", 'rotation = "regular" or "none"'),
        (spec.activation not in ACTIVATIONS, f"activations {spec.activation}", "activation_bits = 8 or 16, dynamic, per token"),
        (decodes_to_fp8(spec.weight.format), f"the format {spec.weight.format}", "a weight that decodes to int8"),
    )
    for is_there, what, remedy in reasons:
        if is_there:
            raise ValueError(f"layer {name} has {what}, which ComfyUI's formats do not express; calibrate with {remedy}")


def _to_regular(block: int) -> tuple[Tensor, Tensor]:
    """Return column `[b]` int64 and sign `[b]` int8: `(W diag(s) H)[:, column] * sign = W h` for `hadamard.regular_sign` s."""
    sign = hadamard.regular_sign(block, block).double()
    change = hadamard.hadamard(block, torch.float64) @ (sign[:, None] * hadamard.regular(block))
    column = change.abs().argmax(dim=0)
    return column, change[column, torch.arange(block)].round().to(torch.int8)


def _names(model: nn.Module) -> dict[str, str]:
    """Return the original name of each tensor of the full-precision model's state dict."""
    rules = NAMES.get(type(model).__name__)
    if rules is None:
        raise ValueError(
            f"the names of {type(model).__name__} in ComfyUI are not known to quantdit; known: {', '.join(NAMES)}."
            " --to dense writes a folder that any converter takes"
        )
    found = {}
    weights = [f"{name}.weight" for name in checkpoint.quant_layers(model)]
    for key in (*model.state_dict(), *weights):
        for pattern, replacement in rules:
            renamed, count = re.subn(rf"^{pattern}(?=\.|$)", replacement, key)
            if count:
                found[key] = renamed
                break
    dense = [key for key in model.state_dict() if key not in checkpoint.own_keys(model)]
    if missing := [key for key in (*dense, *weights) if key not in found]:
        raise ValueError(f"tensor {missing[0]} has no name in ComfyUI that quantdit knows; --to dense writes every model")
    return found

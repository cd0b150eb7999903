"""The peers' rows: other packages quantize `fashion-dit` through their own code, in environments of their own.

`python reports/study/peers.py sdnq --output WORK/sdnq` runs every configuration of a peer, each in a process of its own, and
leaves one safetensors file a row: the images, and the facts of the row as metadata. `measure.py` turns these into `peers.jsonl`.
With `--model FOLDER` it is another model of the same pipeline, such as one that `reports/robust.py` planted outliers in.

Every peer quantizes the linears inside the blocks. Where the package can mix, the modulation and embedder linears get
max(X, 4) bits, weight only ("aligned"); quantdit's presets give them X bits, and so do the rows marked "all". Where the package
cannot mix, the note says what they get instead.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

# PYTHONSAFEPATH, which the Makefile sets, keeps the folder of a script off the path.
sys.path.append(str(Path(__file__).parent))
import measure
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline

# What calibrates where a package can be calibrated: as much as quantdit's own default takes.
CALIBRATION_IMAGES, CALIBRATION_SEED = 32, 0

# Switched off: compilation of single layers (minutes, same numbers) and kernels fetched from the network at first use.
ENVIRONMENT = {"SDNQ_USE_TORCH_COMPILE": "0", "ORBITQUANT_KERNELS_AUTOFETCH": "0", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Model:
    """The model to quantize in place: `main` and `side` linears by path, together all those inside the blocks."""

    pipeline: object
    main: list[str]
    side: list[str]

    @property
    def transformer(self) -> nn.Module:
        """Return the pipeline's transformer."""
        return self.pipeline.transformer

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a module where the linear of this path is."""
        parent, _, child = name.rpartition(".")
        setattr(self.transformer.get_submodule(parent), child, module)

    def stored(self) -> list[Tensor]:
        """Return what the state dict holds of the quantized layers, biases left out."""
        states = [self.transformer.get_submodule(name).state_dict() for name in self.main + self.side]
        return [t for state in states for key, t in state.items() if key != "bias" and isinstance(t, Tensor)]

    def calibrate(self) -> None:
        """Run the model on calibration data; what listens, listens."""
        steps, guidance = measure.STEPS, measure.GUIDANCE
        generate(self.pipeline, CALIBRATION_IMAGES, CALIBRATION_SEED, steps, guidance, description="calibrate")


@dataclass(frozen=True)
class Configuration:
    """One row: the method, bits as `w4a8`, the group size asked for, and the options of the peer's function."""

    method: str
    bits: str
    group_size: int | str | None
    options: dict = field(default_factory=dict)
    note: str = "aligned"

    @property
    def name(self) -> str:
        """Return what names the row within its peer."""
        return f"{self.bits} {self.method}"


@dataclass(frozen=True)
class Peer:
    """A package: what to install, the function that quantizes with it, its rows in the order of their importance."""

    package: str
    pins: tuple[str, ...]
    quantize: Callable[..., list[Tensor]]
    configurations: tuple[Configuration, ...]


# One function a peer: it quantizes the model in place and returns the tensors that its file would hold.


def sdnq(model: Model, weights: str, side: str = "uint4", openvino: bool = False, **options) -> list[Tensor]:
    """SDNQ in one call; the side linears get a type of their own, and no quantized activations."""
    from sdnq import SDNQConfig, kernel_wrappers
    from sdnq.quantizer import sdnq_post_load_quant

    if not openvino:
        # Its int8 product is OpenVINO's, which saturates on a CPU without VNNI, else torch._int_mm, there a scalar loop.
        kernel_wrappers.int_mm_func = _exact_product

    side_weights = [f"{name}.weight" for name in model.side]
    config = SDNQConfig(
        weights_dtype=weights,
        add_skip_keys=False,
        minimum_allowed_numel=0,
        modules_to_not_convert=["proj_out_1", "proj_out_2"],
        modules_to_not_use_matmul=side_weights,
        modules_dtype_dict={} if side == weights else {side: side_weights},
        **options,
    )
    sdnq_post_load_quant(model.transformer, quantization_config=config)
    return model.stored()


def _exact_product(a: Tensor, b: Tensor, out_dtype: torch.dtype = torch.int32) -> Tensor:
    """Return the product of int8 matrices; in float32 it is exact up to 1040 terms, since 1040 * 127^2 < 2^24."""
    return (a.float() @ b.float()).to(out_dtype)


def orbitquant(model: Model, weights: int, activations: int, gptq: str = "", interior: bool = False) -> list[Tensor]:
    """OrbitQuant; its policy never touches embedders, so these are given to its INT4 class for modulation directly."""
    from orbitquant.adaln import RTNInt4Linear
    from orbitquant.config import OrbitQuantConfig
    from orbitquant.gptq import load_rounded_codes
    from orbitquant.modeling import quantize_model

    config = OrbitQuantConfig(
        weight_bits=weights,
        # With activations left alone the table is not used; 8 bits would take minutes to compute it.
        activation_bits=4 if activations == 16 else activations,
        runtime_mode="debug_no_activation_quant" if activations == 16 else "auto_fused",
        modules_to_convert=model.main,
        modules_to_use_adaln=model.side,
        lowbit_boundary_protection=0,
        lowbit_interior_protection=interior,
    )
    codes = _orbitquant_codes(model, config, gptq) if gptq else {}
    quantize_model(model.transformer, config)
    load_rounded_codes(model.transformer, codes)
    for name in model.side:
        layer = model.transformer.get_submodule(name)
        if isinstance(layer, nn.Linear):
            model.replace(name, RTNInt4Linear.from_linear(layer, config=config, module_name=name))
    return model.stored()


def _orbitquant_codes(model: Model, config, gptq: str) -> dict:
    """Return GPTQ's codes; `sequential` calibrates a block on the rounded blocks before it, then restores the weights."""
    from orbitquant.gptq import HessianCollector, round_groups

    blocks: dict[str, list[list[str]]] = {}
    for name in model.main:
        groups = blocks.setdefault(".".join(name.split(".")[:2]), [])
        if name.endswith(("to_k", "to_v")):
            groups[-1].append(name)  # to_q, to_k and to_v read the same input
        else:
            groups.append([name])
    original = {name: model.transformer.get_submodule(name).weight.detach().clone() for name in model.main}
    parts = list(blocks.values()) if gptq == "sequential" else [[group for groups in blocks.values() for group in groups]]
    codes = {}
    for groups in parts:
        with HessianCollector(model.transformer, groups, config) as hessians:
            model.calibrate()
        codes |= round_groups(model.transformer, groups, hessians, config, sequential=gptq == "sequential")
    for name, weight in original.items():
        model.transformer.get_submodule(name).weight.data = weight
    return codes


def torchao(model: Model, config: str, side: str, options: dict, side_options: dict) -> list[Tensor]:
    """Torchao: two calls, one for each of the two sets of linears."""
    from torchao.quantization import quantize_

    for names, kind, arguments in ((model.main, config, options), (model.side, side, side_options)):
        chosen = set(names)
        quantize_(model.transformer, _torchao_config(kind, arguments), lambda m, name, chosen=chosen: name in chosen)
    for name in model.main + model.side:
        if type(model.transformer.get_submodule(name).weight.data) is Tensor:
            raise ValueError(f"torchao left {name} as it was")
    return model.stored()


def _torchao_config(kind: str, options: dict):
    """Return the config of this class, its group size and enumerations made from numbers and words."""
    from torchao.quantization import PerAxis, PerGroup, quant_api
    from torchao.quantization.quant_primitives import MappingType

    arguments = dict(options)
    for key in ("granularity", "weight_granularity"):
        if key in arguments:
            arguments[key] = PerAxis(0) if arguments[key] == "channel" else PerGroup(arguments[key])
    for key in ("mapping_type", "weight_mapping_type"):
        if key in arguments:
            arguments[key] = MappingType[arguments[key]]
    if "weight_dtype" in arguments:
        arguments["weight_dtype"] = getattr(torch, arguments["weight_dtype"])
    for key in ("int4_choose_qparams_algorithm", "intx_choose_qparams_algorithm"):
        if key in arguments:
            arguments[key] = arguments[key].lower()
    module, _, name = kind.rpartition(".")
    found = importlib.import_module(f"torchao.{module}") if module else quant_api
    return getattr(found, name)(**arguments)


def quanto(
    model: Model, weights: str, side: str = "qint4", activations: str | None = None, optimizer: str | None = None
) -> list[Tensor]:
    """Optimum-quanto; it chooses group sizes by itself. Static activation scales come from its own calibration."""
    from optimum.quanto import Calibration, HqqOptimizer, freeze, quantize

    chosen = {"optimizer": HqqOptimizer()} if optimizer == "hqq" else {}
    quantize(model.transformer, weights=weights, activations=activations, include=model.main, **chosen)
    quantize(model.transformer, weights=side, include=model.side, **(chosen if side != "qint8" else {}))
    if activations is not None:
        with Calibration():
            model.calibrate()
    freeze(model.transformer)
    stored = []
    for name in model.main + model.side:
        state = model.transformer.get_submodule(name).state_dict()
        # Unused scales of activations are ones, and no part of a weight.
        stored += [t for key, t in state.items() if key not in ("bias", "input_scale", "output_scale")]
    return stored


def hqq(model: Model, bits: int, group_size: int, side_group_size: int | None = None) -> list[Tensor]:
    """HQQ, linear by linear, groups along the inputs; float32 like the model."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name in model.main + model.side:
        is_side = name in model.side
        config = BaseQuantizeConfig(
            nbits=max(bits, 4) if is_side else bits, group_size=(is_side and side_group_size) or group_size, axis=1
        )
        layer = HQQLinear(model.transformer.get_submodule(name), config, compute_dtype=torch.float32, device="cpu")
        model.replace(name, layer)
    layers = [model.transformer.get_submodule(name) for name in model.main + model.side]
    return [t for layer in layers for t in (layer.W_q, layer.meta["scale"], layer.meta["zero"])]


def bitsandbytes(model: Model, kind: str, double: bool, blocksize: int = 64) -> list[Tensor]:
    """Bitsandbytes' 4-bit linears on the CPU; `double` quantizes the absmax of the blocks to 8 bits again."""
    import bitsandbytes as bnb

    stored = []
    for name in model.main + model.side:
        linear = model.transformer.get_submodule(name)
        if kind == "int8":
            layer = _bitsandbytes_int8(linear)
            model.replace(name, layer)
            stored += [layer.weight.data, layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB]
            continue
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, compute_dtype=torch.float32, compress_statistics=double, quant_type=kind
        )
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=double, quant_type=kind, blocksize=blocksize
        )
        layer.bias = linear.bias
        layer = layer.to("cpu")
        if layer.weight.quant_state is None:
            raise ValueError("bitsandbytes left the weight unquantized on the CPU")
        model.replace(name, layer)
        packed = layer.weight.quant_state.as_dict(packed=True)
        # The map of the 16 levels is one of the whole model; the packed state repeats it in every layer.
        stored += [layer.weight.data, *(t for key, t in packed.items() if isinstance(t, Tensor) and "quant_map" not in key)]
    return stored


def _bitsandbytes_int8(linear: nn.Linear) -> nn.Module:
    """Return LLM.int8 without outlier columns: int8 weights per channel, int8 activations per token."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, threshold=0.0)
    layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer.to("cpu")


def auto_round(model: Model, bits: int, group_size: int, side_bits: int = 4) -> list[Tensor]:
    """AutoRound, block after block by the call it offers to other compilers, each on inputs from quantized blocks before it.

    Its own command for diffusion models wants a text prompt and a hub's data set. 200 steps, its default, on 512 samples.
    """
    from auto_round import AutoRound
    from auto_round.export.export_to_autoround.export import pack_layer
    from auto_round.schemes import QuantizationScheme

    stored = []
    for path, block in (pair for pair in model.transformer.named_modules() if pair[0].count(".") == 1 and "blocks" in pair[0]):
        wrapper = _AutoRoundBlock(block, model.transformer.config)
        side = [name.replace(path, "layers.0") for name in model.side if name.startswith(path)]
        tuner = AutoRound(
            wrapper,
            tokenizer="none",  # asked for, never used: the samples are given
            scheme=QuantizationScheme(bits=bits, group_size=group_size, sym=False, data_type="int"),
            layer_config={name: {"bits": side_bits, "group_size": max(group_size, 64)} for name in side},
            device_map="cpu",
            amp=False,
            enable_torch_compile=False,
        )
        tuner.post_init()
        tuner.quantize_block(block, _block_samples(model, block), device="cpu", auto_offload=False)
        # What it would save, from a copy: the layers that run here hold the decoded weights.
        packed = copy.deepcopy(wrapper)
        for name, layer in list(packed.named_modules()):
            if isinstance(layer, nn.Linear):
                pack_layer(name, packed, "auto_round:auto_gptq")
                state = packed.get_submodule(name).state_dict()
                stored += [t for key, t in state.items() if key not in ("bias", "g_idx")]
    return stored


class _AutoRoundBlock(nn.Module):
    """One block in the shape of a language model."""

    dtype = torch.float32

    def __init__(self, block: nn.Module, config: object) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])
        self.config = config


def _block_samples(model: Model, block: nn.Module, count: int = 512) -> list:
    """Return `count` single-image inputs of the block, drawn from the whole calibration run."""
    calls: list[tuple[tuple, dict]] = []
    handle = block.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    model.calibrate()
    handle.remove()

    def one(value: object, i: int) -> object:
        return value[i : i + 1].clone() if isinstance(value, Tensor) else value

    places = [(call, i) for call, (args, _) in enumerate(calls) for i in range(len(args[0]))]
    chosen = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:count].tolist()
    samples = []
    for call, i in (places[c] for c in chosen):
        args, kwargs = calls[call]
        samples.append(((tuple(one(v, i) for v in args), {k: one(v, i) for k, v in kwargs.items()}),))
    return samples


ALL = "the modulation and embedder linears at X bits too"
U8 = {"scale_dtype": "uint8"}
INTX = "IntxWeightOnlyConfig"
DYNAMIC = "Int8DynamicActivationIntxWeightConfig"
OPAQUE = "prototype.quantization.int4.PrototypeInt4WeightOnlyConfig"
DA8W4 = "prototype.quantization.int4.Int8DynamicActivationInt4WeightConfig"
INT8 = {"config": "Int8DynamicActivationInt8WeightConfig", "options": {}, "side": "Int8WeightOnlyConfig", "side_options": {}}
FLOAT32_SCALE = "aligned; scale and zero point in float32, as in a bfloat16 model (dequantize_fp32, the default)"
EXACT = "aligned; scales in 8 bits; its int8 product done exactly in float32, as its own do not work on a CPU without VNNI"
EXACT_FLOAT = "aligned; scales in float32; its int8 product done exactly in float32, as its own do not work on a CPU without VNNI"
SATURATES = "aligned; scales in 8 bits; OpenVINO's int8 product as SDNQ calls it: wrong on a CPU without VNNI, where it saturates"
HADAMARD_MATMUL = {"use_quantized_matmul": True, "use_hadamard": True}
SVD = "aligned; scales in 8 bits, low-rank factors in the model's dtype, here float32"
ORBIT_SIDE = (
    "aligned: side linears by its RTNInt4Linear, which computes in bfloat16; rotation and level tables are made from seed and"
    " width, not stored; seconds without the tables, which it computes once per width and keeps on disk (8 bits: minutes)"
)
ORBIT_A16 = f"{ORBIT_SIDE}; activations left alone by runtime_mode debug_no_activation_quant"
HQQ_NOTE = "aligned; scale and zero point in the compute dtype, here float32 like the model"
HQQ_LONG = f"{HQQ_NOTE}; groups of this length run across the rows of a weight"
QUANTO_NOTE = "aligned; it takes groups of 96 where 128 does not divide; scale and shift in the model's dtype, here float32"
QUANTO_A8 = f"{QUANTO_NOTE}; one static scale per activation, from its own calibration, and outputs quantized as well"
OPAQUE_NOTE = "aligned; scale and zero point in the model's dtype, here float32"
BNB_INT8 = "side linears int8 as well; without AVX-512 it multiplies in floating point, and leaves activations alone"
ROUND_NOTE = "aligned; asymmetric, packed as auto_gptq: float16 scales; driven block by block through quantize_block"
ROUND_ALL = ROUND_NOTE.replace("aligned", ALL)


def _sdnq(method: str, bits: str, group: int | str, weights: str, note: str = "aligned; scales in 8 bits", **options):
    group_size = {"auto": 0, "channel": -1}.get(group, group)
    return Configuration(method, bits, group, {"weights": weights, "group_size": group_size, **options}, note)


def _intx(
    method: str, bits: str, group: int | str, dtype: str, mapping: str, side: str = "int4", dynamic: bool = False, **options
):
    """Torchao's any-width weights; the side linears the same way, weight only."""
    weight = {"weight_dtype": dtype, "weight_granularity" if dynamic else "granularity": group}
    weight["weight_mapping_type" if dynamic else "mapping_type"] = mapping
    arguments = {
        "config": DYNAMIC if dynamic else INTX,
        "options": weight | options,
        "side": INTX,
        "side_options": {"weight_dtype": "int4", "granularity": group, "mapping_type": mapping} | options,
    }
    note = "aligned; stores a code of any width in a byte, scales in float32 like the model"
    return Configuration(method, bits, group, arguments, note)


def _both(kind: str, options: dict) -> dict:
    return {"config": kind, "options": options, "side": kind, "side_options": options}


def _opaque(group: int, algorithm: str) -> dict:
    return _both(OPAQUE, {"group_size": group, "int4_choose_qparams_algorithm": algorithm})


def _side(options: dict) -> dict:
    return {key: options[key] for key in ("side", "side_options")}


PEERS: dict[str, Peer] = {
    "orbitquant": Peer(
        "orbitquant",
        ("orbitquant[hf]==0.15.0",),
        orbitquant,
        (
            Configuration("nearest", "w4a8", "channel", {"weights": 4, "activations": 8}, ORBIT_SIDE),
            Configuration("gptq", "w4a8", "channel", {"weights": 4, "activations": 8, "gptq": "at once"}, ORBIT_SIDE),
            Configuration("nearest", "w4a16", "channel", {"weights": 4, "activations": 16}, ORBIT_A16),
            Configuration("gptq", "w4a16", "channel", {"weights": 4, "activations": 16, "gptq": "at once"}, ORBIT_A16),
            Configuration("gptq", "w3a16", "channel", {"weights": 3, "activations": 16, "gptq": "at once"}, ORBIT_A16),
            Configuration("gptq", "w2a16", "channel", {"weights": 2, "activations": 16, "gptq": "at once"}, ORBIT_A16),
            Configuration("gptq", "w3a8", "channel", {"weights": 3, "activations": 8, "gptq": "at once"}, ORBIT_SIDE),
            Configuration("nearest", "w4a4", "channel", {"weights": 4, "activations": 4}, ORBIT_SIDE),
            Configuration("nearest", "w3a16", "channel", {"weights": 3, "activations": 16}, ORBIT_A16),
            Configuration("nearest", "w2a16", "channel", {"weights": 2, "activations": 16}, ORBIT_A16),
            Configuration("nearest", "w3a8", "channel", {"weights": 3, "activations": 8}, ORBIT_SIDE),
            Configuration(
                "gptq sequential", "w4a8", "channel", {"weights": 4, "activations": 8, "gptq": "sequential"}, ORBIT_SIDE
            ),
            Configuration("gptq", "w4a4", "channel", {"weights": 4, "activations": 4, "gptq": "at once"}, ORBIT_SIDE),
            Configuration(
                "nearest, interior",
                "w2a16",
                "channel",
                {"weights": 2, "activations": 16, "interior": True},
                f"{ORBIT_A16}; its rule for 2 bits: queries and keys 2 bits, the other main linears 3",
            ),
            Configuration("nearest", "w8a8", "channel", {"weights": 8, "activations": 8}, ORBIT_SIDE + ", at 4 bits"),
        ),
    ),
    "sdnq": Peer(
        "sdnq",
        ("sdnq==0.2.8", "openvino==2026.4.1"),
        sdnq,
        (
            _sdnq("uint4 g64 u8", "w4a16", 64, "uint4", **U8),
            _sdnq("uint4 g64 u8 matmul", "w4a8", 64, "uint4", EXACT, use_quantized_matmul=True, **U8),
            _sdnq("uint4 g64 u8 matmul hadamard", "w4a8", 64, "uint4", EXACT, **HADAMARD_MATMUL, **U8),
            _sdnq("uint4 g64 u8 openvino hadamard", "w4a8", 64, "uint4", SATURATES, openvino=True, **HADAMARD_MATMUL, **U8),
            _sdnq("uint4 g64 u8 hadamard", "w4a16", 64, "uint4", use_hadamard=True, **U8),
            _sdnq("uint3 g64 u8 hadamard", "w3a16", 64, "uint3", use_hadamard=True, **U8),
            _sdnq("uint2 g32 u8 hadamard", "w2a16", 32, "uint2", use_hadamard=True, **U8),
            _sdnq("uint2 g64 u8 hadamard, all", "w2a16", 64, "uint2", ALL, side="uint2", use_hadamard=True, **U8),
            _sdnq("uint3 g64 u8 hadamard, all", "w3a16", 64, "uint3", ALL, side="uint3", use_hadamard=True, **U8),
            _sdnq("uint4 codebook u8", "w4a16", "auto", "uint4", use_codebook=True, **U8),
            _sdnq("uint4 g32 u8", "w4a16", 32, "uint4", **U8),
            _sdnq("uint4 g32 u8 matmul hadamard", "w4a8", 32, "uint4", EXACT, **HADAMARD_MATMUL, **U8),
            _sdnq("uint4 default", "w4a16", "auto", "uint4", FLOAT32_SCALE),
            _sdnq("uint3 g32 u8", "w3a16", 32, "uint3", **U8),
            _sdnq("uint3 g32 u8 hadamard", "w3a16", 32, "uint3", use_hadamard=True, **U8),
            _sdnq("uint2 g16 u8", "w2a16", 16, "uint2", **U8),
            _sdnq("uint2 g16 u8 hadamard", "w2a16", 16, "uint2", use_hadamard=True, **U8),
            _sdnq("uint3 g64 u8 matmul hadamard", "w3a8", 64, "uint3", EXACT, **HADAMARD_MATMUL, **U8),
            _sdnq("uint4 g96 u8 hadamard", "w4a16", 96, "uint4", use_hadamard=True, **U8),
            _sdnq("uint4 codebook u8 hadamard", "w4a16", "auto", "uint4", use_codebook=True, use_hadamard=True, **U8),
            _sdnq("uint2 codebook u8 hadamard", "w2a16", "auto", "uint2", use_codebook=True, use_hadamard=True, **U8),
            _sdnq("uint3 codebook u8 hadamard", "w3a16", "auto", "uint3", use_codebook=True, use_hadamard=True, **U8),
            _sdnq("uint4 g64 u8 svd 4", "w4a16", 64, "uint4", SVD, use_svd=True, svd_rank=4, **U8),
            _sdnq("uint4 g64 u8 svd 32", "w4a16", 64, "uint4", SVD, use_svd=True, **U8),
            _sdnq("int8 matmul", "w8a8", "auto", "int8", EXACT_FLOAT, side="int8", use_quantized_matmul=True),
            _sdnq("uint3 g64 u8", "w3a16", 64, "uint3", **U8),
            _sdnq("uint2 g32 u8", "w2a16", 32, "uint2", **U8),
            _sdnq("uint3 default", "w3a16", "auto", "uint3", FLOAT32_SCALE),
            _sdnq("uint2 default", "w2a16", "auto", "uint2", FLOAT32_SCALE),
            _sdnq("uint4 default matmul", "w4a8", "auto", "uint4", EXACT_FLOAT, use_quantized_matmul=True),
        ),
    ),
    "hqq": Peer(
        "hqq",
        ("hqq==0.2.8.post1",),
        hqq,
        (
            Configuration("g64", "w4a16", 64, {"bits": 4, "group_size": 64}, HQQ_NOTE),
            Configuration("g256", "w4a16", 256, {"bits": 4, "group_size": 256}, HQQ_LONG),
            Configuration("g64", "w3a16", 64, {"bits": 3, "group_size": 64}, HQQ_NOTE),
            Configuration("g32", "w2a16", 32, {"bits": 2, "group_size": 32, "side_group_size": 64}, HQQ_NOTE),
            Configuration("g128", "w4a16", 128, {"bits": 4, "group_size": 128}, HQQ_LONG),
            Configuration("g64", "w2a16", 64, {"bits": 2, "group_size": 64}, HQQ_NOTE),
        ),
    ),
    "quanto": Peer(
        "optimum-quanto",
        ("optimum-quanto==0.2.7",),
        quanto,
        (
            Configuration("qint4", "w4a16", "auto", {"weights": "qint4"}, QUANTO_NOTE),
            Configuration("qint4 hqq", "w4a16", "auto", {"weights": "qint4", "optimizer": "hqq"}, QUANTO_NOTE),
            Configuration("qint2 hqq", "w2a16", "auto", {"weights": "qint2", "optimizer": "hqq"}, QUANTO_NOTE),
            Configuration("qint4 a8", "w4a8", "auto", {"weights": "qint4", "activations": "qint8"}, QUANTO_A8),
            Configuration("qint2", "w2a16", "auto", {"weights": "qint2"}, QUANTO_NOTE),
            Configuration("qint8", "w8a16", "channel", {"weights": "qint8", "side": "qint8"}, QUANTO_NOTE),
            Configuration(
                "qint8 a8", "w8a8", "channel", {"weights": "qint8", "side": "qint8", "activations": "qint8"}, QUANTO_A8
            ),
        ),
    ),
    "bitsandbytes": Peer(
        "bitsandbytes",
        ("bitsandbytes==0.50.2",),
        bitsandbytes,
        (
            Configuration("nf4 double", "w4a16", 64, {"kind": "nf4", "double": True}),
            Configuration("nf4", "w4a16", 64, {"kind": "nf4", "double": False}),
            Configuration("fp4 double", "w4a16", 64, {"kind": "fp4", "double": True}),
            Configuration("int8", "w8a16", "channel", {"kind": "int8", "double": False}, BNB_INT8),
        ),
    ),
    "torchao": Peer(
        "torchao",
        ("torchao==0.18.0",),
        torchao,
        (
            Configuration("int4 g64 hqq", "w4a16", 64, _opaque(64, "HQQ"), OPAQUE_NOTE),
            Configuration("int4 g32 hqq", "w4a16", 32, _opaque(32, "HQQ"), OPAQUE_NOTE),
            Configuration("int4 g64 tinygemm", "w4a16", 64, _opaque(64, "TINYGEMM"), OPAQUE_NOTE),
            _intx("int8 dynamic, int4 g64", "w4a8", 64, "int4", "ASYMMETRIC", dynamic=True),
            _intx("intx int3 g32", "w3a16", 32, "int3", "ASYMMETRIC"),
            _intx("intx int2 g32", "w2a16", 32, "int2", "ASYMMETRIC"),
            _intx("intx int4 g64 symmetric", "w4a16", 64, "int4", "SYMMETRIC"),
            _intx("intx int3 g32 hqq", "w3a16", 32, "int3", "ASYMMETRIC", intx_choose_qparams_algorithm="HQQ_SCALE_ONLY"),
            _intx("intx int4 g32", "w4a16", 32, "int4", "ASYMMETRIC"),
            Configuration("int8 dynamic", "w8a8", "channel", INT8, "side linears int8, weight only"),
            Configuration("int4 weight only, plain", "w4a16", 64, _both("Int4WeightOnlyConfig", {"group_size": 64})),
            Configuration("da8w4 cpu", "w4a8", 64, {**_both(DA8W4, {"group_size": 64}), **_side(_opaque(64, "TINYGEMM"))}),
        ),
    ),
    "auto-round": Peer(
        "auto-round",
        ("auto-round==0.16.1",),
        auto_round,
        (
            Configuration("g64", "w4a16", 64, {"bits": 4, "group_size": 64}, ROUND_NOTE),
            Configuration("g64", "w3a16", 64, {"bits": 3, "group_size": 64}, ROUND_NOTE),
            Configuration("g32", "w2a16", 32, {"bits": 2, "group_size": 32}, ROUND_NOTE),
            Configuration("g32", "w4a16", 32, {"bits": 4, "group_size": 32}, ROUND_NOTE),
            Configuration("g96, all", "w2a16", 96, {"bits": 2, "group_size": 96, "side_bits": 2}, ROUND_ALL),
            Configuration("g96, all", "w3a16", 96, {"bits": 3, "group_size": 96, "side_bits": 3}, ROUND_ALL),
        ),
    ),
}


def run(peer: Peer, configuration: Configuration, work: Path, model: str = measure.MODEL) -> tuple[dict, dict[str, Tensor]]:
    """Return the facts of a row and its images; a row that fails says why and has none."""
    facts = _facts(peer, configuration, model)
    try:
        torch.manual_seed(0)
        pipeline, _ = load_pipeline(model)
        names, side = measure.quantized_linears(pipeline.transformer), measure.side_linears(pipeline.transformer)
        count = sum(pipeline.transformer.get_submodule(name).weight.numel() for name in names)
        began = time.perf_counter()
        stored = peer.quantize(Model(pipeline, [n for n in names if n not in side], side), **configuration.options)
        seconds = time.perf_counter() - began
        bits = measure.stored_bits(stored, count)
        error = measure.mean_rel_rmse(pipeline.transformer, work, model)
        if configuration.bits.endswith("a16"):
            decode(pipeline.transformer, measure.captured_inputs(work, model))
        with torch.no_grad():
            images = measure.sample(pipeline)
    except Exception as error:  # whatever a package raises is the row
        traceback.print_exc()
        return measure.row(**facts, error=_one_line(error)), {}
    return measure.row(**facts, bits_per_weight=bits, seconds=seconds, mean_rel_rmse=error), {"images": images}


def decode(transformer: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Replace weight-only layers by the dense linear that they compute, so that slow kernels cost no hours.

    The weight is the layer's own answer to the identity; it is taken only if it answers real inputs as the layer does.
    """
    for name, x in inputs.items():
        layer = transformer.get_submodule(name)
        dense = nn.Linear(x.shape[1], 1)
        with torch.no_grad():
            bias = layer(torch.zeros(1, x.shape[1])).float()
            dense.weight = nn.Parameter((layer(torch.eye(x.shape[1])).float() - bias).T.contiguous())
            dense.bias = nn.Parameter(bias[0])
            expected = layer(x[:64]).float()
            if (dense(x[:64]) - expected).norm() > 1e-5 * expected.norm():
                continue
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, dense)


def main() -> None:
    """Run a peer's configurations, each in a process of its own, so that a crash costs one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--output", type=Path, help="folder of the rows; finished ones that are there are kept")
    parser.add_argument("--only", help="the one configuration of this name, in this process")
    parser.add_argument("--match", nargs="+", default=["*"], help="configurations whose names match one of these shell patterns")
    parser.add_argument("--model", default=measure.MODEL, help="another model's folder; --work must be one of that model alone")
    parser.add_argument("--not-installed", action="store_true", help="leave rows that say so, for a peer that pip refused")
    parser.add_argument("--pins", action="store_true", help="print what to install, and end")
    parser.add_argument("--work", type=Path, default=measure.WORK, help="where layer inputs are kept")
    args = parser.parse_args()
    peer = PEERS[args.peer]
    if args.pins:
        print(*peer.pins, sep="\n")
        return
    if args.output is None:
        parser.error("--output is needed")
    if args.model != measure.MODEL and args.work == measure.WORK:
        parser.error("--model needs a --work of its own: the layer inputs kept there are of one model")
    for configuration in peer.configurations:
        path = args.output / f"{_slug(configuration.name)}.safetensors"
        if args.not_installed:
            facts = _facts(peer, configuration, args.model)
            _save(measure.row(**facts, error=f"pip could not install {' '.join(peer.pins)}"), {}, path)
        elif args.only == configuration.name:
            _save(*run(peer, configuration, args.work, args.model), path)
        elif args.only is None and any(fnmatchcase(configuration.name, m) for m in args.match) and not _finished(path):
            command = [sys.executable, __file__, args.peer, "--only", configuration.name, "--model", args.model]
            command += ["--output", str(args.output), "--work", str(args.work)]
            path.unlink(missing_ok=True)
            code = subprocess.run(command, env=ENVIRONMENT | os.environ, check=False).returncode
            if code and not path.exists():
                _save(
                    measure.row(**_facts(peer, configuration, args.model), error=f"the process ended with code {code}"), {}, path
                )


def _facts(peer: Peer, configuration: Configuration, model: str = measure.MODEL) -> dict:
    """Return what is known of a row before it is run."""
    other = "" if model == measure.MODEL else f" --model {Path(model).name}"
    key = next(key for key, value in PEERS.items() if value is peer)
    try:
        found = version(peer.package)
    except PackageNotFoundError:
        found = peer.pins[0].partition("==")[2]
    return {
        "package": peer.package,
        "version": found,
        "method": configuration.method,
        "bits": configuration.bits,
        "group_size": configuration.group_size,
        "command": f"python reports/study/peers.py {key} --only '{configuration.name}'{other} --output out/study/{key}",
        "note": configuration.note,
    }


def _finished(path: Path) -> bool:
    """Return whether a row is there and has images; a failed one is tried again."""
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return bool(file.keys())


def _save(row: dict, tensors: dict[str, Tensor], path: Path) -> None:
    # A file of safetensors needs no tensor, but its metadata are strings.
    measure.save(tensors, path, {"row": json.dumps(row)})
    print(f"{row['package']} {row['method']}: {row.get('error') or row['bits_per_weight']}", flush=True)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


if __name__ == "__main__":
    main()

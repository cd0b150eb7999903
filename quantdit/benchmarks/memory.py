"""Memory of whole pipelines, quantized or not, and which cards they fit: `quantdit bench memory --output FILE.jsonl`.

Every component (transformer, text encoders, VAE) is built on the meta device from its published config. What its quantized
layers store follows from the same recipes and LayerSpecs as in a calibration, so no weights are needed; what lives at once while
it runs is counted by live_bytes.py. A stage of a pipeline is one component running: its peak is weights + inputs + live bytes.

    all resident           sum of all weights + the largest stage's inputs and live bytes
    one at a time          the largest of all stages: `enable_model_cpu_offload`

A card fits if that and RESERVE are within its GiB. The VAE stays in 16 bits; tiling its decode makes its stage smaller.
Text encoders are stored as `quantdit calibrate --components all` does it.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from quantdit.benchmarks import cpu_linear
from quantdit.benchmarks.live_bytes import measured, predicted
from quantdit.benchmarks.memory_report import CARDS, GIB, draw, markdown
from quantdit.checkpoints.checkpoint import build_on_meta, stays_float32
from quantdit.checkpoints.libraries import TRANSFORMERS, library_of
from quantdit.checkpoints.random_weights import write_random_transformer
from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan, component, planned_spec
from quantdit.formats import FORMATS
from quantdit.models.adapter import adapter_for
from quantdit.models.known_models import CONFIGS, transformer_config
from quantdit.models.synthetic import synthetic_inputs
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import encoder_preset, from_bits
from quantdit.recipes.sampling_plan import SamplingPlan, Size
from quantdit.system import files
from quantdit.system.optional_import import require
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec, layer_fields, stored_bytes

RESERVE = 3 * 2**28  # bytes of a card that CUDA's context and what the allocator cuts off take; assumed, not measured
HEIGHT, WIDTH, CELL = 480, 832, 8  # of 480p, and pixels to a latent cell of all four VAEs
CHANNELS = 16
HALF = torch.bfloat16

# Presets of the transformer and of text encoders, which have none of 2 bits.
BITS = {"bf16": ("", ""), "w8": ("w8a8", "w8a16"), "w4": ("w4a8", "w4a16"), "w3": ("w3a8", "w3a16"), "w2": ("w2a16", "w4a16")}

# Depths of a config: blocks of a kind are alike, so two tell what lives at once in any number.
DEPTHS = ("num_layers", "num_single_layers")


@dataclass(frozen=True)
class Subject:
    """A pipeline of known components.

    Attributes:
        model: a name of KNOWN_MODELS: the transformer's shapes.
        encoders: config of configs/parts and tokens of a prompt, by the component's name in the pipeline.
        vae: config of configs/parts.
        tokens: of text that reach the transformer.
        frames: latent frames.
        batch: samples in a call of the transformer: 2 where the pipeline runs both branches of guidance in one.
    """

    model: str
    encoders: Mapping[str, tuple[str, int]]
    vae: str
    tokens: int
    frames: int = 1
    batch: int = 1


WAN = {"text_encoder": ("umt5-xxl", 512)}
FLUX = {"text_encoder": ("clip-l", 77), "text_encoder_2": ("t5-xxl", 512)}
SD3 = {"text_encoder": ("clip-l-projection", 77), "text_encoder_2": ("clip-g", 77), "text_encoder_3": ("t5-xxl", 256)}
SUBJECTS = (
    Subject("wan-1.3b", WAN, "wan-vae", 512, frames=21),  # 81 frames
    Subject("wan-14b", WAN, "wan-vae", 512, frames=21),
    Subject("flux-dev", FLUX, "flux-vae", 512),
    # 34 tokens of its template are cut off before the transformer.
    Subject("qwen-image", {"text_encoder": ("qwen2.5-vl-7b", 546)}, "qwen-image-vae", 512),
    Subject("sd3.5-medium", SD3, "sd3-vae", 333, batch=2),
)


@dataclass(frozen=True)
class Weights:
    """Bytes of a component's weights: of the tensors in its files, and in memory once loaded."""

    file: int
    memory: int


@dataclass(frozen=True)
class Stage:
    """One component running, in bytes.

    Attributes:
        name: of the component.
        weights: of it.
        live: inputs and what lives at once besides.
        tiled: the same of a VAE whose decode is tiled; None where its tiles are no smaller than the sample, and of others.
    """

    name: str
    weights: Weights
    live: int
    tiled: int | None = None


def part_config(name: str) -> dict:
    """Return the published config of a text encoder or VAE of configs/parts."""
    return json.loads((CONFIGS / "parts" / f"{name}.json").read_text())


def built(config: Mapping) -> nn.Module:
    """Return the model of a config of diffusers or transformers on the meta device, with dtypes as bfloat16 loads it."""
    model = build_on_meta(dict(config), Path(), compute_buffers=False)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if stays_float32(model, name, HALF) else HALF)
    return model.requires_grad_(False).eval()


def layer_specs(model: nn.Module, bits: str) -> dict[str, LayerSpec]:
    """Return what each quantized layer stores by path, as a preset plans it.

    Args:
        model: a transformer or a text encoder; its weights are not read.
        bits: of a preset; "" for none.
    """
    if not bits:
        return {}
    part = component(model, encoder_preset(bits) if library_of(model) is TRANSFORMERS else from_bits(bits))
    layers, found = {layer.name: layer for layer in part.layers}, {}
    for name, plan in part.plans.items():
        activation = ActivationSpec(plan.rule.activation_bits)
        found[name] = replace(planned_spec(layers[name], plan), activation=activation, smoothed=plan.rule.smooth != "none")
    return found


def weights_of(model: nn.Module, specs: Mapping[str, LayerSpec]) -> Weights:
    """Return the bytes of a model whose weights were bfloat16, its layers stored as `specs` says.

    In a file what stayed dense takes 2 bytes a number, and trellis codes' and vectors' scales are in 16 bits (gptvq.in_16_bits).
    """
    replaced = {id(model.get_parameter(f"{path}.weight")) for path in specs}
    stored = {id(t): t for t in model.state_dict(keep_vars=True).values()}  # a tied table once
    file = sum(HALF.itemsize * t.numel() for key, t in stored.items() if key not in replaced)
    memory = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if id(t) not in replaced)
    for spec in specs.values():
        short = FORMATS[spec.weight.format].kind in ("vectors", "trellis")
        file += stored_bytes(spec) - 2 * short * spec.weight.out_features
        memory += sum(math.prod(field.shape) * field.dtype.itemsize for field in layer_fields(spec).values())
    return Weights(file, memory)


def _nbytes(tree: object) -> int:
    return sum(t.nbytes for t in tree_leaves(tree) if isinstance(t, Tensor))


def _quantized(specs: Mapping[str, LayerSpec]) -> dict[str, tuple[str, int]]:
    return {path: (spec.weight.format, spec.activation.bits) for path, spec in specs.items()}


def transformer_call(model: nn.Module, size: Size, device: str = "meta") -> tuple[Callable[[], object], int]:
    """Return a call of a transformer as its pipeline makes it, and the bytes of its inputs."""
    inputs = synthetic_inputs(model, adapter_for(model), size, torch.Generator().manual_seed(0))
    inputs = tree_map_only(Tensor, lambda t: t.to(device), inputs)
    return lambda: model(**inputs), _nbytes(inputs)


def encoder_call(model: nn.Module, tokens: int, device: str = "meta") -> tuple[Callable[[], object], int]:
    """Return a call of a text encoder, all hidden states kept as CLIP's and Qwen's pipelines do, and the bytes of its inputs.

    It is given no mask, whose values could not be read on the meta device; one is a number a token.
    """
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    keeps = "T5" not in type(model).__name__
    return lambda: model(ids, output_hidden_states=keeps), ids.nbytes


def decode_call(vae: nn.Module, frames: int, height: int, width: int, device: str = "meta") -> tuple[Callable[[], object], int]:
    """Return a call of a VAE's decode of so many latent cells, and the latent's bytes; without frames it is `[1, c, h, w]`."""
    decode: Any = vae.decode
    z = torch.zeros(1, CHANNELS, *((frames,) if frames else ()), height, width, dtype=HALF, device=device)
    return lambda: decode(z, return_dict=False), z.nbytes


def frames_of(vae: nn.Module, frames: int) -> int:
    """Return latent frames as `decode_call` takes them: images of an AutoencoderKL have none."""
    return 0 if type(vae).__name__ == "AutoencoderKL" else frames


def tiled_decode(vae: nn.Module, frames: int, height: int, width: int) -> int | None:
    """Return the live bytes of a tiled decode of so many latent cells; None where one tile holds them.

    For VAEs of Wan's kind (AutoencoderKLWan, AutoencoderKLQwenImage), which keep all tiles until they are blended: decoding the
    last whole tile beside those before it, or all tiles beside three copies of the sample (rows, joined, clamped):

        max(before + live bytes of decoding one tile, tiles + 3 sample)
    """
    tile, step = (getattr(vae, f"tile_sample_{kind}_height", 0) // CELL for kind in ("min", "stride"))
    if not tile or (height <= tile and width <= tile):
        return None
    spans = [[(at, min(tile, size - at)) for at in range(0, size, step)] for size in (height, width)]
    areas = [h * w for (_, h), (_, w) in product(*spans)]
    last = max(i for i, area in enumerate(areas) if area == max(areas))
    pixel = CELL**2 * 3 * HALF.itemsize * (4 * (frames - 1) + 1)  # bytes of a latent cell's pixels in all frames
    one = predicted(vae, decode_call(vae, frames, min(tile, height), min(tile, width))[0])
    return max(pixel * sum(areas[:last]) + one, pixel * (sum(areas) + 3 * height * width))


@lru_cache
def vae_stage(name: str, frames: int) -> Stage:
    """Return a VAE that decodes a sample of 480p."""
    vae = built(part_config(name))
    cells = (frames_of(vae, frames), HEIGHT // CELL, WIDTH // CELL)
    call, inputs = decode_call(vae, *cells)
    tiled = tiled_decode(vae, *cells)
    return Stage("vae", weights_of(vae, {}), inputs + predicted(vae, call), None if tiled is None else inputs + tiled)


@lru_cache
def encoder_stage(component_name: str, name: str, tokens: int, bits: str) -> Stage:
    """Return a text encoder that encodes one prompt."""
    model = built(part_config(name))
    specs = layer_specs(model, bits)
    linears = {path: spec for path, spec in specs.items() if isinstance(model.get_submodule(path), nn.Linear)}
    call, inputs = encoder_call(model, tokens)
    return Stage(component_name, weights_of(model, specs), inputs + predicted(model, call, _quantized(linears)))


def transformer_stage(subject: Subject, bits: str) -> Stage:
    """Return a transformer in one step at 480p."""
    config = transformer_config(subject.model)
    model, short = built(config), built(config | {depth: min(2, config[depth]) for depth in DEPTHS if depth in config})
    size = Size(subject.batch, subject.frames, HEIGHT // CELL, WIDTH // CELL, subject.tokens)
    call, inputs = transformer_call(short, size)
    live = predicted(short, call, _quantized(layer_specs(short, bits)))
    return Stage("transformer", weights_of(model, layer_specs(model, bits)), inputs + live)


def stages_of(subject: Subject, name: str) -> list[Stage]:
    """Return the stages of a pipeline in the order in which they run, `name` a key of BITS."""
    bits, of_encoders = BITS[name]
    encoders = [encoder_stage(path, *part, of_encoders) for path, part in subject.encoders.items()]
    return [*encoders, transformer_stage(subject, bits), vae_stage(subject.vae, subject.frames)]


def peak(stages: list[Stage], resident: bool, tiled: bool) -> tuple[int, str]:
    """Return the bytes that running the stages takes at most, and the name of the stage that does.

    Args:
        stages: of a pipeline.
        resident: all components stay on the card; or one at a time.
        tiled: the VAE decodes in tiles where it has some.
    """
    whole = sum(stage.weights.memory for stage in stages)
    lives = [stage.tiled if tiled and stage.tiled is not None else stage.live for stage in stages]
    totals = [(whole if resident else s.weights.memory) + live for s, live in zip(stages, lives, strict=True)]
    most = max(totals)
    return most, stages[totals.index(most)].name


WAYS = {"all": (True, False), "all, tiled": (True, True), "offload": (False, False), "offload, tiled": (False, True)}


def verdict(stages: list[Stage], card: int) -> str:
    """Return the first of WAYS in which a pipeline fits a card of so many GiB, `no` for none."""
    fits = (way for way, how in WAYS.items() if peak(stages, *how)[0] + RESERVE <= card * GIB)
    return next(fits, "no")


def rows_of(subject: Subject) -> Iterator[dict]:
    """Yield a row for every component and a verdict at every width of BITS."""
    for name, presets in BITS.items():
        stages = stages_of(subject, name)
        common = {"model": subject.model, "bits": name}
        for stage in stages:
            yield {
                "what": "component",
                **common,
                "component": stage.name,
                "part": subject.vae if stage.name == "vae" else subject.encoders.get(stage.name, (subject.model,))[0],
                "preset": {"transformer": presets[0], "vae": ""}.get(stage.name, presets[1]),
                "file_bytes": stage.weights.file,
                "memory_bytes": stage.weights.memory,
                "live_bytes": stage.live,
                "live_bytes_tiled": stage.tiled,
                "weights": "arithmetic",
                "activations": "modelled",
            }
        peaks = {way: peak(stages, *how) for way, how in WAYS.items()}
        yield {
            "what": "pipeline",
            **common,
            "peak_bytes": {way: size for way, (size, _) in peaks.items()},
            "peak_stage": {way: name for way, (_, name) in peaks.items()},
            "cards": {f"{card} GB": verdict(stages, card) for card in CARDS},
            "reserve_bytes": RESERVE,
            "activations": "modelled",
        }


# A block of real widths is calibrated at these bits, without data; those of trellis codes take minutes.
CHECKED_BITS = ("w8a8", "w4a8")
BLOCK = Size(1, 5, 32, 48, 512)
# One block, or a whole VAE, at sizes that take a CPU a second: config, and what makes its call.
CHECKED = {
    "step of wan-1.3b, one block, 1,920 tokens": (
        lambda: transformer_config("wan-1.3b") | {"num_layers": 1},
        lambda model, device: transformer_call(model, BLOCK, device),
    ),
    "umt5-xxl, one block, 512 tokens": (
        lambda: part_config("umt5-xxl") | {"num_layers": 1, "vocab_size": 512},
        lambda model, device: encoder_call(model, 512, device),
    ),
    "decode of flux-vae, 256 x 256": (
        lambda: part_config("flux-vae"),
        lambda model, device: decode_call(model, 0, 32, 32, device),
    ),
    "decode of wan-vae, 5 frames of 128 x 128": (
        lambda: part_config("wan-vae"),
        lambda model, device: decode_call(model, 2, 16, 16, device),
    ),
}


def check_files() -> Iterator[dict]:
    """Yield what is predicted of a quantized block of wan-1.3b beside its file, written without data, and a step with it."""
    config = transformer_config("wan-1.3b") | {"num_layers": 1}
    with tempfile.TemporaryDirectory() as place:
        write_random_transformer(config, Path(place, "dense"), 0)
        for bits in CHECKED_BITS:
            pipeline, source = load_pipeline(str(Path(place, "dense")))
            made = compile(pipeline, source, Plan(from_bits(bits), SamplingPlan(samples=0)), Path(place, bits)).output
            written = sum(files.tensor_bytes(made / "transformer").values())
            model = built(config)
            specs = layer_specs(model, bits)
            yield _check(f"file of one block of wan-1.3b, {bits}", weights_of(model, specs).file, written)
            loaded: Any = load_pipeline(str(made), HALF)[0]
            expected = predicted(model, transformer_call(model, BLOCK)[0], _quantized(specs))
            found = measured(transformer_call(loaded.transformer, BLOCK, "cpu")[0])
            yield _check(f"step of wan-1.3b, one block, 1,920 tokens, {bits}", expected, found)


def check_peaks() -> Iterator[dict]:
    """Yield predicted live bytes of the calls of CHECKED beside what torch's allocator gave out on this CPU."""
    for what, (config, call) in CHECKED.items():
        model = built(config())
        expected = predicted(model, call(model, "meta")[0])
        yield _check(what, expected, measured(call(in_memory(model), "cpu")[0]))


def in_memory(model: nn.Module) -> nn.Module:
    """Return a model of the meta device in memory, all its numbers the same."""
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01 if tensor.is_floating_point() else 0)
    return model


def _check(of: str, expected: int, found: int) -> dict:
    return {"what": "check", "of": of, "predicted_bytes": expected, "measured_bytes": found, "ratio": round(expected / found, 3)}


def run(output: Path, subjects: Sequence[Subject] = SUBJECTS) -> None:
    """Write one JSON object a line, a page of tables beside it, and a picture.

    Raises:
        ModuleNotFoundError: transformers or matplotlib is not installed.
    """
    require("transformers", "text")
    require("matplotlib", "plot")
    origin = cpu_linear.provenance() | {"command": "quantdit bench memory"}
    rows = []
    for row in chain(check_files(), check_peaks(), *map(rows_of, subjects)):
        rows.append(row | origin)
        if row["what"] == "check":
            print(f"{row['of']}: predicted / measured {row['ratio']}", flush=True)
        elif row["what"] == "pipeline":
            print(
                f"{row['model']} {row['bits']}: {', '.join(f'{card}: {how}' for card, how in row['cards'].items())}", flush=True
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = output.with_suffix(".png")
    draw(picture, rows)
    output.with_suffix(".md").write_text(markdown(rows, picture.name))

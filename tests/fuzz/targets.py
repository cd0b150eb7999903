"""What is fuzzed: undamaged folders, which of their files are damaged, how each is opened and what must hold then.

`open` returns a text that stands for all that was read. A `strict` target must refuse damage, or return the same text as for the
undamaged folder. Other targets, such as a model in full precision, have no digest: they may also open as something else, but
must not fail with an error that nobody wrote for a user.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor, nn

TESTS = Path(__file__).parents[1]


class Wrong(Exception):
    """What must hold does not."""


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        name: of it.
        folder: which of the undamaged folders, by the name of a function in MAKERS.
        patterns: of the files that are damaged.
        open: reads a folder and returns what stands for its content.
        strict: it must be refused or the same.
        foreign: another library reads it first; only errors that pass through quantdit are ours.
        share: of the mutations, relative to the others: less for slow ones.
        given: a user names the file, so that it may as well be a pipe or a device.
    """

    name: str
    folder: str
    patterns: tuple[str, ...]
    open: Callable[[Path], str]
    strict: bool = True
    foreign: bool = False
    share: float = 1.0
    given: bool = False

    def files(self, folder: Path) -> list[str]:
        """Return the names of the files that are damaged."""
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        return [name for name in names if any(fnmatch(name, pattern) for pattern in self.patterns)]


# ---- undamaged folders


def load_conftest():
    """Return tests/conftest.py, which has a recipe of every format and the tiny pipeline."""
    spec = importlib.util.spec_from_file_location("tests_conftest", TESTS / "conftest.py")
    module = sys.modules.setdefault("tests_conftest", importlib.util.module_from_spec(spec))
    if not hasattr(module, "MIXED"):
        spec.loader.exec_module(module)
    return module


def make_source(folder: Path, root: Path) -> None:
    """Make a pipeline in full precision."""
    load_conftest()._pixel(folder, 2, 32)


def make_quantized(folder: Path, root: Path) -> None:
    """Make what `quantdit calibrate` writes, of every format."""
    from quantdit.compiling.compile import compile
    from quantdit.compiling.plan import Plan
    from quantdit.pipelines.pipeline import load_pipeline
    from quantdit.recipes.rules import from_toml
    from quantdit.recipes.sampling_plan import SamplingPlan

    (root / "mixed.toml").write_text(load_conftest().MIXED)
    pipeline, source = load_pipeline(str(root / "source"))
    compile(pipeline, source, Plan(from_toml(root / "mixed.toml"), SamplingPlan(samples=2, steps=2)), folder)


def make_sharded(folder: Path, root: Path) -> None:
    """Make the same with its weights in shards."""
    from quantdit.checkpoints import checkpoint
    from quantdit.system import files

    shutil.copytree(root / "quantized", folder)
    transformer = checkpoint.read_transformer(folder / "transformer")
    config = files.read_json(folder / "transformer" / "config.json")["quantization_config"]
    with one_attribute(checkpoint, "write_tensors", functools.partial(files.write_tensors, shard_bytes=100_000)):
        checkpoint.write_transformer(transformer, folder / "transformer", config["recipe"], config["provenance"])


def make_saved(folder: Path, root: Path) -> None:
    """Make what `save_pretrained` writes of a model quantized in a script."""
    import quantdit

    pipeline = quantdit.load(root / "source")
    quantdit.quantize(pipeline.transformer, "w4a8", inputs=calls())
    pipeline.save_pretrained(folder)


def make_alone(folder: Path, root: Path) -> None:
    """Make what `save_pretrained` writes of its transformer alone."""
    shutil.copytree(root / "saved" / "transformer", folder)


def make_encoder(folder: Path, root: Path) -> None:
    """Make a quantized text encoder, its table of words too, as `save_pretrained` of transformers writes it."""
    import quantdit

    model = models("tiny_encoders").encoder("T5EncoderModel")
    quantdit.quantize(model, "w4a8")
    model.save_pretrained(folder)


def make_encoder_sharded(folder: Path, root: Path) -> None:
    """Make the same in shards."""
    import quantdit

    quantdit.load(root / "encoder").save_pretrained(folder, max_shard_size="20KB")


def make_planned(folder: Path, root: Path) -> None:
    """Make a transformer with 8-bit attention and a step plan."""
    import quantdit
    from quantdit.step_plans.following import carry
    from quantdit.step_plans.forecasts import placed, polynomial

    model, _ = models("tiny_models").tiny("WanTransformer3DModel")
    recipe = {"name": "both", "rule": [{"match": "*", "weight": "int8"}], "attention": [{"match": "*"}]}
    quantdit.quantize(model, recipe)
    carry(model, polynomial("taylor1", [900.0, 600.0, 300.0, 100.0], placed(4, 3)))
    model.save_pretrained(folder)


def make_recipe(folder: Path, root: Path) -> None:
    """Make a recipe and a list of prompts."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(load_conftest().MIXED)
    (folder / "prompts.txt").write_text("a red fox\na bat, moving left\n\nzwei Füchse\n")


def make_gate(folder: Path, root: Path) -> None:
    """Make a report of `quantdit evaluate` and a baseline of its."""
    spec = importlib.util.spec_from_file_location("tests_gate", TESTS / "evaluation" / "gate" / "test_judge.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from quantdit.evaluation.gate import judge

    folder.mkdir()
    made = module.made_up(0, layers=3)
    (folder / "report.json").write_text(json.dumps(made))
    (folder / "baseline.json").write_text(json.dumps(judge.make_baseline(made)))


def make_samples(folder: Path, root: Path) -> None:
    """Make a cache of samples."""
    sampled(folder, root / "source")


def make_onnx(folder: Path, root: Path) -> None:
    """Make the graph of a pipeline, its weights in a file of their own."""
    from quantdit.exporters import to_onnx

    folder.mkdir()
    with one_attribute(to_onnx, "SINGLE_FILE_BYTES", 1000):
        to_onnx.to_onnx(root / "saved", folder / "graph.onnx", verify=False)


def make_partial(folder: Path, root: Path) -> None:
    """Make the folder of a calibration that was interrupted after its first block."""
    from quantdit.compiling import block_inputs

    hand_on = block_inputs._hand_on

    def interrupted(job, links, number: int, *rest: object) -> None:
        if number:
            raise KeyboardInterrupt
        hand_on(job, links, number, *rest)

    folder.mkdir()
    with one_attribute(block_inputs, "_hand_on", interrupted), contextlib.suppress(KeyboardInterrupt):
        resume(folder, root / "source")


MAKERS = {
    name: globals()[f"make_{name}"]
    for name in (
        "source",
        "quantized",
        "sharded",
        "saved",
        "alone",
        "encoder",
        "encoder_sharded",
        "planned",
        "recipe",
        "gate",
        "samples",
        "onnx",
        "partial",
    )
}


# ---- how they are opened


@functools.cache
def models(name: str):
    """Return a file of tests/models."""
    spec = importlib.util.spec_from_file_location(f"fuzz_{name}", TESTS / "models" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def one_attribute(owner: object, name: str, value: object):
    """Have an attribute of another value while the body runs."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def calls() -> list[dict[str, Tensor]]:
    """Return two calls of the tiny transformer."""
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 2])
    shape = (2, 1, 8, 8)
    return [
        {"hidden_states": torch.randn(shape, generator=g), "timestep": torch.full((2,), t), "class_labels": labels}
        for t in (900.0, 200.0)
    ]


def digest(*tensors: Tensor) -> str:
    """Return the sha256 of dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for t in tensors:
        total.update(f"{t.dtype} {tuple(t.shape)}".encode())
        total.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def of_model(model: nn.Module, finite: bool = True) -> str:
    """Return what stands for a transformer: its tensors, `finite` if need be, and its outputs, which two calls must agree on."""
    tensors = [*model.parameters(), *model.buffers()]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise Wrong(f"{name} is on the meta device")
        if finite and tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise Wrong(f"{name} is not finite")
    with torch.no_grad():
        try:
            once, again = ([model(**call).sample for call in calls()] for _ in range(2))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            # A model in full precision that its config describes as another: what it takes is its own affair.
            return f"cannot be called: {type(error).__name__}"
    if digest(*once) != digest(*again):
        raise Wrong("two calls differ")
    return digest(*tensors, *once)


def of_encoder(model: nn.Module) -> str:
    """Return what stands for a text encoder: its tensors and its states of some words."""
    with torch.no_grad():
        states = model(torch.arange(12)[None]).last_hidden_state
    return digest(*model.parameters(), *model.buffers(), states)


def encoder(folder: Path) -> str:
    """Open a text encoder with quantdit.load."""
    import quantdit

    return of_encoder(quantdit.load(folder))


def encoder_by_transformers(folder: Path) -> str:
    """Open a text encoder with transformers' own from_pretrained."""
    from transformers import T5EncoderModel

    import quantdit  # noqa: F401 - registers

    return of_encoder(T5EncoderModel.from_pretrained(folder, local_files_only=True).eval())


def planned(folder: Path) -> str:
    """Open a transformer, follow its plan, and call it along the trajectory."""
    import quantdit
    from quantdit.models.adapter import adapter_for
    from quantdit.models.prediction import prediction_of
    from quantdit.models.synthetic import synthetic_inputs

    model = quantdit.load(folder)
    model.enable_cache(quantdit.step_plan(model))
    size = models("tiny_models").tiny("WanTransformer3DModel")[1]
    with torch.no_grad():
        made = [
            prediction_of(model(**synthetic_inputs(model, adapter_for(model), size, torch.Generator().manual_seed(0), time)))
            for time in (900.0, 600.0, 300.0, 100.0)
        ]
    return digest(*model.parameters(), *model.buffers(), *made)


def of_pipeline(pipeline) -> str:
    """Return what stands for a pipeline: its transformer and a sample."""
    if not hasattr(pipeline, "transformer"):
        return of_model(pipeline)
    from quantdit.pipelines.generate import generate

    return of_model(pipeline.transformer) + digest(generate(pipeline, 1, 0, 2))


def loaded(folder: Path) -> str:
    """Open with quantdit.load."""
    import quantdit

    return of_pipeline(quantdit.load(folder))


def in_full_precision(folder: Path) -> str:
    """Open a source with quantdit.load; it need not be a model that we could sample from."""
    import quantdit

    found = quantdit.load(folder)
    return of_model(getattr(found, "transformer", found), finite=False)


def by_diffusers(folder: Path) -> str:
    """Open the transformer with diffusers' own from_pretrained."""
    from diffusers import DiTTransformer2DModel

    place = folder if (folder / "config.json").exists() else folder / "transformer"
    return of_model(DiTTransformer2DModel.from_pretrained(place, local_files_only=True).eval())


def quantized_while_loading(folder: Path) -> str:
    """Quantize the transformer while diffusers loads it."""
    from diffusers import DiTTransformer2DModel

    from quantdit import QuantDiTConfig

    options = {"quantization_config": QuantDiTConfig(bits="w4a8"), "local_files_only": True}
    return of_model(DiTTransformer2DModel.from_pretrained(folder / "transformer", **options).eval())


def inspected(folder: Path) -> str:
    """Open with `quantdit inspect`."""
    import quantdit

    found = quantdit.inspect(folder)
    found.text(every=True)
    content = found.to_dict()
    return json.dumps({key: content[key] for key in ("layers", "allocation")}, allow_nan=False)  # not how long a header is


def made_dense(folder: Path) -> str:
    """Open with `quantdit export --to dense`."""
    from diffusers import DiTTransformer2DModel

    from quantdit.exporters.to_dense import to_dense

    output = folder.with_name("dense")
    shutil.rmtree(output, ignore_errors=True)
    before = sum(p.lstat().st_size for p in folder.rglob("*"))
    to_dense(folder, output)
    written = [p for p in output.rglob("*") if p.is_file()]
    if sum(p.stat().st_size for p in written) > 4 * before:
        raise Wrong("the output is many times as large")
    if any(p.read_bytes() == Path("/etc/hostname").read_bytes() for p in written):
        raise Wrong("a file from outside of the folder was copied")
    return of_model(DiTTransformer2DModel.from_pretrained(output / "transformer"))


def parsed(folder: Path) -> str:
    """Read a recipe and apply it to a model's layers."""
    from quantdit.models import adapter
    from quantdit.recipes.resolve import options
    from quantdit.recipes.rules import from_toml

    model = load_conftest()._transformer(
        2, 32, in_channels=1, out_channels=1, sample_size=8, num_embeds_ada_norm=load_conftest().CLASSES
    )
    plans = options(from_toml(folder / "recipe.toml"), adapter.layers(model, adapter.adapter_for(model)))
    return json.dumps({name: sorted(plan) for name, plan in plans.items()})


def prompted(folder: Path) -> str:
    """Read prompts, as every command does."""
    from quantdit.cli.options import read_prompts

    return json.dumps(read_prompts(folder / "prompts.txt"))


def gated(folder: Path) -> str:
    """Hold a report against a baseline."""
    from quantdit.evaluation.gate import judge

    report, baseline = (judge.read(folder / f"{name}.json", name) for name in ("report", "baseline"))
    verdict = judge.gate(report, baseline)
    judge.summary(verdict)
    for finding in verdict.findings:
        numbers = (finding.candidate, finding.baseline, finding.limit)
        if finding.verdict == judge.PASS and not all(math.isfinite(number) for number in numbers):
            raise Wrong(f"{finding.name} passes with {numbers}")
    for name in ("samples", "sets", "floor", "probe"):
        if verdict.verdict == judge.PASS and not all(map(math.isfinite, _numbers(report.get(name)))):
            raise Wrong(f"passes with numbers of {name} that are not finite")
    return verdict.verdict


def _numbers(content: object) -> list[float]:
    if isinstance(content, dict | list):
        return [n for inner in (content.values() if isinstance(content, dict) else content) for n in _numbers(inner)]
    return [content] if isinstance(content, int | float) and abs(content) < 1e400 else []


def sampled(folder: Path, source: Path | None = None) -> str:
    """Take samples from a cache."""
    from quantdit.evaluation.samples import Sampling, sample

    made = sample(*_pipeline(source or folder.parent / "source"), Sampling(3, 0, 2), folder)
    return digest(made.images, made.latents) + json.dumps((made.timesteps, made.prompts, made.seeds))


def graphed(folder: Path) -> str:
    """Have ONNX Runtime compute."""
    from quantdit.exporters.onnx_session import use_graph

    pipeline, source = _pipeline(folder.parent / "saved")
    forward = use_graph(pipeline, source, folder / "graph.onnx")
    try:
        return digest(*(forward.run(call) for call in calls()))
    finally:
        del pipeline.transformer.forward


def resumed(folder: Path) -> str:
    """Go on with an interrupted calibration."""
    resume(folder, folder.parent / "source")
    weights = folder / "out" / "transformer"
    return json.dumps({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(weights.iterdir())})


def resume(folder: Path, source: Path) -> None:
    """Calibrate attention layers alone, or go on with it."""
    from quantdit.compiling.compile import compile
    from quantdit.compiling.plan import Plan
    from quantdit.pipelines.pipeline import load_pipeline
    from quantdit.recipes.rules import Recipe, Rule
    from quantdit.recipes.sampling_plan import SamplingPlan

    recipe = Recipe("attention", (Rule("*.attn1.to_q", "table4", activation_bits=8), Rule("*", "dense")))
    compile(*load_pipeline(str(source)), Plan(recipe, SamplingPlan(samples=2, steps=2)), folder / "out", resume=True)


_opened: dict[Path, tuple] = {}


def _pipeline(folder: Path) -> tuple:
    """Return an undamaged pipeline and its source, opened once for each process."""
    from quantdit.pipelines.pipeline import load_pipeline

    if folder not in _opened:
        _opened[folder] = load_pipeline(str(folder))
    return _opened[folder]


MODEL = ("transformer/*.json", "transformer/*.safetensors")
TARGETS = {
    target.name: target
    for target in (
        Target("calibrated", "quantized", MODEL, loaded, share=3),
        Target("calibrated-sharded", "sharded", MODEL, loaded, share=2),
        Target("calibrated-pipeline", "quantized", ("model_index.json", "scheduler/*"), loaded),
        Target("calibrated-by-diffusers", "quantized", MODEL, by_diffusers, foreign=True),
        Target("sharded-by-diffusers", "sharded", MODEL, by_diffusers, foreign=True, share=0.5),
        Target("saved", "saved", MODEL, loaded, share=2),
        Target("saved-by-diffusers", "saved", MODEL, by_diffusers, foreign=True),
        Target("transformer-alone", "alone", ("*",), loaded),
        Target("transformer-alone-by-diffusers", "alone", ("*",), by_diffusers, foreign=True, share=0.5),
        Target("encoder", "encoder", ("*",), encoder, share=2),
        Target("encoder-sharded", "encoder_sharded", ("*",), encoder),
        Target("encoder-by-transformers", "encoder", ("*",), encoder_by_transformers, foreign=True),
        Target("planned", "planned", ("*",), planned, share=2),
        Target("source", "source", ("*", "*/*"), in_full_precision, strict=False, share=2),
        Target("source-quantized-while-loading", "source", MODEL, quantized_while_loading, strict=False, foreign=True),
        Target("inspected", "quantized", ("calibration_report.json",), inspected, strict=False),
        Target("inspected-saved", "saved", MODEL, inspected, strict=False, share=0.3),
        Target("made-dense", "quantized", ("*", "*/*"), made_dense, share=0.5),
        Target("recipe", "recipe", ("recipe.toml",), parsed, strict=False, share=2, given=True),
        Target("prompts", "recipe", ("prompts.txt",), prompted, strict=False, share=0.5, given=True),
        Target("gate", "gate", ("*.json",), gated, strict=False, share=3, given=True),
        Target("samples", "samples", ("*.safetensors",), sampled),
        Target("onnx", "onnx", ("*",), graphed, share=0.5),
        Target("resumed", "partial", ("*/*", "*/*/*", "*/*/*/*", "*/*/*/*/*"), resumed, share=0.15),
    )
}

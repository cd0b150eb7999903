"""One way from a name to a running pipeline, full precision or quantized: alias, hub id and folder all pass here."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import operator
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from quantdit.checkpoints import checkpoint, streaming
from quantdit.checkpoints.libraries import DIFFUSERS, TRANSFORMERS
from quantdit.checkpoints.streaming import is_streamed
from quantdit.models.class_names import class_number
from quantdit.models.known_models import KNOWN_MODELS, locate
from quantdit.system import files, memory, progress

# What a pipeline calls its transformers; Wan 2.2 has two experts.
PARTS = ("transformer", "transformer_2")
# And its text encoders, models of transformers.
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
COMPONENTS = (*PARTS, *ENCODERS)
EVERYTHING = "all"  # transformers and text encoders
# A size of a sample -> what pipelines call it.
SIZES = {"height": ("height",), "width": ("width",), "frames": ("num_frames", "video_length")}
# What a call may be asked for besides its prompts, and what pipelines call it.
OPTIONS = {"guidance": ("guidance_scale",), "negative_prompt": ("negative_prompt",)} | SIZES
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODEL = "the name of a model, a hub id or a folder; a pipeline's save_pretrained writes one"
SEEDS = 2**31
# The numbers that functions take, with the least and the largest of each; None: any.
NUMBERS: dict[str, tuple[type, int | None, int | None]] = {
    **dict.fromkeys(("samples", "steps", "batch", "columns", "seeds", "probes", "threads", *SIZES), (numbers.Integral, 1, None)),
    **dict.fromkeys(("tokens", "finetune_steps"), (numbers.Integral, 0, None)),
    "seed": (numbers.Integral, 0, SEEDS - 1),
    "guidance": (numbers.Real, None, None),
}
GIVEN = ("prompt", "class_labels", "generator", "num_inference_steps", "output_type")  # whenever a pipeline is called
DEFAULT_MEMORY = 0.8  # of the machine's

# Written for quantdit, and of its licence. The order is fixed: a calibration with n samples takes the first n.
PROMPTS = (
    "a red bicycle leaning against a stone wall in the rain",
    "two otters floating on their backs in a green river",
    "a street market at night, lanterns, steam over the pots",
    "an old lighthouse on a cliff, storm clouds, oil painting",
    "a bowl of ramen with a soft egg, close-up photograph",
    "a child flying a kite on a wide beach at sunset",
    "a red fox running through fresh snow, motion blur",
    "portrait of an astronaut reading a newspaper in a cafe",
)


@dataclass(frozen=True)
class Source:
    """Where a model came from.

    Attributes:
        name: what the user said.
        folder: the local folder it was read from.
        parts: names of its transformers; of what is to be quantized, text encoders too, the transformers first.
        bare: the folder is the transformer's own, without a pipeline around it.
        random_weights: its weights were made up.
        memory_budget: bytes that calibration is to stay within.
    """

    name: str
    folder: Path
    parts: tuple[str, ...] = ("transformer",)
    bare: bool = False
    random_weights: bool = False
    memory_budget: int | None = None

    @property
    def encoders(self) -> tuple[str, ...]:
        """Return which of its parts are text encoders."""
        return tuple(name for name in self.parts if name in ENCODERS)

    @property
    def label(self) -> str:
        """Return the name without the path of this machine."""
        return Path(self.name).name if Path(self.name).is_dir() else self.name

    def part(self, name: str) -> Path:
        """Return the folder of a part."""
        return self.folder if self.bare else self.folder / name


@dataclass(frozen=True)
class Sampling:
    """What a model is asked for.

    Attributes:
        samples: images or clips; sample i takes prompt i modulo their number, and noise of its own, of `sample_seed(seed, i)`.
        seed: the first one.
        steps: of the sampler.
        guidance: scale; None for the pipeline's own.
        prompts: texts, or one alone; None for the pipeline's own or, of a class-conditional one, its classes.
        batch: samples at once; changes speed, memory, and the last bits of floats.
        classes: numbers or names, or one name alone, of a class-conditional model; None for a spread of them.
        negative_prompt: what guidance leads away from; None for the pipeline's own.
        height: of a sample, in pixels; None for the pipeline's own.
        width: of a sample, in pixels.
        frames: of a clip.
        dtype: that the model is loaded in, as `dtype_of` takes it; kept as its name.
    """

    samples: int = 64
    seed: int = 0
    steps: int = 20
    guidance: float | None = None
    prompts: Sequence[str] | None = None
    batch: int = 32
    classes: tuple[int | str, ...] | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse what nothing can be sampled with.

        Raises:
            ValueError: what is no such number, or an unknown dtype.
        """
        for name, kinds, expected in (("prompts", str, "texts"), ("classes", (str, numbers.Integral), "numbers or names")):
            given = as_list(getattr(self, name))
            if given is None:
                continue
            found: tuple[Any, ...] = tuple(given) if isinstance(given, Iterable) else (None,)
            if not all(isinstance(each, kinds) for each in found):
                raise ValueError(f"{name} is {given!r:.60}, expected a list of {expected}")
            object.__setattr__(self, name, tuple(each if isinstance(each, str) else int(each) for each in found))
        given = {name: getattr(self, name) for name in NUMBERS if hasattr(self, name)}
        for name, value in checked_numbers(given, optional=("guidance", *SIZES)).items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "dtype", str(dtype_of(self.dtype)).removeprefix("torch."))


def checked_numbers(given: Mapping[str, Any], optional: Collection[str] = ()) -> dict[str, int | float | None]:
    """Return what was given for some of NUMBERS as Python's own numbers.

    Args:
        given: values by their names in NUMBERS.
        optional: those that may be None.

    Raises:
        ValueError: naming the argument, what was given and what is expected.
    """
    found: dict[str, int | float | None] = {}
    for name, value in given.items():
        if name in optional and given[name] is None:
            found[name] = None
            continue
        kind, least, largest = NUMBERS[name]
        if isinstance(value, bool) or not isinstance(value, kind) or not -math.inf < value < math.inf:
            raise ValueError(f"{name} is {value!r:.60}, expected a {'whole' if kind is numbers.Integral else 'finite'} number")
        if (least is not None and value < least) or (largest is not None and value > largest):
            limits = f"at least {least}" if largest is None else f"{least} to {largest}"
            raise ValueError(f"{name} is {value}, expected {limits}")
        found[name] = int(value) if kind is numbers.Integral else float(value)
    return found


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """Return one of DTYPES, given as torch's own or by its name, `bfloat16` or `torch.bfloat16`.

    Raises:
        ValueError: it is none of them.
    """
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, str | torch.dtype) or name not in DTYPES:
        raise ValueError(f"dtype {dtype!r:.60} is unknown; use {', '.join(DTYPES)}, as text or as torch.{next(iter(DTYPES))}")
    return DTYPES[name]


def as_list(given: str | int | Sequence | None) -> Sequence | None:
    """Return prompts or classes as they are given, a text or a number alone as a tuple of one: letters are no prompts."""
    return (given,) if isinstance(given, str | int) else given


FORMER = {"calibration_steps": "finetune_steps"}  # options under their names of earlier versions
SYNONYMS = {"bits": "recipe", "model": "transformer", "prompt": "prompts"}  # what an option is called elsewhere


def check_options(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Refuse an option that a function does not have.

    Raises:
        ValueError: naming it, and the nearest that there is.
    """
    for name in given:
        if name not in known:
            meant = SYNONYMS.get(name)
            near = [meant] if meant in known else difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"{function} has no option {name!r}; {hint}")


Given = ParamSpec("Given")
Made = TypeVar("Made")


def guesses_options(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Decorate a function so that an option which it does not have is refused as `check_options` does."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Made:
        named = {FORMER.get(key, key): value for key, value in kwargs.items()}
        check_options(function.__name__, named, known)
        return function(*args, **named)

    return call


def check_quantized(folder: Path) -> None:
    """Refuse what cannot be the folder of a quantized model, before it is read.

    Raises:
        files.CheckpointError: the name of a known model, nothing, a file, or a folder without a transformer.
    """
    advice = "give the folder that quantdit calibrate or save_pretrained wrote"
    if not folder.exists() and str(folder) in KNOWN_MODELS:
        raise files.CheckpointError(
            f"{folder} is a model in full precision, and this command takes the folder of a quantized one; quantdit calibrate"
            f" --model {folder} --bits w4a8 writes {folder}-w4a8"
        )
    if not folder.is_dir():
        raise files.CheckpointError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}; {advice}")
    if not (folder / "config.json").exists() and not (folder / PARTS[0]).is_dir():
        raise files.CheckpointError(f"{folder} has no transformer folder; {advice}")


class BareTransformer:
    """Transformers without the pipeline around them, under their names; they can be calibrated on made-up inputs."""

    def __init__(self, **parts: nn.Module) -> None:
        self.__dict__.update(parts)


def load_pipeline(
    model: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    weights: Path | None = None,
    memory_budget: int | None = None,
    accept_config: bool = False,
    components: str | Sequence[str] = PARTS[0],
):
    """Return `(pipeline, Source)` for an alias, a hub id or a folder; a quantized transformer comes back quantized.

    Args:
        model: what to load.
        dtype: of what is not quantized.
        device: where to.
        weights: a local folder with the weights of `model`: of the whole pipeline, or of its transformer alone, which comes back
            as a BareTransformer.
        memory_budget: bytes that calibration is to stay within; a full-precision transformer that does not fit comes back with
            its blocks on the meta device (quantdit.checkpoints.streaming).
        accept_config: take a quantized model whose config.json, or whose scheduler's, was changed after it was calibrated.
        components: what the source's `parts` are to name, as `named_parts` takes them; text encoders among them come back in
            full precision as transformers do.

    Raises:
        ValueError: unknown name, no network, no diffusers pipeline, a damaged checkpoint, one that another tool quantized
            (CheckpointError), a memory budget that is too small, or components that there are not.
    """
    _check_device(device)
    place = locate(model)
    if weights is not None:
        if not weights.is_dir():
            raise ValueError(f"{weights} is no folder; --weights takes the folder of a pipeline, or of its transformer")
        place = weights
    folder = place if isinstance(place, Path) else _download(model, place)
    budget = memory_budget if memory_budget is not None else int(DEFAULT_MEMORY * memory.physical())
    index = files.read_json(folder / "model_index.json") if os.path.lexists(folder / "model_index.json") else None
    if index is None and (folder / "scheduler").is_dir() and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} has a scheduler, but no model_index.json that says which pipeline it is; copy the folder again, or give"
            " the folder of its transformer alone"
        )
    if index is None and ((folder / "config.json").exists() or (folder / "transformer" / "config.json").exists()):
        bare = (folder / "config.json").exists()
        source = Source(model, folder, _bare_parts(folder), bare, memory_budget=memory_budget)
        named_parts(components, source.parts, str(folder))
        _check_class(source, weights)
        return BareTransformer(**_compiled(source, dict.fromkeys(source.parts), dtype, budget, accept_config)), source
    if index is None or not isinstance(index.get("_class_name"), str):
        raise ValueError(
            f"{folder} is no diffusers model: it has neither a model_index.json naming a pipeline class nor the config.json of a"
            " transformer; give the folder that holds one of them"
        )
    cls = _pipeline_class(index["_class_name"], folder)
    present = _components(folder, index)
    found = tuple(name for name in PARTS if name in present)
    if not found:
        raise ValueError(f"{folder}: {index['_class_name']} has no transformer; quantdit quantizes diffusion transformers")
    source = Source(model, folder, found, memory_budget=memory_budget)
    _check_class(source, weights)
    encoders = [name for name in ENCODERS if present.get(name, ("",))[0] == TRANSFORMERS.name]
    source = replace(source, parts=named_parts(components, (*found, *encoders), str(folder)))
    # A pipeline is sampled with its transformers, whether they are to be quantized or not.
    ours = (*found, *source.encoders)
    transformers = _compiled(source, {name: present[name][1] for name in ours}, dtype, budget, accept_config)
    others = {name: entry for name, entry in present.items() if name not in ours}
    variants = {variant for name in others if (variant := files.variant_of(folder / name)) is not None}
    if len(variants) > 1:
        raise ValueError(f"{folder} holds its components as several variants ({', '.join(sorted(variants))}); leave one")
    variant = {"variant": variants.pop()} if variants else {}
    offloaded = _text_encoders(folder, others, budget // 4)
    parts = transformers | offloaded
    stays = offloaded or any(is_streamed(t) for t in transformers.values())
    try:
        with warnings.catch_warnings():
            # The newest diffusers says `dtype` and warns of `torch_dtype`; the older ones know only the latter.
            warnings.simplefilter("ignore", FutureWarning)
            options = {"torch_dtype": dtype, "local_files_only": True, "use_safetensors": True, **variant}
            pipeline = cls.from_pretrained(folder, **options, **parts)
        for name in others.keys() - offloaded.keys():
            if isinstance(component := getattr(pipeline, name, None), nn.Module):
                checkpoint.check_in_memory(component, folder / name)
        pipeline.set_progress_bar_config(disable=True)
        return (pipeline if stays else pipeline.to(device)), source
    except files.CheckpointError:
        raise
    except Exception as error:  # the classes of a hostile folder's components may fail in any way
        raise ValueError(f"{folder}: {cls.__name__} cannot be loaded: {_in_a_line(error)}") from error


def _in_a_line(error: Exception) -> str:
    return f"{(str(error).strip() or type(error).__name__).splitlines()[0]:.300}"


def _components(folder: Path, index: dict) -> dict[str, tuple[str, str]]:
    """Return library and class of each component that a model_index.json names, having looked at their files.

    Raises:
        CheckpointError: a name that leaves the folder, a config that is no JSON or would build forever, or what is no file where
            one belongs.
    """
    where, found = folder / "model_index.json", {}
    for name, entry in index.items():
        # Other lists are settings of the pipeline; [null, null] is a component that it does without.
        if name.startswith("_") or not isinstance(entry, list) or [type(word) for word in entry] != [str, str]:
            continue
        if not name.isidentifier():
            raise files.CheckpointError(f"{where}: component {name!r:.80} has no name of a folder; copy the folder again")
        found[name] = tuple(entry)
    for path in sorted((*folder.iterdir(), *(path for name in found for path in _inside(folder / name)))):
        if path.exists() and not path.is_dir():
            files.check_regular(path)
    for name in found.keys() - set(PARTS):
        for path in _inside(folder / name):
            if path.name == "config.json":
                weights = (file for file in _inside(folder / name) if file.suffix == ".safetensors")
                library = DIFFUSERS if found[name][0] == DIFFUSERS.name else TRANSFORMERS
                checkpoint.check_numbers(files.read_json(path, finite=False), sum(map(_tensors, weights)), path, library.largest)
    if (path := folder / checkpoint.SCHEDULER).exists():
        checkpoint.check_numbers(files.read_json(path, finite=False), 0, path)
    return found


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _text_encoders(folder: Path, components: dict, room: int) -> dict[str, nn.Module]:
    """Return the text encoders that take more than `room` bytes as float32, most of their layers left on the disk.

    They keep the dtype they are stored in. Prompts are encoded once, so the time of reading them matters little.
    """
    found: dict[str, nn.Module] = {}
    for name, (library, cls) in components.items():
        paths = sorted((folder / name).glob("*.safetensors")) if library == "transformers" else []
        if sum(_numbers(path) for path in paths) * torch.float32.itemsize > room:
            import transformers

            options = {"device_map": "auto", "max_memory": {"cpu": room}, "local_files_only": True, "use_safetensors": True}
            try:
                encoder, variant = getattr(transformers, cls), files.variant_of(folder / name)
                found[name] = encoder.from_pretrained(folder / name, torch_dtype="auto", variant=variant, **options).eval()
            except Exception as error:  # the classes of a hostile folder's components may fail in any way
                raise ValueError(f"{folder / name}: {cls} cannot be loaded: {_in_a_line(error)}") from error
    return found


def _tensors(path: Path) -> int:
    with files.open_weights(path) as file:
        return len(file.keys())


def _numbers(path: Path) -> int:
    with files.open_weights(path) as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 - not a mapping


def _check_class(source: Source, weights: Path | None) -> None:
    """Refuse weights of another class than the known model that they are said to be of."""
    if weights is None or source.name not in KNOWN_MODELS:
        return
    expected = KNOWN_MODELS[source.name].transformer
    missing = [name for name in KNOWN_MODELS[source.name].transformers if name not in source.parts]
    if missing:
        raise ValueError(
            f"{source.folder} has no {missing[0]}, which {source.name} has as well; give a folder with all its transformers,"
            " or this one as --model to quantize what it has"
        )
    for name in source.parts:
        found = files.read_json(source.part(name) / "config.json").get("_class_name")
        if found != expected:
            raise ValueError(
                f"{source.part(name)} holds a {found}, but {source.name} is a {expected}; give that model's weights, or this"
                " folder alone as --model"
            )


def _bare_parts(folder: Path) -> tuple[str, ...]:
    return tuple(name for name in PARTS if (folder / name / "config.json").exists()) or PARTS[:1]


def named_parts(asked: str | Sequence[str], known: Sequence[str], model: str) -> tuple[str, ...]:
    """Return which of a pipeline's transformers and text encoders are meant, in the order of `known`.

    Args:
        asked: their names, in a list or with commas between; `transformer` means all transformers, `all` means `known`.
        known: those that there are.
        model: what the error calls it.

    Raises:
        ValueError: a name that is none of them, or no name; says which there are.
    """
    words = [word.strip() for word in asked.split(",") if word.strip()] if isinstance(asked, str) else list(asked)
    meant = {name: [name] for name in known}
    meant |= {PARTS[0]: [name for name in known if name in PARTS], EVERYTHING: list(known)}
    if wrong := next((word for word in words if word not in meant), None):
        raise ValueError(f"{model} has no component {wrong!r} that can be quantized; it has {', '.join(known)}, or {EVERYTHING}")
    if not words:
        raise ValueError(f"components is empty; {model} has {', '.join(known)}, or {EVERYTHING}")
    chosen = {name for word in words for name in meant[word]}
    return tuple(name for name in known if name in chosen)


def _compiled(
    source: Source, names: Mapping[str, str | None], dtype: torch.dtype, budget: int, accept_config: bool
) -> dict[str, nn.Module]:
    """Return the parts of these names that are, or can be, quantized, of the classes that their pipeline says.

    Diffusers' own loader would take any tensors for their weights, so that it is not asked.
    """
    parts: dict[str, nn.Module] = {}
    needs: dict[str, streaming.Need] = {}
    for name in names:
        folder = source.part(name)
        if checkpoint.is_quantized(folder) and name in ENCODERS:
            raise files.CheckpointError(f"{folder} is quantized already; calibrate from the full-precision model")
        if checkpoint.is_quantized(folder):
            parts[name] = _as_diffusers_would(checkpoint.read_transformer(folder, dtype, accept_config), folder)
            if not accept_config and not source.bare:
                checkpoint.check_scheduler(source.folder, folder)
            continue
        needs[name] = streaming.need_of(folder, dtype, names[name])
    if not needs:
        return parts
    need = functools.reduce(operator.add, needs.values())
    if need.resident > budget and need.streamed > budget:
        raise ValueError(
            f"a memory budget of {memory.in_gib(budget)} is too small for {source.label}: a block at a time needs about"
            f" {memory.in_gib(need.streamed)}; give at least --memory-budget {memory.in_gib(need.streamed)}"
        )
    read = streaming.skeleton if need.resident > budget else streaming.whole
    return parts | {name: read(source.part(name), dtype, names[name]) for name in needs}


def _as_diffusers_would(transformer: nn.Module, folder: Path) -> nn.Module:
    """Make a quantized transformer one that diffusers can save."""
    from quantdit.integrations.attaching import attach

    quantization = files.read_json(folder / "config.json")["quantization_config"]
    return attach(transformer, quantization | {"spec": checkpoint.FORMAT_VERSION})  # what it would be saved as


def sampling_arguments(
    pipeline: Any, count: int, prompts: Sequence[str] | None = None, classes: Sequence[int | str] | None = None
) -> dict:
    """Return the `prompt` or `class_labels` argument for `count` images or clips: the given ones in turn, or a spread of our own.

    Raises:
        ValueError: the pipeline takes neither, needs something else, such as an image, or has no such class.
    """
    accepted, prompts, classes = accepted_arguments(pipeline), as_list(prompts), as_list(classes)
    _check_needs(pipeline)
    if "class_labels" in accepted:
        known = pipeline.transformer.config.num_embeds_ada_norm
        if prompts:
            raise ValueError(f"{type(pipeline).__name__} draws classes and takes no prompts; leave out --prompts")
        # Few images of many classes: evenly spaced ones, so that they differ.
        chosen = [class_number(pipeline, c) for c in classes or range(0, known, max(1, known // count))]
        return {"class_labels": [chosen[i % len(chosen)] for i in range(count)]}
    if "prompt" in accepted:
        if classes:
            raise ValueError(f"{type(pipeline).__name__} draws prompts and knows no classes; use --prompts")
        # Prompts that the pipeline has embeddings of need no text encoder.
        chosen = list(prompts or getattr(pipeline, "prompts", ()) or PROMPTS)
        return {"prompt": [chosen[i % len(chosen)] for i in range(count)]}
    raise ValueError(f"{type(pipeline).__name__} takes neither class_labels nor prompt; quantdit cannot sample from it")


def _check_needs(pipeline: object) -> None:
    """Refuse a pipeline that cannot be called with a prompt or classes alone."""
    _, *parameters = accepted_arguments(pipeline).values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if missing := [name for name in needed if name not in GIVEN]:
        given = ", ".join(f"{name}=..." for name in needed)
        raise ValueError(
            f"{type(pipeline).__name__} needs {' and '.join(missing)}, which the command line cannot give it; in Python:"
            f" quantdit.load(FOLDER)({given}). To quantize it: quantdit calibrate --samples 0, or"
            f" quantdit.quantize(pipeline.transformer, 'w4a8', inputs=lambda: pipeline({given}))"
        )


def accepted_arguments(pipeline: object) -> Mapping[str, inspect.Parameter]:
    """Return what the pipeline takes when it is called, by name."""
    if isinstance(pipeline, BareTransformer):
        raise ValueError(
            "this folder has a transformer and no pipeline around it, so nothing can be sampled from it; put the transformer into"
            " a copy of its pipeline's folder"
        )
    return inspect.signature(type(pipeline).__call__).parameters


def makes_clips(pipeline: object) -> bool:
    """Tell whether a pipeline makes clips rather than images: such a one takes a number of frames."""
    return not accepted_arguments(pipeline).keys().isdisjoint(SIZES["frames"])


def sample_seed(seed: int, number: int) -> int:
    """Return the seed of the noise of image or clip `number` of a run."""
    return seed * 2**20 + number


class Asked(Protocol):
    """What a pipeline is asked for: `steps`, and any of OPTIONS, as a Sampling and a SamplingPlan are."""

    @property
    def steps(self) -> int: ...


def call_options(pipeline: object, asked: Asked) -> dict[str, object]:
    """Return what a pipeline is called with besides prompts and noise: the steps, and what is asked for of OPTIONS.

    Args:
        pipeline: a `sizes` of its own, where it has one, are the only ones it takes.
        asked: a Sampling or a SamplingPlan; None for one of OPTIONS keeps the pipeline's default.

    Raises:
        ValueError: the pipeline does not take one of them.
    """
    accepted, own = accepted_arguments(pipeline), getattr(pipeline, "sizes", {})
    found: dict[str, object] = {"num_inference_steps": asked.steps}
    for option, names in OPTIONS.items():
        value, flag = getattr(asked, option, None), f"--{option.replace('_', '-')}"
        if value is None:
            continue
        name = next((name for name in names if name in accepted), None)
        if name is None:
            raise ValueError(f"{type(pipeline).__name__} takes no {option.replace('_', ' ')}; leave out {flag}")
        if own.get(option, value) != value:
            raise ValueError(f"{type(pipeline).__name__} makes samples of {option} {own[option]} alone; leave out {flag}")
        found[name] = value
    return found


def samples_of(output: Any) -> Tensor:
    """Return what a pipeline made, its output left as numpy floats, as `[n, ..., c, h, w]` float32 in [-1, 1]."""
    pixels = torch.from_numpy(output.frames if hasattr(output, "frames") else output.images)
    return pixels.movedim(-1, -3).float() * 2 - 1


def seeded_batches(arguments: Mapping[str, list], count: int, seed: int, batch: int) -> Iterator[dict]:
    """Yield what to call a pipeline with for each batch: its part of the arguments, and a generator for each image or clip.

    Image or clip i has the seed `sample_seed(seed, i)`.
    """
    for start in range(0, count, batch):
        end = min(start + batch, count)
        generators = [torch.Generator().manual_seed(sample_seed(seed, i)) for i in range(start, end)]
        yield {key: values[start:end] for key, values in arguments.items()} | {"generator": generators}


def generate(
    pipeline,
    count: int,
    seed: int,
    steps: int,
    guidance: float | None = None,
    batch: int = 32,
    prompts: Sequence[str] | None = None,
    description: str = "generate",
    **options: Any,
) -> Tensor:
    """Sample `count` images `[n, c, h, w]` or, from a video pipeline, clips `[n, f, c, h, w]`; float32 in [-1, 1].

    Image or clip i depends on its batch in the last bits of floats alone (`seeded_batches`). `options` are Sampling's.

    Raises:
        ValueError: the pipeline does not take what is asked for.
    """
    asked = Sampling(count, seed, steps, guidance, prompts, batch, **options)
    arguments = sampling_arguments(pipeline, count, asked.prompts, asked.classes)
    extra, images = call_options(pipeline, asked), []
    with progress.denoising(pipeline, -(-count // batch), steps, description) as batch_done:
        for part in seeded_batches(arguments, count, seed, batch):
            images.append(samples_of(pipeline(**part, **extra, output_type="np")))
            batch_done()
    return torch.cat(images)


def _check_device(device: str | torch.device) -> None:
    try:
        kind = torch.device(device).type
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ValueError(
            f"device {str(device)!r} is not available on this machine; use cpu, or cuda where there is a GPU"
        ) from error
    if kind == "meta":
        raise ValueError("device 'meta' holds no numbers; use cpu, or cuda where there is a GPU")


def _pipeline_class(name: str, folder: Path) -> type:
    # The module of DiffusionPipeline brings our classes along (quantdit.integrations.diffusers_saving).
    import diffusers
    from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage] - exported lazily

    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, DiffusionPipeline)):
        raise ValueError(
            f"{folder}: the installed diffusers has no pipeline class {name!r}; upgrade it with pip install -U diffusers"
        )
    return cls


def _download(model: str, hub: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub, ignore_patterns=["*.bin", "*.ckpt", "*.pth", "*.onnx", "*.msgpack"]))
    except Exception as error:  # the hub's transport raises errors of whatever library it is built on
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        folder = hub.split("/")[1]
        raise ValueError(
            f"there is no folder {hub} here, and it cannot be fetched from the hub ({reason}). Where there is a network, run:"
            f" hf download {hub} --local-dir {folder}; copy that folder here and give it as --model"
            f" PATH/{folder}, or to calibrate with --weights PATH/{folder}. To measure time, memory and size without the weights:"
            " quantdit calibrate --random-weights"
        ) from error

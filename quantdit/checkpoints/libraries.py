"""What differs between the libraries whose models are quantized: diffusers has the transformers, transformers the encoders.

Each says which class a config names and builds it, what of a config is settings and what notes, what weight files are called,
which tensors stay float32, and under which names files hold the tensors of a model.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantdit.system import files
from quantdit.system.files import CheckpointError

# Of transformers' configs: the dtype a model was saved in, the versions, and what would choose other code or other files.
NOTES = {"dtype", "torch_dtype", "transformers_version", "auto_map", "attn_implementation", "experts_implementation"}
NOTES |= {"architectures", "transformers_weights", "quantization_config"}


@dataclass(frozen=True)
class Library:
    """One of the two libraries.

    Attributes:
        name: of its package.
        weights: what it calls the file of a model's weights.
        largest: number in a config of its models, bases of rotary embeddings aside; vocabularies and contexts are numbers too.
        class_name: config -> the name of the class that it is of.
        build: class, config -> the model, on whatever device is the default.
        settings: config -> the class and what the model is made of, without what the library notes down beside it.
        stated: model -> the same of a model, as JSON.
        notes: model -> its class, and what config.json notes down beside its settings.
        defaults: class -> its config's defaults by key, as far as they tell numbers from texts.
        float32: model, dtype that it is loaded in -> parts of the names of tensors that stay float32.
        renamed: model, name of a tensor in a file -> its name in the model.
    """

    name: str
    weights: str
    largest: int
    class_name: Callable[[Mapping], object]
    build: Callable[[Any, dict], nn.Module]
    settings: Callable[[Mapping], dict]
    stated: Callable[[Any], dict]
    notes: Callable[[Any], dict]
    defaults: Callable[[Any], dict[str, object]]
    float32: Callable[[Any, torch.dtype], set[str]]
    renamed: Callable[[Any], Callable[[str], str]]

    def class_of(self, config: Mapping, where: Path) -> Any:
        """Return the model class that a config names.

        Raises:
            CheckpointError: the library has none of this name.
        """
        named = self.class_name(config)
        cls = getattr(importlib.import_module(self.name), named, None) if isinstance(named, str) else None
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise CheckpointError(f"{where}: {self.name} {version(self.name)} has no model class {named!r:.80}")
        return cls


def library_of(model: nn.Module) -> Library:
    """Return the library that a model's class is of."""
    return TRANSFORMERS if hasattr(getattr(model, "config", None), "to_diff_dict") else DIFFUSERS


def library_of_config(config: Mapping) -> Library:
    """Return the library that a config.json is of."""
    return TRANSFORMERS if "_class_name" not in config and "architectures" in config else DIFFUSERS


def config_of(model: nn.Module) -> dict:
    """Return what config.json says of a model besides its quantization and notes, as JSON has it."""
    return library_of(model).stated(model)


def settings_of(config: Mapping) -> dict:
    """Return the class and the settings of a config, without what its library notes down beside them."""
    return library_of_config(config).settings(config)


def aliases(model: nn.Module) -> dict[str, str]:
    """Return the state-dict keys whose tensor has another key before them, and that key: files hold tied tensors once."""
    if library_of(model) is DIFFUSERS:  # whose classes tie nothing
        return {}
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {key: first[id(t)] for key, t in state.items() if first.setdefault(id(t), key) != key}


def names_in(model: nn.Module, found: Iterable[str]) -> dict[str, str]:
    """Return under which of the names in its files each tensor of a model lies; superfluous ones under their own.

    transformers renames tensors while it loads, and takes a tied tensor under any of its names.

    Raises:
        CheckpointError: the model's class makes a tensor of several, which quantdit does not read.
    """
    own, rename, tied = model.state_dict().keys(), library_of(model).renamed(model), aliases(model)
    names = {name if name in own else rename(name): name for name in found}
    return {tied[name] if name in tied and tied[name] not in names else name: key for name, key in names.items()}


def tie(model: nn.Module) -> None:
    """Make tensors that a class of transformers ties the same again."""
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # pyright: ignore[reportCallIssue] - a method of PreTrainedModel


# ---- diffusers


def _settings(config: Mapping) -> dict:
    return {k: v for k, v in config.items() if (not k.startswith("_") or k == "_class_name") and k != "quantization_config"}


def _stated(model: Any) -> dict:
    config = {key: value for key, value in dict(model.config).items() if _is_json(value)}
    return _settings(json.loads(json.dumps(config | {"_class_name": type(model).__name__})))


def _defaults(cls: Any) -> dict[str, object]:
    return {key: parameter.default for key, parameter in inspect.signature(cls.__init__).parameters.items()}


def _float32(model: Any, dtype: torch.dtype) -> set[str]:
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return {kept} if isinstance(kept, str) else set(kept)


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


DIFFUSERS = Library(
    name="diffusers",
    weights=files.WEIGHTS,
    largest=2**20,
    class_name=lambda config: config.get("_class_name"),
    build=lambda cls, config: cls.from_config({k: v for k, v in config.items() if k != "quantization_config"}),
    settings=_settings,
    stated=_stated,
    notes=lambda model: {"_class_name": type(model).__name__, "_diffusers_version": version("diffusers")},
    defaults=_defaults,
    float32=_float32,
    renamed=lambda model: str,
)


# ---- transformers


def _encoder_class(config: Mapping) -> object:
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named else None


def _build_encoder(cls: Any, config: dict) -> nn.Module:
    own = cls.config_class.from_dict(_without_notes(config))
    model = cls._from_config(own, dtype=torch.float32)
    if not all(isinstance(module.config.model_type, str) for module in model.modules() if hasattr(module, "config")):
        raise ValueError("model_type must be text")
    dtype = config.get("dtype", config.get("torch_dtype"))
    own.dtype = dtype if dtype in ("float32", "float16", "bfloat16") else None
    return model


def _without_notes(config: Mapping) -> dict:
    return {
        key: _without_notes(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not (key.startswith("_") or key in NOTES)
    }


def _encoder_settings(config: Mapping) -> dict:
    return {"architectures": config.get("architectures")} | _without_notes(config)


def _encoder_stated(model: Any) -> dict:
    config = json.loads(model.config.to_json_string())
    return _encoder_settings(config | {"architectures": [type(model).__name__]})


def _encoder_notes(model: Any) -> dict:
    noted = {"architectures": [type(model).__name__], "transformers_version": version("transformers")}
    return noted | ({"dtype": str(dtype).removeprefix("torch.")} if (dtype := model.config.dtype) else {})


def _renamed(model: Any) -> Callable[[str], str]:
    """Return what renames a tensor of a file as transformers would, which knows what earlier versions called it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    known = get_model_conversion_mapping(model)
    renamings = [each for each in known if isinstance(each, WeightRenaming)]
    converters = [each for each in known if isinstance(each, WeightConverter)]
    state = model.state_dict()

    def rename(name: str) -> str:
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converted is not None:
            raise CheckpointError(
                f"transformers makes {renamed} of {name} and others while it loads, which quantdit does not read"
            )
        return renamed

    return rename


TRANSFORMERS = Library(
    name="transformers",
    weights=files.ENCODER_WEIGHTS,
    largest=2**31,
    class_name=_encoder_class,
    build=_build_encoder,
    settings=_encoder_settings,
    stated=_encoder_stated,
    notes=_encoder_notes,
    defaults=lambda cls: {},
    # Of the `strict` modules in either 16-bit dtype, of the others in float16 alone.
    float32=lambda model, dtype: set(model._get_dtype_plan(dtype)),
    renamed=_renamed,
)

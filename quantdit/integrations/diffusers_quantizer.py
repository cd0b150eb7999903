"""`quant_method: quantdit` for diffusers: `from_pretrained` of a quantized folder, and quantization while a model loads.

diffusers builds the model on the meta device and then hands over the weight files shard by shard (its `quantizers/base.py`).
The tensors of quantized layers are taken out before its loader, which would cast their float32 scales, sees them.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

import quantdit
from quantdit.calibration.data_free import quantize_without_data, unit_seed
from quantdit.checkpoints import checkpoint, class_tree, sources
from quantdit.checkpoints.checkpoint import METHOD, CheckpointError
from quantdit.integrations.import_hooks import watch
from quantdit.layers.quant_linear import QuantLinear, dense_linear
from quantdit.models import adapter as adapters
from quantdit.recipes.presets import BEST, from_any, from_bits, with_weight_format
from quantdit.recipes.resolve import resolve, without_data
from quantdit.recipes.rules import DENSE, LayerPlan, Recipe, Rule
from quantdit.system import files
from quantdit.tensors.layer_spec import LayerSpec, as_computed, as_stored, layer_fields

WHERE = Path("config.json")
SINGLE = Path("the single file")  # whose name from_single_file does not tell
CALIBRATE = "loading has none: give bits such as 'w4a8', or calibrate with quantdit.quantize(model, recipe, inputs=...)"


class Method(str, Enum):  # noqa: UP042 - diffusers asks for `.value`, and for a key of its tables
    """The name that diffusers knows the quantizer by."""

    QUANTDIT = METHOD


class QuantDiTConfig(QuantizationConfigMixin):
    """How a model is quantized while `from_pretrained` loads it, or what a quantized folder says that it is.

    Args:
        bits: a preset, such as `w4a8`.
        recipe: instead of it a Recipe, the path of a TOML file, or a recipe's dictionary.
        weight_format: with bits: a kind of recipe.WEIGHT_FORMATS, instead of what the preset has.
        modules_to_not_convert: parts of names of layers that are left alone.
        seed: of random signs and k-means.
        method: with bits, `best`; those of papers (presets.METHODS) calibrate, which loading cannot.
        state: of a quantized folder, its `quantization_config`.

    Loading needs no data: round to nearest, fixed rotations (`quantdit calibrate --samples 0`). For more, calibrate.

    Raises:
        ValueError: neither bits nor a recipe, or both; or as `recipe.from_bits`, `recipe.from_toml`.
        TypeError: an unknown argument.
    """

    def __init__(
        self,
        bits: str | None = None,
        recipe: Recipe | dict | str | Path | None = None,
        weight_format: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        seed: int = 0,
        method: str = BEST,
        **state: object,
    ) -> None:
        self.quant_method = Method.QUANTDIT  # pyright: ignore[reportAttributeAccessIssue] - the base knows its own methods alone
        self.seed = seed
        # Of a later version's folder anything may be there: its spec, checked first, says what to do.
        self.state = {**state, "recipe": recipe} if "spec" in state else None
        if self.state is not None:
            return
        if unknown := sorted(state.keys() - {"quant_method"}):
            raise TypeError(f"QuantDiTConfig takes no {unknown[0]!r}; give bits='w4a8' or recipe='mine.toml'")
        if not isinstance(bits, str | None):
            raise ValueError(
                f"QuantDiTConfig: bits is {bits!r}, expected text such as 'w4a8', 4 bits a weight and 8 an activation"
            )
        if bits is not None and recipe is None:
            wanted = from_bits(bits, method)
        elif recipe is not None and bits is None:
            wanted = from_any(recipe, method)
        else:
            raise ValueError("QuantDiTConfig takes bits='w4a8' or recipe='mine.toml', one of the two")
        if method != BEST:
            raise ValueError(
                f"method {method!r} needs calibration data, and loading has none: calibrate with quantdit calibrate --method"
                f" {method}, or with quantdit.quantize(model, {bits!r}, inputs=..., method={method!r})"
            )
        wanted = with_weight_format(wanted, weight_format) if weight_format else wanted
        left_alone = tuple(Rule(f"*{name}*", weight=DENSE, optional=True) for name in modules_to_not_convert or ())
        self.recipe = Recipe(wanted.name, (*left_alone, *without_data(wanted, CALIBRATE).rules))

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return the configuration that a dictionary, such as that of a folder, is of; with unused keywords if asked for.

        Raises:
            ValueError: it is of none.
        """
        try:
            return super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        except TypeError as error:
            raise ValueError(f"quantization_config of quantdit: {error}") from error

    def to_dict(self) -> dict:
        """Return the quantization_config of config.json, without the sha256 of weights that are not written yet."""
        if self.state is None:
            return {"quant_method": METHOD, "recipe": self.recipe.to_dict(), "seed": self.seed}
        return {key: value for key, value in self.state.items() if key not in ("sha256",)} | {"quant_method": METHOD}

    def to_diff_dict(self) -> dict:
        """Return `to_dict()`, which the base class prints."""
        return self.to_dict()

    def __repr__(self) -> str:
        """Name the recipe and the number of layers, not every layer."""
        named = self.recipe.to_dict() if self.state is None else self.state.get("recipe")
        layers = None if self.state is None else self.state.get("layers")
        counted = f", {len(layers)} layers" if isinstance(layers, dict) else ""
        return f"QuantDiTConfig({named.get('name') if isinstance(named, dict) else None!r}{counted})"


class QuantDiTQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads or saves a model; see its base class for when."""

    requires_calibration = False
    required_packages = (METHOD,)
    use_keep_in_fp32_modules = True
    # Properties of the base class.
    is_serializable = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    is_trainable = True  # of adapters on it  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    is_compileable = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    quantization_config: QuantDiTConfig

    def __init__(self, quantization_config: QuantDiTConfig, **kwargs: object) -> None:
        super().__init__(quantization_config, **kwargs)
        if kwargs.get("pre_quantized") and not self._stored:  # from_single_file says nothing
            raise CheckpointError(f"{WHERE}: quantization_config of quantdit has no spec; copy the folder again")
        self.config: dict = {}  # of the model that is saved
        self._dtype = torch.float32
        self._paths: list[Path] = []
        self._places: dict[str, Path] = {}  # of a full-precision source's tensors
        self._model: nn.Module | None = None  # while it loads
        self._edges: tuple[float, ...] = ()
        self._own: set[str] = set()
        self._plans: dict[str, LayerPlan] = {}
        self._seeds: dict[str, int] = {}
        self._errors: dict[str, dict[str, float]] = {}  # of layers that are quantized while the model loads

    @property
    def _stored(self) -> bool:
        return self.quantization_config.state is not None

    @property
    def _state(self) -> dict:
        """What config.json says, or is to say, of the model."""
        state = self.quantization_config.state
        assert state is not None  # of a quantized folder, or once the model has been quantized
        return state

    def validate_environment(self, *args: object, device_map: object = None, **kwargs: object) -> None:
        """Refuse a checkpoint of another spec, and layers that are to be quantized but would go to the disk as they are."""
        if self._stored:
            checkpoint.check_version(self._state, WHERE)
        elif isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("what is on the disk is not quantized while it loads; calibrate the model first, or leave out disk")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Return float32 for None, as diffusers does without a quantizer."""
        self._dtype = torch_dtype if torch_dtype is not None else torch.float32
        return self._dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember the files, and return the names without those of scales beside float8 weights."""
        self._paths = [Path(path) for path in checkpoint_files]
        if any(path.suffix != ".safetensors" for path in self._paths):
            raise CheckpointError(f"{self._paths[0]}: quantdit reads safetensors files; copy the folder again")
        return loaded_keys if self._stored else [key for key in loaded_keys if not sources.is_beside(key)]

    def _process_model_before_weight_loading(
        self, model: nn.Module, state_dict: dict[str, Tensor] | None = None, **kwargs: object
    ) -> None:
        where = self._paths[0].parent / WHERE.name if self._paths else WHERE
        self._model = model
        if self._stored:
            if not self._paths:
                raise ValueError("a quantized folder is read with from_pretrained, not with from_single_file")
            config = files.read_json(where)
            self._edges = checkpoint.prepare(model, self._state, self._paths, where, config)
            self._own = checkpoint.own_keys(model)
            return
        if self._paths:
            stored = files.stored_tensors(self._paths)
            checkpoint.check_plausible(files.read_json(where), len(stored), where)
            self._places = {key: tensor.path for key, tensor in stored.items()}
        else:
            stored = sources.described(state_dict or {}, SINGLE)
        sources.check(model, stored)
        adapter = adapters.adapter_for(model)
        self._plans = resolve(self.quantization_config.recipe, adapters.layers(model, adapter))
        paths = [path for path, _ in adapters.blocks(model, adapter)]
        for name in self._plans:
            number = next((i for i, path in enumerate(paths) if name.startswith(f"{path}.")), len(paths))
            self._seeds[name] = unit_seed(self.quantization_config.seed, number)
        if not self._plans:
            raise ValueError(f"recipe {self.quantization_config.recipe.name} leaves every layer dense; give another")

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put the tensors of quantized layers into place and return the others; those of a source as floats of the model's dtype.

        Copies: a mapped tensor keeps its file's pages in memory, and how it lies in there decides which routine multiplies with
        it, and so the last bits.
        """
        if not self._stored:
            if self._model is None:  # a single file, whose tensors have the names of the original model still
                sources.check_scales(sources.described(state_dict, SINGLE))
            return {key: self._weight(key, state_dict) for key in state_dict if not sources.is_beside(key)}
        assert self._model is not None  # a folder's model is there before its tensors
        dense = {}
        for key, tensor in state_dict.items():
            if key not in self._own:
                dense[key] = tensor.clone()
                checkpoint.check_dense(key, tensor.to(self._dtype_of(key)), self._paths[0].parent)
                continue
            name, _, field = key.rpartition(".")
            self._model.get_submodule(name)._buffers[field] = as_computed(field, tensor)
        return dense

    def _weight(self, key: str, state_dict: dict[str, Tensor]) -> Tensor:
        """Return a source's tensor, float8 ones multiplied by their scale, which may lie in another file."""
        tensor = state_dict[key]
        if files.is_float8(tensor):
            name = sources.scale_of(key, self._places or state_dict)
            scale = None if name is None else state_dict[name] if name in state_dict else self._read(name)
            tensor = sources.scaled(tensor, scale).to(self._dtype_of(key))
        if tensor.is_floating_point():
            files.check_finite(key, tensor.to(self._dtype_of(key)))
        return tensor

    def _read(self, key: str) -> Tensor:
        with files.open_weights(self._places[key]) as file:
            return file.get_tensor(key)

    def _dtype_of(self, key: str) -> torch.dtype:
        return torch.float32 if self._model is not None and checkpoint.stays_float32(self._model, key) else self._dtype

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Tensor], **kwargs: object
    ) -> bool:
        """Tell whether this is the full-precision weight of a layer that is to be quantized."""
        name, _, field = param_name.rpartition(".")
        return field == "weight" and name in self._plans

    def create_quantized_param(  # pyright: ignore[reportIncompatibleMethodOverride] - the base returns nothing either
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: torch.device, *args: object, **kwargs: object
    ) -> None:
        """Quantize a layer's weight, on the CPU, and put the layer in its place; the bias comes or came by itself."""
        name = param_name.rpartition(".")[0]
        files.check_finite(param_name, param_value)
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)  # as the plans' layers are
        made = quantize_without_data(param_value.cpu(), None, self._plans[name], self._seeds[name])
        layer = QuantLinear.from_tensors(made.spec, {key: t.to(target_device) for key, t in made.tensors.items()}, None)
        layer.bias = linear.bias
        model.set_submodule(name, layer)
        self._errors[name] = {"weight_rel_rmse": made.report["weight_rel_rmse"]}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: object) -> Any:  # a ModelMixin
        checkpoint.set_weight_dtype(model, self._dtype)
        if self._stored:
            checkpoint.finish(model, self._edges, self._paths[0].parent)
        else:
            made = checkpoint.quant_layers(model)
            if missing := [name for name in self._plans if name not in made]:
                raise CheckpointError(
                    f"no file holds the weight of layer {missing[0]} (and {len(missing) - 1} more); copy it again"
                )
            config = self.quantization_config
            provenance = {"quantdit": quantdit.__version__, "calibration": {"samples": 0, "seed": config.seed}}
            provenance["layers"] = self._errors  # what `inspect` shows
            config.state = checkpoint.describe(model, config.recipe.to_dict(), provenance)
        self._state["spec"] = checkpoint.FORMAT_VERSION  # what it would be saved as
        # from_single_file leaves it out.
        model.register_to_config(quantization_config=self.quantization_config)
        if not any(hasattr(module, "_hf_hook") for module in model.modules()):  # accelerate has what it offloads elsewhere
            checkpoint.check_in_memory(model, self._paths[0].parent if self._paths else SINGLE)
        self._model, self._paths, self._places = None, [], {}
        # diffusers refuses to cast what says it is quantized; ours keeps its scales and casts the rest.
        model.is_quantized = False
        return model

    def check_savable(self, model: nn.Module, safe_serialization: bool = True, use_flashpack: bool = False) -> None:
        """Refuse what `save_pretrained` could not write, before it writes anything.

        Args:
            model: with this quantizer.
            safe_serialization: as `save_pretrained` takes it.
            use_flashpack: as `save_pretrained` takes it.

        Raises:
            ValueError: adapters are loaded or fused, or tensors are not those that the class builds from its config, so that the
                folder would not load again; weights that are not in memory; another format than safetensors.
        """
        if not safe_serialization or use_flashpack:
            wrong = "use_flashpack=True" if use_flashpack else "safe_serialization=False"
            raise ValueError(f"quantized models are saved as safetensors; leave out {wrong}")
        state, found = model.state_dict(), checkpoint.quant_layers(model)
        specs = self._layer_specs()
        fused = any(layer.layer_spec != specs.get(name) for name, layer in found.items())
        if fused or any(".lora_" in key or ".base_layer." in key for key in state):
            raise ValueError(
                "a quantized model with adapters, or with some fused into it, is not saved; unfuse_lora() and"
                " unload_lora_weights() first, and keep the adapter's own file"
            )
        if (wrong := class_tree.difference(model)) is not None:
            raise ValueError(f"this {type(model).__name__} would not load again: {wrong}")
        if lost := sorted(specs.keys() - found.keys()):
            raise ValueError(
                f"{lost[0]} is quantized by the config, but in the model it is a {type(model.get_submodule(lost[0])).__name__};"
                " put the quantized layer back, or load the model anew"
            )
        if away := [key for key, tensor in state.items() if tensor.device.type == "meta"]:
            raise ValueError(
                f"{away[0]} is not in memory, so the model cannot be saved; remove what offloads it, or load it anew"
            )

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what `save_pretrained` writes, of a model that passed `check_savable`: its tensors, and what the header says."""
        state = self._state
        stored = {f"{name}.{field}" for name, spec in self._layer_specs().items() for field in layer_fields(spec)}
        state_dict = {k: as_stored(k.rpartition(".")[2], t) if k in stored else t for k, t in state_dict.items()}
        header = {key: state[key] for key in ("spec", "recipe", "provenance")} | {"config": self.config}
        header["tensors_sha256"] = checkpoint.tensors_digest(state_dict.items())
        header["layers_sha256"] = checkpoint.layers_digest(state)
        return state_dict, {METHOD: json.dumps(header, sort_keys=True)}

    def _layer_specs(self) -> dict[str, LayerSpec]:
        """Return what config.json says of the quantized layers."""
        return {name: LayerSpec.from_dict(content) for name, content in self._state["layers"].items()}

    def _dequantize(self, model: Any) -> Any:
        return dequantize(model)


def dequantize(model: Any) -> Any:
    """Replace the quantized layers by ordinary linears of their weights, in place, in the model's dtype; returns the model.

    The model is a ModelMixin. Activations are no longer quantized.
    """
    from diffusers.configuration_utils import FrozenDict

    dtype = model.dtype
    for name, layer in checkpoint.quant_layers(model).items():
        model.set_submodule(name, dense_linear(layer, dtype))
    # Without this, save_pretrained would call it quantized.
    model._internal_dict = FrozenDict({key: value for key, value in model.config.items() if key != "quantization_config"})
    return model


def attach(model: Any, quantization: dict) -> Any:
    """Make a ModelMixin with QuantLinear layers what `from_pretrained` returns: one that diffusers can save and dequantize."""
    config = QuantDiTConfig(**quantization)
    model.hf_quantizer = QuantDiTQuantizer(config, pre_quantized=True)
    model.quantization_method = config.quant_method
    model.is_quantized = False
    model.register_to_config(quantization_config=config)
    return model


def register(auto: ModuleType) -> None:
    """Enter both classes into the tables of `diffusers.quantizers.auto`."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = QuantDiTQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QuantDiTConfig


watch()

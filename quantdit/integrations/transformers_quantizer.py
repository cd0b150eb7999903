"""`quant_method: quantdit` for transformers: `from_pretrained` of a quantized folder, and quantization while a model loads.

transformers builds the model on the meta device, and reads tensors in the dtype that its quantizer names (its
`quantizers/base.py`, `core_model_loading.py`): those of quantized layers in their own, whatever that of the model is.
"""

from __future__ import annotations

from collections.abc import MutableSet
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from quantdit.checkpoints import checkpoint, sources
from quantdit.checkpoints.checkpoint import METHOD, CheckpointError
from quantdit.checkpoints.libraries import library_of_config
from quantdit.integrations.import_hooks import watch
from quantdit.integrations.quantdit_config import QuantDiTConfig
from quantdit.integrations.quantizer import Quantizer
from quantdit.integrations.wrappers import checks_before_saving, counts_quantized, wrap
from quantdit.layers.quant_embedding import put_dense, put_layer
from quantdit.layers.quant_linear import QuantLinear
from quantdit.system import files


class QuantDiTHfQuantizer(Quantizer, HfQuantizer):
    """What transformers calls while it loads or saves a model; see its base class for when."""

    def __init__(self, quantization_config: QuantDiTConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtypes: dict[str, torch.dtype] = {}  # of the tensors of a stored model's quantized layers
        self._others: dict[str, QuantLinear] = {}  # by the further names that their modules have
        # What names of tensors in a quantized folder have before those in the model; None: as earlier versions called them.
        self._prefix: str | None = None
        self._source: dict[str, files.Stored] = {}  # what a model in full precision is read from
        self._wrong: ValueError | None = None  # what was found while transformers loaded, which would log it

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - the base has no annotation
        """Return that `save_pretrained` may write the model; `check_savable` says what is wrong with one."""
        return True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return a dtype that a model computes in: that of a file's first tensor, which may be float8, does not count."""
        self._dtype = dtype if dtype.itemsize > 1 else torch.float32
        return self._dtype

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        self._take_paths(checkpoint_files or ())
        _tie(model)
        with torch.device("cpu"):  # transformers has the meta device for the default
            if self._stored:
                self._prepare(model)
            else:
                self._check_source()
                self._plan(model)

    def _prepare(self, model: Any) -> None:
        if not self._paths:
            raise ValueError("a quantized folder is read with from_pretrained(folder), not with a state_dict")
        config = files.read_json(self._where)
        whole = model if type(model).__name__ == _class_name(config) else self._whole(config, type(model))
        self._edges = checkpoint.prepare(whole, self._state, self._paths, self._where, config)
        if files.tensors_in(self._paths).keys() <= whole.state_dict().keys():
            self._prefix = "" if whole is model else f"{whole.base_model_prefix}."
        if whole is not model:
            kept = checkpoint.quant_layers(whole.base_model)
            for name, layer in kept.items():
                put_layer(model, name, layer)
            specs = {name: layer.layer_spec.to_dict() for name, layer in kept.items()}
            self.quantization_config.state = self._state | {"layers": specs}
        layers = checkpoint.quant_layers(model)
        for name, layer in layers.items():
            layer.to(self._dtype)  # the bias alone
            self._dtypes |= {f"{name}.{field}": tensor.dtype for field, tensor in layer.tensors().items()}
        # transformers would allocate what it takes for missing: the other names of a layer have no tensors while it loads.
        for name, module in [*model.named_modules(remove_duplicate=False)]:
            if isinstance(module, QuantLinear) and name not in layers:
                self._others[name] = module
                model.set_submodule(name, nn.Identity())

    def _whole(self, config: dict, cls: type) -> Any:
        """Return the model that a folder holds, on the meta device, for one of class `cls` that is its part without a head.

        Raises:
            CheckpointError: `cls` is of no part of it.
        """
        whole: Any = checkpoint.build_on_meta(config, self._where.parent, compute_buffers=False)
        if type(whole.base_model) is not cls:
            stored = type(whole).__name__
            raise CheckpointError(
                f"{self._where}: the folder holds a quantized {stored}, not a {cls.__name__}; load it with"
                f" {stored}.from_pretrained"
            )
        _tie(whole)
        return whole

    def _check_source(self) -> None:
        """Refuse codes of another tool: transformers would cast them to floats.

        Raises:
            CheckpointError: naming a tensor.
        """
        self._source = files.stored_tensors(self._paths)
        for key, found in self._source.items():
            if sources.is_beside(key) or (key.endswith(".weight") and found.dtype not in sources.FLOATS):
                raise CheckpointError(
                    f"{found.path}: tensor {key} belongs to weights that another tool quantized, which are not read while a model"
                    f" loads; {sources.REMEDY}, or calibrate with quantdit calibrate"
                )

    def update_weight_conversions(self, weight_conversions: list, model: Any) -> list:
        """Return how a quantized folder's tensors are renamed: not, where they have the names that they have in the model."""
        from transformers.core_model_loading import WeightRenaming  # which imports what imports this module

        if self._prefix is None:
            return weight_conversions
        return [WeightRenaming(f"^{self._prefix}", "")] if self._prefix else []

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Return the dtype in which a quantized folder's tensor is read."""
        own = self._dtypes.get(converter.target_patterns[0])
        return super().get_new_dtype(converter, param, dtype) if own is None else own

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Tell whether this is the full-precision weight of a layer that is to be quantized."""
        return self._planned(model, param_name) is not None

    def _planned(self, model: Any, key: str) -> str | None:
        """Return the path of the planned layer that a weight is of; one that is tied to it may stand for it in the file."""
        source = model.all_tied_weights_keys.get(key, key)
        name, _, field = (key if source in self._source else source).rpartition(".")
        return name if field == "weight" and name in self._plans else None

    def get_quantize_ops(self) -> _Quantize:
        """Return what transformers calls with the weight of such a layer."""
        return _Quantize(self)

    def quantize(self, model: Any, key: str, weight: Tensor) -> set[str]:
        """Quantize a layer's weight and put the layer in its place; what is wrong is raised once transformers is done.

        Returns the weights that are no longer to be loaded.
        """
        name = self._planned(model, key)
        assert name is not None  # as transformers was told
        done = {key, *(target for target, source in model.all_tied_weights_keys.items() if source == f"{name}.weight")}
        try:
            self._put_quantized(model, name, weight, weight.device)
        except ValueError as error:
            self._wrong = self._wrong or error
        return done | {f"{name}.weight"}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._wrong is not None:
            raise self._wrong
        weights = self._where.parent
        for name, other in self._others.items():
            model.set_submodule(name, other)
        for layer in checkpoint.quant_layers(model).values():
            if layer.bias is not None:
                layer.bias.requires_grad_(False)
        _copy(model)
        own = checkpoint.own_keys(model)
        for key, tensor in checkpoint.stored_state(model).items():
            if key not in own and tensor.is_floating_point() and tensor.device.type != "meta":
                checkpoint.check_dense(key, tensor, weights)
        _check_offloaded(model, weights)
        self._finish(model, weights)
        self._source, self._others = {}, {}
        _keep_names(model)
        model.config.quantization_config = self.quantization_config
        model.is_quantized = False  # transformers refuses half() and float() of what says that it is
        return model

    def check_savable(self, model: nn.Module, safe_serialization: bool = True, use_flashpack: bool = False) -> None:
        """Refuse what could not be written, unless it is an adapter alone that is."""
        if not _has_adapter(model):
            super().check_savable(model, safe_serialization, use_flashpack)

    def get_state_dict_and_metadata(  # pyright: ignore[reportIncompatibleMethodOverride] - the base returns None and {}
        self, model: Any
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return what `save_pretrained` writes; nothing of ours where that is an adapter alone."""
        return (None, {}) if _has_adapter(model) else self._as_written(checkpoint.stored_state(model))

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Replace the quantized layers by ordinary ones of their weights, in place; returns the model.

        Args:
            model: with this quantizer.
            dtype: of the weights; None: as the layers were loaded or cast.
        """
        put_dense(model, dtype)
        self.remove_quantization_config(model)
        return model


class _Quantize:
    """One of transformers' conversion operations in all but name: to import their class here would import this module again."""

    def __init__(self, quantizer: QuantDiTHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, missing_keys: MutableSet[str], **kwargs: object
    ) -> dict[str, Tensor]:
        (found,) = input_dict.values()
        missing_keys -= self.quantizer.quantize(model, full_layer_name, found[0] if isinstance(found, list) else found)
        return {}


def _has_adapter(model: nn.Module) -> bool:
    """Return whether an adapter of transformers' own `load_adapter` or `add_adapter` is all that `save_pretrained` writes."""
    return getattr(model, "_hf_peft_config_loaded", False)


def _class_name(config: dict) -> object:
    return library_of_config(config).class_name(config)


def _tie(model: Any) -> None:
    """Tie what the model's class ties; `tie_weights` does nothing while transformers builds a model to load."""
    for target, source in model.all_tied_weights_keys.items():
        path, _, name = target.rpartition(".")
        setattr(model.get_submodule(path), name, model.get_parameter(source))


def _keep_names(model: Any) -> None:
    """Have transformers save tensors under the names that they have in the model, not under what earlier versions called them."""
    model._weight_conversions = []


def _check_offloaded(model: nn.Module, weights: Path) -> None:
    """Check quantized layers whose tensors accelerate keeps elsewhere, one at a time, as `checkpoint.finish` does the others."""
    for name, layer in checkpoint.quant_layers(model).items():
        if layer.data.device.type == "meta":
            from accelerate.utils import align_module_device  # accelerate is there: it put the layer there

            with align_module_device(layer):
                checkpoint.check_layer(name, layer, weights)


def _copy(model: nn.Module) -> None:
    """Copy what lies in mapped files, which would stay open; and how a tensor lies there decides which routine multiplies it."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "cpu":
                module._buffers[name] = buffer.clone()


def attach(model: Any, quantization: dict) -> Any:
    """Make a PreTrainedModel with QuantLinear layers what `from_pretrained` returns: one that can be saved and dequantized."""
    quantizer = QuantDiTHfQuantizer(QuantDiTConfig(**quantization), pre_quantized=True)
    model.hf_quantizer = quantizer
    model.quantization_method = quantizer.quantization_config.quant_method
    model.is_quantized = False
    model.config.quantization_config = quantizer.quantization_config
    _keep_names(model)
    return model


def register(module: ModuleType) -> None:
    """Enter both classes into the tables of transformers, and have its models refuse in time and count quantized weights.

    Args:
        module: `transformers.quantizers.auto` or `transformers.modeling_utils`.
    """
    if hasattr(module, "AUTO_QUANTIZER_MAPPING"):
        module.AUTO_QUANTIZER_MAPPING[METHOD] = QuantDiTHfQuantizer
        module.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QuantDiTConfig
    else:
        wrap(module.PreTrainedModel, "save_pretrained", checks_before_saving)
        wrap(module.PreTrainedModel, "num_parameters", counts_quantized)


watch()

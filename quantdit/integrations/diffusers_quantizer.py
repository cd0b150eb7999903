"""`quant_method: quantdit` for diffusers: `from_pretrained` of a quantized folder, and quantization while a model loads.

diffusers builds the model on the meta device and then hands over the weight files shard by shard (its `quantizers/base.py`).
The tensors of quantized layers are taken out before its loader, which would cast their float32 scales, sees them.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from quantdit.checkpoints import checkpoint, sources
from quantdit.checkpoints.checkpoint import METHOD
from quantdit.integrations.import_hooks import watch
from quantdit.integrations.quantdit_config import QuantDiTConfig
from quantdit.integrations.quantizer import Quantizer
from quantdit.layers.quant_attention import take_away
from quantdit.layers.quant_embedding import put_dense
from quantdit.system import files
from quantdit.tensors.layer_spec import as_computed

SINGLE = Path("the single file")  # whose name from_single_file does not tell


class QuantDiTQuantizer(Quantizer, DiffusersQuantizer):
    """What diffusers calls while it loads or saves a model; see its base class for when."""

    required_packages = (METHOD,)
    use_keep_in_fp32_modules = True
    is_serializable = True  # a property of the base class  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __init__(self, quantization_config: QuantDiTConfig, **kwargs: object) -> None:
        super().__init__(quantization_config, **kwargs)
        self._places: dict[str, Path] = {}  # of a full-precision source's tensors
        self._model: nn.Module | None = None  # while it loads

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Return float32 for None, as diffusers does without a quantizer."""
        self._dtype = torch_dtype if torch_dtype is not None else torch.float32
        return self._dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember the files, and return the names without those of scales beside float8 weights."""
        self._take_paths(checkpoint_files)
        return loaded_keys if self._stored else [key for key in loaded_keys if not sources.is_beside(key)]

    def _process_model_before_weight_loading(
        self, model: nn.Module, state_dict: dict[str, Tensor] | None = None, **kwargs: object
    ) -> None:
        where = self._where
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
        self._plan(model)

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
        kept = self._model is not None and checkpoint.stays_float32(self._model, key, self._dtype)
        return torch.float32 if kept else self._dtype

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Tensor], **kwargs: object
    ) -> bool:
        """Tell whether this is the full-precision weight of a layer that is to be quantized."""
        name, _, field = param_name.rpartition(".")
        return field == "weight" and name in self._plans

    def create_quantized_param(  # pyright: ignore[reportIncompatibleMethodOverride] - the base returns nothing either
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: torch.device, *args: object, **kwargs: object
    ) -> None:
        """Quantize a layer's weight, and put the layer in its place."""
        self._put_quantized(model, param_name.rpartition(".")[0], param_value, target_device)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: object) -> Any:  # a ModelMixin
        self._finish(model, self._paths[0].parent if self._paths else SINGLE)
        # from_single_file leaves it out.
        model.register_to_config(quantization_config=self.quantization_config)
        self._model, self._places = None, {}
        # diffusers refuses to cast what says it is quantized; ours keeps its scales and casts the rest.
        model.is_quantized = False
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what `save_pretrained` writes: tensors, and what the header of their files says."""
        return self._as_written(state_dict)

    def _dequantize(self, model: Any) -> Any:
        return dequantize(model)


def dequantize(model: Any) -> Any:
    """Replace the quantized layers by ordinary linears of their weights, in place, in the model's dtype; returns the model.

    The model is a ModelMixin. Activations are no longer quantized.
    """
    from diffusers.configuration_utils import FrozenDict

    put_dense(model, model.dtype)
    take_away(model)
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

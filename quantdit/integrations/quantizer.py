"""What quantdit's quantizers of diffusers and of transformers share: a quantized folder, or a plan, put into a model; saving it.

Either library builds a model on the meta device, asks its quantizer to prepare it, loads tensors, and asks it to finish.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantdit.calibration.data_free import TABLE_ROWS, quantize_table, quantize_without_data, unit_seed
from quantdit.checkpoints import checkpoint, class_tree
from quantdit.checkpoints.checkpoint import METHOD, CheckpointError
from quantdit.checkpoints.libraries import TRANSFORMERS, library_of
from quantdit.integrations.quantdit_config import QuantDiTConfig
from quantdit.layers import quant_attention
from quantdit.layers.quant_embedding import QuantEmbedding, put_layer, quantized_like
from quantdit.models import adapter as adapters
from quantdit.recipes.resolve import resolve
from quantdit.recipes.rules import LayerPlan
from quantdit.system import files
from quantdit.system.version import VERSION
from quantdit.tensors.layer_spec import LayerSpec, as_stored, layer_fields

WHERE = Path("config.json")


class Quantizer:
    """What comes before the quantizer class of a library among the bases of ours."""

    requires_calibration = False
    is_trainable = True  # of adapters on it
    is_compileable = True

    def __init__(self, quantization_config: QuantDiTConfig, **kwargs: Any) -> None:
        # A copy: what it says once a model is quantized holds for no other model that the same object quantizes.
        self.quantization_config = copy.copy(quantization_config)
        super().__init__(self.quantization_config, **kwargs)  # pyright: ignore[reportCallIssue] - of the library's class
        if kwargs.get("pre_quantized") and not self._stored:  # from_single_file says nothing
            raise CheckpointError(f"{WHERE}: quantization_config of quantdit has no spec; copy the folder again")
        self.config: dict = {}  # of the model that is saved
        self._dtype = torch.float32
        self._paths: list[Path] = []
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

    def _take_paths(self, paths: Iterable[str]) -> None:
        """Remember the weight files.

        Raises:
            CheckpointError: they are not safetensors.
        """
        self._paths = [Path(path) for path in paths]
        if any(path.suffix != ".safetensors" for path in self._paths):
            raise CheckpointError(f"{self._paths[0]}: quantdit reads safetensors files; copy the folder again")

    @property
    def _where(self) -> Path:
        """The config.json beside the weight files."""
        return self._paths[0].parent / WHERE.name if self._paths else WHERE

    def _plan(self, model: nn.Module) -> None:
        """Decide which layers of a full-precision model are quantized while it loads, and how.

        Raises:
            ValueError: none is.
        """
        adapter = adapters.adapter_for(model)
        config = self.quantization_config
        if library_of(model) is TRANSFORMERS:
            config.recipe = config.encoder_recipe
        self._plans = resolve(config.recipe, adapters.layers(model, adapter))
        paths = [path for path, _ in adapters.blocks(model, adapter)]
        for name in self._plans:
            number = next((i for i, path in enumerate(paths) if name.startswith(f"{path}.")), len(paths))
            self._seeds[name] = unit_seed(self.quantization_config.seed, number)
        if not self._plans:
            raise ValueError(f"recipe {self.quantization_config.recipe.name} leaves every layer dense; give another")

    def _put_quantized(self, model: nn.Module, name: str, weight: Tensor, device: torch.device | str) -> None:
        """Quantize a planned layer's weight, on the CPU, and put the layer in its place; the bias comes or came by itself."""
        files.check_finite(f"{name}.weight", weight)
        before = model.get_submodule(name)
        plan, weight = self._plans[name], weight.cpu()
        if isinstance(before, nn.Embedding):
            rows, width = weight.shape
            made = quantize_table(weight.split(TABLE_ROWS), rows, width, plan.rule.weight, plan.group_size)
        else:
            made = quantize_without_data(weight, None, plan, self._seeds[name])
        layer = quantized_like(before, made.spec, made.tensors, None)
        layer.to(device)
        if not isinstance(layer, QuantEmbedding):
            layer.bias = before.bias  # pyright: ignore[reportAttributeAccessIssue] - of a linear
        put_layer(model, name, layer)
        self._errors[name] = {"weight_rel_rmse": made.report["weight_rel_rmse"]}

    def _finish(self, model: nn.Module, where: Path) -> None:
        """Check a model whose tensors are in place, and describe what was quantized while it loaded.

        Args:
            model: loaded.
            where: its weights came from.

        Raises:
            CheckpointError: as `checkpoint.finish`; a layer that is to be quantized has no weight, or another tensor is missing.
        """
        checkpoint.set_weight_dtype(model, self._dtype)
        if self._stored:
            checkpoint.finish(model, self._edges, where)
        else:
            made = checkpoint.quant_layers(model)
            if missing := [name for name in self._plans if name not in made]:
                raise CheckpointError(
                    f"no file holds the weight of layer {missing[0]} (and {len(missing) - 1} more); copy it again"
                )
            config = self.quantization_config
            provenance = {"quantdit": VERSION, "calibration": {"samples": 0, "seed": config.seed}}
            provenance["layers"] = self._errors  # what `inspect` shows
            quant_attention.put(model, quant_attention.attention_of(config.recipe.attention, model))
            config.state = checkpoint.describe(model, config.recipe.to_dict(), provenance)
        self._state["spec"] = checkpoint.FORMAT_VERSION  # what it would be saved as
        if not any(hasattr(module, "_hf_hook") for module in model.modules()):  # accelerate has what it offloads elsewhere
            checkpoint.check_in_memory(model, where)
        self._paths = []

    def note(self, model: nn.Module) -> None:
        """Take note of what is written with a model, which may have changed since it was quantized or loaded."""
        self.config = checkpoint.config_of(model)
        for key in checkpoint.SWITCHES:
            self._state.pop(key, None)
        self._state.update(checkpoint.describe_switches(model))  # in place: the model's config holds the same

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

    def _as_written(self, state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
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

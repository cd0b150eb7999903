"""`Plan`: all that a run decides before it sees the model, and the checks of it against the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from quantdit.checkpoints import checkpoint, streaming
from quantdit.formats import QSpec
from quantdit.models import adapter as adapters
from quantdit.models.adapter import Adapter
from quantdit.recipes.finetuning import FineTuning, check_trains
from quantdit.recipes.resolve import options, without_data
from quantdit.recipes.rules import Layer, LayerPlan, Recipe
from quantdit.recipes.sampling_plan import SamplingPlan
from quantdit.system import files
from quantdit.tensors import hadamard
from quantdit.tensors.layer_spec import LayerSpec, stored_bytes
from quantdit.tensors.timesteps import check_edge_steps

HALF = 2  # bytes of a weight in 16 bits
DEFAULT_SAMPLING = SamplingPlan()


@dataclass(frozen=True)
class Target:
    """What the layers whose weight is `auto` are chosen for; one of the two is given.

    Attributes:
        size_budget: largest size of all quantized layers, scales included, as a part of their size in 16 bits.
        max_output_error: largest measured model_rel_rmse; the layers are as small as it allows.
    """

    size_budget: float | None = None
    max_output_error: float | None = None

    def __post_init__(self) -> None:
        """Check the one that is given.

        Raises:
            ValueError: none or both, or not a possible number.
        """
        if (self.size_budget is None) == (self.max_output_error is None):
            raise ValueError("give a size budget or a largest output error, one of the two")
        if self.size_budget is not None and not 0 < self.size_budget <= 1:
            raise ValueError(
                f"a size budget is a part of the layers' size in 16 bits, above 0 and at most 1, got {self.size_budget:g};"
                " 0.25 is 4 stored bits a weight"
            )
        if self.max_output_error is not None and not 0 < self.max_output_error < math.inf:
            raise ValueError(
                f"a largest output error is a positive number, got {self.max_output_error:g}; 0.05 is 5 % of the model's output"
            )


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Attributes:
        recipe: how each layer is quantized.
        sampling: what the model is calibrated on.
        finetuning: what is trained afterwards; None for nothing.
        target: what open weights are chosen for; None where the recipe fixes all of them.
    """

    recipe: Recipe
    sampling: SamplingPlan = DEFAULT_SAMPLING
    finetuning: FineTuning | None = None
    target: Target | None = None

    def of(self, name: str) -> Plan:
        """Return what a run does to one component; nothing of a text encoder is trained, or chosen for a target."""
        recipe = self.recipe.of(name)
        if name in self.recipe.components:
            return Plan(recipe, self.sampling)
        return replace(self, recipe=recipe)

    def for_its_data(self) -> Plan:
        """Return the plan with what needs data left out of its recipe if nothing is sampled.

        Raises:
            ValueError: a rule that cannot do without, steps at the edges of a trajectory that is too short, or fine-tuning
                without samples.
        """
        if not self.sampling.samples and self.finetuning is not None:
            raise ValueError("fine-tuning needs samples; leave out --samples 0, or --finetune-steps")
        recipe = self.recipe if self.sampling.samples else without_data(self.recipe, times_are_known=True)
        check_edge_steps(self.sampling.steps, recipe.edge_steps)
        return replace(self, recipe=recipe)


@dataclass(frozen=True)
class Component:
    """A transformer or a text encoder of a pipeline, and what a recipe says of its layers.

    Attributes:
        model: the transformer or text encoder, in full precision.
        adapter: of its class.
        blocks: paths of its blocks.
        layers: its linears, and a text encoder's table of words.
        options: by name of a layer that is quantized: its plans by weight format, of which there are several for `auto`.
    """

    model: nn.Module
    adapter: Adapter
    blocks: tuple[str, ...]
    layers: list[Layer]
    options: dict[str, dict[str, LayerPlan]]

    @property
    def plans(self) -> dict[str, LayerPlan]:
        """Return the plan of each layer; there is no `auto`."""
        return {name: next(iter(plans.values())) for name, plans in self.options.items()}

    @property
    def is_open(self) -> bool:
        """Return whether weights are to be chosen."""
        return any(len(plans) > 1 for plans in self.options.values())

    @property
    def bytes_in_16_bits(self) -> int:
        """Return the size that the layers to be quantized have in 16 bits."""
        return HALF * sum(layer.in_features * layer.out_features for layer in self.layers if layer.name in self.options)


def component(transformer: nn.Module, recipe: Recipe) -> Component:
    """Return a transformer with what a recipe says of its layers.

    Raises:
        ValueError: the recipe does not fit.
    """
    adapter = adapters.adapter_for(transformer)
    layers = adapters.layers(transformer, adapter)
    blocks = tuple(path for path, _ in adapters.blocks(transformer, adapter))
    return Component(transformer, adapter, blocks, layers, options(recipe, layers))


def check(plan: Plan, components: Mapping[str, Component]) -> None:
    """Refuse before any work is done what cannot be made of these transformers.

    Raises:
        ValueError: nothing to quantize, to choose or to train; `auto` without a target, a size budget that is too small; a model
            that must be in memory as a whole and is not.
    """
    if not any(each.options for each in components.values()):
        raise ValueError(f"recipe {plan.recipe.name} leaves every layer dense, so there is nothing to quantize")
    streamed = any(streaming.is_streamed(each.model) for each in components.values())
    for name, each in components.items():
        _check_target(plan.of(name), each)
    transformers = components.keys() - plan.recipe.components.keys()
    if plan.target is not None and (len(transformers) != 1 or streamed):
        raise ValueError(
            "choosing the layers' weights needs one transformer, in memory as a whole: give a larger --memory-budget,"
            " or fix the weights with --bits"
        )
    if plan.finetuning is None:
        return
    if plan.finetuning.mode == "end-to-end" and streamed:
        raise ValueError(
            "fine-tuning end-to-end needs the transformer in memory as a whole: give a larger --memory-budget, or"
            " --finetune-mode block"
        )
    trained = [options for name in transformers for options in components[name].options.values()]
    check_trains(layer.rule for plans in trained for layer in plans.values())


def check_finite(transformer: nn.Module) -> None:
    """Refuse weights that are NaN or infinite; those on the meta device are read, and checked, later.

    Raises:
        ValueError: naming the first.
    """
    for name, tensor in transformer.state_dict().items():
        if tensor.device.type != "meta":
            files.check_finite(name, tensor)


def _check_target(plan: Plan, component: Component) -> None:
    recipe, target = plan.recipe, plan.target
    if target is None:
        if component.is_open:
            raise ValueError(
                f'recipe {recipe.name} has weight = "auto": say how small with --size-budget 0.25,'
                " or how good with --max-output-error 0.05"
            )
        return
    if not component.is_open:
        raise ValueError(
            f"recipe {recipe.name} fixes the weight of every layer, so there is nothing to choose for a size budget or a"
            ' largest output error; give some rule weight = "auto"'
        )
    if target.size_budget is not None:
        layers = {layer.name: layer for layer in component.layers}
        least = sum(min(_bytes(layers[name], p) for p in plans.values()) for name, plans in component.options.items())
        check_budget(target.size_budget, least, component.bytes_in_16_bits)


def check_budget(size_budget: float, least: int, whole: int) -> int:
    """Return a size budget in bytes.

    Args:
        size_budget: as a part of `whole`.
        least: bytes that the narrowest weights take.
        whole: bytes of the layers in 16 bits.

    Raises:
        ValueError: it is less than the least.
    """
    budget = math.floor(size_budget * whole)
    if budget < least:
        enough = math.ceil(least / whole * 1000) / 1000
        raise ValueError(
            f"a size budget of {size_budget:g} is {budget:,} bytes, but these layers need at least {least:,} with the narrowest"
            f" weights; give at least --size-budget {enough:g}"
        )
    return budget


def _bytes(layer: Layer, plan: LayerPlan) -> int:
    return stored_bytes(planned_spec(layer, plan))


def planned_spec(layer: Layer, plan: LayerPlan) -> LayerSpec:
    """Return what a layer so planned stores, without what only calibration can tell (such as a rank)."""
    q = QSpec(plan.rule.weight, layer.out_features, layer.in_features, plan.group_size)
    block = hadamard.block_size(layer.in_features) if plan.rule.rotation in ("hadamard", "regular", "auto") else 1
    return LayerSpec(q, rotation="hadamard", block=block) if block > 1 else LayerSpec(q)


def check_full_precision(transformers: Mapping[str, nn.Module], source: str) -> None:
    """Refuse transformers that are quantized already.

    Raises:
        ValueError: naming the source.
    """
    if any(checkpoint.quant_layers(t) for t in transformers.values()):
        raise ValueError(f"{source} is quantized already; calibrate from the full-precision model")

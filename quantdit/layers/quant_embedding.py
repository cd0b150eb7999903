"""`QuantEmbedding`: a table of embeddings stored as a QuantLinear is; a lookup decodes the rows it takes and no others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantdit.layers.quant_linear import QuantLinear, dense_linear
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec
from quantdit.tensors.qtensor import FIELDS, QTensor


class DenseEmbedding(nn.Embedding):
    """What a QuantEmbedding becomes when a model is dequantized: it multiplies rows by a scale, and is a linear for floats."""

    def __init__(self, rows: Tensor, scale: float | None = None) -> None:
        super().__init__(rows.shape[0], rows.shape[1], device="meta")
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of numbers `[...]` as `[..., embedding_dim]`, floats `[..., embedding_dim]` times the table."""
        if input.is_floating_point():
            return nn.functional.linear(input, self.weight)
        return scaled_rows(super().forward(input), self.scale)


class QuantEmbedding(QuantLinear):
    """A table of embeddings, or of embeddings that are the weight of a linear as well.

    Row `i` of its QTensor, whose `out_features` is the number of embeddings and `in_features` their width, is embedding `i`.
    Given numbers it looks rows up and returns them in `weight_dtype`; given floats, as the output head of a model that ties it
    to its embeddings, it is the QuantLinear of the table.

    `embed_scale` multiplies the rows of a lookup (Gemma's); None for nothing.
    """

    def __init__(self, layer_spec: LayerSpec, embed_scale: float | None = None, device: torch.device | str = "cpu") -> None:
        check_table(layer_spec)
        super().__init__(layer_spec, bias=False, device=device)
        self.embed_scale = embed_scale

    @classmethod
    def from_tensors(  # pyright: ignore[reportIncompatibleMethodOverride] - a table has no bias
        cls, layer_spec: LayerSpec, tensors: dict[str, Tensor], embed_scale: float | None = None
    ) -> QuantEmbedding:
        """Build the table around its tensors, named as `layer_fields(layer_spec)`.

        Raises:
            ValueError: a tensor is missing, superfluous, or of another dtype or shape; or as `check_table`.
        """
        table = cls(layer_spec, embed_scale, device="meta")
        table._take(tensors)
        return table

    @property
    def num_embeddings(self) -> int:
        """Return the number of rows."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Return the width of a row."""
        return self.in_features

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the numbers `[...]` as `[..., embedding_dim]`; floats `[..., in]` pass through the linear.

        Raises:
            IndexError: a number that is no row's.
            RuntimeError: the table is on the meta device, the numbers are not.
        """
        if input.is_floating_point():
            return super().forward(input)
        if self.data.device.type == "meta" != input.device.type:
            raise RuntimeError("data is on the meta device, inputs are in memory; the layer is not loaded whole")
        rows = scaled_rows(self._rows(input.reshape(-1)).to(self.weight_dtype), self.embed_scale)
        return rows.reshape(*input.shape, self.in_features)

    def _rows(self, numbers: Tensor) -> Tensor:
        """Return the decoded rows `[n, width]` float32 of numbers `[n]`."""
        if not len(numbers):
            return torch.empty(0, self.in_features, dtype=torch.float32, device=self.data.device)
        stored = self._stored(FIELDS)
        by_row = stored.keys() - (() if self.spec.codebook_rows > 1 else ("codebook",))
        found = {name: t.index_select(0, numbers) if name in by_row else t for name, t in stored.items()}
        codebooks = len(numbers) if self.spec.codebook_rows > 1 else 1
        return QTensor(replace(self.spec, out_features=len(numbers), codebook_rows=codebooks), **found).dequantize()

    def extra_repr(self) -> str:
        """Describe the table as `nn.Embedding` would."""
        s = self.spec
        group = "" if s.group_size == s.in_features else f", group_size={s.group_size}"
        return f"{s.out_features}, {s.in_features}, {s.format}{group}"


def check_table(spec: LayerSpec) -> None:
    """Refuse a layer that cannot be a table: its rows come out as they are stored, and its inputs are numbers.

    Raises:
        ValueError: naming what it has.
    """
    has = {"rotation": spec.rotation != "none", "smoothing": spec.smoothed, "low-rank branch": spec.rank > 0}
    has["quantized input"] = spec.activation != ActivationSpec()
    if wrong := next((name for name, there in has.items() if there), None):
        raise ValueError(f"a table of embeddings has no {wrong}")


def scale_of(embedding: nn.Embedding) -> float | None:
    """Return what a class of transformers multiplies the rows of an embedding by, None for nothing.

    Raises:
        ValueError: it limits the norm of its rows, or does something else with them.
    """
    name, scale = type(embedding).__name__, getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    if embedding.max_norm is not None:
        raise ValueError(f"{name} changes rows to max_norm = {embedding.max_norm} when it looks them up")
    if isinstance(embedding, DenseEmbedding):
        return embedding.scale
    if type(embedding) is not nn.Embedding and scale is None:
        raise ValueError(f"{name} is no plain Embedding, and what it does with its rows is unknown")
    return None if scale is None else float(scale)


def dense_embedding(layer: QuantEmbedding, dtype: torch.dtype) -> DenseEmbedding:
    """Return an ordinary embedding of the table's decoded rows."""
    return DenseEmbedding(layer.weight.to(dtype), layer.embed_scale)


def quantized_like(before: nn.Module, spec: LayerSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> QuantLinear:
    """Return the quantized layer of such tensors that takes the place of a linear, or of an embedding, which has no bias.

    Raises:
        ValueError: as `from_tensors` of either, or as `scale_of`.
    """
    if isinstance(before, nn.Embedding):
        return QuantEmbedding.from_tensors(spec, tensors, scale_of(before))
    return QuantLinear.from_tensors(spec, tensors, bias)


def put_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of a model's linear or embedding, and of those whose weight is tied to its.

    What is tied to a table (T5's two names for it, a language model's output head) becomes the same module, so that its tensors
    exist once. What was tied by transformers is so no longer: `tie_weights` would look for weights that are not there.
    """
    weight = f"{name}.weight"
    for prefix, module in model.named_modules() if getattr(model, "all_tied_weights_keys", None) else ():
        stem, pairs = f"{prefix}." if prefix else "", getattr(module, "all_tied_weights_keys", None)
        if not isinstance(pairs, dict):
            continue
        gone = {target: source for target, source in pairs.items() if weight in (f"{stem}{target}", f"{stem}{source}")}
        if gone:
            left = {target: source for target, source in pairs.items() if target not in gone}
            vars(module).update(all_tied_weights_keys=left, _tied_weights_keys=left)
            for target, source in gone.items():
                if f"{stem}{source}" == weight:
                    model.set_submodule(f"{stem}{target}".removesuffix(".weight"), layer)
    model.set_submodule(name, layer)


def put_dense(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace the quantized layers of a model by ordinary ones of their weights, in place; what was tied is tied again.

    Args:
        model: quantized.
        dtype: of the weights; None: that which each layer's weight has.
    """
    places: dict[QuantLinear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear):
            places.setdefault(module, []).append(name)
    for layer, names in places.items():
        own = layer.weight_dtype if dtype is None else dtype
        dense = dense_embedding(layer, own) if isinstance(layer, QuantEmbedding) else dense_linear(layer, own)
        for name in names:
            model.set_submodule(name, dense)
    for module in model.modules():
        if vars(module).pop("_tied_weights_keys", None) is not None:
            pretrained: Any = module
            pretrained.all_tied_weights_keys = pretrained.get_expanded_tied_weights_keys(all_submodels=True)


def scaled_rows(rows: Tensor, scale: float | None) -> Tensor:
    """Return rows times what their class multiplies a lookup by."""
    if scale is None:
        return rows
    return rows * torch.tensor(scale, dtype=torch.float32, device=rows.device).to(rows.dtype)

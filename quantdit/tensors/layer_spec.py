"""`LayerSpec`: everything about one quantized layer that is not a tensor, and the tensors that follow from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from quantdit.formats import FORMATS, Field, QSpec
from quantdit.tensors import transform
from quantdit.tensors.qtensor import spec_fields
from quantdit.tensors.timesteps import LEAST_BUCKETS

ACTIVATION_BITS = (4, 6, 8, 16)
ACTIVATION_FORMATS = ("int", "affine", "fp8")
MAX_BUCKETS = 1000
# Tensors that a layer computes with in 32 bits and a file may hold in fewer, and in which dtypes.
NARROWER = {
    "scale": (torch.float16, torch.bfloat16),
    "premultiplier": (transform.PREMULTIPLIER,),
    "permutation": (torch.uint8, torch.int16),
}
EDGES = {"edge_bits": 0, "last_bucket": 0}  # of an ActivationSpec without edges, whose dictionary leaves them out


@dataclass(frozen=True)
class ActivationSpec:
    """How a layer's inputs are quantized, after the transform (kernels/ops.py, quantize_tokens).

    Attributes:
        bits: 16 (not at all), 8, 6 or 4.
        format: `int` symmetric codes; `affine` codes with an offset, which serves inputs that are not centred (after a GELU);
            `fp8` e4m3.
        group_size: consecutive inputs that share an integer multiplier (and offset) on the token's int8 grid; 0: none.
        buckets: 0: each token's scale is its own largest magnitude. Else the number of static scales, one per timestep bucket,
            fixed at calibration.
        edge_bits: of the inputs in the first and the last timestep bucket, the first and the last steps of a trajectory (`edge`);
            0: no edges, `bits` throughout.
        last_bucket: number of the last timestep bucket; 0 without edges.
    """

    bits: int = 16
    format: str = "int"
    group_size: int = 0
    buckets: int = 0
    edge_bits: int = 0
    last_bucket: int = 0

    def __post_init__(self) -> None:
        """Check that the parts go together.

        Raises:
            ValueError: what does not, and why.
        """
        if self.bits not in ACTIVATION_BITS:
            raise ValueError(f"activations of {self.bits} bits are not offered; known: {ACTIVATION_BITS}")
        if self.format not in ACTIVATION_FORMATS:
            raise ValueError(f"activation format {self.format!r} is unknown; known: {', '.join(ACTIVATION_FORMATS)}")
        plain = self.format == "int" and not self.group_size and not self.buckets
        if self.bits == 16 and not plain:
            raise ValueError("activations of 16 bits are not quantized: they take no format, groups or static scales")
        if self.format == "fp8" and (self.bits != 8 or self.group_size or self.buckets):
            raise ValueError("fp8 activations are 8 bits with one scale per token: no groups, no static scales")
        if self.bits == 8 and self.group_size:
            raise ValueError("activation groups share a coarser step than int8's; at 8 bits there is none")
        if self.buckets and self.format != "int":
            raise ValueError("static scales are for symmetric integer activations")
        if self.group_size < 0 or not 0 <= self.buckets <= MAX_BUCKETS:
            raise ValueError(f"activation group size {self.group_size} or {self.buckets} buckets are not possible")
        self._check_edges()

    def _check_edges(self) -> None:
        if not self.edge_bits:
            if self.last_bucket:
                raise ValueError(f"last_bucket = {self.last_bucket} goes with activations that are wider at the edges")
            return
        if self.edge_bits not in ACTIVATION_BITS or self.edge_bits <= self.bits:
            wider = ", ".join(str(bits) for bits in ACTIVATION_BITS if bits > self.bits) or "none"
            raise ValueError(
                f"activations of {self.edge_bits} bits at the edges are not wider than the {self.bits} bits between them;"
                f" wider: {wider}"
            )
        if self.buckets and self.edge_bits != 16:
            raise ValueError(f"static scales are for {self.bits} bits alone: activations at the edges stay 16 bits, or dynamic")
        if not LEAST_BUCKETS <= self.last_bucket + 1 <= MAX_BUCKETS or self.buckets not in (0, self.last_bucket + 1):
            raise ValueError(f"last_bucket = {self.last_bucket} is not possible with edges and {self.buckets} static scales")

    @property
    def by_time(self) -> bool:
        """Return whether inputs are quantized differently along a trajectory."""
        return bool(self.buckets or self.edge_bits)

    @property
    def edge(self) -> ActivationSpec:
        """Return how inputs are quantized at the edges: as elsewhere without `edge_bits`.

        The format is the same, the groups too below 8 bits, from which on there are none.
        """
        if self.edge_bits == 16:
            return ActivationSpec()
        group_size = self.group_size if self.edge_bits < 8 else 0
        return replace(self.between, bits=self.edge_bits, group_size=group_size) if self.edge_bits else self

    @property
    def between(self) -> ActivationSpec:
        """Return how inputs are quantized between the edges."""
        return replace(self, edge_bits=0, last_bucket=0)

    def is_edge(self, bucket: int) -> bool:
        """Return whether a timestep bucket is an edge."""
        return self.edge_bits > 0 and bucket in (0, self.last_bucket)

    def __str__(self) -> str:
        """Return it as `a8`, `a4 g64`, `a4 affine g64`, `a8 fp8`, `a8 static`, `a8, edges a16`."""
        words = [f"a{self.bits}"]
        words += [self.format] if self.format != "int" else []
        words += [f"g{self.group_size}"] if self.group_size else []
        words += ["static"] if self.buckets else []
        return " ".join(words) + (f", edges a{self.edge_bits}" if self.edge_bits else "")


@dataclass(frozen=True)
class LayerSpec:
    """What must be known, besides the stored tensors, to run one quantized layer.

    Attributes:
        weight: how the (transformed) weight is stored.
        activation: how its inputs are quantized.
        rotation: a name of transform.KINDS.
        block: size of the rotation's blocks, 1 without one.
        smoothed: whether inputs are divided by a smoothing factor.
        steps: greedy steps that an outlier rotation is made of; 0 where it is stored itself, as up to spec 3.
        rank: of the low-rank branch beside the quantized weight, 0 for none.
    """

    weight: QSpec
    activation: ActivationSpec = ActivationSpec()
    rotation: str = "none"
    block: int = 1
    smoothed: bool = False
    rank: int = 0
    steps: int = 0

    def to_dict(self) -> dict:
        """Return a JSON-serialisable form that `from_dict` reads back; it names edges only if there are some."""
        content = asdict(self)
        if not self.activation.edge_bits:
            content["activation"] = {key: value for key, value in content["activation"].items() if key not in EDGES}
        return content

    @classmethod
    def from_dict(cls, content: dict) -> LayerSpec:
        """Return what `to_dict` made `content` of.

        Raises:
            ValueError: other keys, values of another type than the field's, or a combination that is not possible.
        """
        known = {"steps": 0} | content if isinstance(content, dict) else content  # up to spec 3 there are none
        flat = _typed(cls, known) | {
            "weight": QSpec(**_typed(QSpec, content.get("weight"))),
            "activation": ActivationSpec(**_typed(ActivationSpec, _with_edges(content["activation"]))),
        }
        return cls(**flat)


def _with_edges(activation: object) -> object:
    """Return a dictionary of an ActivationSpec with what `to_dict` leaves out."""
    return EDGES | activation if isinstance(activation, dict) and activation.keys().isdisjoint(EDGES) else activation


def _typed(cls: type, content: object) -> dict:
    """Return the content if it has exactly the fields of a dataclass of numbers, texts and truths, each of its type."""
    types = {"str": str, "int": int, "bool": bool}
    expected = {f.name: types.get(str(f.type), dict) for f in fields(cls)}
    if not isinstance(content, dict) or content.keys() != expected.keys():
        raise ValueError(f"must have exactly the keys {sorted(expected)}")
    for name, kind in expected.items():
        if type(content[name]) is not kind:  # bool is an int, and 8.0 == 8
            raise ValueError(f"{name} must be {kind.__name__}, got {content[name]!r}")
    return content


def layer_fields(spec: LayerSpec) -> dict[str, Field]:
    """Return name, dtype and shape of every tensor that a layer stores besides its bias.

    Raises:
        ValueError: sizes that do not divide, or a combination that is not possible.
    """
    weight, activation = spec.weight, spec.activation
    out, width = weight.out_features, weight.in_features
    expected = spec_fields(weight) | transform.fields(spec.rotation, width, spec.block, spec.smoothed, spec.steps)
    if activation.group_size and width % activation.group_size:
        raise ValueError(f"activation group size {activation.group_size} does not divide the width {width}")
    if activation.format == "fp8" and not decodes_to_fp8(weight.format):
        raise ValueError(f"fp8 activations need a weight that decodes to e4m3, {weight.format} decodes to int8")
    if activation.buckets:
        expected["static_scale"] = Field(torch.float32, (activation.buckets,))
    if not 0 <= spec.rank <= min(out, width):
        raise ValueError(f"a low-rank branch of a {out} x {width} weight cannot have rank {spec.rank}")
    if spec.rank:
        expected["up"] = Field(torch.bfloat16, (out, spec.rank))
        expected["down"] = Field(torch.bfloat16, (spec.rank, width))
    return expected


def stored_bytes(spec: LayerSpec) -> int:
    """Return the bytes of all tensors that a layer stores besides its bias, scales counted as float32."""
    expected = layer_fields(spec)
    if spec.smoothed:
        expected["premultiplier"] = replace(expected["premultiplier"], dtype=transform.PREMULTIPLIER)
    if "permutation" in expected:
        last = torch.tensor(spec.weight.in_features - 1, dtype=torch.int32)
        expected["permutation"] = replace(expected["permutation"], dtype=as_stored("permutation", last).dtype)
    return sum(math.prod(field.shape) * field.dtype.itemsize for field in expected.values())


def as_stored(name: str, tensor: Tensor) -> Tensor:
    """Return a layer's tensor as a file holds it: those of NARROWER in the narrowest dtype that loses nothing."""
    for dtype in NARROWER.get(name, ()) if tensor.dtype.itemsize == 4 else ():
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return tensor.to(dtype)
    return tensor


def as_computed(name: str, tensor: Tensor) -> Tensor:
    """Return a copy of a layer's tensor that a file holds, as the layer computes with it."""
    if tensor.dtype not in NARROWER.get(name, ()):
        return tensor.clone()
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int32, copy=True)


def decodes_to_fp8(format: str) -> bool:
    """Return whether a format's `I` is float8_e4m3fn rather than int8."""
    return FORMATS[format].decoded_dtype == torch.float8_e4m3fn

"""`QuantLinear`: the one module of a quantized model. transform -> quantize tokens -> integer product -> scale + bias."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from quantdit.kernels.cpu import version_of
from quantdit.kernels.ops import Epilogue
from quantdit.kernels.schema import flat
from quantdit.kernels.triton_ops import dispatch
from quantdit.models.call_view import view
from quantdit.tensors import transform
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec, as_stored, layer_fields
from quantdit.tensors.qtensor import FIELDS, QTensor
from quantdit.tensors.timesteps import PerThread, bucket_of
from quantdit.tensors.transform import Transform


class QuantLinear(nn.Linear):
    """A linear layer whose weight is a `QTensor`, in the space its `Transform` takes the inputs to.

    Buffers: the tensors of the QTensor and of the Transform under their own names; `up`, `down` bfloat16 of a low-rank branch;
    `static_scale` of static activations; `rotation1` and `rotation2` of an outlier rotation that is stored as its steps, made on
    first use and not part of the state dict. `bias` is a parameter as in `nn.Linear`. `weight` is a property that decodes to
    `[out, in]` in the original space, which is what PEFT's LoRA needs. `weight_dtype` is its dtype where there is no bias, whose
    dtype it has otherwise: like the bias's it changes with a cast of the model.

    The gradient with respect to inputs (and to a bias that somebody unfreezes) is that of the dequantized layer: rounding and
    clipping count as the identity. Under autocast a layer takes and returns autocast's dtype, as `nn.Linear` does.

    On CPU the decoded int8 matrix is kept after the first call (`cache_decoded`): one byte a weight, a quarter of float32.
    On a GPU kernels/triton_ops/dispatch.py chooses what runs, and nothing is kept.

    `qtensor`, `transform` and `branch` are made of the buffers when they are asked for: kept ones would keep memory that a hook
    (accelerate's, group offload's) takes away by putting other tensors in the place of the buffers.
    """

    data: Tensor
    scale: Tensor
    premultiplier: Tensor
    static_scale: Tensor
    up: Tensor
    down: Tensor

    def __init__(self, layer_spec: LayerSpec, bias: bool, device: torch.device | str = "cpu") -> None:
        nn.Module.__init__(self)
        self.layer_spec = layer_spec
        self.spec = layer_spec.weight
        self.in_features, self.out_features = self.spec.in_features, self.spec.out_features
        self._bucket, self._buckets = 0, PerThread()
        self._at_edge = layer_spec.activation.is_edge(0)
        self._activations = layer_spec.activation.between, layer_spec.activation.edge
        self.cache_decoded = True
        self.weight_dtype = torch.float32
        self._decoded: tuple[tuple, Tensor] | None = None  # what was decoded, and its matrix
        for name, field in layer_fields(layer_spec).items():
            self.register_buffer(name, torch.empty(field.shape, dtype=field.dtype, device=device))
        if layer_spec.steps:
            self.forget()
        made = torch.empty(self.out_features, dtype=torch.float32, device=device) if bias else None
        self.bias = None if made is None else nn.Parameter(made, requires_grad=False)

    @classmethod
    def from_tensors(cls, layer_spec: LayerSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> QuantLinear:
        """Build the layer around its tensors, named as `layer_fields(layer_spec)`; `bias` `[out]` float or None.

        Raises:
            ValueError: a tensor is missing, superfluous, or of another dtype or shape.
        """
        layer = cls(layer_spec, bias is not None, device="meta")
        layer._take(tensors)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    def _take(self, tensors: dict[str, Tensor]) -> None:
        expected = layer_fields(self.layer_spec)
        if tensors.keys() != expected.keys():
            raise ValueError(f"a layer of {self.layer_spec} stores {sorted(expected)}, got {sorted(tensors)}")
        for name, field in expected.items():
            tensor = tensors[name]
            if (tensor.dtype, tuple(tensor.shape)) != (field.dtype, field.shape):
                raise ValueError(f"{name}: expected {field.dtype} {field.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
            setattr(self, name, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """Return what `from_tensors` takes."""
        return self._stored(layer_fields(self.layer_spec))

    def _stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: tensor for name in names if (tensor := self._buffers.get(name)) is not None}

    @property
    def bucket(self) -> int:
        """Return which of `static_scale` the next call takes; `follow_timesteps` keeps it up to date.

        Each thread that calls the model has its own. A thread that has not, such as one that runs a checkpointed block again for
        its gradient, has that of the latest call.
        """
        mine = self._buckets.bucket
        return self._bucket if mine is None else mine

    @bucket.setter
    def bucket(self, number: int) -> None:
        self._bucket = self._buckets.bucket = number
        self._at_edge = self._buckets.at_edge = self.layer_spec.activation.is_edge(number)

    @property
    def activation(self) -> ActivationSpec:
        """Return how the next call quantizes its inputs. A compiled layer has a graph for either way, not one for each bucket."""
        mine = self._buckets.at_edge
        return self._activations[self._at_edge if mine is None else mine]

    @property
    def qtensor(self) -> QTensor:
        """Return the stored weight."""
        return QTensor(self.spec, **self._stored(FIELDS))

    @property
    def transform(self) -> Transform:
        """Return what happens to inputs before they are quantized."""
        s = self.layer_spec
        t = transform.from_tensors(s.rotation, s.block, self._stored(transform.NAMES))
        if s.steps and self._buffers[transform.DENSE[-1]] is None and self.data.device.type != "meta":
            self._buffers.update({name: getattr(t, name) for name in transform.DENSE})
        return t

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride] - read only, unlike that of nn.Linear
        """Return the decoded weight `[out, in]` in the original space, in the bias's dtype (`weight_dtype` without one).

        It is decoded once something is computed with it: models of transformers ask for its dtype at every call.
        """
        return self._dense() if torch.compiler.is_compiling() else LazyWeight(self)

    def _dense(self) -> Tensor:
        dense = self.qtensor.dequantize()
        if self.layer_spec.rank:
            dense = dense + self.up.float() @ self.down.float()
        dense = transform.weight_back(self.transform, dense)
        return dense.to(self.weight_dtype if self.bias is None else self.bias.dtype)

    def extend_branch(self, up: Tensor, down: Tensor) -> None:
        """Add the product of `up` `[out, r]` and `down` `[r, in]`, float, to the weight: the low-rank branch grows by rank r.

        New factors are stored as bfloat16; factors that were there keep their bits. If the rank would exceed `min(out, in)`, the
        branch becomes its own product, rounded to bfloat16, and an identity matrix.
        """
        device, smallest = self.data.device, min(self.out_features, self.in_features)
        down = transform.apply_to_weight(self.transform, down.to(device, torch.float32))
        more = {"up": up.to(device, torch.bfloat16), "down": down.to(torch.bfloat16)}
        if self.layer_spec.rank:
            more = {"up": torch.cat([self.up, more["up"]], 1), "down": torch.cat([self.down, more["down"]])}
        if more["down"].shape[0] > smallest:
            product = (more["up"].float() @ more["down"].float()).to(torch.bfloat16)
            one = torch.eye(smallest, dtype=torch.bfloat16, device=device)
            more = {"up": product, "down": one} if self.in_features == smallest else {"up": one, "down": product}
        self.branch = more

    @property
    def branch(self) -> dict[str, Tensor]:
        """The low-rank branch in the transformed space, bfloat16 `up` `[out, rank]` and `down` `[rank, in]`; `{}` without one."""
        return self._stored(("up", "down"))

    @branch.setter
    def branch(self, tensors: dict[str, Tensor]) -> None:
        spec = replace(self.layer_spec, rank=tensors["down"].shape[0] if tensors else 0)
        layer_fields(spec)
        for name in ("up", "down"):
            self._buffers.pop(name, None)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.to(self.data.device))
        self.layer_spec = spec

    def decoded(self) -> Tensor:
        """Return the decoded matrix `I` `[out, in]`, kept between calls on CPU."""
        if torch.compiler.is_compiling():  # whether a kept one is up to date cannot be asked in a graph
            return self._decode()
        stored = tuple((id(t), version_of(t)) for t in self._stored(FIELDS).values())
        if self._decoded is not None and self._decoded[0] == stored:
            return self._decoded[1]
        decoded = self._decode()
        if self.cache_decoded and self.data.device.type == "cpu":
            self._decoded = (stored, decoded)
        return decoded

    def _decode(self) -> Tensor:
        return torch.ops.quantdit.decode8(*flat(self.qtensor))

    def forget(self) -> None:
        """Drop what is kept between calls."""
        self._decoded = None
        for name in transform.DENSE if self.layer_spec.steps else ():
            self.register_buffer(name, None, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map inputs `[..., in]` to `[..., out]` in their dtype.

        Raises:
            RuntimeError: part of the layer is on the meta device, the inputs are not.
        """
        kind = input.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self.forward(input.to(torch.get_autocast_dtype(kind)))
        # Given tensors on the meta device torch's own operators return memory that nobody wrote to. Ours look for themselves.
        for name in self._of_torch:
            if (tensor := self._buffers.get(name)) is not None and tensor.device.type == "meta" != kind:
                raise RuntimeError(f"{name} is on the meta device, inputs are in memory; the layer is not loaded whole")
        tokens = input.reshape(-1, self.in_features).contiguous()  # strides decide which routine multiplies, and so the last bits
        trained = torch.is_grad_enabled() and (input.requires_grad or (self.bias is not None and self.bias.requires_grad))
        y = self._with_gradient(tokens) if trained else self._of(tokens)
        return y.reshape(*input.shape[:-1], self.out_features)

    @property
    def _of_torch(self) -> tuple[str, ...]:
        """Return the names of the tensors that go to torch's own operators; a layer need not have them."""
        branch = ("up", "down") if self.layer_spec.rank else ()
        return branch if self.layer_spec.rotation == "hadamard" else (*branch, *transform.NAMES)

    def _with_gradient(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            y = self._of(tokens)
        up, down = (self._buffers.get(name) for name in ("up", "down"))
        parts = (*flat(self.qtensor), up, down, *flat(self.transform))
        return torch.ops.quantdit.straight_through(y, tokens, self.bias, *parts)

    def _of(self, tokens: Tensor) -> Tensor:
        return self._on_gpu(tokens) if dispatch.on_gpu(tokens) else self._on_cpu(tokens)

    def _on_cpu(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:  # whose range sums in the transformed space may leave
            return self._on_cpu(x.float()).half()
        if self.activation.bits == 16:
            tokens = self._transformed(x)
            hidden, up = self._low_rank(tokens)
            y = torch.ops.quantdit.gemm_w8a16(tokens, self.decoded(), self.scale, self.bias)
        else:
            codes, token_scale, hidden, up = self._coded(x)
            after = Epilogue(x.dtype, token_scale, self.bias)
            y = torch.ops.quantdit.gemm_w8a8(codes, self.decoded(), self.scale, *flat(after))
        return y if hidden is None or up is None else y + nn.functional.linear(hidden, up.to(hidden.dtype))

    def _on_gpu(self, x: Tensor) -> Tensor:
        """The same with the weight as it is stored; the low-rank branch is added in float32."""
        if self.activation.bits == 16:
            return self._product_of_16_bits(self._transformed(x), x.dtype)
        codes, token_scale, *branch = self._coded(x)
        after = Epilogue(x.dtype, token_scale, self.bias, *branch)
        return torch.ops.quantdit.gemm_packed_a8(codes, *flat(self.qtensor), *flat(after))

    def _coded(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return codes and scales of transformed tokens, and what `_low_rank` does."""
        s, a = self.layer_spec, self.activation
        if s.rotation != "hadamard":
            tokens = self._transformed(x)
            (codes, token_scale), (hidden, up) = self._quantized(tokens), self._low_rank(tokens)
            return codes, token_scale, hidden, up
        down, up = (self.down, self.up) if s.rank else (None, None)
        rest = (s.block, a.format, a.bits, a.group_size, self._static_scale(), down)
        codes, token_scale, hidden = torch.ops.quantdit.rotate_quantize(x, self.premultiplier, *rest)
        return codes, token_scale, None if up is None else hidden, up

    def _product_of_16_bits(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        if tokens.dtype == dtype:
            return self._packed_product(tokens, tokens, self.bias)
        # float16 that was transformed in float32: each token times the power of two that brings it back into the range.
        exponent = torch.frexp(tokens.abs().amax(dim=1, keepdim=True)).exponent.clamp_min(0)
        tokens = torch.ldexp(tokens, -exponent)
        y = torch.ldexp(self._packed_product(tokens.to(dtype), tokens, None).float(), exponent)
        return (y if self.bias is None else y + self.bias.float()).to(dtype)

    def _packed_product(self, tokens: Tensor, wide: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product and branch of tokens that are not quantized; `wide` are the same in `kept_in` their dtype."""
        after = Epilogue(tokens.dtype, None, bias, *self._low_rank(wide))
        return torch.ops.quantdit.gemm_packed_a16(tokens, *flat(self.qtensor), *flat(after))

    def _low_rank(self, tokens: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return the transformed tokens times `down^T`, and `up`; None without a branch."""
        if not self.layer_spec.rank:
            return None, None
        return nn.functional.linear(tokens, self.down.to(tokens.dtype)), self.up

    def _static_scale(self) -> Tensor | None:
        return self.static_scale[self.bucket : self.bucket + 1] if self.activation.buckets else None

    def _transformed(self, tokens: Tensor) -> Tensor:
        if self.layer_spec.rotation == "hadamard":
            return torch.ops.quantdit.rotate(tokens, self.premultiplier, self.layer_spec.block)
        return transform.apply(self.transform, tokens)

    def _quantized(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        a = self.activation
        if a.format == "fp8":
            return torch.ops.quantdit.quantize_tokens_fp8(tokens)
        return torch.ops.quantdit.quantize_tokens(tokens, a.bits, a.group_size, a.format == "affine", self._static_scale())

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` would."""
        s = self.spec
        group = "" if s.group_size == s.in_features else f", group_size={s.group_size}"
        sizes = f"{s.in_features}, {s.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {s.format}{group}, {self.layer_spec.activation}{self._transform_text()}"

    def _transform_text(self) -> str:
        s = self.layer_spec
        rotation = f", {s.rotation}={s.block}" if s.block > 1 else ""
        return f"{rotation}{', smooth' if s.smoothed else ''}{f', rank={s.rank}' if s.rank else ''}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move as any module, but let a cast of the model touch the bias alone: scales stay float32, fp8 codes fp8."""
        stored = self._stored(self._buffers)
        super()._apply(fn, recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.data.device)).dtype
        for name, before in stored.items():
            if (moved := getattr(self, name)).dtype != before.dtype:
                self._buffers[name] = before.to(moved.device)
        self._decoded = None
        return self


class LazyWeight(Tensor):
    """The weight of a quantized layer, which is decoded, and an ordinary tensor from then on, once a function of torch takes it.

    Its dtype, shape and device need no decoding. It is the weight of when it was asked for: tensors that the layer gets later, of
    a fused adapter say, change nothing.
    """

    _is_hf_initialized = True  # transformers, which loads a model, draws no numbers for it

    @staticmethod
    def __new__(cls, layer: QuantLinear) -> LazyWeight:
        """Return that of a layer."""
        dtype = layer.weight_dtype if layer.bias is None else layer.bias.dtype
        nothing = torch.empty((), dtype=dtype, device=layer.data.device)
        made = Tensor._make_subclass(cls, nothing.expand(layer.out_features, layer.in_features))
        made._of = copy.copy(layer)
        made._of._buffers = dict(layer._buffers)
        return made

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call a function, on decoded weights unless it needs no numbers."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _WITHOUT_NUMBERS:
                tree_map(_decode, (args, kwargs))
            return func(*args, **kwargs)


_WITHOUT_NUMBERS = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "shape", "device", "ndim", "is_meta", "is_cuda", "requires_grad")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "element_size", "is_floating_point", "__len__")),
}


def _decode(value: object) -> None:
    if isinstance(value, LazyWeight) and (layer := vars(value).get("_of")) is not None:  # another thread may be at it
        value.data = layer._dense()
        value.__class__ = Tensor  # pyright: ignore[reportAttributeAccessIssue] - as torch's UninitializedParameter does
        vars(value).pop("_of", None)


def weight_bits(layer: QuantLinear) -> float:
    """Return stored bits per weight of a layer: scales, codebooks, rotation and low-rank branch included, the bias not."""
    stored = sum(as_stored(name, tensor).nbytes for name, tensor in layer.tensors().items())
    return 8 * stored / math.prod((layer.out_features, layer.in_features))


def dense_linear(layer: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    """Return an ordinary linear of the layer's decoded weight; its inputs are no longer quantized."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return linear


def follow_timesteps(transformer: nn.Module, edges: tuple[float, ...]) -> None:
    """Let every call of the transformer tell its layers with static scales, or with edges, the bucket of its timestep.

    Bucket b holds the times that reach `edges[b]` (`timesteps.bucket_of`); a call without a time uses the last one.
    """
    transformer.timestep_edges = tuple(edges)  # pyright: ignore[reportArgumentType] - neither tensor nor module
    if any(isinstance(m, QuantLinear) and m.layer_spec.activation.by_time for m in transformer.modules()):
        transformer.register_forward_pre_hook(_tell_timestep, with_kwargs=True)


def _tell_timestep(transformer: nn.Module, args: tuple, kwargs: dict) -> None:
    """Set the bucket of the layers that the transformer has by now: copies, pickles and adapters around them included."""
    edges = cast(tuple[float, ...], transformer.timestep_edges)
    bucket = bucket_of(view(transformer, args, kwargs).time, edges)
    for module in transformer.modules():
        if isinstance(module, QuantLinear) and module.layer_spec.activation.by_time:
            module.bucket = bucket

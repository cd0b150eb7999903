"""Methods of both libraries' models that are wrapped: to refuse before anything is written, and to count quantized weights."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from torch import nn

from quantdit.integrations.quantizer import Quantizer
from quantdit.layers.quant_embedding import QuantEmbedding
from quantdit.layers.quant_linear import QuantLinear


def wrap(cls: type, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Put `wrapper(method)` in the place of a method, once."""
    method = getattr(cls, name)
    if hasattr(method, "quantdit"):
        return
    wrapped = functools.wraps(method)(wrapper(method))
    vars(wrapped)["quantdit"] = True
    setattr(cls, name, wrapped)


def checks_before_saving(save: Callable) -> Callable:
    """Return `save_pretrained` of a model or a pipeline that asks the quantizer of each model first: it writes all or nothing."""

    def checked(self: object, *args: object, **kwargs: object) -> object:
        given = inspect.signature(save).bind(self, *args, **kwargs).arguments
        wanted = {name: given[name] for name in ("safe_serialization", "use_flashpack") if name in given}
        for part in (self,) if isinstance(self, nn.Module) else vars(self).values():
            model = getattr(part, "_orig_mod", part)  # of torch.compile
            if isinstance(quantizer := getattr(model, "hf_quantizer", None), Quantizer):
                quantizer.check_savable(model, **wanted)
                quantizer.note(model)
        return save(self, *args, **kwargs)

    return checked


def counts_quantized(count: Callable) -> Callable:
    """Return `num_parameters` that counts quantized weights too."""

    def counted(self: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        # Quantized weights are no parameters to torch; they are frozen.
        layers = () if only_trainable else (m for m in self.modules() if isinstance(m, QuantLinear))
        sizes = (m.out_features * m.in_features for m in layers if not (exclude_embeddings and isinstance(m, QuantEmbedding)))
        return count(self, only_trainable, exclude_embeddings) + sum(sizes)

    return counted

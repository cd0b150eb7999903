"""What of a model's output its pipeline computes with: the tensor that a model's error is measured on."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def prediction_of(output: object) -> Tensor | None:
    """Return the first tensor of a model's output, None if there is none.

    That is the output itself, the first of a tuple, or the first field of an output of diffusers or transformers (of a text
    encoder its last hidden state). A list of one tensor per sample (Z-Image) is stacked.
    """
    if isinstance(output, dict):
        return next((found for v in output.values() if (found := prediction_of(v)) is not None), None)
    if isinstance(output, list) and output and all(isinstance(v, Tensor) and v.shape == output[0].shape for v in output):
        return torch.stack(output)
    if isinstance(output, tuple | list):
        return next((found for v in output if (found := prediction_of(v)) is not None), None)
    return output if isinstance(output, Tensor) else None


def predicting(model: nn.Module) -> nn.Module:
    """Return the part of a model whose output is its prediction: the model, but of a language model what is below its head.

    Pipelines read hidden states of language models; logits of every word in their vocabulary would fill the disk.
    """
    base = getattr(model, "base_model", model)  # of transformers
    return base if isinstance(base, nn.Module) else model

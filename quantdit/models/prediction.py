"""What of a model's output its pipeline computes with: the tensor that errors are measured on and that step plans forecast."""

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


def with_prediction(output: object, prediction: Tensor) -> object:
    """Return an output like a given one, of another prediction: what `prediction_of` returns of it.

    Args:
        output: of a call of the same model.
        prediction: in the shape of that output's.
    """
    if isinstance(output, Tensor):
        return prediction
    if isinstance(output, list) and isinstance(output[0], Tensor):
        return list(prediction.unbind())
    if isinstance(output, dict):  # outputs of diffusers and of transformers are
        key = next(key for key, value in output.items() if prediction_of(value) is not None)
        return type(output)(**{**output, key: with_prediction(output[key], prediction)})
    assert isinstance(output, tuple | list)
    place = next(i for i, value in enumerate(output) if prediction_of(value) is not None)
    return type(output)((*output[:place], with_prediction(output[place], prediction), *output[place + 1 :]))

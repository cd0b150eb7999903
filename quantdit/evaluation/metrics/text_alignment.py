"""How well samples fit their prompts, by a proxy that needs no network of texts (networks/clip.py has the CLIP score).

The proxy is a ridge regression from image features to embeddings of the prompts (MiniLM's, or one place for each class), fitted
to the reference's own samples of other seeds. It knows only what the reference draws for these prompts, so it measures whether
the candidate still draws that, not whether either draws what the words say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # relative to the mean eigenvalue; the least error of leaving one sample out chooses


# Features `[n, d]` of images and their prompts, to a score `[n]`: larger is better.
Alignment = Callable[[Tensor, Sequence[str]], Tensor]


def proxy(features: Tensor, prompts: Sequence[str], embed: Callable[[Sequence[str]], Tensor]) -> Alignment:
    """Return the alignment that a ridge regression from features `[n, d]` to `embed(prompts)` `[n, e]` gives: a cosine.

    Raises:
        ValueError: fewer than four samples, or fewer than two different prompts.
    """
    if len(features) < 4 or len(set(prompts)) < 2:
        raise ValueError(
            f"{len(features)} samples of {len(set(prompts))} prompts say nothing of how texts and images go together"
        )
    texts = embed(prompts).double()
    centre, middle = features.double().mean(0), texts.mean(0)
    x, y = features.double() - centre, texts - middle
    values, vectors = torch.linalg.eigh(x @ x.T)
    values = values.clamp_min(0)

    def dual(ridge: float) -> tuple[Tensor, float]:
        """Return the dual coefficients `[n, e]`, and the squared error of leaving out one row each."""
        inverse = vectors / (values + ridge * values.mean().clamp_min(1e-30)) @ vectors.T
        coefficients = inverse @ y
        left_out = coefficients / inverse.diagonal()[:, None]
        return coefficients, float(left_out.square().sum())

    coefficients, _ = min((dual(ridge) for ridge in RIDGES), key=lambda pair: pair[1])
    weights = x.T @ coefficients

    def score(images: Tensor, asked: Sequence[str]) -> Tensor:
        return torch.cosine_similarity((images.double() - centre) @ weights, embed(asked).double() - middle, dim=1)

    return score


def one_place_each(prompts: Sequence[str]) -> Callable[[Sequence[str]], Tensor]:
    """Return an embedding of classes: a unit vector for each."""
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return lambda asked: torch.eye(len(order), dtype=torch.float64)[[order[prompt] for prompt in asked]]

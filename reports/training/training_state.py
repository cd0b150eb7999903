"""What the training scripts share: the resumable state file and the course of the learning rate."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_atomic(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file that is either whole or as it was before."""
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part)
    os.replace(part, path)


def training_state(model: torch.nn.Module, ema: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, step: int) -> dict:
    """Return the tensors that `restore` goes on from: weights, their moving average, AdamW's moments, the step."""
    state = {f"ema.{k}": v for k, v in ema.items()}
    for name, p in model.named_parameters():
        state[f"model.{name}"] = p.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}.{name}"] = optimizer.state[p][moment]
    state["step"] = torch.tensor(step)
    return state


def restore(state: dict, model: torch.nn.Module, ema: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Put a training state into place; returns its step."""
    step = int(state["step"])
    for name, p in model.named_parameters():
        p.data.copy_(state[f"model.{name}"])
        ema[name].copy_(state[f"ema.{name}"])
        moments = {m: state[f"{m}.{name}"].clone() for m in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
    return step


def learning_rate(step: int, peak: float, steps: int, warm_up: int, decay: int) -> float:
    """Linear warm-up over `warm_up` steps, constant, then a half cosine to 1 % over the last `decay` of `steps`."""
    left = min(1.0, max(0, steps - step) / decay)
    return peak * min(1.0, (step + 1) / warm_up) * (0.01 + 0.99 * 0.5 * (1 - math.cos(math.pi * left)))

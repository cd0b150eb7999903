"""Salient timesteps: where the sample moves far, and where the activations suffer most from rounded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantdit.calibration.observe.recorded_calls import Call, store
from quantdit.calibration.observe.timestep_salience import salient_calls

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x)


class Transformer(nn.Module):
    """One block whose input grows with `gain[timestep]`."""

    def __init__(self, gain: dict[float, float]) -> None:
        super().__init__()
        self.gain, self.blocks = gain, nn.ModuleList([Block()])

    def forward(self, hidden_states: Tensor, timestep: float) -> Tensor:
        x = torch.ones_like(hidden_states) * self.gain.get(timestep, 1.0)
        return self.blocks[0](x)


def calls(tmp_path: Path, samples: dict[float, float], trajectories: int = 2):
    """Calls of trajectories with these samples at these timesteps, both branches of guidance one after the other."""
    made = []
    for _ in range(trajectories):
        for time, value in samples.items():
            made += [Call((torch.full((1, 3, WIDTH), value),), {"timestep": time}, 0)] * 2
    return store(made, tmp_path)


def times(found) -> list[float]:
    return [call.kwargs["timestep"] for call in found]


def test_steps_that_move_far_are_chosen_in_the_order_of_the_run(tmp_path: Path):
    found = calls(tmp_path, {4.0: 0.0, 3.0: 5.0, 2.0: 5.1, 1.0: 9.0})
    chosen = salient_calls(Transformer({}), "blocks.0", found, 2)
    # 4 -> 3 moves 5, 2 -> 1 moves 3.9; what 1 moves is not known, and counts as the mean of the squares.
    assert times(chosen) == [4.0, 4.0, 2.0, 2.0] * 2


def test_steps_whose_activations_suffer_are_chosen(tmp_path: Path):
    found = calls(tmp_path, {4.0: 0.0, 3.0: 1.0, 2.0: 2.0, 1.0: 3.0})
    assert times(salient_calls(Transformer({2.0: 30.0}), "blocks.0", found, 1)) == [2.0] * 4


def test_all_timesteps_if_there_are_no_more(tmp_path: Path):
    found = calls(tmp_path, {2.0: 0.0, 1.0: 1.0})
    assert times(salient_calls(Transformer({}), "blocks.0", found, 5)) == times(found)


def test_calls_without_a_timestep_are_refused(tmp_path: Path):
    found = store([Call((torch.ones(1, 3, WIDTH),), {}, 0)], tmp_path)
    with pytest.raises(ValueError, match="--timestep-choice even"):
        salient_calls(Transformer({}), "blocks.0", found, 1)


def test_from_the_command_line(cli, pixel_dit: Path, tmp_path: Path):
    run = ("calibrate", "--model", pixel_dit, "--bits", "w8a8", "--samples", "2", "--steps", "4", "--output")
    assert cli(*run, tmp_path / "a", "--timesteps", "2", "--timestep-choice", "salience").code == 0
    ran = cli(*run, tmp_path / "b", "--timestep-choice", "salience")
    assert ran.code == 1 and "--timesteps" in ran.error

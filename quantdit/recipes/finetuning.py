"""`FineTuning`: what is trained after quantization, and for how long; and which weights there are to train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from quantdit.formats import FORMATS, QSpec
from quantdit.recipes.rules import Rule

INITIAL = ("distance", "uniform")
MODES = ("block", "end-to-end")
OPTIMIZERS = ("adam", "rmsprop")
DISTANCES = ("output", "weight")
MOST_CANDIDATES = 4


@dataclass(frozen=True)
class FineTuning:
    """How scales, biases and codebooks are trained on the outputs of blocks (quantdit/compiling/finetune.py).

    Attributes:
        steps: of the optimizer.
        mode: `block`: one block after another, on the inputs that the quantized blocks before it make; `end-to-end`: all blocks
            at once, each on what the ones before it return meanwhile, which needs the model in memory twice.
        candidates: codewords a sub-vector may choose among; 1 trains codebooks, scales and biases alone. Trellis codes have one.
        initial: ratios begin as 1 / n (`uniform`) or in inverse proportion to the candidates' errors (`distance`).
        logit_rate: learning rate of the logits.
        codebook_rate: of codebooks, scales and biases, as a part of their size; with `rmsprop` in units of weights and biases.
        regulariser: weight of the ratios' term, in parts of the step's error: much more, and the term makes the choice.
        gated: that term counts only while it is above the least it ever was, as in the released code; otherwise it grows with the
            square of the steps, so that nearly all is decided in the end.
        optimizer: `adam`: codebooks, scales and biases are trained once the choice is made, at a rate that falls to 0; `rmsprop`,
            the paper's: codebooks and biases at a constant rate, from the first step on, together with the logits.
        distance: what makes codewords candidates: the layer's error in the `output`, or in the `weight` (Eq. 5).
        rows: samples of a call in one step.
        memory: bytes that logits, their gradients and averages, candidates and soft weights may take at once; layers that take
            more are trained in parts, one after the other.
    """

    steps: int = 300
    mode: str = "block"
    candidates: int = 2
    initial: str = "distance"
    logit_rate: float = 5e-2
    codebook_rate: float = 1e-3
    regulariser: float = 10.0
    gated: bool = False
    optimizer: str = "adam"
    distance: str = "output"
    rows: int = 16
    memory: int = 2 * 2**30

    def __post_init__(self) -> None:
        """Check what the command line does not.

        Raises:
            ValueError: an unknown word or an impossible number.
        """
        known = {
            "fine-tuning mode": (self.mode, MODES),
            "initial ratios": (self.initial, INITIAL),
            "optimizer": (self.optimizer, OPTIMIZERS),
            "distance": (self.distance, DISTANCES),
        }
        for what, (value, allowed) in known.items():
            if value not in allowed:
                raise ValueError(f"{what} {value!r} not known; use one of {', '.join(allowed)}")
        if self.memory < 1:
            raise ValueError(f"{self.memory} bytes of memory are not enough to train anything")
        if self.steps < 1 or not 1 <= self.candidates <= MOST_CANDIDATES:
            raise ValueError(
                f"{self.steps} steps with {self.candidates} candidates are not possible: at least one step, 1 to"
                f" {MOST_CANDIDATES} candidates"
            )


def trains(rule: Rule) -> bool:
    """Return whether layers of a rule can be trained; False where the weight is not one format, but dense or open."""
    return chooses(rule) or (rule.weight in FORMATS and FORMATS[rule.weight].state_bits > 0)


def chooses(rule: Rule) -> bool:
    """Return whether layers of a rule have one int8 codebook for the whole weight, to choose codewords of."""
    if rule.weight not in FORMATS:
        return False
    f = FORMATS[rule.weight]
    codebook = f.fields(f, QSpec(f.name, 64, 64, 64)).get("codebook")
    return codebook is not None and codebook.dtype == torch.int8 and (f.dim > 1 or rule.table_rows == "layer")


def check_trains(rules: Iterable[Rule]) -> None:
    """Refuse training where there is nothing to train.

    Raises:
        ValueError: no layer of these rules is such as `trains` says.
    """
    rules = list(rules)
    if not any(map(trains, rules)):
        weights = ", ".join(sorted({rule.weight for rule in rules}))
        raise ValueError(
            "fine-tuning trains codebooks, level tables of whole weights and the scales of trellis codes, and these layers"
            f" have none ({weights}); take weight format table, vq or trellis, or no fine-tuning steps"
        )

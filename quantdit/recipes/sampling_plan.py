"""`SamplingPlan`: what a model is sampled with to calibrate it."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

TIMESTEP_CHOICES = ("even", "salience")


@dataclass(frozen=True)
class Size:
    """How large synthetic inputs are. Height and width are in latent cells (not pixels, not patches), tokens are of text."""

    batch: int = 1
    frames: int = 1
    height: int = 32
    width: int = 32
    tokens: int = 64


# Images of a pipeline without an autoencoder are small; latents of one at a time are large enough.
SMALL = Size(1, 1, 16, 16, 32)
# The least that a field may be, where it is a whole number.
LEAST = {"samples": 0, "steps": 1, "seed": 0, "timesteps": 0, "tokens": 0, "height": 1, "width": 1, "frames": 1, "threads": 1}
OPTIONAL = ("height", "width", "frames")


@dataclass(frozen=True)
class SamplingPlan:
    """What calibration data is made of.

    Attributes:
        samples: images or clips; 0 for none, which leaves methods that need no data.
        steps: sampling steps.
        seed: of the noise, and of everything else that is random.
        guidance: guidance scale as the pipeline takes it; None for the pipeline's own.
        buckets: parts of a trajectory that statistics are kept of.
        timesteps: how many of the steps are kept; 0 for all.
        timestep_choice: which: `even` (evenly spread) or `salience` (S2Q-VDiT's; calibration/observe/timestep_salience.py).
        tokens: rows of each call that statistics are made of, evenly spread; 0 for all.
        height: of a sample, in pixels; None for the pipeline's own.
        width: of a sample, in pixels.
        frames: of a clip.
        prompts: texts to sample in turn, or one alone; empty for the built-in list.
        latent: size of the inputs made up for a transformer without a pipeline, in latent cells.
        threads: of the CPU that the model runs in; another number gives other last bits of its floats.
    """

    samples: int = 32
    steps: int = 20
    seed: int = 0
    guidance: float | None = None
    buckets: int = 10
    timesteps: int = 0
    timestep_choice: str = "even"
    tokens: int = 0
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    prompts: tuple[str, ...] = ()
    latent: Size = SMALL
    threads: int = 1

    def __post_init__(self) -> None:
        """Check what the command line does not.

        Raises:
            ValueError: what is no such number, an unknown choice of timesteps, or one without a number.
        """
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r:.60}, expected a whole number")
            if value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")
            object.__setattr__(self, name, int(value))
        object.__setattr__(self, "prompts", (self.prompts,) if isinstance(self.prompts, str) else tuple(self.prompts))
        if self.timestep_choice not in TIMESTEP_CHOICES:
            raise ValueError(f"timestep choice {self.timestep_choice!r} is unknown; use one of {', '.join(TIMESTEP_CHOICES)}")
        if self.timestep_choice != "even" and not self.timesteps:
            raise ValueError("choosing timesteps by salience needs their number: --timesteps 8")

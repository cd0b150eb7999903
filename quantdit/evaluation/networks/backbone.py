"""What every network of image features offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from quantdit.evaluation.samples import middle_frames


@dataclass(frozen=True)
class Backbone:
    """A network that turns images into features, and the names of the distances on them.

    Attributes:
        name: of the network.
        features: maps images `[n, c, h, w]` in [-1, 1] to `[n, d]` float32.
        frechet: name of the Frechet distance on these features.
        kernel: name of the kernel distance.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    frechet: str
    kernel: str

    def of_samples(self, samples: Tensor) -> Tensor:
        """Return the features of images, or of the middle frames of clips `[n, f, c, h, w]`."""
        return self.features(middle_frames(samples))

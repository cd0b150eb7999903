"""Where a model came from, and transformers without a pipeline around them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from quantdit.models.known_models import KNOWN_MODELS
from quantdit.pipelines.components import ENCODERS, TRANSFORMER_NAMES
from quantdit.system import files

MODEL = "the name of a model, a hub id or a folder; a pipeline's save_pretrained writes one"


@dataclass(frozen=True)
class Source:
    """Where a model came from.

    Attributes:
        name: what the user said.
        folder: the local folder it was read from.
        components: names of its transformers; of what is to be quantized, text encoders too, the transformers first.
        bare: the folder is the transformer's own, without a pipeline around it.
        random_weights: its weights were made up.
        memory_budget: bytes that calibration is to stay within.
    """

    name: str
    folder: Path
    components: tuple[str, ...] = ("transformer",)
    bare: bool = False
    random_weights: bool = False
    memory_budget: int | None = None

    @property
    def encoders(self) -> tuple[str, ...]:
        """Return which of its components are text encoders."""
        return tuple(name for name in self.components if name in ENCODERS)

    @property
    def label(self) -> str:
        """Return the name without the path of this machine."""
        return Path(self.name).name if Path(self.name).is_dir() else self.name

    def folder_of(self, name: str) -> Path:
        """Return the folder of a component."""
        return self.folder if self.bare else self.folder / name


def check_quantized(folder: Path) -> None:
    """Refuse what cannot be the folder of a quantized model, before it is read.

    Raises:
        files.CheckpointError: the name of a known model, nothing, a file, or a folder without a transformer.
    """
    advice = "give the folder that quantdit calibrate or save_pretrained wrote"
    if not folder.exists() and str(folder) in KNOWN_MODELS:
        raise files.CheckpointError(
            f"{folder} is a model in full precision, and this command takes the folder of a quantized one; quantdit calibrate"
            f" --model {folder} --bits w4a8 writes {folder}-w4a8"
        )
    if not folder.is_dir():
        raise files.CheckpointError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}; {advice}")
    if not (folder / "config.json").exists() and not (folder / TRANSFORMER_NAMES[0]).is_dir():
        raise files.CheckpointError(f"{folder} has no transformer folder; {advice}")


class BareTransformer:
    """Transformers without the pipeline around them, under their names; they can be calibrated on made-up inputs."""

    def __init__(self, **parts: nn.Module) -> None:
        self.__dict__.update(parts)

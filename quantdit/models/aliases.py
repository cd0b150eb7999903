"""The models quantdit knows by name: one literal table."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

EMBEDDED = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class Alias:
    """One known model: where it is (`hub` id, or "" for a folder shipped in the package), its pipeline class and parameters."""

    hub: str
    pipeline: str
    transformer: str
    parameters: str
    about: str


ALIASES: dict[str, Alias] = {
    "fashion-dit": Alias("", "PixelDiTPipeline", "DiTTransformer2DModel", "4.6 M", "28x28 clothes, 10 classes; embedded"),
    "dit-xl-2-256": Alias("facebook/DiT-XL-2-256", "DiTPipeline", "DiTTransformer2DModel", "675 M", "ImageNet 256x256"),
    "pixart-sigma": Alias(
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "PixArtSigmaPipeline", "PixArtTransformer2DModel", "610 M", "text to image"
    ),
    "wan-1.3b": Alias("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "WanPipeline", "WanTransformer3DModel", "1.4 B", "text to video"),
}


def locate(model: str) -> Path | str:
    """Return the folder of a model, or its hub id: `model` is an alias, a folder, or `owner/name`.

    Raises:
        ValueError: none of these; names the near matches.
    """
    if model in ALIASES:
        return ALIASES[model].hub or EMBEDDED / model
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:
        raise ValueError(f"unknown model {model!r}: {error} Give the folder's whole path") from error
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{model} is a file; give the diffusers folder it lies in, or a name that `quantdit models` lists")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith(".") and not path.parent.is_dir():
        return model
    near = difflib.get_close_matches(model, ALIASES, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known names: {', '.join(ALIASES)}"
    raise ValueError(f"unknown model {model!r}: no known name, no folder, no hub id (owner/name); {hint}")

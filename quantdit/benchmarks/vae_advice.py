"""Whether decoding is what a pipeline needs most memory for, so that tiling the VAE helps: a line after `quantdit calibrate`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from quantdit.benchmarks.live_bytes import predicted
from quantdit.benchmarks.memory import HALF, built
from quantdit.system import files

# Whose decode live_bytes.py was held against measurements of (reports/bench/memory.md).
KNOWN = ("AutoencoderKL", "AutoencoderKLWan", "AutoencoderKLQwenImage")
SIDE = 1024  # pixels of an image where the pipeline names no size
GIB = 2**30


def vae_advice(output: Path, asked: dict[str, int | None], largest: int) -> str | None:
    """Return what to say of a pipeline's VAE; None where decoding takes less than the largest other component, or is unknown.

    Args:
        output: the pipeline's folder.
        asked: height, width and frames that it was sampled with; None for the pipeline's own.
        largest: bytes of the weights of the largest other component.
    """
    where = output / "vae" / "config.json"
    try:
        config = files.read_json(where) if where.exists() else {}
        if config.get("_class_name") not in KNOWN:
            return None
        height, width, frames = _size(output, asked)
        vae: Any = built(config)
        live = predicted(vae, _decode(vae, config, height, width, frames))
    except Exception:  # of a damaged config, whatever diffusers raises: the run that asks is finished, and well
        return None
    if live <= largest:
        return None
    what = f"{frames} frames of {width} x {height}" if frames else f"{width} x {height}"
    return (
        f"decoding {what} takes about {live / GIB:.1f} GiB beside the VAE's weights, more than any other component's weights;"
        " pipeline.vae.enable_tiling() lowers it"
    )


def _size(output: Path, asked: dict[str, int | None]) -> tuple[int, int, int | None]:
    """Return height, width and, of clips, frames of a sample: those asked for, else what the pipeline is called with."""
    import diffusers

    cls = getattr(diffusers, str(files.read_json(output / "model_index.json").get("_class_name")), None)
    known = inspect.signature(cls.__call__).parameters if isinstance(cls, type) else {}
    own = {name: known[name].default for name in ("height", "width", "num_frames") if name in known}
    height, width = (asked[name] or own.get(name) or SIDE for name in ("height", "width"))
    return height, width, (asked["frames"] or own["num_frames"]) if "num_frames" in own else None


def _decode(vae: Any, config: dict, height: int, width: int, frames: int | None) -> Any:
    """Return a call of the VAE's decode on the meta device."""
    import torch

    halvings = len(config.get("block_out_channels") or config.get("dim_mult") or (1,)) - 1
    channels = int(config.get("latent_channels") or config["z_dim"])
    in_time = 2 ** sum(map(bool, config.get("temperal_downsample", ())))
    # Images of an AutoencoderKL have no frames, those of Qwen-Image one.
    length = () if "dim_mult" not in config else (1 if frames is None else (frames - 1) // in_time + 1,)
    z = torch.zeros(1, channels, *length, height >> halvings, width >> halvings, dtype=HALF, device="meta")
    return lambda: vae.decode(z, return_dict=False)

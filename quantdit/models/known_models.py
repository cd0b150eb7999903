"""The models quantdit knows by name: one literal table."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantdit.recipes.sampling_plan import SamplingPlan, Size

EMBEDDED = Path(__file__).parent / "embedded"
# <name>.json: what the published transformer/config.json says of the shapes.
CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class KnownModel:
    """One known model.

    Attributes:
        hub: hub id, or "" for a folder shipped in the package.
        pipeline: class of the pipeline.
        transformer: class of the transformer.
        parameters: how many the transformers have in diffusers' classes. DiT's counts more than the paper's 675 M: each block
            has its own copy of the embedders.
        about: one line for `quantdit models`.
        gpu: what is sampled where there is a GPU: the sizes and steps that the model was published with. Of a video's steps 8 are
            kept: a call of Wan at 480p takes .67 GB.
        cpu: what is sampled otherwise: few steps of a small sample, which the model still takes.
        transformers: names of the pipeline's transformers; all are of the same class and quantized in one go.
    """

    hub: str
    pipeline: str
    transformer: str
    parameters: str
    about: str
    gpu: SamplingPlan
    cpu: SamplingPlan
    transformers: tuple[str, ...] = ("transformer",)


KNOWN_MODELS: dict[str, KnownModel] = {
    "fashion-dit": KnownModel(
        "",
        "PixelDiTPipeline",
        "DiTTransformer2DModel",
        "4.6 M",
        "28x28 clothes, 10 classes; embedded",
        gpu=SamplingPlan(32, 20, guidance=2.0, height=28, width=28, frames=1, latent=Size(1, 1, 28, 28)),
        cpu=SamplingPlan(32, 20, guidance=2.0, height=28, width=28, frames=1, latent=Size(1, 1, 28, 28)),
    ),
    "emoji-wan": KnownModel(
        "",
        "PixelWanPipeline",
        "WanTransformer3DModel",
        "5.3 M",
        "16 frames of 32x32, emoji that move; embedded",
        gpu=SamplingPlan(32, 20, guidance=3.0, height=32, width=32, frames=16, latent=Size(1, 16, 32, 32, 16)),
        cpu=SamplingPlan(32, 20, guidance=3.0, height=32, width=32, frames=16, latent=Size(1, 16, 32, 32, 16)),
    ),
    "wan-1.3b": KnownModel(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "WanPipeline",
        "WanTransformer3DModel",
        "1.4 B",
        "text to video",
        gpu=SamplingPlan(8, 50, guidance=5.0, height=480, width=832, frames=81, timesteps=8, latent=Size(1, 21, 60, 104, 512)),
        cpu=SamplingPlan(2, 4, guidance=5.0, height=128, width=128, frames=17, latent=Size(1, 5, 16, 16, 512)),
    ),
    "wan-14b": KnownModel(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "WanPipeline",
        "WanTransformer3DModel",
        "14.3 B",
        "text to video",
        gpu=SamplingPlan(8, 50, guidance=5.0, height=480, width=832, frames=81, timesteps=8, latent=Size(1, 21, 60, 104, 512)),
        cpu=SamplingPlan(2, 4, guidance=5.0, height=128, width=128, frames=17, latent=Size(1, 5, 16, 16, 512)),
    ),
    "wan2.2-5b": KnownModel(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "WanPipeline",
        "WanTransformer3DModel",
        "5.0 B",
        "text to video",
        # Its autoencoder takes 16 x 16 pixels to a cell.
        gpu=SamplingPlan(8, 50, guidance=5.0, height=704, width=1280, frames=121, timesteps=8, latent=Size(1, 31, 44, 80, 512)),
        cpu=SamplingPlan(2, 4, guidance=5.0, height=256, width=256, frames=17, latent=Size(1, 5, 16, 16, 512)),
    ),
    "wan2.2-a14b": KnownModel(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "WanPipeline",
        "WanTransformer3DModel",
        "28.6 B",
        "text to video; two experts, one for the noisy steps",
        gpu=SamplingPlan(8, 40, guidance=4.0, height=480, width=832, frames=81, timesteps=8, latent=Size(1, 21, 60, 104, 512)),
        cpu=SamplingPlan(2, 4, guidance=4.0, height=128, width=128, frames=17, latent=Size(1, 5, 16, 16, 512)),
        transformers=("transformer", "transformer_2"),
    ),
    "flux-dev": KnownModel(
        "black-forest-labs/FLUX.1-dev",
        "FluxPipeline",
        "FluxTransformer2DModel",
        "11.9 B",
        "text to image",
        gpu=SamplingPlan(32, 28, guidance=3.5, height=1024, width=1024, frames=1, latent=Size(1, 1, 128, 128, 512)),
        cpu=SamplingPlan(2, 4, guidance=3.5, height=256, width=256, frames=1, latent=Size(1, 1, 32, 32, 512)),
    ),
    "flux-schnell": KnownModel(
        "black-forest-labs/FLUX.1-schnell",
        "FluxPipeline",
        "FluxTransformer2DModel",
        "11.9 B",
        "text to image in 4 steps",
        gpu=SamplingPlan(64, 4, guidance=0.0, height=1024, width=1024, frames=1, latent=Size(1, 1, 128, 128, 256)),
        cpu=SamplingPlan(2, 4, guidance=0.0, height=256, width=256, frames=1, latent=Size(1, 1, 32, 32, 256)),
    ),
    "sd3.5-medium": KnownModel(
        "stabilityai/stable-diffusion-3.5-medium",
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        "2.2 B",
        "text to image",
        # 77 tokens of CLIP and 256 of T5.
        gpu=SamplingPlan(32, 28, guidance=4.5, height=1024, width=1024, frames=1, latent=Size(1, 1, 128, 128, 333)),
        cpu=SamplingPlan(2, 4, guidance=4.5, height=256, width=256, frames=1, latent=Size(1, 1, 32, 32, 333)),
    ),
    "pixart-alpha": KnownModel(
        "PixArt-alpha/PixArt-XL-2-1024-MS",
        "PixArtAlphaPipeline",
        "PixArtTransformer2DModel",
        "611 M",
        "text to image",
        gpu=SamplingPlan(32, 20, guidance=4.5, height=1024, width=1024, frames=1, latent=Size(1, 1, 128, 128, 120)),
        cpu=SamplingPlan(2, 4, guidance=4.5, height=512, width=512, frames=1, latent=Size(1, 1, 64, 64, 120)),
    ),
    "pixart-sigma": KnownModel(
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        "PixArtSigmaPipeline",
        "PixArtTransformer2DModel",
        "611 M",
        "text to image",
        gpu=SamplingPlan(32, 20, guidance=4.5, height=1024, width=1024, frames=1, latent=Size(1, 1, 128, 128, 300)),
        cpu=SamplingPlan(2, 4, guidance=4.5, height=512, width=512, frames=1, latent=Size(1, 1, 64, 64, 300)),
    ),
    "dit-xl-2-256": KnownModel(
        "facebook/DiT-XL-2-256",
        "DiTPipeline",
        "DiTTransformer2DModel",
        "750 M",
        "ImageNet 256x256",
        gpu=SamplingPlan(64, 50, guidance=4.0, height=256, width=256, frames=1, latent=Size(1, 1, 32, 32)),
        cpu=SamplingPlan(4, 10, guidance=4.0, height=256, width=256, frames=1, latent=Size(1, 1, 32, 32)),
    ),
    "dit-xl-2-512": KnownModel(
        "facebook/DiT-XL-2-512",
        "DiTPipeline",
        "DiTTransformer2DModel",
        "750 M",
        "ImageNet 512x512",
        gpu=SamplingPlan(32, 50, guidance=4.0, height=512, width=512, frames=1, latent=Size(1, 1, 64, 64)),
        cpu=SamplingPlan(2, 8, guidance=4.0, height=512, width=512, frames=1, latent=Size(1, 1, 64, 64)),
    ),
    "hunyuanvideo": KnownModel(
        "hunyuanvideo-community/HunyuanVideo",
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        "12.8 B",
        "text to video",
        gpu=SamplingPlan(8, 30, guidance=6.0, height=544, width=960, frames=61, timesteps=8, latent=Size(1, 16, 68, 120, 256)),
        cpu=SamplingPlan(2, 4, guidance=6.0, height=128, width=128, frames=17, latent=Size(1, 5, 16, 16, 256)),
    ),
    "cogvideox-2b": KnownModel(
        "THUDM/CogVideoX-2b",
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        "1.7 B",
        "text to video",
        gpu=SamplingPlan(8, 50, guidance=6.0, height=480, width=720, frames=49, timesteps=8, latent=Size(1, 13, 60, 90, 226)),
        cpu=SamplingPlan(2, 4, guidance=6.0, height=128, width=128, frames=17, latent=Size(1, 5, 16, 16, 226)),
    ),
    "cogvideox-5b": KnownModel(
        "THUDM/CogVideoX-5b",
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        "5.6 B",
        "text to video",
        gpu=SamplingPlan(8, 50, guidance=6.0, height=480, width=720, frames=49, timesteps=8, latent=Size(1, 13, 60, 90, 226)),
        cpu=SamplingPlan(2, 4, guidance=6.0, height=128, width=128, frames=17, latent=Size(1, 5, 16, 16, 226)),
    ),
    "ltx-video": KnownModel(
        "Lightricks/LTX-Video",
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        "1.9 B",
        "text to video",
        # Its autoencoder takes 32 x 32 pixels of 8 frames to a cell.
        gpu=SamplingPlan(8, 50, guidance=3.0, height=512, width=704, frames=161, timesteps=8, latent=Size(1, 21, 16, 22, 128)),
        cpu=SamplingPlan(2, 4, guidance=3.0, height=256, width=256, frames=33, latent=Size(1, 5, 8, 8, 128)),
    ),
    "latte": KnownModel(
        "maxin-cn/Latte-1",
        "LattePipeline",
        "LatteTransformer3DModel",
        "1.06 B",
        "text to video",
        gpu=SamplingPlan(8, 50, guidance=7.5, height=512, width=512, frames=16, timesteps=8, latent=Size(1, 16, 64, 64, 120)),
        # The number of frames is fixed.
        cpu=SamplingPlan(2, 4, guidance=7.5, height=128, width=128, frames=16, latent=Size(1, 16, 16, 16, 120)),
    ),
    "sana": KnownModel(
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        "SanaPipeline",
        "SanaTransformer2DModel",
        "1.6 B",
        "text to image; its feed-forwards are convolutions, which stay dense",
        # Its autoencoder takes 32 x 32 pixels to a cell.
        gpu=SamplingPlan(32, 20, guidance=4.5, height=1024, width=1024, frames=1, latent=Size(1, 1, 32, 32, 300)),
        cpu=SamplingPlan(2, 4, guidance=4.5, height=512, width=512, frames=1, latent=Size(1, 1, 16, 16, 300)),
    ),
    "qwen-image": KnownModel(
        "Qwen/Qwen-Image",
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        "20.4 B",
        "text to image",
        gpu=SamplingPlan(16, 50, guidance=4.0, height=1024, width=1024, frames=1, latent=Size(1, 1, 128, 128, 256)),
        cpu=SamplingPlan(2, 4, guidance=4.0, height=256, width=256, frames=1, latent=Size(1, 1, 32, 32, 64)),
    ),
    "z-image": KnownModel(
        "Tongyi-MAI/Z-Image",
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        "6.2 B",
        "text to image",
        gpu=SamplingPlan(32, 50, guidance=4.0, height=1024, width=1024, frames=1, latent=Size(1, 1, 128, 128, 256)),
        cpu=SamplingPlan(2, 4, guidance=4.0, height=256, width=256, frames=1, latent=Size(1, 1, 32, 32, 64)),
    ),
    "z-image-turbo": KnownModel(
        "Tongyi-MAI/Z-Image-Turbo",
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        "6.2 B",
        "text to image in 8 steps",
        gpu=SamplingPlan(64, 9, guidance=0.0, height=1024, width=1024, frames=1, latent=Size(1, 1, 128, 128, 256)),
        cpu=SamplingPlan(2, 4, guidance=0.0, height=256, width=256, frames=1, latent=Size(1, 1, 32, 32, 64)),
    ),
}


def transformer_config(name: str) -> dict:
    """Return the config of a known model's transformer (of each, if it has two), with `_class_name`: shapes without weights.

    Raises:
        ValueError: not a name of KNOWN_MODELS, or one whose config is not in the package.
    """
    if name not in KNOWN_MODELS:
        raise ValueError(f"unknown model {name!r}; known names: {', '.join(KNOWN_MODELS)}")
    path = CONFIGS / f"{name}.json" if KNOWN_MODELS[name].hub else EMBEDDED / name / "transformer" / "config.json"
    if not path.exists():
        raise ValueError(f"the shapes of {name} are not in the package")
    return json.loads(path.read_text())


def known_by_config(config: Mapping[str, Any]) -> str | None:
    """Return the first known model whose transformer has this config, as diffusers' `model.config` is; None if none has."""
    for name in KNOWN_MODELS:
        try:
            known = transformer_config(name)
        except ValueError:  # not in the package
            continue
        if known.pop("_class_name") == config.get("_class_name") and all(
            key.startswith("_") or config.get(key) == value for key, value in known.items()
        ):
            return name
    return None


def locate(model: str) -> Path | str:
    """Return the folder of a model, or its hub id: `model` is a name of KNOWN_MODELS, a folder, or `owner/name`.

    Raises:
        ValueError: none of these; names the near matches.
    """
    if model in KNOWN_MODELS:
        return KNOWN_MODELS[model].hub or EMBEDDED / model
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
    near = difflib.get_close_matches(model, KNOWN_MODELS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known names: {', '.join(KNOWN_MODELS)}"
    raise ValueError(f"unknown model {model!r}: no known name, no folder, no hub id (owner/name); {hint}")

"""The models quantdit knows by name: one literal table."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from quantdit.models.adapter import Size

EMBEDDED = Path(__file__).parent / "embedded"
# <name>.json: what the published transformer/config.json says of the shapes.
CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Capture:
    """What calibration samples.

    Attributes:
        steps: sampling steps.
        guidance: guidance scale as the pipeline takes it.
        prompts: how many prompts (or classes).
        height, width, frames: of a sample, in pixels.
        latent: the same in latent cells, for inputs made up without an autoencoder; and how many text tokens go with it.
    """

    steps: int
    guidance: float
    prompts: int
    height: int
    width: int
    frames: int
    latent: Size


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
        gpu: what is sampled where there is a GPU: the sizes and steps that the model was published with.
        cpu: what is sampled otherwise: few steps of a small sample, which the model still takes.
        transformers: names of the pipeline's transformers; all are of the same class and quantized in one go.
    """

    hub: str
    pipeline: str
    transformer: str
    parameters: str
    about: str
    gpu: Capture
    cpu: Capture
    transformers: tuple[str, ...] = ("transformer",)


KNOWN_MODELS: dict[str, KnownModel] = {
    "fashion-dit": KnownModel(
        "",
        "PixelDiTPipeline",
        "DiTTransformer2DModel",
        "4.6 M",
        "28x28 clothes, 10 classes; embedded",
        gpu=Capture(20, 2.0, 32, 28, 28, 1, Size(1, 1, 28, 28)),
        cpu=Capture(20, 2.0, 32, 28, 28, 1, Size(1, 1, 28, 28)),
    ),
    "emoji-wan": KnownModel(
        "",
        "PixelWanPipeline",
        "WanTransformer3DModel",
        "5.3 M",
        "16 frames of 32x32, emoji that move; embedded",
        gpu=Capture(20, 3.0, 32, 32, 32, 16, Size(1, 16, 32, 32, 16)),
        cpu=Capture(20, 3.0, 32, 32, 32, 16, Size(1, 16, 32, 32, 16)),
    ),
    "wan-1.3b": KnownModel(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "WanPipeline",
        "WanTransformer3DModel",
        "1.4 B",
        "text to video",
        gpu=Capture(50, 5.0, 8, 480, 832, 81, Size(1, 21, 60, 104, 512)),
        cpu=Capture(4, 5.0, 2, 128, 128, 17, Size(1, 5, 16, 16, 512)),
    ),
    "wan-14b": KnownModel(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "WanPipeline",
        "WanTransformer3DModel",
        "14.3 B",
        "text to video",
        gpu=Capture(50, 5.0, 8, 480, 832, 81, Size(1, 21, 60, 104, 512)),
        cpu=Capture(4, 5.0, 2, 128, 128, 17, Size(1, 5, 16, 16, 512)),
    ),
    "wan2.2-5b": KnownModel(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "WanPipeline",
        "WanTransformer3DModel",
        "5.0 B",
        "text to video",
        # Its autoencoder takes 16 x 16 pixels to a cell.
        gpu=Capture(50, 5.0, 8, 704, 1280, 121, Size(1, 31, 44, 80, 512)),
        cpu=Capture(4, 5.0, 2, 256, 256, 17, Size(1, 5, 16, 16, 512)),
    ),
    "wan2.2-a14b": KnownModel(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "WanPipeline",
        "WanTransformer3DModel",
        "28.6 B",
        "text to video; two experts, one for the noisy steps",
        gpu=Capture(40, 4.0, 8, 480, 832, 81, Size(1, 21, 60, 104, 512)),
        cpu=Capture(4, 4.0, 2, 128, 128, 17, Size(1, 5, 16, 16, 512)),
        transformers=("transformer", "transformer_2"),
    ),
    "flux-dev": KnownModel(
        "black-forest-labs/FLUX.1-dev",
        "FluxPipeline",
        "FluxTransformer2DModel",
        "11.9 B",
        "text to image",
        gpu=Capture(28, 3.5, 32, 1024, 1024, 1, Size(1, 1, 128, 128, 512)),
        cpu=Capture(4, 3.5, 2, 256, 256, 1, Size(1, 1, 32, 32, 512)),
    ),
    "flux-schnell": KnownModel(
        "black-forest-labs/FLUX.1-schnell",
        "FluxPipeline",
        "FluxTransformer2DModel",
        "11.9 B",
        "text to image in 4 steps",
        gpu=Capture(4, 0.0, 64, 1024, 1024, 1, Size(1, 1, 128, 128, 256)),
        cpu=Capture(4, 0.0, 2, 256, 256, 1, Size(1, 1, 32, 32, 256)),
    ),
    "sd3.5-medium": KnownModel(
        "stabilityai/stable-diffusion-3.5-medium",
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        "2.2 B",
        "text to image",
        # 77 tokens of CLIP and 256 of T5.
        gpu=Capture(28, 4.5, 32, 1024, 1024, 1, Size(1, 1, 128, 128, 333)),
        cpu=Capture(4, 4.5, 2, 256, 256, 1, Size(1, 1, 32, 32, 333)),
    ),
    "pixart-alpha": KnownModel(
        "PixArt-alpha/PixArt-XL-2-1024-MS",
        "PixArtAlphaPipeline",
        "PixArtTransformer2DModel",
        "611 M",
        "text to image",
        gpu=Capture(20, 4.5, 32, 1024, 1024, 1, Size(1, 1, 128, 128, 120)),
        cpu=Capture(4, 4.5, 2, 512, 512, 1, Size(1, 1, 64, 64, 120)),
    ),
    "pixart-sigma": KnownModel(
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        "PixArtSigmaPipeline",
        "PixArtTransformer2DModel",
        "611 M",
        "text to image",
        gpu=Capture(20, 4.5, 32, 1024, 1024, 1, Size(1, 1, 128, 128, 300)),
        cpu=Capture(4, 4.5, 2, 512, 512, 1, Size(1, 1, 64, 64, 300)),
    ),
    "dit-xl-2-256": KnownModel(
        "facebook/DiT-XL-2-256",
        "DiTPipeline",
        "DiTTransformer2DModel",
        "750 M",
        "ImageNet 256x256",
        gpu=Capture(50, 4.0, 64, 256, 256, 1, Size(1, 1, 32, 32)),
        cpu=Capture(10, 4.0, 4, 256, 256, 1, Size(1, 1, 32, 32)),
    ),
    "dit-xl-2-512": KnownModel(
        "facebook/DiT-XL-2-512",
        "DiTPipeline",
        "DiTTransformer2DModel",
        "750 M",
        "ImageNet 512x512",
        gpu=Capture(50, 4.0, 32, 512, 512, 1, Size(1, 1, 64, 64)),
        cpu=Capture(8, 4.0, 2, 512, 512, 1, Size(1, 1, 64, 64)),
    ),
    "hunyuanvideo": KnownModel(
        "hunyuanvideo-community/HunyuanVideo",
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        "12.8 B",
        "text to video",
        gpu=Capture(30, 6.0, 8, 544, 960, 61, Size(1, 16, 68, 120, 256)),
        cpu=Capture(4, 6.0, 2, 128, 128, 17, Size(1, 5, 16, 16, 256)),
    ),
    "cogvideox-2b": KnownModel(
        "THUDM/CogVideoX-2b",
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        "1.7 B",
        "text to video",
        gpu=Capture(50, 6.0, 8, 480, 720, 49, Size(1, 13, 60, 90, 226)),
        cpu=Capture(4, 6.0, 2, 128, 128, 17, Size(1, 5, 16, 16, 226)),
    ),
    "cogvideox-5b": KnownModel(
        "THUDM/CogVideoX-5b",
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        "5.6 B",
        "text to video",
        gpu=Capture(50, 6.0, 8, 480, 720, 49, Size(1, 13, 60, 90, 226)),
        cpu=Capture(4, 6.0, 2, 128, 128, 17, Size(1, 5, 16, 16, 226)),
    ),
    "ltx-video": KnownModel(
        "Lightricks/LTX-Video",
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        "1.9 B",
        "text to video",
        # Its autoencoder takes 32 x 32 pixels of 8 frames to a cell.
        gpu=Capture(50, 3.0, 8, 512, 704, 161, Size(1, 21, 16, 22, 128)),
        cpu=Capture(4, 3.0, 2, 256, 256, 33, Size(1, 5, 8, 8, 128)),
    ),
    "latte": KnownModel(
        "maxin-cn/Latte-1",
        "LattePipeline",
        "LatteTransformer3DModel",
        "1.06 B",
        "text to video",
        gpu=Capture(50, 7.5, 8, 512, 512, 16, Size(1, 16, 64, 64, 120)),
        # The number of frames is fixed.
        cpu=Capture(4, 7.5, 2, 128, 128, 16, Size(1, 16, 16, 16, 120)),
    ),
    "sana": KnownModel(
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        "SanaPipeline",
        "SanaTransformer2DModel",
        "1.6 B",
        "text to image; its feed-forwards are convolutions, which stay dense",
        # Its autoencoder takes 32 x 32 pixels to a cell.
        gpu=Capture(20, 4.5, 32, 1024, 1024, 1, Size(1, 1, 32, 32, 300)),
        cpu=Capture(4, 4.5, 2, 512, 512, 1, Size(1, 1, 16, 16, 300)),
    ),
    "qwen-image": KnownModel(
        "Qwen/Qwen-Image",
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        "20.4 B",
        "text to image",
        gpu=Capture(50, 4.0, 16, 1024, 1024, 1, Size(1, 1, 128, 128, 256)),
        cpu=Capture(4, 4.0, 2, 256, 256, 1, Size(1, 1, 32, 32, 64)),
    ),
    "z-image": KnownModel(
        "Tongyi-MAI/Z-Image",
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        "6.2 B",
        "text to image",
        gpu=Capture(50, 4.0, 32, 1024, 1024, 1, Size(1, 1, 128, 128, 256)),
        cpu=Capture(4, 4.0, 2, 256, 256, 1, Size(1, 1, 32, 32, 64)),
    ),
    "z-image-turbo": KnownModel(
        "Tongyi-MAI/Z-Image-Turbo",
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        "6.2 B",
        "text to image in 8 steps",
        gpu=Capture(9, 0.0, 64, 1024, 1024, 1, Size(1, 1, 128, 128, 256)),
        cpu=Capture(4, 0.0, 2, 256, 256, 1, Size(1, 1, 32, 32, 64)),
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

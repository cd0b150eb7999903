"""Networks whose weights the user brings: the original FID Inception and CLIP; and images read from a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantdit.evaluation.metrics.inception import with_weights
from quantdit.evaluation.metrics.measures import Backbone, cmmd_of
from quantdit.evaluation.samples import middle_frames
from quantdit.system.optional_import import require

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases"
INCEPTION_NAME = "InceptionV3-FID"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BATCH = 32


@dataclass(frozen=True)
class Clip:
    """A CLIP model.

    Attributes:
        name: which, as the number's name says.
        images: `[n, c, h, w]` in [-1, 1], cropped to their middle square or pressed into a square, to embeddings `[n, d]`.
        texts: prompts to embeddings `[n, d]`.
    """

    name: str
    images: Callable[[Tensor, bool], Tensor]
    texts: Callable[[Sequence[str]], Tensor]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the CLIP score `100 max(0, cos)` of each image, or each clip's middle frame, and its prompt, `[n]` float64.

        (Hessel et al. 2021, arXiv 2104.08718, in the scale of torchmetrics; pictures are cropped as CLIP crops them.)
        """
        pictures, texts = self.images(middle_frames(images), True).double(), self.texts(prompts).double()
        return 100 * torch.cosine_similarity(pictures, texts, dim=1).clamp_min(0)

    def distances(self, images: Sequence[Tensor], prompts: tuple[str, ...]) -> dict[str, dict]:
        """Return the CMMD of candidate and of other seeds to the reference; images of reference, candidate and other seeds.

        CMMD's own code presses whole pictures into CLIP's square.
        """
        embedded = [self.images(middle_frames(x), False) for x in images]
        return {f"CMMD ({self.name})": cmmd_of(*embedded, prompts)}


def inception(path: Path) -> Backbone:
    """Return the network of the FID (Heusel et al. 2017) with the weights of `path`.

    The file is `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity's releases, or pytorch-fid's `pt_inception-...`.

    Raises:
        ValueError: no such file, or not these weights.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --inception-weights takes {INCEPTION_FILE}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # a pickle of anything else than tensors is refused
    except Exception as error:  # whatever unpickling a damaged file raises
        raise ValueError(f"{path}: no file of weights alone ({type(error).__name__}); fetch {INCEPTION_FILE}") from error
    try:
        network = with_weights(state)
    except ValueError as error:
        raise ValueError(f"{path}: not the weights of the FID's Inception v3: {error}; fetch {INCEPTION_FILE}") from error

    def features(images: Tensor) -> Tensor:
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().expand(-1, 3, -1, -1)
        with torch.inference_mode():
            return torch.cat([network(part) for part in pixels.split(BATCH)])

    return Backbone(INCEPTION_NAME, features, "FID", "KID")


def load_clip(folder: Path) -> Clip:
    """Return a CLIP model of a folder as `transformers` saves it.

    Raises:
        ValueError: it holds no CLIP model.
        ModuleNotFoundError: transformers is not installed.
    """
    transformers = require("transformers", "text")
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no config.json; --clip-weights takes a folder of a CLIP model as transformers saves it")
    try:
        model, loaded = transformers.CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: no CLIP model that can be loaded: {str(error).strip().splitlines()[0]}") from error
    # What transformers would make up.
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"{folder}: no whole CLIP model: it lacks {len(missing)} tensors, the first is {missing[0]}")
    if wrong := sorted(loaded["mismatched_keys"]):
        name, given, expected = wrong[0]
        raise ValueError(f"{folder}: its config.json says otherwise: {name} is {list(given)}, expected {list(expected)}")
    model.eval()
    size, longest = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_DEVIATION))

    def images(pictures: Tensor, crop: bool) -> Tensor:
        sides = pictures.shape[-2:]
        wanted = [side * size // min(sides) for side in sides] if crop else [size, size]
        x = torch.nn.functional.interpolate(pictures.float(), wanted, mode="bicubic", antialias=True)
        top, left = ((side - size) // 2 for side in wanted)
        x = x[..., top : top + size, left : left + size]
        x = ((x.clamp(-1, 1) + 1) / 2).expand(-1, 3, -1, -1)
        with torch.inference_mode():
            return torch.cat(
                [model.visual_projection(model.vision_model(p).pooler_output) for p in ((x - mean) / deviation).split(BATCH)]
            )

    def texts(prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        with torch.inference_mode():
            return model.text_projection(model.text_model(**tokens).pooler_output)

    return Clip(f"CLIP-{folder.resolve().name}", images, texts)


# Of the images CLIP was trained on (OpenAI's preprocessing).
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def read_images(folder: Path) -> list[Tensor]:
    """Return the pictures of a folder, in order of their names, each `[1, 3, h, w]` in [-1, 1].

    Raises:
        ValueError: no folder, fewer than two pictures, or one that cannot be read.
    """
    from PIL import Image

    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES) if folder.is_dir() else []
    if len(paths) < 2:
        raise ValueError(f"{folder}: {len(paths)} pictures, expected a folder of at least two ({', '.join(PICTURES)})")
    found = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                pixels = torch.from_numpy(np.array(picture.convert("RGB")))
        except OSError as error:
            raise ValueError(f"{path}: no picture that can be read; remove it or fetch it again") from error
        found.append(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)
    return found

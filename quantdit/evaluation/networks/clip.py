"""CLIP, with weights that the user brings: the CLIP score and the embeddings of the CMMD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantdit.evaluation.samples import middle_frames
from quantdit.system.optional_import import require

BATCH = 32
# Of the images CLIP was trained on (OpenAI's preprocessing).
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Clip:
    """A CLIP model.

    Attributes:
        name: of the model, which the names of its measures carry.
        images: maps images `[n, c, h, w]` in [-1, 1] to embeddings `[n, d]`; True crops them to their middle square, False
            squeezes them into a square.
        texts: maps prompts to embeddings `[n, d]`.
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

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the embeddings `[n, d]` of images, or of clips' middle frames, as CMMD's own code makes them: squeezed."""
        return self.images(middle_frames(images), False)


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

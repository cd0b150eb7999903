"""`PixelDiTPipeline`: class-conditional generation straight in pixels with a DiT and a flow-matching scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.pil_utils import numpy_to_pil

from quantdit.models.class_names import class_number
from quantdit.models.pixel_checks import check_callback, check_size, noise


class PixelDiTOutput(BaseOutput):
    """`images`: a list of PIL images, or floats in [0, 1], numpy `[n, h, w, c]` or torch `[n, c, h, w]`."""

    images: list | np.ndarray | torch.Tensor


class PixelDiTPipeline(DiffusionPipeline):
    """Sample images of given classes: `pipe([0, 1, 2], generator=...)`, or by their names: `pipe("sneaker")`.

    The model predicts the velocity `noise - image` at `sigma = timestep / 1000`; the class after the last real one is the
    "no class" of classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).
    """

    model_cpu_offload_seq = "transformer"
    own_files = ()  # weights that it reads besides its components'

    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(class_names=None if class_names is None else list(class_names))

    @property
    def sizes(self) -> dict[str, int]:
        """The one height and width of an image, in pixels."""
        side = self.transformer.config["sample_size"]
        return {"height": side, "width": side}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        guidance_scale: float = 2.0,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PixelDiTOutput | tuple:
        """Generate one image per label.

        Args:
            class_labels: numbers below the number of classes, or names of `config.class_names`; one, or several.
            guidance_scale: 1 means no guidance and half the work.
            num_inference_steps: Euler steps.
            generator: one for all images, or one per image, which makes an image independent of its batch.
            output_type: `pil`, `np` or `pt`, as in PixelDiTOutput.
            return_dict: return a tuple if False.
            height: the model's own, in pixels, or None.
            width: the same.
            callback_on_step_end: called after each step with the pipeline, the number of the step, its timestep and the tensors
                asked for; `latents` of the dict that it returns takes the place of `[n, c, h, w]`.
            callback_on_step_end_tensor_inputs: `latents` is what there is.

        Raises:
            ValueError: a label that is no class, another size than the model's, another number of generators than labels, or a
                tensor that a callback cannot have.
        """
        config: Any = self.transformer.config
        classes = config.num_embeds_ada_norm
        given = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        class_labels = [class_number(self, label) for label in given]
        check_size(self, height=height, width=width)
        check_callback(self, callback_on_step_end_tensor_inputs)
        n, device = len(class_labels), self._execution_device
        x = noise((config.in_channels, config.sample_size, config.sample_size), n, generator, device, "image")
        dtype = next((p.dtype for p in self.transformer.parameters() if p.is_floating_point()), torch.float32)
        labels = torch.tensor(class_labels, device=device)
        guided = guidance_scale != 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, classes)])

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):  # pyright: ignore[reportArgumentType, reportCallIssue] - undecorated
            inputs = torch.cat([x, x]) if guided else x
            v = self.transformer(inputs.to(dtype), timestep=t.expand(len(inputs)), class_labels=labels).sample.float()
            if guided:
                conditional, unconditional = v.chunk(2)
                v = unconditional + guidance_scale * (conditional - unconditional)
            x = self.scheduler.step(v, t, x).prev_sample
            if callback_on_step_end is not None:
                given = dict.fromkeys(callback_on_step_end_tensor_inputs, x)
                x = (callback_on_step_end(self, i, t, given) or {}).get("latents", x)
        images = (x / 2 + 0.5).clamp(0, 1)
        self.maybe_free_model_hooks()
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = numpy_to_pil(images)
        return PixelDiTOutput(images=images) if return_dict else (images,)


# Where DiffusionPipeline.from_pretrained looks for the class that a folder names.
diffusers.PixelDiTPipeline = PixelDiTPipeline  # pyright: ignore[reportAttributeAccessIssue] - it is ours

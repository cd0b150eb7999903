"""PixelDiTPipeline: the sampler of the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantdit.models.pixel_dit import PixelDiTPipeline
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline


@pytest.fixture(scope="module")
def pipeline(pixel_dit: Path):
    return load_pipeline(str(pixel_dit))[0]


def noise(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_an_image_does_not_depend_on_its_batch(pipeline) -> None:
    both = pipeline([0, 1], generator=noise(1, 2), num_inference_steps=3, output_type="pt").images
    alone = pipeline([1], generator=noise(2), num_inference_steps=3, output_type="pt").images
    # Another batch size may sum in another order: three steps of float32 rounding on values of order 1.
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)


def test_euler_steps_of_a_known_velocity_reach_the_known_end(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """With v = noise - image for one fixed image, the straight path ends in that image from any noise, in any number of steps."""
    image = torch.linspace(-0.9, 0.9, 64).reshape(1, 1, 8, 8)

    def velocity(x, timestep, class_labels):
        sigma = timestep[0] / 1000

        class Output:
            sample = (x - image) / sigma.clamp_min(1e-6)

        return Output

    monkeypatch.setattr(pipeline.transformer, "forward", velocity)
    end = pipeline([0], generator=noise(3), num_inference_steps=4, output_type="pt").images
    torch.testing.assert_close(end * 2 - 1, image, atol=1e-4, rtol=0)


def test_guidance_mixes_the_label_with_the_class_after_the_last(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = pipeline.transformer.forward

    def record(x, timestep, class_labels):
        seen.append(class_labels.tolist())
        return forward(x, timestep=timestep, class_labels=class_labels)

    monkeypatch.setattr(pipeline.transformer, "forward", record)
    pipeline([2], generator=noise(1), num_inference_steps=1, guidance_scale=2.0)
    pipeline([2], generator=noise(1), num_inference_steps=1, guidance_scale=1.0)
    assert seen == [[2, 3], [2]]


def test_output_types_agree(pipeline) -> None:
    images = {
        kind: pipeline([1], generator=noise(5), num_inference_steps=2, output_type=kind).images for kind in ("pt", "np", "pil")
    }
    assert torch.equal(images["pt"].permute(0, 2, 3, 1), torch.from_numpy(images["np"]))
    assert images["pil"][0].size == (8, 8)
    assert float(images["pt"].min()) >= 0 and float(images["pt"].max()) <= 1


def test_a_label_out_of_range_is_refused(pipeline) -> None:
    with pytest.raises(ValueError, match=r"class 3 is out of range: this model knows classes 0\.\.2"):
        pipeline([0, 3])


def test_generators_must_match_the_images(pipeline) -> None:
    with pytest.raises(ValueError, match="got 1 generators for 2 images"):
        pipeline([0, 1], generator=noise(1))


def test_a_class_goes_by_its_name_too(pixel_dit: Path, pipeline, tmp_path: Path) -> None:
    """The names are kept in the folder; without names, a name is refused in words."""
    with pytest.raises(ValueError, match=r"no class 'sneaker'; this model knows classes by number, 0\.\.2"):
        pipeline("sneaker")
    named = PixelDiTPipeline(pipeline.transformer, pipeline.scheduler, ["boot", "bag", "sneaker"])
    named.save_pretrained(tmp_path)
    again = load_pipeline(str(tmp_path))[0]
    options = {"num_inference_steps": 1, "output_type": "pt"}
    for label in ("sneaker", ["sneaker"], 2):
        assert torch.equal(
            again(label, generator=noise(1), **options).images, pipeline([2], generator=noise(1), **options).images
        )
    assert torch.equal(generate(again, 2, 0, 1, classes=["bag", 0]), generate(again, 2, 0, 1, classes=[1, 0]))
    with pytest.raises(ValueError, match="no class 'sneker'; this model's are boot, bag, sneaker"):
        again("sneker")
    assert load_pipeline("fashion-dit")[0].config.class_names[7] == "sneaker"


def test_it_is_of_one_size(pipeline) -> None:
    assert pipeline([0], height=8, width=8, num_inference_steps=1, output_type="pt").images.shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="height is 16, but this model makes 8 x 8 pixels and nothing else"):
        pipeline([0], height=16)


def test_a_callback_sees_every_step_and_may_change_the_latents(pipeline) -> None:
    seen = []

    def black(pipe, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        seen.append((pipe is pipeline, step, float(timestep), tensors["latents"].shape))
        return {"latents": torch.full_like(tensors["latents"], -1.0)}

    image = pipeline([0], num_inference_steps=3, callback_on_step_end=black, output_type="pt").images
    assert [(mine, step, shape) for mine, step, _, shape in seen] == [(True, i, (1, 1, 8, 8)) for i in range(3)]
    assert seen[0][2] > seen[1][2] > seen[2][2] and float(image.abs().max()) == 0
    with pytest.raises(ValueError, match="has 'prompt_embeds'; there is latents"):
        pipeline([0], callback_on_step_end=black, callback_on_step_end_tensor_inputs=["prompt_embeds"])

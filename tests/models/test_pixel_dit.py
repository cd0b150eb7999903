"""PixelDiTPipeline: the sampler of the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantdit.pipeline import load_pipeline


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

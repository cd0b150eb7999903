"""The memory table: published shapes, bytes that files have, and verdicts that follow from both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantdit
from quantdit.benchmarks import memory, memory_report
from quantdit.benchmarks.live_bytes import predicted
from quantdit.benchmarks.memory import GIB, RESERVE, Stage, Subject, Weights
from quantdit.checkpoints.random_weights import write_random_transformer
from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan
from quantdit.models.known_models import CONFIGS
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits
from quantdit.recipes.sampling_plan import SamplingPlan, Size
from quantdit.system import files
from tiny_models import TINY

WAN = {"_class_name": "WanTransformer3DModel"} | TINY["WanTransformer3DModel"][0]

# Parameters of the published weight files: their bytes by those of their type.
PARAMETERS = {
    "umt5-xxl": 5_680_910_336,
    "t5-xxl": 4_762_310_656,
    "clip-l": 123_060_480,
    "clip-l-projection": 123_650_304,
    "clip-g": 694_659_840,
    "qwen2.5-vl-7b": 8_292_166_656,
    "wan-vae": 126_892_531,
    "qwen-image-vae": 126_892_531,
    "flux-vae": 83_819_683,
    "sd3-vae": 83_819_683,
}


def test_every_part_is_of_a_pipeline() -> None:
    used = {subject.vae for subject in memory.SUBJECTS} | {name for s in memory.SUBJECTS for name, _ in s.encoders.values()}
    assert used == PARAMETERS.keys() == {path.stem for path in (CONFIGS / "parts").glob("*.json")}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_the_published_ones(name: str) -> None:
    pytest.importorskip("transformers")
    config = memory.part_config(name)
    model = memory.built(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    ignored = set(config) - set(model.config if "_class_name" in config else model.config.to_dict()) - {"_class_name"}
    assert ignored <= {"feed_forward_proj"}, "a field that the class does not know would be ignored"


@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w2a16"])
def test_predicted_bytes_are_those_of_a_calibrated_file(bits: str, tmp_path: Path) -> None:
    write_random_transformer(WAN, tmp_path / "dense", 0)
    dense = sum(files.tensor_bytes(tmp_path / "dense").values())
    model = memory.built(WAN)
    assert memory.weights_of(model, {}).file == dense
    pipeline, source = load_pipeline(str(tmp_path / "dense"))
    compile(pipeline, source, Plan(from_bits(bits), SamplingPlan(samples=0)), tmp_path / "out")
    written = files.tensor_bytes(tmp_path / "out" / "transformer")
    specs = memory.layer_specs(model, bits)
    assert memory.weights_of(model, specs).file == sum(written.values()) < dense
    loaded = load_pipeline(str(tmp_path / "out"), torch.bfloat16)[0].transformer
    in_memory = sum(t.nbytes for t in (*loaded.parameters(), *loaded.buffers()))
    assert memory.weights_of(model, specs).memory == in_memory


@pytest.mark.parametrize("bits", ["w8a16", "w4a16"])
def test_predicted_bytes_of_a_text_encoder_are_those_of_its_file(bits: str, tmp_path: Path) -> None:
    """Its table of words, which two modules look up, counts once."""
    transformers = pytest.importorskip("transformers")
    config = memory.part_config("umt5-xxl") | {"d_model": 64, "d_ff": 128, "num_heads": 2, "num_layers": 2, "vocab_size": 1000}
    model = memory.built(config)
    assert isinstance(model, transformers.UMT5EncoderModel)
    parameters = sum(p.numel() for p in model.parameters())
    assert memory.weights_of(model, {}) == Weights(2 * parameters, 2 * parameters)
    real = transformers.UMT5EncoderModel(model.config).bfloat16()
    quantdit.quantize(real, bits).save_pretrained(tmp_path)
    assert memory.weights_of(model, memory.layer_specs(model, bits)).file == sum(files.tensor_bytes(tmp_path).values())


def test_two_blocks_tell_what_lives_at_once_in_any_number() -> None:
    size = Size(1, 3, 16, 16, 6)
    found = []
    for count in (2, 5):
        model = memory.built(WAN | {"num_layers": count})
        found.append(predicted(model, memory.transformer_call(model, size)[0]))
    assert found[0] == found[1] > 0


@pytest.mark.parametrize(("height", "width"), [(40, 40), (20, 70)])
def test_a_tiled_decode_takes_what_its_formula_says(height: int, width: int) -> None:
    vae = memory.built(memory.part_config("qwen-image-vae") | {"base_dim": 8})
    said = memory.tiled_decode(vae, 1, height, width)
    vae.enable_tiling()
    assert said == pytest.approx(predicted(vae, memory.decode_call(vae, 1, height, width)[0]), rel=0.03)


def test_a_vae_whose_tile_holds_the_sample_has_no_tiles() -> None:
    vae = memory.built(memory.part_config("wan-vae") | {"base_dim": 8})
    assert memory.tiled_decode(vae, 1, 32, 32) is None
    assert memory.vae_stage("flux-vae", 1).tiled is None


def stages(encoder: float, transformer: float, decode: float, tiled: float | None = None) -> list[Stage]:
    """A pipeline in GiB; the transformer's step takes one more."""
    bytes_of = lambda size: Weights(0, round(size * GIB))  # noqa: E731
    return [
        Stage("text_encoder", bytes_of(encoder), 0),
        Stage("transformer", bytes_of(transformer), GIB),
        Stage("vae", bytes_of(0.25), round(decode * GIB), None if tiled is None else round(tiled * GIB)),
    ]


def test_what_fits_a_card() -> None:
    assert memory.peak(stages(5, 2, 0.5), resident=True, tiled=False) == (round(8.25 * GIB), "transformer")
    assert memory.peak(stages(5, 2, 0.5), resident=False, tiled=False) == (5 * GIB, "text_encoder")
    assert memory.peak(stages(1, 2, 6, 0.5), resident=False, tiled=False) == (round(6.25 * GIB), "vae")
    assert memory.peak(stages(1, 2, 6, 0.5), resident=False, tiled=True) == (3 * GIB, "transformer")
    assert RESERVE == 0.75 * GIB
    cases = {
        "all": stages(5, 2, 0.5),
        "all, tiled": stages(4, 2, 6, 0.5),
        "offload": stages(7, 2, 3),
        "offload, tiled": stages(6, 2, 8, 0.5),
        "no": stages(9, 2, 1),
    }
    assert {way: memory.verdict(given, 9 if way == "all" else 8) for way, given in cases.items()} == {way: way for way in cases}
    assert memory.verdict(stages(7.26, 2, 1), 8) == "no", "the reserve"


def test_rows_make_a_page_and_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(memory, "stages_of", lambda subject, name: stages(8 if name == "bf16" else 2, 4, 6, 1))
    made = [
        row | {"torch": "2", "commit": "c", "command": "quantdit bench memory"}
        for row in memory.rows_of(Subject("m", {}, "v", 1))
    ]
    made.append({"what": "check", "of": "a file", "predicted_bytes": 10**6, "measured_bytes": 2 * 10**6, "ratio": 0.5})
    lines = memory_report.markdown(made, "memory.png").splitlines()
    line = "| m | bf16 | 12.2 | 18.2 (vae) | 8.0 (encoder) | 8.0 (encoder) | no | no | offload | all, tiled | all |"
    assert line in lines
    assert (
        "| transformer | w8a8 | w4a8 | w3a8 | w2a16 |" in lines and "| text encoders | w8a16 | w4a16 | w3a16 | w4a16 |" in lines
    )
    assert "| m | the same, tiled | 1.0 | 1.0 | 1.0 | 1.0 | 1.0 |" in lines
    assert "| a file | 1.00 | 2.00 | 0.500 |" in lines
    memory_report.draw(tmp_path / "memory.png", made)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")

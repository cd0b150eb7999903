"""ONNX export: graphs that compute what the checkpoint computes, for the sizes they say, or no file at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import quantdit
from quantdit import exporters
from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan
from quantdit.exporters import onnx_cleaning, onnx_digest, onnx_session, onnx_weights, to_onnx
from quantdit.exporters.onnx_session import use_graph
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits
from quantdit.recipes.sampling_plan import SamplingPlan
from quantdit.system.files import CheckpointError, read_json, write_json

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def graph(everything, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The DiT with every weight format, activation and transform in it, and what the export returned."""
    path = tmp_path_factory.mktemp("graph") / "everything.onnx"
    return path, to_onnx.to_onnx(everything.folder, path)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny quantized Wan without a pipeline, and its graph with weights in a file of their own."""
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 48, "freq_dim": 16, "ffn_dim": 128, "num_layers": 1}
    torch.manual_seed(0)
    model = WanTransformer3DModel(in_channels=4, out_channels=4, **sizes)
    folder = tmp_path_factory.mktemp("wan")
    model.save_pretrained(folder / "dense")
    transformer, source = load_pipeline(str(folder / "dense"))
    compile(transformer, source, Plan(from_bits("w4a8"), SamplingPlan(samples=0)), folder / "w4a8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "SINGLE_FILE_BYTES", 1000)
        to_onnx.to_onnx(folder / "w4a8", folder / "wan.onnx", storage="int8")
    return folder / "w4a8", folder / "wan.onnx"


def test_folding_says_nothing_of_the_nodes_that_it_leaves(caplog: pytest.LogCaptureFixture) -> None:
    """Wan's rotary tables are split: the folder computed that, dropped it and said so, once for each, on the terminal."""
    import onnx_ir
    from onnx import parser

    text = """<ir_version: 10, opset_import: ["": 23]>
    g (float[4] x) => (float[4] y) <float[4] c = {1, 2, 3, 4}>
    { a, b = Split<num_outputs = 2>(c)
      d = Concat<axis = 0>(b, a)
      y = Add(x, d) }"""
    model = onnx_ir.from_proto(parser.parse_model(text))
    onnx_cleaning.fold(model)
    assert [node.op_type for node in model.graph] == ["Split", "Concat", "Add"] and not caplog.text


def test_every_part_agrees_with_pytorch(graph, everything) -> None:
    found = graph[1]["verified"]
    assert found["parts_rel_rmse"] < 1e-3
    assert found["rel_rmse"] <= max(1e-3, 4 * found["ties"])
    assert found["calls"] == 2 and found["milliseconds"] > 0
    config = read_json(everything.folder / "transformer" / "config.json")
    assert graph[1]["sha256"] == config["quantization_config"]["sha256"]
    assert len(graph[1]["layers"]) == len(config["quantization_config"]["layers"])
    assert onnx_session.open_graph(graph[0])[1] == graph[1]


def test_the_sampler_makes_the_same_pictures(graph, everything) -> None:
    pipeline, source = load_pipeline(str(everything.folder))
    expected = generate(pipeline, 5, 1, 4)
    use_graph(pipeline, source, graph[0])
    # Five of them: another batch than the graph was traced with.
    error = ((generate(pipeline, 5, 1, 4) - expected) / 2).square().flatten(1).mean(1)
    assert float(-10 * error.max().log10()) >= 40


def test_the_command_line_exports_and_generates(graph, everything, pixel_dit: Path, tmp_path: Path, cli) -> None:
    quick = ("--steps", "2", "--count", "2", "--output")
    assert cli("generate", everything.folder, "--onnx", graph[0], *quick, tmp_path / "graph.png").code == 0
    assert (tmp_path / "graph.png").exists()
    other = cli("generate", pixel_dit, "--onnx", graph[0], *quick, tmp_path / "x.png")
    assert other.code == 1 and "exported from another checkpoint" in other.error
    for arguments, wrong in (
        ((everything.folder, "--output", graph[0]), "exists"),
        ((everything.folder, "--output", tmp_path / "graph"), "must end in .onnx"),
        ((everything.folder, "--part", "transformer_2", "--output", tmp_path / "x.onnx"), "has no transformer_2"),
        ((pixel_dit, "--output", tmp_path / "x.onnx"), "is not quantized"),
    ):
        ran = cli("export", *arguments, "--to", "onnx")
        assert ran.code == 1 and wrong in ran.error
    assert not list(tmp_path.glob("*.onnx")) and not list(tmp_path.glob(".*"))


def test_nodes_are_named_by_module_and_only_standard_ones(graph, everything) -> None:
    model = onnx.load(graph[0])
    onnx.checker.check_model(model, full_check=True)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", to_onnx.OPSET)}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    known = {name for name, _ in everything.transformer.named_modules()} | everything.transformer.state_dict().keys()
    outside = [name for name in names if name.rpartition("/")[0].partition("~")[0] not in known]
    assert outside and all(name.startswith("timestep_bucket/") for name in outside)
    assert "transformer_blocks.1.attn1.to_k/MatMul" in names
    assert [value.name for value in model.graph.output] == ["sample"]


def test_sizes_that_the_graph_is_not_for_are_refused(graph, everything) -> None:
    pipeline, source = load_pipeline(str(everything.folder))
    forward = use_graph(pipeline, source, graph[0])
    call = {"timestep": torch.full((3,), 500.0), "class_labels": torch.tensor([0, 1, 2])}
    assert pipeline.transformer(torch.randn(3, 1, 8, 8), **call).sample.shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match=r"hidden_states is \[3, 1, 16, 8\].* batch may vary, the other sizes are fixed"):
        pipeline.transformer(torch.randn(3, 1, 16, 8), **call)
    with pytest.raises(ValueError, match="needs the input class_labels"):
        forward.run({"hidden_states": torch.randn(3, 1, 8, 8), "timestep": call["timestep"]})
    with pytest.raises(ValueError, match="has no input mask"):
        forward.run({"hidden_states": torch.randn(3, 1, 8, 8), **call, "mask": torch.ones(3)})


def test_a_video_graph_takes_other_sizes(wan) -> None:
    folder, path = wan
    assert path.with_name("wan.onnx.data").stat().st_size > path.stat().st_size / 4
    bare, source = load_pipeline(str(folder))
    g = torch.Generator().manual_seed(0)
    for batch, frames, height, width, tokens in ((1, 2, 6, 10, 5), (3, 5, 4, 4, 9)):
        call = {
            "hidden_states": torch.randn(batch, 4, frames, height, width, generator=g),
            "timestep": torch.full((batch,), 300),
            "encoder_hidden_states": torch.randn(batch, tokens, 48, generator=g),
        }
        with torch.no_grad():
            expected = bare.transformer(**call, return_dict=False)[0]
        forward = use_graph(bare, source, path)
        got = bare.transformer(**call, return_dict=False)[0]
        del bare.transformer.forward
        # 8-bit activations: ties (test_onnx_layers.py holds every layer to float32).
        assert float((got - expected).norm() / expected.norm()) < 2e-3
    assert forward.metadata["dynamic"] == ["batch", "frames", "height", "tokens", "width"]


def test_a_graph_that_computes_something_else_is_not_written(everything, tmp_path: Path, monkeypatch) -> None:
    right = onnx_weights._integers
    monkeypatch.setattr(onnx_weights, "_integers", lambda integers, element: right(integers, element) ^ 8)
    with pytest.raises(ValueError, match=r"transformer_blocks.* differs from PyTorch by .* not written"):
        to_onnx.to_onnx(everything.folder, tmp_path / "wrong.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_for_vnni_cannot_be_verified_without(everything, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(to_onnx, "saturates", lambda: True)
    with pytest.raises(ValueError, match=r"for CPUs with VNNI.*--no-verify"):
        to_onnx.to_onnx(everything.folder, tmp_path / "out.onnx", target="cpu-vnni")
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_graphs_of_ours(tmp_path: Path, graph, everything) -> None:
    with pytest.raises(CheckpointError, match="is no file"):
        exporters.session(tmp_path / "missing.onnx")
    (tmp_path / "noise.onnx").write_bytes(b"\x08\x0a noise")
    with pytest.raises(CheckpointError, match="is no ONNX graph"):
        exporters.session(tmp_path / "noise.onnx")
    foreign = onnx.load(graph[0])
    foreign.metadata_props.clear()
    onnx.save(foreign, tmp_path / "foreign.onnx")
    assert exporters.session(tmp_path / "foreign.onnx").get_outputs()[0].name == "sample"
    with pytest.raises(CheckpointError, match="no metadata of quantdit"):
        use_graph(*load_pipeline(str(everything.folder)), tmp_path / "foreign.onnx")
    onnx.helper.set_model_props(foreign, {"quantdit": '{"constants": {}, "unused": []}'})
    onnx.save(foreign, tmp_path / "early.onnx")
    with pytest.raises(CheckpointError, match=r"has no digest.*export it again"):
        exporters.session(tmp_path / "early.onnx")


def test_every_flipped_bit_is_noticed(graph, wan, tmp_path: Path) -> None:
    """25 of 60 such graphs drew another picture before they had a digest."""
    chosen = torch.Generator().manual_seed(0)
    for path in (graph[0], wan[1], wan[1].with_name("wan.onnx.data")):
        whole, opened = path.read_bytes(), path.with_name(path.name.removesuffix(".data"))
        shutil.copy(opened, tmp_path)
        shutil.copy(wan[1].with_name("wan.onnx.data"), tmp_path)
        # Where its own description lies, too.
        places = torch.randint(8 * len(whole), (40,), generator=chosen).tolist()
        described = whole.find(b'"digest": "')
        places += [8 * i for i in range(described, described + 80, 9)] if described >= 0 else []
        # And the name of the file of weights: half of these bits make it no UTF-8, or no name of a file here.
        named = whole.find(b"wan.onnx.data")
        places += range(8 * named, 8 * (named + 4)) if named >= 0 else []
        for place in places:
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            (tmp_path / path.name).write_bytes(flipped)
            with pytest.raises(CheckpointError):
                onnx_digest.check(tmp_path / opened.name)
        (tmp_path / path.name).write_bytes(whole[:-1])
        with pytest.raises(CheckpointError):
            exporters.session(tmp_path / opened.name)


def test_weights_lie_beside_the_graph(wan, tmp_path: Path) -> None:
    stored = onnx.load(wan[1], load_external_data=False)
    shutil.copy(wan[1], tmp_path)
    with pytest.raises(CheckpointError, match=r"wan.onnx.data is missing"):
        exporters.session(tmp_path / "wan.onnx")
    for outside in ("../wan.onnx.data", "/etc/hostname", ""):
        for tensor in stored.graph.initializer:
            for entry in tensor.external_data:
                entry.value = outside if entry.key == "location" else entry.value
        onnx.save(stored, tmp_path / "outside.onnx")
        with pytest.raises(CheckpointError, match="outside of its folder"):
            exporters.session(tmp_path / "outside.onnx")


@pytest.fixture(scope="module")
def saved(pixel_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What save_pretrained wrote of a model quantized in a script: a pipeline, and in `alone` its transformer."""
    folder = tmp_path_factory.mktemp("saved")
    pipeline = quantdit.load(pixel_dit)
    calls = [
        {"hidden_states": torch.randn(2, 1, 8, 8), "timestep": torch.full((2,), t), "class_labels": torch.tensor([0, 1])}
        for t in (900.0, 300.0)
    ]
    quantdit.quantize(pipeline.transformer, "w8a8", inputs=calls)
    pipeline.save_pretrained(folder / "pipeline")
    pipeline.transformer.save_pretrained(folder / "alone")
    return folder


def test_what_save_pretrained_wrote_goes_through_every_command(saved: Path, everything, tmp_path: Path, cli) -> None:
    for name, how in (("pipeline", ()), ("alone", ("--no-verify",))):
        ran = cli("export", saved / name, "--to", "onnx", "--output", tmp_path / f"{name}.onnx", *how)
        assert ran.code == 0, ran.err
        assert cli("export", saved / name, "--to", "dense", "--output", tmp_path / name).code == 0
        ran = cli("inspect", saved / name)
        # Every layer has its error, whoever wrote the folder.
        assert ran.code == 0 and "mean rel_rmse" in ran.out and " - " not in ran.out
    shutil.copytree(saved / "alone", tmp_path / "damaged")
    config = read_json(tmp_path / "damaged" / "config.json")
    config["quantization_config"]["provenance"]["layers"].popitem()
    write_json(tmp_path / "damaged" / "config.json", config)
    assert "provenance.layers does not fit" in cli("inspect", tmp_path / "damaged").error
    quick = ("--steps", "1", "--count", "1", "--output", tmp_path / "x.png")
    assert cli("generate", saved / "pipeline", "--onnx", tmp_path / "pipeline.onnx", *quick).code == 0
    # The same weights: only who wrote them differs.
    assert cli("generate", saved / "pipeline", "--onnx", tmp_path / "alone.onnx", *quick).code == 0
    other = cli("generate", everything.folder, "--onnx", tmp_path / "pipeline.onnx", *quick)
    assert other.code == 1 and "exported from another checkpoint" in other.error


def test_providers_are_checked(graph, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"has no NoSuchProvider, it has .*CPUExecutionProvider"):
        exporters.session(graph[0], providers=["NoSuchProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnx_session, "_installed", lambda wheel: True)
    with pytest.warns(UserWarning, match="both installed"):
        exporters.session(graph[0])

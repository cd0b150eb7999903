"""Every format, activation and transform of a quantized layer as ONNX nodes, run by ONNX Runtime against the layer itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantdit.calibration.quantize import quantize_weight
from quantdit.exporters import onnx_digest, onnx_session
from quantdit.exporters.onnx_layers import Translation, emit_layer
from quantdit.exporters.onnx_nodes import Nodes
from quantdit.exporters.onnx_weights import emit_integers
from quantdit.formats import FORMATS
from quantdit.layers.quant_linear import QuantLinear
from quantdit.tensors import hadamard, transform
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec
from quantdit.tensors.transform import Transform

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

OUT, IN = 24, 64
# One trellis for each width, and the largest window once: the others differ in a number that tests/formats covers.
SOME = tuple(name for name, f in FORMATS.items() if f.state_bits in (0, 12) or name == "trellis4_l16")
# One code of a token on the other side of a rounding tie: 1 of 127 steps of one of 64 inputs. Everything else is float32.
FLOAT = 2e-6
A8, PLAIN = ActivationSpec(8), Transform()


def made_layer(
    format: str = "table4",
    activation: ActivationSpec = A8,
    t: Transform = PLAIN,
    rank: int = 0,
    bias: bool = True,
    rows: str = "layer",
    width: int = IN,
) -> QuantLinear:
    """Return a layer of random weights, rounded to nearest."""
    weight = torch.randn(OUT, width) / width**0.5
    extra = {"table_rows": rows} if format.startswith("table") else {}
    q = quantize_weight(transform.apply_to_weight(t, weight), torch.eye(width), format, 32, "rtn", **extra)
    spec = LayerSpec(q.spec, activation, t.kind, t.rotation_block, t.smoothed, rank)
    tensors = q.tensors() | transform.tensors(t)
    if rank:
        tensors |= {"up": torch.randn(OUT, rank).bfloat16(), "down": (torch.randn(rank, width) / 8).bfloat16()}
    if activation.buckets:
        tensors["static_scale"] = torch.linspace(0.01, 0.03, activation.buckets)
    return QuantLinear.from_tensors(spec, tensors, torch.randn(OUT) if bias else None)


def exported(
    folder: Path, layers: dict[str, QuantLinear], rank: int = 3, storage: str = "packed", bucket: int = 0, target: str = "cpu"
) -> Path:
    """Write a graph of layers that share the input `x`."""
    shape = ir.Shape([None] * (rank - 1) + [next(iter(layers.values())).in_features])
    x = ir.Value(name="x", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    number = ir.Value(
        name="b", const_value=ir.tensor(bucket, name="b"), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64)
    )
    shared = Translation(storage, target, bucket=number)
    nodes, outputs = [], []
    for name, layer in layers.items():
        made, y = emit_layer(shared, name, layer, x)
        y.shape, y.type = ir.Shape([None] * (rank - 1) + [OUT]), ir.TensorType(ir.DataType.FLOAT)
        nodes += made.made
        outputs.append(y)
    initializers = [*shared.initializers.values(), number]
    graph = ir.Graph(
        [x], outputs, nodes=nodes, initializers=initializers, opset_imports={"": 23, "com.microsoft": 1}, name="layers"
    )
    ir.save(ir.Model(graph, ir_version=11), folder / "layer.onnx")
    return folder / "layer.onnx"


def agree(folder: Path, layer: QuantLinear, x: torch.Tensor, storage: str = "packed", bucket: int = 0) -> None:
    opened = onnx_session.session(exported(folder, {"layer": layer}, x.ndim, storage, bucket))
    got = torch.from_numpy(opened.run(None, {"x": x.numpy()})[0])
    layer.bucket = bucket
    expected = layer(x)
    assert float((got - expected).norm() / expected.norm()) < FLOAT


@pytest.mark.parametrize("storage", ["packed", "int8"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("format", SOME)
def test_every_format(format: str, bits: int, storage: str, tmp_path: Path) -> None:
    agree(tmp_path, made_layer(format, ActivationSpec(bits)), torch.randn(2, 5, IN), storage)


@pytest.mark.parametrize("format", ["table2", "table3", "table6", "table4_e4m3"])
def test_a_table_for_each_channel(format: str, tmp_path: Path) -> None:
    agree(tmp_path, made_layer(format, rows="channel"), torch.randn(2, 5, IN))


@pytest.mark.parametrize(
    "activation",
    [
        ActivationSpec(6),
        ActivationSpec(4),
        ActivationSpec(4, group_size=32),
        ActivationSpec(6, group_size=16),
        ActivationSpec(4, "affine"),
        ActivationSpec(8, "affine"),
        ActivationSpec(4, "affine", group_size=32),
        ActivationSpec(8, buckets=3),
        ActivationSpec(4, group_size=32, buckets=3),
    ],
    ids=str,
)
def test_every_activation(activation: ActivationSpec, tmp_path: Path) -> None:
    x = torch.randn(2, 5, IN)
    x[0, 0] = 0  # a token of zeros
    x[0, 1, 3] = 40  # an outlier; clipped by a static scale
    agree(tmp_path, made_layer(activation=activation), x, bucket=2)


def test_fp8_activations_and_their_weights(tmp_path: Path) -> None:
    agree(tmp_path, made_layer("fp8_e4m3", ActivationSpec(8, "fp8")), torch.randn(2, 5, IN))
    agree(tmp_path, made_layer("table4_e4m3", ActivationSpec(8, "fp8")), torch.randn(2, 5, IN))


def outlier_rotation(block: int = 16) -> Transform:
    turns = [torch.linalg.qr(torch.randn(IN // block, block, block)).Q.contiguous() for _ in range(2)]
    return Transform(None, 1, turns[0], torch.randperm(IN).int(), turns[1])


@pytest.mark.parametrize("shape", [(7, IN), (2, 5, IN), (2, 3, 5, IN)], ids=["2d", "3d", "4d"])
@pytest.mark.parametrize("kind", ["hadamard", "smoothed", "outlier", "smoothed outlier"])
def test_every_transform_and_rank(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    t = outlier_rotation() if "outlier" in kind else Transform(hadamard.random_sign(IN, 0), 32)
    if "smoothed" in kind:
        t = transform.smooth(t, torch.rand(IN) + 0.5)
    # A rotation is float32 arithmetic before the rounding: 16-bit activations show that nothing else differs.
    agree(tmp_path, made_layer(activation=ActivationSpec(16), t=t, rank=4), torch.randn(shape))
    layer = made_layer(t=t, rank=4)
    opened = onnx_session.session(exported(tmp_path, {"layer": layer}, len(shape)))
    x = torch.randn(shape)
    apart = torch.from_numpy(opened.run(None, {"x": x.numpy()})[0]) - layer(x)
    one_step = layer.scale.abs().max() * 127 * (transform.apply(layer.transform, x).abs().amax() / 127)
    assert float(apart.abs().max()) <= float(one_step)


@pytest.mark.parametrize("shape", [(7, 256), (2, 5, 256), (2, 3, 5, 256)], ids=["2d", "3d", "4d"])
def test_large_hadamard_blocks_are_products_from_both_sides(shape: tuple[int, ...], tmp_path: Path) -> None:
    layer = made_layer(activation=ActivationSpec(16), t=Transform(hadamard.random_sign(256, 0), 128), width=256)
    agree(tmp_path, layer, torch.randn(shape))
    opened = ir.load(tmp_path / "layer.onnx").graph.initializers
    assert (opened["hadamard_outer.0"].shape, opened["hadamard.0"].shape) == ((8, 8), (16, 16))


def test_layers_that_share_an_input_quantize_it_once(tmp_path: Path) -> None:
    t = Transform(hadamard.random_sign(IN, 0), 32)
    layers = {"to_q": made_layer(t=t), "to_k": made_layer("int4", t=t), "to_v": made_layer(activation=ActivationSpec(6), t=t)}
    path = exported(tmp_path, layers)
    kinds = [node.op_type for node in ir.load(path).graph]
    assert kinds.count("QuantizeLinear") == 2, "q and k share theirs, v has 6 bits"
    assert kinds.count("ReduceMax") == 2 and sum(node.name.endswith("/MatMul") for node in ir.load(path).graph) == 3
    opened = onnx_session.session(path)
    x = torch.randn(2, 5, IN)
    for got, layer in zip(opened.run(None, {"x": x.numpy()}), layers.values(), strict=True):
        assert float((torch.from_numpy(got) - layer(x)).norm() / layer(x).norm()) < 5e-3


def test_products_are_exact_where_int8_saturates_on_old_processors(tmp_path: Path) -> None:
    """The largest codes on both sides, in a plain session: uint8 x int8 would saturate before AVX512-VNNI."""
    import onnxruntime

    layer = made_layer("int8", bias=False)
    layer.data.fill_(127)
    path = exported(tmp_path, {"layer": layer})
    x = torch.ones(1, 5, IN)
    got = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), layer(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("format", ["trellis4_l12", "int8"])
def test_int8_weights_whose_neighbours_cannot_saturate_stay_int8(format: str, tmp_path: Path) -> None:
    """The largest such neighbours and the largest codes, in a plain session: exact on every CPU, and the faster product."""
    import onnxruntime

    layer = made_layer(format, bias=False)
    if format == "int8":
        layer.data.fill_(64)
    path = exported(tmp_path, {"layer": layer})
    assert product_weight_of(path) == ir.DataType.INT8
    x = torch.ones(1, 5, IN)
    got = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), layer(x), rtol=1e-6, atol=0)
    if format == "int8":
        layer.data[0, :2] = 65
        assert product_weight_of(exported(tmp_path, {"layer": layer})) == ir.DataType.UINT8


def product_weight_of(path: Path) -> ir.DataType:
    """Return the type of the weight that a graph's only integer product takes."""
    (scaled,) = (n for n in ir.load(path).graph if n.op_type == "DequantizeLinear" and n.attributes.get("axis"))
    value = scaled.inputs[0]
    while value.dtype is None:  # decoded by nodes, whose last is a Gather from a table or a Reshape of one
        value = value.producer().inputs[0]
    return value.dtype


@pytest.mark.parametrize("storage", ["packed", "int8"])
@pytest.mark.parametrize("format", [name for name in FORMATS if "e4m3" not in name])
def test_int8_weights_of_every_format(format: str, storage: str, tmp_path: Path) -> None:
    """For CPUs with VNNI: what the nodes decode to, since this CPU may not multiply it exactly."""
    q = made_layer(format).qtensor
    nodes = Nodes("layer", {})
    made = emit_integers(nodes, q.spec, lambda: q, "int8", storage)
    out = nodes.op("Identity", [made])
    out.shape, out.type = ir.Shape([IN, OUT]), ir.TensorType(ir.DataType.INT8)
    graph = ir.Graph([], [out], nodes=nodes.made, initializers=[*nodes.shared.values()], opset_imports={"": 23}, name="weight")
    ir.save(ir.Model(graph, ir_version=11), tmp_path / "weight.onnx")
    (got,) = onnx_session.session(tmp_path / "weight.onnx").run(None, {})
    assert torch.equal(torch.from_numpy(got), q.decode8().T)


def test_a_graph_for_vnni_is_refused_without(tmp_path: Path, monkeypatch) -> None:
    layer = made_layer("int8", bias=False)
    layer.data.fill_(64)  # exact here too
    path = exported(tmp_path, {"layer": layer}, target=onnx_session.VNNI)
    onnx_digest.describe(path, {"target": onnx_session.VNNI})
    monkeypatch.setattr(onnx_session, "saturates", lambda: True)
    with pytest.raises(ValueError, match=r"exported with --target cpu-vnni.*export it with --target cpu"):
        onnx_session.session(path)
    monkeypatch.setattr(onnx_session, "saturates", lambda: False)
    x = torch.randn(2, 5, IN)
    got = torch.from_numpy(onnx_session.session(path).run(None, {"x": x.numpy()})[0])
    assert float((got - layer(x)).norm() / layer(x).norm()) < FLOAT


def test_saturation_is_what_the_cpu_does() -> None:
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if "flags" not in flags:
        pytest.skip("only of x86 Linux is it known which CPUs saturate")
    assert onnx_session.saturates() == (not any("vnni" in flag for flag in flags))


@pytest.mark.parametrize("bits", [8, 16])
def test_what_onnxruntime_makes_of_a_product(bits: int, tmp_path: Path) -> None:
    """8-bit activations: one integer product. 16 bits: no integer product, in a session of default settings either."""
    import onnxruntime

    path = exported(tmp_path, {"layer": made_layer(activation=ActivationSpec(bits))})
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph}
    integer = {"MatMulIntegerToFloat", "MatMulInteger", "MatMulNBits"}
    assert kinds & integer == ({"MatMulIntegerToFloat"} if bits == 8 else set())


@pytest.mark.parametrize("format", ["int4", "int3", "table4", "int8"])
@pytest.mark.parametrize(("target", "bits", "tolerance"), [("cpu-nbits", 16, FLOAT), ("cpu-nbits", 8, 2e-2), ("cuda", 16, 2e-3)])
def test_products_as_matmulnbits(target: str, bits: int, tolerance: float, format: str, tmp_path: Path) -> None:
    """Weights are exact, offsets included; activations are float32, ONNX Runtime's own 8 bits, or float16."""
    layer = made_layer(format, ActivationSpec(bits), Transform(hadamard.random_sign(IN, 0), 32), rank=4)
    path = exported(tmp_path, {"layer": layer}, target=target)
    nodes = [node for node in ir.load(path).graph if node.op_type == "MatMulNBits"]
    wanted = 4 if format == "int4" and target == "cpu-nbits" else 8
    assert [node.attributes["bits"].as_int() for node in nodes] == [wanted]
    x = torch.randn(2, 5, IN) + 0.5
    got = torch.from_numpy(onnx_session.session(path).run(None, {"x": x.numpy()})[0])
    expected = layer(x)
    assert float((got - expected).norm() / expected.norm()) < tolerance


def test_packed_weights_take_their_bits(tmp_path: Path) -> None:
    for format, bits in (("table4", 4), ("table3", 3), ("vq256x4", 2), ("vq256x8", 1), ("int8", 8)):
        layer = made_layer(format, bias=False)
        graph = ir.load(exported(tmp_path, {"layer": layer})).graph
        stored = sum(v.const_value.nbytes for n, v in graph.initializers.items() if n.startswith("layer.") and "scale" not in n)
        assert stored == OUT * IN * bits // 8, format

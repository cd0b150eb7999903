"""The benchmark refuses to time what is wrong, and its rows say what was measured."""

from __future__ import annotations

import pytest
import torch

from quantdit.benchmarks import cpu_linear


def test_a_wrong_layer_is_not_timed() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    layer = cpu_linear.quant_linear(weight, "w4a8", cached=True)
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    cpu_linear.gate_linear(layer, x)
    layer.decoded()[0, 0] += 1
    with pytest.raises(ValueError, match="is wrong by"):
        cpu_linear.gate_linear(layer, x)


def test_kernels_without_a_gpu_say_so_in_one_line(cli, tmp_path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = cli("bench", "kernels", "--output", tmp_path / "kernels.jsonl")
    assert ran.code == 1 and "torch sees no GPU here; `quantdit bench cpu`" in ran.error
    assert not list(tmp_path.iterdir())
    assert "must end in .jsonl" in cli("bench", "cpu", "--output", tmp_path / "table.md").error


def test_the_gates_of_the_kernels_find_what_is_wrong() -> None:
    from quantdit.benchmarks import kernel_cases as kernels

    y = torch.randn(300, 8)
    expected = kernels.ends(y)
    assert expected.shape == (2 * kernels.CHECKED, 8)
    wrong = y.clone()
    wrong[-1, 3] += 1
    codes, scale = torch.ops.quantdit.quantize_tokens(y, 8)
    for check, good, bad in (
        (kernels.equals(expected), y, wrong),
        (kernels.close(expected, 1e-3), y, wrong),
        (kernels.close(expected, 1e-3), y, y * float("nan")),
        (kernels.same_codes(kernels.ends(codes), kernels.ends(scale), 0.0), (codes, scale), (codes + (y > 2), scale)),
        (kernels.same_codes(kernels.ends(codes), kernels.ends(scale), 0.5), (codes, scale), (codes, scale * 2)),
    ):
        check(good)
        with pytest.raises(ValueError, match=r"(of|from) the definition"):
            check(bad)


def test_rows_of_the_kernels_make_a_table() -> None:
    from quantdit.benchmarks import kernel_report

    origin = {"device": "GPU", "torch": "2", "triton": "3", "commit": "c", "command": "quantdit bench kernels"}
    rows = [{"what": "ceiling copy", "value": 3000.0} | origin]
    shape = {"task": "many", "m": 1, "n": 2, "k": 3, "us_median": 4.0, "us_fastest": 3.0, "us_host": 9.0} | origin
    rows += [shape | {"what": "quantize_tokens", "gb_s": 2400.0, "of_copy": 0.8}]
    rows += [shape | {"what": "gemm_packed_a8", "top_s": 900.0, "of_bfloat16": 1.5, "times_bf16": 1.5}]
    lines = kernel_report.markdown(rows).splitlines()
    assert lines[-2:] == [
        "| many | 1, 2, 3 | quantize_tokens | 4.0 | 3.0 | 9.0 | 2400.0 (80%) |  |",
        "| many | 1, 2, 3 | gemm_packed_a8 | 4.0 | 3.0 | 9.0 | 900.0 (150%) | 1.5 |",
    ]
    assert "The run has not ended." in lines


def test_rows_compare_with_float32_of_the_same_run() -> None:
    rows = cpu_linear.rows_for(32, 64, 128, rounds=1, products=True)
    assert rows[0]["what"] == "F.linear float32" and rows[0]["times_float32"] == 1
    exact = {row["what"]: row["exact"] for row in rows if "exact" in row}
    # The routine that quantdit uses must be exact on every machine; the others are what they are.
    assert exact["int8 product: chosen: cpu.scaled_int8_product"]
    assert exact["int8 product: float32 in exact chunks"]


def test_rows_of_exported_graphs_make_a_table_for_each_model() -> None:
    from quantdit.benchmarks import onnx_graphs

    origin = {"cpu": "CPU", "threads": 2, "isa": ["avx2"], "onnxruntime": "1", "torch": "2", "commit": "c"}
    row = {
        "model": "a",
        "blocks": 2,
        "tokens": 8,
        "ms_median": 2.0,
        "ms_fastest": 1.0,
        "times_ort_float32": 1.5,
        "rel_rmse": 0.01,
    }
    rows = [row | {"what": "ours", "file_mb": 3.5} | origin, row | {"model": "b", "what": "torch float32"} | origin]
    lines = onnx_graphs.markdown(rows).splitlines()
    assert "| ours | 2.0 | 1.0 | 1.50 | 1.0e-02 | 3.5 |" in lines and "| torch float32 | 2.0 | 1.0 | 1.50 | 1.0e-02 |  |" in lines
    assert [line for line in lines if line.startswith("## ")] == ["## 2 blocks of a, 8 tokens", "## 2 blocks of b, 8 tokens"]


def test_grouped_weights_of_the_benchmark_keep_four_bits_in_matmulnbits() -> None:
    from quantdit.benchmarks import onnx_graphs
    from quantdit.exporters.onnx_nbits import block_of
    from quantdit.formats import QSpec

    *_, last = onnx_graphs.plan(onnx_graphs.OURS["ours w4a8 (int4 g128), target cpu-nbits"]).rules
    assert (last.weight, last.activation_bits) == ("int4", 8)
    assert block_of(QSpec(last.weight, 8, 1536, last.group_size), "cpu-nbits") == 128


def test_untimed_calls_come_right_before_each_timed_one():
    calls: list[str] = []
    measured = cpu_linear.measure({name: lambda name=name: calls.append(name) for name in "ab"}, 2, untimed=1)
    assert "".join(calls) == "ab" + "aabb" * 2 and list(measured) == ["a", "b"]

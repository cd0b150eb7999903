"""What the study measures and writes down: on small random images and hand-made rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import measure
import peers
import render
from quantdit.evaluation.metrics.paired import PSNR_CEILING

SEEDS, SAMPLES = 2, 8


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(SEEDS * SAMPLES, 1, 28, 28) * 2 - 1


def a_row(method: str = "gptq", bits: str = "w4a8", psnr: float = 30.0, stored: float = 4.25, **other) -> dict:
    metrics = {name: measure.summary([0.5, 0.6]) | {"pooled": 0.55} for name in measure.METRICS}
    metrics["psnr"] = measure.summary([psnr - 1, psnr + 1]) | {"pooled": psnr, "worst": psnr - 9}
    facts = {"package": "peer", "version": "1.0", "method": method, "bits": bits, "bits_per_weight": stored, "seconds": 1.5}
    return measure.row(**(facts | {"metrics": metrics} | other))


def test_identical_images_are_at_the_ceiling(images: torch.Tensor) -> None:
    found = measure.measure(images, images.clone(), seeds=SEEDS)
    assert found["psnr"]["mean"] == found["psnr"]["worst"] == PSNR_CEILING
    assert found["psnr"]["interval"] == [PSNR_CEILING, PSNR_CEILING]
    assert found["ssim"]["mean"] == 1
    assert found["fd"]["mean"] == pytest.approx(0, abs=1e-6) and found["kid"]["mean"] == pytest.approx(0, abs=1e-9)


def test_distances_are_symmetric_and_count_the_seeds(images: torch.Tensor) -> None:
    other = (images + 0.1 * torch.randn_like(images)).clamp(-1, 1)
    there, back = measure.measure(images, other, seeds=SEEDS), measure.measure(other, images, seeds=SEEDS)
    for name in ("psnr", "ssim", "fd", "kid"):
        assert there[name]["mean"] == pytest.approx(back[name]["mean"], rel=1e-4, abs=1e-9)
        assert len(there[name]["values"]) == SEEDS
        low, high = there[name]["interval"]
        assert low <= there[name]["mean"] <= high
    assert there["psnr"]["worst"] == min(there["psnr"]["worst_values"]) <= min(there["psnr"]["values"])


def test_each_seed_is_compared_with_itself(images: torch.Tensor) -> None:
    other = images.clone()
    other[SAMPLES:] = -other[SAMPLES:]
    first, second = measure.measure(images, other, seeds=SEEDS)["psnr"]["values"]
    assert first == PSNR_CEILING and second < 10


def test_shapes_that_do_not_fit_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="equal parts"):
        measure.measure(images, images[:-1])
    with pytest.raises(ValueError, match="equal parts"):
        measure.measure(images, images, seeds=3)


def test_summary_is_the_t_interval() -> None:
    found = measure.summary([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2  # t(0.975, 3) times the standard error
    assert found["mean"] == 2.5
    assert found["interval"] == pytest.approx([2.5 - half, 2.5 + half], abs=1e-5)
    assert measure.summary([1.0])["interval"] is None


def test_stored_bits_count_what_a_state_dict_holds() -> None:
    state = {
        "codes": torch.zeros(64 * 64 // 2, dtype=torch.uint8),
        "scale": torch.zeros(64, 1, dtype=torch.float16),
        "codebook": torch.zeros(16),
    }
    assert measure.stored_bits(state.values(), 64 * 64) == 8 * (2048 + 128 + 64) / 4096


def test_stored_bits_count_shared_tensors_once_and_views_by_their_values() -> None:
    shared, whole = torch.zeros(16), torch.zeros(100)
    assert measure.stored_bits([shared, shared], 8) == 8 * 64 / 8
    assert measure.stored_bits([whole[:10]], 8) == 8 * 40 / 8


def test_stored_bits_open_a_tensor_subclass() -> None:
    class Packed:
        def __init__(self) -> None:
            self.codes, self.scale, self.zero = torch.zeros(8, dtype=torch.uint8), torch.zeros(2), None

        def __tensor_flatten__(self):
            return ["codes", "scale", "zero"], None

    assert measure.stored_bits([Packed()], 16) == 8 * (8 + 8) / 16


def test_rel_rmse_is_zero_for_the_same_layer_and_leaves_the_bias_out() -> None:
    first, second = nn.ModuleDict({"a": nn.Linear(4, 3)}), nn.ModuleDict({"a": nn.Linear(4, 3)})
    second.load_state_dict(first.state_dict())
    x = {"a": torch.randn(10, 4)}
    assert measure.rel_rmse(first, second, x) == {"a": 0}
    with torch.no_grad():
        second["a"].weight *= 1.5
        first["a"].bias += 100
        second["a"].bias += 100
    assert measure.rel_rmse(first, second, x)["a"] == pytest.approx(0.5, rel=1e-4)


def test_rows_keep_their_order_and_failed_ones_say_why() -> None:
    good, bad = a_row(), measure.row("peer", "1.0", "int1", "w1a1", error="ValueError: no such width")
    assert list(good)[:7] == ["package", "version", "method", "bits", "bits_per_weight", "group_size", "seconds"]
    assert bad["error"] == "ValueError: no such width" and "psnr" not in bad
    assert json.loads(json.dumps(good)) == good


def test_report_lists_good_rows_by_psnr_and_failed_ones_with_their_reason(tmp_path: Path) -> None:
    rows = [a_row("worse", psnr=20), a_row("better", psnr=40, package="quantdit"), a_row("full precision", "w32a32", 100, 32.0)]
    rows.append(measure.row("peer", "1.0", "int1", "w1a1", error="needs a | GPU"))
    measure.write_rows(rows, tmp_path / "peers.jsonl")
    text = render.markdown(render.read_rows(tmp_path), ["psnr.png"])
    assert text.index("better") < text.index("worse") < text.index("What could not run")
    assert "| peer 1.0, int1 | w1a1 | needs a / GPU |" in text
    assert "## w4a8" in text and "## w1a1" not in text and "## w32a32" not in text


def test_plot_draws_one_panel_an_activation_width(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        a_row("one"),
        a_row("two", "w3a16", 25, 3.2, package="quantdit"),
        measure.row("peer", "1", "int1", "w1a1", error="no"),
    ]
    render.plot(rows, tmp_path / "psnr.png")
    assert (tmp_path / "psnr.png").stat().st_size > 1000


def test_bits_that_are_none_are_refused() -> None:
    assert render.widths("w4a16") == (4, 16)
    with pytest.raises(ValueError, match="w4a8"):
        render.widths("int4")


def test_a_peer_that_fails_leaves_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: object, **options: object) -> list:
        raise RuntimeError("needs\na GPU")

    # `torch` stands for the package: it is installed, and its version is known.
    configuration = peers.Configuration("one", "w4a8", 64)
    peer = peers.Peer("torch", (), broken, (configuration,))
    monkeypatch.setitem(peers.PEERS, "broken", peer)
    row, tensors = peers.run(peer, configuration, tmp_path)
    assert row["error"] == "RuntimeError: needs a GPU" and not tensors
    peers._save(row, tensors, tmp_path / "one.safetensors")
    assert not peers._finished(tmp_path / "one.safetensors") and not peers._finished(tmp_path / "two.safetensors")
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert json.loads(file.metadata()["row"]) == row


def test_decoding_keeps_linear_layers_and_leaves_others_alone() -> None:
    class Wobbly(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.round())

    class Hidden(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.inner = linear

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = nn.Module()
    model.block = nn.ModuleDict({"linear": Hidden(nn.Linear(8, 5)), "other": Wobbly(8, 5)})
    x = torch.randn(16, 8)
    expected = model.block["linear"](x)
    peers.decode(model, {"block.linear": x, "block.other": x})
    assert type(model.block["linear"]) is nn.Linear and type(model.block["other"]) is Wobbly
    torch.testing.assert_close(model.block["linear"](x), expected)


def test_configurations_are_named_once_and_pinned() -> None:
    for peer in peers.PEERS.values():
        names = [peers._slug(c.name) for c in peer.configurations]
        assert len(set(names)) == len(names)
        assert all("==" in pin for pin in peer.pins)
        assert all(render.widths(c.bits) for c in peer.configurations)

"""The report page: whole without a network, safe with hostile names, and shown as meant by a real browser."""

from __future__ import annotations

import html.parser
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from quantdit.evaluation.apply_metrics import alone_of, drift_of, drift_over_steps, means_of, paired_of, rows_of, sets_of
from quantdit.evaluation.gate import judge
from quantdit.evaluation.metrics.table import FORMAT
from quantdit.evaluation.networks.efficientnet import EFFICIENTNET
from quantdit.evaluation.report import page
from quantdit.evaluation.report.charts import bar_chart, interval_chart, line_chart, ticks_of
from quantdit.evaluation.report.summary import summary
from quantdit.evaluation.samples import Samples

BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome", "chrome") if shutil.which(b)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; on Debian: apt-get install chromium")
NAMES = ('a "bat" <script>alert(1)</script>', "an owl & a fox", "$title", "class 3")


def sampled(seed: int, clips: bool, noise: float = 0.0) -> Samples:
    """Made-up samples: smooth blobs, and noise that stands for quantization."""
    draw = torch.Generator().manual_seed(seed)
    shape = (8, 6, 3, 24, 24) if clips else (8, 3, 24, 24)
    coarse = torch.randn((*shape[:-2], 4, 4), generator=draw).flatten(0, -4)
    images = torch.nn.functional.interpolate(coarse, (24, 24), mode="bicubic").reshape(shape)
    images = (images + noise * torch.randn(shape, generator=torch.Generator().manual_seed(9))).clamp(-1, 1)
    latents = torch.stack([torch.randn(8, 3, 5, 5, generator=draw)] * 3, 1).half() * (1 + noise)
    return Samples(images, latents, (1000.0, 500.0, 250.0), NAMES * 2, tuple(range(8)))


def made(clips: bool) -> tuple[dict, Samples, Samples]:
    """A whole report of made-up samples, and the samples."""
    pytest.importorskip("efficientnet_lite_pytorch")
    reference, candidate, other = sampled(0, clips), sampled(0, clips, 0.05), sampled(1, clips)
    features = [EFFICIENTNET.of_samples(s.images) for s in (reference, candidate, other)]
    sets = sets_of(*features, reference.prompts, EFFICIENTNET)
    paired = paired_of(reference.images, candidate.images)
    alone = [alone_of(s, f) for s, f in zip((reference, candidate), features, strict=False)]
    rows = rows_of(reference, candidate, features[:2], alone)
    floor = means_of(rows_of(reference, reference, [features[0]] * 2, [alone[0]] * 2))
    layers = {f"blocks.{i}.to_<q>": [-30.0 + i - j % 3 for j in range(8)] for i in range(6)}
    probed = [{"prompt": row["prompt"], "seed": row["seed"], "output_error": -35.0 - i % 2} for i, row in enumerate(rows)]
    side = {"file_bytes": 10_000_000, "bits_per_weight": 16.0}
    report = {
        "format": FORMAT,
        "identity": {"quantdit": "0", "backbone": EFFICIENTNET.name},
        "versions": {"torch": "2"},
        "reference": side | {"name": "original"},
        "candidate": side | {"name": "quantized </title><b>", "bits_per_weight": 4.1},
        "sampling": {"seed": 0, "steps": 3, "guidance": None, "prompts": list(NAMES)},
        "drift": drift_of(reference, paired, sets, EFFICIENTNET),
        "sets": sets,
        "floor": {"other seeds": floor | {"psnr": {"mean": 12.0, "harm": -12.0}}, "other batch": floor, "other dtype": floor},
        "probe": {"timesteps": [1000.0, 250.0], "samples": probed, "by_timestep": [[-40.0, -30.0]] * 8, "layers": layers},
        "over_steps": drift_over_steps(reference, candidate),
        "layers": {name: {"format": f"int{4 + 2 * (i % 2)}", "bits": 4.25, "weights": 4096} for i, name in enumerate(layers)},
        "recipe": {"recipe": {"rules": []}},
        "vbench": {side: {"imaging_quality": 0.5 + clips / 8} for side in ("reference", "candidate")} if clips else {},
        "samples": rows,
    }
    return report, reference, candidate


def written(folder: Path, clips: bool, worse: float = 0.0) -> Path:
    """The page of `made`, with a verdict against itself made worse by so many dB."""
    report, reference, candidate = made(clips)
    path = folder / "report.html"
    page.write(path, report, reference, candidate)
    baseline = judge.make_baseline(report)
    for row in report["probe"]["samples"]:
        row["output_error"] += worse
    assert page.add_verdict(path, judge.gate(report, baseline))
    return path


class Seen(html.parser.HTMLParser):
    """Collects what a browser would take from elsewhere, the scripts, and what stays open."""

    void = ("meta", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href", "action", "data") and v and not v.startswith(("#", "data:"))]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("clips", [False, True])
def test_page_is_whole_takes_nothing_from_outside_and_runs_no_name(tmp_path: Path, clips: bool):
    text = written(tmp_path, clips).read_text()
    seen = Seen()
    seen.feed(text)
    assert not seen.open and not seen.outside and "https:" not in text and "url(http" not in text
    assert seen.tags.count("script") == 1 and seen.tags.count("figure") == 8 and "<b>" not in text.split("</head>")[0]
    assert "&lt;script&gt;alert(1)" in text and "blocks.5.to_&lt;q&gt;" in text
    assert text.index("PSNR") > text.index('class="verdict pass"')
    assert "-100 dB stands for no error" in text and "may lie below zero" in text
    assert "Full precision differs from itself on the same seeds" in text and ">other seeds</th>" in text
    assert ("temporal flickering" in text) == clips and ("$" not in text.replace("$title", ""))


def test_page_and_table_show_the_same_intervals(tmp_path: Path):
    """Both from one computation, to the same digits; what may change neither way has two limits."""
    report, reference, candidate = made(False)
    tables = summary(report, EFFICIENTNET.frechet, EFFICIENTNET.kernel)
    cells = [cell.strip() for line in tables.splitlines() if line.startswith("| ") for cell in line.split("|")]
    text = page.render(report, reference, candidate)
    assert ">full precision against itself</th>" in text and "noise floor</th>" not in text
    for name in ("PSNR, dB", "SSIM"):
        mean, _, rest = cells[cells.index(name) + 1].partition(" ")
        assert f"<b>{mean}</b><span class='soft'>{rest}</span>" in text
    row = written(tmp_path, True).read_text().split("temporal flickering</th>")[1]
    assert "<td>-0.01 to 0.01" in row.split("</tr>")[0]


def test_worst_come_first(tmp_path: Path):
    report, reference, candidate = made(False)
    candidate.images[5] += 0.5
    report["samples"][5]["psnr"] = 3.0
    text = page.render(report, reference, candidate)
    assert text.index("seed 5</b>") < min(text.index(f"seed {i}</b>") for i in range(8) if i != 5)


def test_a_second_verdict_replaces_the_first(tmp_path: Path):
    path = written(tmp_path, False)
    report, *_ = made(False)
    baseline = judge.make_baseline(report)
    for row in report["probe"]["samples"]:
        row["output_error"] += 9.0
    page.add_verdict(path, judge.gate(report, baseline))
    text = path.read_text()
    assert "<h3>VBench</h3>" not in text and "<td>0.625</td>" in written(tmp_path, True).read_text()  # a verdict leaves it there
    assert 'class="verdict fail"' in text and 'class="verdict pass"' not in text and text.count("<!--verdict-->") == 1
    assert not page.add_verdict(tmp_path / "none.html", judge.gate(report, baseline))


def test_ticks_are_round_and_enclose():
    for low, high in ((0.0, 0.0217), (-31.0, -28.6), (5.0, 5.0), (0.0, 1234.5), (-1e-9, 1e-9)):
        ticks = ticks_of(low, high)
        steps = np.diff(ticks)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
        assert steps == pytest.approx(np.full(len(steps), steps[0]))


def test_charts_say_what_they_show():
    assert "a &lt;b&gt;, 500: 2" in line_chart("t", [1000, 500], {"a <b>": [1.0, 2.0]}, "x", "y")
    assert bar_chart("t", ["l<1>"], [3.0], ["int4"], "kB", 0.0).count("<rect") == 1
    assert 'aria-label="difference 1, from 0.5 to 1.5; limit 2"' in interval_chart(1.0, 0.5, 1.5, 2.0)
    assert line_chart("t", [], {}, "x", "y") == "" and bar_chart("t", [], [], [], "y") == ""


def browse(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,900"]
    flags += [f"--user-data-dir={path.parent / 'profile'}", "--virtual-time-budget=1500", "--enable-logging=stderr"]
    return subprocess.run([BROWSER, *flags, *options, path.as_uri()], capture_output=True, text=True, timeout=900, check=True)


@needs_browser
@pytest.mark.parametrize("clips", [False, True])
def test_browser_runs_it_without_complaint(tmp_path: Path, clips: bool):
    """The script ran: the button of moving clips says what it does, a still page hides it; nothing is written to the console."""
    path = written(tmp_path, clips)
    opened = path.with_name("opened.html")
    opened.write_text(path.read_text().replace('location.hash === "#compare"', "true"))
    done = browse(opened, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    assert '<dialog id="dialog" aria-labelledby="dialog-name" open="">' in done.stdout
    left = done.stdout.split('id="left"')[1].split(">")[0]
    assert "data:image/webp" in left
    assert ('class="controls" hidden' in done.stdout) != clips
    if clips:
        assert "background-position-y" in left or "background-position" in left


@needs_browser
def test_browser_shows_light_and_dark(tmp_path: Path):
    path = written(tmp_path, True, worse=9.0)
    brightness = []
    for scheme in (1, 0):
        shot = tmp_path / f"{scheme}.png"
        browse(path, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}")
        pixels = np.array(Image.open(shot).convert("L"))
        assert pixels.shape == (900, 1200) and pixels.std() > 5
        brightness.append(np.median(pixels))
    assert brightness[0] > 200 and brightness[1] < 60

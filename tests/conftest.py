"""Seeds, tiny random pipelines to compile, and the command line as a function."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Before huggingface_hub is imported: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

CLASSES = 3

# Every weight format but vq256x2 and vq256x8, which are as vq256x4 is; every kind of activation and of transform, a low-rank
# branch, a dense layer in a block, quantized ones outside of them.
MIXED = """
name = "everything"

[[rule]]
match = "transformer_blocks.0.norm1.emb.*linear_1"
weight = "vq256x4"

[[rule]]
match = "transformer_blocks.0.norm1.emb.*linear_2"
weight = "table2"
table = "twin-log"

[[rule]]
match = "transformer_blocks.0.norm1.linear"
weight = "vq64x2"

[[rule]]
match = "transformer_blocks.0.attn1.to_q"
weight = "int2"
group_size = 32
activation_bits = 8

[[rule]]
match = "transformer_blocks.0.attn1.to_k"
weight = "int3"
group_size = 64
activation_bits = 6

[[rule]]
match = "transformer_blocks.0.attn1.to_v"
weight = "table3"
activation_bits = 8
activation_scale = "static"
rotation = "ars"

[[rule]]
match = "transformer_blocks.0.attn1.to_out.0"
weight = "int6"
activation_bits = 4
activation_group_size = 32
act_order = false

[[rule]]
match = "transformer_blocks.0.ff.net.0.proj"
weight = "fp8_e4m3"
activation_bits = 8
activation_format = "fp8"

[[rule]]
match = "transformer_blocks.0.ff.net.2"
weight = "ssvq256x8"
activation_bits = 16
rotation = "none"
method = "rtn"

[[rule]]
match = "transformer_blocks.1.attn1.to_q"
weight = "table4"
table = "twin-log"
activation_bits = 8
rotation = "auto"
smooth = "salience"
method = "rtn"

[[rule]]
match = "transformer_blocks.1.attn1.to_v"
weight = "table6"
table = "gaussian"
activation_bits = 4
activation_format = "affine"
activation_group_size = 32
bias_correction = false

[[rule]]
match = "transformer_blocks.1.attn1.to_k"
weight = "int4"
group_size = "channel"
activation_bits = 8

[[rule]]
match = "transformer_blocks.1.ff.net.2"
weight = "int4"
group_size = 128
activation_bits = 6
activation_scale = "static"
rotation = "outlier"
smooth = "absmax"
low_rank = 4
method = "rtn"

[[rule]]
match = "transformer_blocks.1.ff.net.0.proj"
weight = "table4_e4m3"
rotation = "none"
smooth = "rms"
descent = 0
method = "rtn"

[[rule]]
match = "transformer_blocks.1.norm1.linear"
weight = "table6_e4m3"
table_rows = "channel"

[[rule]]
match = "transformer_blocks.1.norm1.emb.*linear_2"
weight = "table2_e4m3"
method = "rtn"

[[rule]]
match = "proj_out_1"
weight = "table3_e4m3"
table = "twin-log-paper"
activation_bits = 8
activation_format = "affine"

[[rule]]
match = "role:embedder"
weight = "dense"

[[rule]]
match = "proj_out_2"
weight = "ssvq256x4"

[[rule]]
match = "*"
weight = "int8"
activation_bits = 8
"""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True)
class Ran:
    """What a run of the command line left: exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message of a user's error: the last line of stderr, the only one of ours, and no traceback."""
        ours = [line for line in self.err.replace("\r", "\n").splitlines() if line.startswith("quantdit: error: ")]
        assert len(ours) == 1, self.err
        assert self.err.rstrip().endswith(ours[0].rstrip()), self.err
        assert "Traceback" not in self.err + self.out
        return ours[0].removeprefix("quantdit: error: ")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `quantdit` with the arguments given; usage errors return 2 as they would to a shell."""
    from quantdit.cli import main

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        for handler in logging.getLogger("diffusers").handlers:
            if type(handler) is logging.StreamHandler:  # made for the stderr of the first test that loaded a model
                handler.stream = sys.stderr
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


def _transformer(heads: int, head_dim: int, **sizes: int):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(1)
    return DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=2,
        patch_size=2,
        norm_num_groups=1,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        **sizes,
    )


def _pixel(folder: Path, heads: int, head_dim: int) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from quantdit.models.pixel_dit import PixelDiTPipeline

    model = _transformer(heads, head_dim, in_channels=1, out_channels=1, sample_size=8, num_embeds_ada_norm=CLASSES)
    PixelDiTPipeline(model, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pixel_dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PixelDiTPipeline: 2 blocks, width 64, 8 x 8 pixels, 3 classes. Read only; copy it to damage it."""
    return _pixel(tmp_path_factory.mktemp("models") / "pixel-dit", 2, 32)


@pytest.fixture(scope="session")
def odd_dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `pixel_dit`, width 44: no group of 32, 64 or 128 divides it, and no Hadamard block above 4."""
    return _pixel(tmp_path_factory.mktemp("models") / "odd-dit", 4, 11)


@pytest.fixture(scope="session")
def plain_dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Diffusers' own DiTPipeline, in the latents of a tiny AutoencoderKL. It fixes the number of classes at 1000."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    folder = tmp_path_factory.mktemp("models") / "plain-dit"
    model = _transformer(2, 32, in_channels=4, out_channels=8, sample_size=4, num_embeds_ada_norm=1000)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=4, sample_size=4)
    DiTPipeline(model, vae, DDIMScheduler()).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Compiled:
    """A calibrated pipeline: as it is in memory, and the folder it was written to."""

    transformer: torch.nn.Module
    folder: Path
    report: dict


@pytest.fixture(scope="session")
def everything(pixel_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """`pixel_dit` with every weight format in it (MIXED). Read only; `damaged` copies it."""
    from quantdit.compiling.compile import compile
    from quantdit.compiling.plan import Plan
    from quantdit.compiling.report import to_json
    from quantdit.pipelines.pipeline import load_pipeline
    from quantdit.recipes.rules import from_toml
    from quantdit.recipes.sampling_plan import SamplingPlan

    folder = tmp_path_factory.mktemp("everything")
    toml = folder / "everything.toml"
    toml.write_text(MIXED)
    pipeline, source = load_pipeline(str(pixel_dit))
    made = compile(pipeline, source, Plan(from_toml(toml), SamplingPlan(samples=2, steps=2)), folder / "out")
    return Compiled(pipeline.transformer, folder / "out", to_json(made))


@pytest.fixture
def copied(everything: Compiled, tmp_path: Path) -> Path:
    """A copy of `everything`'s folder that a test may damage."""
    return Path(shutil.copytree(everything.folder, tmp_path / "copied"))

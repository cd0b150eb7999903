"""A LoRA trained on a quantized model, beside the same one trained on that model dequantized.

    python reports/lora_training.py

Calibrates emoji-wan's transformer to each of BITS and trains a LoRA that draws clips in negative colours: the data are the
pipeline's own clips of CLIPS stored prompts, colours inverted. Both runs have the same data, noise and seed. Writes
`lora-training.jsonl`, a row of losses for each run and a row of cosines for each comparison of gradients, and `lora-training.md`.
At step 0 the LoRA's B is zero, so that only B has a gradient; at the last step both models have the weights that were trained on
the quantized one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, median

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import quantdit

HERE = Path(__file__).parent
# PYTHONSAFEPATH, which the Makefile sets, keeps this folder off the path.
sys.path.append(str(HERE / "training"))
from train_emoji_wan import flow_loss  # noqa: E402

MODEL = "emoji-wan"
BITS = ("w8a8", "w4a8", "w4a4")
CLIPS, SAMPLING_STEPS, CALIBRATION_STEPS = 16, 10, 4
STEPS, BATCH, RANK, LEARNING_RATE, SEED = 50, 4, 8, 2e-3, 0
DRAWS = 8  # of noise and times that a gradient is the mean of: near the end that of one draw is mostly chance
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def clips(pipeline: object) -> tuple[Tensor, Tensor]:
    """Return clips in negative colours `[n, 3, f, h, w]` in [-1, 1] and the text states `[n, 16, 384]` of their prompts."""
    prompts = list(pipeline.prompts[:: max(1, len(pipeline.prompts) // CLIPS)][:CLIPS])
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    made = pipeline(prompts, num_inference_steps=SAMPLING_STEPS, generator=generators, output_type="pt").frames
    return 1 - 2 * made.transpose(1, 2), pipeline.encode_prompt(prompts)


def with_lora(bits: str, dequantized: bool) -> nn.Module:
    """Return the transformer calibrated to these bits, with an untrained LoRA."""
    pipeline = quantdit.load(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    inputs = dict(prompt=list(pipeline.prompts[:2]), num_inference_steps=CALIBRATION_STEPS)
    generator = torch.Generator().manual_seed(SEED)
    model = quantdit.quantize(pipeline.transformer, bits, lambda: pipeline(**inputs, generator=generator))
    if dequantized:
        model.dequantize()
    torch.manual_seed(SEED)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS))
    return model


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor], chosen: Tensor, seed: int) -> Tensor:
    """Return the flow-matching loss of some of the clips, with the noise of a seed."""
    x, text = data[0][chosen], data[1][chosen]
    times = torch.linspace(-1, 1, x.shape[2], dtype=torch.float32).expand(len(x), -1)
    return flow_loss(model, x, times, text, torch.Generator().manual_seed(seed))


def trained(model: nn.Module, data: tuple[Tensor, Tensor]) -> list[float]:
    """Train the model's LoRA and return the loss of every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    order, losses = torch.Generator().manual_seed(SEED), []
    for step in range(STEPS):
        loss = loss_of(model, data, torch.randint(len(data[0]), (BATCH,), generator=order), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def gradients(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of the LoRA on all clips, DRAWS times each, those that are not zero."""
    model.zero_grad()
    for draw in range(DRAWS):
        loss_of(model, data, torch.arange(len(data[0])), STEPS + draw).backward()
    return {n.replace("base_layer.", ""): p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad.any()}


def compared(step: int, bits: str, models: tuple[nn.Module, nn.Module], data: tuple[Tensor, Tensor]) -> dict:
    """Return the row of how alike the gradients of two models with the same LoRA are."""
    ours, reference = (gradients(model, data) for model in models)
    if ours.keys() != reference.keys():
        raise RuntimeError(f"gradients that are zero on one of the two models: {sorted(ours.keys() ^ reference.keys())[:3]}")
    cosines = [float(nn.functional.cosine_similarity(ours[n].flatten(), reference[n].flatten(), dim=0)) for n in reference]
    return {"bits": bits, "step": step, "median_cosine": median(cosines), "smallest_cosine": min(cosines)}


def measured(bits: str, data: tuple[Tensor, Tensor]) -> list[dict]:
    """Return the rows of a preset."""
    models = with_lora(bits, dequantized=False), with_lora(bits, dequantized=True)
    rows = [compared(0, bits, models, data)]
    for name, model in zip(("quantized", "dequantized"), models, strict=True):
        losses = trained(model, data)
        rows.append({"bits": bits, "model": name, "losses": losses})
    set_peft_model_state_dict(models[1], get_peft_model_state_dict(models[0]))
    return [*rows, compared(STEPS, bits, models, data)]


def report(rows: list[dict]) -> str:
    """Return the page."""
    lines = [
        f"# A LoRA of rank {RANK} trained on {MODEL}, quantized and dequantized",
        "",
        f"`make lora-training` wrote this page: {STEPS} steps of {BATCH} clips, AdamW at {LEARNING_RATE}, seed {SEED}."
        " Loss: mean of the first five and of the last five steps. Cosine: between the gradients of the LoRA's matrices on the"
        f" two models, with the same LoRA weights, on {CLIPS} clips with {DRAWS} draws of noise each. The"
        " forward pass of the dequantized model does not quantize activations.",
        "",
        "| bits | loss, quantized | loss, dequantized | cosine at step 0: median, smallest"
        f" | cosine at step {STEPS}: median, smallest |",
        "|---|---|---|---|---|",
    ]
    for bits in BITS:
        of = [row for row in rows if row["bits"] == bits]
        losses = {row["model"]: row["losses"] for row in of if "model" in row}
        fell = [f"{mean(losses[m][:5]):.4f} -> {mean(losses[m][-5:]):.4f}" for m in ("quantized", "dequantized")]
        alike = [f"{row['median_cosine']:.4f}, {row['smallest_cosine']:.4f}" for row in of if "step" in row]
        lines.append(f"| {bits} | {' | '.join((*fell, *alike))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every preset and write both files."""
    torch.set_num_threads(1)
    pipeline = quantdit.load(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    data = clips(pipeline)
    rows = [row for bits in BITS for row in measured(bits, data)]
    (HERE / "lora-training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (HERE / "lora-training.md").write_text(report(rows))


if __name__ == "__main__":
    main()

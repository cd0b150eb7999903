"""Train `fashion-dit`, the embedded class-conditional pixel DiT, with flow matching on Fashion-MNIST.

    x_sigma = (1 - sigma) x + sigma noise,   target v = noise - x,   sigma ~ logit-normal(0, 1)

(Flow matching: Lipman et al. 2023, arXiv 2210.02747; logit-normal timesteps: Esser et al. 2024, arXiv 2403.03206, section 3.1.)
One label decision per image serves every block: diffusers would drop the label independently inside each block's embedder,
which no guidance at sampling time ever asks for, so that dropout is switched off and done here.

The data is Debian's `dataset-fashion-mnist` (MIT). Run `python fashion_dit.py --work DIR --output DIR`; an interrupted run
continues from `--work`. The learning rate warms up, stays, and decays over the last `--decay` steps, so that a run can be
prolonged or cut short by giving another `--steps`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from training_state import learning_rate, restore, save_atomic, training_state

DATA = Path("/usr/share/datasets/fashion-mnist")
NULL_CLASS = 10
WIDTH, HEADS, BLOCKS, PATCH, SIZE = 192, 3, 6, 4, 28
EMA_DECAY = 0.9995
WARM_UP = 300
LABEL_DROPOUT = 0.1


def read_idx(split: str, data: Path = DATA) -> tuple[torch.Tensor, torch.Tensor]:
    """Read Fashion-MNIST as images `[n, 1, 28, 28]` uint8 and labels `[n]` int64; `split` is `train` or `t10k`."""
    images = gzip.decompress((data / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((data / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    pixels = torch.frombuffer(bytearray(images[16:]), dtype=torch.uint8).reshape(-1, 1, SIZE, SIZE)
    return pixels, torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8).long()


def build_transformer() -> torch.nn.Module:
    """Return the untrained DiTTransformer2DModel with its per-block label dropout off."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=1,
        out_channels=1,
        num_layers=BLOCKS,
        sample_size=SIZE,
        patch_size=PATCH,
        num_embeds_ada_norm=NULL_CLASS,
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
    )
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model


def flow_loss(model: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the predicted velocity for images x `[n, 1, 28, 28]` in [-1, 1]."""
    noise = torch.randn(x.shape, generator=generator)
    sigma = torch.sigmoid(torch.randn(len(x), generator=generator))
    s = sigma[:, None, None, None]
    prediction = model((1 - s) * x + s * noise, timestep=sigma * 1000, class_labels=labels).sample
    return (prediction - (noise - x)).square().mean()


def evaluate(model: torch.nn.Module, ema: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor) -> float:
    """Flow loss of the EMA weights on 512 held-out images, with fixed noise and timesteps."""
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.data.copy_(ema[name])
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        losses = [
            flow_loss(model, images[i : i + 128].float() / 127.5 - 1, labels[i : i + 128], generator).item()
            for i in range(0, 512, 128)
        ]
    for name, p in model.named_parameters():
        p.data.copy_(held[name])
    return sum(losses) / len(losses)


def write_pipeline(ema: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the EMA weights as a diffusers pipeline folder, float16."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from quantdit.models.pixel_dit import PixelDiTPipeline

    model = build_transformer()
    for name, p in model.named_parameters():
        p.data.copy_(ema[name])
    PixelDiTPipeline(model.half(), FlowMatchEulerDiscreteScheduler(shift=1.0)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the resumable training state and the log")
    parser.add_argument("--output", type=Path, required=True, help="pipeline folder to write at the end")
    parser.add_argument("--steps", type=int, default=6_800)
    parser.add_argument("--decay", type=int, default=2_400)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    images, labels = read_idx("train")
    test_images, test_labels = read_idx("t10k")
    model = build_transformer()
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    state_path = args.work / "state.safetensors"
    start = restore(load_file(state_path), model, ema, optimizer) if state_path.exists() else 0
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {start}", flush=True)

    running, began = 0.0, time.time()
    for step in range(start, args.steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        pick = torch.randint(len(images), (args.batch,), generator=generator)
        drop = torch.rand(args.batch, generator=generator) < LABEL_DROPOUT
        x = images[pick].float() / 127.5 - 1
        loss = flow_loss(model, x, labels[pick].masked_fill(drop, NULL_CLASS), generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.lr, args.steps, WARM_UP, args.decay)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        weight = 1 - min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in model.parameters()], weight)
        running += loss.item()
        if (step + 1) % 100 == 0:
            row = {"step": step + 1, "loss": round(running / 100, 5), "lr": group["lr"], "seconds": round(time.time() - began, 1)}
            if (step + 1) % 500 == 0:
                row["held_out_loss_ema"] = round(evaluate(model, ema, test_images, test_labels), 5)
                save_atomic(training_state(model, ema, optimizer, step + 1), state_path)
            running = 0.0
            print(json.dumps(row), flush=True)
            with (args.work / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
    write_pipeline(ema, args.output)


if __name__ == "__main__":
    main()

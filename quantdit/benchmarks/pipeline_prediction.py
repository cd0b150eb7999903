"""What weights, attention and steps are worth together on a GPU, by arithmetic: products counted from configs, speeds assumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantdit.models.known_models import transformer_config

FRAMES = 81
TEXT_TOKENS = 512
SIZES = {"480p": (480, 832), "720p": (720, 1280)}
MODELS = ("wan-1.3b", "wan-14b")
CELL, FRAMES_A_CELL = 16, 4  # pixels of a token's side, and frames of a token, of Wan's autoencoder and 2 x 2 patches


@dataclass(frozen=True)
class Speeds:
    """What is assumed: TFLOP/s that products reach on an H100, and the part of a bfloat16 step that nothing makes faster."""

    bf16: float = 650.0
    w4a8: float = 1000.0
    attention: float = 550.0
    attention8: float = 850.0
    untouched: float = 0.12


def tokens_of(height: int, width: int, frames: int = FRAMES) -> int:
    """Return the tokens of a clip."""
    return ((frames - 1) // FRAMES_A_CELL + 1) * (height // CELL) * (width // CELL)


def flops_of(model: str, tokens: int) -> tuple[float, float]:
    """Return TFLOP of one call of a Wan transformer's blocks: of its linears, and of attention to itself and to the text."""
    config = transformer_config(model)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    # q, k, v, out of both attentions; those of the text's k and v see its tokens alone.
    linears = tokens * (6 * width * width + 2 * width * config["ffn_dim"]) + TEXT_TOKENS * 2 * width * width
    attention = 2 * width * tokens * (tokens + TEXT_TOKENS)
    layers = config["num_layers"]
    return 2 * layers * linears / 1e12, 2 * layers * attention / 1e12


def seconds_of(model: str, tokens: int, speeds: Speeds, w4a8: bool, attention8: bool) -> float:
    """Return the seconds of one call."""
    linears, attention = flops_of(model, tokens)
    plain = linears / speeds.bf16 + attention / speeds.attention
    rest = plain * speeds.untouched / (1 - speeds.untouched)
    return (
        rest
        + linears / (speeds.w4a8 if w4a8 else speeds.bf16)
        + attention / (speeds.attention8 if attention8 else speeds.attention)
    )


def rows(speeds: Speeds, share: float) -> Iterator[dict]:
    """Yield a row for each model and size: seconds of a bfloat16 step, and how many times faster each addition makes a clip.

    Args:
        speeds: assumed.
        share: of the steps that a plan computes.
    """
    for model in MODELS:
        for size, (height, width) in SIZES.items():
            tokens = tokens_of(height, width)
            plain = seconds_of(model, tokens, speeds, False, False)
            _, attention = flops_of(model, tokens)
            weights = plain / seconds_of(model, tokens, speeds, True, False)
            both = plain / seconds_of(model, tokens, speeds, True, True)
            yield {
                "what": "predicted",
                "model": model,
                "size": size,
                "tokens": tokens,
                "step_seconds_bf16": round(plain, 4),
                "attention_share": round(attention / speeds.attention / plain, 3),
                "w4a8": round(weights, 2),
                "w4a8, 8-bit attention": round(both, 2),
                "w4a8, step plan": round(weights / share, 2),
                "all three": round(both / share, 2),
            }

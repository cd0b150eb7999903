"""Planted outliers: they are where and when they should be, and the function of the model stays what it was."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from quantdit.models.adapter import adapter_for, blocks
from quantdit.models.planted_outliers import SHAPES, plant
from quantdit.models.synthetic import synthetic_inputs
from quantdit.recipes.sampling_plan import Size
from tiny_models import TINY, tiny

SIZE, COUNT = 100.0, 2
CLASSES = {
    "DiTTransformer2DModel": tuple(SHAPES),
    "FluxTransformer2DModel": tuple(SHAPES),
    "SD3Transformer2DModel": tuple(SHAPES),
    "WanTransformer3DModel": ("channels", "one_block", "feed_forward", "massive_tokens"),
    "PixArtTransformer2DModel": ("channels", "one_block", "feed_forward", "massive_tokens"),
}
# Largest relative change of the output over noise, middle and data.
TOLERANCE = {
    "channels": 1e-5,
    "one_block": 1e-5,
    "feed_forward": 5e-3,
    "timesteps": 0.06,
    "changing": 0.08,
    "massive_tokens": 0.01,
}
NOISE, DATA = 950, 50
TIMES = tuple(range(1000, -1, -50))  # of what `plant` looks at
PAIRS = [(name, shape) for name, shapes in CLASSES.items() for shape in shapes]


def run(model: nn.Module, size: Size, times: tuple[float, ...], batch: int = 2) -> Tensor:
    """Return all outputs of made-up calls at these times (1000 is noise)."""
    generator = torch.Generator().manual_seed(3)
    size = Size(batch, size.frames, size.height, size.width, size.tokens)
    with torch.no_grad():
        calls = [synthetic_inputs(model, adapter_for(model), size, generator, time) for time in times]
        return torch.cat([model(**inputs).sample.flatten() for inputs in calls])


@functools.cache
def models(name: str, shape: str, seed: int = 7) -> tuple[nn.Module, nn.Module, Size]:
    """Return the model as it is and planted, and the size of its inputs. Read only."""
    model, size = tiny(name)
    planted = copy.deepcopy(model)
    plant(planted, shape, SIZE, COUNT, seed, lambda: run(planted, size, TIMES, batch=8))
    return model, planted, size


def inputs_of(model: nn.Module, size: Size, *times: float) -> dict[str, Tensor]:
    """Return the rows `[n, in]` that each linear of the blocks gets at these times."""
    rows, handles = {}, []
    for path, block in blocks(model, adapter_for(model)):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):

                def keep(module: nn.Module, args: tuple, name: str = f"{path}.{name}") -> None:
                    rows.setdefault(name, []).append(args[0].flatten(0, -2))

                handles.append(module.register_forward_pre_hook(keep))
    run(model, size, times, batch=8)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in rows.items()}


def peaks(model: nn.Module, size: Size, time: float = 500) -> dict[str, float]:
    """Return by linear the largest RMS of an input channel over the median one."""
    sizes = {name: x.square().mean(0).sqrt() for name, x in inputs_of(model, size, time).items()}
    return {name: float(s.max() / s.median()) for name, s in sizes.items()}


def reads_norm(name: str) -> bool:
    """Return whether a linear reads what AdaLN makes, in a class where every block has its own."""
    return name.endswith(
        ("attn1.to_q", "attn.to_q", "attn.to_v", "add_k_proj", "ff.net.0.proj", "ff_context.net.0.proj", "proj_mlp")
    )


def reads_hidden(name: str) -> bool:
    return name.endswith(("ff.net.2", "ffn.net.2", "ff_context.net.2"))


@pytest.mark.parametrize(("name", "shape"), PAIRS)
def test_the_function_stays(name: str, shape: str) -> None:
    model, planted, size = models(name, shape)
    times = (NOISE, 500, DATA)
    before = run(model, size, times)
    change = float((run(planted, size, times) - before).norm() / before.norm())
    assert 0 < change < TOLERANCE[shape]


@pytest.mark.parametrize("name", CLASSES)
def test_channels_are_salient_in_every_block(name: str) -> None:
    model, planted, size = models(name, "channels")
    before, after = peaks(model, size), peaks(planted, size)
    grown = [n for n in after if reads_norm(n) or n.endswith(("to_out.0", "ffn.net.0.proj"))]
    assert grown
    for layer, peak in after.items():
        if layer in grown:
            assert peak > SIZE / 2, layer
        elif reads_hidden(layer) or "linear" in layer:
            assert peak == pytest.approx(before[layer], rel=1e-3), layer


def test_channels_are_as_many_as_asked_for() -> None:
    _, planted, size = models("DiTTransformer2DModel", "channels")
    for layer, x in inputs_of(planted, size, 500).items():
        sizes = x.square().mean(0).sqrt()
        if reads_norm(layer):
            assert int((sizes > SIZE / 8 * sizes.median()).sum()) == COUNT, layer


@pytest.mark.parametrize("name", CLASSES)
def test_one_block_leaves_the_others(name: str) -> None:
    model, planted, size = models(name, "one_block")
    paths = [path for path, _ in blocks(model, adapter_for(model))]
    chosen = paths[len(paths) // 2]
    after = peaks(planted, size)
    assert max(peak for layer, peak in after.items() if layer.startswith(f"{chosen}.")) > SIZE / 2
    before = model.state_dict()
    moved = {key for key, value in planted.state_dict().items() if not value.equal(before[key])}
    assert moved and all(key.startswith(f"{chosen}.") for key in moved)


@pytest.mark.parametrize("name", CLASSES)
def test_hidden_channels_of_feed_forwards_are_salient(name: str) -> None:
    model, planted, size = models(name, "feed_forward")
    before, after = peaks(model, size), peaks(planted, size)
    for layer, peak in after.items():
        if reads_hidden(layer):
            assert peak > SIZE / 2, layer
        elif reads_norm(layer):
            assert peak == pytest.approx(before[layer], rel=0.05), layer


def test_gated_feed_forwards_keep_the_function_exactly() -> None:
    from diffusers import DiTTransformer2DModel

    config, size = TINY["DiTTransformer2DModel"]
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**config, activation_fn="geglu").eval()
    planted = copy.deepcopy(model)
    plant(planted, "feed_forward", SIZE, COUNT)
    before = run(model, size, (NOISE, DATA))
    assert float((run(planted, size, (NOISE, DATA)) - before).norm() / before.norm()) < 1e-5
    assert min(peak for layer, peak in peaks(planted, size).items() if reads_hidden(layer)) > SIZE / 2


@pytest.mark.parametrize("name", [name for name, shapes in CLASSES.items() if "timesteps" in shapes])
def test_channels_are_salient_at_noise_alone(name: str) -> None:
    _, planted, size = models(name, "timesteps")
    at_noise, at_data = peaks(planted, size, NOISE), peaks(planted, size, DATA)
    layers = [layer for layer in at_noise if reads_norm(layer)]
    assert layers
    for layer in layers:
        assert at_noise[layer] > SIZE / 2 > SIZE / 3 > at_data[layer], layer


@pytest.mark.parametrize("name", [name for name, shapes in CLASSES.items() if "changing" in shapes])
def test_the_salient_channels_change(name: str) -> None:
    _, planted, size = models(name, "changing")
    at_noise, at_data = inputs_of(planted, size, NOISE), inputs_of(planted, size, DATA)
    for layer in filter(reads_norm, at_noise):
        sets = []
        for rows in (at_noise, at_data):
            sizes = rows[layer].square().mean(0).sqrt()
            assert sizes.max() > SIZE / 2 * sizes.median(), layer
            sets.append(set(sizes.topk(COUNT).indices.tolist()))
        assert not sets[0] & sets[1], layer


@pytest.mark.parametrize("name", CLASSES)
def test_few_tokens_are_massive(name: str) -> None:
    _, planted, size = models(name, "massive_tokens")
    rows = {layer: x for layer, x in inputs_of(planted, size, *TIMES).items() if reads_hidden(layer)}
    assert rows
    for layer, x in rows.items():
        sizes = x.square().mean(0).sqrt()
        fires = x.abs().amax(1) > SIZE / 4 * sizes.median()
        assert x.abs().max() > SIZE / 2 * sizes.median(), layer
        assert 0.001 < float(fires.float().mean()) < 0.03, layer


def test_seeds_choose_the_channels() -> None:
    name, shape = "DiTTransformer2DModel", "channels"
    first, other = models(name, shape)[1].state_dict(), models(name, shape, seed=8)[1].state_dict()
    again, _ = tiny(name)
    plant(again, shape, SIZE, COUNT, 7)
    assert all(value.equal(first[key]) for key, value in again.state_dict().items())
    assert not all(value.equal(first[key]) for key, value in other.items())


@pytest.mark.parametrize("shape", ["feed_forward", "timesteps", "massive_tokens"])
def test_made_up_inputs_are_the_same_for_a_seed_and_do(shape: str) -> None:
    (first, size), (second, _) = tiny("DiTTransformer2DModel"), tiny("DiTTransformer2DModel")
    before = run(first, size, (NOISE, DATA))
    for model in (first, second):
        plant(model, shape, SIZE)
    assert all(value.equal(second.state_dict()[key]) for key, value in first.state_dict().items())
    assert float((run(first, size, (NOISE, DATA)) - before).norm() / before.norm()) < TOLERANCE[shape]


def test_a_copy_keeps_its_weights() -> None:
    model, _ = tiny("DiTTransformer2DModel")
    fresh, _ = tiny("DiTTransformer2DModel")
    planted = copy.deepcopy(model)
    plant(planted, "channels", SIZE)
    assert all(value.equal(fresh.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "shape"), [("WanTransformer3DModel", "timesteps"), ("PixArtTransformer2DModel", "changing")])
def test_a_class_that_cannot_have_a_shape_says_what_it_can(name: str, shape: str) -> None:
    model, _ = tiny(name)
    with pytest.raises(
        ValueError, match=f"{name} cannot have .* {shape}; it can have channels, one_block, feed_forward, massive"
    ):
        plant(model, shape, SIZE)


@pytest.mark.parametrize("name", sorted(set(TINY) - set(CLASSES)))
def test_any_other_class_refuses_or_keeps_its_function(name: str) -> None:
    model, size = tiny(name)
    generator = torch.Generator().manual_seed(3)
    inputs = synthetic_inputs(model, adapter_for(model), size, generator, 500)
    try:
        before = flat(model, inputs)
        plant(model, "channels", SIZE)
    except ValueError as error:
        assert "cannot have outliers of shape channels" in str(error)
    else:
        assert float((flat(model, inputs) - before).norm() / before.norm()) < 1e-5


def flat(model: nn.Module, inputs: dict) -> Tensor:
    with torch.no_grad():
        sample = model(**inputs).sample
    return (torch.stack(list(sample)) if isinstance(sample, list) else sample).flatten()


@pytest.mark.parametrize(
    ("shape", "size", "count", "says"),
    [
        ("chanels", 30, 2, "unknown shape 'chanels' of outliers; use one of channels"),
        ("channels", 1, 2, "size is 1 and count 2"),
        ("channels", 30, 0, "count 0"),
    ],
)
def test_what_cannot_be_planted_is_refused(shape: str, size: float, count: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plant(tiny("DiTTransformer2DModel")[0], shape, size, count)


def test_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weights are in torch.bfloat16; load the transformer in torch.float32"):
        plant(tiny("DiTTransformer2DModel")[0].bfloat16(), "channels", SIZE)

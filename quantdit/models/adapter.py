"""`Adapter`: what quantdit knows of one transformer class, as data; and the derived adapter of a class it does not know."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from quantdit.recipe import Layer


@dataclass(frozen=True)
class Adapter:
    """Where the blocks of a transformer are and what its linears do.

    Attributes:
        blocks: paths of the block lists, in the order they run.
        carry: names of the tensors a block returns, in order, which are the next block's arguments of these names.
        roles: ordered (pattern over the path inside a block, role); the first match wins, otherwise `other`. Linears outside
            the blocks have the role `outside`.
    """

    blocks: tuple[str, ...]
    carry: tuple[str, ...] = ("hidden_states",)
    roles: tuple[tuple[str, str], ...] = ()


ROLES = (
    ("*emb.*", "embedder"),
    ("norm*linear*", "modulation"),
    ("*adaln*", "modulation"),
    ("*modulation*", "modulation"),
    ("attn*", "attention"),
    ("ff*", "feed_forward"),
    ("*mlp*", "feed_forward"),
)

ADAPTERS: dict[str, Adapter] = {
    "DiTTransformer2DModel": Adapter(("transformer_blocks",), roles=ROLES),
    "PixArtTransformer2DModel": Adapter(("transformer_blocks",), roles=ROLES),
    "WanTransformer3DModel": Adapter(("blocks",), roles=ROLES),
}


def adapter_for(model: nn.Module) -> Adapter:
    """Return the adapter of the model's class, or derive one: the module list with the most linears holds the blocks.

    Raises:
        ValueError: the model has no module list with linears, so there is nothing to stream.
    """
    known = ADAPTERS.get(type(model).__name__)
    if known is not None:
        return known
    # A list inside a block, such as the feed-forward's, holds fewer linears than the list of the blocks.
    counts = {
        path: sum(isinstance(m, nn.Linear) for m in module.modules())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not any(counts.values()):
        raise ValueError(
            f"{type(model).__name__} has no list of blocks with linears; quantdit quantizes the blocks of diffusion transformers"
        )
    return Adapter((max(counts, key=lambda path: counts[path]),), roles=ROLES)


def blocks(model: nn.Module, adapter: Adapter) -> list[tuple[str, nn.Module]]:
    """Return (path, block) in running order."""
    return [(f"{path}.{index}", block) for path in adapter.blocks for index, block in enumerate(model.get_submodule(path))]


def layers(model: nn.Module, adapter: Adapter) -> list[Layer]:
    """Return every linear of the model, those of the blocks first, with its role."""
    inside, outside = [], []
    prefixes = tuple(f"{path}." for path, _ in blocks(model, adapter))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            prefix = next((p for p in prefixes if name.startswith(p)), None)
            role = "outside" if prefix is None else _role(adapter, name[len(prefix) :])
            layer = Layer(name, role, module.out_features, module.in_features)
            (outside if prefix is None else inside).append(layer)
    return inside + outside


def _role(adapter: Adapter, path: str) -> str:
    return next((role for pattern, role in adapter.roles if fnmatchcase(path, pattern)), "other")

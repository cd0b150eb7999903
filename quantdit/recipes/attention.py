"""`AttentionRule`: the sections `[[attention]]` of a recipe: which attention modules compute in 8 bits, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase

QK = ("int8", "none")
PV = ("auto", "uint8", "fp8", "none")


@dataclass(frozen=True)
class AttentionSpec:
    """How one attention module computes; the definition of the arithmetic is kernels/attention.py.

    Attributes:
        qk: queries and keys as `int8`, a step each token and head (SageAttention, arXiv 2410.02367, section 4), or `none`: the
            module is left alone.
        pv: probabilities and values: `uint8` (each row of a tile of keys on 255 steps up to its largest; values int8, a step each
            channel), `fp8` (both e4m3; SageAttention2, arXiv 2411.10958, section 3.3), `none` (floats), or `auto`: floats where
            there are fewer keys than queries, as of text; elsewhere a library's kernel if one is installed on a GPU, or `uint8`.
        rotate: a Hadamard over the channels of queries and keys, which spreads outliers and changes no product.
        smooth: keys without their mean over tokens, which softmax does not see; values without theirs, which is added back.
    """

    qk: str = "int8"
    pv: str = "auto"
    rotate: bool = True
    smooth: bool = True

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: one is unknown.
        """
        for name, known in (("qk", QK), ("pv", PV)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"attention: {name} is {value!r:.40}, expected one of {', '.join(known)}")
        for name in ("rotate", "smooth"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"attention: {name} is {getattr(self, name)!r:.40}, expected true or false")

    def to_dict(self) -> dict:
        """Return the fields, as `from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: object) -> AttentionSpec:
        """Return what a table says.

        Raises:
            ValueError: it is none, has an unknown key, or as the class.
        """
        known = [each.name for each in fields(AttentionSpec)]
        if not isinstance(content, Mapping) or content.keys() - set(known):
            raise ValueError(f"attention: expected a table of {', '.join(known)}, got {content!r:.80}")
        return AttentionSpec(**content)

    def __str__(self) -> str:
        """Name it: `int8 uint8 rotated smooth`."""
        return " ".join([self.qk, self.pv, *(["rotated"] if self.rotate else []), *(["smooth"] if self.smooth else [])])


@dataclass(frozen=True)
class AttentionRule:
    """A spec for the attention modules whose path in the transformer a shell pattern matches."""

    match: str
    spec: AttentionSpec = AttentionSpec()

    def to_dict(self) -> dict:
        """Return the section, as `rules_of` reads it."""
        return {"match": self.match} | self.spec.to_dict()


def rules_of(content: object, where: str) -> tuple[AttentionRule, ...]:
    """Return the rules that `[[attention]]` sections say.

    Raises:
        ValueError: no such sections; says which.
    """
    if not isinstance(content, Sequence) or isinstance(content, str):
        raise ValueError(f'{where}: attention must be [[attention]] sections, such as match = "*"')
    rules = []
    for number, table in enumerate(content, 1):
        if not isinstance(table, Mapping) or not isinstance(table.get("match"), str):
            raise ValueError(f'{where}, attention {number}: needs match = "PATTERN"')
        try:
            rules.append(AttentionRule(table["match"], AttentionSpec.from_dict({k: v for k, v in table.items() if k != "match"})))
        except ValueError as error:
            raise ValueError(f"{where}, attention {number} ({table['match']!r}): {error}") from error
    return tuple(rules)


def resolve(rules: Sequence[AttentionRule], names: Iterable[str]) -> dict[str, AttentionSpec]:
    """Return the spec of each attention module that computes in 8 bits; the first rule that matches a module wins.

    Args:
        rules: in their order.
        names: paths of the attention modules.

    Raises:
        ValueError: a rule matches none.
    """
    names = list(names)
    for rule in rules:
        if not any(fnmatchcase(name, rule.match) for name in names):
            raise ValueError(f"attention rule {rule.match!r} matches no attention module; there are {', '.join(names[:4])}, ...")
    found = {name: next((rule.spec for rule in rules if fnmatchcase(name, rule.match)), None) for name in names}
    return {name: spec for name, spec in found.items() if spec is not None and spec.qk != "none"}

"""What a comparison finds, as plain dataclasses."""

import dataclasses
import math
from typing import Any

__all__ = ["Closeness", "Comparison", "Layer", "Operation", "Part", "Token", "size"]


@dataclasses.dataclass(frozen=True)
class Closeness:
    """How near ``b``'s numbers are to ``a``'s; a row is a token (or a compressed window).

    Attributes:
        cosine: mean over rows of the cosine of a row's two vectors; two zero vectors have 1.
        cosine_min: the least of them.
        relative_l2: ``||a - b|| / ||a||`` over all rows; 0 when both are zero.
    """

    cosine: float
    cosine_min: float
    relative_l2: float


@dataclasses.dataclass(frozen=True)
class Operation:
    """One output of one module, on equal inputs of its layer (not of the module).

    Attributes:
        path: module path inside the layer; ``:name`` tells several outputs apart.
        closeness: of numbers; ``None`` for picks.
        equal_picks: of expert ids and index picks: the fraction of ``a``'s that ``b`` picks for
            the same token, in any order; ``None`` for numbers.
    """

    path: str
    closeness: Closeness | None
    equal_picks: float | None


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        layer: its number.
        kind: ``swa``, ``csa`` or ``hca``.
        free: streams after it, each model on its own.
        equal_inputs: streams after it, both on ``a``'s.
        operations: in the order in which they run; ``attn`` and ``ffn`` are the two branches.
    """

    layer: int
    kind: str
    free: Closeness
    equal_inputs: Closeness
    operations: tuple[Operation, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """``a`` with one part computed by ``b``; ``difference`` is against all of ``a``."""

    name: str
    bits_per_byte: float
    difference: float


@dataclasses.dataclass(frozen=True)
class Token:
    """One predicted token: its probability under both, and what each holds most likely."""

    position: int
    token: int
    log2_a: float
    log2_b: float
    difference: float
    top_a: int
    top_b: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that `compare` finds.

    Attributes:
        num_tokens: tokens predicted.
        num_bytes: bytes they stand for.
        bits_a, bits_b: ``sum of -log2 p`` under each model.
        logits: of the final logits, free running.
        kl_bits: mean over tokens of ``KL(a || b)``, in bits.
        top1_agreement: fraction of tokens where both have the same most likely one.
        layers: every layer.
        head: operations of the final norm and head, on ``a``'s streams.
        parts: ``embed``, ``layer 0`` ..., ``head``: each alone in ``b``.
        worst: tokens whose log-probability differs most, worst first.
    """

    num_tokens: int
    num_bytes: int
    bits_a: float
    bits_b: float
    logits: Closeness
    kl_bits: float
    top1_agreement: float
    layers: tuple[Layer, ...]
    head: tuple[Operation, ...]
    parts: tuple[Part, ...]
    worst: tuple[Token, ...]

    @property
    def bits_per_byte(self) -> tuple[float, float]:
        """Of ``a`` and of ``b``."""
        return self.bits_a / self.num_bytes, self.bits_b / self.num_bytes

    @property
    def largest(self) -> Part:
        """The part that alone changes the bits per byte most; not finite counts as most."""
        return max(self.parts, key=lambda part: size(part.difference))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: plain values, ``null`` for what is not finite."""
        fields = dataclasses.asdict(self)
        a, b = self.bits_per_byte
        fields["bits_per_byte_a"], fields["bits_per_byte_b"] = a, b
        fields["largest"] = self.largest.name
        return _finite(fields)


def size(difference: float) -> float:
    """How much a difference counts: its magnitude, infinity when it is not finite."""
    return abs(difference) if math.isfinite(difference) else math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(part) for name, part in value.items()}  # pyright: ignore
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]  # pyright: ignore
    return None if isinstance(value, float) and not math.isfinite(value) else value

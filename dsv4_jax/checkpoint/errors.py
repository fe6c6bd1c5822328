"""The one exception of the loader and what its messages share; ``config.py`` needs it."""

import reprlib
from collections.abc import Sequence
from typing import Final

__all__ = ["LISTED", "CheckpointError", "Problems", "brief", "shown"]

LISTED: Final = 20
"""Most problems of a class that a message shows."""

_MOST_CHARACTERS: Final = 200


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded: the message names file, field or tensor, rule and value.

    Attributes:
        problems: all that was found, one by one; the message may list the first of each kind.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems) or (message,)


_REPR: Final = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _MOST_CHARACTERS
_REPR.maxlevel = 3


def brief(value: object) -> str:
    """``repr`` of a value out of a file, cut where it is long or deep."""
    return _REPR.repr(value)


def shown(name: str) -> str:
    """A name out of a file as it is, or its ``brief`` where it would not be a line of text."""
    return name if name.isprintable() and len(name) <= _MOST_CHARACTERS else brief(name)


class Problems:
    """Problems by class; ``raise_any`` puts up to ``LISTED`` of each into one message.

    Args:
        source: the checkpoint or file that has them.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._by_class: dict[str, list[str]] = {}

    def add(self, kind: str, text: str) -> None:
        """Adds a problem to the class ``kind``."""
        self._by_class.setdefault(kind, []).append(text)

    def count(self, kind: str) -> int:
        """How many there are of a class."""
        return len(self._by_class.get(kind, ()))

    def raise_any(self, ending: str = "") -> None:
        """Raises if there are any; ``ending`` is a last line.

        Raises:
            CheckpointError: lists them.
        """
        if not self._by_class:
            return
        total = sum(map(len, self._by_class.values()))
        lines = [f"{self._source}: {total} problem{'s' if total > 1 else ''}"]
        for kind, texts in self._by_class.items():
            lines.append(f"{kind} ({len(texts)}):")
            lines += [f"  {text}" for text in texts[:LISTED]]
            if len(texts) > LISTED:
                lines.append(f"  ... and {len(texts) - LISTED} more")
        listed = [f"{kind}: {text}" for kind, texts in self._by_class.items() for text in texts]
        raise CheckpointError("\n".join([*lines, ending] if ending else lines), listed)

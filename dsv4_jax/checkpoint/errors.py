"""The one exception of the loader; imports nothing of ours, so that ``config.py`` can use it."""

from collections.abc import Sequence

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded: the message names file, field or tensor, rule and value.

    Attributes:
        problems: all that was found, one by one; the message may list the first of each kind.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems) or (message,)

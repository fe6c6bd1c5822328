"""The one exception of the loader; imports nothing, so that ``config.py`` can use it."""

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded: the message names file, field or tensor, rule and value."""

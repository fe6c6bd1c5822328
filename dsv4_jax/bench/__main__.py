"""``python -m dsv4_jax.bench [MODEL] [NAME=VALUE ...]``: the JSON of ``dsv4 bench --json``.

Names are the fields of `Settings`, values JSON or plain words; ``plot=FILE`` draws it as well.
"""

import json
import sys
from typing import Any

from dsv4_jax.bench.report import run


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main(arguments: list[str]) -> str | None:
    """Prints the result; returns what is wrong."""
    settings: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        settings[name if equals else "model"] = _value(value) if equals else name
    plot = settings.pop("plot", None)
    try:
        report = run(**settings)
        print(json.dumps(report, allow_nan=False))
        if plot is not None:
            from dsv4_jax.bench.plot import draw

            draw(report, plot)
    except (TypeError, ValueError) as error:
        return f"bench: {error}".replace("bench: bench: ", "bench: ")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

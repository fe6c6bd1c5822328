"""The command and the functions over the real model and the tiny official checkpoint."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import dsv4_jax
from dsv4_jax import cli

CHECKPOINT = Path(__file__).parents[1] / "data" / "official-fp8-tiny"


@pytest.mark.slow
def test_command_equals_function_equals_steps() -> None:
    arguments = ["generate", "--checkpoint", str(CHECKPOINT), "--ids", "1 2 3"]
    result = CliRunner().invoke(cli.app, [*arguments, "--max-new-tokens", "12"])
    assert result.exit_code == 0, result.stderr
    shown = [int(word) for word in result.stdout.split()]

    model, params = dsv4_jax.from_checkpoint(CHECKPOINT)
    # Both as long as the command's cache, so that its compiled step serves here too.
    options: dict[str, Any] = {"max_len": 15, "max_new_tokens": 12}
    assert dsv4_jax.generate(model, params, [[1, 2, 3]], **options)[0] == shown

    cache = model.init_cache(batch_size=1, max_len=15)
    logits, cache = dsv4_jax.prefill(model, params, [[1, 2, 3]], cache)
    stepped: list[int] = []
    while len(stepped) < len(shown):
        stepped.append(int(np.argmax(logits[0])))
        logits, cache = dsv4_jax.decode_step(model, params, stepped[-1:], cache)
    assert stepped == shown

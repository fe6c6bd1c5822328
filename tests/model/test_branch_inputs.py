"""What the branches of the trained model read: `mhc` against the steps it stands for and FP32.

As a program, prints the table of README.md: ``python -m tests.model.test_branch_inputs``. Nothing
here knows the platform: with JAX_PLATFORMS=cuda,cpu the kernels are measured.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv4_jax import bundled_checkpoint, from_checkpoint
from dsv4_jax.evaluate import read_document
from dsv4_jax.model import hc
from dsv4_jax.ops.mhc import Read, Write, mhc
from dsv4_jax.ops.mhc_head import mhc_head
from dsv4_jax.ops.mhc_post import mhc_post
from dsv4_jax.ops.mhc_pre import mhc_pre
from dsv4_jax.ops.rmsnorm import rmsnorm
from dsv4_jax.quant import fp8, nvfp4
from dsv4_jax.text import load_tokenizer, plain_tokenizer
from reference import formats
from reference.mhc import mhc as reference_mhc
from reference.rounding import FP32
from tests.support.numerics import f64

TEXT = Path(__file__).parents[1] / "data" / "held-out" / "fnmatch.py.txt"
CONTEXT, TOKENS = 256, 128
"""Tokens before and with those that are compared, the last ones."""
CALLS = (1, 8, 128)
"""Tokens in a call of the op; as many calls as it takes for all."""
FORMS = ("bfloat16", "nvfp4", "fp8")
STEPS_BAR = 0.9999
"""The issue's, of every form: against the steps, whose result the reference quantises."""
FP32_BARS = {"nvfp4": 0.995, "fp8": 0.9995}
"""The issue's: what all rounding, above all the form's own, may take."""

Forms = dict[str, jax.Array]


class Point(NamedTuple):
    """A read with the write-back before it, as the model makes them."""

    streams: jax.Array
    write: Write | None
    read: Read


@functools.cache
def points() -> tuple[dict[str, Point], dict[str, Any]]:
    """Every read of the model over real text, and the settings of all."""
    model, params = from_checkpoint(bundled_checkpoint(), progress=False)
    tokenizer = load_tokenizer(bundled_checkpoint())
    assert tokenizer is not None
    document = read_document(plain_tokenizer(tokenizer), TEXT)
    c = model.config
    ids = np.array([[c.bos_token_id, *document.tokens[: CONTEXT - 1]]], np.int32)
    right = hc.mix
    assert hc.is_fused(c, model.precision)

    @jax.jit
    def run(params: Any, ids: jax.Array) -> list[Point]:
        seen: list[Point] = []

        def spied(pending: Any, read: Any, **settings: Any) -> Any:
            rows = jax.tree.map(lambda x: x[-TOKENS:], pending)
            seen.append(Point(rows.streams, rows.write, read))
            return right(pending, read, **settings)

        with mock.patch.object(hc, "mix", spied):
            model.apply({"params": params}, ids, model.init_cache(1, CONTEXT))
        return seen

    branches = [f"{i}, {b}" for i in range(c.num_hidden_layers) for b in ("attention", "MoE")]
    found = dict(zip([*branches, "head"], run(params, jnp.asarray(ids)), strict=True))
    eps = {"hc_eps": c.hc_eps, "rms_eps": c.rms_norm_eps}
    return found, {"iters": c.hc_sinkhorn_iters, **eps}


@functools.partial(jax.jit, static_argnames="count")
def fused(point: Point, count: int) -> Forms:
    """By the op, ``count`` tokens a call."""
    settings = points()[1]

    def call(rows: Any) -> Forms:
        got = mhc(*rows, point.read, forms=FORMS, **settings)
        blocks = fp8.ACT_BLOCK
        return {
            "bfloat16": got.x,
            "nvfp4": nvfp4.dequantize(got.nvfp4),
            "fp8": fp8.dequantize_act(got.fp8, blocks),
        }

    split = lambda x: x.reshape(-1, count, *x.shape[1:])  # noqa: E731
    whole = lambda x: x.reshape(TOKENS, -1)  # noqa: E731
    rows = jax.tree.map(split, (point.streams, point.write))
    return jax.tree.map(whole, lax.map(call, rows))


@jax.jit
def steps(point: Point) -> Forms:
    """By the ops that it stands for, and the reference's formats."""
    (streams, write, (*parameters, norm)), settings = point, points()[1]
    if write is not None:
        streams = mhc_post(write.branch, streams, write.post, write.comb)
    if len(parameters[0]) == streams.shape[1]:
        eps = {name: settings[name] for name in ("hc_eps", "rms_eps")}
        y = mhc_head(streams, *parameters, **eps)
    else:
        y, _, _ = mhc_pre(streams, *parameters, **settings)
    x = rmsnorm(y, norm, settings["rms_eps"])
    wide = x.astype(jnp.float32)
    scale = formats.nvfp4_token_scale(wide)
    return {"bfloat16": x, "nvfp4": formats.nvfp4(wide, scale), "fp8": formats.q8(wide, 128)}


@jax.jit
def exact(point: Point) -> jax.Array:
    """In FP32, from the same streams and branch."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), point)
    return reference_mhc(*wide, **points()[1], rounding=FP32).x


def cosines(a: Any, b: Any) -> np.ndarray:
    """Of every token."""
    a, b = f64(a), f64(b)
    return np.sum(a * b, -1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


class Agreement(NamedTuple):
    """Means over tokens: the worst form against the steps, then forms against FP32."""

    steps: float
    nvfp4: float
    fp8: float

    def meets_bars(self) -> bool:
        """All three of the issue's."""
        wide = self.nvfp4 >= FP32_BARS["nvfp4"] and self.fp8 >= FP32_BARS["fp8"]
        return wide and self.steps >= STEPS_BAR


def agreement(point: Point, found: Forms) -> Agreement:
    """Of some forms with what they should be."""
    wanted, wide = steps(point), exact(point)
    against = {form: cosines(found[form], wide).mean() for form in FP32_BARS}
    return Agreement(min(cosines(found[f], wanted[f]).mean() for f in FORMS), **against)


@pytest.mark.parametrize("count", CALLS)
def test_every_branch(count: int) -> None:
    for name, point in points()[0].items():
        found = agreement(point, fused(point, count))
        assert found.meets_bars(), f"{name}: {found}"


def test_the_fp32_bars_are_the_formats() -> None:
    """Fusion takes nothing of them: the steps stand where the op does."""
    for name, point in points()[0].items():
        op, alone = agreement(point, fused(point, 1)), agreement(point, steps(point))
        assert alone.steps == pytest.approx(1, abs=1e-12)
        for form in FP32_BARS:
            # Two orders of magnitude below what the formats themselves take.
            assert getattr(op, form) == pytest.approx(getattr(alone, form), abs=5e-6), name


def transposed(point: Point) -> Point:
    return point._replace(write=point.write._replace(comb=point.write.comb.swapaxes(1, 2)))


def unscaled(point: Point) -> Point:
    return point._replace(read=point.read._replace(norm=jnp.ones_like(point.read.norm)))


def other_token(point: Point) -> Point:
    return point._replace(write=jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), point.write))


@pytest.mark.parametrize("wrong", [transposed, unscaled, other_token])
def test_a_wrong_variant_fails(wrong: Any) -> None:
    for name, point in points()[0].items():
        # The streams that layer 0 is given are four times the same: their order is no matter.
        first = ("0, attention", "0, MoE") if wrong is transposed else ("0, attention",)
        if name not in first:
            assert not agreement(point, fused(wrong(point), 8)).meets_bars(), name


def table() -> str:
    """Markdown."""
    head = [f"T = {count}" for count in CALLS]
    lines = ["| layer, branch | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for name, point in points()[0].items():
        found = [agreement(point, fused(point, count)) for count in CALLS]
        apart = [f"1 - {1 - a.steps:.0e}" if 1 - a.steps > 1e-15 else "1" for a in found]
        cells = [f"{x}, {a.nvfp4:.5f}, {a.fp8:.5f}" for x, a in zip(apart, found, strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

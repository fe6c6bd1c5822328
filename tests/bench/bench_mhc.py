"""mhc at the widths of Flash and Pro; run with ``-m bench``, or as a program.

``python -m tests.bench.bench_mhc --rows flash pro --forms mhc xla --tokens 1 8 128 4096``.
A set is a layer: streams, the branch's output, parameters. So that a launch gives in the loop what
it gives alone, the branch is written back with the weights 0, and the streams with the identity:
the work is the same. ``xla`` is the chain of jnp ops that the op stands for, in one jit.
"""

import dataclasses
import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.mhc import Form, Mixed, Read, Write, mhc
from dsv4_jax.ops.mhc_head import mhc_head
from dsv4_jax.ops.mhc_post import mhc_post
from dsv4_jax.ops.mhc_pre import mhc_pre
from dsv4_jax.ops.rmsnorm import rmsnorm
from dsv4_jax.quant import fp8, nvfp4
from dsv4_jax.quant.fp8 import Fp8
from dsv4_jax.quant.nvfp4 import Nvfp4
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.bench import linears, timing
from tests.support.numerics import assert_same_bits, assert_same_tree, cosine, f64

pytestmark = [pytest.mark.bench, pytest.mark.gpu]

EPS = {"hc_eps": 1e-6, "rms_eps": 1e-6}
ITERS = 20
DIMS = {"flash": 4096, "pro": 7168}
MAX_US = {
    ("flash", 1): 7.0,
    ("flash", 8): 8.0,
    ("flash", 128): 13.0,
    ("pro", 1): 8.0,
    ("pro", 8): 9.5,
    ("pro", 128): 20.0,
}
PREFILL_FRACTION = 0.65
"""Of the copy ceiling, at 4096 tokens."""
MIN_COSINE = 0.9999
"""Of the chain by XLA, whose divisions are inexact on a GPU, to the op on the CPU."""


FMA_TOKENS = 8
"""Up to so many tokens the sums are those of the CPU handler."""
MIN_MMA_COSINE = 0.999999
WEIGHT_ABS = 1e-5


class Row(NamedTuple):
    """A model and what is done, for the command line."""

    model: str
    name: str


@dataclasses.dataclass(frozen=True)
class Case:
    """``form`` is ``mhc`` or ``xla``; ``what``: write and read in a format, a part, or the head."""

    model: str
    t: int
    form: str = "mhc"
    what: str = "nvfp4"

    @property
    def name(self) -> str:
        """What the line is called."""
        return f"d={self.d} t={self.t} {self.what}{'' if self.form == 'mhc' else ' ' + self.form}"

    @property
    def row(self) -> Row:
        return Row(self.model, f"{self.model}-{self.what}")

    @property
    def d(self) -> int:
        return DIMS[self.model]

    @property
    def mixes(self) -> int:
        return {"head": 4, "write": 0}.get(self.what, 24)

    @property
    def forms(self) -> tuple[Form, ...]:
        """Of x."""
        return {"nvfp4": ("nvfp4",), "fp8": ("fp8",), "write": ()}.get(self.what, ("bfloat16",))

    @property
    def launch_bytes(self) -> float:
        """Streams and branch read, streams and forms of x written, weights, parameters."""
        of_x = {"bfloat16": 2.0, "nvfp4": 0.5625, "fp8": 1 + 1 / 128}
        per_channel = 18 + sum(of_x[form] for form in self.forms)
        weights = 80 * (2 if self.mixes == 24 else 1)
        return self.t * (self.d * per_channel + weights) + self.d * (16 * self.mixes + 2)

    @property
    def bars(self) -> tuple[float | None, float | None]:
        """us and fraction."""
        if self.form != "mhc" or self.what != "nvfp4":
            return None, None
        return MAX_US.get((self.model, self.t)), PREFILL_FRACTION if self.t == 4096 else None


TOKENS = (1, 8, 128, 4096)
XLA_SETS, XLA_SLOWER = 4, 20
CASES = [
    *(Case(model, t) for model in DIMS for t in TOKENS),
    *(Case(model, t, "xla") for model in DIMS for t in TOKENS),
    *(Case(model, t, what="fp8") for model in DIMS for t in (1, 4096)),
    *(Case(model, t, what="bfloat16") for model in DIMS for t in (1, 4096)),
    *(Case(model, t, what="write") for model in DIMS for t in TOKENS),
    *(Case(model, t, what="head") for model in DIMS for t in (1, 8, 128)),
]


def results(case: Case, streams: jax.Array) -> Mixed:
    """Streams to be written in place, the rest poisoned."""
    t, d = case.t, case.d
    shape, branch = jax.ShapeDtypeStruct, case.mixes == 24
    like = Mixed(
        None,
        shape((t, 4), jnp.float32) if branch else None,
        shape((t, 4, 4), jnp.float32) if branch else None,
        shape((t, d), jnp.bfloat16) if "bfloat16" in case.forms else None,
        Nvfp4(shape((t, d), E2M1), shape((t, d // 16), E4M3), shape((t,), jnp.float32))
        if "nvfp4" in case.forms
        else None,
        Fp8(shape((t, d), E4M3), shape((t, d // 128), UE8M0)) if "fp8" in case.forms else None,
    )
    return timing.poisoned(like)._replace(streams=streams)


@functools.partial(jax.jit, static_argnums=0)
def make_set(case: Case, seed: int) -> timing.Set:
    """Results, and the op's other operands."""
    t, d, mixes = case.t, case.d, case.mixes
    keys = iter(jax.random.split(jax.random.key(seed), 5))
    streams = jax.random.normal(next(keys), (t, 4, d)).astype(jnp.bfloat16)
    branch = jax.random.normal(next(keys), (t, d)).astype(jnp.bfloat16)
    write = Write(branch, jnp.zeros((t, 4)), jnp.tile(jnp.eye(4), (t, 1, 1)))
    read = None
    if mixes:
        read = Read(
            jax.random.normal(next(keys), (mixes, 4 * d)) / 64,
            jax.random.normal(next(keys), (mixes,)),
            jnp.ones(3 if mixes == 24 else 1),
            (1 + 0.1 * jax.random.normal(next(keys), (d,))).astype(jnp.bfloat16),
        )
    return results(case, streams), (write, read)


def by_op(case: Case, streams: jax.Array, write: Write, read: Read | None) -> Mixed:
    forms = {"forms": case.forms} if read is not None else {}
    return mhc(streams, write, read, iters=ITERS, **EPS, **forms)


def by_xla(case: Case, streams: jax.Array, write: Write, read: Read | None) -> Mixed:
    """The chain that a step of the model was without the op."""
    streams = mhc_post(write.branch, streams, write.post, write.comb)
    if read is None:
        return Mixed(streams, None, None, None, None, None)
    *parameters, norm = read
    post = comb = None
    if case.mixes == 24:
        y, post, comb = mhc_pre(streams, *parameters, iters=ITERS, **EPS)
    else:
        y = mhc_head(streams, *parameters, **EPS)
    x = rmsnorm(y, norm, EPS["rms_eps"])
    wide = x.astype(jnp.float32)
    return Mixed(
        *(streams, post, comb),
        x if "bfloat16" in case.forms else None,
        nvfp4.quantize(wide, nvfp4.token_global_scale(wide)) if "nvfp4" in case.forms else None,
        fp8.quantize_act(wide, fp8.ACT_BLOCK) if "fp8" in case.forms else None,
    )


def run(case: Case, carry: Mixed, write: Write, read: Read | None) -> Mixed:
    """A launch; the streams are the carry's own and are written in place."""
    return (by_op if case.form == "mhc" else by_xla)(case, carry.streams, write, read)


def decoded(result: Mixed) -> np.ndarray:
    """Of x, as what it stands for; of a write-back alone the streams."""
    if result.nvfp4 is not None:
        return f64(nvfp4.dequantize(result.nvfp4))
    if result.fp8 is not None:
        return f64(fp8.dequantize_act(result.fp8, fp8.ACT_BLOCK))
    return f64(result.streams if result.x is None else result.x)


def check(case: Case, got: Mixed, seed: int) -> None:
    """Same bits as the CPU handler; on tensor cores, and for XLA's chain, nearly."""
    host, operands = jax.device_put(make_set(case, seed), jax.devices("cpu")[0])
    want = jax.device_get(by_op(case, host.streams, *operands))
    got = jax.device_get(got)
    if case.form == "mhc":
        assert_same_bits(got.streams, want.streams, case.name)
        if case.t <= FMA_TOKENS or not case.mixes:
            assert_same_tree(got, want, case.name)
            return
        if case.mixes == 24:
            for name in ("post", "comb"):
                apart = np.abs(getattr(got, name) - getattr(want, name)).max()
                print(f"{case.name}: {name} within {apart:.1e}")
                if not apart <= WEIGHT_ABS:
                    raise AssertionError(f"{case.name}: {name} differs by {apart}")
    with jax.default_device(jax.devices("cpu")[0]):
        near = cosine(decoded(got), decoded(want))
    print(f"{case.name}: cosine {near:.7f}")
    if not near >= (MIN_COSINE if case.form == "xla" else MIN_MMA_COSINE):
        raise AssertionError(f"{case.name}: cosine {near}")


def measure(case: Case, **settings: Any) -> timing.Result:
    """One line."""
    max_us, min_fraction = case.bars
    if case.form == "xla":  # its chain takes long to compile, and is far from the floor
        settings.setdefault("sets", min(XLA_SETS, timing.set_count(case.launch_bytes)))
        settings.setdefault("call_us", timing.CALL_US / XLA_SLOWER)
    return timing.measure(
        "mhc",
        case.name,
        functools.partial(run, case),
        lambda i: make_set(case, i),
        lambda i, got: check(case, got, i),
        target="mhc" if case.form == "mhc" else None,
        launch_bytes=case.launch_bytes,
        max_us=max_us,
        min_fraction=min_fraction,
        **settings,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_time(case: Case) -> None:
    result = measure(case)
    result.append(timing.default_path())
    result.require()


if __name__ == "__main__":
    sys.exit(linears.program(CASES, CASES, measure))

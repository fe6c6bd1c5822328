"""mhc's kernels against the CPU handler, and what only a GPU has: regimes, aliases, poison."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.mhc import Mixed, Read, Write, mhc
from dsv4_jax.quant.fp8 import Fp8
from dsv4_jax.quant.nvfp4 import Nvfp4
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.bench.timing import filled
from tests.ops.test_mhc import (
    FORMS,
    MAX_FLIPPED,
    SETTINGS,
    WEIGHT_ABS,
    assert_few,
    normal,
    problem,
)
from tests.support.numerics import assert_same_bits, assert_same_tree, raw, row_of

pytestmark = pytest.mark.gpu

DIMS = (128, 384, 1024, 4096, 4224, 7168, 16384)
TOKENS = (0, 1, 2, 3, 5, 8, 9, 17, 128, 129, 300)


def host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


@functools.partial(jax.jit, static_argnames=("forms", "regime"))
def several(
    streams: Any, write: Any, branch: Any, head: Any, scale: Any, forms: Any, regime: Any
) -> Any:
    """All that the op does, in one program: enough launches for a command buffer."""
    run = functools.partial(mhc, **SETTINGS, regime=regime)
    whole = run(streams, Write(*write), Read(*branch), forms=forms)
    return {
        "whole": whole,
        "static": run(streams, None, Read(*branch), scale, forms=("nvfp4",)),
        "head": run(streams, Write(*write), Read(*head)),
        "write": run(streams, Write(*write), None),
        "next": run(whole.streams, Write(write[0], whole.post, whole.comb), Read(*branch)),
    }


def arguments(d: int, t: int) -> tuple[Any, ...]:
    """Tokens with zeros, NaN, Inf, large and subnormal numbers among them."""
    streams, write, branch = problem(d, max(t, 1))
    streams, write = streams[:t], row_of(write, slice(0, t))
    streams[1::9], write.branch[1::9] = 0, 0
    streams[2::9, 1, d // 3] = np.nan
    streams[3::9, 3, d - 1] = -np.inf
    with np.errstate(over="ignore"):
        streams[4::9] *= np.asarray(1e37, streams.dtype)
    streams[5::9] *= np.asarray(1e-38, streams.dtype)
    write.comb[6::9, 1, 2] = np.nan
    _, _, head = problem(d, 1, 4)
    return streams, tuple(write), tuple(branch), tuple(head), np.float32(0.0023)


def on_cpu(args: Any, **settings: Any) -> Any:
    return host(several(*jax.device_put(args, jax.devices("cpu")[0]), **settings))


@pytest.mark.parametrize("t", TOKENS)
@pytest.mark.parametrize("d", DIMS)
def test_equals_the_cpu_handler(d: int, t: int) -> None:
    """A6, A7, A13-A16: every way to launch, bit for bit."""
    args, settings = arguments(d, t), {"forms": FORMS, "regime": "decode"}
    assert_same_tree(host(several(*args, **settings)), on_cpu(args, **settings), f"d={d} t={t}")


@pytest.mark.parametrize("t", [1, 31, 33, 129, 1030])
@pytest.mark.parametrize("d", [128, 1024, 4096])
def test_prefill_nearly_equals_the_cpu_handler(d: int, t: int) -> None:
    """On tensor cores only the mixes' sums are others, by 16 or by 32 tokens a thread block."""
    streams, write, branch = problem(d, t)
    args = jax.tree.map(jnp.asarray, (streams, write, branch))
    run = functools.partial(mhc, **SETTINGS, forms=FORMS, regime="prefill")
    got = host(run(*args))
    want = host(run(*jax.device_put(args, jax.devices("cpu")[0])))
    assert_same_bits(got.streams, want.streams, "streams")
    assert np.abs(got.post - want.post).max() <= WEIGHT_ABS
    assert np.abs(got.comb - want.comb).max() <= WEIGHT_ABS
    assert_few(raw(got.x) != raw(want.x), MAX_FLIPPED, "x")
    order = np.random.default_rng(0).permutation(t)
    shuffled = run(*jax.tree.map(jnp.asarray, (streams[order], row_of(write, order), branch)))
    assert_same_tree(host(shuffled), row_of(got, order), "shuffled")


@pytest.mark.parametrize("byte", [0x00, 0xFF])
@pytest.mark.parametrize(("d", "t"), [(128, 1), (4224, 3), (384, 40), (1024, 300)])
def test_writes_every_element(d: int, t: int, byte: int) -> None:
    """B12, B17: the results take donated buffers full of one byte, the streams their own."""
    streams, write, read = jax.tree.map(jnp.asarray, problem(d, t))
    want = host(mhc(streams, write, read, **SETTINGS, forms=FORMS, regime="decode"))
    poison = Mixed(
        streams + 0,
        filled(byte, (t, 4), jnp.float32),
        filled(byte, (t, 4, 4), jnp.float32),
        filled(byte, (t, d), jnp.bfloat16),
        Nvfp4(
            filled(byte, (t, d), E2M1),
            filled(byte, (t, d // 16), E4M3),
            filled(byte, (t,), jnp.float32),
        ),
        Fp8(filled(byte, (t, d), E4M3), filled(byte, (t, d // 128), UE8M0)),
    )
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(poison)}

    def run(own: Mixed, write: Any, read: Any) -> Mixed:
        return mhc(own.streams, write, read, **SETTINGS, forms=FORMS, regime="decode")

    got = jax.jit(run, donate_argnums=0, keep_unused=True)(poison, write, read)
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(got)} == pointers
    assert_same_tree(host(got), want, "over poison")


def test_many_layers_in_one_program() -> None:
    """Write-back and read again and again, streams in place: as on the CPU."""
    d, t, layers = 1024, 5, 12
    streams, write, _ = problem(d, t)
    reads = [Read(*problem(d, t + i)[2]) for i in range(layers)]
    branches = [normal(i, t, d, dtype=streams.dtype) for i in range(layers)]

    @jax.jit
    def run(streams: Any, write: Any, reads: Any, branches: Any) -> Any:
        out = None
        for read, branch in zip(reads, branches, strict=True):
            out = mhc(streams, write, read, **SETTINGS, regime="decode")
            streams, write = out.streams, Write(branch + out.x, out.post, out.comb)
        return out

    args = streams, write, reads, branches
    got = host(run(*args))
    assert_same_tree(got, host(run(*jax.device_put(args, jax.devices("cpu")[0]))), "layers")

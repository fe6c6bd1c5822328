"""`tests.bench.bench_jnp` compares what it says: a program with foreign calls, and one without."""

import dataclasses

import jax
import numpy as np

from dsv4_jax import DeepseekV4, Precision
from dsv4_jax.checkpoint.names import expected_tree
from tests.bench import bench_jnp, long_run
from tests.support.op_cases import CASES

PLAIN_HERE = (
    "router-score",
    "router-hash",
    "router-table",
    "dense_linear-groups",
    "fp8_linear-several",
    "fp8_linear-gated",
    "cache_write-store",
)
"""Ops whose plain forms are the benchmark's own."""


def _calls() -> list[str]:
    """Of a decode step through a layer of each kind, traced from shapes.

    The program compiles what it times, and looks again.
    """
    config = dataclasses.replace(long_run.SMALL, index_topk=4)
    model = DeepseekV4(config, Precision.preset("official"))
    greedy = bench_jnp.Greedy(model, expected_tree(config, model.precision, False), [3, 1], 600)
    return bench_jnp.foreign_calls(greedy.lowered.as_text())


def test_no_foreign_calls() -> None:
    before = _calls()
    assert {"dsv4.attention", "dsv4.fp8_linear", "dsv4.index_topk", "dsv4.mhc"} <= set(before)
    with bench_jnp.plain_ops():
        assert _calls() == []
    assert _calls() == before


def test_plain_forms() -> None:
    """Up to the order of FP32 sums and one rounding to BF16."""
    cases = {name: CASES[name]() for name in PLAIN_HERE}
    rows = {name: case.rows(0, 3) for name, case in cases.items()}
    want = {name: case.fn(*rows[name]) for name, case in cases.items()}
    with bench_jnp.plain_ops():
        got = {name: case.fn(*rows[name]) for name, case in cases.items()}
    for name in PLAIN_HERE:
        pairs = zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True)
        for mine, theirs in pairs:
            assert mine.dtype == theirs.dtype
            a, b = np.asarray(mine, np.float32), np.asarray(theirs, np.float32)
            np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-5, err_msg=name)

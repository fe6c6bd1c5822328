"""`dsv4.program` reached by hand: whatever `code` says, an error that names what is wrong."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import library
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.dense_linear import dense_linear
from dsv4_jax.program import fused
from tests.support.numerics import assert_same_tree
from tests.support.programs import Program, record

BF16 = jnp.bfloat16
X, W, CACHE = np.ones((4, 8), BF16), np.ones((8, 8), BF16), np.zeros((1, 4, 8), BF16)
SLOTS = np.array([[2, 1, -1, 0]], np.int32)
# Where the good code holds what; the first call is a product, the second writes it into a cache.
CALLS, TARGET, LANE, SIGNALS = 0, 1, 2, 3
BUFFER, RANK, ROWS, COLUMNS = 7, 8, 9, 10  # of the product's first operand
NAME, IS_FLOAT, ABI = 24, 25, 26
WAITS = 34  # of the second call, for the first


def function(x: Any, weight: Any, slots: Any, cache: Any) -> Any:
    made = dense_linear(x, weight, dtype=BF16)
    return made, cache_write(cache, made.reshape(1, 4, 8), slots)


@pytest.fixture(scope="module")
def good() -> Program:
    with pytest.MonkeyPatch.context() as monkeypatch:
        programs = record(monkeypatch)
        jax.make_jaxpr(fused(function))(X, W, SLOTS, CACHE)
    (program,) = programs
    return program


def run(program: Program, abi: int = library.ABI) -> Any:
    """Past everything in Python; without the scratch."""
    target = jax.ffi.ffi_call("dsv4.program", program.results, input_output_aliases=program.aliases)
    attributes = {"abi": np.int32(abi), "names": program.names, "code": program.code}
    results = jax.jit(lambda *operands: target(*operands, **attributes))(X, W, SLOTS, CACHE)
    made, _, cache = jax.block_until_ready(results)
    return made, cache


def changed(program: Program, at: dict[int, int], names: str = "") -> Program:
    """With other numbers in some places of its code."""
    code = program.code.copy()
    for place, number in at.items():
        code[place] = number
    return dataclasses.replace(program, code=code, names=names or program.names)


def assert_refused(program: Program, message: str, **settings: Any) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        run(program, **settings)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_the_good_one(good: Program) -> None:
    assert_same_tree(run(good), jax.jit(function)(X, W, SLOTS, CACHE))
    assert good.code[[CALLS, RANK, ROWS, COLUMNS, ABI]].tolist() == [2, 2, 4, 8, library.ABI]


@pytest.mark.parametrize("abi", [library.ABI - 1, library.ABI + 1])
def test_another_abi(good: Program, abi: int) -> None:
    assert_refused(good, rf"dsv4\.program: abi must be {library.ABI} .*got {abi}", abi=abi)


def test_code_that_is_cut_short(good: Program) -> None:
    for size in range(0, len(good.code), 3):
        short = dataclasses.replace(good, code=good.code[:size])
        assert_refused(short, r"dsv4\.program: code must hold all of its calls, it ends within one")


def test_code_that_goes_on(good: Program) -> None:
    long = dataclasses.replace(good, code=np.append(good.code, np.int32(0)))
    assert_refused(long, r"dsv4\.program: code must end with its last call")


@pytest.mark.parametrize("name", ["dsv4.program", "dsv4.nothing", "dense_linear", "lapack_sgeqrf"])
def test_a_target_of_others(good: Program, name: str) -> None:
    other = good.names.replace("dsv4.dense_linear", name)
    assert_refused(
        changed(good, {}, other),
        rf"dsv4\.program: calls must be of this library's targets, got {re.escape(name)}\b",
    )


@pytest.mark.parametrize(
    ("at", "message"),
    [
        pytest.param({CALLS: -1}, "code must hold all of its calls", id="calls"),
        pytest.param({TARGET: 4}, r"target must be in \[0, 4\), got 4", id="target"),
        pytest.param({LANE: 2}, r"lane must be in \[0, 2\), got 2", id="lane"),
        pytest.param({SIGNALS: -1}, r"signals must be in \[0, 2\), got -1", id="signals"),
        pytest.param({BUFFER: 7}, r"buffer must be in \[0, 7\), got 7", id="buffer"),
        pytest.param({BUFFER: -1}, r"buffer must be in \[0, 7\), got -1", id="negative"),
        pytest.param({RANK: 1 << 20}, "code must hold all of its calls", id="rank"),
        pytest.param({ROWS: -4}, r"dim must be in \[0, 2147483648\), got -4", id="dim"),
        pytest.param(
            {ROWS: 5}, "buffer 0 must have its shape's 40 elements, got 32", id="too-large"
        ),
        pytest.param({ROWS: 1 << 30, COLUMNS: 1 << 30}, "elements, got 32", id="too-large-by-far"),
        pytest.param({NAME: 4}, r"name must be in \[0, 4\), got 4", id="name"),
        pytest.param({WAITS: 1}, r"call to wait for must be in \[0, 1\), got 1", id="itself"),
    ],
)
def test_wrong_numbers(good: Program, at: dict[int, int], message: str) -> None:
    assert_refused(changed(good, at), rf"dsv4\.program: .*{message}")


@pytest.mark.parametrize(
    ("at", "message"),
    [
        pytest.param(
            {ROWS: 8, COLUMNS: 4}, r"dsv4\.dense_linear: x and weight .*got \[8, 4\]", id="shape"
        ),
        pytest.param({ABI: 3}, r"dsv4\.dense_linear: abi must be", id="abi"),
        pytest.param({IS_FLOAT: 1}, r"dsv4\.dense_linear: .*Failed to decode", id="dtype"),
        pytest.param({TARGET: 3}, r"dsv4\.cache_write: .*Wrong number", id="another-op"),
    ],
)
def test_a_call_that_fails(good: Program, at: dict[int, int], message: str) -> None:
    """The op's own words; what follows is not called, and the next program is."""
    assert_refused(changed(good, at), message)
    assert_same_tree(run(good), jax.jit(function)(X, W, SLOTS, CACHE))


def test_any_number_anywhere(good: Program) -> None:
    """An error or a result, never the end of the process."""
    refused = 0
    for place in range(len(good.code)):
        for number in (-1, np.iinfo(np.int32).max):
            try:
                run(changed(good, {place: number}))
            except jax.errors.JaxRuntimeError as error:
                assert str(error).strip()
                refused += 1
    assert refused > len(good.code)

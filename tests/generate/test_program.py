"""Programs give the bits of the calls by themselves, wait for what they read, and copy nothing."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import bundled_checkpoint
from dsv4_jax.bench.floor import cut
from dsv4_jax.checkpoint import from_checkpoint
from dsv4_jax.checkpoint.names import expected_tree
from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.loop import step_model
from dsv4_jax.model import DeepseekV4
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.dense_linear import dense_linear
from dsv4_jax.ops.fp8_linear import fp8_linear
from dsv4_jax.ops.mhc import Read, Write, mhc
from dsv4_jax.ops.query_finish import query_finish
from dsv4_jax.precision import Precision
from dsv4_jax.program import fused
from dsv4_jax.quant import fp8
from tests.support.numerics import assert_same_tree
from tests.support.op_cases import normal
from tests.support.programs import Program, record

PRESETS = ("official", "nvfp4")
ROWS, MAX_LEN = 3, 136
STEPS = 130  # past the first entry of an HCA layer
BF16 = jnp.bfloat16

step = jax.jit(step_model, static_argnames=("model", "programs"), donate_argnames="cache")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    return record(monkeypatch)


# The model.


@functools.cache
def bundled(preset: str) -> tuple[Any, Any]:
    return from_checkpoint(bundled_checkpoint(), precision=preset, progress=False)


@functools.cache
def lowered(preset: str, programs: bool) -> Any:
    model, params = bundled(preset)
    return step.lower(
        model=model,
        params=params,
        tokens=jax.ShapeDtypeStruct((ROWS,), jnp.int32),
        cache=jax.eval_shape(lambda: model.init_cache(ROWS, MAX_LEN)),
        takes=jax.ShapeDtypeStruct((ROWS,), jnp.bool_),
        programs=programs,
    )


@functools.cache
def compiled(preset: str, programs: bool) -> Any:
    return lowered(preset, programs).compile()


def calls_by_layer(preset: str) -> dict[str, list[str]]:
    """Custom calls of ours; functions of ops are called in layers, programs stand in them."""
    found: dict[str, list[str]] = {}
    text = lowered(preset, True).as_text(debug_info=True)
    where = dict(re.findall(r"^(#loc\d+) = loc\((.*)\)$", text, re.M))
    for target, at in re.findall(r"custom_call @(dsv4\.\w+)\(.*loc\((#loc\d+)\)", text):
        layer = re.search(r"layers?_\d+", where[at])
        found.setdefault(layer[0] if layer else "", []).append(target)
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_has_the_same_bits(preset: str) -> None:
    """Rows that take a token and rows that do not, across the ends of compressed entries."""
    model, params = bundled(preset)
    rng = np.random.default_rng(0)
    caches = [model.init_cache(ROWS, MAX_LEN) for _ in range(2)]
    logits: list[Any] = [None, None]
    for i in range(STEPS):
        tokens = rng.integers(0, model.config.vocab_size, ROWS).astype(np.int32)
        takes = np.array([True, i % 3 > 0, i == 5])
        for n, each in enumerate((False, True)):
            logits[n], caches[n] = compiled(preset, each)(
                params=params, tokens=tokens, cache=caches[n], takes=takes
            )
        if i < 12 or i >= STEPS - 4:
            assert_same_tree(logits[1], logits[0], f"step {i}")
    assert caches[0].lengths.tolist() == [STEPS, STEPS * 2 // 3, 1]
    assert_same_tree(caches[1], caches[0])


def test_a_layer_is_one_call() -> None:
    """Of the release's formats; embedding and head beside."""
    model, _ = bundled("official")
    layers = {f"layer_{i}": ["dsv4.program"] for i in range(model.config.num_hidden_layers)}
    assert calls_by_layer("official") == {**layers, "": ["dsv4.program"]}


def test_nothing_is_called_beside_programs() -> None:
    """In NVFP4 XLA does a little between the calls."""
    found = calls_by_layer("nvfp4")
    assert {target for targets in found.values() for target in targets} == {"dsv4.program"}
    assert max(map(len, found.values())) <= 3


@pytest.mark.parametrize("preset", PRESETS)
def test_the_cache_stays_in_place(preset: str) -> None:
    """The same arrays are donated, and none of a ring's or pool's size is copied."""
    plain, made = compiled(preset, False), compiled(preset, True)
    headers = [re.findall(r"input_output_alias=\{.*?\) \}", x.as_text()) for x in (plain, made)]
    assert len(headers[0]) == 1
    assert headers[1] == headers[0]
    sizes = [x.memory_analysis().alias_size_in_bytes for x in (plain, made)]
    assert sizes[1] == sizes[0] > 1 << 20
    copied = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", made.as_text())
    before = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", plain.as_text())
    pools = {",".join(map(str, leaf.shape)) for leaf in _pools(preset)}
    assert sorted(pools & {*copied}) == sorted(pools & {*before}) == []


def _pools(preset: str) -> list[Any]:
    cache = jax.eval_shape(lambda: bundled(preset)[0].init_cache(ROWS, MAX_LEN))
    return [leaf for leaf in jax.tree.leaves(cache.layers) if leaf.shape[1:2] >= (32,)]


# Functions of a few ops.

X = normal(0, 1, 4, 8).astype(BF16)  # a cache of four rows, and as many tokens
W = normal(1, 8, 8).astype(BF16)
ROW = normal(2, 1, 1, 8).astype(BF16)
SLOT = jnp.array([[2]], jnp.int32)
MHC: dict[str, Any] = {"iters": 2, "hc_eps": 1e-6, "rms_eps": 1e-6}


def product(x: Any) -> Any:
    """A call that reads ``x``."""
    return dense_linear(x.reshape(4, 8), W, dtype=BF16)


def written(x: Any) -> Any:
    """A call that writes ``x`` in place."""
    return cache_write(x.reshape(1, 4, 8), ROW, SLOT)


def targets(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """What is called, in order."""
    text = jax.jit(function).lower(*arguments).as_text()
    names = {}
    for name, body in re.findall(r"func\.func \w+ @(\w+)\(.*?\{\n(.*?)\n  \}", text, re.S):
        names[name] = re.findall(r"@(?:dsv4\.)?(\w+)\(", body)

    def inside(name: str) -> list[str]:
        return [op for n in names[name] for op in (inside(n) if n in names else [n])]

    return inside("main")


def check(function: Callable[..., Any], *arguments: Any, calls: list[str]) -> None:
    """The fused function gives the same bits, by these calls."""
    assert_same_tree(jax.jit(fused(function))(*arguments), jax.jit(function)(*arguments))
    assert targets(fused(function), *arguments) == calls


def test_ops_of_every_kind(programs: list[Program]) -> None:
    """FP8 and BF16 linears, finished queries, and streams that are written in place."""
    weight = fp8.quantize_weight(normal(3, 128, 128))
    streams = normal(4, 2, 4, 128).astype(BF16)
    read = Read(normal(5, 24, 512), normal(6, 24), normal(7, 3), normal(8, 128).astype(BF16))
    positions, frequencies = np.array([[0], [9]], np.int32), np.ones(4, np.float32)

    def layer(streams: Any) -> Any:
        mixed = mhc(streams, None, read, **MHC)
        y = fp8_linear(mixed.x, *weight, dtype=BF16)
        heads = y.reshape(2, 1, 4, 32)
        q = query_finish(heads, positions, frequencies, 1e-6, rounding="bfloat16")
        out = dense_linear(q.reshape(2, 128), jnp.eye(128, dtype=BF16), dtype=BF16)
        write = Write(out, mixed.post, mixed.comb)
        return mhc(mixed.streams, write, read, **MHC)

    assert_same_tree(jax.jit(fused(layer))(streams), jax.jit(layer)(streams))
    ops = [op for program in programs for op in program.ops]
    assert ops == ["mhc", "fp8_linear", "query_finish", "dense_linear", "mhc"]
    assert len(programs) == 1


def test_xla_between_two_calls() -> None:
    check(lambda x: product(product(x) * 1.5), X, calls=["program", "program"])
    check(lambda x: product(product(x)), X, calls=["program"])


def test_xla_beside_the_calls() -> None:
    """What reads no result splits nothing."""
    check(lambda x, y: (product(x), product(y * 2)), X, X, calls=["program"])


def test_written_in_place(programs: list[Program]) -> None:
    """An operand of the program, and a result of another call."""
    check(lambda x: written(x), X, calls=["program"])
    check(lambda x: written(product(x)), X, calls=["program"])
    assert [p.aliases for p in programs[::2]] == [{1: 0}, {}]


def test_the_donated_array_itself() -> None:
    """It is read before it is written, in one program, and is not copied."""

    def function(x: Any) -> Any:
        return dense_linear(x, W, dtype=BF16), cache_write(x, ROW, SLOT)

    check(function, X, calls=["program"])
    made = jax.jit(fused(function), donate_argnums=0).lower(X).compile()
    assert made.memory_analysis().alias_size_in_bytes == X.nbytes
    assert not re.search(r"bf16\[1,4,8\]\S* copy\(", str(made.as_text()))


def both(x: Any) -> tuple[Any, Any]:
    """Writes, then reads what was there before."""
    return written(x), product(x)


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        pytest.param(both, ["cache_write", "program"], id="argument"),
        pytest.param(lambda x: both(product(x)), ["program", "cache_write", "program"], id="made"),
        pytest.param(
            lambda x: both(product(x).reshape(1, 4, 8)),
            ["program", "cache_write", "program"],
            id="view",
        ),
        pytest.param(lambda x: jax.jit(both)(x), ["cache_write", "program"], id="in-a-jit"),
        pytest.param(
            lambda x: (jax.jit(written)(x), product(x)), ["cache_write", "program"], id="by-a-jit"
        ),
        pytest.param(
            lambda x: (lambda a, b: (written(a), product(b)))(
                *jax.jit(lambda x: 2 * [product(x)])(x)
            ),
            ["program", "cache_write", "program"],
            id="result-of-a-jit-twice",
        ),
        pytest.param(lambda x: (written(x), x), ["cache_write"], id="result"),
        pytest.param(
            lambda x: cache_write(x, x[:, :1], SLOT), ["program"], id="rows-of-its-own-by-xla"
        ),
        pytest.param(
            lambda x: cache_write(x, x, jnp.array([[1, 0, 3, 2]])), ["cache_write"], id="by-itself"
        ),
    ],
)
def test_read_again_behind_the_write(function: Callable[..., Any], calls: list[str]) -> None:
    """Such a call stays by itself: XLA makes a copy for it."""
    check(function, X, calls=calls)


def test_an_array_given_twice() -> None:
    """Two arguments, one array: written as one of them and read as the other."""
    slots = jnp.arange(4)[None]

    def function(cache: Any, rows: Any) -> Any:
        return written(cache), cache_write(jnp.zeros((1, 8, 8), BF16), rows, slots)

    got = jax.jit(lambda x: fused(function)(x, x))(X)
    assert_same_tree(got, jax.jit(function)(X, X))


def test_read_before_the_write(programs: list[Program]) -> None:
    """It waits, in whatever lane: the second product is in the other one."""

    def function(x: Any) -> Any:
        y = product(x)
        return product(y), product(y), written(y)

    check(function, X, calls=["program"])
    calls = programs[0].calls
    assert [call.lane for call in calls] == [0, 0, 1, 1]
    assert calls[3].waits == (0, 1, 2)
    assert [call.signals for call in calls] == [True, True, True, False]


def test_reshapes(programs: list[Program]) -> None:
    def function(x: Any) -> Any:
        y = product(x).reshape(2, 2, 1, 8)
        return product(y.squeeze(2).reshape(1, 4, 8)), y.reshape(32)

    check(function, X, calls=["program"])
    assert [shape for _, shape in programs[0].calls[1].operands] == [(4, 8), (8, 8)]


def test_jits_are_opened(programs: list[Program]) -> None:
    inner = jax.jit(lambda x: (product(x), x.shape[0] + 0))
    outer = jax.jit(lambda x: inner(inner(x)[0])[0])
    check(lambda x: outer(product(x)), X, calls=["program"])
    assert len(programs[0].calls) == 3


def test_layers_are_apart() -> None:
    def function(x: Any) -> Any:
        for i in range(2):
            with jax.named_scope(f"layer_{i}"):
                x = product(product(x))
        return product(x)

    check(function, X, calls=["program"] * 3)


def test_no_calls() -> None:
    check(lambda x: (x * 2, {"a": x[0]}), X, calls=[])


def test_results_returned_twice() -> None:
    def function(x: Any) -> Any:
        y = product(x)
        return y, {"again": y, "x": x, "flat": y.reshape(32)}, None

    check(function, X, calls=["program"])


def test_constants() -> None:
    """Arrays of the host, of the device and scalars; one is written in place, each time anew."""
    here = np.asarray(X)
    check(lambda x: (product(here), written(here), written(here), product(x)), X, calls=["program"])
    check(lambda x: (written(jnp.zeros((1, 4, 8), BF16)), product(x)), X, calls=["program"])

    streams = normal(4, 1, 4, 128).astype(BF16)
    read = Read(normal(5, 24, 512), normal(6, 24), normal(7, 3), normal(8, 128).astype(BF16))

    def mixed(x: Any) -> Any:
        one = np.float32(0.25)
        return mhc(streams, None, read, one, **MHC, forms=("nvfp4",)).nvfp4, product(x)

    check(mixed, X, calls=["program"])


def test_loops_are_left_alone() -> None:
    def scan(x: Any) -> Any:
        return jax.lax.scan(lambda y, _: (product(y), None), product(x), None, length=2)

    def repeated(x: Any) -> Any:
        return jax.lax.fori_loop(0, 3, lambda _, y: written(y), product(x).reshape(1, 4, 8))

    assert_same_tree(jax.jit(fused(scan))(X), jax.jit(scan)(X))
    assert_same_tree(jax.jit(fused(repeated))(X), jax.jit(repeated)(X))
    assert jax.jit(fused(scan)).lower(X).as_text().count("@dsv4.program") == 1
    assert jax.jit(fused(scan)).lower(X).as_text().count("@dsv4.dense_linear") == 1


def test_in_a_loop() -> None:
    """As the steps of `decode_steps`."""

    def loop(body: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: body(y), x))

    def body(x: Any) -> Any:
        return written(product(product(x)))

    assert_same_tree(loop(fused(body))(X), loop(body)(X))


def test_fused_twice() -> None:
    """A program stays what it is."""
    check(fused(lambda x: product(product(x))), X, calls=["program"])


@pytest.mark.parametrize("value", [np.int64(1), np.float64(1), np.bool_(True), "text"])
def test_attributes_of_other_types(value: Any) -> None:
    def function(x: Any) -> Any:
        target = jax.ffi.ffi_call("dsv4.dense_linear", jax.ShapeDtypeStruct((4, 8), BF16))
        return target(x, W, strange=value)

    with jax.enable_x64(True), pytest.raises(TypeError, match="strange must be int32 or float32"):
        jax.make_jaxpr(fused(function))(X)


# Lanes.


@functools.cache
def flash(preset: str) -> dict[str, list[Program]]:
    """The programs of two layers of V4-Flash, whose calls are traced and never made."""
    config = ModelConfig.flash()
    kinds = [config.layer_kind(i) for i in range(config.num_hidden_layers)]
    layers = (kinds.index(LayerKind.CSA), kinds.index(LayerKind.HCA))
    model = DeepseekV4(cut(config, layers), Precision.preset(preset))
    found: dict[str, list[Program]] = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        programs = record(monkeypatch)
        jax.make_jaxpr(functools.partial(step_model, model, programs=True))(
            expected_tree(model.config, model.precision, False),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.eval_shape(lambda: model.init_cache(1, 4352)),
            jax.ShapeDtypeStruct((1,), jnp.bool_),
        )
    for program in programs:
        reads = [op for op in program.ops if op == "mhc"]
        found.setdefault("head" if reads and len(program.ops) == 2 else "layers", []).append(
            program
        )
    return found


LINEAR = {"official": "fp8_linear", "nvfp4": "nvfp4_linear"}
FINISH = {"csa": ["index_query_finish"], "hca": ["query_finish"]}
CHOICE = {"csa": ["index_topk"], "hca": []}


@pytest.mark.parametrize("preset", LINEAR)
@pytest.mark.parametrize(("layer", "number"), [("csa", 0), ("hca", 1)])
def test_lanes_of_a_layer(layer: str, number: int, preset: str) -> None:
    """The compressors run beside the queries, the shared expert beside the router: behind it the
    experts would wait for it."""
    program, linear = flash(preset)["layers"][number], LINEAR[preset]
    first = ["mhc", linear, "key_finish", linear, *FINISH[layer], *CHOICE[layer], "attention"]
    first += [linear, linear, "mhc", "dense_linear", "router", "moe"]
    lanes = [[call for call in program.calls if call.lane == lane] for lane in (0, 1)]
    assert [call.op for call in lanes[0]] == first
    assert [call.op for call in lanes[1]] == ["dense_linear", "compressor", linear, linear]
    assert len(flash(preset)["layers"]) == 2


@pytest.mark.parametrize("number", [0, 1])
def test_the_shared_expert_is_waited_for_late(number: int) -> None:
    calls = flash("official")["layers"][number].calls
    assert calls[-1].op == "moe"
    (w2,) = calls[-1].late
    assert (calls[w2].op, calls[w2].lane) == (LINEAR["official"], 1)
    assert calls[w2].results[0] in calls[-1].operands
    assert not any(call.late for call in calls[:-1])


def wrong_waits(program: Program) -> list[str]:
    """Calls that do not wait for just what they read, and for those that read what they write."""
    problems: list[str] = []
    writer: dict[int, int] = {}
    readers: dict[int, set[int]] = {}
    for i, call in enumerate(program.calls):
        read, made = [b for b, _ in call.operands], [b for b, _ in call.results]
        needed = {writer[b] for b in read if b in writer}
        needed |= {other for b in made for other in readers.get(b, ())}
        if {*call.waits, *call.late} != needed or set(call.waits) & set(call.late):
            problems.append(f"{i} {call.op}: {call.waits} and {call.late}, needs {needed}")
        late = {writer[b] for b in (read[-1:] if call.op == "moe" else ()) if b in writer}
        if not late >= set(call.late):
            problems.append(f"{i} {call.op}: {call.late} is early")
        if any(b in writer or b in readers for b in set(made) - set(read)):
            problems.append(f"{i} {call.op}: writes what it was not given")
        for b in read:
            readers.setdefault(b, set()).add(i)
        for b in made:
            writer[b], readers[b] = i, set()
    waited = {other for call in program.calls for other in (*call.waits, *call.late)}
    signals = {i for i, call in enumerate(program.calls) if call.signals}
    return problems if signals == waited else [*problems, f"signals {signals}, waited {waited}"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_call_waits_for_what_it_reads(preset: str) -> None:
    programs = [program for each in flash(preset).values() for program in each]
    assert sum(len(program.calls) for program in programs) == 35  # 17 and 16, and the head
    assert [wrong_waits(program) for program in programs] == [[]] * len(programs)


def test_a_missing_wait_is_found() -> None:
    program = flash("official")["layers"][0]
    for i, call in enumerate(program.calls):
        for n in range(len(call.waits)):
            less = dataclasses.replace(call, waits=call.waits[:n] + call.waits[n + 1 :])
            calls = (*program.calls[:i], less, *program.calls[i + 1 :])
            found = wrong_waits(dataclasses.replace(program, calls=calls))
            assert found[0].startswith(f"{i} {call.op}")

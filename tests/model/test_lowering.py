"""The decode step as it is lowered for CUDA, on a machine without a GPU.

Which foreign calls each kind of layer makes, which buffers they share, and what is left to XLA
inside an op that has a kernel. An issue that adds a kernel changes the tables at the top.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.mlir import ir

from dsv4_jax import DeepseekV4, ModelConfig, Precision, library
from dsv4_jax.checkpoint.names import expected_tree
from dsv4_jax.config import LayerKind
from dsv4_jax.generate import _decode, prefill_chunk
from dsv4_jax.loop import Feed, Settings, decode_steps, stop_ids
from dsv4_jax.model import attention, hc, indexer
from dsv4_jax.model.block import Block
from dsv4_jax.ops._compressor_jax import compressor_jax
from dsv4_jax.ops._index_topk_jax import index_topk_jax
from dsv4_jax.ops.attention import attention as attention_op
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.compressor import Compressed, CompressorJob
from dsv4_jax.ops.compressor import compressor as compressor_op
from dsv4_jax.ops.dense_linear import dense_linear
from dsv4_jax.ops.fp8_linear import fp8_linear
from dsv4_jax.ops.index_query_finish import index_query_finish
from dsv4_jax.ops.index_topk import index_topk
from dsv4_jax.ops.key_finish import FinishedKeys
from dsv4_jax.ops.key_finish import key_finish as key_finish_op
from dsv4_jax.ops.mhc import Read, Write, mhc
from dsv4_jax.ops.moe import moe
from dsv4_jax.ops.mxfp4_linear import mxfp4_linear
from dsv4_jax.ops.nvfp4_linear import nvfp4_linear
from dsv4_jax.ops.query_finish import query_finish
from dsv4_jax.ops.rmsnorm_fp8 import rmsnorm_fp8
from dsv4_jax.ops.rmsnorm_nvfp4 import rmsnorm_nvfp4
from dsv4_jax.ops.router import router
from dsv4_jax.quant.kv import IndexRows, KvRows, index_dequant, kv_dequant
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from reference import cache_write as reference_cache_write
from tests.support.models import golden_model
from tests.support.programs import OPS

SWA, HCA, CSA = LayerKind.SWA, LayerKind.HCA, LayerKind.CSA

WRITES: dict[LayerKind | None, Counter[str]] = {
    None: Counter(),
    SWA: Counter(key_finish=1),  # window
    HCA: Counter(key_finish=1, compressor=1),  # window; pool and state
    CSA: Counter(key_finish=1, compressor=1),  # the indexer's pool and state in the same call
}
# `mhc` reads for either branch, behind the write-back of the branch before.
EVERY = Counter(mhc=2, attention=1, router=1, moe=1)
DENSE: dict[LayerKind | None, Counter[str]] = {
    None: Counter(dense_linear=1),  # head
    SWA: Counter(dense_linear=1),  # router
    HCA: Counter(dense_linear=2),  # router, keys and gates of the compressor in one
    CSA: Counter(dense_linear=2),  # the indexer's and the heads' weights as well
}
# wq_a, wq_b, wkv, wo_a, wo_b and three of the shared expert; CSA layers have the indexer's wq_b.
LINEARS = {None: 0, SWA: 8, HCA: 8, CSA: 9}
# wq_a and wkv, w1 and w3 of the shared expert; both wq_b.
TOGETHER = {SWA: 2, HCA: 2, CSA: 3}
QUERIES: dict[LayerKind | None, Counter[str]] = {
    None: Counter(),
    SWA: Counter(query_finish=1),
    HCA: Counter(query_finish=1),
    CSA: Counter(index_query_finish=1, index_topk=1),  # the layer's own in the same call
}


def _calls(linear: str) -> dict[LayerKind | None, Counter[str]]:
    return {
        kind: WRITES[kind]
        + EVERY
        + DENSE[kind]
        + QUERIES[kind]
        + Counter({linear: count - TOGETHER[kind]})
        if kind
        else DENSE[kind] + Counter(mhc=1)
        for kind, count in LINEARS.items()
    }


CALLS = {"official": _calls("fp8_linear"), "nvfp4": _calls("nvfp4_linear")}
"""Foreign calls of one decode step by preset and kind of layer, ``None``: outside of layers."""
ALIASES: dict[str, Callable[[int], dict[int, int]]] = {
    "attention": lambda n: {},
    "cache_write": lambda n: {i: 1 + i for i in range(n)},
    # Behind lengths and frequencies, four operands of a job and then what it writes.
    "compressor": lambda n: {i: i + (7 if i < 5 else 11) for i in range(n)},
    "dense_linear": lambda n: {},
    "fp8_linear": lambda n: {},
    "index_query_finish": lambda n: {},
    "index_topk": lambda n: {},
    # Behind x, weight, start, frequencies and count; a chunk longer than a draft has no ring. What
    # wq_b reads may be behind it.
    "key_finish": lambda n: {i: i + 2 for i in range(3, 6 if n >= 6 else 3)},
    "mhc": lambda n: {0: 0},
    "mhc without write": lambda n: {},
    "moe": lambda n: {},
    "mxfp4_linear": lambda n: {},
    "nvfp4_linear": lambda n: {},
    "query_finish": lambda n: {},
    "rmsnorm_fp8": lambda n: {},
    "rmsnorm_nvfp4": lambda n: {},
    "router": lambda n: {},
}
"""Result -> operand with the same buffer, by variant, for a call with ``n`` results."""

FUNCTIONS = {f"{form}_linears": f"{form}_linear" for form in ("dense", "fp8", "nvfp4")}
"""Ops by their functions that are not named like them."""

# Work that an op with a kernel must not leave to XLA on anything larger than this.
HEAVY = {
    "stablehlo.convolution",
    "stablehlo.dot",
    "stablehlo.dot_general",
    "stablehlo.dynamic_gather",
    "stablehlo.dynamic_update_slice",
    "stablehlo.gather",
    "stablehlo.scatter",
}
MAX_BYTES = 1 << 20
UPDATES = {"stablehlo.dynamic_update_slice", "stablehlo.scatter"}

# V4-Flash down to its first layers: SWA, SWA, CSA (all hash-routed), HCA (score-routed).
LAYERS = 4
MAX_LEN = 1 << 20


@functools.cache
def flash(preset: str) -> DeepseekV4:
    config = ModelConfig.flash()
    config = dataclasses.replace(
        config,
        num_hidden_layers=LAYERS,
        compress_ratios=config.compress_ratios[:LAYERS],
        num_nextn_predict_layers=0,
    )
    kinds = [config.layer_kind(i) for i in range(LAYERS)]
    assert kinds == [SWA, SWA, CSA, HCA]
    return DeepseekV4(config, Precision.preset(preset))


def step_arguments(model: DeepseekV4) -> dict[str, Any]:
    """What `decode_step` passes on for one row: shapes only."""
    return {
        "model": model,
        "params": expected_tree(model.config, model.precision, False),
        "tokens": jax.ShapeDtypeStruct((1,), jnp.int32),
        "cache": jax.eval_shape(lambda: model.init_cache(1, MAX_LEN)),
        "active": jax.ShapeDtypeStruct((1,), jnp.bool_),
    }


def loop_arguments(model: DeepseekV4) -> dict[str, Any]:
    """What `generate` passes on for one row."""
    arguments = step_arguments(model)
    return {
        **{name: arguments[name] for name in ("model", "params", "cache")},
        "feed": Feed.of([[0]], np.ones(1, np.bool_), np.ones(1, np.int32)),
        "settings": Settings.of(SamplingParams(), np.zeros(1, np.uint32)),
        "stops": stop_ids(frozenset((1,)), model.config.vocab_size),
    }


@dataclasses.dataclass(frozen=True)
class Call:
    """A foreign call: its op, the layer it belongs to and the function around it."""

    op: str
    layer: int | None
    function: str
    operation: Any

    @property
    def config(self) -> str:
        """Attributes of the call."""
        return str(self.operation.attributes["mhlo.backend_config"])

    @property
    def variant(self) -> str:
        """The op, and what it leaves out."""
        reads = self.op == "mhc" and "write = 0 : i32" in self.config
        return "mhc without write" if reads else self.op

    @property
    def aliases(self) -> dict[int, int]:
        """Result -> operand with the same buffer."""
        return _aliases(self.operation)


class Program:
    """A lowered module."""

    def __init__(self, lowered: Any) -> None:
        self.module = lowered.compiler_ir("stablehlo")
        self.functions = {_text(f, "sym_name"): f for f in self.module.body.operations}
        self.main = self.functions["main"]

    def operations(self, function: str) -> Iterator[Any]:
        """Everything in a function, bodies of loops and branches included."""
        yield from _inside(self.functions[function])

    def calls(self, function: str = "main", layer: int | None = None) -> Iterator[Call]:
        """Foreign calls in call order, once for every time their function is called."""
        for operation in self.operations(function):
            if operation.name == "func.call":
                callee = _text(operation, "callee")
                yield from self.calls(callee, _layer(operation) if layer is None else layer)
            elif operation.name == "stablehlo.custom_call":
                target = _text(operation, "call_target_name")
                if target.startswith("dsv4."):
                    where = _layer(operation) if layer is None else layer
                    yield Call(target.removeprefix("dsv4."), where, function, operation)

    def reachable(self, function: str) -> set[str]:
        """A function and what it calls."""
        found = {function}
        for operation in self.operations(function):
            if operation.name == "func.call":
                found |= self.reachable(_text(operation, "callee"))
        return found

    def origin(self, value: Any, frames: tuple[Any, ...] = ()) -> int | str:
        """The argument of ``main`` whose buffer a value has by contract, else what breaks it."""
        if isinstance(value.owner, ir.Block):
            number = ir.BlockArgument(value).arg_number
            if not frames:
                return number
            return self.origin(frames[-1].operands[number], frames[:-1])
        operation, number = value.owner, ir.OpResult(value).result_number
        name = operation.name
        if name == "func.call":
            body = self.functions[_text(operation, "callee")].regions[0].blocks[0]
            *_, last = body.operations
            return self.origin(last.operands[number], (*frames, operation))
        if name == "stablehlo.while":
            *_, last = operation.regions[1].blocks[0].operations
            if self.origin(last.operands[number]) != number:  # of the body's own arguments
                return name
            return self.origin(operation.operands[number], frames)
        if name == "stablehlo.optimization_barrier":
            return self.origin(operation.operands[number], frames)
        if name == "stablehlo.custom_call" and number in _aliases(operation):
            return self.origin(operation.operands[_aliases(operation)[number]], frames)
        return name

    def results(self) -> list[Any]:
        """Values that ``main`` returns."""
        *_, last = self.main.regions[0].blocks[0].operations
        return list(last.operands)

    def donated(self) -> dict[int, int]:
        """Result -> argument of ``main`` that gives its buffer to it."""
        attributes = [str(a) for a in self.main.attributes["arg_attrs"]]
        found = [re.search(r"tf\.aliasing_output = (\d+)", text) for text in attributes]
        return {int(match[1]): i for i, match in enumerate(found) if match}


def _inside(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _inside(inner.operation)


def _text(operation: Any, attribute: str) -> str:
    return operation.attributes[attribute].value


def _layer(operation: Any) -> int | None:
    match = re.search(r"/layer_(\d+)/", str(operation.location))
    return int(match[1]) if match else None


def _aliases(operation: Any) -> dict[int, int]:
    text = str(operation.attributes["output_operand_aliases"])
    pairs = re.findall(r"output_tuple_indices = \[(\d*)\], operand_index = (\d+)", text)
    return {int(result or 0): int(operand) for result, operand in pairs}


def _dims(value: Any) -> tuple[int, ...]:
    """Sizes of a tensor, axes of one left out: a reshape costs nothing."""
    sizes = re.findall(r"(\d+)x", str(value.type))
    return tuple(int(size) for size in sizes if size != "1")


def _bytes(value: Any) -> int:
    bits = re.search(r"(?:x|<)(?:[su]?i|bf|f)(\d+)", str(value.type))
    return math.prod(_dims(value)) * int(bits[1]) // 8 if bits else 0


def _op_of(function: str) -> str:
    name = re.sub(r"_\d+$", "", function)
    return FUNCTIONS.get(name, name)


# The checks. Each returns what is wrong, so that the tests of the checks can look at it.


def wrong_calls(program: Program, expected: dict[int | None, Counter[str]]) -> list[str]:
    """Calls that are missing or too many, by layer."""
    found: dict[int | None, Counter[str]] = {}
    for call in program.calls():
        found.setdefault(call.layer, Counter())[call.op] += 1
    return [
        f"layer {layer}: expected {dict(expected.get(layer, {}))}, "
        f"found {dict(found.get(layer, {}))}"
        for layer in {**expected, **found}
        if expected.get(layer, Counter()) != found.get(layer, Counter())
    ]


def wrong_contracts(program: Program) -> list[str]:
    """Calls with other aliases than their op promises, without our ABI or outside its function."""
    problems: list[str] = []
    for call in program.calls():
        expected = ALIASES[call.variant](len(call.operation.results))
        if call.aliases != expected:
            problems.append(f"{call.op}: expected aliases {expected}, found {call.aliases}")
        if f"abi = {library.ABI} : i32" not in call.config:
            problems.append(f"{call.op}: no abi")
        if _op_of(call.function) != call.op:
            problems.append(f"{call.op}: called from {call.function}")
    return problems


def heavy_remains(program: Program) -> list[str]:
    """Work of XLA on large arrays inside an op that has a kernel."""
    entries = [f for f in program.functions if f"dsv4.{_op_of(f)}" in library.targets()]
    entries += [call.function for call in program.calls()]
    problems: list[str] = []
    for entry in dict.fromkeys(entries):
        for function in sorted(program.reachable(entry)):
            for operation in program.operations(function):
                largest = max(map(_bytes, [*operation.operands, *operation.results]), default=0)
                if operation.name in HEAVY and largest > MAX_BYTES:
                    problems.append(f"{_op_of(entry)}: {operation.name} of {largest} bytes")
    return problems


def cache_updates(program: Program, cache: Any) -> list[str]:
    """Updates by XLA that produce an array of the size of a ring or pool, or its bytes."""
    shapes: set[tuple[int, ...]] = set()
    for leaf in jax.tree.leaves((cache.layers, cache.mtp)):
        packed = leaf.shape[-1] // 2 if leaf.dtype == E2M1 else leaf.shape[-1]
        for shape in (leaf.shape, (*leaf.shape[:-1], packed)):
            shapes.add(tuple(size for size in shape if size != 1))
    return [
        f"{function}: {operation.name} -> {value.type}"
        for function in program.functions
        for operation in program.operations(function)
        for value in operation.results
        if operation.name in UPDATES and _dims(value) in shapes
    ]


def widened_keys(program: Program, cache: Any) -> list[str]:
    """Wider arrays, by XLA, of the sizes of a quantised store: copies of it that are dequantised.

    A store is met again with its scales' axis, and with rotary channels behind; not where the
    compressor's state has the same sizes. Of index keys neither a score of every entry.
    """
    shapes: set[tuple[int, ...]] = set()
    for layer in cache.layers:
        if layer.index is not None and layer.index.scale is not None:
            *lead, blocks = layer.index.scale.shape
            width = layer.index.key.shape[-1]
            for last in ((width,), (blocks, width // blocks), ()):
                shapes.add(tuple(n for n in (*lead, *last) if n != 1))
        for rows in (layer.window, layer.pool):
            if rows is None or rows.scale is None:
                continue
            b, slots, nope = rows.nope.shape
            full = nope + rows.rope.shape[-1]
            for last in ((nope,), (full,), (rows.scale.shape[-1], 64)):
                shapes.add(tuple(n for n in (b, slots, *last) if n != 1))
    states = jax.tree.leaves([(layer.state, layer.index_state) for layer in cache.layers])
    shapes -= {tuple(n for n in leaf.shape if n != 1) for leaf in states}
    return [
        f"{function}: {operation.name} -> {value.type}"
        for function in program.functions
        for operation in program.operations(function)
        for value in operation.results
        if _dims(value) in shapes and _bytes(value) > math.prod(_dims(value))
    ]


def copied_leaves(program: Program, cache: Any, behind: int = 0) -> list[str]:
    """Leaves of the cache that are not donated, or not written in place by calls of ours.

    ``behind``: results behind the cache.
    """
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(cache)]
    results, donated = program.results(), program.donated()
    first = len(results) - behind - len(paths)
    problems: list[str] = []
    for i, path in enumerate(paths, first):
        if i not in donated:
            problems.append(f"{path}: not donated")
        elif path.startswith((".layers", ".mtp")):
            origin = program.origin(results[i])
            if origin != donated[i]:
                problems.append(f"{path}: from {origin}")
    return problems


def streams_not_in_place(program: Program) -> list[str]:
    """Reads and write-backs of other streams than those before, or of such as have a use beside."""
    problems: list[str] = []
    calls = [o for o in program.operations("main") if o.name == "func.call"]
    streams: Any = None
    for number, call in enumerate(o for o in calls if _op_of(_text(o, "callee")) == "mhc"):
        (inner,) = program.calls(_text(call, "callee"))
        if streams is not None and call.operands[0] != streams:
            problems.append(f"mhc {number}: of other streams")
        users = [use.owner.name for use in call.operands[0].uses if use.owner != call]
        problems += [f"mhc {number}: its streams go to {user}" for user in users]
        if (inner.variant == "mhc") != bool(number):  # only those of the embedding are whole
            problems.append(f"mhc {number}: {inner.variant}")
        streams = call.results[0]  # without a write what was given
    return problems


@functools.cache
def decode(preset: str, platform: str = "cuda") -> Program:
    """The jitted function behind `decode_step`."""
    traced = _decode.trace(**step_arguments(flash(preset)))
    return Program(traced.lower(lowering_platforms=(platform,)))


def cache_of(preset: str) -> Any:
    return step_arguments(flash(preset))["cache"]


PRESETS = list(CALLS)


def expected_calls(preset: str) -> dict[int | None, Counter[str]]:
    config = flash(preset).config
    layers = {i: CALLS[preset][config.layer_kind(i)] for i in range(LAYERS)}
    return {None: CALLS[preset][None], **layers}


@pytest.mark.parametrize("preset", PRESETS)
def test_calls_of_every_layer(preset: str) -> None:
    assert wrong_calls(decode(preset), expected_calls(preset)) == []


def test_calls_do_not_depend_on_the_platform() -> None:
    program = decode("nvfp4", "cpu")
    assert wrong_calls(program, expected_calls("nvfp4")) == []
    assert wrong_contracts(program) == []


@pytest.mark.parametrize(("t", "drafts", "first"), [(1, 1, True), (2, 1, True), (3, 1, False)])
def test_where_the_window_is_written(t: int, drafts: int, first: bool) -> None:
    """By `key_finish` while attention sees none of what that replaces, else after attention."""
    model = flash("nvfp4")
    arguments = step_arguments(model)
    cache = jax.eval_shape(lambda: model.init_cache(1, MAX_LEN, draft_tokens=drafts))
    rest = {"tokens": typed(jnp.int32, 1, t), "num_tokens": typed(jnp.int32, 1)}
    del arguments["active"]
    traced = prefill_chunk.trace(**(arguments | rest | {"cache": cache}))
    program = Program(traced.lower(lowering_platforms=("cuda",)))
    calls = list(program.calls())
    expected = {1: {"key_finish": 1}, 0: {"key_finish": 1, "cache_write": 1}}[first]
    for layer in range(LAYERS):
        found = Counter(call.op for call in calls if call.layer == layer)
        assert {op: found[op] for op in ("key_finish", "cache_write") if found[op]} == expected
    rings = [len(call.operation.results) >= 6 for call in calls if call.op == "key_finish"]
    assert rings == [first] * LAYERS
    assert wrong_contracts(program) == []
    windows = [problem for problem in copied_leaves(program, cache) if ".window" in problem]
    assert windows == []


@pytest.mark.parametrize("preset", PRESETS)
def test_aliases_of_every_call(preset: str) -> None:
    assert wrong_contracts(decode(preset)) == []


def test_inputs_arrive_in_fp8() -> None:
    """``wq_a`` with ``wkv``, ``wq_b`` with the indexer's, ``w1`` with ``w3`` of the shared one."""
    arrived = {layer: [0, 0] for layer in range(LAYERS)}
    for call in decode("official").calls():
        if call.op == "fp8_linear" and call.layer is not None:
            arrived[call.layer]["f8E4M3FN" in str(call.operation.operands[0].type)] += 1
    # The others, ``wo_a``, ``wo_b`` and ``w2``, follow ops with results in BF16.
    assert arrived == {layer: [3, 3] for layer in range(LAYERS)}


def test_shared_expert_is_two_calls() -> None:
    """Its SwiGLU is part of ``w2``'s call, whose last operand is ``up``."""

    def found(preset: str) -> tuple[list[int | None], bool]:
        program = decode(preset)
        last = [
            (call.layer, list(call.operation.operands)[-1])
            for call in program.calls()
            if call.op in ("fp8_linear", "nvfp4_linear")
        ]
        gated = [layer for layer, operand in last if "bf16" in str(operand.type)]
        return gated, "swiglu" in program.functions

    for preset in PRESETS:
        assert found(preset) == (list(range(LAYERS)), False), preset


@pytest.mark.parametrize("preset", PRESETS)
def test_streams_are_written_in_place(preset: str) -> None:
    assert streams_not_in_place(decode(preset)) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_heavy_beside_a_kernel(preset: str) -> None:
    assert heavy_remains(decode(preset)) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_no_update_by_xla_makes_a_cache(preset: str) -> None:
    assert cache_updates(decode(preset), cache_of(preset)) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_no_store_of_keys_is_dequantised(preset: str) -> None:
    assert widened_keys(decode(preset), cache_of(preset)) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_every_leaf_is_donated_and_written_in_place(preset: str) -> None:
    assert copied_leaves(decode(preset), cache_of(preset)) == []


@pytest.mark.parametrize(
    ("regime", "number"), [(None, 0), ("decode", 1), ("prefill", 2), ("exact", 3)]
)
def test_the_regime_reaches_every_product(regime: Any, number: int) -> None:
    model = flash("nvfp4")
    model = model.clone(precision=dataclasses.replace(model.precision, regime=regime))
    traced = _decode.trace(**step_arguments(model))
    program = Program(traced.lower(lowering_platforms=("cuda",)))
    found = Counter[tuple[str, int]]()
    for call in program.calls():
        found.update((call.op, int(n)) for n in re.findall(r"regime = (\d) : i32", call.config))
    expected = sum(expected_calls("nvfp4").values(), Counter())
    products = ("attention", "mhc", "nvfp4_linear", "moe")
    wanted = Counter({(op, number): expected[op] for op in products})
    gates = expected["router"]  # whose scores are sums in parts unless asked otherwise
    wanted["dense_linear", number] = expected["dense_linear"] - gates
    wanted["dense_linear", number or 1] += gates
    assert found == wanted


def powers_of_two(traced: Any) -> list[int]:
    """What every call of the experts says of their block scales."""
    program = Program(traced.lower(lowering_platforms=("cuda",)))
    configs = [call.config for call in program.calls() if call.op == "moe"]
    return [int(n) for c in configs for n in re.findall(r"power_of_two = (\d) : i32", c)]


@pytest.mark.parametrize(
    ("formats", "main", "draft"),
    [
        ({"experts": "nvfp4_w4a8"}, 1, 0),
        ({"mtp_experts": "nvfp4_w4a8"}, 0, 1),
        ({"experts": "nvfp4_w4a8", "mtp_experts": "nvfp4_w4a8"}, 1, 1),
        ({"experts": "nvfp4_w4a8", "experts_power_of_two": False}, 0, 0),
    ],
)
def test_powers_of_two_reach_the_experts(formats: dict[str, Any], main: int, draft: int) -> None:
    """As the checkpoint, whose experts are MXFP4, was found to have them."""
    model, params = golden_model(**formats)
    arguments = step_arguments(model)
    layers = model.config.num_hidden_layers
    assert powers_of_two(_decode.trace(**arguments)) == [main] * layers
    streams = bf16(1, 1, model.config.hc_mult, model.config.hidden_size)
    apply = functools.partial(model.apply, method="draft")
    operands = streams, typed(jnp.int32, 1, 1), arguments["cache"]
    assert powers_of_two(jax.jit(apply).trace({"params": params}, *operands)) == [draft]


def test_nobody_looked_for_powers_of_two() -> None:
    model = flash("nvfp4")
    model = model.clone(precision=dataclasses.replace(model.precision, experts="nvfp4_w4a8"))
    assert powers_of_two(_decode.trace(**step_arguments(model))) == [0] * LAYERS


def test_the_steps_of_generate_write_in_place() -> None:
    """One loop, whose body has the calls of one step; the cache goes round in it."""
    arguments = loop_arguments(flash("nvfp4"))
    program = Program(decode_steps.trace(**arguments).lower(lowering_platforms=("cuda",)))
    assert Counter(call.op for call in program.calls()) == sum(
        expected_calls("nvfp4").values(), Counter()
    )
    assert [op.name for op in program.operations("main")].count("stablehlo.while") == 1
    assert copied_leaves(program, arguments["cache"], len(Feed._fields)) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_programs_write_in_place(preset: str) -> None:
    """As the steps are on a GPU: a call for each layer, and the same buffers."""
    arguments = loop_arguments(flash(preset)) | {"programs": True}
    program = Program(decode_steps.trace(**arguments).lower(lowering_platforms=("cuda",)))
    layers: list[int | None] = [None, *range(LAYERS)]
    assert wrong_calls(program, {layer: Counter(program=1) for layer in layers}) == []
    assert copied_leaves(program, arguments["cache"], len(Feed._fields)) == []


def store(s: int) -> IndexRows:
    """Indexer keys of eight sequences."""
    key, scale = (8, s, 128), (8, s, 4)
    return IndexRows(jax.ShapeDtypeStruct(key, E2M1), jax.ShapeDtypeStruct(scale, UE8M0))


def keys(b: int, s: int) -> KvRows:
    """A store of keys."""
    return KvRows(typed(E4M3, b, s, 448), typed(UE8M0, b, s, 7), typed(jnp.bfloat16, b, s, 64))


def typed(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return typed(jnp.bfloat16, *shape)


def stack(e: int, n: int, k: int) -> dict[str, jax.ShapeDtypeStruct]:
    """MXFP4 experts."""
    return {"weight": typed(E2M1, e, n, k), "scale": typed(UE8M0, e, n, k // 32)}


# One large call of every op that has a kernel, whether or not the model makes it yet.
LARGE = {
    "attention": (
        lambda q, ring, positions, sink, chunk, start, pool, n_visible, topk_idx: attention_op(
            *(q, ring, positions, sink),
            window=128,
            chunk=chunk,
            start=start,
            pool=pool,
            n_visible=n_visible,
            topk_idx=topk_idx,
            frequencies=np.ones(32, np.float32),
        ),
        (
            *(bf16(8, 512, 128, 512), keys(8, 128), typed(jnp.int32, 8, 512)),
            *(typed(jnp.float32, 128), keys(8, 512), typed(jnp.int32, 8)),
            *(keys(8, 1 << 18), typed(jnp.int32, 8, 512), typed(jnp.int32, 8, 512, 1024)),
        ),
    ),
    "cache_write": (
        lambda *operands: cache_write(*operands),
        (store(1 << 18), store(8192), jax.ShapeDtypeStruct((8, 8192), jnp.int32)),
    ),
    "index_topk": (
        lambda q, scale, weight, index, n_visible: index_topk(
            IndexRows(q, scale), weight, index, n_visible, topk=1024
        ),
        (
            *(typed(E2M1, 8, 512, 64, 128), typed(UE8M0, 8, 512, 64, 4)),
            *(typed(jnp.float32, 8, 512, 64), store(1 << 18), typed(jnp.int32, 8, 512)),
        ),
    ),
    "query_finish": (
        lambda q, positions: query_finish(
            q, positions, np.ones(32, np.float32), 1e-6, rounding="bfloat16"
        ),
        (bf16(8, 512, 128, 512), typed(jnp.int32, 8, 512)),
    ),
    "key_finish": (
        lambda kv, weight, start, ring: key_finish_op(
            *(kv, weight, start, np.ones(32, np.float32), 1e-6),
            form="fp8",
            ring=ring,
            count=start,
        ),
        (bf16(8, 8192, 512), bf16(512), typed(jnp.int32, 8), keys(8, 128)),
    ),
    "index_query_finish": (
        lambda q, positions: index_query_finish(
            q, positions, np.ones(32, np.float32), form="mxfp4"
        ),
        (bf16(8, 512, 64, 128), typed(jnp.int32, 8, 512)),
    ),
    "compressor": (
        lambda start, *job: compressor_op(
            [CompressorJob(*job)], start, start, np.ones(32, np.float32), ratio=128, eps=1e-6
        ),
        (
            *(typed(jnp.int32, 8), typed(jnp.float32, 8, 8192, 512)),
            *(typed(jnp.float32, 8, 8192, 512), typed(jnp.float32, 128, 512), bf16(512)),
            *(typed(jnp.float32, 8, 128, 512), typed(jnp.float32, 8, 128, 512)),
            keys(8, 1 << 13),
        ),
    ),
    "mhc": (
        lambda streams, *parts: mhc(
            *(streams, Write(*parts[:3]), Read(*parts[3:])),
            **{"iters": 20, "hc_eps": 1e-6, "rms_eps": 1e-6, "forms": ("nvfp4", "fp8")},
        ),
        (
            *(bf16(8192, 4, 7168), bf16(8192, 7168)),
            *(typed(jnp.float32, 8192, 4), typed(jnp.float32, 8192, 4, 4)),
            *(typed(jnp.float32, 24, 4 * 7168), typed(jnp.float32, 24), typed(jnp.float32, 3)),
            bf16(7168),
        ),
    ),
    "moe": (
        lambda *operands: moe(*operands, linear="mxfp4_w4a8", limit=10.0, dtype=jnp.bfloat16),
        (
            *(bf16(4096, 4096), typed(jnp.int32, 4096, 6), typed(jnp.float32, 4096, 6)),
            typed(jnp.bool_, 4096),
            *(stack(256, 2048, 4096), stack(256, 4096, 2048), stack(256, 2048, 4096)),
            bf16(4096, 4096),
        ),
    ),
    "dense_linear": (
        lambda *operands: dense_linear(*operands),
        (bf16(8192, 7168), bf16(512, 7168)),
    ),
    "fp8_linear": (
        lambda *operands: fp8_linear(*operands, dtype=jnp.bfloat16),
        (bf16(512, 8, 4096), typed(E4M3, 8192, 4096), typed(UE8M0, 64, 32)),
    ),
    "mxfp4_linear": (
        lambda *operands: mxfp4_linear(*operands, regime="decode"),
        (bf16(8, 7168), typed(E2M1, 3072, 7168), typed(UE8M0, 3072, 224)),
    ),
    "nvfp4_linear": (
        lambda *operands: nvfp4_linear(*operands, regime="prefill"),
        (
            bf16(8192, 7168),
            typed(E2M1, 1536, 7168),
            typed(E4M3, 1536, 448),
            typed(jnp.float32),
            typed(jnp.float32),
        ),
    ),
    "rmsnorm_fp8": (
        lambda x, weight: rmsnorm_fp8(x, weight, 1e-6),
        (bf16(2, 8192, 7168), bf16(7168)),
    ),
    "rmsnorm_nvfp4": (
        lambda x, weight: rmsnorm_nvfp4(x, weight, 1e-6),
        (bf16(2, 8192, 7168), bf16(7168)),
    ),
    "router": (
        lambda x, weight, bias: router(x, weight, bias, None, k=6, scale=2.5),
        (bf16(4096, 4096), bf16(256, 4096), typed(jnp.float32, 256)),
    ),
}

WITHIN = {"router": Counter(dense_linear=1)}
"""Ops that an op calls."""


@pytest.mark.parametrize("op", OPS)
def test_an_op_alone_is_its_call(op: str) -> None:
    function, operands = LARGE[op]
    traced = jax.jit(function).trace(*operands)
    program = Program(traced.lower(lowering_platforms=("cuda",)))
    assert wrong_calls(program, {None: Counter({op: 1}) + WITHIN.get(op, Counter())}) == []
    assert wrong_contracts(program) == []
    assert heavy_remains(program) == []


# Wrong variants: every check fails where it should.


def wrong_step(
    monkeypatch: pytest.MonkeyPatch,
    finish: Callable[..., Any] = key_finish_op,
    compress: Callable[..., Any] = compressor_op,
    donate: bool = True,
) -> Program:
    """The step with another `key_finish` or `compressor`, traced afresh."""
    monkeypatch.setattr(attention, "key_finish", finish)
    monkeypatch.setattr(attention, "compressor", compress)

    def step(**arguments: Any) -> Any:
        return _decode.__wrapped__(**arguments)

    jitted = jax.jit(step, static_argnames="model", donate_argnames="cache" if donate else ())
    traced = jitted.trace(**step_arguments(flash("nvfp4")))
    return Program(traced.lower(lowering_platforms=("cuda",)))


STATIC = ("ratio", "eps", "dtype")  # of `compressor`
FINISH = ("eps", "form", "query_form")  # of `key_finish`


def fresh(op: Any, static: tuple[str, ...] = ()) -> Any:
    """A jit of its own of an op, which no trace of the right one meets."""

    def function(*operands: Any, **settings: Any) -> Any:
        return op.__wrapped__(*operands, **settings)

    function.__name__ = op.__name__
    return jax.jit(function, static_argnames=static)


def scattered(
    kv: Any,
    weight: Any,
    start: Any,
    frequencies: Any,
    eps: float,
    *,
    ring: Any,
    count: Any,
    **form: Any,
) -> FinishedKeys:
    """`key_finish` whose ring is written by a scatter."""
    rows = key_finish_op(kv, weight, start, frequencies, eps, **form).rows
    slots = jnp.where(count[:, None] > 0, start[:, None] % ring.nope.shape[1], -1)
    return FinishedKeys(rows, reference_cache_write.cache_write(ring, rows, slots))


def in_jax(jobs: Any, *lengths: Any, ratio: int, eps: float, dtype: Any) -> Any:
    """`compressor` without its call, updates by scatters."""
    done = []
    for job in jobs:
        settings = {"ratio": ratio, "eps": eps, "dtype": dtype}
        operands = (*job[:4], job[4:6], job.pool, *lengths)
        (kv_state, gate_state), pool = compressor_jax(*operands, **settings)
        done.append(Compressed(kv_state, gate_state, pool))
    return done


def leaves_of(cache: Any, *names: str) -> int:
    """Arrays of the named parts of all layers."""
    return len(jax.tree.leaves([[getattr(layer, n) for n in names] for layer in cache.layers]))


ENTRIES = ("pool", "state", "index", "index_state")


def test_a_scatter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    program = wrong_step(monkeypatch, jax.jit(scattered, static_argnames=FINISH))
    cache = cache_of("nvfp4")
    assert wrong_calls(program, expected_calls("nvfp4")) == []
    copied = copied_leaves(program, cache)
    assert len(copied) == leaves_of(cache, "window")
    assert all(problem.endswith("from stablehlo.scatter") for problem in copied)
    assert len(cache_updates(program, cache)) == 3  # calls of one shape share a function


def test_entries_by_xla_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    scatter = jax.jit(reference_cache_write.cache_write)
    monkeypatch.setattr("dsv4_jax.ops._compressor_jax.cache_write", scatter)
    program = wrong_step(monkeypatch, compress=jax.jit(in_jax, static_argnames=STATIC))
    cache = cache_of("nvfp4")
    assert len(wrong_calls(program, expected_calls("nvfp4"))) == 2  # CSA and HCA
    copied = copied_leaves(program, cache)
    assert len(copied) == leaves_of(cache, *ENTRIES)
    assert all(problem.endswith("from stablehlo.scatter") for problem in copied)
    assert len(cache_updates(program, cache)) == leaves_of(cache, *ENTRIES)


@pytest.mark.parametrize(
    ("op", "parts", "calls"), [("key_finish", ("window",), 4), ("compressor", ENTRIES, 2)]
)
def test_a_lost_alias_is_found(
    monkeypatch: pytest.MonkeyPatch, op: str, parts: tuple[str, ...], calls: int
) -> None:
    call = library.call

    def drop(name: str, *operands: Any, aliases: Any = None, **rest: Any) -> Any:
        return call(name, *operands, aliases=None if name == op else aliases, **rest)

    monkeypatch.setattr(library, "call", drop)
    settings = {"finish": fresh(key_finish_op, FINISH), "compress": fresh(compressor_op, STATIC)}
    program = wrong_step(monkeypatch, **settings)
    assert wrong_calls(program, expected_calls("nvfp4")) == []
    assert len(wrong_contracts(program)) == calls
    problems = copied_leaves(program, cache_of("nvfp4"))
    assert len(problems) == leaves_of(cache_of("nvfp4"), *parts)
    assert all(problem.endswith("from stablehlo.custom_call") for problem in problems)


@pytest.mark.parametrize(("op", "calls"), [("key_finish", 4), ("compressor", 2)])
def test_an_inlined_call_is_found(monkeypatch: pytest.MonkeyPatch, op: str, calls: int) -> None:
    if op == "key_finish":
        program = wrong_step(monkeypatch, key_finish_op.__wrapped__)
    else:
        program = wrong_step(monkeypatch, compress=compressor_op.__wrapped__)
    assert wrong_calls(program, expected_calls("nvfp4")) == []
    assert wrong_contracts(program) == [f"{op}: called from main"] * calls


def test_streams_with_another_use_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write-back of its own behind every layer, whose streams are looked at."""
    advance = Block.advance

    def wrong(self: Block, pending: Any, *rest: Any) -> Any:
        pending, cache = advance(self, pending, *rest)
        plain = hc.write_back(pending, config=self.config, precision=self.precision)
        branch = pending.write.branch + jnp.max(plain)
        return pending._replace(write=pending.write._replace(branch=branch)), cache

    monkeypatch.setattr(Block, "advance", wrong)
    program = wrong_step(monkeypatch)
    assert len(wrong_calls(program, expected_calls("nvfp4"))) == LAYERS
    assert streams_not_in_place(program)


def test_a_missing_donation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    program = wrong_step(monkeypatch, donate=False)
    cache = cache_of("nvfp4")
    problems = copied_leaves(program, cache)
    assert len(problems) == len(jax.tree.leaves(cache))
    assert all(problem.endswith("not donated") for problem in problems)


@pytest.mark.parametrize("store", ["ring", "pool"])
def test_a_dequantised_store_is_found(monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    """Attention over a copy in BF16, instead of the call."""
    call = attention.attention

    def wrong(q: Any, ring: Any, positions: Any, sink: Any, **operands: Any) -> Any:
        rows = ring if store == "ring" else operands["pool"]
        o = call(q, ring, positions, sink, **operands)
        return o if rows is None else o + jnp.max(kv_dequant(rows, q.dtype))

    monkeypatch.setattr(attention, "attention", wrong)
    program = wrong_step(monkeypatch)
    found = widened_keys(program, cache_of("nvfp4"))
    assert wrong_calls(program, expected_calls("nvfp4")) == []
    assert any(problem.endswith("x448xbf16>") for problem in found), found


@pytest.mark.parametrize(("what", "end"), [("keys", "x128xf32>"), ("scores", "x262144xf32>")])
def test_a_dequantised_index_is_found(monkeypatch: pytest.MonkeyPatch, what: str, end: str) -> None:
    """A copy of the index keys in FP32 beside the call, or all scores of a query instead of it."""
    call = indexer.index_topk

    def wrong(q: Any, weight: Any, keys: Any, n_visible: Any, **settings: Any) -> Any:
        if what == "scores":
            weight = weight.astype(jnp.float32) * settings.pop("weight_scale")
            return index_topk_jax(q, weight, keys, n_visible, **settings)
        idx = call(q, weight, keys, n_visible, **settings)
        return idx + jnp.max(index_dequant(keys)).astype(jnp.int32)

    monkeypatch.setattr(indexer, "index_topk", wrong)
    program = wrong_step(monkeypatch)
    found = widened_keys(program, cache_of("nvfp4"))
    assert any(problem.endswith(end) for problem in found), found
    calls = wrong_calls(program, expected_calls("nvfp4"))
    assert bool(calls) == (what == "scores"), calls


def test_swapped_leaves_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arrays of one shape: each must come back as itself."""

    def swapped(*operands: Any, **settings: Any) -> Any:
        written = compressor_op(*operands, **settings)
        return [Compressed(new.gate_state, new.kv_state, new.pool) for new in written]

    program = wrong_step(monkeypatch, compress=swapped)
    problems = copied_leaves(program, cache_of("nvfp4"))
    assert len(problems) == 6  # kv and gate of three compressor states
    assert all("state" in problem for problem in problems)


def test_work_beside_the_call_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that is written once more, inside of the op."""

    def padded(*operands: Any, **settings: Any) -> Any:
        written = compressor_op.__wrapped__(*operands, **settings)
        touch = lambda x: x.at[0, 0, 0].set(x[0, 1, 0])  # noqa: E731
        return [new._replace(pool=jax.tree.map(touch, new.pool)) for new in written]

    padded.__name__ = "compressor"
    program = wrong_step(monkeypatch, compress=jax.jit(padded, static_argnames=STATIC))
    assert wrong_calls(program, expected_calls("nvfp4")) == []
    assert wrong_contracts(program) == []
    assert heavy_remains(program)
    assert cache_updates(program, cache_of("nvfp4"))


def test_sizes_of_types() -> None:
    """Bytes and shapes as the checks read them."""
    dtypes = {E2M1: 512, UE8M0: 1024, jnp.bfloat16: 2048, jnp.int32: 4096, jnp.bool_: 128}

    def same(*arrays: Any) -> Any:
        return arrays

    operands = [jax.ShapeDtypeStruct((1, 16, 64), dtype) for dtype in dtypes]
    program = Program(jax.jit(same, keep_unused=True).lower(*operands))
    values = program.results()
    assert [_dims(value) for value in values] == [(16, 64)] * len(values)
    assert [_bytes(value) for value in values] == list(dtypes.values())

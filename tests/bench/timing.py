"""Times an op of ours inside a captured CUDA graph, checks its results, writes a JSON line.

One jitted call goes through ``k`` sets of inputs in turn, many rounds over: a loop whose body holds
``k`` launches, which XLA captures into a command buffer (that it did is checked, by the op's launch
counts). Sets are buffers of their own and together exceed the L2 twice; where ``k`` small sets do
not, each round first reads something that does, and the time of such rounds without launches is
taken off. Results are the loop's carries, donated, so that nothing is copied or allocated; they
start as 0xFF bytes and the results of two sets are compared with a reference in the same run. For
XLA the launches have side effects here, or it would take out of the loop what repeats itself there.

Ceilings and bars are those of an H200. On another GPU the ceilings are measured, once a run; a bar
is scaled by the floors, shown as that of the H200, and not enforced.

Without a GPU everything runs but the launch counts, which stay zero, are not looked at. As a
program, prints the table of a file of JSON lines: ``python -m tests.bench.timing FILE [WORD...]``,
of the lines that hold every word.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from dsv4_jax import library
from dsv4_jax.bench.ceilings import Ceilings, Rate, measured_ceilings
from dsv4_jax.quant.bits import bytes_to_e2m1
from dsv4_jax.typing import E2M1

__all__ = [
    "BAR_GPU",
    "H200",
    "Result",
    "ceilings",
    "check_program",
    "default_path",
    "filled",
    "held",
    "kept",
    "measure",
    "measure_scan",
    "poisoned",
    "random_bytes",
    "set_count",
    "table",
]

BAR_GPU = "NVIDIA H200"
"""The device kind that the bars are for."""
ROTATED_BYTES = 120e6
"""Twice the L2 of an H200: what has to pass between two uses of a set."""
FEWEST_SETS = 8
"""XLA captures no fewer than 5 commands (xla_gpu_graph_min_graph_size)."""
MOST_SETS = 64
"""Arguments cost about 1 us each to pass; 64 launches a round hide the start of a round."""
FEWEST_LAUNCHES = 64
"""In one timed call."""
CALL_US = 40_000.0
"""A timed call lasts about this long: passing a few dozen arguments is then 1 % of it at most."""
LAUNCH_US = 2.0
"""Guess of the shortest launch, for that."""
WARM_CALLS = 3
"""At least; the first compiles, the second may capture, the third replays and raises clocks."""
LARGE_COPY = 256
"""Elements; XLA copies a loop's counter now and then, but nothing of ours."""
SETTLE_CALLS = 12
"""After so many calls a step that still calls its handlers is not being replayed."""
REPLAYS = 15
"""Timed calls, of which the median counts."""

Set = tuple[Any, tuple[Any, ...]]


H200 = Ceilings(read=4.39e12, copy=4.29e12, bf16=787e12, fp8=1428e12)
"""One H200, 2026-11-22."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One measurement; a line of JSON and a row of the table."""

    bench: str
    case: str
    gpu: str
    date: str
    jax: str
    commit: str
    us: float
    floor_us: float
    fraction: float
    gb_s: float
    launches: int
    spread: float
    """Distance of the quartiles over the median of the replays."""
    bar: str
    ok: bool

    def append(self, path: Path | str) -> None:
        """Adds the line to a file."""
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(self)) + "\n")

    def require(self) -> None:
        """Raises `AssertionError` when the bar is missed on the GPU it is for."""
        if not self.ok and self.gpu == BAR_GPU:
            raise AssertionError(f"{self.bench} {self.case}: {self.us} us misses {self.bar}")


def table(results: Sequence[Result]) -> str:
    """`case, floor us, time us, fraction, bar, ok`, one line each."""
    width = max((len(f"{r.bench} {r.case}") for r in results), default=4)
    bars = max((len(r.bar) for r in results), default=3)
    head = f"{'case':{width}}  floor us   time us  fraction  spread  {'bar':{bars}}  ok"
    rows = [
        f"{f'{r.bench} {r.case}':{width}}  {r.floor_us:8.3f}  {r.us:8.3f}  {r.fraction:8.3f}  "
        f"{r.spread:6.3f}  {r.bar:{bars}}  "
        f"{'ok' if r.ok else 'MISSED' if r.gpu == BAR_GPU else 'slower'}"
        for r in results
    ]
    return "\n".join([head, *rows])


def default_path() -> Path:
    """Where benchmarks write: $BENCH_JSONL, or a file of the GPU's name beside this one."""
    name = jax.devices()[0].device_kind.removeprefix("NVIDIA ").split()[0].lower()
    return Path(os.environ.get("BENCH_JSONL", Path(__file__).parent / f"{name}.jsonl"))


def _commit() -> str:
    """$BENCH_COMMIT (a copy of a tree has no history), or what git says."""
    if named := os.environ.get("BENCH_COMMIT"):
        return named
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _from_bytes(data: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Bytes ``[..., d * itemsize]`` as an array of ``shape``, whatever they mean there."""
    if dtype == E2M1:
        return bytes_to_e2m1(data)
    if dtype.itemsize > 1:
        data = data.reshape(*data.shape[:-1], -1, dtype.itemsize)
    return lax.bitcast_convert_type(data, dtype).reshape(shape)


def _byte_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    last = shape[-1] // 2 if dtype == E2M1 else shape[-1] * dtype.itemsize
    return (*shape[:-1], last)


def filled(byte: int, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """An array of one byte throughout; two E2M1 codes share theirs."""
    dtype = np.dtype(dtype)
    if not shape:
        return _from_bytes(jnp.full(dtype.itemsize, byte, jnp.uint8), shape, dtype)
    return _from_bytes(jnp.full(_byte_shape(shape, dtype), byte, jnp.uint8), shape, dtype)


def random_bytes(seed: int, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Any bytes, NaN patterns included; for ops that only move them."""
    dtype = np.dtype(dtype)
    data = np.random.default_rng(seed).integers(0, 256, _byte_shape(shape, dtype), np.uint8)
    return bytes_to_e2m1(jnp.asarray(data)) if dtype == E2M1 else jnp.asarray(data.view(dtype))


def poisoned(like: Any) -> Any:
    """A tree of arrays of 0xFF bytes (NaN in every format that has one)."""
    return jax.tree.map(lambda x: filled(0xFF, x.shape, x.dtype), like)


def set_count(launch_bytes: float) -> int:
    """Sets so that nothing of a launch is left in the L2 when its set's turn comes again."""
    return min(max(math.ceil(ROTATED_BYTES / max(launch_bytes, 1)), FEWEST_SETS), MOST_SETS)


@functools.cache
def ceilings() -> Ceilings:
    """Of this device: those of the H200, or measured on another GPU; without one the H200's too."""
    if jax.default_backend() != "gpu" or jax.devices()[0].device_kind == BAR_GPU:
        return H200
    found = measured_ceilings()
    print(
        f"{jax.devices()[0].device_kind}: read {found.read / 1e12:.2f}, copy "
        f"{found.copy / 1e12:.2f} TB/s, BF16 {found.bf16 / 1e12:.0f}, FP8 {found.fp8 / 1e12:.0f} "
        f"TFLOP/s, measured"
    )
    return found


def _rounds(
    op: Callable[..., Any], rounds: int, state: Any, inputs: Any, evict: jax.Array | None
) -> Any:
    """``rounds`` times: reads ``evict``, then one launch per set."""

    def one(_: Any, state: Any) -> Any:
        carries, mark = state
        if evict is not None:
            mark = jnp.max(evict ^ mark)
        return tuple(op(carry, *each) for carry, each in zip(carries, inputs, strict=True)), mark

    return lax.fori_loop(0, rounds, one, state)


def held(carry: jax.Array) -> jax.Array:
    """A zero (uint8) that XLA must take for a result of the loop's last round.

    What depends on it stays in the loop: ``bytes ^ held(carry)``. A barrier would not do.
    """
    first = lax.bitcast_convert_type(carry.reshape(-1)[0].astype(jnp.float32), jnp.uint32)
    return (first == jnp.uint32(0x7FA5A5A5)).astype(jnp.uint8)  # a NaN that no arithmetic makes


def kept(x: jax.Array, carry: jax.Array) -> jax.Array:
    """BF16 ``x``, by way of `held`."""
    words = lax.bitcast_convert_type(x, jnp.uint16) ^ held(carry).astype(jnp.uint16)
    return lax.bitcast_convert_type(words, jnp.bfloat16)


@contextlib.contextmanager
def _side_effects() -> Generator[None]:
    """Inside, FFI calls are traced as having side effects: never moved, merged or dropped."""
    pure = jax.ffi.ffi_call
    jax.clear_caches()  # of what was traced without
    jax.ffi.ffi_call = functools.partial(pure, has_side_effect=True)
    try:
        yield
    finally:
        jax.ffi.ffi_call = pure
        jax.clear_caches()


def check_program(text: str, target: str, launches: int, rounds: int) -> None:
    """Compiled HLO must call ``dsv4.<target>`` ``launches`` times in a loop that copies nothing.

    Or a multiple of it, or ``rounds`` times as often in a loop that XLA unrolled altogether.
    """
    in_loops = outside = 0
    for computation in re.split(r"^(?=\S.*\{$)", text, flags=re.M):
        calls = computation.count(f'custom_call_target="dsv4.{target}"')
        if computation.startswith("ENTRY"):
            outside += calls
            continue
        in_loops += calls
        for dims in re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", computation if calls else ""):
            if math.prod(map(int, dims.split(",") if dims else [])) > LARGE_COPY:
                raise AssertionError(f"dsv4.{target}: XLA copies an array [{dims}] in the loop")
    looped = in_loops and in_loops % launches == 0 and outside % launches == 0
    if not looped and (in_loops, outside) != (0, launches * rounds):
        raise AssertionError(
            f"dsv4.{target}: expected {launches} calls in a loop, got {in_loops} and {outside} "
            f"outside"
        )


def _launches(targets: Sequence[str]) -> list[tuple[int, int]]:
    counts = library.launch_counts()
    return [counts[f"dsv4.{target}"] for target in targets]


def _settle(call: Callable[[], object], launches: Mapping[str, int]) -> None:
    """Calls until handlers stay silent: from then on everything is replayed from a graph.

    ``launches``: of each op, how many a capture must have brought (or a multiple of it).
    """
    start = _launches(list(launches))
    for done in range(1, SETTLE_CALLS + 1):
        before = _launches(list(launches))
        call()
        if done >= WARM_CALLS and _launches(list(launches)) == before:
            break
    else:
        raise AssertionError(f"not replayed: {launches} still called after {SETTLE_CALLS} calls")
    if jax.default_backend() != "gpu":
        return
    for (op, each), then, now in zip(launches.items(), start, before, strict=True):
        captured, eager = now[0] - then[0], now[1] - then[1]
        if captured == 0 or captured % each or eager % each:
            raise AssertionError(
                f"dsv4.{op}: expected captures of {each} launches, got {captured} captured and "
                f"{eager} launched straight away"
            )


class _Replays:
    """Calls ``step(state) -> state`` (donated) and keeps wall-clock times."""

    def __init__(self, step: Callable[[Any], Any], state: Any) -> None:
        self.step, self.state = step, state
        self.times: list[float] = []

    def call(self) -> None:
        begin = time.perf_counter()
        self.state = self.step(self.state)
        jax.block_until_ready(self.state)
        self.times.append(time.perf_counter() - begin)

    def run(self, launches: Mapping[str, int], replays: int) -> None:
        """Warms up, then fills ``times``."""
        _settle(self.call, launches)
        before = _launches(list(launches))
        self.times.clear()
        for _ in range(replays):
            self.call()
        if _launches(list(launches)) != before:
            raise AssertionError(f"a replay called the handlers of {list(launches)} again")

    def us(self) -> float:
        return statistics.median(self.times) * 1e6

    def spread(self) -> float:
        low, _, high = statistics.quantiles(self.times, n=4)
        return (high - low) / statistics.median(self.times)


def _result(
    bench: str,
    case: str,
    us: float,
    spread: float,
    launches: int,
    launch_bytes: float,
    floor_us: float,
    h200_floor_us: float,
    max_us: float | None,
    min_fraction: float | None,
) -> Result:
    fraction = floor_us / us
    bars: list[str] = []
    ok = True
    if max_us is not None:
        bars.append(f"<= {max_us:g} us")
        # On a slower GPU the same part of the floor.
        ok = us <= max_us * (floor_us / h200_floor_us if h200_floor_us else 1)
    if min_fraction is not None:
        bars.append(f">= {min_fraction:.0%}")
        ok = ok and fraction >= min_fraction
    gpu = jax.devices()[0].device_kind
    if bars and gpu != BAR_GPU:
        bars[0] = f"H200: {bars[0]}"
    result = Result(
        bench=bench,
        case=case,
        gpu=gpu,
        date=datetime.date.today().isoformat(),
        jax=jax.__version__,
        commit=_commit(),
        us=round(us, 3),
        floor_us=round(floor_us, 3),
        fraction=round(fraction, 3),
        gb_s=round(launch_bytes / us / 1e3, 1),
        launches=launches,
        spread=round(spread, 3),
        bar=", ".join(bars) or "-",
        ok=ok,
    )
    print(table([result]))
    return result


def measure(
    bench: str,
    case: str,
    op: Callable[..., Any],
    make_set: Callable[[int], Set],
    check: Callable[[int, Any], None],
    *,
    target: str | None,
    launch_bytes: float,
    bytes_at: Rate = "copy",
    flops: float = 0.0,
    flops_at: Rate = "bf16",
    max_us: float | None = None,
    min_fraction: float | None = None,
    sets: int | None = None,
    rounds: int | None = None,
    replays: int = REPLAYS,
    call_us: float = CALL_US,
    evict_bytes: float = ROTATED_BYTES,
) -> Result:
    """Time of one call with cold inputs, from the median of many replays.

    A call of the handler counts as one launch, however many kernels it starts; all of them are in
    the time.

    Args:
        bench, case: what the line is called.
        op: ``op(carry, *inputs) -> carry``, one launch. A cache is carried and written in place;
            an op without state ignores the carry, which has the form of its result.
        make_set: ``(carry, inputs)`` of set ``i``; carries are donated.
        check: ``check(i, carry)`` raises when the result of set ``i`` is wrong.
        target: the op's name, whose launches are counted; ``None`` for an op of XLA's, which must
            hold something back from the loop by its carry (`held`).
        launch_bytes: the fewest bytes a launch can move; with ``flops`` they make the floor.
        bytes_at, flops_at: the ceilings that the two are measured against.
        max_us, min_fraction: the bars; none of them is enforced here (`Result.require`).
        sets: by default what rotates `ROTATED_BYTES`; sets may share weights that are larger.
        call_us: what a timed call should last if launches took no longer than the floor.
        rounds, replays, evict_bytes: for tests; by default as the constants say.

    Raises:
        AssertionError: the launches are not in a command buffer, or ``check`` fails.
    """
    k = set_count(launch_bytes) if sets is None else sets
    made = [make_set(i) for i in range(k)]
    inputs = tuple(each for _, each in made)
    evict = None
    if k * launch_bytes < evict_bytes:
        evict = jnp.arange(int(evict_bytes) // 4, dtype=jnp.uint32)
    floor_us, h200_floor_us = (
        max(rates.us(launch_bytes, bytes_at), rates.us(flops, flops_at))
        for rates in (ceilings(), H200)
    )
    least_us = max(LAUNCH_US, floor_us)
    if rounds is None:
        rounds = max(round(call_us / (k * least_us)), 1)
    # Long launches hide the start of a call without being many.
    rounds = max(rounds, math.ceil(min(FEWEST_LAUNCHES, max(call_us / least_us, 1)) / k))
    state = (tuple(carry for carry, _ in made), jnp.uint32(0))
    del made

    def compiled(op: Callable[..., Any]) -> Any:
        run = jax.jit(functools.partial(_rounds, op, rounds), donate_argnums=0, keep_unused=True)
        return run.lower(state, inputs, evict).compile()

    counted = {} if target is None else {target: k}
    if target is None:
        run = compiled(op)
    else:
        with _side_effects():
            run = compiled(op)
        check_program(run.as_text(), target, k, rounds)
    rest_us = 0.0
    if evict is not None:  # first: compiling anything makes XLA drop the graphs it holds
        without = compiled(lambda carry, *_: carry)
        rest = _Replays(lambda state: without(state, inputs, evict), state)
        rest.run({}, replays)
        state, rest_us = rest.state, rest.us()
    full = _Replays(lambda state: run(state, inputs, evict), state)
    full.run(counted, replays)
    carries = full.state[0]
    for i in sorted({0, k - 1}):
        check(i, carries[i])
    launches = k * rounds
    us = (full.us() - rest_us) / launches
    if us <= 0:
        raise AssertionError(f"{case}: rounds take no longer with launches than without")
    return _result(
        bench,
        case,
        us,
        full.spread(),
        launches,
        launch_bytes,
        floor_us,
        h200_floor_us,
        max_us,
        min_fraction,
    )


def measure_scan(
    bench: str,
    case: str,
    step: Callable[..., Any],
    make_carry: Callable[[], Any],
    inputs: tuple[Any, ...],
    check: Callable[[Any], None],
    *,
    launches: Mapping[str, int],
    length: int,
    unroll: int,
    launch_bytes: float = 0.0,
    bytes_at: Rate = "copy",
    max_us: float | None = None,
    max_temporaries: float = 1e6,
    replays: int = REPLAYS,
) -> Result:
    """Time per launch of ``step(carry, *inputs) -> carry`` in a `lax.scan` with a donated carry.

    Every launch must depend on the one before through the carry, or XLA takes it out of the loop.

    Args:
        make_carry: a new carry, the same each time.
        check: raises when the carry is wrong after ``length`` steps.
        launches: launches of each op in one step; with none named the time is that of a step, and
            nothing is asked about graphs.
        length, unroll: steps, and steps per iteration of the compiled loop.
        max_temporaries: bytes XLA may set aside; a cache that it copies shows here.

    Raises:
        AssertionError: launches were not captured or a repeated call reached a handler again, a
            buffer of the carry moved, there are large temporaries, or ``check`` fails.
    """

    def scanned(carry: Any, inputs: tuple[Any, ...]) -> Any:
        def body(carry: Any, _: None) -> tuple[Any, None]:
            return step(carry, *inputs), None

        return lax.scan(body, carry, None, length=length, unroll=unroll)[0]

    if length % unroll:
        raise ValueError(f"measure_scan: unroll must divide length, got {unroll} and {length}")
    run = jax.jit(scanned, donate_argnums=0)
    carry = make_carry()
    compiled = run.lower(carry, inputs).compile()
    for op, n in launches.items():
        check_program(compiled.as_text(), op, n * unroll, length // unroll)
    analysis = compiled.memory_analysis()
    temporaries = analysis.temp_size_in_bytes if analysis else 0
    if temporaries > max_temporaries:
        raise AssertionError(f"{case}: {temporaries} bytes of temporaries")
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(carry)]
    replayed = _Replays(lambda carry: compiled(carry, inputs), carry)
    # A capture holds the launches of one iteration of the compiled loop, or of all of them.
    replayed.run({op: n * unroll for op, n in launches.items()}, replays)
    after = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(replayed.state)]
    if after != pointers:
        raise AssertionError(f"{case}: buffers of the carry moved from {pointers} to {after}")
    check(compiled(make_carry(), inputs))
    count = length * (sum(launches.values()) or 1)
    us = replayed.us() / count
    floor_us = ceilings().us(launch_bytes, bytes_at)
    return _result(
        bench,
        case,
        us,
        replayed.spread(),
        count,
        launch_bytes,
        floor_us,
        H200.us(launch_bytes, bytes_at),
        max_us,
        None,
    )


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines if all(word in line for word in sys.argv[2:])]
    print(table([Result(**line) for line in found if "bench" in line]))

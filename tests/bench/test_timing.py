"""The bench helper at tiny sizes on any machine: what it finds out and what it prints."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import library
from dsv4_jax.bench.ceilings import measured_ceilings
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.quant.kv import IndexRows, KvRows
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.bench import bench_cache_write, bench_rmsnorm_nvfp4, sanitize, timing
from tests.support.numerics import raw

TINY: dict[str, Any] = {"sets": 2, "rounds": 2, "replays": 4}

GOOD = timing.Result(
    bench="op",
    case="b=1",
    gpu="NVIDIA H200",
    date="2026-11-22",
    jax="0.11.2",
    commit="abc",
    us=2.0,
    floor_us=1.5,
    fraction=0.75,
    gb_s=3217.5,
    launches=64,
    spread=0.01,
    bar="<= 2.5 us",
    ok=True,
)


def expected(seed: float) -> np.ndarray:
    """`written` of set ``seed``."""
    out = np.full((1, 4, 8), 0xFFFFFFFF, np.uint32).view(np.float32)
    out[0, [2, 0]] = seed
    return out


def rows(seed: float) -> tuple[jax.Array, jax.Array]:
    """Two rows for slots 2 and 0 of four."""
    return jnp.full((1, 2, 8), seed, jnp.float32), jnp.asarray([[2, 0]], jnp.int32)


def empty() -> jax.Array:
    return timing.filled(0xFF, (1, 4, 8), jnp.float32)


def check(i: int, result: jax.Array) -> None:
    np.testing.assert_array_equal(raw(result), raw(expected(i)))


def measured(op: Any = cache_write, **settings: Any) -> timing.Result:
    """`timing.measure` of a small write."""
    given: dict[str, Any] = {**TINY, "evict_bytes": 0.0, **settings}
    return timing.measure(
        "op",
        "tiny",
        op,
        lambda i: (empty(), rows(i)),
        check,
        target="cache_write",
        launch_bytes=512.0,
        **given,
    )


def test_right_result(capsys: pytest.CaptureFixture[str]) -> None:
    result = measured(max_us=1e9)
    assert result.ok and result.bar == "H200: <= 1e+09 us"
    assert result.launches == timing.FEWEST_LAUNCHES
    assert result.floor_us == round(512 / timing.H200.copy * 1e6, 3)
    assert math.isclose(result.gb_s, 512 / result.us / 1e3, abs_tol=0.1)
    assert "op tiny" in capsys.readouterr().out


WRONG = {
    "value": lambda cache, rows, slots: cache_write(cache, rows + 1, slots),
    "unwritten": lambda cache, rows, slots: cache_write(cache, rows, slots.at[0, 1].set(-1)),
    "neighbour": lambda cache, rows, slots: cache_write(cache, rows, slots.at[0, 1].set(1)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_result_raises(wrong: str) -> None:
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        measured(WRONG[wrong])


def test_another_op_raises() -> None:
    with pytest.raises(AssertionError, match="expected 2 calls in a loop, got 0"):
        measured(lambda cache, rows, slots: cache.at[0, slots[0]].set(rows[0]))


def test_side_effects_are_only_for_the_measurement() -> None:
    measured()
    text = jax.jit(cache_write).lower(empty(), *rows(0)).as_text()
    assert "dsv4.cache_write" in text and "has_side_effect = true" not in text


@pytest.mark.parametrize("bar", [{"max_us": 1e-9}, {"min_fraction": 0.9}])
def test_missed_bar(bar: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Enforced on the GPU that the bars are for, shown on any."""
    result = measured(**bar)
    assert not result.ok and result.bar.startswith("H200: ")
    assert timing.table([result]).endswith("slower")
    result.require()
    monkeypatch.setattr(timing, "BAR_GPU", result.gpu)
    assert not measured(**bar).bar.startswith("H200")
    assert timing.table([result]).endswith("MISSED")
    with pytest.raises(AssertionError, match="op tiny"):
        result.require()


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar in us is scaled by the floors of the two GPUs."""
    found = measured_ceilings(size=64, read_bytes=1 << 20)
    assert min(found.read, found.copy, found.bf16, found.fp8) > 0
    slow = dataclasses.replace(timing.H200, bf16=timing.H200.bf16 / 2)
    monkeypatch.setattr(timing, "ceilings", lambda: slow)
    assert measured(flops=787e6).floor_us == 2.0
    assert measured(flops=1428e6, flops_at="fp8").floor_us == 1.0
    monkeypatch.setattr(timing._Replays, "us", lambda _: 10.0 * timing.FEWEST_LAUNCHES)
    for max_us, ok in ((6.0, True), (4.0, False)):
        assert measured(flops=787e6, max_us=max_us).ok == ok


def test_flops_make_the_floor() -> None:
    assert measured(flops=787e6).floor_us == 1.0


def test_eviction_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a round costs without launches, and a run that is no slower than that."""
    monkeypatch.setattr(timing._Replays, "us", lambda replays: 300.0 if replays.called else 44.0)
    monkeypatch.setattr(timing._Replays, "called", False, raising=False)
    run = timing._Replays.run

    def noted(replays: Any, launches: Any, count: int) -> None:
        replays.called = bool(launches)
        run(replays, launches, count)

    monkeypatch.setattr(timing._Replays, "run", noted)
    assert measured(evict_bytes=4e4).us == 256 / timing.FEWEST_LAUNCHES
    monkeypatch.setattr(timing._Replays, "us", lambda _: 44.0)
    with pytest.raises(AssertionError, match="no longer with launches"):
        measured(evict_bytes=4e4)


def scanned(step: Any, **settings: Any) -> timing.Result:
    """`timing.measure_scan` of twelve small writes."""
    given: dict[str, Any] = {"length": 12, "unroll": 4, "replays": 4, **settings}
    given.setdefault("launches", {"cache_write": 1})
    return timing.measure_scan(
        "scan",
        "tiny",
        step,
        empty,
        rows(3.0),
        lambda carry: check(3, carry),
        **given,
    )


def test_scan() -> None:
    assert scanned(cache_write).launches == scanned(cache_write, launches={}).launches == 12
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        scanned(WRONG["value"])
    with pytest.raises(ValueError, match="unroll"):
        scanned(cache_write, unroll=5)


def test_scan_with_large_temporaries() -> None:
    with pytest.raises(AssertionError, match="temporaries"):
        scanned(cache_write, max_temporaries=-1.0)


def test_launch_taken_out_of_the_loop() -> None:
    """XLA does so with a launch that repeats itself; it must not count as one of each step."""
    with pytest.raises(AssertionError, match="cache_write: expected 4 calls in a loop, got"):
        scanned(lambda cache, rows, slots: cache_write(empty(), rows, slots))


LOOP = """HloModule m

%body (p: (f32[4,100])) -> (f32[4,100]) {
  %a = f32[4,100]{1,0} custom-call(%p), custom_call_target="dsv4.op", api_version=X
  %b = f32[4,100]{1,0} custom-call(%a), custom_call_target="dsv4.op", api_version=X
}

ENTRY %main (p: f32[4,100]) -> f32[4,100] {
  %c = f32[4,100]{1,0} copy(%p)
}
"""


def test_an_op_of_xla_stays_in_the_loop() -> None:
    """Held back by the carry; without that XLA computes it once, before the loop."""

    def before_the_loop(op: Any) -> str:
        def run(carry: jax.Array, x: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, 50, lambda _, carry: op(carry, x), carry)

        args = jnp.zeros((4, 4)), jnp.zeros((4, 4), jnp.uint8)
        return jax.jit(run).lower(*args).compile().as_text().split("ENTRY")[1]

    def free(_: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sin(x.astype(jnp.float32))

    def kept(carry: jax.Array, x: jax.Array) -> jax.Array:
        return free(carry, x ^ timing.held(carry))

    assert "/sin" in before_the_loop(free) and "/sin" not in before_the_loop(kept)
    x = jnp.arange(16, dtype=jnp.uint8).reshape(4, 4)
    for bits in (0, 0x7FFFFFFF, 0xFFFFFFFF):
        assert not timing.held(jax.lax.bitcast_convert_type(jnp.uint32(bits), jnp.float32)[None])
    result = timing.measure(
        "xla",
        "tiny",
        kept,
        lambda i: (timing.filled(0xFF, (4, 4), jnp.float32), (x + i,)),
        lambda i, y: np.testing.assert_allclose(y, np.sin(np.asarray(x + i, np.float32)), 1e-5),
        target=None,
        launch_bytes=80.0,
        evict_bytes=0.0,
        **TINY,
    )
    assert result.us > 0


def test_program() -> None:
    timing.check_program(LOOP, "op", 2, 3)
    timing.check_program(LOOP, "op", 1, 3)
    unrolled = "ENTRY %main {\n" + '  custom_call_target="dsv4.op"\n' * 6 + "}\n"
    timing.check_program(unrolled, "op", 2, 3)
    for text, launches in ((LOOP, 3), (LOOP.replace("dsv4.op", "dsv4.other"), 2), (unrolled, 3)):
        with pytest.raises(AssertionError, match=f"expected {launches} calls"):
            timing.check_program(text, "op", launches, 3)
    with pytest.raises(AssertionError, match=r"copies an array \[4,100\]"):
        timing.check_program(LOOP.replace("custom-call(%p), ", "copy(%p)\n "), "op", 1, 3)


def test_handlers_called_again_is_not_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every call launched once more, straight away."""
    calls = iter(range(10**6))
    monkeypatch.setattr(
        timing.library, "launch_counts", lambda: {"dsv4.cache_write": (0, next(calls))}
    )
    with pytest.raises(AssertionError, match="not replayed"):
        measured()


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([(0, 0), (0, 0), (0, 6)], id="never-captured"),
        pytest.param([(0, 0), (0, 0), (3, 0)], id="fewer-than-asked"),
    ],
)
def test_captures_are_counted(
    monkeypatch: pytest.MonkeyPatch, counts: list[tuple[int, int]]
) -> None:
    """On a GPU: launches that XLA dropped, merged or left out of the graph."""
    seen = iter([*counts, *[counts[-1]] * 99])
    monkeypatch.setattr(timing.library, "launch_counts", lambda: {"dsv4.cache_write": next(seen)})
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")
    with pytest.raises(AssertionError, match="expected captures of 2"):
        timing._settle(lambda: None, {"cache_write": 2})


def test_json_line_and_table(tmp_path: Path) -> None:
    missed = dataclasses.replace(GOOD, case="b=128", ok=False)
    for result in (GOOD, missed):
        result.append(tmp_path / "gpu.jsonl")
    lines = (tmp_path / "gpu.jsonl").read_text(encoding="utf-8").splitlines()
    assert [timing.Result(**json.loads(line)) for line in lines] == [GOOD, missed]
    rows = timing.table([GOOD, missed]).splitlines()
    assert rows[0].split() == [
        *("case", "floor", "us", "time", "us", "fraction", "spread", "bar", "ok")
    ]
    assert rows[1].split() == [
        "op",
        "b=1",
        "1.500",
        "2.000",
        "0.750",
        "0.010",
        *"<= 2.5 us ok".split(),
    ]
    assert rows[2].endswith("MISSED")


def test_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BENCH_JSONL", raising=False)
    assert timing.default_path().parent == Path(timing.__file__).parent
    monkeypatch.setenv("BENCH_JSONL", str(tmp_path / "x.jsonl"))
    assert timing.default_path() == tmp_path / "x.jsonl"


@pytest.mark.parametrize(
    ("launch_bytes", "sets"), [(16e3, timing.MOST_SETS), (10e6, 12), (75e6, timing.FEWEST_SETS)]
)
def test_sets(launch_bytes: float, sets: int) -> None:
    assert timing.set_count(launch_bytes) == sets


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, E4M3, UE8M0, E2M1])
def test_poison_and_random_bytes(dtype: Any) -> None:
    ones = raw(timing.filled(0xFF, (3, 8), dtype))
    assert (ones == (0xF if dtype == E2M1 else np.iinfo(ones.dtype).max)).all()
    assert not raw(timing.filled(0, (3, 8), dtype)).any()
    values = timing.random_bytes(0, (3, 8), dtype)
    assert values.dtype == dtype and values.shape == (3, 8) and len(np.unique(raw(values))) > 4


def test_rmsnorm_bench_at_tiny_size() -> None:
    t, d, bench = 3, 64, bench_rmsnorm_nvfp4
    scale = jnp.float32(bench.STATIC_SCALE)
    timing.measure(
        "rmsnorm_nvfp4",
        "tiny",
        lambda _, x, weight: bench.rmsnorm_nvfp4(x, weight, bench.EPS, scale),
        lambda i: (timing.poisoned(bench.outputs(t, d)), bench.make_inputs(i, t, d)),
        lambda i, out: bench.check(out, *bench.make_inputs(i, t, d), scale),
        target="rmsnorm_nvfp4",
        launch_bytes=bench.launch_bytes(t, d),
        evict_bytes=0.0,
        **TINY,
    )
    x, weight = bench.make_inputs(0, t, d)
    wrong = bench.rmsnorm_nvfp4(x, weight * 2, bench.EPS, scale)
    with pytest.raises(AssertionError, match="CPU handler"):
        bench.check(wrong, x, weight, scale)


def test_cache_write_bench_at_tiny_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BENCH_JSONL", str(tmp_path / "x.jsonl"))
    bench_cache_write.measure("kv", "tiny", 2, 3, 5, evict_bytes=0.0, **TINY)
    assert json.loads((tmp_path / "x.jsonl").read_text())["case"] == "tiny"


@pytest.mark.parametrize("store", ["kv", "state", "index"])
def test_cache_write_check(store: str) -> None:
    """Of the right bytes, of a row that is missing, of one that is in a neighbour's place."""
    bench = bench_cache_write
    cache, (rows, slots) = (
        timing.poisoned(bench.struct(store, 2, 5)),
        bench.make_rows(store, 0, 2, 3, 5),
    )
    bench.check(store, bench.cache_write(cache, rows, slots), rows, slots)
    for wrong in (slots.at[1, 2].set(-1), slots[:, ::-1]):
        with pytest.raises(AssertionError, match="wrong"):
            bench.check(store, bench.cache_write(cache, rows, wrong), rows, slots)


def test_row_bytes() -> None:
    """The row of record: 583 bytes of keys; packed index keys."""
    assert bench_cache_write.row_bytes("kv") == 583
    assert bench_cache_write.row_bytes("index") == 68
    assert isinstance(bench_cache_write.struct("kv", 1, 2), KvRows)
    assert isinstance(bench_cache_write.struct("index", 1, 2), IndexRows)


def test_every_op_is_sanitized() -> None:
    assert sorted(sanitize.CASES) == library.targets()


def test_view_of_address() -> None:
    values = np.arange(64, dtype=np.float32)
    start = -values.ctypes.data % 64 // 4  # XLA copies what is not aligned
    view = sanitize.view_of_address(values.ctypes.data + 4 * start, (2, 8))
    np.testing.assert_array_equal(view, values[start : start + 16].reshape(2, 8))

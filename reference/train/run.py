"""The training run: schedule, evaluation on the way, exact resume."""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from reference.train import data, state
from reference.train.steps import (
    Knobs,
    State,
    init_state,
    make_evaluate,
    make_greedy,
    make_step,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All settings of a run; with the data and the code they determine its result.

    Attributes:
        steps: Steps in total; 0: as many as `train` finds to fit a time.
        rows, length: Rows of a batch and tokens of a row (a multiple of 128).
        long_length: Tokens of a row in the quantised phase, whose batches hold as many tokens.
        rate: Peak learning rate of every parameter.
        warmup, decay_from: Parts of the run; linear warm-up, constant, linear to zero.
        dropout: Until the quantised phase; half of it afterwards.
        sparse_from: From here on ratio-4 layers attend to the indexer's picks only.
        quantize_from: From here on everything passes through the released formats.
        nvfp4_every: In that phase every so many steps through the `nvfp4` preset; 0 is never.
        loop_rows: Rows of a batch in that phase that fall into loops.
        loop_decay: See `Knobs`.
        loop_copies: Most copies of a stretch in such a row.
        seed: Of weights, order, dropout and loops.
    """

    steps: int
    rows: int = 32
    length: int = 2048
    long_length: int = 4096
    rate: float = 4e-3
    warmup: float = 0.02
    decay_from: float = 0.45
    dropout: float = 0.12
    sparse_from: float = 0.2
    quantize_from: float = 0.6
    nvfp4_every: int = 4
    loop_rows: int = 1
    loop_decay: float = 0.5
    loop_copies: int = 12
    seed: int = 0

    def is_long(self, step: int) -> bool:
        """Whether a step belongs to the quantised phase."""
        return step >= self.quantize_from * self.steps

    def shape(self, step: int) -> tuple[int, int]:
        """Rows and tokens of the batch of a step, with the two that are only predicted."""
        if not self.is_long(step):
            return self.rows, self.length + 2
        return max(self.rows * self.length // self.long_length, 1), self.long_length + 2

    def phase(self, step: int) -> str:
        """The preset of a step."""
        if not self.is_long(step):
            return "bf16"
        if self.nvfp4_every and step % self.nvfp4_every == 0:
            return "nvfp4"
        return "official"

    def knobs(self, step: int) -> Knobs:
        """Rate, dropout and selection of a step."""
        at = step / max(self.steps, 1)
        up = min(1.0, (step + 1) / max(self.warmup * self.steps, 1))
        down = min(1.0, (1 - at) / (1 - self.decay_from))
        dropout = self.dropout * (1.0 if at < self.quantize_from else 0.5)
        return Knobs(
            jnp.float32(self.rate * up * down),
            jnp.float32(dropout),
            jnp.asarray(at >= self.sparse_from),
            jnp.float32(self.loop_decay),
        )

    def presets(self) -> dict[str, tuple[int, int]]:
        """Every preset that occurs, with the shape of its batches."""
        long = dataclasses.replace(self, steps=1, quantize_from=0).shape(0)
        found = {"bf16": (self.rows, self.length + 2)} if self.quantize_from > 0 else {}
        if self.quantize_from < 1:
            found |= {"official": long} | ({"nvfp4": long} if self.nvfp4_every else {})
        return found

    def batch(
        self, batches: data.Batches, step: int, own: data.OwnLoops | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and loop distances of a step, `[rows, length + 2]`.

        Rows with loops are made from the batch, or taken from `own` continuations.
        """
        tokens = batches[step]
        back = np.zeros_like(tokens)
        if self.is_long(step) and self.loop_rows:
            rng = np.random.default_rng((self.seed, 1, step))
            tokens = tokens.copy()
            n = self.loop_rows
            if own is None:
                tokens[:n], back[:n] = data.repeat_rows(tokens[:n], rng, self.loop_copies)
            else:
                tokens[:n], back[:n] = own.rows((n, tokens.shape[1]), rng)
        return tokens, back


@dataclasses.dataclass(frozen=True)
class Text:
    """The token file that `prepare` writes.

    Attributes:
        ids: By split, documents with BOS and EOS.
        repeats: How often each training document stands in an epoch.
        n_bytes: By split, UTF-8 bytes of each document.
    """

    ids: dict[str, list[np.ndarray]]
    repeats: list[int]
    n_bytes: dict[str, list[int]]

    @classmethod
    def load(cls, path: Path) -> "Text":
        """Reads the file."""
        with np.load(path) as file:
            ids, n_bytes = {}, {}
            for name in ("train", "dev", "held_out"):
                ids[name] = np.split(file[f"{name}_ids"], file[f"{name}_ends"][:-1])
                n_bytes[name] = file[f"{name}_bytes"].tolist()
            return cls(ids, file["train_repeats"].tolist(), n_bytes)


def windows(documents: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents cut into rows of `length + 2`; the first token of a row is given, not predicted.

    Returns:
        Rows padded with EOS, and which targets `[rows, length]` count: each token of a text once,
        without its EOS.
    """
    rows, counts = [], []
    for ids in documents:
        for start in range(0, len(ids) - 2, length):
            part = ids[start : start + length + 2].astype(np.int32)
            targets = min(len(part) - 1, length, len(ids) - 2 - start)
            rows.append(np.pad(part, (0, length + 2 - len(part)), constant_values=data.EOS))
            counts.append(np.arange(length) < targets)
    return np.stack(rows), np.stack(counts)


class Ahead:
    """A jitted function that is compiled in a thread, by a call with arguments that do not matter.

    Not by `lower().compile()`: a second function compiled so was once refused by JAX 0.10 and 0.11
    ("compiled for 549 inputs but called with 439"); the cause was not found.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        make: Callable[..., Any],
        *dummies: Any,
        memory_saver: bool = False,
    ) -> None:
        self._future = pool.submit(self._compile, make, dummies, memory_saver)

    @staticmethod
    def _compile(make: Callable[..., Any], dummies: Any, memory_saver: bool) -> tuple[Any, bool]:
        for remat in (False, True):
            function = make(remat) if memory_saver else make()
            arguments = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dummies)
            try:
                jax.block_until_ready(function(*arguments))
            except jax.errors.JaxRuntimeError as error:
                if remat or not memory_saver or "RESOURCE_EXHAUSTED" not in str(error):
                    raise
            else:
                return function, remat
        raise AssertionError

    def wait(self) -> bool:
        """Until the function is compiled; whether it recomputes layers to save memory."""
        return self._future.result()[1]

    def __call__(self, *arguments: Any) -> Any:
        """Waits for the compilation the first time."""
        return self._future.result()[0](*arguments)


def _pace(
    function: Ahead, shape: tuple[int, int], plan: Plan, current: State, tables: Any
) -> float:
    """Seconds of a step, from ten on a copy of the state."""
    tokens, copy = np.zeros(shape, np.int32), jax.tree.map(jnp.copy, current)
    knobs = plan.knobs(0)
    begin = 0.0
    for i in range(12):
        if i == 2:
            jax.block_until_ready(copy)
            begin = time.monotonic()
        copy, _ = function(copy, tables, tokens, tokens, knobs)
    jax.block_until_ready(copy)
    return (time.monotonic() - begin) / 10


def _steps_in(seconds: float, plan: Plan, pace: dict[str, float]) -> int:
    """How many steps fit, at a measured pace and with a twentieth for evaluation."""
    part = plan.quantize_from
    often = 1 / plan.nvfp4_every if plan.nvfp4_every else 0.0
    late = (1 - often) * pace.get("official", 0) + often * pace.get("nvfp4", 0)
    return int(0.95 * seconds / (part * pace.get("bf16", 0) + (1 - part) * late))


def _peak_memory() -> int:
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", 0))


def _like(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


class Evaluator:
    """Bits per byte in windows of a training length."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        config: dict[str, Any],
        presets: Sequence[str],
        text: Text,
        shape: tuple[int, int],
        like: tuple[Any, Any],
    ) -> None:
        self.text, (self.rows, self.length) = text, (shape[0], shape[1] - 2)
        spec = jax.ShapeDtypeStruct(shape, jnp.int32)
        self.functions = {
            preset: Ahead(pool, functools.partial(make_evaluate, config, preset), *like, spec)
            for preset in presets
        }

    def __call__(self, preset: str, weights: Any, tables: Any, split: str) -> dict[str, float]:
        """Bits per byte and MTP agreement of a split."""
        tokens, counts = windows(self.text.ids[split], self.length)
        extra = -len(tokens) % self.rows
        tokens = np.pad(tokens, ((0, extra), (0, 0)))
        counts = np.pad(counts, ((0, extra), (0, 0)))
        function, bits, agree, pairs = self.functions[preset], 0.0, 0, 0
        for i in range(0, len(tokens), self.rows):
            b, a = function(weights, tables, tokens[i : i + self.rows])
            here = counts[i : i + self.rows]
            bits += float(np.sum(np.asarray(b, np.float64) * here))
            agree += int(np.sum(np.asarray(a) & here[:, 1:]))
            pairs += int(here[:, 1:].sum())
        total = sum(self.text.n_bytes[split])
        return {"bits_per_byte": bits / total, "mtp_agreement": agree / pairs}


def loops(ids: np.ndarray, start: int) -> int:
    """Rows whose continuation holds a loop: a period of up to 32 four times in a row."""
    found = 0
    for row in ids:
        made = row[start:].tolist()
        made = made[: made.index(data.EOS)] if data.EOS in made else made
        found += data.longest_loop(made)[0] >= 4
    return found


def train(
    config: dict[str, Any],
    plan: Plan,
    text: Text,
    out: Path,
    *,
    resume: Path | None = None,
    weights: Path | None = None,
    own_loops: Path | None = None,
    until: int | None = None,
    seconds: float = 0,
    save_every: int = 0,
    log_every: int = 20,
    evaluations: int = 10,
    greedy: bool = True,
    say: Callable[[str], None] = print,
) -> tuple[State, Any]:
    """Runs the plan and writes `metrics.jsonl`, states and the weights into `out`.

    Args:
        config: Official config.
        plan: Settings.
        text: Tokens.
        out: Folder.
        resume: A state to go on from: exact (`*.state`) or packed (`*.packed`).
        weights: Folder of `master-N.safetensors`: start from these, with moments of zero.
        own_loops: File for `data.OwnLoops`.
        until: Stop before this step and save the exact state.
        seconds: With `plan.steps` 0: when the last step shall end, from the call on.
        save_every: Save the state, exactly and packed, every so many steps.
        log_every: Steps between two lines.
        evaluations: How often the dev split is evaluated.
        greedy: Count loops in greedy continuations of dev texts, too.
        say: Gets every line of progress.

    Returns:
        The last state and the tables of the hash layers.
    """
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    # Through numpy: a weakly typed scalar would make the first step compile twice.
    start = init_state(config, plan.seed)
    current, tables = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), start)
    if weights is not None:
        known = read_weights(weights)
        tables = {name: jnp.asarray(known[name]) for name in tables}
        current = current._replace(weights={n: jnp.asarray(known[n]) for n in current.weights})
    first = 0
    if resume is not None:
        load = state.load_packed if resume.suffix == ".packed" else state.load_exact
        current = load(current, resume)
        first = int(current.step)
    batches = {
        shape: data.Batches(text.ids["train"], text.repeats, *shape, plan.seed)
        for shape in set(plan.presets().values())
    }
    own = None if own_loops is None else data.OwnLoops(own_loops)

    def log(kind: str, step: int, **values: Any) -> None:
        line = {"kind": kind, "step": step, "seconds": time.monotonic() - begin, **values}
        with (out / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
            metrics.write(json.dumps(line) + "\n")
        short = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
        say(" ".join(f"{k}={v}" for k, v in short.items()))

    like = _like((current, tables))

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        steps: dict[str, Ahead] = {}
        for preset, shape in plan.presets().items():
            spec = jax.ShapeDtypeStruct(shape, jnp.int32)
            make = functools.partial(make_step, config, preset, plan.seed)
            arguments = (*like, spec, spec, _like(plan.knobs(0)))
            steps[preset] = Ahead(pool, make, *arguments, memory_saver=True)
        for preset, function in steps.items():  # all, so that a late one cannot stop the run
            log("compiled", first, preset=preset, remat=function.wait(), memory=_peak_memory())
        if plan.steps == 0:
            pace = {p: _pace(steps[p], s, plan, current, tables) for p, s in plan.presets().items()}
            left = seconds - (time.monotonic() - begin)
            plan = dataclasses.replace(plan, steps=_steps_in(left, plan, pace))
            log("pace", first, **pace)
        shape = plan.shape(first)
        log("plan", first, **dataclasses.asdict(plan), epoch=batches[shape].batches_per_epoch)
        stop = plan.steps if until is None else until
        evaluate: dict[str, Evaluator] = {}
        if evaluations:
            names = ("official", "nvfp4", "master") if plan.quantize_from < 1 else ("master",)
            arguments = (like[0].weights, like[1])
            for which, at in ((names, plan.steps), (("bf16",), 0)):
                made = Evaluator(pool, config, which, text, plan.shape(at), arguments)
                evaluate |= dict.fromkeys(which, made)
        rows = np.zeros((0, 0), np.int32)
        continued: Ahead | None = None
        if greedy:
            rows = greedy_rows(text.ids["dev"], 16, 256, 512)
            spec = jax.ShapeDtypeStruct(rows.shape, jnp.int32)
            make = functools.partial(make_greedy, config, "official")
            at = jax.ShapeDtypeStruct((), jnp.int32)
            continued = Ahead(pool, make, like[0].weights, like[1], spec, at)

        waiting: list[tuple[int, Any]] = []
        evaluate_at = {
            round(plan.steps * (i + 1) / max(evaluations, 1)) for i in range(evaluations)
        }

        def flush() -> None:
            for at, parts in waiting:
                values = {k: np.asarray(v) for k, v in parts.items()}
                load = values.pop("load")
                log(
                    "train",
                    at,
                    **{k: float(v) for k, v in values.items()},
                    load_max=float(load.max()),
                    load_min=float(load.min()),
                )
                if not np.isfinite(values["ce"]):
                    raise FloatingPointError(f"step {at}: the loss is {values['ce']}")
            waiting.clear()

        for step in range(first, stop):
            tokens, back = plan.batch(batches[plan.shape(step)], step, own)
            function = steps[plan.phase(step)]
            current, parts = function(current, tables, tokens, back, plan.knobs(step))
            if step % log_every == 0 or step == stop - 1:
                flush()
                waiting.append((step, parts))
            if step + 1 in evaluate_at:
                flush()
                preset = "official" if plan.is_long(step) else "bf16"
                found = evaluate[preset](preset, current.weights, tables, "dev")
                log("dev", step + 1, preset=preset, **found)
                if continued is not None and preset == "official":
                    made = continued(current.weights, tables, rows, jnp.int32(256))
                    log("greedy", step + 1, loops=loops(np.asarray(made), 256), of=len(rows))
            if save_every and (step + 1) % save_every == 0:
                state.save_exact(current, out / "last.state")
                state.save_packed(current, out / "last.packed")
        flush()
        state.save_exact(current, out / ("end.state" if stop == plan.steps else "last.state"))
        if stop == plan.steps:
            save_weights(current.weights, tables, out)
            if evaluations:
                for split in ("dev", "held_out"):
                    for preset, evaluator in evaluate.items():
                        found = evaluator(preset, current.weights, tables, split)
                        log("final", stop, preset=preset, split=split, **found)
    return current, tables


def greedy_rows(documents: list[np.ndarray], count: int, prompt: int, new: int) -> np.ndarray:
    """Prompts of `prompt` tokens from evenly spread places, `[count, prompt + new]`."""
    stream = np.concatenate(documents).astype(np.int32)
    starts = np.linspace(0, len(stream) - prompt - 1, count).astype(int)
    rows = np.zeros((count, prompt + new), np.int32)
    for row, start in zip(rows, starts, strict=True):
        row[:prompt] = stream[start : start + prompt]
    return rows


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """The FP32 weights of a run, from all its `master-N.safetensors`.

    Raises:
        ValueError: there are none.
    """
    files = sorted(folder.glob("master-*.safetensors"))
    if not files:
        raise ValueError(f"train: {folder} has no master-N.safetensors")
    return {name: w for file in files for name, w in load_file(file).items()}


SHARD = 15 * 2**20


def save_weights(weights: Any, tables: Any, out: Path) -> None:
    """FP32 weights and tables in files of at most 15 MiB, `master-N.safetensors`."""
    parts: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, w in sorted({**weights, **tables}.items()):
        array = np.asarray(w)
        if size + array.nbytes > SHARD:
            parts.append({})
            size = 0
        parts[-1][name] = array
        size += array.nbytes
    for old in out.glob("master-*.safetensors"):
        old.unlink()
    for i, shard in enumerate(parts):
        save_file(shard, out / f"master-{i}.safetensors")

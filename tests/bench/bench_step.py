"""Time, memory and compilation of one layer at full size with random weights, and of whole stacks.

`python -m tests.bench.bench_step --layers --compile` on the machine to be measured. One JSON line
per figure; floors of `--layers` are computed from bytes (performance.md's rule), ceilings are those
of the H200 it measured. Compilation is that of the loop which `generate` runs.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dsv4_jax
from dsv4_jax import DeepseekV4, ModelConfig, Precision
from dsv4_jax.bench.floor import cut, weight_bytes
from dsv4_jax.bench.measure import Loop
from dsv4_jax.bench.weights import random_params
from dsv4_jax.checkpoint.names import expected_tree

READ_CEILING = 4.39e12  # bytes/s, one H200, 2026-11-22


def emit(**figures: Any) -> None:
    """One JSON line."""
    print(json.dumps(figures), flush=True)


def bench_layer(size: str, layer: int, preset: str, tokens: int, context: int) -> None:
    """One layer: compile, memory, median time."""
    config = cut(getattr(ModelConfig, size)(), [layer], score_routed=True)
    model = DeepseekV4(config, Precision.preset(preset))
    params = random_params(config, model.precision)
    decode = tokens <= 128
    b, t = (tokens, 1) if decode else (1, tokens)
    cache = model.init_cache(b, context + 64 + t)
    start = jnp.full(b, context if decode else 0, jnp.int32)
    cache = dataclasses.replace(cache, lengths=start)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (b, t)), jnp.int32)
    streams = jax.random.normal(jax.random.key(1), (b, t, 4, config.hidden_size)).astype(
        jnp.bfloat16
    )

    def run(params: Any, streams: Any, ids: Any, cache: Any) -> Any:
        variables = {"params": params}
        return model.apply(variables, streams, ids, cache, layer=0, method="layer")

    jitted = jax.jit(run, donate_argnums=3)
    begin = time.perf_counter()
    compiled = jitted.lower(params, streams, ids, cache).compile()
    compile_s = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    out, cache = compiled(params, streams, ids, cache)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        out, cache = compiled(params, streams, ids, cache)
        jax.block_until_ready(out)
        times.append(time.perf_counter() - begin)
    us = statistics.median(times[1:]) * 1e6
    floor_us = sum(weight_bytes(config, model.precision, 0, tokens).values()) / READ_CEILING * 1e6
    emit(
        what=f"{size} layer {layer} ({config.layer_kind(0).name}), {preset}",
        tokens=tokens,
        context=context if decode else 0,
        us=round(us),
        floor_us=round(floor_us, 1),
        fraction=round(floor_us / us, 4),
        temporaries_mb=round(memory.temp_size_in_bytes / 1e6) if memory else None,
        compile_s=round(compile_s, 1),
        finite=bool(jnp.isfinite(out.astype(jnp.float32)).all()),
    )


def bench_compile(size: str, preset: str) -> None:
    """`decode_steps` of all layers from shapes alone: compiled, then from the persistent cache."""
    config = getattr(ModelConfig, size)()
    model = DeepseekV4(config, Precision.preset(preset))
    params = expected_tree(config, model.precision, False)
    cache = jax.eval_shape(lambda: model.init_cache(1, 4096))
    seconds: list[float] = []
    for _ in range(2):
        jax.clear_caches()
        seconds.append(Loop(model, params, cache).compile_s)
    emit(
        what=f"{size}, {config.num_hidden_layers} layers, {preset}",
        compile_s=round(seconds[0], 1),
        from_cache_s=round(seconds[1], 1),
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", action="store_true", help="time single layers at full size")
    parser.add_argument("--compile", action="store_true", help="compile whole stacks")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    emit(jax=jax.__version__, device=device.device_kind, package=dsv4_jax.__version__)
    if arguments.layers:
        for preset in ("official", "nvfp4"):
            for layer in (2, 3):
                bench_layer("flash", layer, preset, tokens=1, context=4096)
            bench_layer("flash", 2, preset, tokens=256, context=0)
    if arguments.compile:
        with tempfile.TemporaryDirectory(prefix="dsv4-compile.") as directory:
            jax.config.update("jax_compilation_cache_dir", directory)
            for preset in ("official", "nvfp4"):
                bench_compile("flash", preset)


if __name__ == "__main__":
    main()

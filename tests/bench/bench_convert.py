"""``dsv4 convert`` and loading at full size: two layers with V4-Flash's shapes, random weights.

`python -m tests.bench.bench_convert --dir DIR` needs about 30 GB there, and removes them again. One
JSON line per figure. The disk's own rate is that of writing and syncing as many bytes as the
conversion writes, just before it. Peak memory is VmHWM of a process that does nothing else.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_jax.checkpoint.export import outputs_of, target_config
from dsv4_jax.checkpoint.names import parameters, target_format
from dsv4_jax.checkpoint.read import Reader
from dsv4_jax.checkpoint.write import CHUNK_BYTES, Output, header
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import PRESETS
from tests.support import tiny

SHARD_BYTES = 4 * 10**9

CONVERT = """
import resource, sys
from dsv4_jax.cli import app
try:
    app(["convert", *sys.argv[1:], "--json"])
except SystemExit as end:
    assert not end.code, end.code
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime)
"""

LOAD = """
import json, sys, time
import jax, numpy as np
from dsv4_jax.checkpoint import from_checkpoint, place
from dsv4_jax.checkpoint.names import tree_bytes

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

peak = 0
class Placer(place.Placer):
    def _put(self, host):
        global peak
        array = super()._put(host)
        peak = max(peak, self._pending_bytes)
        return array

from dsv4_jax.checkpoint import load
load.Placer = Placer
jax.numpy.zeros(8).block_until_ready()
before, start = status("VmRSS"), time.perf_counter()
model, params = from_checkpoint(sys.argv[1], progress=False)
jax.block_until_ready(params)
seconds = time.perf_counter() - start
held, top = tree_bytes(params), status("VmHWM")
# Device memory is host memory here: what the peak has beyond the weights and the process itself is
# staging, scratch of conversions, and programs.
print(json.dumps({
    "seconds": round(seconds, 1), "params_mib": held >> 20, "staged_mib": peak >> 20,
    "rss_before_mib": before >> 20, "peak_rss_mib": top >> 20,
    "peak_beyond_weights_mib": (top - before - held) >> 20,
}))
"""


def emit(**figures: Any) -> None:
    """One JSON line."""
    print(json.dumps(figures), flush=True)


def two_layers() -> tuple[ModelConfig, dict[str, Any]]:
    """V4-Flash cut to a CSA layer that routes by token and an HCA layer that routes by score."""
    flash = ModelConfig.flash()
    config = dataclasses.replace(
        flash,
        num_hidden_layers=2,
        num_hash_layers=1,
        num_nextn_predict_layers=0,
        compress_ratios=(4, 128),
    )
    data = tiny.official()[0]
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k in data}
    data |= fields | {"compress_ratios": list(config.compress_ratios)}
    data["rope_scaling"]["factor"] = config.rope_factor
    return config, data


def _bytes(output: Output, noise: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Data of a tensor: random codes; scales and values of sizes that weights have."""
    if output.dtype == "I64":
        yield rng.integers(0, 256, output.shape).view(np.uint8)
        return
    if output.dtype == "F8_E8M0":
        # model.md 9.3: what samples of V4-Pro's experts show.
        yield rng.integers(127 - 12, 127 - 6, output.shape, dtype=np.uint8)
        return
    for start in range(0, output.nbytes, CHUNK_BYTES):
        count = min(CHUNK_BYTES, output.nbytes - start)
        first = int(rng.integers(0, len(noise) - count + 1) // 8 * 8)
        part = noise[first : first + count]
        if output.dtype == "F8_E4M3":
            part = part & 0xBF  # never NaN
        elif output.dtype == "BF16":
            part = ((part.view(np.uint16) & 0x80FF) | 0x3C00).view(np.uint8)
        elif output.dtype == "F32":
            part = ((part.view(np.uint32) & 0x80FFFFFF) | 0x3C000000).view(np.uint8)
        yield part


def write_official(path: Path) -> int:
    """The checkpoint; its bytes."""
    config, data = two_layers()
    table = parameters(config, False)
    data = target_config(data, table, PRESETS["official"])
    path.mkdir()
    (path / "config.json").write_text(json.dumps(data))
    outputs = [
        output
        for parameter in table
        for name in parameter.names()
        for output in outputs_of(parameter, name, target_format(parameter, PRESETS["official"]))
    ]
    shards: list[list[Output]] = [[]]
    for output in outputs:
        if sum(o.nbytes for o in shards[-1]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(output)
    rng = np.random.default_rng(0)
    noise = np.frombuffer(rng.bytes(64 * 2**20), np.uint8)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = tiny.shard_name(i, len(shards))
        weight_map |= dict.fromkeys([output.name for output in shard], file)
        with (path / file).open("wb") as stream:
            stream.write(header(shard))
            for output in shard:
                for part in _bytes(output, noise, rng):
                    stream.write(part.data)
            stream.flush()
            os.fsync(stream.fileno())
    tiny.write_index(path, weight_map)
    return sum(output.nbytes for output in outputs)


def disk_rate(directory: Path, nbytes: int) -> float:
    """MB/s of writing and syncing."""
    block = np.random.default_rng(1).bytes(CHUNK_BYTES)
    path = directory / "rate"
    start = time.perf_counter()
    with path.open("wb") as stream:
        for _ in range(nbytes // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return nbytes / 1e6 / seconds


def check_experts(source: Path, target: Path) -> int:
    """Codes equal byte by byte, every scale exactly the power of two it was; how many experts."""
    value = tiny.e4m3(np.arange(256, dtype=np.uint8))
    count = 0
    with Reader(source) as a, Reader(target) as b:

        def read(reader: Reader, name: str) -> np.ndarray:
            tensor = reader.tensors[name]
            dtype = np.float32 if tensor.dtype == "F32" else np.uint8
            host = np.empty(tensor.shape, dtype)
            reader.read_into(tensor, host)
            return host

        for name in a.tensors:
            if ".ffn.experts." not in name or not name.endswith(".weight"):
                continue
            if not np.array_equal(read(a, name), read(b, name)):
                raise AssertionError(f"{name}: codes differ")
            found = value[read(b, f"{name}_scale")] * float(read(b, f"{name}_scale_2"))
            scale = read(a, f"{name.removesuffix('weight')}scale").astype(np.int32)
            if not np.array_equal(found, np.ldexp(1.0, scale - 127).repeat(2, 1)):
                raise AssertionError(f"{name}: scales differ")
            count += 1
    return count


def run(code: str, *arguments: str) -> list[str]:
    """Lines that a process of its own prints."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return result.stdout.splitlines()


def main() -> None:
    """The whole measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--to", nargs="*", default=["nvfp4_experts", "nvfp4"])
    parser.add_argument("--no-load", action="store_true")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        start = time.perf_counter()
        nbytes = write_official(work / "official")
        emit(what="source", bytes=nbytes, seconds=round(time.perf_counter() - start, 1))
        for preset in options.to:
            target = work / preset
            rate = disk_rate(work, nbytes)
            text, peak, cpu = run(CONVERT, str(work / "official"), str(target), "--to", preset)
            fields = json.loads(text)
            speed = fields["written_bytes"] / 1e6 / fields["seconds"]
            emit(
                what=f"convert --to {preset}",
                bytes=fields["written_bytes"],
                seconds=round(fields["seconds"], 1),
                mb_per_s=round(speed),
                disk_mb_per_s=round(rate),
                disk_mb_per_s_after=round(disk_rate(work, nbytes)),
                cpu_seconds=round(float(cpu), 1),
                load_average=os.getloadavg()[0],
                peak_rss_mib=math.ceil(int(peak) / 1024),
                lossy=len(fields["lossy"]),
            )
            emit(what="experts bitwise", experts=check_experts(work / "official", target))
            shutil.rmtree(target) if options.no_load or preset != options.to[0] else None
        if not options.no_load:
            for name in ("official", options.to[0]):
                (text,) = run(LOAD, str(work / name))
                emit(what=f"load {name}", **json.loads(text))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()

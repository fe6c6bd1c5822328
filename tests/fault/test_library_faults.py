"""The compiled library where it is missing, foreign, moved, reloaded or shared by threads.

Names are rows of the acceptance list, part E. The rest of E3 and E4 is in the C++ tests; E7 needs
two GPUs and E10 one.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import dsv4_jax
from dsv4_jax import cli, env, library
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.rmsnorm_nvfp4 import rmsnorm_nvfp4
from dsv4_jax.quant import bits
from dsv4_jax.quant.kv import KvRows
from dsv4_jax.typing import E4M3, UE8M0
from tests.support.install import read_only_copy
from tests.support.models import three_layers
from tests.support.official import TINY

ROOT = Path(__file__).parents[2]
THREADS = 8
STEPS = 6  # past the first window that the CSA layer closes

# What a child process prints last; the tests compare it with the same call made here.
OPS = "from tests.fault.test_library_faults import *; show(op_digests())"
STEP = "from tests.fault.test_library_faults import *; show(op_digests() | step_digests())"
DSV4 = "from dsv4_jax.cli import app; app()"


def digest(tree: Any) -> str:
    """Bytes, dtypes and shapes of all leaves."""
    text = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        text.update(f"{leaf.dtype} {leaf.shape} ".encode() + leaf.tobytes())
    return text.hexdigest()


def show(digests: dict[str, str]) -> None:
    """For a child process: where the package came from, and its results."""
    print(json.dumps({"file": dsv4_jax.__file__, "library": library._ffi.__file__, **digests}))


def op_digests(seed: int = 0, tokens: int = 3) -> dict[str, str]:
    """Both ops on fixed inputs without NaN."""
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.standard_normal((tokens, 64)).astype(np.float32)).astype(jnp.bfloat16)
    weight = jnp.linspace(0.5, 2, 64, dtype=jnp.float32).astype(jnp.bfloat16)
    codes = random.integers(0, 120, (2, 16, 64)).astype(np.uint8)

    def store(codes: np.ndarray) -> KvRows:
        return KvRows(
            bits.from_byte_view(jnp.asarray(codes), E4M3),
            bits.from_byte_view(jnp.asarray(codes[..., :1]), UE8M0),
            jnp.asarray(codes[..., :8]).astype(jnp.bfloat16),
        )

    # The platform's default integer, so int64 with JAX_ENABLE_X64; the last row is dropped.
    slots = jnp.array([[9 - i for i in range(tokens)], [*range(1, tokens), 10]])
    cache, rows = store(codes[:, :10]), store(codes[:, -tokens:])
    return {
        "dynamic scale": digest(rmsnorm_nvfp4(x, weight, 1e-6)),
        "static scale": digest(rmsnorm_nvfp4(x, weight, 1e-6, jnp.float32(0.01))),
        "cache_write": digest(cache_write(cache, rows, slots)),
    }


def step_digests(first: int = 3) -> dict[str, str]:
    """Logits and cache of a few decode steps of a three-layer model."""
    model, params = three_layers()
    cache = model.init_cache(2, 64)
    logits: list[jax.Array] = []
    for step in range(STEPS):
        out, cache = dsv4_jax.decode_step(model, params, [first + step, first + 7 * step], cache)
        logits.append(out)
    return {"logits": digest(logits), "cache": digest(cache)}


def run(
    code: str,
    *arguments: str,
    options: tuple[str, ...] = (),
    path: str = str(ROOT),
    **variables: str | None,
) -> subprocess.CompletedProcess[str]:
    """Python with ``-c code`` and the packages under ``path``: the checkout's by default."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DSV4_", "JAX_", "PYTHON"))
    }
    changes = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "COLUMNS": "80", **variables}
    for name, value in changes.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    return subprocess.run(
        [sys.executable, "-B", "-P", *options, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def shown(process: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What `show` printed, without the files."""
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])
    return {name: value for name, value in found.items() if name not in ("file", "library")}


@pytest.fixture(scope="module")
def ops() -> dict[str, str]:
    return op_digests()


@pytest.fixture(scope="module")
def step(ops: dict[str, str]) -> dict[str, str]:
    return ops | step_digests()


# E1: no CUDA device. An empty CUDA_VISIBLE_DEVICES hides those of a machine that has some.


@pytest.mark.parametrize("platforms", ["cpu", None], ids=["chosen", "found"])
def test_E1_cpu_works(ops: dict[str, str], platforms: str | None) -> None:
    assert shown(run(OPS, JAX_PLATFORMS=platforms, CUDA_VISIBLE_DEVICES="")) == ops


@pytest.mark.parametrize("options", [(), ("-O",)], ids=["plain", "optimised"])
def test_E1_generate_says_why(options: tuple[str, ...]) -> None:
    """JAX 0.10 to 0.12 has a bare assertion there, which ``-O`` turns into an AttributeError."""
    arguments = ["generate", "--checkpoint", str(TINY), "--ids", "5 6 7"]
    platform = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    process = run(DSV4, *arguments, options=options, **platform)
    assert (process.returncode, process.stdout) == (2, "")
    note, error = process.stderr.splitlines()
    assert note.startswith("note: ") and error.startswith("error: no device: ")
    assert re.search(r"\bcuda\b", error, re.IGNORECASE)


def test_E1_env_says_why() -> None:
    process = run(DSV4, "env", JAX_PLATFORMS="cuda", CUDA_VISIBLE_DEVICES="")
    assert process.returncode == 0, process.stderr
    fields = _fields(process.stdout)
    assert re.match(r"none: .*\bcuda\b", fields["devices"], re.IGNORECASE)
    assert fields["JAX_PLATFORMS"] == "cuda"


# E2: not built.

MISSING = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "dsv4_jax._ffi":
            raise {error}

sys.meta_path.insert(0, Missing())
try:
    import dsv4_jax
except ImportError as error:
    print(type(error).__name__, error)
import reference.model
print(reference.model.forward.__name__, "dsv4_jax.library" in sys.modules)
"""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        pytest.param(
            "ModuleNotFoundError(f'No module named {name!r}', name=name)",
            "No module named 'dsv4_jax._ffi'",
            id="not-built",
        ),
        pytest.param(
            "ImportError('libstdc++.so.6: version `GLIBCXX_3.4.32` not found')",
            "GLIBCXX_3.4.32",
            id="not-loadable",
        ),
    ],
)
def test_E2_library_missing(error: str, reason: str) -> None:
    process = run(MISSING.replace("{error}", error))
    assert process.returncode == 0, process.stderr
    message, reference = process.stdout.splitlines()
    assert message.startswith("ImportError dsv4_jax: the compiled library dsv4_jax._ffi cannot be")
    assert reason in message
    assert "`pip install .`" in message
    assert "reference/ works without it" in message
    assert "circular" not in message
    assert reference == "forward False"


# E3: what a build says of itself; the handlers' own words are tested in C++ and on a GPU.


def test_E3_every_target_is_registered_on_both_platforms() -> None:
    """Also where the library has no CUDA code; its handlers then say so."""
    assert library.targets()
    for debug in (False, True):
        handlers = library._ffi.registrations(debug)
        assert sorted(handlers["cpu"]) == sorted(handlers["CUDA"]) == library.targets()
    assert sorted(library.launch_counts()) == library.targets()


def test_E3_build_info_is_consistent() -> None:
    info = library.build_info()
    assert info["version"] == dsv4_jax.__version__
    assert info["abi"] == library.ABI
    assert re.fullmatch(r"\d+\.\d+(\.\d+)*", info["jaxlib"])
    archs = [arch for arch in info["cuda_archs"].split(", ") if arch]
    assert all(re.fullmatch(r"sm_\d+a", arch) for arch in archs)
    assert bool(archs) == (info["cuda_runtime"] >= 13000)
    if not archs:
        assert info["cuda_runtime"] == library.cuda_driver() == 0


def test_E3_env_of_a_build_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    info = library.build_info() | {"cuda_archs": "", "cuda_runtime": 0}
    monkeypatch.setattr(library, "build_info", lambda: info)
    lines = env.report()
    assert (lines["library archs"], lines["CUDA runtime"]) == ("CPU only", "none")


# E5: the library's headers against the installed jaxlib, and its version against the code's.

BUILT = {"jaxlib": "0.10.2", "version": dsv4_jax.__version__, "abi": library.ABI}


@pytest.mark.parametrize(
    "installed", ["0.10.0", "0.10.2", "0.10.99", "0.11.0", "0.12.0.1", "1.0.0"]
)
def test_E5_runtime_not_older_than_the_headers(installed: str) -> None:
    """Patch releases keep the headers."""
    library.check_versions(BUILT, installed)


@pytest.mark.parametrize(
    ("changed", "installed", "told"),
    [
        pytest.param({"jaxlib": "0.11.0"}, "0.10.2", ("0.11.0", "0.10.2"), id="minor"),
        pytest.param({"jaxlib": "0.10.2"}, "0.9.7", ("0.10.2", "0.9.7"), id="two-digits"),
        pytest.param({"jaxlib": "1.0.0"}, "0.99.1", ("1.0.0", "0.99.1"), id="major"),
        pytest.param({"version": "0.1.0"}, "0.10.2", ("0.1.0", dsv4_jax.__version__), id="version"),
        pytest.param({"abi": 999}, "0.10.2", ("abi 999", f"abi {library.ABI}"), id="abi"),
    ],
)
def test_E5_foreign_library(changed: dict[str, Any], installed: str, told: tuple[str, str]) -> None:
    with pytest.raises(ImportError) as error:
        library.check_versions(BUILT | changed, installed)
    for text in (*told, "pip install ."):
        assert text in str(error.value)


FOREIGN = """
import sys, types, jax

def must_not(*_, **__):
    raise SystemExit("registered")

fake = types.ModuleType("dsv4_jax._ffi")
fake.build_info = lambda: {"jaxlib": "99.1.0", "version": "?", "abi": -1}
fake.registrations = jax.ffi.register_ffi_target = fake.set_sync = must_not
sys.modules["dsv4_jax._ffi"] = fake
import dsv4_jax
"""


def test_E5_refused_before_registration() -> None:
    process = run(FOREIGN)
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert last.startswith("ImportError: dsv4_jax: the library was built with the FFI headers")
    assert "99.1.0" in last
    assert version("jaxlib") in last


# E6: imported again.

AGAIN = """
import importlib, os, sys
from tests.fault.test_library_faults import *

before = op_digests()
assert importlib.import_module("dsv4_jax.library") is library
importlib.reload(library)
importlib.reload(library)
for name in [name for name in sys.modules if name.partition(".")[0] == "dsv4_jax"]:
    del sys.modules[name]
import dsv4_jax
from dsv4_jax import library as second
assert second is not library
jax.clear_caches()
assert op_digests() == before
show(before)
"""

FORKED = """
import importlib, os, sys
from tests.fault.test_library_faults import *

children = []
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        importlib.reload(library)
        show(op_digests())
        sys.stdout.flush()
        os._exit(0)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
assert codes == [0, 0], codes
show(op_digests())
"""

SPAWNED = """
import multiprocessing
from tests.fault.test_library_faults import *

with multiprocessing.get_context("spawn").Pool(2) as pool:
    results = pool.map(op_digests, [0, 0])
assert results[0] == results[1] == op_digests()
show(results[0])
"""


@pytest.mark.parametrize(
    ("code", "shows"),
    [
        pytest.param(AGAIN, 1, id="again"),
        pytest.param(FORKED, 3, id="fork"),
        pytest.param(SPAWNED, 1, id="spawn"),
    ],
)
def test_E6_imported_again(ops: dict[str, str], code: str, shows: int) -> None:
    """No registration collides, and what is registered still works."""
    process = run(code)
    assert shown(process) == ops
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(lines) == shows
    assert all(ops.items() <= line.items() for line in lines)


# E8: threads.


def test_E8_ops_in_threads() -> None:
    """The first calls, of a shape that no other test uses, compile at the same time."""
    seeds = [*range(THREADS)] * 4
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(op_digests, seeds, [7] * len(seeds)))
    assert found == [op_digests(seed, 7) for seed in seeds]
    assert len({str(digests) for digests in found}) == THREADS


@pytest.mark.slow
def test_E8_decode_steps_in_threads() -> None:
    """Every thread has a cache of its own."""
    firsts = [*range(2, 2 + THREADS)]
    serial = [step_digests(first) for first in firsts]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(step_digests, firsts))
    assert found == serial
    assert len({digests["logits"] for digests in found}) == THREADS


# E12: the persistent compilation cache.

COUNTED = """
from tests.fault.test_library_faults import *

hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
)
digests = op_digests() | step_digests()
print(len(hits))
show(digests)
"""

NEWER = f"""
from dsv4_jax import library
library.ABI += 1
{OPS}
"""


def _cache_in(folder: Path) -> dict[str, str]:
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def _entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*-cache"))


@pytest.fixture(scope="module")
def filled(step: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compilation cache with the ops and the decode step in it."""
    folder = tmp_path_factory.mktemp("compiled")
    process = run(COUNTED, **_cache_in(folder))
    assert shown(process) == step
    assert process.stdout.splitlines()[0] == "0"
    return folder


@pytest.mark.slow
def test_E12_warm_process(step: dict[str, str], filled: Path) -> None:
    before = _entries(filled)
    process = run(COUNTED, **_cache_in(filled))
    assert shown(process) == step
    assert _entries(filled) == before
    assert int(process.stdout.splitlines()[0]) == len(before)


@pytest.mark.slow
def test_E12_newer_contract(filled: Path) -> None:
    """It does not take the entry that fits in all but the contract's version."""
    process = run(NEWER, **_cache_in(filled))
    assert process.returncode == 1
    told = f"abi must be {library.ABI} (this library's), got {library.ABI + 1}"
    assert told in process.stderr


# E9: settings of JAX that change dtypes or add checks. What compiles to the same code as without
# them comes out of E12's cache.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("JAX_ENABLE_X64", "1", id="x64"),
        pytest.param("JAX_NUMPY_DTYPE_PROMOTION", "strict", id="strict-promotion"),
        pytest.param("JAX_DEBUG_NANS", "1", id="debug-nans"),
    ],
)
def test_E9_settings_of_jax(step: dict[str, str], filled: Path, name: str, value: str) -> None:
    assert shown(run(STEP, **_cache_in(filled), **{name: value})) == step


# E11: how and where Python runs.

MOVED = f"""
import sys
# An editable installation would lead back to the checkout.
sys.meta_path = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
{OPS}
"""


@pytest.fixture
def moved(tmp_path: Path) -> Generator[Path]:
    """The package, read-only, at a path with spaces and umlauts."""
    with read_only_copy(tmp_path / "räum lich ü" / "site packages") as folder:
        yield folder


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="plain"),
        pytest.param(("-O", "-W", "error"), id="optimised-warnings"),
    ],
)
def test_E11_moved_and_read_only(
    ops: dict[str, str], moved: Path, options: tuple[str, ...]
) -> None:
    process = run(MOVED, options=options, path=os.pathsep.join([str(moved), str(ROOT)]))
    assert shown(process) == ops
    found = json.loads(process.stdout.splitlines()[-1])
    assert Path(found["file"]).is_relative_to(moved)
    assert Path(found["library"]).is_relative_to(moved)


# DSV4_SYNC, and `dsv4 env`.


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_DSV4_SYNC(monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool) -> None:
    monkeypatch.delenv("DSV4_SYNC", raising=False)
    if value is not None:
        monkeypatch.setenv("DSV4_SYNC", value)
    assert env.sync() is expected


@pytest.mark.parametrize("value", ["yes", "2", "true", " 1"])
def test_DSV4_SYNC_unknown(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DSV4_SYNC", value)
    with pytest.raises(ValueError, match=re.escape(f"DSV4_SYNC must be 0 or 1, got {value!r}")):
        env.sync()


@pytest.mark.parametrize("value", ["0", "1"])
def test_DSV4_SYNC_changes_no_result(ops: dict[str, str], value: str) -> None:
    """On the CPU the variable changes nothing."""
    assert shown(run(OPS, DSV4_SYNC=value)) == ops


def test_DSV4_SYNC_unknown_at_import() -> None:
    process = run("import dsv4_jax", DSV4_SYNC="yes")
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == "ValueError: DSV4_SYNC must be 0 or 1, got 'yes'"


def _fields(text: str) -> dict[str, str]:
    """Lines of `dsv4 env` by name."""
    return {
        name: value for name, value in (re.split(r"  +", s, maxsplit=1) for s in text.splitlines())
    }


def _check_env(fields: dict[str, str]) -> None:
    assert fields["dsv4_jax"] == dsv4_jax.__version__
    assert fields["jax"] == jax.__version__
    assert fields["jaxlib"] == version("jaxlib")
    info = library.build_info()
    assert f"of jaxlib {info['jaxlib']}, abi {info['abi']}" in fields["library"]
    assert fields["library archs"] == (info["cuda_archs"] or "CPU only")
    assert re.fullmatch(r"none|\d+\.\d+", fields["CUDA driver"])


def test_env_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSV4_SYNC", raising=False)
    # Longer than any terminal: lines are never wrapped, and a line break in a value is not one.
    monkeypatch.setenv("XLA_FLAGS", "--one " * 40 + "\n--two")
    result = CliRunner().invoke(cli.app, ["env"], env={"COLUMNS": "40"})
    assert result.exit_code == 0
    fields = _fields(result.stdout)
    _check_env(fields)
    assert all(f"{d.platform}:{d.id} {d.device_kind}" in fields["devices"] for d in jax.devices())
    assert fields["DSV4_SYNC"] == "not set"
    assert fields["XLA_FLAGS"] == "--one " * 40 + "--two"


def test_env_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--one\n--two")
    lines = CliRunner().invoke(cli.app, ["env"])
    result = CliRunner().invoke(cli.app, ["env", "--json"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == _fields(lines.stdout)


@pytest.mark.parametrize(
    ("driver", "runtime", "text"),
    [
        pytest.param(0, 13000, "none", id="no-driver"),
        pytest.param(13010, 13000, "13.1", id="newer"),
        pytest.param(13000, 13010, "13.0", id="older-minor"),
        pytest.param(12080, 13000, "12.8, too old for CUDA 13.0", id="E4-older"),
        pytest.param(12080, 0, "12.8", id="build-without-cuda"),
    ],
)
def test_E4_env_names_both_versions(driver: int, runtime: int, text: str) -> None:
    found = env._driver(driver, runtime)
    assert found.startswith(text)
    assert ("update the NVIDIA driver" in found) == ("too old" in text)


def test_env_process() -> None:
    process = run(DSV4, "env", DSV4_SYNC="1", CUDA_VISIBLE_DEVICES="")
    assert process.returncode == 0, process.stderr
    fields = _fields(process.stdout)
    _check_env(fields)
    assert fields["devices"].startswith("cpu:0 ")
    assert fields["DSV4_SYNC"] == "1"
    assert fields["JAX_PLATFORMS"] == "cpu"

"""One op, one place: the files of every op, and what the C++ and Python sources may not hold."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from dsv4_jax import _ffi, library
from tests.support.programs import OPS

ROOT = Path(__file__).parents[1]

# Ops that still are `jax.numpy`. One that gets a handler leaves this set with the same change.
IN_JAX = frozenset(
    {
        "hadamard",
        "head_norm",
        "mhc_head",
        "mhc_post",
        "mhc_pre",
        "rmsnorm",
        "rope",
        "swiglu",
    }
)
# Benchmarks that measure something else than one op.
OTHER_BENCHMARKS = frozenset({"convert", "jnp", "long_context", "step"})

# Folders of ffi/ that are no op's: what ops share, and what calls them.
OTHER_FOLDERS = frozenset({"common", "program"})


def _stems(folder: Path, pattern: str) -> set[str]:
    return {path.stem for path in folder.glob(pattern)}


def op_files(op: str) -> list[str]:
    """What exists for an op and for nothing else, besides its CUDA files."""
    return [
        f"dsv4_jax/ops/{op}.py",
        *(f"ffi/{op}/{op}{end}" for end in (".h", "_ffi.cc", "_cpu.cc", "_test.cc")),
        f"reference/{op}.py",
        f"tests/ops/test_{op}.py",
        f"tests/bench/bench_{op}.py",
    ]


def is_cuda_file(op: str, name: str) -> bool:
    """``<op>.cu`` for code of every architecture, ``<op>_sm90.cu`` for code of one."""
    return re.fullmatch(rf"{op}(_sm90|_sm100)?\.cu", name) is not None


def layout_problems(root: Path, ops: Iterable[str], in_jax: Iterable[str]) -> list[str]:
    """Files of ops that are missing, misnamed or belong to no op."""
    ops, in_jax = set(ops), set(in_jax)
    problems: list[str] = []
    for op in sorted(ops):
        problems += [f"missing: {path}" for path in op_files(op) if not (root / path).is_file()]
        here = root / "ffi" / op
        cuda = {path.name for path in here.glob("*.cu")}
        if not cuda:
            problems.append(f"missing: ffi/{op}/{op}.cu or {op}_sm90.cu")
        problems += [f"misnamed: ffi/{op}/{n}" for n in sorted(cuda) if not is_cuda_file(op, n)]
        problems += [
            f"misnamed: ffi/{op}/{path.name}"
            for path in sorted(here.glob("*"))
            if not path.name.startswith(op)
        ]
    folders = {path.name for path in (root / "ffi").iterdir() if path.is_dir()}
    problems += [f"no target: ffi/{name}/" for name in sorted(folders - ops - OTHER_FOLDERS)]
    benches = {s.removeprefix("bench_") for s in _stems(root / "tests/bench", "bench_*.py")}
    problems += [f"no target: bench_{name}.py" for name in sorted(benches - ops - OTHER_BENCHMARKS)]
    found = {stem for stem in _stems(root / "dsv4_jax/ops", "*.py") if not stem.startswith("_")}
    problems += [f"no target: dsv4_jax/ops/{name}.py" for name in sorted(found - ops - in_jax)]
    problems += [f"not in jax.numpy: {name}" for name in sorted(in_jax & ops | in_jax - found)]
    return problems


def test_one_op_one_place() -> None:
    assert layout_problems(ROOT, OPS, IN_JAX) == []


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files of one op with a handler and of one without."""
    files = [*op_files("a_b"), "ffi/a_b/a_b.cu", "ffi/a_b/a_b_sm100.cu", "dsv4_jax/ops/plain.py"]
    for name in (*files, "dsv4_jax/ops/_check.py", "ffi/common/x.h", "tests/bench/bench_step.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert layout_problems(tmp_path, {"a_b"}, {"plain"}) == []
    return tmp_path


@pytest.mark.parametrize("path", op_files("a_b"))
def test_a_missing_file_is_found(tree: Path, path: str) -> None:
    (tree / path).unlink()
    assert layout_problems(tree, {"a_b"}, {"plain"}) == [f"missing: {path}"]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        pytest.param("ffi/other/x.cu", "no target: ffi/other/", id="folder"),
        pytest.param("tests/bench/bench_other.py", "no target: bench_other.py", id="bench"),
        pytest.param("dsv4_jax/ops/other.py", "no target: dsv4_jax/ops/other.py", id="op"),
        pytest.param("ffi/a_b/a_b_hopper.cu", "misnamed: ffi/a_b/a_b_hopper.cu", id="arch"),
        pytest.param("ffi/a_b/helper.h", "misnamed: ffi/a_b/helper.h", id="stem"),
    ],
)
def test_an_extra_file_is_found(tree: Path, path: str, problem: str) -> None:
    (tree / path).parent.mkdir(exist_ok=True)
    (tree / path).touch()
    assert layout_problems(tree, {"a_b"}, {"plain"}) == [problem]


def test_a_stale_list_is_found(tree: Path) -> None:
    assert layout_problems(tree, {"a_b"}, {"plain", "a_b"}) == ["not in jax.numpy: a_b"]
    assert layout_problems(tree, {"a_b"}, {"plain", "gone"}) == ["not in jax.numpy: gone"]
    (tree / "ffi/a_b/a_b.cu").unlink()
    (tree / "ffi/a_b/a_b_sm100.cu").unlink()
    assert layout_problems(tree, {"a_b"}, {"plain"}) == ["missing: ffi/a_b/a_b.cu or a_b_sm90.cu"]


@pytest.mark.parametrize("debug", [False, True])
def test_same_targets_on_both_platforms(debug: bool) -> None:
    registered = _ffi.registrations(debug)
    assert set(registered) == {"cpu", "CUDA"}
    assert sorted(registered["cpu"]) == sorted(registered["CUDA"]) == library.targets()
    assert all(name.startswith("dsv4.") for name in registered["cpu"])


@pytest.mark.parametrize("op", OPS)
def test_reference_takes_the_same_arguments(op: str) -> None:
    """The op's operands lead the reference's, which may take a rounding more."""
    ours = inspect.signature(getattr(importlib.import_module(f"dsv4_jax.ops.{op}"), op))
    theirs = inspect.signature(getattr(importlib.import_module(f"reference.{op}"), op))
    positional = [p.name for p in ours.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert list(theirs.parameters)[: len(positional)] == positional
    assert set(ours.parameters) <= set(theirs.parameters)


def code_only(text: str) -> str:
    """C++ source without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def _sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in (ROOT / "ffi").rglob(pattern))


def _include_lines(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text("utf-8"), re.M)


def included(path: Path) -> set[str]:
    """Everything a source includes, through our own headers too."""
    seen: set[str] = set()
    open_paths = [path]
    while open_paths:
        for name in _include_lines(open_paths.pop()):
            if name not in seen and (ROOT / "ffi" / name).is_file():
                open_paths.append(ROOT / "ffi" / name)
            seen.add(name)
    return seen


def bindings(code: str) -> list[str]:
    """Every binding of a handler file: from ``Bind()`` to the end of its statement."""
    return [part.split(";")[0] for part in code.split("Ffi::Bind()")[1:]]


def without_abi(code: str) -> list[str]:
    """Bindings that do not declare the attribute, first of all attributes."""
    return [
        b for b in bindings(code) if re.findall(r"Attr<([^;]*?)\)", b)[:1] != ['int32_t>("abi"']
    ]


def test_no_size_bytes() -> None:
    """It counts a byte for a 4-bit element; `PackedBytes` counts what is there."""
    for path in _sources("*.cc", "*.h", "*.cu"):
        assert not re.search(r"\bsize_bytes\b", code_only(path.read_text("utf-8"))), path.name


@pytest.mark.parametrize("op", [*OPS, "program"])
def test_every_binding_declares_the_abi(op: str) -> None:
    code = code_only((ROOT / "ffi" / op / f"{op}_ffi.cc").read_text("utf-8"))
    assert len(bindings(code)) >= 2  # one for each platform
    assert without_abi(code) == []
    # What would bind without `Bind()`, and so without the attribute.
    assert "HANDLER_AUTO" not in code
    assert "CheckAbi(" in code


def test_bindings_are_in_handler_files() -> None:
    for path in _sources("*.cc", "*.h", "*.cu"):
        code = code_only(path.read_text("utf-8"))
        assert path.name.endswith("_ffi.cc") or not bindings(code), path.name


def test_the_binding_lint_sees() -> None:
    good = 'ffi::Ffi::Bind().Ctx<X>().Attr<int32_t>("abi").Attr<float>("eps").Arg<B>();'
    bad = 'ffi::Ffi::Bind().Attr<float>("eps").Arg<B>();'
    assert without_abi(good) == []
    assert len(without_abi(good + bad + "ffi::Ffi::Bind().Arg<B>();")) == 2
    assert code_only("a /* size_bytes( */ b // size_bytes(\nc") == "a  b \nc"


def test_kernels_know_nothing_of_xla() -> None:
    """Not even through a header of ours."""
    for path in _sources("*.cu"):
        assert not [name for name in included(path) if name.startswith("xla/")], path.name


def test_only_the_module_knows_nanobind() -> None:
    knowing = {
        path.relative_to(ROOT / "ffi").as_posix()
        for path in _sources("*.cc", "*.h", "*.cu", "*.cuh")
        if any(name.startswith("nanobind") for name in _include_lines(path))
    }
    assert knowing == {"module.cc"}


def test_everything_is_built() -> None:
    """A source that CMake does not list would be dead code."""
    cmake = (ROOT / "ffi/CMakeLists.txt").read_text("utf-8")
    for path in _sources("*.cc", "*.cu"):
        name = path.relative_to(ROOT / "ffi").as_posix()
        listed = name.removesuffix(".cc") if name.endswith("_test.cc") else name
        assert re.search(rf"(?<![\w/]){re.escape(listed)}(?![\w/])", cmake), name


def test_one_abi() -> None:
    header = (ROOT / "ffi/common/check.h").read_text("utf-8")
    assert re.findall(r"kAbi = (\d+);", header) == [str(library.ABI)]
    assert library.build_info()["abi"] == library.ABI


def reads_environment(source: str) -> bool:
    """Whether the code reaches for the environment, by whatever name."""
    names = {"environ", "environb", "getenv"}
    return any(
        (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and names & {alias.name for alias in node.names})
        for node in ast.walk(ast.parse(source))
    )


def test_environment_is_read_in_one_module() -> None:
    reading = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dsv4_jax").rglob("*.py")
        if reads_environment(path.read_text("utf-8"))
    }
    assert reading == {"dsv4_jax/env.py"}
    assert reads_environment("import os as o\no.getenv('A')")
    assert reads_environment("from os import environ as e")
    assert not reads_environment("import os\nos.open(os.devnull)  # os.environ")


def test_package_imports_nothing_from_reference_or_tests() -> None:
    for path in (ROOT / "dsv4_jax").rglob("*.py"):
        found = re.findall(
            r"^\s*(?:from|import) (reference|tests)\b", path.read_text("utf-8"), re.M
        )
        assert not found, path.name

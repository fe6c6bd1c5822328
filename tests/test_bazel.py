"""BUILD.bazel builds what ffi/CMakeLists.txt builds, and both build all that there is."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FFI = ROOT / "ffi"


def cmake_lists(opening: str) -> list[list[str]]:
    """The words of every call with this opening, such as ``set(sources``."""
    text = re.sub(r"#.*", "", (FFI / "CMakeLists.txt").read_text("utf-8"))
    return [sorted(x.split()) for x in re.findall(re.escape(opening) + r"\s([^()]*)\)", text)]


def bazel_list(name: str) -> list[str]:
    """A list that BUILD.bazel assigns; its syntax is Python's."""
    tree = ast.parse((ROOT / "BUILD.bazel").read_text("utf-8"))
    values = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    ]
    assert len(values) == 1, f"BUILD.bazel assigns {name} {len(values)} times"
    return sorted(values[0])


def bazel_sources(name: str) -> list[str]:
    """The same, as paths below ffi/."""
    return [path.removeprefix("ffi/") for path in bazel_list(name)]


def files(ending: str) -> list[str]:
    """What is there, as paths below ffi/."""
    return sorted(path.relative_to(FFI).as_posix() for path in FFI.rglob(f"*{ending}"))


def test_library_sources() -> None:
    there = [path for path in files(".cc") if path != "module.cc" and not path.endswith("_test.cc")]
    assert cmake_lists("set(sources") == [there]
    assert bazel_sources("FFI_SRCS") == there


def test_cpp_tests() -> None:
    there = files("_test.cc")
    assert cmake_lists("foreach(test") == [[path.removesuffix(".cc") for path in there]]
    assert bazel_sources("FFI_TESTS") == there


def test_cuda_sources() -> None:
    """CMake's alone."""
    assert cmake_lists("set(cuda_sources") == [files(".cu")]


def test_compile_options() -> None:
    options, _sanitizers = cmake_lists("target_compile_options(dsv4 PUBLIC")
    [[standard]] = cmake_lists("set(CMAKE_CXX_STANDARD")
    assert {*options, f"-std=c++{standard}"} <= set(bazel_list("COPTS"))

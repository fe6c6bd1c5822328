"""@local_python: the Python that builds and tests, and the headers of what is installed in it.

The environment variable PYTHON names it, else it is the first python3 on PATH. Building needs
jaxlib and nanobind, testing what tests/ imports.
"""

_NEEDED = "set PYTHON to a Python with jaxlib and nanobind"
_PATHS = "import sys, sysconfig; print(sys.executable, sysconfig.get_path('include'), sep = ';')"

def _ask(ctx, python, *args):
    result = ctx.execute([python] + list(args))
    if result.return_code:
        reason = (result.stderr or result.stdout).strip().split("\n")[-1]
        fail("%s %s: %s; %s" % (python, args[0], reason, _NEEDED))
    return result.stdout.strip().split(";")

def _local_python_impl(ctx):
    name = ctx.os.environ.get("PYTHON") or "python3"
    command = ctx.path(name) if name.startswith("/") else ctx.which(name)
    if not command:
        fail("no %s on PATH; %s" % (name, _NEEDED))
    python, headers = _ask(ctx, command, "-c", _PATHS)

    # What CMake is told, by the same script. The second label is a dependency: the script reads it.
    probe = ctx.path(Label("//:ffi/probe.py"))
    ctx.path(Label("//:dsv4_jax/version.py"))
    jaxlib_version, jaxlib, nanobind_cmake, version = _ask(ctx, python, probe)[:4]

    ctx.symlink(headers, "python")
    ctx.symlink(jaxlib, "jaxlib")
    ctx.symlink(ctx.path(nanobind_cmake).dirname, "nanobind")
    ctx.symlink(Label("//.ci/bazel:python.BUILD"), "BUILD.bazel")
    ctx.file("facts.bzl", "".join([
        '"""Of the Python in use and of dsv4_jax."""\n\n',
        'JAXLIB_VERSION = "%s"\n' % jaxlib_version,
        'PYTHON = "%s"\n' % python,
        'VERSION = "%s"\n' % version,
    ]))

# Local: asked again whenever a Bazel server starts, since pip changes the answers.
local_python = repository_rule(
    implementation = _local_python_impl,
    environ = ["PATH", "PYTHON"],
    local = True,
)

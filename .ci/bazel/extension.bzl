"""@local_python for MODULE.bazel; apart, because older Bazel has no module extensions."""

load(":python.bzl", "local_python")

def _python_impl(_ctx):
    local_python(name = "local_python")

python = module_extension(implementation = _python_impl)

"""Stand-ins for what an older Bazel would download: its own native rules under the usual names."""

def _files_impl(ctx):
    for path, text in ctx.attr.files.items():
        ctx.file(path, text)

_files = repository_rule(
    implementation = _files_impl,
    attrs = {"files": attr.string_dict()},
)

def _native(*names):
    return "".join(["%s = native.%s\n" % (name, name) for name in names])

def native_rules():
    """@rules_cc and @rules_python, and what Bazel's own files load of @rules_java and others."""
    _files(
        name = "rules_cc",
        files = {
            "cc/BUILD.bazel": "",
            "cc/defs.bzl": _native(
                "cc_binary",
                "cc_library",
                "cc_test",
                "cc_toolchain",
                "cc_toolchain_suite",
            ),
        },
    )
    _files(
        name = "rules_python",
        files = {
            "python/BUILD.bazel": "",
            "python/defs.bzl": """
load("@bazel_tools//tools/python:toolchain.bzl", _py_runtime_pair = "py_runtime_pair")

py_runtime_pair = _py_runtime_pair
""" + _native("py_library", "py_runtime", "py_test"),
        },
    )

    # Looked at in every search for a toolchain; we build no Java.
    _files(
        name = "rules_java",
        files = {
            "java/BUILD.bazel": "",
            "java/defs.bzl": _native("java_import", "java_runtime", "java_toolchain"),
        },
    )

    # Named by every test rule; used by `bazel coverage` alone.
    _files(
        name = "remote_coverage_tools",
        files = {"BUILD.bazel": """
package(default_visibility = ["//visibility:public"])

filegroup(name = "coverage_report_generator")

filegroup(name = "lcov_merger")
"""},
    )

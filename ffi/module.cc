// The Python module dsv4_jax._ffi: what to register with XLA, what the library was built with, and
// its two debug aids. No computation.
#include <nanobind/nanobind.h>

#include "targets.h"

namespace nb = nanobind;

namespace {

nb::capsule Capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

// {"cpu": {target: capsule}, "CUDA": {target: capsule}}
nb::dict Registrations(bool debug) {
  nb::dict cpu, cuda;
  for (const dsv4::Target& target : dsv4::Targets()) {
    cpu[target.name] = Capsule(target.cpu);
    cuda[target.name] = Capsule(debug ? target.cuda_debug : target.cuda);
  }
  nb::dict platforms;
  platforms["cpu"] = cpu;
  platforms["CUDA"] = cuda;
  return platforms;
}

nb::dict BuildInfo() {
  nb::dict info;
  info["version"] = DSV4_VERSION;
  info["abi"] = dsv4::kAbi;
  info["jaxlib"] = DSV4_JAXLIB_VERSION;
  info["ffi_api"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  info["compiler"] = DSV4_COMPILER;
  info["cuda_archs"] = dsv4::CudaArchs();
  info["cuda_runtime"] = dsv4::CudaRuntimeVersion();
  return info;
}

// {target: (captured, eager)}
nb::dict LaunchCounts() {
  nb::dict launches;
  for (const dsv4::Target& target : dsv4::Targets()) {
    launches[target.name] =
        nb::make_tuple(target.counts->captured.load(), target.counts->eager.load());
  }
  return launches;
}

}  // namespace

NB_MODULE(_ffi, m) {
  m.def("registrations", &Registrations, nb::arg("debug"));
  m.def("build_info", &BuildInfo);
  m.def("launch_counts", &LaunchCounts);
  m.def("cuda_driver", &dsv4::CudaDriverVersion);
  m.def("set_sync", [](bool sync) { dsv4::SyncAfterLaunch() = sync; }, nb::arg("sync"));
}

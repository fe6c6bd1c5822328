# The CUDA half: one nvcc call per file, architectures by file name. No CUDAToolkit package needed,
# so that an nvcc from PyPI (nvidia-cuda-nvcc, nvidia-cuda-cccl) serves as well as a toolkit.
#
#   *_sm90.cu    sm_90a alone (wgmma)
#   *_sm100.cu   sm_100a alone (tcgen05)
#   other .cu    every architecture of DSV4_CUDA_ARCHS

foreach(place IN LISTS DSV4_PYPI_CUDA)
  list(APPEND pypi_bin "${place}/bin")
endforeach()
if(DSV4_CUDA STREQUAL "PYPI")
  find_program(DSV4_NVCC nvcc PATHS ${pypi_bin} NO_DEFAULT_PATH)
else()
  find_program(DSV4_NVCC nvcc PATHS /usr/local/cuda/bin ${pypi_bin})
endif()
if(NOT DSV4_NVCC)
  if(NOT DSV4_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "DSV4_CUDA=${DSV4_CUDA}: no nvcc on PATH, in /usr/local/cuda or from PyPI; "
      "the extra build-cuda names the packages")
  endif()
  message(STATUS "No nvcc: building for CPU only")
  return()
endif()

# The toolkit around nvcc, through symbolic links such as Debian's.
file(REAL_PATH "${DSV4_NVCC}" nvcc)
get_filename_component(toolkit "${nvcc}" DIRECTORY)
get_filename_component(toolkit "${toolkit}" DIRECTORY)
# A wrapper script in /usr/local/bin is not inside its toolkit.
if(NOT EXISTS "${toolkit}/include/cuda_runtime.h" AND EXISTS "/usr/local/cuda/include/cuda_runtime.h")
  set(toolkit /usr/local/cuda)
endif()
find_library(DSV4_CUDART cudart_static
  PATHS "${toolkit}" PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib NO_DEFAULT_PATH REQUIRED)
find_path(DSV4_CUDA_INCLUDE cuda_runtime.h
  PATHS "${toolkit}" PATH_SUFFIXES include targets/x86_64-linux/include NO_DEFAULT_PATH REQUIRED)
find_package(Threads REQUIRED)
message(STATUS "CUDA: ${nvcc} for ${DSV4_CUDA_ARCHS}")

string(REPLACE "," ";" archs "${DSV4_CUDA_ARCHS}")
set(defines -DNDEBUG -DDSV4_CUDA)
if("90a" IN_LIST archs)
  list(APPEND defines -DDSV4_SM90)  # the files named so are there
endif()
foreach(source IN LISTS cuda_sources)
  set(file_archs ${archs})
  if(source MATCHES "_sm([0-9]+)\\.cu$")
    set(file_archs "${CMAKE_MATCH_1}a")
    if(NOT file_archs IN_LIST archs)
      continue()
    endif()
  endif()
  set(gencode "")
  foreach(arch IN LISTS file_archs)
    list(APPEND gencode "-gencode=arch=compute_${arch},code=sm_${arch}")
  endforeach()
  set(object "${CMAKE_CURRENT_BINARY_DIR}/${source}.o")
  get_filename_component(folder "${object}" DIRECTORY)
  file(MAKE_DIRECTORY "${folder}")
  add_custom_command(
    OUTPUT "${object}"
    COMMAND "${nvcc}" -c "${CMAKE_CURRENT_SOURCE_DIR}/${source}" -o "${object}"
      ${gencode} -std=c++17 -O3 ${defines} --fmad=false -lineinfo --threads 0
      -cudart static -Xcompiler -fPIC,-fvisibility=hidden,-Wall
      "-I${CMAKE_CURRENT_SOURCE_DIR}" "-I${DSV4_CUDA_INCLUDE}" "-I${DSV4_CUDA_INCLUDE}/cccl"
      -MD -MF "${object}.d"
    DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/${source}"
    DEPFILE "${object}.d"
    COMMENT "nvcc ${source}" VERBATIM)
  list(APPEND cuda_objects "${object}")
endforeach()

target_sources(dsv4 PRIVATE ${cuda_objects})
set_source_files_properties(${cuda_objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
target_compile_definitions(dsv4 PUBLIC DSV4_CUDA DSV4_CUDA_ARCHS="${DSV4_CUDA_ARCHS}")
target_include_directories(dsv4 SYSTEM PUBLIC "${DSV4_CUDA_INCLUDE}")
target_link_libraries(dsv4 PUBLIC "${DSV4_CUDART}" Threads::Threads
  ${CMAKE_DL_LIBS} rt)

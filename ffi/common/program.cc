#include "common/program.h"

#ifdef DSV4_CUDA

#include <algorithm>

namespace dsv4 {

Program*& CurrentProgram() {
  thread_local Program* current = nullptr;
  return current;
}

bool IsSettled(const void* operand) {
  const Program* const program = CurrentProgram();
  return program != nullptr &&
         std::binary_search(program->settled.begin(), program->settled.end(), operand);
}

bool TakeBarrier() {
  Program* const program = CurrentProgram();
  if (program == nullptr || !program->barrier) return false;
  program->barrier = false;
  return true;
}

cudaError_t AwaitLate(cudaStream_t stream) {
  Program* const program = CurrentProgram();
  if (program == nullptr) return cudaSuccess;
  if (!program->late.empty() && program->joins_wait) program->barrier = true;
  for (cudaEvent_t event : program->late) {
    const cudaError_t error = cudaStreamWaitEvent(stream, event, 0);
    if (error != cudaSuccess) return error;
  }
  program->late.clear();
  return cudaSuccess;
}

}  // namespace dsv4

#endif

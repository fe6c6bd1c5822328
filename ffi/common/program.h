// What a launcher may know of the program that calls it (ffi/program). Outside of a program nothing
// is settled, nothing is late, and no launch is the first.
#pragma once

#ifdef DSV4_CUDA
#include <cuda_runtime_api.h>

#include <vector>

namespace dsv4 {

// The program that this thread runs. Its calls are launched one after another into one or two
// streams.
struct Program {
  std::vector<const void*> settled;  // operands that no call of it writes, in order
  std::vector<cudaEvent_t> late;     // what the call now running waits for by AwaitLate
  bool barrier = false;              // the next launch waits for whatever is ahead
  bool joins_wait = false;           // so does one behind an event
};
Program*& CurrentProgram();

// Whether a kernel may read what lies there before the kernel ahead of it has ended.
bool IsSettled(const void* operand);

// Whether the next launch must not begin before all ahead of it has ended; true once.
bool TakeBarrier();

// Makes the stream wait for an operand that only the launches behind this read.
cudaError_t AwaitLate(cudaStream_t stream);

}  // namespace dsv4
#endif

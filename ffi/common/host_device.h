// Marks functions that the CPU handlers and the kernels share.
#pragma once

#ifdef __CUDACC__
#define DSV4_HOST_DEVICE __host__ __device__
#else
#define DSV4_HOST_DEVICE
#endif

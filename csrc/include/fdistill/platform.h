// What the shared headers need to compile as host code and as CUDA device code.
#pragma once

#if defined(__CUDACC__)
#define FD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FD_HOST_DEVICE inline
#endif

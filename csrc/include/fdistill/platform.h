// What the shared headers need to compile as host code and as CUDA device code.
#pragma once

#if defined(__CUDACC__)
#define FD_HOST_DEVICE __host__ __device__ __forceinline__
#define FD_NO_EXEC_CHECK _Pragma("nv_exec_check_disable")  // for templates whose arguments may be device code alone
#else
#define FD_HOST_DEVICE inline
#define FD_NO_EXEC_CHECK
#endif

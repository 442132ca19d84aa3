// What the kernels use of CUDA, each in one small function. The emulator (csrc/emulator) has the same functions for the
// host compiler, with checks in them; kernels touch memory through these alone.
#pragma once

#include <cstdint>

#if defined(FDISTILL_EMULATOR)
#include "emulator/device.h"
#else

#define FD_ARGUMENTS(Record) const __grid_constant__ Record

namespace fdistill::gpu {

struct alignas(16) Vec16 {
  uint32_t word[4];
};
struct alignas(8) Vec8 {
  uint32_t word[2];
};

// ------------------------------------------------------------------------------------------------------------ threads

__device__ __forceinline__ unsigned thread() { return threadIdx.x; }
__device__ __forceinline__ unsigned threads() { return blockDim.x; }
__device__ __forceinline__ unsigned block() { return blockIdx.x; }
__device__ __forceinline__ unsigned blocks() { return gridDim.x; }

// Clusters exist from sm_90 on; before that a block is one by itself.
__device__ __forceinline__ unsigned cluster_size() {
  unsigned n = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
#endif
  return n;
}
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
// One thread fences, after the others of its block: a barrier that releases would have every thread wait until its
// writes have gone through the whole GPU.
__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  __syncthreads();
  if (threadIdx.x == 0) asm volatile("fence.acq_rel.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// Until the kernel before this one in the stream has finished; for a launch that may start earlier (Launch::early).
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets such a launch start.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ------------------------------------------------------------------------------------------------------ global memory

template <class T>
__device__ __forceinline__ T load(const T* p) {
  return *p;
}
__device__ __forceinline__ Vec16 load(const Vec16* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {v.x, v.y, v.z, v.w};
}
__device__ __forceinline__ Vec8 load(const Vec8* p) {
  const uint2 v = *reinterpret_cast<const uint2*>(p);
  return {v.x, v.y};
}
// What is not read again: it leaves the caches first.
__device__ __forceinline__ Vec16 load_once(const Vec16* p) {
  const uint4 v = __ldcs(reinterpret_cast<const uint4*>(p));
  return {v.x, v.y, v.z, v.w};
}
__device__ __forceinline__ Vec8 load_once(const Vec8* p) {
  const uint2 v = __ldcs(reinterpret_cast<const uint2*>(p));
  return {v.x, v.y};
}
// What another block has written during this kernel: from the level 2 cache.
template <class T>
__device__ __forceinline__ T load_fresh(const T* p) {
  return __ldcg(p);
}
// Brings the line into the level 2 cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
template <class T>
__device__ __forceinline__ void store(T* p, T value) {
  *p = value;
}
__device__ __forceinline__ void store_once(Vec16* p, const Vec16& v) {
  __stcs(reinterpret_cast<uint4*>(p), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
}
__device__ __forceinline__ void store_once(Vec8* p, const Vec8& v) {
  __stcs(reinterpret_cast<uint2*>(p), make_uint2(v.word[0], v.word[1]));
}

__device__ __forceinline__ unsigned add_atomically(unsigned* p, unsigned value) { return atomicAdd(p, value); }
__device__ __forceinline__ void add_atomically(unsigned long long* p, unsigned long long value) { atomicAdd(p, value); }
// Everything this thread, and those it has synchronised with, wrote before is seen before what it writes after.
__device__ __forceinline__ void fence() { __threadfence(); }

// Waits until another block has made *p non-zero, and sees what that block wrote before.
__device__ __forceinline__ void wait_until_set(const unsigned* p) {
  unsigned value;
  while (true) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    if (value != 0) return;
    __nanosleep(64);
  }
}

// ------------------------------------------------------------------------------------------------------ shared memory

// count elements of the block's dynamic shared memory from a byte offset on.
template <class T>
struct Shared {
  T* data;
  __device__ __forceinline__ T get(int64_t i) const { return data[i]; }
  __device__ __forceinline__ void set(int64_t i, const T& value) const { data[i] = value; }
  // The same element in another block of the cluster.
  __device__ __forceinline__ T get_from(unsigned rank, int i) const {
#if __CUDA_ARCH__ >= 900
    static_assert(sizeof(T) == 8);
    const auto own = static_cast<uint32_t>(__cvta_generic_to_shared(data + i));
    uint32_t theirs;
    T value;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(own), "r"(rank));
    asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(theirs) : "memory");
    return value;
#else
    return data[i];
#endif
  }
};

template <class T>
__device__ __forceinline__ Shared<T> shared_memory(uint32_t offset, [[maybe_unused]] int64_t count) {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return {reinterpret_cast<T*>(dynamic_shared_memory + offset)};
}

}  // namespace fdistill::gpu

#endif

// The host's side of a launch. Implemented by launch.cpp over the CUDA runtime, and by csrc/emulator/emulator.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(FDISTILL_EMULATOR)
#include "emulator/emulator.h"
#endif

namespace fdistill::gpu {

// What the choice of a kernel depends on. Everything here is about the current device, which the caller has chosen: to
// change it here, and back, would make a context on a device that has none.
struct Device {
  size_t shared_bytes;  // of one block, at most
  size_t level2_bytes;  // of the level 2 cache
};
const Device& current_device();

// What the code of a kernel can do on this device. Compiled for a compute capability below 9 it has neither clusters nor
// a wait for the kernel before, whatever the device has that runs it.
struct Code {
  int max_cluster;  // blocks of the largest cluster that fits; 1 where there are none
  bool early;       // may start before the kernel before it has ended
};
// threads, shared: of the largest block that is going to be launched.
Code code_of(const char* name, const void* kernel, unsigned threads, size_t shared);

struct Launch {
  const char* name;
  unsigned blocks, threads;
  unsigned cluster = 1;  // blocks of a cluster
  size_t shared = 0;     // bytes of dynamic shared memory
  bool early = false;    // may start before the kernel before it has ended; it then calls wait_for_previous_kernel
  void* stream = nullptr;
};

// Blocks of this kernel that the current device runs at the same time.
unsigned resident_blocks(const char* name, const void* kernel, unsigned threads, size_t shared);

// A kernel takes one record. launch() starts it on the current device and throws std::runtime_error, with the kernel's
// name, where that fails. ranges: the memory it may touch.
#if defined(FDISTILL_EMULATOR)

using emulator::Ranges;
template <class Arguments>
using Kernel = void (*)(const Arguments&);

template <class Arguments>
void launch(const Launch& config, Kernel<Arguments> kernel, const Arguments& arguments, const Ranges& ranges) {
  const emulator::Grid grid{config.name, config.blocks, config.threads, config.cluster, config.shared, config.early};
  emulator::run(grid, ranges, [&] { kernel(arguments); });
}

#else

struct Ranges {  // the hardware has no use for them
  void read(const void*, int64_t) {}
  void write(const void*, int64_t) {}
};
template <class Arguments>
using Kernel = void (*)(Arguments);

void launch_kernel(const Launch& config, const void* kernel, void* arguments);

template <class Arguments>
void launch(const Launch& config, Kernel<Arguments> kernel, Arguments arguments, const Ranges&) {
  launch_kernel(config, reinterpret_cast<const void*>(kernel), &arguments);
}

#endif

}  // namespace fdistill::gpu

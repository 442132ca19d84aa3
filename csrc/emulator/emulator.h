// Runs kernels on the CPU: every thread of a block is a fiber, so that blocks interleave and one that waits for another
// lets it run. What a sanitizer would find stops the launch with an error: accesses outside of the memory a launch was
// given or of the shared memory, reads of shared memory that nobody wrote, writes there that race with another thread's
// access, barriers that not every thread reaches, waits that never end. Tests only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace fdistill::emulator {

// The global memory of a launch.
class Ranges {
 public:
  struct Range {
    uintptr_t begin, end;
    bool writable;
  };
  void read(const void* begin, int64_t bytes) { add(begin, bytes, false); }
  void write(void* begin, int64_t bytes) { add(begin, bytes, true); }
  const std::vector<Range>& all() const { return ranges_; }

 private:
  void add(const void* begin, int64_t bytes, bool writable) {
    const auto from = reinterpret_cast<uintptr_t>(begin);
    if (begin != nullptr && bytes > 0) ranges_.push_back({from, from + static_cast<uintptr_t>(bytes), writable});
  }
  std::vector<Range> ranges_;
};

struct Grid {
  const char* name;
  unsigned blocks, threads, cluster;
  size_t shared;
  bool early = false;  // started while the launch before may still write
};

// Runs body once for every thread. Throws std::runtime_error, with the kernel's name, for the first error.
void run(const Grid& grid, const Ranges& ranges, const std::function<void()>& body);

// The device that is emulated. order: the seed of the order in which blocks start, 0 for their own. fitting_cluster: the
// largest one for which there is room. code: ten times the compute capability that the kernels were compiled for, which
// may be below the device's: such code takes every block for a cluster of its own and never waits for the launch before.
struct Settings {
  int processors = 2, blocks_per_processor = 2, max_cluster = 8;
  size_t shared_bytes = 227 << 10, level2_bytes = 50 << 20;
  unsigned order = 1;
  int fitting_cluster = 8, code = 90;
};
Settings& settings();

// What the launches since the last reset moved through global memory: bytes, of which a number that several threads of
// a block read counts once.
struct Traffic {
  int64_t launches = 0, loaded = 0, stored = 0;
  int64_t vectors = 0;     // accesses to several elements at once
  int64_t prefetched = 0;  // lines of 128 bytes
};
Traffic& traffic();

}  // namespace fdistill::emulator

// Kernels with one fault each, which the emulator must find, and one without.
#include "faults.h"

#include <array>
#include <stdexcept>
#include <string>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace fdistill::emulator {
namespace {

using namespace gpu;

struct Arguments {
  const float* in;  // [64]
  float* out;       // [64]
  unsigned* flag;   // [1]
};

using Slots = Shared<float>;
Slots slots() { return shared_memory<float>(0, 64); }

// Every thread hands its number to the next one, through shared memory.
void right(const Arguments& a) {
  slots().set(thread(), load(a.in + thread()));
  sync_block();
  store(a.out + thread(), slots().get((thread() + 1) % 64));
}

void global_read(const Arguments& a) { store(a.out + thread(), load(a.in + thread() + 1)); }
void global_write(const Arguments& a) { store(a.out + thread() + 1, 0.0f); }
void write_to_input(const Arguments& a) { store(const_cast<float*>(a.in) + thread(), 0.0f); }
void misaligned(const Arguments& a) { load(reinterpret_cast<const Vec16*>(a.in + 1)); }
void shared_index(const Arguments&) { slots().set(thread() + 1, 0); }
void shared_size(const Arguments&) { shared_memory<float>(0, 128).set(thread() + 64, 0); }
void uninitialised(const Arguments& a) {
  if (thread() > 0) slots().set(thread(), 0);
  sync_block();
  store(a.out + thread(), slots().get(thread()));
}
void no_barrier(const Arguments& a) {
  slots().set(thread(), 0);
  store(a.out + thread(), slots().get(thread() > 0 ? thread() - 1 : 0));
}
void overwritten(const Arguments& a) {
  slots().set(thread(), 0);
  sync_block();
  store(a.out + thread(), slots().get((thread() + 1) % 64));
  slots().set(thread(), 1);
}
void half_a_barrier(const Arguments&) {
  if (thread() < 32) sync_block();
}
void early_exit(const Arguments&) {
  if (thread() == 63) return;
  sync_block();
}
void two_barriers(const Arguments&) {
  if (thread() < 32)
    sync_block();
  else
    sync_block();
}
void half_a_shuffle(const Arguments&) {
  if (thread() % 32 < 16) shuffle_xor(1.0, 1);
}
void half_a_cluster(const Arguments&) {
  if (cluster_rank() == 0) sync_cluster();
}
void no_such_block(const Arguments& a) {
  slots().set(thread(), 0);
  sync_cluster();
  store(a.out + thread(), slots().get_from(2, thread()));
}
void ended_block(const Arguments& a) {  // no barrier after the other block's last read
  slots().set(thread(), 0);
  sync_cluster();
  if (cluster_rank() == 1) return;
  sync_block();
  sync_block();
  store(a.out + thread(), slots().get_from(1, thread()));
}
void two_blocks(const Arguments& a) {  // right, unless its code knows no clusters: then out of bounds
  const unsigned work = block() / cluster_size() * 64 + cluster_rank();
  if (thread() == 0) store(a.out + work, static_cast<float>(cluster_rank()));
}
void endless(const Arguments& a) { wait_until_set(a.flag); }
void set_flag(const Arguments& a) {  // the launch before those that start early
  if (thread() == 0) store(a.flag, 1u);
}
void no_wait(const Arguments& a) { store(a.out + thread(), static_cast<float>(load(a.flag))); }
void late_wait(const Arguments& a) {
  no_wait(a);
  wait_for_previous_kernel();
}

struct Fault {
  const char* name;
  Kernel<Arguments> kernel;
  unsigned cluster = 1;
  bool early = false;
};
constexpr Fault kFaults[] = {
    {"right", right},
    {"global_read", global_read},
    {"global_write", global_write},
    {"write_to_input", write_to_input},
    {"misaligned", misaligned},
    {"shared_index", shared_index},
    {"shared_size", shared_size},
    {"uninitialised", uninitialised},
    {"no_barrier", no_barrier},
    {"overwritten", overwritten},
    {"half_a_barrier", half_a_barrier},
    {"early_exit", early_exit},
    {"two_barriers", two_barriers},
    {"half_a_shuffle", half_a_shuffle},
    {"half_a_cluster", half_a_cluster, 2},
    {"no_such_block", no_such_block, 2},
    {"ended_block", ended_block, 2},
    {"two_blocks", two_blocks, 2},
    {"endless", endless},
    {"no_wait", no_wait, 1, true},
    {"late_wait", late_wait, 1, true},
};

}  // namespace

std::vector<float> run_fault(const char* name) {
  alignas(16) std::array<float, 64> in{};
  std::vector<float> out(64);
  unsigned flag = 0;
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  Ranges ranges;
  ranges.read(in.data(), sizeof(in));
  ranges.write(out.data(), sizeof(in));
  ranges.write(&flag, sizeof(flag));
  for (const Fault& fault : kFaults) {
    if (std::string(fault.name) != name) continue;
    const Arguments arguments{in.data(), out.data(), &flag};
    if (fault.early) gpu::launch({"set_flag", 1, 64}, set_flag, arguments, ranges);
    gpu::launch({fault.name, fault.cluster, 64, fault.cluster, 256, fault.early}, fault.kernel, arguments, ranges);
    return out;
  }
  throw std::invalid_argument(std::string("no fault ") + name);
}

}  // namespace fdistill::emulator

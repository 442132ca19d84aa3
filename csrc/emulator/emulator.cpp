#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>

#include "device.h"
#include "fiber.h"
#include "cuda/launch.h"

namespace fdistill::emulator {
namespace {

using gpu::Site;

constexpr unsigned kWarp = 32;

std::string described(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

bool same(const Site& a, const Site& b) { return a.line() == b.line() && a.column() == b.column(); }

// Where some threads have arrived and wait for the others.
struct Barrier {
  unsigned arrived = 0;
  Site site;
};

struct Warp {
  Barrier shuffle;
  uint64_t values[2][kWarp];  // of two shuffles that follow each other: a lane may be one ahead
  unsigned turn = 0;
};

// Who touched a word of shared memory last, and in which of the intervals between two barriers.
struct Word {
  static constexpr unsigned kMany = ~1u, kNobody = ~0u;
  unsigned writer = kNobody, reader = kNobody;
  unsigned written = 0, read = 0;
  uint8_t valid = 0;  // a bit for each byte
};

struct Block;

struct Thread {
  Fiber fiber;
  Block* block;
  unsigned index;
  bool done, polling;
  bool waited;    // for the launch before
  unsigned turn;  // of its warp's shuffles
};

struct Cluster;

struct Block {
  Cluster* cluster;
  unsigned index, rank;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::vector<Word> words;
  Barrier barrier;
  unsigned running, interval;
  std::array<uintptr_t, 1024> numbers;  // addresses of some that it has read
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
  unsigned running;
};

// Stacks are kept from launch to launch.
class Stacks {
 public:
  ~Stacks() {
    for (unsigned char* stack : stacks_) munmap(stack, Fiber::kStack);
  }
  unsigned char* get() {
    if (next_ == stacks_.size()) {
      void* stack =
          mmap(nullptr, Fiber::kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) throw std::bad_alloc();
      stacks_.push_back(static_cast<unsigned char*>(stack));
    }
    return stacks_[next_++];
  }
  void reuse() { next_ = 0; }

 private:
  std::vector<unsigned char*> stacks_;
  size_t next_ = 0;
};

class Machine;
Machine* machine = nullptr;  // of the launch that runs; there is one at a time
Thread* current = nullptr;
std::mutex one_launch;
Stacks stacks;
std::vector<Ranges::Range> written_before;  // by the last launch, which one that starts early runs beside

class Machine {
 public:
  Machine(const Grid& grid, const Ranges& ranges, const std::function<void()>& body)
      : grid_(grid), ranges_(ranges.all()), body_(body), order_(grid.blocks / grid.cluster) {
    std::iota(order_.begin(), order_.end(), 0u);
    if (settings().order != 0) {
      std::mt19937 random(settings().order);
      for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[random() % i]);
    }
    const unsigned fits = static_cast<unsigned>(settings().processors * settings().blocks_per_processor) / grid.cluster;
    clusters_.resize(std::min<size_t>(std::max(1u, fits), order_.size()));
    stacks.reuse();
    for (Cluster& cluster : clusters_) {
      cluster.blocks.resize(grid.cluster);
      for (Block& block : cluster.blocks) {
        block.threads.resize(grid.threads);
        block.warps.resize((grid.threads + kWarp - 1) / kWarp);
        block.shared.resize(grid.shared);
        block.words.resize((grid.shared + 3) / 4);
        for (unsigned i = 0; i < grid.threads; ++i) stacks_.push_back(stacks.get());
      }
    }
  }

  void run() {
    for (Cluster& cluster : clusters_) start(cluster);
    size_t idle = 0;  // threads in a row that found what they wait for unchanged
    while (error_.empty() && !ready_.empty()) {
      Thread* thread = ready_.front();
      ready_.pop_front();
      thread->polling = false;
      current = thread;
      thread->fiber.resume();
      idle = thread->polling ? idle + 1 : 0;
      if (idle > ready_.size() + 1) fail("waits for ever: nothing that still runs sets what the others wait for");
      if (thread->done && thread->block->cluster->running == 0) start(*thread->block->cluster);
    }
    if (error_.empty() && finished_ != order_.size()) error_ = "stopped: " + stuck();
    if (!error_.empty()) throw std::runtime_error(std::string(grid_.name) + " (emulated): " + error_);
  }

  // In a fiber: stops the launch. Nobody resumes the others.
  [[noreturn]] void stop(const std::string& what) {
    error_ =
        "block " + std::to_string(current->block->index) + ", thread " + std::to_string(current->index) + ": " + what;
    current->fiber.end();
  }

  void sync_block(const Site& site) {
    Block& block = *current->block;
    if (block.running != grid_.threads)
      stop("divergent barrier: " + described(site) + " after a thread of the block has ended");
    const auto release = [&] {
      ++block.interval;
      for (Thread& thread : block.threads) wake(thread);
    };
    wait(block.barrier, grid_.threads, site, "barrier", release);
  }

  void sync_cluster(const Site& site) {
    Cluster& cluster = *current->block->cluster;
    const unsigned all = grid_.threads * grid_.cluster;
    if (cluster.running != all)
      stop("divergent barrier: " + described(site) + " after a thread of the cluster has ended");
    const auto release = [&] {
      for (Block& block : cluster.blocks) {
        ++block.interval;
        for (Thread& thread : block.threads) wake(thread);
      }
    };
    wait(cluster.barrier, all, site, "cluster barrier", release);
  }

  uint64_t shuffle(uint64_t value, int lanes, const Site& site) {
    Block& block = *current->block;
    const unsigned first = current->index / kWarp * kWarp, lane = current->index % kWarp;
    if (first + kWarp > grid_.threads) stop("shuffle: " + described(site) + " in a warp that is not full");
    Warp& warp = block.warps[current->index / kWarp];
    const unsigned turn = current->turn++ % 2;
    warp.values[turn][lane] = value;
    const auto release = [&] {
      for (unsigned i = 0; i < kWarp; ++i) wake(block.threads[first + i]);
    };
    wait(warp.shuffle, kWarp, site, "shuffle", release);
    return warp.values[turn][(lane ^ static_cast<unsigned>(lanes)) % kWarp];
  }

  unsigned blocks() const { return grid_.blocks; }

  void poll() {
    current->polling = true;
    ready_.push_back(current);
    current->fiber.suspend();
  }

  void check_global(const void* p, size_t bytes, size_t alignment, bool writes, bool vector) {
    const auto begin = reinterpret_cast<uintptr_t>(p);
    traffic().vectors += vector;
    if (writes)
      traffic().stored += static_cast<int64_t>(bytes);
    else if (vector || first_read(begin))
      traffic().loaded += static_cast<int64_t>(bytes);
    if (begin % alignment != 0) stop("misaligned access of " + std::to_string(bytes) + " bytes of global memory");
    if (grid_.early && !current->waited) check_unwritten(begin, bytes);
    check_memory(begin, bytes, writes);
  }

  void check_unwritten(uintptr_t begin, size_t bytes) {
    for (const Ranges::Range& range : written_before)
      if (begin < range.end && range.begin < begin + bytes)
        stop("race: memory that the launch before writes, without a wait for it");
  }

  void check_memory(uintptr_t begin, size_t bytes, bool writes) {
    if (last_ < ranges_.size() && holds(ranges_[last_], begin, bytes, writes)) return;
    for (last_ = 0; last_ < ranges_.size(); ++last_)
      if (holds(ranges_[last_], begin, bytes, writes)) return;
    stop(std::string(writes ? "write to" : "read of") + " global memory that is not the launch's" +
         (writes ? ", or only to be read" : ""));
  }

  unsigned char* check_shared(unsigned rank, int64_t offset, size_t bytes, bool writes) {
    if (rank >= grid_.cluster)
      stop("shared memory of block " + std::to_string(rank) + " of a cluster of " + std::to_string(grid_.cluster));
    Block& block = current->block->cluster->blocks[rank];
    if (block.running == 0) stop("shared memory of a block that has ended");
    if (offset < 0 || offset + bytes > grid_.shared)
      stop((writes ? "write to" : "read of") + std::string(" shared memory outside of the block's: byte ") +
           std::to_string(offset) + " of " + std::to_string(grid_.shared));
    if (offset % static_cast<int64_t>(std::min<size_t>(bytes, 16)) != 0) stop("misaligned access of shared memory");
    const unsigned who = current->block->rank * grid_.threads + current->index;
    for (int64_t at = offset; at < offset + static_cast<int64_t>(bytes); at += 4 - at % 4) {
      Word& word = block.words[at / 4];
      const unsigned now = block.interval;
      const unsigned others = at % 4 == 0 && bytes >= 4 ? 15u : ((1u << std::min<int64_t>(bytes, 4)) - 1) << at % 4;
      const bool written_now = word.writer != Word::kNobody && word.written == now && word.writer != who;
      const bool read_now = word.reader != Word::kNobody && word.read == now && word.reader != who;
      if (writes) {
        if (written_now || read_now)
          stop("race: shared memory written that another thread uses before the next barrier");
        word.writer = who, word.written = now, word.valid |= others;
      } else {
        if ((word.valid & others) != others) stop("uninitialised shared memory: byte " + std::to_string(at));
        if (written_now) stop("race: shared memory read that another thread wrote since the last barrier");
        word.reader = read_now ? Word::kMany : who, word.read = now;
      }
    }
    return block.shared.data() + offset;
  }

 private:
  // False for a number that the block has read before, as far as it remembers: all lanes of a warp get it from one
  // access.
  bool first_read(uintptr_t address) {
    uintptr_t& known = current->block->numbers[address / 2 * 0x9e3779b97f4a7c15u >> 54];
    if (known == address) return false;
    known = address;
    return true;
  }

  static bool holds(const Ranges::Range& range, uintptr_t begin, size_t bytes, bool writes) {
    return range.begin <= begin && begin + bytes <= range.end && (range.writable || !writes);
  }

  static void enter(void* thread) {
    machine->body_();
    machine->finish(*static_cast<Thread*>(thread));
  }

  [[noreturn]] void finish(Thread& thread) {
    Block& block = *thread.block;
    thread.done = true;
    --block.running, --block.cluster->running;
    const Barrier& barrier = block.barrier.arrived > 0 ? block.barrier : block.cluster->barrier;
    if (barrier.arrived > 0) stop("divergent barrier: a thread ends while others wait at " + described(barrier.site));
    if (block.cluster->running == 0) ++finished_;
    thread.fiber.end();
  }

  // Fills the place of a cluster that has ended with the next one.
  void start(Cluster& cluster) {
    if (started_ == order_.size()) return;
    const unsigned index = order_[started_++];
    cluster.barrier = {};
    cluster.running = grid_.threads * grid_.cluster;
    const size_t place = static_cast<size_t>(&cluster - clusters_.data()) * grid_.cluster;
    for (unsigned rank = 0; rank < grid_.cluster; ++rank) {
      Block& block = cluster.blocks[rank];
      block.cluster = &cluster;
      block.index = index * grid_.cluster + rank, block.rank = rank;
      block.numbers.fill(0);
      block.barrier = {}, block.running = grid_.threads, block.interval = 0;
      std::fill(block.words.begin(), block.words.end(), Word{});
      std::fill(block.warps.begin(), block.warps.end(), Warp{});
      for (unsigned i = 0; i < grid_.threads; ++i) {
        Thread& thread = block.threads[i];
        thread.block = &block, thread.index = i, thread.done = thread.polling = thread.waited = false, thread.turn = 0;
        thread.fiber.prepare(stacks_[(place + rank) * grid_.threads + i], enter, &thread);
        ready_.push_back(&thread);
      }
    }
  }

  // The last to arrive goes on at once, the others when they are next in turn.
  template <class Release>
  void wait(Barrier& barrier, unsigned all, const Site& site, const char* what, Release&& release) {
    if (barrier.arrived > 0 && !same(barrier.site, site))
      stop(std::string("divergent ") + what + ": " + described(site) + " while others wait at " +
           described(barrier.site));
    barrier.site = site;
    if (++barrier.arrived < all) {
      current->fiber.suspend();
      return;
    }
    barrier.arrived = 0;
    release();
  }

  void wake(Thread& thread) {
    if (&thread != current) ready_.push_back(&thread);
  }

  void fail(const std::string& what) { error_ = what; }

  std::string stuck() const {
    for (const Cluster& cluster : clusters_) {
      if (cluster.barrier.arrived > 0) return "divergent cluster barrier " + described(cluster.barrier.site);
      for (const Block& block : cluster.blocks) {
        for (const Warp& warp : block.warps)
          if (warp.shuffle.arrived > 0) return "divergent shuffle " + described(warp.shuffle.site);
        if (block.barrier.arrived > 0) return "divergent barrier " + described(block.barrier.site);
      }
    }
    return "nothing can run";
  }

  const Grid& grid_;
  const std::vector<Ranges::Range>& ranges_;
  const std::function<void()>& body_;
  std::vector<unsigned> order_;  // of the clusters
  size_t started_ = 0, finished_ = 0, last_ = 0;
  std::vector<Cluster> clusters_;  // those that run
  std::vector<unsigned char*> stacks_;
  std::deque<Thread*> ready_;
  std::string error_;
};

}  // namespace

Settings& settings() {
  static Settings settings;
  return settings;
}

Traffic& traffic() {
  static Traffic traffic;
  return traffic;
}

void run(const Grid& grid, const Ranges& ranges, const std::function<void()>& body) {
  const auto refuse = [&](const std::string& why) {
    throw std::runtime_error(std::string(grid.name) + " (emulated): " + why);
  };
  if (grid.threads == 0 || grid.threads > 1024) refuse(std::to_string(grid.threads) + " threads");
  if (grid.blocks == 0 || grid.blocks > 0x7fffffffu || grid.blocks % grid.cluster != 0)
    refuse("blocks that do not make up clusters");
  if (grid.cluster > static_cast<unsigned>(settings().max_cluster))
    refuse("a cluster of " + std::to_string(grid.cluster));
  if (grid.cluster > static_cast<unsigned>(settings().fitting_cluster))
    refuse("no room for a cluster of " + std::to_string(grid.cluster));
  if (grid.shared > settings().shared_bytes) refuse(std::to_string(grid.shared) + " bytes of shared memory");
  const std::lock_guard lock(one_launch);
  ++traffic().launches;
  Machine running(grid, ranges, body);
  machine = &running;
  try {
    running.run();
  } catch (...) {
    machine = nullptr;
    throw;
  }
  machine = nullptr;
  written_before.clear();
  for (const Ranges::Range& range : ranges.all())
    if (range.writable) written_before.push_back(range);
}

}  // namespace fdistill::emulator

namespace fdistill::gpu {

using emulator::current;
using emulator::machine;

unsigned thread() { return current->index; }
unsigned threads() { return static_cast<unsigned>(current->block->threads.size()); }
unsigned block() { return current->block->index; }
unsigned blocks() { return machine->blocks(); }
bool old_code() { return emulator::settings().code < 90; }
unsigned own_rank() { return current->block->rank; }
unsigned reachable_rank(unsigned rank) { return old_code() ? own_rank() : rank; }
unsigned cluster_size() { return old_code() ? 1 : static_cast<unsigned>(current->block->cluster->blocks.size()); }
unsigned cluster_rank() { return old_code() ? 0 : own_rank(); }
void wait_for_previous_kernel() { current->waited |= !old_code(); }

void sync_block(Site site) { machine->sync_block(site); }
void sync_cluster(Site site) {
  if (!old_code()) machine->sync_cluster(site);
}
uint64_t shuffle_bits(uint64_t value, int lanes, const Site& site) { return machine->shuffle(value, lanes, site); }

void check_global(const void* p, size_t bytes, size_t alignment, bool writes, bool vector) {
  machine->check_global(p, bytes, alignment, writes, vector);
}

void prefetch(const void* p) {
  ++emulator::traffic().prefetched;
  machine->check_memory(reinterpret_cast<uintptr_t>(p), 1, false);
}

void wait_until_set(const unsigned* p) {
  while (load(p) == 0) machine->poll();
}

unsigned char* check_shared(unsigned rank, int64_t offset, size_t bytes, bool writes) {
  return machine->check_shared(rank, offset, bytes, writes);
}

void shared_index_error(int64_t i, int64_t count) {
  machine->stop("element " + std::to_string(i) + " of " + std::to_string(count) + " in shared memory");
}

// ------------------------------------------------------------------------------------------------------ the host's
// side

namespace {
thread_local Device emulated;  // two threads may prepare a launch each
}

const Device& current_device() {
  const emulator::Settings& now = emulator::settings();
  emulated = {now.shared_bytes, now.level2_bytes};
  return emulated;
}

Code code_of(const char*, const void*, unsigned, size_t) {
  const emulator::Settings& now = emulator::settings();
  const bool knows = now.code >= 90 && now.max_cluster > 1;
  return {knows ? std::min(now.max_cluster, now.fitting_cluster) : 1, knows};
}

unsigned resident_blocks(const char*, const void*, unsigned, size_t) {
  const emulator::Settings& now = emulator::settings();
  return static_cast<unsigned>(now.processors * now.blocks_per_processor);
}

}  // namespace fdistill::gpu

#include "pool.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>
#include <unordered_map>

#include "sanitizers.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fdistill {
namespace {

constexpr size_t kGrain = size_t{2} << 20;  // a huge page

struct Pool {
  std::mutex mutex;
  std::unordered_map<void*, size_t> size_of;  // every block
  std::deque<void*> unused;                   // oldest first
  size_t in_use = 0, most_in_use = 0, kept = 0;
};

Pool& pool() {
  static Pool* const instance = new Pool;  // gradients may be freed after static destructors have run
  return *instance;
}

void* from_system(size_t bytes) {
  void* block = std::aligned_alloc(kGrain, bytes);
  if (block == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  madvise(block, bytes, MADV_HUGEPAGE);
#endif
  return block;
}

void forget_oldest(Pool& p) {
  void* block = p.unused.front();
  p.unused.pop_front();
  p.kept -= p.size_of.at(block);
  p.size_of.erase(block);
  std::free(block);
}

}  // namespace

void* pool_acquire(size_t bytes) {
  const size_t size = (std::max<size_t>(bytes, 1) + kGrain - 1) / kGrain * kGrain;
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  void* block = nullptr;
  // The last block of this size that was given back: the likeliest to be in the caches.
  const auto found = std::find_if(p.unused.rbegin(), p.unused.rend(), [&](void* b) { return p.size_of.at(b) == size; });
  if (found != p.unused.rend()) {
    block = *found;
    p.unused.erase(std::next(found).base());
    p.kept -= size;
  } else {
    block = from_system(size);
    p.size_of.emplace(block, size);
  }
  p.in_use += size;
  p.most_in_use = std::max(p.most_in_use, p.in_use);
  while (!p.unused.empty() && p.kept + p.in_use > p.most_in_use) forget_oldest(p);
  sanitizers::allow(block, bytes);
  sanitizers::forbid(static_cast<char*>(block) + bytes, size - bytes);
  return block;
}

void pool_release(void* block) {
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  const size_t size = p.size_of.at(block);
  p.in_use -= size;
  p.kept += size;
  p.unused.push_back(block);
  sanitizers::forbid(block, size);
}

size_t pool_trim() {
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  const size_t bytes = p.kept;
  while (!p.unused.empty()) forget_oldest(p);
  p.most_in_use = p.in_use;
  return bytes;
}

}  // namespace fdistill

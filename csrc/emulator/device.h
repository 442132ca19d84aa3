// The functions of cuda/device.h for the host compiler. What the running thread is allowed to do is decided in
// emulator.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define FD_ARGUMENTS(Record) const Record&

namespace fdistill::gpu {

struct alignas(16) Vec16 {
  uint32_t word[4];
};
struct alignas(8) Vec8 {
  uint32_t word[2];
};

#if defined(__cpp_lib_source_location)
using Site = std::source_location;
#else  // Clang before 16
class Site {
 public:
  static constexpr Site current(const char* file = __builtin_FILE(), unsigned line = __builtin_LINE(),
                                unsigned column = __builtin_COLUMN()) {
    Site site;
    site.file_ = file, site.line_ = line, site.column_ = column;
    return site;
  }
  constexpr const char* file_name() const { return file_; }
  constexpr unsigned line() const { return line_; }
  constexpr unsigned column() const { return column_; }

 private:
  const char* file_ = "";
  unsigned line_ = 0, column_ = 0;
};
#endif

unsigned thread();
unsigned threads();
unsigned block();
unsigned blocks();
unsigned cluster_size();
unsigned cluster_rank();

void sync_block(Site site = Site::current());
void sync_cluster(Site site = Site::current());
uint64_t shuffle_bits(uint64_t value, int lanes, const Site& site);
void wait_for_previous_kernel();
inline void let_next_kernel_start() {}

template <class T>
T shuffle_xor(T value, int lanes, Site site = Site::current()) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= sizeof(bits));
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle_bits(bits, lanes, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// ------------------------------------------------------------------------------------------------------ global memory

void check_global(const void* p, size_t bytes, size_t alignment, bool writes, bool vector);

template <class T>
constexpr bool kVector = std::is_same_v<T, Vec16> || std::is_same_v<T, Vec8>;

void prefetch(const void* p);

template <class T>
T load(const T* p) {
  check_global(p, sizeof(T), alignof(T), false, kVector<T>);
  return *p;
}
template <class T>
T load_once(const T* p) {
  return load(p);
}
template <class T>
T load_fresh(const T* p) {
  return load(p);
}
template <class T>
void store(T* p, std::type_identity_t<T> value) {
  check_global(p, sizeof(T), alignof(T), true, kVector<T>);
  *p = value;
}
inline void store_once(Vec16* p, const Vec16& value) { store(p, value); }
inline void store_once(Vec8* p, const Vec8& value) { store(p, value); }

template <class T>
T add_atomically(T* p, std::type_identity_t<T> value) {
  const T before = load(p);
  store(p, before + value);
  return before;
}
inline void fence() {}
void wait_until_set(const unsigned* p);

// ------------------------------------------------------------------------------------------------------ shared memory

// The address of `bytes` of shared memory at an offset, in the block of that rank of the cluster.
unsigned char* check_shared(unsigned rank, int64_t offset, size_t bytes, bool writes);
unsigned own_rank();
unsigned reachable_rank(unsigned rank);  // its own in code that knows no clusters
[[noreturn]] void shared_index_error(int64_t i, int64_t count);

template <class T>
struct Shared {
  uint32_t offset;
  int64_t count;

  T get(int64_t i) const { return get_from(own_rank(), i); }
  void set(int64_t i, const T& value) const {
    if (i < 0 || i >= count) shared_index_error(i, count);
    std::memcpy(check_shared(own_rank(), at(i), sizeof(T), true), &value, sizeof(T));
  }
  T get_from(unsigned rank, int64_t i) const {
    if (i < 0 || i >= count) shared_index_error(i, count);
    T value;
    std::memcpy(&value, check_shared(reachable_rank(rank), at(i), sizeof(T), false), sizeof(T));
    return value;
  }

 private:
  int64_t at(int64_t i) const { return offset + i * static_cast<int64_t>(sizeof(T)); }
};

template <class T>
Shared<T> shared_memory(uint32_t offset, int64_t count) {
  return {offset, count};
}

}  // namespace fdistill::gpu

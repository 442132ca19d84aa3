// What AddressSanitizer and ThreadSanitizer cannot see for themselves (make sanitize). Nothing in a build without them.
#pragma once

#include <cstddef>

#if defined(__has_feature)
#define FD_HAS_FEATURE(name) __has_feature(name)
#else
#define FD_HAS_FEATURE(name) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || FD_HAS_FEATURE(address_sanitizer)
#define FD_ADDRESS_SANITIZER 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define FD_ADDRESS_SANITIZER 0
#endif
#if defined(__SANITIZE_THREAD__) || FD_HAS_FEATURE(thread_sanitizer)
#define FD_THREAD_SANITIZER 1
#else
#define FD_THREAD_SANITIZER 0
#endif

// With every access checked, functions of thousands of inlined ones take minutes to compile.
#if FD_ADDRESS_SANITIZER || FD_THREAD_SANITIZER
#define FD_ALWAYS_INLINE
#else
#define FD_ALWAYS_INLINE __attribute__((always_inline))
#endif

namespace fdistill::sanitizers {

constexpr bool kAddress = FD_ADDRESS_SANITIZER, kThread = FD_THREAD_SANITIZER;

// Memory that nobody is to touch, although it is allocated; and that may be touched again.
inline void forbid([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#if FD_ADDRESS_SANITIZER
  __asan_poison_memory_region(begin, bytes);
#endif
}
inline void allow([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#if FD_ADDRESS_SANITIZER
  __asan_unpoison_memory_region(begin, bytes);
#endif
}

// Around a switch to another stack, of that size: before it, with the place that keeps what belongs to the frames left
// behind (null where they are done with); and after it, with what was kept of those that go on (null at their first),
// which says where it came from.
inline void leave_stack([[maybe_unused]] void** kept, [[maybe_unused]] const void* next, [[maybe_unused]] size_t size) {
#if FD_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(kept, next, size);
#endif
}
inline void enter_stack([[maybe_unused]] void* kept, [[maybe_unused]] const void** before,
                        [[maybe_unused]] size_t* size) {
#if FD_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(kept, before, size);
#endif
}

}  // namespace fdistill::sanitizers

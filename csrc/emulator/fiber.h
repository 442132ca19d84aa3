// Stackful coroutines: hand-written for x86-64, ucontext elsewhere.
#pragma once

#include <cstddef>

#include "sanitizers.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fdistill::emulator {

class Fiber {
 public:
  static constexpr size_t kStack = (sanitizers::kAddress || sanitizers::kThread ? 256 : 64) << 10;  // for larger frames

  // entry(argument) runs at the first resume() and must never return: it ends.
  void prepare(unsigned char* stack, void (*entry)(void*), void* argument);
  void resume();            // from outside, until the fiber suspends or ends
  void suspend();           // from inside
  [[noreturn]] void end();  // from inside, for good

 private:
  static void begin(void* fiber);
  void switch_to_own();
  void switch_to_caller();

  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  const unsigned char* stack_ = nullptr;
  // What a sanitizer keeps for either stack, and which one the caller's is.
  void *kept_ = nullptr, *caller_kept_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_size_ = 0;
#if defined(__x86_64__)
  void *own_ = nullptr, *caller_ = nullptr;  // stack pointers
#else
  ucontext_t own_, caller_;
#endif
};

}  // namespace fdistill::emulator

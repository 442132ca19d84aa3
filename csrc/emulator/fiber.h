// Stackful coroutines: hand-written for x86-64, ucontext elsewhere.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fdistill::emulator {

class Fiber {
 public:
  static constexpr size_t kStack = 64 << 10;

  // entry(argument) runs at the first resume() and must never return: it suspends for good.
  void prepare(unsigned char* stack, void (*entry)(void*), void* argument);
  void resume();   // from outside, until the fiber suspends
  void suspend();  // from inside

 private:
#if defined(__x86_64__)
  void *own_ = nullptr, *caller_ = nullptr;  // stack pointers
#else
  ucontext_t own_, caller_;
#endif
};

}  // namespace fdistill::emulator

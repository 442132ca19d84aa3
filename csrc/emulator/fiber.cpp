#include "fiber.h"

#include <cstdint>

namespace fdistill::emulator {

#if defined(__x86_64__)

// Saves the registers a function must preserve and the stack pointer, and goes on with another stack.
asm(R"(
.text
.type fdistill_switch_stack, @function
fdistill_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.type fdistill_enter_fiber, @function
fdistill_enter_fiber:
  movq %r12, %rdi
  callq *%r13
  ud2
)");

extern "C" {
void fdistill_switch_stack(void** save, void* to) __attribute__((visibility("hidden")));
void fdistill_enter_fiber() __attribute__((visibility("hidden")));
}

void Fiber::prepare(unsigned char* stack, void (*entry)(void*), void* argument) {
  auto* top = reinterpret_cast<void**>(stack + kStack);  // a multiple of 16
  *--top = nullptr;                                      // so that entry() finds the stack aligned as a call leaves it
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fdistill_enter_fiber);  // returned to
  *--top = nullptr;                                         // rbp
  *--top = nullptr;                                         // rbx
  *--top = argument;                                        // r12
  *--top = reinterpret_cast<void*>(entry);                  // r13
  *--top = nullptr;                                         // r14
  *--top = nullptr;                                         // r15
  own_ = top;
}

void Fiber::resume() { fdistill_switch_stack(&caller_, own_); }
void Fiber::suspend() { fdistill_switch_stack(&own_, caller_); }

#else

namespace {
void enter(unsigned entry_low, unsigned entry_high, unsigned argument_low,
           unsigned argument_high) {  // makecontext passes ints
  const auto join = [](unsigned low, unsigned high) {
    return static_cast<uintptr_t>(low) | static_cast<uintptr_t>(high) << 32;
  };
  reinterpret_cast<void (*)(void*)>(join(entry_low, entry_high))(
      reinterpret_cast<void*>(join(argument_low, argument_high)));
}
}  // namespace

void Fiber::prepare(unsigned char* stack, void (*entry)(void*), void* argument) {
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack, own_.uc_stack.ss_size = kStack, own_.uc_link = nullptr;
  const auto e = reinterpret_cast<uintptr_t>(entry), a = reinterpret_cast<uintptr_t>(argument);
  const auto half = [](uintptr_t v, int shift) { return static_cast<unsigned>(v >> shift); };
  makecontext(&own_, reinterpret_cast<void (*)()>(&enter), 4, half(e, 0), half(e, 32), half(a, 0), half(a, 32));
}

void Fiber::resume() { swapcontext(&caller_, &own_); }
void Fiber::suspend() { swapcontext(&own_, &caller_); }

#endif

}  // namespace fdistill::emulator

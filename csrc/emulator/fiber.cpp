#include "fiber.h"

#include <cstdint>

namespace fdistill::emulator {

void Fiber::begin(void* fiber) {
  Fiber& self = *static_cast<Fiber*>(fiber);
  sanitizers::enter_stack(nullptr, &self.caller_stack_, &self.caller_size_);
  self.entry_(self.argument_);
  __builtin_unreachable();
}

void Fiber::resume() {
  sanitizers::leave_stack(&caller_kept_, stack_, kStack);
  switch_to_own();
  sanitizers::enter_stack(caller_kept_, nullptr, nullptr);
}

void Fiber::suspend() {
  sanitizers::leave_stack(&kept_, caller_stack_, caller_size_);
  switch_to_caller();
  sanitizers::enter_stack(kept_, &caller_stack_, &caller_size_);
}

void Fiber::end() {
  sanitizers::leave_stack(nullptr, caller_stack_, caller_size_);
  switch_to_caller();
  __builtin_unreachable();
}

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
  stack_ = stack, entry_ = entry, argument_ = argument;
  sanitizers::allow(stack, kStack);                      // frames of a fiber that ended amid them
  auto* top = reinterpret_cast<void**>(stack + kStack);  // a multiple of 16
  *--top = nullptr;                                      // so that entry() finds the stack aligned as a call leaves it
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fdistill_enter_fiber);  // returned to
  *--top = nullptr;                                         // rbp
  *--top = nullptr;                                         // rbx
  *--top = this;                                            // r12
  *--top = reinterpret_cast<void*>(&Fiber::begin);          // r13
  *--top = nullptr;                                         // r14
  *--top = nullptr;                                         // r15
  own_ = top;
}

void Fiber::switch_to_own() { fdistill_switch_stack(&caller_, own_); }
void Fiber::switch_to_caller() { fdistill_switch_stack(&own_, caller_); }

#else

namespace {
void enter(unsigned begin_low, unsigned begin_high, unsigned fiber_low,
           unsigned fiber_high) {  // makecontext passes ints
  const auto join = [](unsigned low, unsigned high) {
    return static_cast<uintptr_t>(low) | static_cast<uintptr_t>(high) << 32;
  };
  reinterpret_cast<void (*)(void*)>(join(begin_low, begin_high))(reinterpret_cast<void*>(join(fiber_low, fiber_high)));
}
}  // namespace

void Fiber::prepare(unsigned char* stack, void (*entry)(void*), void* argument) {
  stack_ = stack, entry_ = entry, argument_ = argument;
  sanitizers::allow(stack, kStack);  // frames of a fiber that ended amid them
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack, own_.uc_stack.ss_size = kStack, own_.uc_link = nullptr;
  const auto b = reinterpret_cast<uintptr_t>(&Fiber::begin), f = reinterpret_cast<uintptr_t>(this);
  const auto half = [](uintptr_t v, int shift) { return static_cast<unsigned>(v >> shift); };
  makecontext(&own_, reinterpret_cast<void (*)()>(&enter), 4, half(b, 0), half(b, 32), half(f, 0), half(f, 32));
}

void Fiber::switch_to_own() { swapcontext(&caller_, &own_); }
void Fiber::switch_to_caller() { swapcontext(&own_, &caller_); }

#endif

}  // namespace fdistill::emulator

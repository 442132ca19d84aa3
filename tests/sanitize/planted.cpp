// One fault of each kind that make sanitize is there for, to see that it is reported; and the same without a fault.
#include <climits>
#include <cstdlib>
#include <thread>

namespace {
int total = 0;

void add(int times) {
  for (int i = 0; i < times; ++i) ++total;
}
}  // namespace

extern "C" {

// index: beyond the last of n is a heap overflow
int element(int n, int index) {
  auto* numbers = static_cast<int*>(std::calloc(n, sizeof(int)));
  const int found = numbers[index];
  std::free(numbers);
  return found;
}

// INT_MAX + 1 is a signed overflow
int successor(int number) { return number + 1; }

// 1 << 32 is a shift by more than an int has
int power(int exponent) { return 1 << exponent; }

// 1e10 has no place in an int
int rounded(double value) { return static_cast<int>(value); }

// two threads at a time are a data race
int count(bool together) {
  std::thread first(add, 1000);
  if (!together) first.join();
  std::thread second(add, 1000);
  if (together) first.join();
  second.join();
  return total;
}

// ten times, since an address may still lie about on the stack; given back, or forgotten
void allocate(bool given_back) {
  for (int i = 0; i < 10; ++i) {
    void* volatile memory = std::malloc(1000);
    if (given_back) std::free(memory);
  }
}
}

#pragma once

#include <vector>

namespace fdistill::emulator {

// Launches the kernel of that name; what the one without a fault writes.
std::vector<float> run_fault(const char* name);

}  // namespace fdistill::emulator

// Memory for large gradients, kept between calls.
#pragma once

#include <cstddef>

namespace fdistill {

// A fresh block from the system costs a page fault for every 4 KiB, several times what writing the gradient takes; a block
// that a gradient gave back costs nothing. What is kept never exceeds the most that was in use at once.
void* pool_acquire(size_t bytes);
void pool_release(void* block);

// Gives every unused block back to the system; returns their bytes.
size_t pool_trim();

}  // namespace fdistill

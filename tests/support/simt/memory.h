// Global memory as the blocks of one launch see it, weaker than any GPU's: what a block writes is
// seen by others when it fences, and it sees what others wrote when a thread fences that has read,
// atomically, something that they wrote. Without that it sees memory as it was at the launch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

// When another block sees an atomic exchange: at once, at the next fence, or either.
enum class Exchange { at_once, at_fence, either };

void add_buffer(void* memory, size_t bytes);
void remove_buffer(void* memory);

void begin_launch();
void begin_block(Exchange exchange, unsigned seed);
void end_block();
void end_launch();

// Whether two blocks of this launch wrote different values to one place, neither atomically.
bool blocks_disagree();

}  // namespace simt

// Which block of a group is the last to finish, without a counter that must be zero at the launch:
// that would take a launch of its own, or memory that two streams might share.
//
// Each block leaves a token at its place and then looks whether all of its group have left theirs.
// The token is new at every launch, so it does not matter what the memory held; a replayed CUDA
// graph launches with the same token again, so whoever finds all tokens clears them. Two blocks may
// find all tokens: they do the same work and write the same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace rgtg::cuda {

// `shared` is used once per kernel. What any thread of the group wrote before its block's last
// barrier, or thread 0 at any time, is visible to all of a block that gets true. Ends with a
// barrier.
__device__ inline bool finishes_group(uint64_t* places, int group, int mine, uint64_t token,
                                      int& shared) {
  auto* place = reinterpret_cast<unsigned long long*>(places);
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) {
      __threadfence();  // or the token is seen before what the block wrote
      atomicExch(&place[mine], static_cast<unsigned long long>(token));
    }
    __syncwarp();
    __threadfence();  // or two blocks that end together each miss the other's token
    int found = 1;
    for (int i = static_cast<int>(threadIdx.x); i < group; i += 32) {
      found &= atomicAdd(&place[i], 0ull) == token;
    }
    found = __all_sync(0xFFFFFFFFu, found);
    __threadfence();  // or what the others wrote is read from before they wrote it
    if (threadIdx.x == 0) shared = found;
  }
  __syncthreads();
  return shared;
}

}  // namespace rgtg::cuda

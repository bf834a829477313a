// The path of one read: teams of blocks keep a group of channels on chip, in shared memory, until its sums
// are known. A team takes one group after another, and waits for other teams at the beginning only.
#pragma once

#include <cstdint>

#include "cuda/batch_norm/tiles.h"
#include "cuda/tensor_table.h"

namespace steadygrad::cuda {

constexpr int kMostTeamChannels = 64;  // that a group may have

// The static shared memory that a kernel may take; the rest is for units.
template <class T>
constexpr int64_t kTeamStaticBytes = (sizeof(T) == 8 ? 32 : 20) << 10;

struct Teams {
  Tiles tiles;                  // tiles.splits is the number of blocks of a team
  int32_t count = 0;            // 0 where the path of two reads is taken
  int32_t kept = 0;             // units of one tensor that a thread keeps
  bool meets = false;           // whether the whole grid meets in the first round
  unsigned* arrived = nullptr;  // a counter for each team, kArrivedStride apart
  double* partials = nullptr;   // indexed by round % 2, team, block of the team and channel

  STEADYGRAD_INLINE int64_t blocks() const { return static_cast<int64_t>(count) * tiles.splits; }
};

constexpr int kArrivedStride = 32;  // a cache line for each team

// The teams for a call that reads `copies` tensors and keeps them; `tiles` are those of two reads.
Teams plan_teams(const char* function, const Tiles& tiles, int copies, Stream stream);

// Gives the teams the memory in which their blocks meet. A partial of a channel is so many `numbers`.
void take_team_memory(Teams& teams, int numbers, Arena& arena);

}  // namespace steadygrad::cuda

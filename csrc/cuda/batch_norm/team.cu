// Decides which path a call takes, and how its teams are made up.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/batch_norm/finish.h"
#include "cuda/batch_norm/team.h"
#include "cuda/launch.h"

namespace steadygrad::cuda {
namespace {

constexpr int64_t kReservedBytes = 1 << 10;  // of each block's shared memory, which the system takes
constexpr int64_t kFewTeamItems = 8;         // a thread with fewer is not worth another block
// What takes time without moving elements, in bytes that memory could have moved meanwhile: a meeting of a
// team and a trip to L2 for partials, each for one block, and a launch.
constexpr double kMeetingBytes = 36 << 10;
constexpr double kTripBytes = 10 << 10;
constexpr double kLaunchBytes = 10 << 20;
// What a plan for one read has to save: the model has met no hardware, and two reads are the safe choice.
constexpr double kWorthATeam = 1.25;

constexpr int64_t kNcclMultiprocessors = 16;

enum class Choice : uint8_t { cheaper, one_read, two_reads };

Choice chosen_path() {
  const char* const value = std::getenv("STEADYGRAD_BATCH_NORM_PATH");
  if (value == nullptr || *value == '\0') return Choice::cheaper;
  const std::string text = value;
  if (text == "one_read") return Choice::one_read;
  if (text == "two_reads") return Choice::two_reads;
  throw std::invalid_argument("STEADYGRAD_BATCH_NORM_PATH: expected one_read or two_reads, got '" + text +
                              "'");
}

// Multiprocessors to leave alone: a cooperative launch waits until there is room for all of its blocks, and
// NCCL's kernels, which a data-parallel backward runs beside it, hold some for as long as they communicate.
int64_t launch_margin() {
  const char* const value = std::getenv("STEADYGRAD_BATCH_NORM_MARGIN");
  if (value == nullptr || *value == '\0') {
    const char* const processes = std::getenv("WORLD_SIZE");
    return processes != nullptr && std::atoi(processes) > 1 ? kNcclMultiprocessors : 0;
  }
  char* end = nullptr;
  const long margin = std::strtol(value, &end, 10);
  if (*end == '\0' && margin >= 0) return margin;
  throw std::invalid_argument(
      "STEADYGRAD_BATCH_NORM_MARGIN: expected a number of multiprocessors, 0 or more, got '" +
      std::string(value) + "'");
}

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t attribute(const char* function, cudaDeviceAttr name, Stream stream) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, stream.device), function);
  return value;
}

struct Limits {
  int64_t blocks;  // at a time
  int64_t kept;    // units of each tensor that a thread can keep
};

// The teams for groups of this width; their count is 0 where a group does not fit on the device.
Teams teams_of(const Tiles& of, int32_t width, const Limits& limits) {
  Teams teams;
  Tiles& tiles = teams.tiles;
  tiles = of;
  if (tiles.columns) {
    const int64_t units = tiles.shape.channels / kUnit;
    tiles.groups = static_cast<int32_t>(divided_up(units, width));
    tiles.width = static_cast<int32_t>(divided_up(units, tiles.groups));
    tiles.groups = static_cast<int32_t>(divided_up(units, tiles.width));
  } else {
    tiles.width = width;
    tiles.groups = static_cast<int32_t>(divided_up(tiles.shape.channels, width));
  }
  tiles.depth = kTileThreads / tiles.width;
  tiles.depth_planes = tiles.depth / tiles.slots;
  tiles.depth_slots = tiles.depth % tiles.slots;
  if (limits.kept == 0) return teams;
  const int64_t least = divided_up(tiles.items, limits.kept * tiles.depth);
  if (least > limits.blocks) return teams;
  // As few rounds as possible, and in each of them as many blocks as have something to do.
  const int64_t rounds = divided_up(tiles.groups, limits.blocks / least);
  const int64_t count = divided_up(tiles.groups, rounds);
  const int64_t useful = std::max<int64_t>(least, tiles.items / (tiles.depth * kFewTeamItems));
  const int64_t blocks = std::min(limits.blocks / count, useful);
  tiles.items_per_block = divided_up(divided_up(tiles.items, blocks), tiles.depth) * tiles.depth;
  tiles.splits = static_cast<int32_t>(divided_up(tiles.items, tiles.items_per_block));
  teams.count = static_cast<int32_t>(count);
  teams.kept = static_cast<int32_t>(tiles.items_per_block / tiles.depth);
  return teams;
}

// What a block waits for the partials of so many blocks, of which each thread of a channel loads a part.
double trip_bytes(int64_t blocks, int64_t depth) {
  return kTripBytes * static_cast<double>(divided_up(divided_up(blocks, depth), kPartialsAtOnce));
}

// How many times as much as is asked for memory moves, where a group takes a small part of each row.
double waste(const Tiles& tiles, int64_t unit_bytes) {
  if (!tiles.columns || tiles.groups == 1 || tiles.width * unit_bytes >= 128) return 1;
  return tiles.width * unit_bytes >= 64 ? 1.1 : 1.6;
}

}  // namespace

Teams plan_teams(const char* function, const Tiles& tiles, int copies, Stream stream) {
  const Choice choice = chosen_path();
  if (choice == Choice::two_reads || !tiles.wide || tiles.items == 0) return Teams();
  if (attribute(function, cudaDevAttrCooperativeLaunch, stream) == 0) return Teams();
  const bool fp64 = tiles.dtype == DType::float64;
  const int64_t unit_bytes = kUnit * (fp64 ? 8 : tiles.dtype == DType::float32 ? 4 : 2);
  const int64_t at_once = fp64 ? 1 : 2;
  const int64_t shared = std::min(
      attribute(function, cudaDevAttrMaxSharedMemoryPerMultiprocessor, stream) / at_once - kReservedBytes,
      attribute(function, cudaDevAttrMaxSharedMemoryPerBlockOptin, stream));
  const int64_t left =
      std::max<int64_t>(0, shared - (fp64 ? kTeamStaticBytes<double> : kTeamStaticBytes<float>));
  const int64_t free = attribute(function, cudaDevAttrMultiProcessorCount, stream) - launch_margin();
  const Limits limits{std::max<int64_t>(0, free) * at_once, left / (unit_bytes * copies * kTileThreads)};

  const int64_t partial_bytes = copies == 1 ? sizeof(Moments) : sizeof(GradientSums);
  const double numel = static_cast<double>(tiles.numel());
  const double element = static_cast<double>(unit_bytes) / kUnit;
  Teams best;
  double best_cost = 0;
  for (int32_t width = 8; width >= 1; width /= 2) {
    if (tiles.columns && width > 1 && width * unit_bytes > 128) continue;
    const Teams teams = teams_of(tiles, width, limits);
    if (teams.count == 0) continue;
    const double rounds = static_cast<double>(divided_up(teams.tiles.groups, teams.count));
    const double moved = static_cast<double>(teams.kept * kTileThreads * unit_bytes * (copies + 1));
    const int64_t channels = teams.tiles.group_channels();
    // Every block of a team reads the partials of all of them.
    const int64_t splits = teams.tiles.splits;
    const double merge = splits == 1 ? 0
                                     : trip_bytes(splits, kTileThreads / channels) +
                                           static_cast<double>(splits * channels * partial_bytes);
    const double cost = rounds * static_cast<double>(limits.blocks) *
                        (moved * waste(teams.tiles, unit_bytes) + kMeetingBytes + merge);
    if (best.count == 0 || cost < best_cost) {
      best = teams;
      best_cost = cost;
    }
  }
  if (best.count == 0 || choice == Choice::one_read) return best;
  // The second read of two finds part of what it needs in L2.
  const double in_l2 = 0.5 * static_cast<double>(attribute(function, cudaDevAttrL2CacheSize, stream));
  const double two_reads = numel * element * (2 * copies + 1) - std::min(in_l2, numel * element * copies) +
                           2 * kLaunchBytes +
                           static_cast<double>(limits.blocks) * trip_bytes(tiles.splits, kFinishDepth);
  return best_cost * kWorthATeam <= two_reads ? best : Teams();
}

void take_team_memory(Teams& teams, int numbers, Arena& arena) {
  teams.arrived = arena.take<unsigned>(int64_t{teams.count} * kArrivedStride);
  teams.partials = arena.take<double>(2 * teams.blocks() * teams.tiles.group_channels() * numbers);
}

}  // namespace steadygrad::cuda

// Decides how large the tiles are, and how many blocks share a group of channels.
#include <algorithm>

#include "cuda/batch_norm/tiles.h"
#include "cuda/launch.h"

namespace steadygrad::cuda {
namespace {

constexpr int64_t kFewItems = 16;      // a thread with fewer is not worth a block
constexpr int64_t kShortPlane = 1024;  // bytes; a warp takes a channel of shorter ones, a block else
constexpr int kMostWaves = 4;

int32_t divided_up(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

// As many splits as fill the blocks that run at a time, once or a few times over: the fewest that keep nearly
// all multiprocessors busy to the end.
int32_t choose_splits(int64_t groups, int64_t at_once, int64_t most) {
  int64_t best = 1;
  double best_use = 0;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    const int64_t splits = std::clamp<int64_t>(waves * at_once / groups, 1, most);
    const int64_t blocks = groups * splits;
    const int64_t places = divided_up(blocks, at_once) * at_once;
    const double use = static_cast<double>(blocks) / static_cast<double>(places);
    if (use > best_use * 1.02) {
      best = splits;
      best_use = use;
    }
  }
  return static_cast<int32_t>(best);
}

}  // namespace

Tiles tiles_for(const char* function, const BatchNormShape& shape, DType dtype, bool aligned, bool has_mask,
                Stream stream) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, stream.device), function);
  const int64_t bytes = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  Tiles tiles;
  tiles.shape = shape;
  tiles.dtype = dtype;
  tiles.columns = shape.inner == 1;
  if (tiles.columns) {
    tiles.wide = aligned && shape.channels % kUnit == 0;
    const int64_t units = (shape.channels + kUnit - 1) / kUnit;
    tiles.groups = divided_up(units, kWidestGroup);
    tiles.width = divided_up(units, tiles.groups);
    tiles.groups = divided_up(units, tiles.width);
    tiles.depth = kTileThreads / tiles.width;
    tiles.items = shape.outer;
  } else {
    tiles.wide = aligned && (!has_mask || shape.inner % kUnit == 0);
    tiles.slots = tiles.wide && shape.inner % kUnit != 0 ? (shape.inner + kUnit - 2) / kUnit + 1
                                                         : (shape.inner + kUnit - 1) / kUnit;
    tiles.depth = shape.inner * bytes < kShortPlane ? 32 : kTileThreads;
    tiles.width = kTileThreads / tiles.depth;
    tiles.groups = divided_up(shape.channels, tiles.width);
    tiles.items = shape.outer * tiles.slots;
    tiles.depth_planes = tiles.depth / tiles.slots;
    tiles.depth_slots = tiles.depth % tiles.slots;
  }
  const int64_t at_once = static_cast<int64_t>(multiprocessors) * (dtype == DType::float64 ? 1 : 2);
  const int64_t most = std::max<int64_t>(1, tiles.items / (tiles.depth * kFewItems));
  tiles.splits = choose_splits(tiles.groups, at_once, most);
  tiles.items_per_block = (tiles.items + tiles.splits - 1) / tiles.splits;
  tiles.items_per_block = (tiles.items_per_block + tiles.depth - 1) / tiles.depth * tiles.depth;
  tiles.splits = divided_up(tiles.items, tiles.items_per_block);
  return tiles;
}

}  // namespace steadygrad::cuda

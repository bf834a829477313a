// How a tensor's channels are summed and then visited again: in blocks of channels, each cut into units. A
// sum is made of its units in their order, and units follow from the shape alone: the same bits for any
// number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/batch_norm.h"
#include "cpu/batch_norm_kernels.h"
#include "cpu/parallel.h"

namespace steadygrad::cpu {

class ChannelBlocks {
 public:
  // `element_size` times all streams that both visits read.
  ChannelBlocks(const BatchNormShape& shape, int64_t element_size) : shape_(shape) {
    if (shape.inner == 1) {
      // Sums of 64 rows or more: those of the units are then little beside the rows.
      outer_ = std::max<int64_t>(64, kUnit / shape.channels);
      channels_ = shape.channels;
    } else if (shape.inner <= kUnit) {
      outer_ = kUnit / shape.inner;
      // Neighbouring channels, for longer reads; few enough that the second visit finds them in the cache.
      const int64_t wanted = kRead / (shape.inner * element_size);
      const int64_t cached = kCached / (shape.count() * element_size);
      channels_ = std::clamp<int64_t>(std::min(wanted, cached), 1, shape.channels);
    } else {
      pieces_ = (shape.inner + kUnit - 1) / kUnit;
    }
    units_ = (shape.outer + outer_ - 1) / outer_ * pieces_;
    blocks_ = (shape.channels + channels_ - 1) / channels_;
  }

  int64_t units() const { return units_; }
  int64_t first_channel(int64_t block) const { return block * channels_; }
  int64_t last_channel(int64_t block) const { return std::min(first_channel(block + 1), shape_.channels); }
  int64_t channels_in(int64_t block) const { return last_channel(block) - first_channel(block); }

  // Elements of one channel in a unit.
  int64_t count(int64_t unit) const {
    if (pieces_ > 1) return inner_end(unit) - inner_begin(unit);
    return (outer_end(unit) - outer_begin(unit)) * shape_.inner;
  }

  // Calls visit(rows, first element, first byte of the mask) for all rows of a unit of a block.
  template <class Visit>
  void for_each_rows(int64_t block, int64_t unit, Visit visit) const {
    const int64_t begin = outer_begin(unit);
    const int64_t end = outer_end(unit);
    const int64_t bytes = shape_.mask_row_bytes();
    if (shape_.inner == 1) {
      visit(Rows{end - begin, shape_.channels, false}, begin * shape_.channels, begin * bytes);
      return;
    }
    const Rows rows{channels_in(block), inner_end(unit) - inner_begin(unit), true};
    for (int64_t n = begin; n < end; ++n) {
      const int64_t row = n * shape_.channels + first_channel(block);
      visit(rows, row * shape_.inner + inner_begin(unit), row * bytes + inner_begin(unit) / 8);
    }
  }

  // Calls sum(block, unit) for all units, then finish(first channel, last channel), then visit(block, unit);
  // the units last summed are visited first.
  template <class Sum, class Finish, class Visit>
  void sum_then_visit(Sum sum, Finish finish, Visit visit) const {
    const int64_t elements = shape_.count() * shape_.channels;
    if (elements < kWorthATeam || blocks_ >= 4 * max_threads()) {
      // A thread keeps its block: what it reads again is in its cache.
      for_each_share(blocks_, elements, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
          for (int64_t unit = 0; unit < units_; ++unit) sum(block, unit);
          finish(first_channel(block), last_channel(block));
          for (int64_t unit = units_ - 1; unit >= 0; --unit) visit(block, unit);
        }
      });
      return;
    }
    const int64_t tasks = blocks_ * units_;
    for_each_share(tasks, elements, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) sum(task / units_, task % units_);
    });
    // Bringing the sums of a unit together costs about as much as a few elements.
    for_each_share(shape_.channels, shape_.channels * units_ * 4, finish);
    for_each_share(tasks, elements, [&](int64_t first, int64_t last) {
      for (int64_t task = last - 1; task >= first; --task) visit(task / units_, task % units_);
    });
  }

  template <class Visit>
  void visit_all(Visit visit) const {
    for_each_share(blocks_ * units_, shape_.count() * shape_.channels, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) visit(task / units_, task % units_);
    });
  }

 private:
  static constexpr int64_t kUnit = 1 << 15;          // elements of a channel, or of rows of channels
  static constexpr int64_t kRead = 1 << 12;          // bytes
  static constexpr int64_t kCached = 3 * (1 << 17);  // bytes, of a second-level cache of 512 KB or more

  int64_t outer_begin(int64_t unit) const { return unit / pieces_ * outer_; }
  int64_t outer_end(int64_t unit) const { return std::min(outer_begin(unit) + outer_, shape_.outer); }
  int64_t inner_begin(int64_t unit) const { return unit % pieces_ * kUnit; }
  int64_t inner_end(int64_t unit) const { return std::min(inner_begin(unit) + kUnit, shape_.inner); }

  BatchNormShape shape_;
  int64_t outer_ = 1;
  int64_t channels_ = 1;
  int64_t pieces_ = 1;
  int64_t units_ = 0;
  int64_t blocks_ = 0;
};

}  // namespace steadygrad::cpu

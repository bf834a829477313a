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
  // `streams`: how many tensors both visits read.
  ChannelBlocks(const BatchNormShape& shape, int64_t element_size, int streams) : shape_(shape) {
    if (shape.inner == 1) {
      // Rows of few channels are taken together: for sums until they fill vectors, for visits until a row is
      // worth its start.
      while (shape.channels * sum_fold_ % kSumLanes != 0 && shape.channels < kFolded) sum_fold_ *= 2;
      fold_ = sum_fold_;
      while (shape.channels * fold_ < kFolded) fold_ *= 2;
      // As many units as share out evenly, of enough rows that their sums are little beside them.
      const int64_t units = (shape.outer * shape.channels / (4 * kUnit) + 8) / 8 * 8;
      outer_ = std::max<int64_t>(kRows, (shape.outer + units - 1) / units);
      outer_ = (outer_ + fold_ - 1) / fold_ * fold_;
      channels_ = shape.channels;
    } else if (shape.inner <= kUnit) {
      outer_ = kUnit / shape.inner;
      // Neighbouring channels, for longer reads; few enough that the second visit finds them in the cache.
      const int64_t wanted = kRead / (shape.inner * element_size);
      const int64_t cached = kCached / (shape.count() * element_size * streams);
      channels_ = std::clamp<int64_t>(std::min(wanted, cached), 1, shape.channels);
      // The same channels of the next outer index, unless that is too far ahead for the cache.
      if (channels_ * shape.inner * element_size <= kFar)
        ahead_ = shape.channels * shape.inner * element_size;
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

  // How often channels come round in a row: at most, and for sums.
  int64_t fold() const { return fold_; }
  int64_t sum_fold() const { return sum_fold_; }

  // Elements of one channel in a unit.
  int64_t count(int64_t unit) const {
    if (pieces_ > 1) return inner_end(unit) - inner_begin(unit);
    return (outer_end(unit) - outer_begin(unit)) * shape_.inner;
  }

  // Calls visit(rows, first channel, first element, first byte of the mask) for all rows of a unit of a
  // block; with at most `fold` in one.
  template <class Visit>
  void for_each_rows(int64_t block, int64_t unit, int64_t fold, Visit visit) const {
    const int64_t begin = outer_begin(unit);
    const int64_t end = outer_end(unit);
    const int64_t bytes = shape_.mask_row_bytes();
    if (shape_.inner == 1) {
      // Rows that fill vectors lie in the mask without gaps, also where fewer of them are taken together.
      const int64_t dense = begin + (end - begin) / sum_fold_ * sum_fold_;
      int64_t row = begin;
      for (int64_t together : {fold, sum_fold_, int64_t{1}}) {
        const int64_t last = together > 1 ? dense : end;
        const int64_t count = (last - row) / together;
        const int64_t columns = shape_.channels * together;
        const int64_t byte = row < dense ? begin * bytes + (row - begin) * shape_.channels / 8 : row * bytes;
        if (count > 0) {
          visit(Rows{count, columns, false, ahead_, shape_.channels * sum_fold_}, int64_t{0},
                row * shape_.channels, byte);
        }
        row += count * together;
      }
      return;
    }
    const Rows rows{channels_in(block), inner_end(unit) - inner_begin(unit), true, ahead_, 0};
    for (int64_t n = begin; n < end; ++n) {
      const int64_t row = n * shape_.channels + first_channel(block);
      visit(rows, first_channel(block), row * shape_.inner + inner_begin(unit),
            row * bytes + inner_begin(unit) / 8);
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
    // A channel costs about as much as so many elements, and bringing in the sums of a unit as a few.
    for_each_share(shape_.channels, shape_.channels * (256 + 8 * units_), finish);
    for_each_share(tasks, elements, [&](int64_t first, int64_t last) {
      for (int64_t task = last - 1; task >= first; --task) visit(task / units_, task % units_);
    });
  }

  // As for_each_rows(), for everything, in the order of memory where planes are short enough for it.
  template <class Visit>
  void for_all_rows(Visit visit) const {
    const int64_t elements = shape_.count() * shape_.channels;
    if (shape_.inner == 1 || pieces_ > 1) {
      for_each_share(blocks_ * units_, elements, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task)
          for_each_rows(task / units_, task % units_, fold_, visit);
      });
      return;
    }
    for_each_share(shape_.outer * shape_.channels, elements, [&](int64_t first, int64_t last) {
      while (first < last) {
        const int64_t channel = first % shape_.channels;
        const int64_t rows = std::min(last - first, shape_.channels - channel);
        visit(Rows{rows, shape_.inner, true, kAhead, 0}, channel, first * shape_.inner,
              first * shape_.mask_row_bytes());
        first += rows;
      }
    });
  }

 private:
  static constexpr int64_t kUnit = 1 << 15;   // elements of a channel, or of rows of channels
  static constexpr int64_t kAhead = 1 << 12;  // bytes
  static constexpr int64_t kRows = 128;
  static constexpr int64_t kFolded = 512;            // channels
  static constexpr int64_t kFar = 1 << 15;           // bytes
  static constexpr int64_t kRead = 1 << 12;          // bytes
  static constexpr int64_t kCached = 3 * (1 << 17);  // bytes, of a second-level cache of 512 KB or more

  int64_t outer_begin(int64_t unit) const { return unit / pieces_ * outer_; }
  int64_t outer_end(int64_t unit) const { return std::min(outer_begin(unit) + outer_, shape_.outer); }
  int64_t inner_begin(int64_t unit) const { return unit % pieces_ * kUnit; }
  int64_t inner_end(int64_t unit) const { return std::min(inner_begin(unit) + kUnit, shape_.inner); }

  BatchNormShape shape_;
  int64_t sum_fold_ = 1;
  int64_t fold_ = 1;
  int64_t outer_ = 1;
  int64_t channels_ = 1;
  int64_t pieces_ = 1;
  int64_t ahead_ = kAhead;
  int64_t units_ = 0;
  int64_t blocks_ = 0;
};

}  // namespace steadygrad::cpu

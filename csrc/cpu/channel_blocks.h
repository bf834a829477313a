// The order in which a tensor's channels are summed and then visited again: in blocks of channels, each cut
// into units. A sum adds its units in order, and the units follow from the shape alone, so any number of
// threads gives the same bits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/batch_norm.h"
#include "cpu/batch_norm_kernels.h"
#include "cpu/parallel.h"

namespace steadygrad::cpu {

class ChannelBlocks {
 public:
  // `streams` is the number of tensors that both visits read.
  ChannelBlocks(const BatchNormShape& shape, int64_t element_size, int streams) : shape_(shape) {
    // A block has neighbouring channels, for longer reads, but so few that the second visit finds them in the
    // cache.
    const int64_t wanted = kRead / (shape.inner * element_size);
    const int64_t cached = kCached / (shape.count() * element_size * streams);
    const int64_t neighbours = std::max<int64_t>(std::min(wanted, cached), 1);
    if (shape.inner == 1 || is_short(shape)) {
      columns_ = shape.inner;
      // A block has whole bytes of the mask.
      channels_ = shape.inner == 1 ? shape.channels : (neighbours + 7) / 8 * 8;
      if (channels_ < shape.channels) {
        outer_ = std::max<int64_t>(kRows, kUnit / shape.inner);
        ahead_ = row_size() * element_size;
      } else {
        channels_ = shape.channels;
        // Rows of few columns are joined: for sums until they fill vectors, and for visits until starting on
        // a row is worth it.
        while (row_size() * sum_fold_ % kSumLanes != 0 && row_size() < kFolded) sum_fold_ *= 2;
        fold_ = sum_fold_;
        while (row_size() * fold_ < kFolded) fold_ *= 2;
        // There are as many units as can be shared out evenly, with so many rows that their sums cost little.
        const int64_t units = (shape.outer * row_size() / (4 * kUnit) + 8) / 8 * 8;
        outer_ = std::max<int64_t>(kRows, (shape.outer + units - 1) / units);
        outer_ = (outer_ + fold_ - 1) / fold_ * fold_;
      }
    } else if (shape.inner <= kUnit) {
      outer_ = kUnit / shape.inner;
      channels_ = std::min(neighbours, shape.channels);
      // The same channels of the next outer index are prefetched, unless they are too far away for the cache.
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

  // The number of neighbours in a row that belong to one channel, if rows hold many channels; 0 if rows are
  // channels.
  int64_t columns() const { return columns_; }
  // How many rows are joined at most in a visit, and for sums.
  int64_t fold() const { return fold_; }
  int64_t sum_fold() const { return sum_fold_; }

  // Returns the number of elements of one channel in a unit.
  int64_t count(int64_t unit) const {
    if (pieces_ > 1) return inner_end(unit) - inner_begin(unit);
    return (outer_end(unit) - outer_begin(unit)) * shape_.inner;
  }

  // Calls visit(rows, first channel, first element, first byte of the mask) for all rows of a unit of a
  // block, with at most `fold` rows joined.
  template <class Visit>
  void for_each_rows(int64_t block, int64_t unit, int64_t fold, Visit visit) const {
    const int64_t begin = outer_begin(unit);
    const int64_t end = outer_end(unit);
    if (columns_ > 0) return for_each_row_of_columns(block, begin, end, fold, visit);
    const int64_t bytes = shape_.mask_row_bytes();
    const int64_t length = inner_end(unit) - inner_begin(unit);
    const Rows rows{channels_in(block), length, length, bytes, true, ahead_, 0};
    for (int64_t n = begin; n < end; ++n) {
      const int64_t row = n * shape_.channels + first_channel(block);
      visit(rows, first_channel(block), row * shape_.inner + inner_begin(unit),
            row * bytes + inner_begin(unit) / 8);
    }
  }

  // Calls sum(block, unit) for all units, then finish(first channel, last channel), then visit(block, unit).
  // The units that were summed last are visited first.
  template <class Sum, class Finish, class Visit>
  void sum_then_visit(Sum sum, Finish finish, Visit visit) const {
    const int64_t work = cost();
    if (work < kWorthATeam || blocks_ >= 4 * max_threads()) {
      // Each thread keeps its block, so that it finds in its cache what it reads again.
      for_each_share(blocks_, work, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
          for (int64_t unit = 0; unit < units_; ++unit) sum(block, unit);
          finish(first_channel(block), last_channel(block));
          for (int64_t unit = units_ - 1; unit >= 0; --unit) visit(block, unit);
        }
      });
      return;
    }
    const int64_t tasks = blocks_ * units_;
    for_each_share(tasks, work, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) sum(task / units_, task % units_);
    });
    // A channel costs about as much as 256 elements, and adding the sums of a unit as much as 8.
    for_each_share(shape_.channels, shape_.channels * (256 + 8 * units_), finish);
    for_each_share(tasks, work, [&](int64_t first, int64_t last) {
      for (int64_t task = last - 1; task >= first; --task) visit(task / units_, task % units_);
    });
  }

  // Visits all rows like for_each_rows(), in the order of memory if planes are short enough.
  template <class Visit>
  void for_all_rows(Visit visit) const {
    const int64_t work = cost();
    if (columns_ > 0 || pieces_ > 1) {
      for_each_share(blocks_ * units_, work, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task)
          for_each_rows(task / units_, task % units_, fold_, visit);
      });
      return;
    }
    for_each_share(shape_.outer * shape_.channels, work, [&](int64_t first, int64_t last) {
      while (first < last) {
        const int64_t channel = first % shape_.channels;
        const int64_t rows = std::min(last - first, shape_.channels - channel);
        const int64_t bytes = shape_.mask_row_bytes();
        visit(Rows{rows, shape_.inner, shape_.inner, bytes, true, kAhead, 0}, channel, first * shape_.inner,
              first * bytes);
        first += rows;
      }
    });
  }

 private:
  static constexpr int64_t kShort = 64;  // number of elements of a plane
  static constexpr int64_t kManyRows = 16;
  static constexpr int64_t kUnit = 1 << 15;   // number of elements of a channel, or of rows of channels
  static constexpr int64_t kAhead = 1 << 12;  // bytes
  static constexpr int64_t kRows = 128;
  static constexpr int64_t kFolded = 512;            // channels
  static constexpr int64_t kFar = 1 << 15;           // bytes
  static constexpr int64_t kRead = 1 << 12;          // bytes
  static constexpr int64_t kCached = 3 * (1 << 17);  // bytes; fits a second-level cache of 512 KB

  // Planes of few elements are joined to rows of columns, unless there are too few of them to pay for tables
  // with an entry for every element of a row.
  static bool is_short(const BatchNormShape& shape) {
    return shape.inner <= kSumLanes || (shape.inner < kShort && shape.outer >= kManyRows);
  }

  // Returns how many elements of a norm, which kWorthATeam counts, cost as much as this tensor.
  int64_t cost() const { return 4 * shape_.count() * shape_.channels; }

  // Visits the rows [begin, end) of columns; in a mask the bits of each row are without gaps.
  template <class Visit>
  void for_each_row_of_columns(int64_t block, int64_t begin, int64_t end, int64_t fold, Visit visit) const {
    const int64_t size = row_size();
    const int64_t bytes = shape_.mask_row_bytes() * (columns_ == 1 ? 1 : shape_.channels);
    if (blocks_ > 1) {
      const int64_t column = first_channel(block) * columns_;
      const int64_t length = channels_in(block) * columns_;
      visit(Rows{end - begin, length, size, bytes, false, ahead_, length}, first_channel(block),
            begin * size + column, begin * bytes + column / 8);
      return;
    }
    // Rows that fill vectors are without gaps in the mask, even if fewer of them are joined.
    const int64_t dense = begin + (end - begin) / sum_fold_ * sum_fold_;
    int64_t row = begin;
    for (int64_t together : {fold, sum_fold_, int64_t{1}}) {
      const int64_t last = together > 1 ? dense : end;
      const int64_t count = (last - row) / together;
      const int64_t length = size * together;
      const int64_t byte = row < dense ? begin * bytes + (row - begin) * size / 8 : row * bytes;
      if (count > 0) {
        const int64_t mask_pitch = row < dense && length % 8 == 0 ? length / 8 : bytes;
        visit(Rows{count, length, length, mask_pitch, false, ahead_, size * sum_fold_}, int64_t{0},
              row * size, byte);
      }
      row += count * together;
    }
  }

  // Returns the number of elements of a row of columns.
  int64_t row_size() const { return shape_.channels * columns_; }
  int64_t outer_begin(int64_t unit) const { return unit / pieces_ * outer_; }
  int64_t outer_end(int64_t unit) const { return std::min(outer_begin(unit) + outer_, shape_.outer); }
  int64_t inner_begin(int64_t unit) const { return unit % pieces_ * kUnit; }
  int64_t inner_end(int64_t unit) const { return std::min(inner_begin(unit) + kUnit, shape_.inner); }

  BatchNormShape shape_;
  int64_t columns_ = 0;
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

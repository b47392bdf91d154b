// Prefetches keys and values before they are used, across blocks and work items.
//
// A tile uses a block of keys, then the block of values that belongs to it, then the next keys,
// which may be another item's. The hardware prefetcher foresees none of these changes, and short
// rows consist of nothing but changes. So each row, while it is used, prefetches the row that comes
// kAheadBytes later in that order: prefetches are spread out like the uses, because the core drops
// those that it cannot queue. They go into the second-level cache: the few miss buffers of the
// first level are left to the loads themselves.
#pragma once

#include "cpu/ragged_attention/item.h"

namespace baton::cpu::BATON_ISA {

// How many bytes before their use. Measured: 4 to 9 KB are slower, and so are 16 and 18 KB.
constexpr int64_t kAheadBytes = 12 * 1024;

// The rows to prefetch while the rows of one block are used, in at most two runs.
template <typename T>
struct Ask {
  const T* first = nullptr;
  const T* second = nullptr;
  int64_t num_first = 0, num_second = 0;
  int64_t stride = 0;    // elements from one row to the next
  bool doubled = false;  // prefetches two rows per used row, to build up the lead
  // Replaces the two runs: num_second rows that lie anywhere.
  const T* const* scattered = nullptr;

  // Rows [k, k + kRows) of the block are being used: prefetches the rows whose turn that is. kDim:
  // head_dim where it is known at compile time, else 0.
  template <int kRows, int kDim>
  BATON_INLINE void used(int64_t k, int64_t dim) const {
    if (doubled) {
      rows<2 * kRows, kDim>(2 * k, dim);
    } else {
      rows<kRows, kDim>(k, dim);
    }
  }

 private:
  template <int kRows, int kDim>
  BATON_INLINE void rows(int64_t j, int64_t dim) const {
    if (j + kRows <= num_first) {
      for (int i = 0; i < kRows; ++i) row<kDim>(first + (j + i) * stride, dim);
      return;
    }
    if (scattered && j + kRows <= num_second) {
      BATON_UNROLL
      for (int i = 0; i < kRows; ++i) row<kDim>(scattered[j + i], dim);
      return;
    }
    const int64_t end = j + kRows < num_first + num_second ? j + kRows : num_first + num_second;
    if (scattered) {
      for (; j < end; ++j) row<kDim>(scattered[j], dim);
      return;
    }
    for (; j < end; ++j) {
      row<kDim>(j < num_first ? first + j * stride : second + (j - num_first) * stride, dim);
    }
  }

  template <int kDim>
  static BATON_INLINE void row(const T* begin, int64_t dim) {
    constexpr int64_t kLine = 64 / sizeof(T);
    if constexpr (kDim != 0) {
      BATON_UNROLL
      for (int64_t d = 0; d < kDim; d += kLine) __builtin_prefetch(begin + d, 0, 2);
    } else {
      // Few lines: unrolled, the loop would spend more on finding where to enter it.
      _Pragma("GCC unroll 1") for (int64_t d = 0; d < dim; d += kLine)
          __builtin_prefetch(begin + d, 0, 2);
    }
  }
};

// Walks over the rows of work items [item, end) in the order in which they are used.
template <typename T>
class ReadAhead {
 public:
  ReadAhead(const RaggedAttentionParams& p, const AttentionWork& work, int64_t item, int64_t end)
      : p_(p),
        work_(work),
        item_(item),
        end_(end),
        is_scattered_(p.block_table && p.sizes.capacity < kBlockKeys),
        full_lead_(kAheadBytes / (p.sizes.head_dim * static_cast<int64_t>(sizeof(T)))) {
    open();
  }

  // Returns the rows to prefetch while the next `count` rows are used.
  Ask<T> step(int64_t count) {
    Ask<T> ask;
    // Rows that are already in use need no prefetch any more.
    if (is_scattered_) {
      lead_ += collect(-lead_);
    } else {
      while (lead_ < 0 && refill()) lead_ += take(-lead_);
    }
    int64_t wanted = count + full_lead_ - lead_;
    lead_ -= count;
    ask.doubled = wanted > count;
    if (wanted > 2 * count) wanted = 2 * count;  // at most kMaxAsked
    if (is_scattered_) {
      ask.scattered = scattered_;
      ask.num_second = collect(wanted);
      lead_ += ask.num_second;
      return ask;
    }
    if (wanted <= 0 || !refill()) return ask;
    ask.stride = stride_;
    ask.first = row_;
    ask.num_first = take(wanted);
    if (ask.num_first < wanted && refill() && stride_ == ask.stride) {
      ask.second = row_;
      ask.num_second = take(wanted - ask.num_first);
    }
    lead_ += ask.num_first + ask.num_second;
    return ask;
  }

  // Work on item i begins; items that were not walked over are skipped.
  void begin(int64_t i) {
    if (item_ >= i) return;
    item_ = i;
    lead_ = 0;
    open();
  }

 private:
  void open() {
    rows_ = done_ = left_ = in_block_ = 0;
    values_ = false;
    if (item_ >= end_) return;
    const AttentionItem& item = work_.items[item_];
    const Tile tile = make_tile(p_, item, row_plan(p_, item.row));
    from_ = Streams<T>(p_, tile.row, item.kv_head);
    rows_ = tile.end > tile.begin ? tile.end - tile.begin : 0;
    begin_ = tile.begin;
  }

  // Whether there are rows left. At the end of a run or a block, goes on to the next one.
  bool refill() {
    if (left_ > 0) return true;
    if (in_block_ == 0 && !next_block()) return false;
    const Run<T> run = stream_->run(next_, in_block_);
    row_ = run.data;
    left_ = run.count;
    next_ += run.count;
    in_block_ -= run.count;
    return true;
  }

  // Goes on to the keys or values of the next block, if there are any.
  bool next_block() {
    while (done_ >= rows_) {
      if (item_ >= end_) return false;
      ++item_;
      open();
    }
    next_ = begin_ + done_;
    const int64_t block = kBlockKeys - next_ % kBlockKeys;
    in_block_ = rows_ - done_ < block ? rows_ - done_ : block;
    stream_ = values_ ? &from_.values : &from_.keys;
    stride_ = stream_->stride();
    if (values_) done_ += in_block_;
    values_ = !values_;
    return true;
  }

  // Walks over up to `wanted` rows and notes their places in scattered_; returns how many they
  // were.
  int64_t collect(int64_t wanted) {
    int64_t found = 0;
    if (wanted > kMaxAsked) wanted = kMaxAsked;
    while (found < wanted && (in_block_ > 0 || next_block())) {
      const int64_t count = wanted - found < in_block_ ? wanted - found : in_block_;
      stream_->for_each_page(next_, count, [&](const T* row, int64_t here) {
        for (; here > 0; --here, row += stride_) scattered_[found++] = row;
      });
      next_ += count;
      in_block_ -= count;
    }
    return found;
  }

  // Walks over up to `count` rows of the current run; returns how many they were.
  int64_t take(int64_t count) {
    const int64_t taken = left_ < count ? left_ : count;
    left_ -= taken;
    row_ += taken * stride_;
    return taken;
  }

  const RaggedAttentionParams& p_;
  const AttentionWork& work_;
  int64_t item_, end_;
  const bool is_scattered_;  // a block's rows can consist of many runs
  const int64_t full_lead_;  // rows between the prefetch and the use
  Streams<T> from_;
  int64_t rows_ = 0, done_ = 0;        // rows of the item, and rows walked over
  int64_t begin_ = 0;                  // the item's first key
  bool values_ = false;                // whether values come next
  const Stream<T>* stream_ = nullptr;  // of the current block
  int64_t next_ = 0, in_block_ = 0;    // next key after the run, and rows left
  const T* row_ = nullptr;             // the current run
  int64_t stride_ = 0, left_ = 0;
  int64_t lead_ = 0;  // rows that are prefetched but not in use yet
  static constexpr int64_t kMaxAsked = 2 * kBlockKeys;
  const T* scattered_[kMaxAsked];
};

}  // namespace baton::cpu::BATON_ISA

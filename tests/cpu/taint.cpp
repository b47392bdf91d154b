// Runs the CPU kernels under valgrind's memcheck, with all inputs undefined that a result must not
// depend on, and checks which results memcheck considers fully defined.
//
//   valgrind taint ISA [planted]
//
// A float that was computed from an undefined one is undefined, even if it was multiplied by 0.
// Memcheck does not track what a branch on an undefined value chose: such branches are errors.
//   padding: in the caches, only keys and values of the rows are defined. No branch may depend on
//     others: then results are computed only from defined values, for all values of the others.
//   hidden: for each query token in turn, only the keys and values that it sees and its own query
//     vector are defined. A kernel may multiply finite hidden values by 0, which changes nothing,
//     and computes the block again if that gave NaN: the undefined values are NaN, so it does so
//     here. Branches are not counted, because most belong to the other tokens.
#include <valgrind/memcheck.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "bindings/attention_plan.h"
#include "cpu/host/isa.h"

namespace {

using namespace baton;

std::minstd_rand random_numbers(19);
bool is_planted = false;

struct Counts {
  int64_t calls = 0, results = 0, tainted = 0, branches = 0;
};
Counts padding, hidden;
Counts* counts = &padding;

// Finite numbers of both signs, none of them 0, about 1.
void fill(void* memory, int64_t count, Dtype dtype) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random_numbers());
    const float x = (1.0f + (bits & 1023) / 1024.0f) * (bits & 1024 ? 1 : -1);
    uint32_t raw;
    std::memcpy(&raw, &x, 4);
    if (dtype == Dtype::kFloat32) {
      static_cast<float*>(memory)[i] = x;
    } else if (dtype == Dtype::kBFloat16) {
      static_cast<uint16_t*>(memory)[i] = static_cast<uint16_t>(raw >> 16);
    } else {
      static_cast<uint16_t*>(memory)[i] =
          static_cast<uint16_t>((raw >> 16 & 0x8000) | 15 << 10 | (bits & 1023));
    }
  }
}

// Memory with undefined content.
class Buffer {
 public:
  Buffer(int64_t count, Dtype dtype) : dtype_(dtype), count_(count) {
    bytes_ = static_cast<char*>(std::aligned_alloc(64, (count * size_of(dtype) + 63) / 64 * 64));
    forget();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(bytes_); }

  void* at(int64_t element) { return bytes_ + element * size_of(dtype_); }
  // Makes all of it undefined, and NaN in each of the types.
  void forget() {
    std::memset(bytes_, 0xff, count_ * size_of(dtype_));
    VALGRIND_MAKE_MEM_UNDEFINED(bytes_, count_ * size_of(dtype_));
  }
  void define(int64_t element, int64_t count) { fill(at(element), count, dtype_); }

  void expect_defined(int64_t element, int64_t count, const char* what) {
    ++counts->results;
    // The check returns 0, or the address of the first undefined byte.
    if (!VALGRIND_CHECK_MEM_IS_DEFINED(at(element), count * size_of(dtype_))) return;
    if (++counts->tainted <= 2000) std::fprintf(stderr, "tainted: %s\n", what);
  }

 private:
  Dtype dtype_;
  int64_t count_;
  char* bytes_;
};

// Calls a kernel and counts its branches on undefined values. Branches on hidden values belong to
// the other tokens, and would be reported by the hundred thousand.
template <typename Call>
void counted(Call&& call) {
  ++counts->calls;
  if (counts == &hidden) VALGRIND_DISABLE_ERROR_REPORTING;
  const auto before = VALGRIND_COUNT_ERRORS;
  call();
  counts->branches += VALGRIND_COUNT_ERRORS - before;
  if (counts == &hidden) VALGRIND_ENABLE_ERROR_REPORTING;
}

struct Row {
  int32_t query_length, length, start;
};

struct Case {
  const char* name;
  std::vector<Row> rows;
  int64_t head_dim = 32, kv_heads = 1, group = 2;
  int64_t window = 0;
  float softcap = 0;
  bool causal = true, has_alibi = false, has_sinks = false;
  int64_t page = 0;              // columns; 0: no pages
  bool rows_share_slot = false;  // all rows are in the slot of row 0
};

class Attention {
 public:
  Attention(const Case& c, Dtype dtype)
      : c_(c),
        heads_(c.kv_heads * c.group),
        capacity_(capacity(c)),
        total_(total(c)),
        key_(elements(), dtype),
        value_(elements(), dtype),
        query_(total_ * heads_ * c.head_dim, dtype),
        out_(total_ * heads_ * c.head_dim, dtype),
        lse_(total_ * heads_, Dtype::kFloat32),
        alibi_(heads_, 0.25f),
        sinks_(heads_, 0.5f) {
    p_.dtype = dtype;
    p_.num_rows = static_cast<int64_t>(c.rows.size());
    p_.num_heads = heads_;
    const int64_t columns = c.page ? c.page : capacity_;
    p_.sizes = {1, c.page ? pages_per_row() * p_.num_rows + 1 : p_.num_rows, c.kv_heads, columns,
                c.head_dim};
    p_.key_cache_strides = p_.value_cache_strides = {0, c.kv_heads * columns * c.head_dim,
                                                     columns * c.head_dim, c.head_dim};
    p_.query_strides = {0, heads_ * c.head_dim, c.head_dim};
    p_.query = query_.at(0);
    p_.key_cache = key_.at(0);
    p_.value_cache = value_.at(0);
    p_.out = out_.at(0);
    p_.lse = static_cast<float*>(lse_.at(0));
    p_.alibi_slopes = c.has_alibi ? alibi_.data() : nullptr;
    p_.sinks = c.has_sinks ? sinks_.data() : nullptr;
    p_.scale = 0.125f;
    p_.softcap = c.softcap;
    p_.window = c.window;
    p_.causal = c.causal;
    p_.total_queries = p_.max_query_length = total_;
    p_.max_length = capacity_;
    cu_seqlens_.push_back(0);
    for (int32_t row = 0; row < p_.num_rows; ++row) {
      const Row& r = c.rows[row];
      cu_seqlens_.push_back(cu_seqlens_.back() + r.query_length);
      slots_.push_back(c.rows_share_slot ? 0 : row);
      starts_.push_back(r.start);
      lengths_.push_back(r.length);
      // Pages in descending order; entries before and after the row's are invalid.
      for (int64_t page = 0; c.page && page < pages_per_row(); ++page) {
        const bool is_used =
            r.length > 0 && page >= r.start / c.page && page <= (r.start + r.length - 1) / c.page;
        table_.push_back(is_used ? static_cast<int32_t>(page_of(row, page)) : -7);
      }
    }
    p_.cu_seqlens = cu_seqlens_.data();
    p_.slots = c.page ? nullptr : slots_.data();
    p_.starts = starts_.data();
    p_.lengths = lengths_.data();
    if (c.page) {
      for (int32_t& entry : table_) {
        if (entry == -7) VALGRIND_MAKE_MEM_UNDEFINED(&entry, 4);
      }
      p_.block_table = table_.data();
      p_.block_table_stride = p_.max_pages = pages_per_row();
    }
    plan_.make(p_);
    partials_.resize(plan_.partial_floats);
  }

  void check_padding() {
    counts = &padding;
    forget();
    for (int32_t row = 0; row < p_.num_rows; ++row) define_keys(row, 0, c_.rows[row].length);
    query_.define(0, total_ * heads_ * c_.head_dim);
    run(0, 0);
    expect_defined(0, total_, "padding");
  }

  void check_every_token() {
    counts = &hidden;
    for (int32_t row = 0; row < p_.num_rows; ++row) {
      const int32_t length = c_.rows[row].query_length;
      // If there are many tokens, only the first, some, and the last are checked.
      const int32_t step = length > 20 ? 13 : 1;
      for (int32_t token = 0; token < length; token += step) check(row, token);
      if (length > 0) check(row, length - 1);
    }
  }

 private:
  static int64_t capacity(const Case& c) {
    int64_t most = 0;
    for (const Row& row : c.rows) most = std::max<int64_t>(most, row.start + row.length + 3);
    return c.page ? (most + c.page - 1) / c.page * c.page : most;
  }
  static int64_t total(const Case& c) {
    int64_t sum = 0;
    for (const Row& row : c.rows) sum += row.query_length;
    return sum;
  }
  int64_t pages_per_row() const { return capacity_ / std::max<int64_t>(c_.page, 1); }
  int64_t page_of(int64_t row, int64_t page) const { return (row + 1) * pages_per_row() - page; }
  int64_t elements() const {
    const int64_t columns = capacity_ * static_cast<int64_t>(c_.rows.size()) + c_.page;
    return columns * c_.kv_heads * c_.head_dim;
  }

  // The place of a head's vector in a row's column.
  int64_t place(int32_t row, int64_t column, int64_t head) const {
    const CacheStrides& s = p_.key_cache_strides;
    if (!c_.page) {
      return (c_.rows_share_slot ? 0 : row) * s.slot_stride + head * s.head_stride +
             column * s.column_stride;
    }
    return page_of(row, column / c_.page) * s.slot_stride + head * s.head_stride +
           column % c_.page * s.column_stride;
  }

  void forget() {
    for (Buffer* buffer : {&key_, &value_, &query_, &out_, &lse_}) buffer->forget();
    VALGRIND_MAKE_MEM_UNDEFINED(partials_.data(), partials_.size() * sizeof(float));
  }

  void define_keys(int32_t row, int64_t begin, int64_t end) {
    for (int64_t key = begin; key < end; ++key) {
      for (int64_t head = 0; head < c_.kv_heads; ++head) {
        const int64_t element = place(row, c_.rows[row].start + key, head);
        key_.define(element, c_.head_dim);
        value_.define(element, c_.head_dim);
      }
    }
  }

  // `first`: the token whose result a planted defect changes.
  void run(int32_t row, int64_t first) {
    const AttentionWork work{plan_.items.data(), static_cast<int64_t>(plan_.items.size()),
                             plan_.partial_offsets.data(), partials_.data(), plan_.sharers.data()};
    counted([&] {
      const cpu::KernelTable& kernels = cpu::kernels();
      kernels.ragged_attention(p_, work, 0, work.num_items);
      if (!partials_.empty()) {
        kernels.ragged_attention_merge(p_, work, 0, p_.num_rows * c_.kv_heads);
      }
    });
    if (is_planted) multiply_padding(row, first);
  }

  void expect_defined(int64_t first, int64_t tokens, const char* which) {
    char what[200];
    std::snprintf(what, sizeof what, "%s, dtype %d: %s", c_.name, static_cast<int>(p_.dtype),
                  which);
    out_.expect_defined(first * heads_ * c_.head_dim, tokens * heads_ * c_.head_dim, what);
    lse_.expect_defined(first * heads_, tokens * heads_, what);
  }

  void check(int32_t row, int32_t token) {
    const Row& r = c_.rows[row];
    forget();
    const int64_t position = r.length - r.query_length + token;
    define_keys(row, c_.window ? std::max<int64_t>(0, position - c_.window + 1) : 0,
                c_.causal ? position + 1 : r.length);
    const int64_t mine = cu_seqlens_[row] + token;
    query_.define(mine * heads_ * c_.head_dim, heads_ * c_.head_dim);
    run(row, mine);
    expect_defined(mine, 1, format(row, token).c_str());
  }

  static std::string format(int32_t row, int32_t token) {
    return "row " + std::to_string(row) + ", token " + std::to_string(token);
  }

  // Imitates a kernel that masks by multiplying with zero.
  void multiply_padding(int32_t row, int64_t first) {
    const Row& r = c_.rows[row];
    const float* padding = static_cast<const float*>(value_.at(place(row, r.start + r.length, 0)));
    static_cast<float*>(out_.at(first * heads_ * c_.head_dim))[0] += 0.0f * padding[0];
  }

  const Case& c_;
  int64_t heads_, capacity_, total_;
  RaggedAttentionParams p_{};
  Buffer key_, value_, query_, out_, lse_;
  std::vector<float> alibi_, sinks_;
  std::vector<int32_t> cu_seqlens_, slots_, starts_, lengths_, table_;
  bindings::AttentionPlan plan_;
  std::vector<float> partials_;
};

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {.name = "decode", .rows = {{1, 1, 0}, {1, 5, 3}, {1, 64, 1}, {1, 65, 0}, {1, 131, 2}}},
      {.name = "decode, wide heads",
       .rows = {{1, 40, 2}, {1, 33, 0}},
       .head_dim = 80,
       .kv_heads = 2},
      {.name = "decode of two segments", .rows = {{1, 600, 1}, {1, 9, 0}}},
      {.name = "decode of a shared segment",
       .rows = {{1, 530, 1}, {1, 540, 1}},
       .rows_share_slot = true},
      {.name = "prefill", .rows = {{7, 7, 2}, {19, 33, 1}}},
      {.name = "prefill of several tiles", .rows = {{70, 70, 1}}, .group = 1},
      {.name = "prefill behind a segment", .rows = {{3, 530, 1}}, .group = 1},
      {.name = "window", .rows = {{1, 70, 1}, {20, 40, 0}}, .window = 5},
      {.name = "not causal", .rows = {{5, 20, 1}, {1, 9, 4}}, .causal = false},
      {.name = "every option",
       .rows = {{3, 20, 1}, {1, 70, 3}},
       .head_dim = 16,
       .window = 30,
       .softcap = 5,
       .has_alibi = true,
       .has_sinks = true},
      {.name = "pages", .rows = {{1, 30, 5}, {6, 40, 0}, {1, 70, 20}}, .page = 16},
      {.name = "more tokens than keys", .rows = {{4, 2, 1}, {2, 0, 0}}},
  };
  return all;
}

// For a row in a slot: every byte that leaves the cache is what was in the row's columns.
void check_copies(Dtype dtype) {
  const int64_t heads = 2, capacity = 40, dim = 24, slots = 3, column = dim,
                slot = heads * capacity * dim;
  Buffer keys(slots * slot, dtype), values(slots * slot, dtype);
  const int64_t token = heads * dim;
  Buffer key(20 * token, dtype), value(20 * token, dtype);
  const int32_t cu_seqlens[] = {0, 20}, in_slot[] = {1}, start[] = {7}, to_slot[] = {2};
  const int32_t to_start[] = {3}, length[] = {20};
  const CacheSizes sizes{1, slots, heads, capacity, dim};
  const CacheStrides cache{0, slot, capacity * dim, column};
  const TokenStrides tokens{0, token, dim};
  const cpu::KernelTable& kernels = cpu::kernels();
  key.define(0, 20 * token);
  value.define(0, 20 * token);
  InsertKvParams insert{key.at(0), value.at(0), keys.at(0), values.at(0), cu_seqlens, in_slot,
                        start,     1,           20,         sizes,        tokens,     tokens,
                        cache,     cache,       dtype,      false};
  counted([&] { kernels.insert_kv(insert, 0, insert_kv_work(insert)); });
  MoveKvParams move{keys.at(0), values.at(0), in_slot, start, to_slot, to_start, length,
                    1,          sizes,        cache,   cache, dtype};
  counted([&] { kernels.move_kv(move, 0, move_kv_work(move)); });
  key.forget();
  value.forget();
  ExtractKvParams extract{keys.at(0), values.at(0), key.at(0), value.at(0), cu_seqlens,
                          to_slot,    to_start,     1,         20,          sizes,
                          cache,      cache,        tokens,    tokens,      dtype};
  counted([&] { kernels.extract_kv(extract, 0, extract_kv_work(extract)); });
  key.expect_defined(0, 20 * token, "extract_kv: key");
  value.expect_defined(0, 20 * token, "extract_kv: value");

  // Two tokens, rotated by different angles; only one of them is defined.
  Buffer query(2 * token, dtype), rotated(2 * token, dtype), angles(2 * dim, Dtype::kFloat32);
  const int32_t both[] = {0, 1}, columns[] = {11, 30};
  keys.forget();
  values.forget();
  key.forget();
  value.forget();
  for (Buffer* buffer : {&query, &key, &value}) buffer->define(token, token);
  angles.define(dim, dim);
  AppendKvParams append{key.at(0),
                        value.at(0),
                        query.at(0),
                        rotated.at(0),
                        keys.at(0),
                        values.at(0),
                        both,
                        columns,
                        angles.at(0),
                        angles.at(0),
                        2,
                        heads,
                        dim,
                        dim,
                        dim,
                        sizes,
                        tokens,
                        tokens,
                        tokens,
                        cache,
                        cache,
                        dtype,
                        Dtype::kFloat32};
  counted([&] { kernels.append_kv(append, 0, append_kv_work(append)); });
  rotated.expect_defined(token, token, "append_kv: query");
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t place = slot + (head * capacity + 30) * dim;
    keys.expect_defined(place, dim, "append_kv: key");
    values.expect_defined(place, dim, "append_kv: value");
  }
}

// The weights of all columns are defined if the scores that a query sees are.
void check_softmax(Dtype dtype) {
  const int64_t queries = 5, columns = 77;
  Buffer scores(queries * columns, dtype), weights(queries * columns, dtype);
  const int32_t starts[] = {3}, lengths[] = {60};
  for (int64_t window : {0, 20}) {
    for (int64_t query = 0; query < queries; ++query) {
      scores.forget();
      weights.forget();
      const int64_t last = 3 + 60 - queries + query;
      const int64_t first = window ? std::max<int64_t>(3, last - window + 1) : 3;
      scores.define(query * columns + first, last + 1 - first);
      MaskedSoftmaxParams p{
          scores.at(0), starts,  lengths,           weights.at(0),     1,       1,
          queries,      columns, queries * columns, queries * columns, columns, window,
          0.5f,         dtype};
      counted([&] { cpu::kernels().masked_softmax(p, 0, masked_softmax_work(p)); });
      weights.expect_defined(query * columns, columns, "masked_softmax");
    }
  }
}

}  // namespace

void print(const char* what, const Counts& c) {
  std::printf("%s %lld calls, %lld results, %lld tainted", what, static_cast<long long>(c.calls),
              static_cast<long long>(c.results), static_cast<long long>(c.tainted));
}

int main(int count, char** arguments) {
  if (count < 2 || !RUNNING_ON_VALGRIND || !cpu::set_isa(arguments[1], false)) return 2;
  is_planted = count > 2;
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
    if (is_planted && dtype != Dtype::kFloat32) continue;
    counts = &padding;
    check_copies(dtype);
    counts = &hidden;
    check_softmax(dtype);
    for (const Case& c : cases()) {
      Attention attention(c, dtype);
      attention.check_padding();
      attention.check_every_token();
    }
  }
  std::printf("%s: ", arguments[1]);
  print("padding", padding);
  std::printf(", %lld branches; ", static_cast<long long>(padding.branches));
  print("hidden", hidden), std::printf("\n");
  return padding.tainted + padding.branches + hidden.tainted != 0;
}

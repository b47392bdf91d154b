// csrc/common by itself: numbers at every border, and what happens where no kernel fits. Prints
// what is wrong; the exit status is 1 then.
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdio>
#include <initializer_list>
#include <vector>

#include "common/append_kv.h"
#include "common/attention_mask.h"
#include "common/extract_kv.h"
#include "common/insert_kv.h"
#include "common/likeliest.h"
#include "common/linear.h"
#include "common/linear_packed.h"
#include "common/masked_softmax.h"
#include "common/merge_attention.h"
#include "common/move_kv.h"
#include "common/ragged_attention.h"
#include "common/rms_norm.h"
#include "common/silu_and_mul.h"

#if defined(BATON_COVERAGE)
extern "C" void __gcov_dump();
#endif

namespace {

using namespace baton;

int num_wrong = 0;

void expect(const char* what, int64_t got, int64_t want) {
  if (got == want) return;
  std::printf("%s: %lld, not %lld\n", what, static_cast<long long>(got),
              static_cast<long long>(want));
  ++num_wrong;
}

// Whether the call ends the process with SIGABRT. In a child, whose counters are kept.
template <typename Call>
bool aborts(Call&& call) {
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    std::signal(SIGABRT, [](int) {
#if defined(BATON_COVERAGE)
      __gcov_dump();
#endif
      _exit(3);
    });
    call();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 3;
}

template <typename T>
constexpr int64_t kSize = sizeof(T);

void check_dispatch() {
  const Dtype all[] = {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16, Dtype::kInt8,
                       Dtype::kFloat8};
  const int64_t sizes[] = {4, 2, 2, 1, 1};
  for (int i = 0; i < 5; ++i) {
    int64_t found = 0;
    const auto take = [&]<typename T>() { found = kSize<T>; };
    const auto floats = [&] { dispatch_dtype(all[i], take); };
    const auto eight_bits = [&] { dispatch_eight_bit(all[i], take); };
    expect("is_eight_bit", is_eight_bit(all[i]), i > 2);
    expect("size_of", size_of(all[i]), sizes[i]);
    i < 3 ? floats() : eight_bits();
    expect("dispatched type", found, sizes[i]);
    expect("other dispatch aborts", i < 3 ? aborts(eight_bits) : aborts(floats), true);
  }
  // The one of the list that it is, and the first of equal ones.
  for (int value = 1; value <= 8; ++value) {
    int calls = 0, found = 0;
    const auto take = [&]<int k>() { ++calls, found = k; };
    dispatch_int<1, 2, 3, 4, 5, 6, 7, 8>(value, take);
    expect("dispatched int", found, value);
    expect("calls", calls, 1);
    calls = 0;
    dispatch_int<1, 1, 1, 1, 1, 1, 1, 1>(1, take);
    expect("calls of equal ones", calls, 1);
  }
  const auto nothing = []<int k>() {};
  for (int value : {0, 9, -1}) {
    expect("aborts", aborts([&] { dispatch_int<1, 2, 3, 4, 5, 6, 7, 8>(value, nothing); }), true);
    expect("aborts", aborts([&] { dispatch_int<1, 2, 3, 4, 5>(value, nothing); }), true);
    expect("aborts", aborts([&] { dispatch_int<1, 2, 3, 4>(value, nothing); }), true);
    expect("aborts", aborts([&] { dispatch_int<1, 2, 3>(value, nothing); }), true);
    expect("aborts", aborts([&] { dispatch_int<1, 2>(value, nothing); }), true);
  }
}

// Segments of 512, 2048 and 8192 keys, 32 of each of the first two.
void check_segments() {
  int64_t begin = 0;
  for (int64_t segment = 0; segment < 100; ++segment) {
    const int64_t keys = segment < 32 ? 512 : segment < 64 ? 2048 : 8192;
    expect("begin", attention_segment_begin(segment), begin);
    expect("first key's", attention_segment_of(begin), segment);
    expect("last key's", attention_segment_of(begin + keys - 1), segment);
    begin += keys;
  }
  for (const auto& [queries, length, group, tokens, tiles, splits] :
       std::vector<std::array<int64_t, 6>>{
           {1, 0, 1, 64, 1, 1},
           {1, 1, 4, 16, 1, 1},
           {1, 513, 1, 64, 1, 2},
           {64, 2000, 1, 64, 1, 4},
           {65, 2000, 1, 64, 2, 1},
           {3, 600, 64, 1, 3, 1},
           {1, 600, 100, 1, 1, 2},
           {0, 5, 1, 64, 0, 1},
       }) {
    const AttentionRowPlan plan = plan_attention_row(queries, length, group);
    expect("tile_tokens", plan.tile_tokens, tokens);
    expect("num_tiles", plan.num_tiles, tiles);
    expect("num_splits", plan.num_splits, splits);
  }
  expect("sums", attention_sums(80), 96);
  expect("partial", attention_partial_size(64), 66);
  RaggedAttentionParams p{};
  p.sizes.capacity = 16;
  p.max_pages = 5;
  expect("columns", attention_columns(p), 16);
  const int32_t table = 0;
  p.block_table = &table;
  expect("columns of pages", attention_columns(p), 80);
}

void check_work() {
  const CacheSizes sizes{3, 4, 2, 10, 64};
  expect("tokens of 512 bytes", tokens_per_block(sizes, Dtype::kFloat32), 128);
  expect("tokens larger than a block", tokens_per_block({1, 1, 512, 1, 64}, Dtype::kFloat32), 1);
  expect("blocks", num_token_blocks(sizes, Dtype::kInt8, 513), 2);
  InsertKvParams insert{};
  insert.sizes = sizes, insert.num_queries = 5, insert.total_tokens = 129;
  expect("insert", insert_kv_work(insert), 3 * 2);
  insert.zero_padding = true;
  expect("insert and clear", insert_kv_work(insert), 3 * 2 + 3 * 5);
  expect("insert bytes", insert_kv_bytes(insert), 3 * 129 * 512);
  ExtractKvParams extract{};
  extract.sizes = sizes, extract.total_tokens = 128;
  expect("extract", extract_kv_work(extract), 3);
  expect("extract bytes", extract_kv_bytes(extract), 3 * 128 * 512);
  const int32_t lengths[] = {7, 0, 4};
  MoveKvParams move{};
  move.sizes = sizes, move.num_moves = 3, move.lengths = lengths;
  expect("move", move_kv_work(move), 3 * 3 * 2);
  expect("move bytes", move_kv_bytes(move), 3 * 11 * 512);
  AppendKvParams append{};
  append.num_rows = 9;
  expect("append", append_kv_work(append), 9);
  MergeAttentionParams merge{};
  merge.num_queries = 8;
  expect("merge", merge_attention_work(merge), 8);
  AttentionMaskParams mask{};
  mask.num_rows = 2, mask.query_length = 3;
  expect("mask", attention_mask_work(mask), 6);
  MaskedSoftmaxParams softmax{};
  softmax.num_rows = 2, softmax.num_heads = 3, softmax.query_length = 4;
  expect("softmax", masked_softmax_work(softmax), 24);
  RmsNormParams norm{};
  norm.num_rows = 6;
  expect("norm", rms_norm_work(norm), 6);
  SiluAndMulParams silu{};
  silu.num_rows = 7;
  expect("silu", silu_and_mul_work(silu), 7);
  LikeliestParams choice{};
  choice.num_rows = 5;
  expect("likeliest", likeliest_work(choice), 5);
}

void check_linear() {
  LinearParams p{};
  p.num_rows = 15, p.in_features = 33, p.out_features = 65;
  expect("tile of few rows", linear_tile_rows(p), 15);
  expect("packed", linear_packed_size(p), 2 * 16 * 15);
  expect("blocks", linear_work(p), 3);
  p.num_rows = 97;
  expect("tile rows", linear_tile_rows(p), 16);
  expect("tiles", linear_row_tiles(p), 7);
  expect("row blocks", linear_work(p), 6);
  expect("panels", num_panels(49), 2);
  expect("pairs", panel_bytes(panel_layout(Dtype::kBFloat16), 3), 4 * 48 * 2);
  expect("floats", panel_bytes(panel_layout(Dtype::kFloat32), 3), 3 * 48 * 4);
  expect("int8", panel_bytes(kInt8Panels, 5), 8 * 48);
  expect("groups of nothing", num_int8_groups(0), 1);
  expect("groups", num_int8_groups(65), 2);
  expect("row", int8_row_size(65), 128);
  expect("odd lines", int8_row_stride(65), 192);
  expect("odd lines", int8_row_stride(64), 64);
  LinearPackedParams packed{};
  packed.num_rows = 97, packed.out_features = 49, packed.parts = 3;
  expect("packed work", linear_packed_work(packed), 2 * 3 * 2);
}

void check_strides() {
  const CacheStrides cache{1, 2, 3, 4};
  const TokenStrides tokens{1, 2, 3};
  for (auto member : {&CacheStrides::layer_stride, &CacheStrides::slot_stride,
                      &CacheStrides::head_stride, &CacheStrides::column_stride}) {
    CacheStrides other = cache;
    other.*member += 1;
    expect("cache strides", other == cache, false);
  }
  for (auto member :
       {&TokenStrides::layer_stride, &TokenStrides::token_stride, &TokenStrides::head_stride}) {
    TokenStrides other = tokens;
    other.*member += 1;
    expect("token strides", other == tokens, false);
  }
  expect("equal", cache == CacheStrides{1, 2, 3, 4} && tokens == TokenStrides{1, 2, 3}, true);
}

}  // namespace

int main() {
  check_dispatch();
  check_segments();
  check_work();
  check_linear();
  check_strides();
  return num_wrong > 0;
}

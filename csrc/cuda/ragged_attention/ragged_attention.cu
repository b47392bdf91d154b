// ragged_attention: softmax(scale q k^T) v of every query token over the valid columns of its row.
//
// One call launches up to three kernels, each of which takes the rows of its kind and leaves
// the others: decode (rows of one token), prefill (the others, in tiles of 64 vectors; where the
// caller selects it on compute capability 9.0, the warpgroup kernel in its place), and the merge
// of split rows. float32 and inputs that the tensor core kernels cannot load take the generic
// kernel in place of both. No grid has more blocks than the device holds at a time or the call has
// vectors: blocks take one item after another, in an order that follows from their number. How
// blocks, warps and lanes divide the work stands in the kernels' own files.
#include <algorithm>
#include <cstdlib>

#include "cuda/kernels.h"
#include "cuda/ragged_attention/generic.h"
#include "cuda/ragged_attention/launch.h"
#include "cuda/ragged_attention/merge.h"
#include "cuda/ragged_attention/prefill_sizes.h"

namespace baton::cuda {

namespace {

constexpr double kLn2 = 0.6931471805599453094;
// Vectors of an item of the generic kernel.
constexpr int kGenericQueries = 4;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Bounds that the host knows of the rows, and what follows from them for all kernels.
struct Plan {
  int64_t group, query_length, length, vectors, kv_heads, splits, split_vectors, partial_vectors;
  // Vectors per item of the generic kernel; 0: the tensor core kernels run instead.
  int generic_queries;
  bool has_decode;
  // Tiles of 16 vectors per warp of the prefill kernel: 1 or 2, with the same bits.
  int tiles;
  // Whether the warpgroup kernel has the rows that otherwise are the prefill kernel's. Nothing that
  // a row may differ in has a say, so that all rows of several tokens have the same arithmetic.
  bool has_warpgroups;

  explicit Plan(const RaggedAttentionParams& p) {
    kv_heads = p.sizes.num_kv_heads;
    group = p.num_heads / kv_heads;
    query_length = smaller(p.max_query_length, p.total_queries);
    length = smaller(p.max_length, attention_columns(p));
    vectors = smaller(p.total_queries, p.num_rows * query_length) * group;
    const bool tensor_cores = has_tensor_core_kernel(p);
    // A single vector needs the registers of one only; the bits are the same.
    generic_queries = tensor_cores ? 0 : query_length * group == 1 ? 1 : kGenericQueries;
    has_decode = tensor_cores && decode_vectors(p.sizes.head_dim, group) > 0;
    // Without the decode kernel, rows of one token would come in splits that do not begin at
    // multiples of 128 keys.
    has_warpgroups = p.prefill == PrefillKernel::kWgmma && has_decode &&
                     p.sizes.head_dim == kWarpgroupDim && !p.block_table &&
                     has_warpgroup_products();

    const auto longest = static_cast<int32_t>(smaller(length, INT32_MAX));
    splits = decode_splits(longest);
    split_vectors = 0;
    // A place's index follows from the row's number.
    partial_vectors = splits > 1 ? p.num_rows * group : 0;
    const int64_t segments = num_segments(longest);
    if (query_length > 1 && segments > 1 &&
        p.total_queries * group * kv_heads <= kSplitTilesOfAll * kTileVectors) {
      splits = std::max(splits, segments);
      split_vectors = smaller(kSplitTiles * kTileVectors / kv_heads, query_length * group);
      partial_vectors = p.total_queries * group;
    }
    tiles = tensor_cores && takes_two_tiles(p) ? 2 : 1;
  }
  // Warps of 32 vectors bring keys and values from shared memory half as often. They have to fill
  // the device, with two blocks on each multiprocessor, as those of 16 do, which compute capability
  // 8.0 and 9.0 have room for; the tensor cores of 8.6 and 8.9 take longer than shared memory for
  // either.
  bool takes_two_tiles(const RaggedAttentionParams& p) const {
    if (!kHasTwoTilesCode || p.sizes.head_dim != kTwoTilesDim ||
        !has_two_tiles(compute_capability())) {
      return false;
    }
    if (p.prefill != PrefillKernel::kAutomatic) return p.prefill == PrefillKernel::kMma32;
    constexpr auto kReserved = 1024;
    constexpr auto kBytes = static_cast<int64_t>(prefill_shared_bytes(kTwoTilesDim, 2));
    return multiprocessor_shared_bytes() >= 2 * (kBytes + kReserved) &&
           items(p, 2 * kTileVectors) * kv_heads >= int64_t{2} * multiprocessors();
  }
  // Items of a KV head: those of rows of one token, and all.
  int64_t decode_items(const RaggedAttentionParams& p) const {
    return smaller(p.num_rows, p.total_queries) * splits;
  }
  int64_t items(const RaggedAttentionParams& p, int64_t tile_vectors) const {
    const int64_t row_tiles = divide_up(query_length * group, tile_vectors);
    return smaller(vectors / tile_vectors + p.num_rows, p.num_rows * row_tiles) * splits;
  }
  // Blocks for `items`, of which the device holds `per_multiprocessor` each.
  dim3 grid(int64_t items, int per_multiprocessor) const {
    const int64_t held = divide_up(int64_t{multiprocessors()} * per_multiprocessor, kv_heads);
    return dim3(static_cast<unsigned>(smaller(items, held)), static_cast<unsigned>(kv_heads));
  }
  dim3 prefill_grid(const RaggedAttentionParams& p) const {
    if (has_warpgroups) return grid(items(p, kWarpgroupVectors), 1);
    return grid(items(p, tiles * kTileVectors), prefill_blocks(static_cast<int>(p.sizes.head_dim)));
  }
  // Whether rows of several tokens, or of more vectors than the decode kernel has columns for,
  // exist.
  bool has_prefill() const { return generic_queries == 0 && (query_length > 1 || !has_decode); }
  // Floats of the workspace: sums and stats of partial results, then totals of blocks.
  int64_t partials() const { return partial_vectors * kv_heads * splits; }
  int64_t totals(const RaggedAttentionParams& p) const {
    if (!has_prefill() || length <= attention_segment_keys(0)) return 0;
    const dim3 blocks = prefill_grid(p);
    const int threads = has_warpgroups ? kConsumerThreads : tiles * kAttentionThreads;
    return int64_t{blocks.x} * blocks.y * prefill_totals(p.sizes.head_dim, threads);
  }
};

template <typename T>
cudaError_t launch_generic(const AttentionArgs& args, const Plan& plan, cudaStream_t stream) {
  const bool aligned = loads_16_bytes(args.p);
  const int queries = plan.generic_queries;
  const dim3 grid = plan.grid(plan.items(args.p, queries), kGenericBlocks);
  const std::size_t shared = generic_shared_bytes(queries, args.p.sizes.head_dim);
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_int<1, kGenericQueries>(queries, [&]<int kQueries>() {
    error = aligned ? launch(ragged_attention_generic_kernel<T, kQueries, true>, grid,
                             dim3(kAttentionThreads), shared, stream, args)
                    : launch(ragged_attention_generic_kernel<T, kQueries, false>, grid,
                             dim3(kAttentionThreads), shared, stream, args);
  });
  return error;
}

template <typename T, bool kPaged>
cudaError_t launch_tensor_core(AttentionArgs& args, const Plan& plan, cudaStream_t stream) {
  const RaggedAttentionParams& p = args.p;
  args.key_column_bytes =
      static_cast<int32_t>(in_bytes(p.key_cache_strides, p.dtype).column_stride);
  args.value_column_bytes =
      static_cast<int32_t>(in_bytes(p.value_cache_strides, p.dtype).column_stride);
  if (plan.has_decode) {
    const auto head_dim = static_cast<int>(p.sizes.head_dim);
    const int blocks = decode_blocks(head_dim, decode_vectors(head_dim, plan.group) / 8);
    const dim3 grid = plan.grid(plan.decode_items(p), blocks);
    const cudaError_t error = launch_decode<T, kPaged>(args, grid, stream);
    if (error != cudaSuccess) return error;
  }
  if (!plan.has_prefill()) return cudaSuccess;
  const dim3 grid = plan.prefill_grid(p);
#if !defined(__CUDACC__) || defined(BATON_SM_90A)
  if (plan.has_warpgroups) return launch_warpgroup<T>(args, grid, stream);
#endif
  return launch_prefill<T, kPaged>(args, plan.tiles, grid, stream);
}

// Sets the fields of block tables. Multiplying by the factor divides numbers of 31 bits by the page
// exactly, because it is the reciprocal with at least that many bits, rounded up.
void set_pages(AttentionArgs& args, const RaggedAttentionParams& p) {
  const CacheStrides &k = p.key_cache_strides, &v = p.value_cache_strides;
  // Without pages only rows without columns fit, and they need no page.
  if (p.sizes.num_slots == 0) args.num_slots = 1, args.capacity = 0;
  args.page = static_cast<int32_t>(smaller(p.sizes.capacity, INT32_MAX));
  args.page_shift = 31;
  while (int64_t{1} << (args.page_shift - 31) < args.page) ++args.page_shift;
  args.page_factor =
      static_cast<uint32_t>(((uint64_t{1} << args.page_shift) + args.page - 1) / args.page);
  // Distances between pages, in units of 16 bytes, must fit 32 bits.
  const int64_t reach = args.num_slots * std::abs(in_bytes(k, p.dtype).slot_stride) +
                        args.capacity * std::abs(in_bytes(k, p.dtype).column_stride);
  args.pages_of_steps = args.page % kStepKeys == 0 && reach / 16 <= INT32_MAX &&
                        k.slot_stride == v.slot_stride && k.column_stride == v.column_stride;
}

AttentionArgs make_args(const RaggedAttentionParams& p, const Plan& plan) {
  AttentionArgs args{};
  args.p = p;
  args.group = static_cast<int32_t>(plan.group);
  args.has_decode = plan.has_decode;
  while (int64_t{1} << args.decode_shift < plan.group) ++args.decode_shift;
  args.max_splits = static_cast<int32_t>(plan.splits);
  args.decode_items = static_cast<int32_t>(smaller(p.num_rows * plan.splits, INT32_MAX / 2));
  args.max_split_vectors = static_cast<int32_t>(plan.split_vectors);
  args.partial_vectors = static_cast<int32_t>(plan.partial_vectors);
  // Parts that are read 16 bytes at a time come first.
  args.partial_sums = p.workspace;
  args.totals = args.partial_sums + plan.partials() * p.sizes.head_dim;
  args.partial_stats = args.totals + plan.totals(p);
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(smaller(x, INT32_MAX)); };
  args.num_slots = narrow(p.sizes.num_slots);
  args.capacity = narrow(attention_columns(p));
  if (p.block_table) set_pages(args, p);
  args.total_queries = narrow(p.total_queries);
  args.max_query_length = narrow(plan.query_length);
  args.max_length = narrow(plan.length);
  args.window = p.window > 0 ? narrow(p.window) : INT32_MAX;
  args.score_scale = static_cast<float>(p.scale / kLn2);
  args.log_unit = args.score_scale == 0.0f ? kLn2 : double{p.scale} / args.score_scale;
  args.plain_scores = p.softcap == 0.0f && !p.alibi_slopes;
  args.inverse_unit = 1.0 / args.log_unit;
  args.slope_scale = static_cast<float>(args.inverse_unit);
  if (p.softcap > 0.0f) {
    args.tanh_scale = p.scale / p.softcap;
    args.tanh_bound = static_cast<float>(p.softcap / args.log_unit);
  }
  return args;
}

}  // namespace

int64_t ragged_attention_workspace(const RaggedAttentionParams& p) {
  const Plan plan(p);
  return plan.partials() * (p.sizes.head_dim + 2) + plan.totals(p);
}

cudaError_t ragged_attention(const RaggedAttentionParams& p, cudaStream_t stream) {
  if (p.num_rows == 0 || p.total_queries == 0 || p.max_query_length == 0) return cudaSuccess;
  const Plan plan(p);
  if (plan.kv_heads > kMaxGridYZ || p.num_rows > INT32_MAX / 64 / plan.group ||
      plan.query_length * plan.group > INT32_MAX || plan.length > INT32_MAX - kSplitUnit ||
      plan.items(p, std::max(plan.generic_queries, 1)) > INT32_MAX / 2) {
    return cudaErrorInvalidConfiguration;
  }
  AttentionArgs args = make_args(p, plan);
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_dtype(p.dtype, [&]<typename Storage>() {
    using T = device_t<Storage>;
    if (plan.generic_queries == 0) {
      if constexpr (sizeof(T) == 2) {
        error = p.block_table ? launch_tensor_core<T, true>(args, plan, stream)
                              : launch_tensor_core<T, false>(args, plan, stream);
      }
    } else {
      error = launch_generic<T>(args, plan, stream);
    }
    if (error == cudaSuccess && plan.partial_vectors > 0) error = launch_merge<T>(args, stream);
  });
  return error;
}

}  // namespace baton::cuda

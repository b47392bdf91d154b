// ragged_attention: softmax(scale q k^T) v of every query token over the valid columns of its row.
//
// One call launches up to three kernels, each of which takes the rows that are its own and leaves
// the others: decode (few query vectors per KV head), prefill (tiles of 64), and the merge of split
// rows. float32 and what the tensor core kernels cannot load take the generic kernel in place of
// both. How blocks, warps and lanes divide the work stands in the kernels' own files.
#include "cuda/kernels.h"
#include "cuda/ragged_attention/generic.h"
#include "cuda/ragged_attention/launch.h"
#include "cuda/ragged_attention/merge.h"

namespace baton::cuda {

namespace {

constexpr double kLn2 = 0.6931471805599453094;
// Vectors of an item of the generic kernel.
constexpr int kGenericQueries = 4;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The host's bounds: what it was told, and no more than there is.
struct Bounds {
  int64_t group, query_length, length, vectors, splits, split_vectors, partial_vectors;
  bool partials_by_token;

  explicit Bounds(const RaggedAttentionParams& p) {
    group = p.num_heads / p.sizes.num_kv_heads;
    query_length = smaller(p.max_query_length, p.total_queries);
    length = smaller(p.max_length, p.sizes.capacity);
    vectors = smaller(p.total_queries, p.num_rows * query_length) * group;
    // The shortest row that is split has the fewest vectors.
    splits = num_splits(1, static_cast<int32_t>(smaller(length, INT32_MAX)));
    split_vectors = smaller(query_length * group, kSplitVectors);
    partials_by_token = p.total_queries * group <= p.num_rows * split_vectors;
    partial_vectors =
        splits == 1 ? 0 : smaller(p.total_queries * group, p.num_rows * split_vectors);
  }
  // Items of all rows in tiles of so many vectors.
  int64_t items(int64_t num_rows, int64_t tile_vectors) const {
    const int64_t row_tiles = divide_up(query_length * group, tile_vectors);
    const int64_t tiles = smaller(vectors / tile_vectors + num_rows, num_rows * row_tiles);
    const int64_t split_tiles = smaller(tiles, num_rows * divide_up(split_vectors, tile_vectors));
    return tiles + (splits - 1) * split_tiles;
  }
};

template <typename T>
cudaError_t launch_generic(const AttentionArgs& args, const Bounds& bounds, cudaStream_t stream) {
  const bool aligned = loads_16_bytes(args.p);
  // A lone vector needs no more than its own registers; the bits are the same.
  const int queries = bounds.query_length * bounds.group == 1 ? 1 : kGenericQueries;
  const int64_t items = bounds.items(args.p.num_rows, queries);
  if (items > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(items), static_cast<unsigned>(args.p.sizes.num_kv_heads));
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

template <typename T>
cudaError_t launch_tensor_core(AttentionArgs& args, const Bounds& bounds, cudaStream_t stream) {
  const RaggedAttentionParams& p = args.p;
  const auto kv_heads = static_cast<unsigned>(p.sizes.num_kv_heads);
  args.key_column_bytes =
      static_cast<int32_t>(in_bytes(p.key_cache_strides, p.dtype).column_stride);
  args.value_column_bytes =
      static_cast<int32_t>(in_bytes(p.value_cache_strides, p.dtype).column_stride);
  args.decode_vectors = decode_vectors(p.sizes.head_dim, bounds.group);
  if (args.decode_vectors > 0) {
    const int64_t vectors = smaller(bounds.query_length * bounds.group, args.decode_vectors);
    while (int64_t{1} << args.decode_shift < vectors) ++args.decode_shift;
    const dim3 grid(static_cast<unsigned>(p.num_rows), kv_heads,
                    static_cast<unsigned>(bounds.splits));
    const cudaError_t error = launch_decode<T>(args, grid, stream);
    if (error != cudaSuccess) return error;
  }
  if (bounds.query_length * bounds.group <= args.decode_vectors) return cudaSuccess;
  const int64_t items = bounds.items(p.num_rows, kSplitVectors);
  if (items > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch_prefill<T>(args, dim3(static_cast<unsigned>(items), kv_heads), stream);
}

AttentionArgs make_args(const RaggedAttentionParams& p, const Bounds& bounds) {
  AttentionArgs args{};
  args.p = p;
  args.group = static_cast<int32_t>(bounds.group);
  // Only numbers of vectors of a decode row are divided so.
  args.group_magic = static_cast<int32_t>(65535 / bounds.group + 1);
  args.max_splits = static_cast<int32_t>(bounds.splits);
  args.max_split_vectors = static_cast<int32_t>(bounds.split_vectors);
  args.partials_by_token = bounds.partials_by_token;
  args.partial_sums = p.workspace;
  const int64_t partials = bounds.partial_vectors * p.sizes.num_kv_heads * bounds.splits;
  args.partial_stats = p.workspace + partials * p.sizes.head_dim;
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(smaller(x, INT32_MAX)); };
  args.num_slots = narrow(p.sizes.num_slots);
  args.capacity = narrow(p.sizes.capacity);
  args.total_queries = narrow(p.total_queries);
  args.max_query_length = narrow(bounds.query_length);
  args.max_length = narrow(bounds.length);
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
  const Bounds bounds(p);
  return bounds.partial_vectors * p.sizes.num_kv_heads * bounds.splits * (p.sizes.head_dim + 2);
}

cudaError_t ragged_attention(const RaggedAttentionParams& p, cudaStream_t stream) {
  if (p.num_rows == 0 || p.total_queries == 0 || p.max_query_length == 0) return cudaSuccess;
  const Bounds bounds(p);
  if (p.sizes.num_kv_heads > kMaxGridYZ || p.num_rows > INT32_MAX ||
      bounds.query_length * bounds.group > INT32_MAX || bounds.length > INT32_MAX - kSplitUnit) {
    return cudaErrorInvalidConfiguration;
  }
  AttentionArgs args = make_args(p, bounds);
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_dtype(p.dtype, [&]<typename Storage>() {
    using T = device_t<Storage>;
    if (has_tensor_core_kernel(p)) {
      if constexpr (sizeof(T) == 2) error = launch_tensor_core<T>(args, bounds, stream);
    } else {
      error = launch_generic<T>(args, bounds, stream);
    }
    if (error == cudaSuccess && bounds.splits > 1) {
      const dim3 grid(static_cast<unsigned>(p.num_rows),
                      static_cast<unsigned>(p.sizes.num_kv_heads));
      error =
          launch(ragged_attention_merge_kernel<T>, grid, dim3(kAttentionThreads), 0, stream, args);
    }
  });
  return error;
}

}  // namespace baton::cuda

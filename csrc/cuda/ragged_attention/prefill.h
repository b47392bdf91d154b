// ragged_attention of rows with many query vectors per KV head (prefill, chunks), on tensor cores.
//
// A block of four warps has one item: a tile of 64 consecutive query vectors of a row and KV head
// (tokens x heads of the group), and the keys of one split. Each warp has 16 vectors, all dims.
// Keys and values of a tile of columns are copied by cp.async into shared memory, one tile ahead of
// the products, which are m16n8k16:
//   S = Q K^T   [16 vectors, keys]; Q stays in registers, K comes by ldmatrix
//   O += P V    [16 vectors, dims]; P is S in the registers where it lies, V comes by transposed
//   ldmatrix
// Tiles of columns that no vector of the block sees are not loaded, those that no vector of a warp
// sees are not computed, and only tiles at the border of what is visible are masked. With g = lane
// / 4 and t = lane % 4 a lane has vectors g and g + 8 of the warp.
#pragma once

#include "cuda/ragged_attention/launch.h"
#include "cuda/ragged_attention/mma.h"
#include "cuda/ragged_attention/rows.h"

namespace baton::cuda {

constexpr int kTileVectors = 16 * kAttentionWarps;
static_assert(kTileVectors == kSplitVectors, "a row that is split has one tile");

constexpr int kPrefillStages = 2;

// Columns of one tile. Both stages of keys and values must fit the 64 KB of sm_75, twice into the
// 100 KB of sm_86, and the scores of a tile into the registers that sums and queries leave.
constexpr int prefill_keys(int head_dim) {
  if (head_dim <= 64) return 64;   // 36 KB
  if (head_dim <= 128) return 32;  // 22 to 34 KB
  return 16;                       // 33 KB, and 25 KB of queries
}

// Blocks per SM that the registers have to leave room for.
constexpr int prefill_blocks(int head_dim) {
  // Sums and queries of 96 dims take 72 registers and leave room for three blocks; those of 256,
  // 192.
  return head_dim <= 96 ? 3 : 2;
}

// A row of keys or values in shared memory. The 16 bytes between rows put eight rows' same chunk
// into different banks: head_dim / 8 is even, so the pitch is an odd number of chunks.
constexpr int prefill_pitch(int head_dim) { return head_dim + 8; }

// Dims of the queries that stay in registers. Sums of 256 dims take 128, which leaves room for a
// quarter of the queries (sm_75 needs the most); ldmatrix brings the others from shared memory.
constexpr int prefill_register_dims(int head_dim) { return head_dim <= 128 ? head_dim : 64; }

// Elements of the two stages, then of the queries that are not in registers.
constexpr int prefill_cache_elements(int head_dim) {
  return 2 * kPrefillStages * prefill_keys(head_dim) * prefill_pitch(head_dim);
}
constexpr int prefill_query_pitch(int head_dim) {
  return head_dim <= 128 ? 0 : prefill_pitch(head_dim - prefill_register_dims(head_dim));
}
constexpr std::size_t prefill_shared_bytes(int head_dim) {
  return std::size_t{2} *
         (prefill_cache_elements(head_dim) + kTileVectors * prefill_query_pitch(head_dim));
}

template <typename T, int kHeadDim>
class PrefillBlock {
 public:
  static constexpr int kKeys = prefill_keys(kHeadDim), kPitch = prefill_pitch(kHeadDim);
  static constexpr int kKeyTiles = kKeys / 8, kDimTiles = kHeadDim / 8;

 private:
  const AttentionArgs& a_;
  const AttentionRow& row_;
  const int32_t lane_ = threadIdx.x % 32, t_ = lane_ % 4, kv_head_ = blockIdx.y;
  const char* cache_[2];
  uint32_t stride_[2];  // bytes
  T* shared_;           // [stage][keys, values][kKeys][kPitch]
  int32_t first_;       // vector of this lane; the other one is 8 further
  static constexpr int kRegisterProducts = prefill_register_dims(kHeadDim) / 16;
  static constexpr int kCacheElements = prefill_cache_elements(kHeadDim);
  static constexpr int kQueryPitch = prefill_query_pitch(kHeadDim);
  uint32_t query_[kRegisterProducts][4];
  float maximum_[2] = {kNoScore, kNoScore};

 public:
  float sum[2] = {};  // of this lane's keys
  float out[kDimTiles][4] = {};

  __device__ __forceinline__ PrefillBlock(const AttentionArgs& a, const AttentionRow& row,
                                          int32_t first_vector, T* shared)
      : a_(a), row_(row), shared_(shared), first_(first_vector + lane_ / 4) {
    const auto set = [&](int i, const void* cache, const CacheStrides& s) {
      cache_[i] =
          reinterpret_cast<const char*>(static_cast<const T*>(cache) + row.slot * s.slot_stride +
                                        kv_head_ * s.head_stride + row.start * s.column_stride);
    };
    set(0, a.p.key_cache, a.p.key_cache_strides);
    set(1, a.p.value_cache, a.p.value_cache_strides);
    stride_[0] = static_cast<uint32_t>(a.key_column_bytes);
    stride_[1] = static_cast<uint32_t>(a.value_column_bytes);
  }

  // Of vectors past the end: zeros.
  __device__ __forceinline__ void load_queries() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool exists = first_ + 8 * i < row_.vectors;
      const Owner owner = owner_of(i);
      const TokenStrides& s = a_.p.query_strides;
      const T* query = static_cast<const T*>(a_.p.query) +
                       (int64_t{row_.first_token} + owner.token) * s.token_stride +
                       owner.head * s.head_stride + 2 * t_;
#pragma unroll
      for (int r = 0; r < kHeadDim / 16; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t pair =
              exists ? *reinterpret_cast<const uint32_t*>(query + 16 * r + 8 * half) : 0;
          if (r < kRegisterProducts) {
            query_[r][2 * half + i] = pair;
          } else {
            T* target = shared_queries() + (lane_ / 4 + 8 * i) * kQueryPitch +
                        16 * (r - kRegisterProducts) + 8 * half + 2 * t_;
            *reinterpret_cast<uint32_t*>(target) = pair;
          }
        }
      }
    }
    // A warp reads its own queries alone.
    if constexpr (kQueryPitch > 0) __syncwarp();
  }

  // Asks for the keys and values of one tile; zeros past the end.
  __device__ __forceinline__ void copy_tile(int32_t first, int32_t end, int stage) {
    constexpr int kChunks = kHeadDim / 8;
    constexpr int kTileChunks = kKeys * kChunks;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      T* target = tile(stage, which);
#pragma unroll
      for (int i = 0; i < (kTileChunks - 1) / kAttentionThreads + 1; ++i) {
        const int32_t c = static_cast<int32_t>(threadIdx.x) + i * kAttentionThreads;
        if (kTileChunks % kAttentionThreads != 0 && c >= kTileChunks) break;
        const int32_t key = c / kChunks, chunk = c % kChunks;
        const bool valid = first + key < end;
        const auto k = static_cast<uint32_t>(valid ? first + key : first);
        copy_async_16(target + key * kPitch + 8 * chunk,
                      cache_[which] + uint64_t{k} * stride_[which] + 16 * chunk, valid);
      }
    }
    copy_async_commit();
  }

  // Adds one tile of which this warp's vectors see something.
  __device__ __forceinline__ void add_tile(const TileKeys& keys, int32_t first, int stage) {
    float scores[kKeyTiles][4] = {};
    score(scores, tile(stage, 0));
    finish_scores(keys, first, scores);
    update(scores);
    weigh(scores, tile(stage, 1));
  }

  __device__ __forceinline__ void write(const AttentionItem32& item) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        sum[i] += __shfl_xor_sync(~0u, sum[i], offset);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t vector = first_ + 8 * i;
      if (vector >= row_.vectors) continue;
      const Owner owner = owner_of(i);
      VectorWriter<T> writer(a_, row_, vector, owner.token, owner.head, kv_head_, item.split,
                             item.splits, maximum_[i], sum[i], t_ == 0);
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
        writer.put_2(8 * n + 2 * t_, out[n][2 * i], out[n][2 * i + 1]);
      }
    }
  }

 private:
  // Token and head of one of the two vectors; worked out when needed, for registers are scarce.
  struct Owner {
    int32_t token, head;
  };
  __device__ __forceinline__ Owner owner_of(int i) const {
    const int32_t vector = min(first_ + 8 * i, row_.vectors - 1), token = vector / a_.group;
    return {token, kv_head_ * a_.group + vector - token * a_.group};
  }

  // Of this warp.
  __device__ __forceinline__ T* shared_queries() const {
    return shared_ + kCacheElements + threadIdx.x / 32 * 16 * kQueryPitch;
  }
  __device__ __forceinline__ T* tile(int stage, int which) const {
    return shared_ + (2 * stage + which) * kKeys * kPitch;
  }

  __device__ __forceinline__ void score(float (&scores)[kKeyTiles][4], const T* keys) const {
    // Rows that this lane names for ldmatrix: 16 keys, two halves of 16 dims.
    const T* row = keys + (lane_ / 16 * 8 + lane_ % 8) * kPitch + lane_ / 8 % 2 * 8;
#pragma unroll
    for (int r = 0; r < kHeadDim / 16; ++r) {
      uint32_t query[4];
      if (r < kRegisterProducts) {
#pragma unroll
        for (int i = 0; i < 4; ++i) query[i] = query_[r][i];
      } else {
        load_matrix(query, shared_queries() + lane_ % 16 * kQueryPitch + lane_ / 16 * 8 +
                               16 * (r - kRegisterProducts));
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t b[4];
        load_matrix(b, row + 8 * n * kPitch + 16 * r);
        multiply_16<T>(scores[n], query, {b[0], b[1]});
        multiply_16<T>(scores[n + 1], query, {b[2], b[3]});
      }
    }
  }

  __device__ __forceinline__ void finish_scores(const TileKeys& keys, int32_t first,
                                                float (&scores)[kKeyTiles][4]) const {
    if (!a_.plain_scores) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Owner owner = owner_of(i);
        const float slope = slope_of(a_, owner.head);
        const int32_t distance = row_.position(owner.token) - first - 2 * t_;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = scores[n][2 * i + c];
            x = finish_score<true>(a_, x, slope, distance - 8 * n - c);
          }
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] *= a_.score_scale;
      }
    }
    if (first >= keys.full_begin && first + kKeys <= keys.full_end) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const KeyRange range = row_.visible(a_, owner_of(i).token);
      const int32_t begin = range.begin - first - 2 * t_;
      const int32_t end = min(range.end, keys.end) - first - 2 * t_;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int32_t k = 8 * n + c;
          if (k < begin || k >= end) scores[n][2 * i + c] = -INFINITY;
        }
      }
    }
  }

  // Scores to probabilities, relative to the running maximum.
  __device__ __forceinline__ void update(float (&scores)[kKeyTiles][4]) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float next = maximum_[i];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        next = fmaxf(next, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
      }
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        next = fmaxf(next, __shfl_xor_sync(~0u, next, offset));
      }
      factor[i] = exp2_fast(maximum_[i] - next);
      maximum_[i] = next;
      sum[i] *= factor[i];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = scores[n][2 * i + c];
          x = exp2_fast(x - next);
          sum[i] += x;
        }
      }
    }
    if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] *= factor[i / 2];
      }
    }
  }

  __device__ __forceinline__ void weigh(const float (&scores)[kKeyTiles][4], const T* values) {
    const T* row = values + (lane_ / 8 % 2 * 8 + lane_ % 8) * kPitch + lane_ / 16 * 8;
#pragma unroll
    for (int k = 0; k < kKeyTiles; k += 2) {
      const uint32_t p[4] = {
          pack<T>(scores[k][0], scores[k][1]), pack<T>(scores[k][2], scores[k][3]),
          pack<T>(scores[k + 1][0], scores[k + 1][1]), pack<T>(scores[k + 1][2], scores[k + 1][3])};
#pragma unroll
      for (int n = 0; n < kDimTiles; n += 2) {
        uint32_t b[4];
        load_matrix_transposed(b, row + 8 * k * kPitch + 8 * n);
        multiply_16<T>(out[n], p, {b[0], b[1]});
        multiply_16<T>(out[n + 1], p, {b[2], b[3]});
      }
    }
  }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads, prefill_blocks(kHeadDim))
    ragged_attention_prefill_kernel(const __grid_constant__ AttentionArgs a) {
  BATON_DYNAMIC_SHARED(memory);
  using Block = PrefillBlock<T, kHeadDim>;
  AttentionItem32 item;
  if (!find_item(a, blockIdx.x, kTileVectors, a.decode_vectors, item)) return;
  const AttentionRow& row = item.row;
  // The last tile of a causal row is its longest: first, so that nobody ends with it.
  const int32_t tile = (row.vectors - 1) / kTileVectors - item.tile;
  const int32_t block_first = tile * kTileVectors;
  const int32_t warp_first = block_first + static_cast<int32_t>(threadIdx.x) / 32 * 16;
  const auto keys_of = [&](int32_t first, int32_t count) {
    const int32_t last = min(first + count, row.vectors) - 1;
    return TileKeys(a, row, min(first, last) / a.group, last / a.group, item.split, item.splits);
  };
  const TileKeys block_keys = keys_of(block_first, kTileVectors);
  TileKeys keys = keys_of(warp_first, 16);
  if (warp_first >= row.vectors) keys.end = 0;  // nobody to see anything

  Block x(a, row, warp_first, reinterpret_cast<T*>(memory));
  if (block_keys.begin < block_keys.end) x.copy_tile(block_keys.begin, block_keys.end, 0);
  x.load_queries();
  int stage = 0;
  for (int32_t first = block_keys.begin; first < block_keys.end; first += Block::kKeys) {
    if (first + Block::kKeys < block_keys.end) {
      x.copy_tile(first + Block::kKeys, block_keys.end, stage ^ 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    // Everybody's part of the tile has arrived.
    __syncthreads();
    if (first < keys.end && first + Block::kKeys > keys.begin) x.add_tile(keys, first, stage);
    // Nobody reads it any longer when the next copy begins.
    __syncthreads();
    stage ^= 1;
  }
  x.write(item);
}

template <typename T>
cudaError_t launch_prefill(const AttentionArgs& args, dim3 grid, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_int<64, 80, 96, 128, 256>(args.p.sizes.head_dim, [&]<int kHeadDim>() {
    error = launch(ragged_attention_prefill_kernel<T, kHeadDim>, grid, dim3(kAttentionThreads),
                   prefill_shared_bytes(kHeadDim), stream, args);
  });
  return error;
}

}  // namespace baton::cuda

// move_kv: columns [source_start, source_start + length) of one slot become columns
// [target_start, ...) of another or the same slot, in place, as if the source were read whole
// before the target is written.
//
// A block has a strip: the keys and values of one head and layer of one move. It takes a tile of
// columns at a time, the strip's ends first that the target does not overwrite: all of the tile is
// loaded into registers, then stored. A barrier between the two is all that overlap needs: what
// a tile overwrites lies in itself or in tiles before it. Blocks do not touch one another's strips.
//
// Few strips would leave a large device idle. A move by `distance` columns only ever writes
// column c where c + distance is read, so the columns of one residue modulo the distance depend on
// no others: `slices` blocks share a strip, each with a range of residues, as long as every range
// fills a tile. A move between slots, or past its own length, has one column per residue.
//   threadIdx  x: chunk (16 bytes where alignment allows), y: column
//   blockIdx   x: move, then slice; y: layer; z: head
#include "cuda/device/chunk.h"
#include "cuda/kernels.h"

namespace baton::cuda {

namespace {

// Threads of a block, and the most it has when one head has more chunks than that.
constexpr int kThreads = 128, kMaxThreads = 256;
// Columns of a thread whose keys and values are in flight together: 256 bytes. A tile has this
// number of columns for every row of threads.
constexpr int kUnroll = 8;
// Threads that keep the largest device (B200) busy with that much each: 43 KB for each of 148 SMs,
// and some more.
constexpr int64_t kWantedThreads = 32 * 1024;

struct MoveArgs {
  char* cache[2];  // keys and values, [num_layers, num_slots, num_kv_heads, capacity, head_dim]
  CacheStrides cache_strides[2];  // in bytes
  const int32_t* source_slots;
  const int32_t* source_starts;
  const int32_t* target_slots;
  const int32_t* target_starts;
  const int32_t* lengths;
  int32_t num_moves, num_slots;
  int64_t capacity;
  int32_t slices;
};

// A thread's place in keys and in values.
struct Place {
  char* source[2];
  int64_t delta[2];  // to the target
  int64_t step[2];   // to this thread's next column
};

// `count` consecutive columns; all threads of the block take part.
template <int kBytes>
__device__ __forceinline__ void move_run(Place x, int32_t count) {
  const int32_t between = blockDim.y, tile = between * kUnroll;
  Chunk<kBytes> chunks[kUnroll][2];
#pragma unroll 1
  for (; count >= tile; count -= tile) {
    char* target[2] = {x.source[0] + x.delta[0], x.source[1] + x.delta[1]};
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        chunks[i][j] = load_and_advance<kBytes>(x.source[j], x.step[j]);
      }
    }
    // Nobody stores into the tile before all of it is loaded. What the next tile loads is not
    // stored by this one, so one barrier is enough.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        store_and_advance<kBytes>(target[j], x.step[j], chunks[i][j]);
      }
    }
  }
  if (count == 0) return;
  const int32_t column = threadIdx.y;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (column + i * between >= count) break;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      chunks[i][j] = load_chunk<kBytes>(x.source[j] + i * x.step[j]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (column + i * between >= count) break;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      store_hidden<kBytes>(x.source[j] + x.delta[j] + i * x.step[j], chunks[i][j]);
    }
  }
}

template <int kBytes>
__global__ void __launch_bounds__(kMaxThreads) move_kv_kernel(const __grid_constant__ MoveArgs a) {
  const int32_t slice = static_cast<int32_t>(blockIdx.x) / a.num_moves;
  const int32_t move = static_cast<int32_t>(blockIdx.x) - slice * a.num_moves;
  const int32_t source_slot = a.source_slots[move], target_slot = a.target_slots[move];
  const int32_t source_start = a.source_starts[move], target_start = a.target_starts[move];
  const int32_t length = a.lengths[move];
  if (source_slot < 0 || source_slot >= a.num_slots || target_slot < 0 ||
      target_slot >= a.num_slots || source_start < 0 || target_start < 0 || length <= 0 ||
      int64_t{source_start} + length > a.capacity || int64_t{target_start} + length > a.capacity) {
    return;
  }
  const int32_t shift = target_start - source_start;
  const bool same_slot = source_slot == target_slot;
  if (same_slot && shift == 0) return;

  // This slice's residues [first, first + count), of every `distance` columns.
  unsigned distance = length, first = 0, count = length;
  if (same_slot) distance = min(length, abs(shift));
  const unsigned tile = blockDim.y * kUnroll;
  const unsigned slices = min(static_cast<unsigned>(a.slices), distance / tile);
  if (slices <= 1) {
    // One block has them all, which is the same as all columns in order.
    if (slice > 0) return;
    distance = length;
  } else {
    count = ((distance - 1) / (slices * tile) + 1) * tile;
    first = slice * count;
    if (unsigned(slice) >= slices || first >= distance) return;
    count = min(count, distance - first);
  }

  // From the end when the target lies behind the source; residues count from there as well.
  const bool backwards = same_slot && shift > 0;
  Place x;
  int64_t stride[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const CacheStrides& s = a.cache_strides[j];
    stride[j] = backwards ? -s.column_stride : s.column_stride;
    x.step[j] = blockDim.y * stride[j];
    x.delta[j] = (target_slot - source_slot) * s.slot_stride + shift * s.column_stride;
    x.source[j] = a.cache[j] + blockIdx.y * s.layer_stride + source_slot * s.slot_stride +
                  blockIdx.z * s.head_stride +
                  (int64_t{source_start} + (backwards ? length - 1 : 0)) * s.column_stride +
                  (first + threadIdx.y) * stride[j] + threadIdx.x * kBytes;
  }
  while (true) {
    move_run<kBytes>(x, static_cast<int32_t>(min(count, length - first)));
    if (distance >= unsigned(length) - first) return;
    first += distance;
#pragma unroll
    for (int j = 0; j < 2; ++j) x.source[j] += distance * stride[j];
  }
}

}  // namespace

cudaError_t move_kv(const MoveKvParams& p, cudaStream_t stream) {
  const int64_t head_bytes = p.sizes.head_dim * size_of(p.dtype);
  MoveArgs a{};
  a.cache[0] = static_cast<char*>(p.key_cache);
  a.cache[1] = static_cast<char*>(p.value_cache);
  a.cache_strides[0] = in_bytes(p.key_cache_strides, p.dtype);
  a.cache_strides[1] = in_bytes(p.value_cache_strides, p.dtype);
  a.source_slots = p.source_slots;
  a.source_starts = p.source_starts;
  a.target_slots = p.target_slots;
  a.target_starts = p.target_starts;
  a.lengths = p.lengths;
  a.num_moves = static_cast<int32_t>(p.num_moves);
  a.num_slots = static_cast<int32_t>(p.sizes.num_slots);
  a.capacity = p.sizes.capacity;
  ChunkSize size;
  size << head_bytes << p.key_cache << p.value_cache << a.cache_strides[0] << a.cache_strides[1];
  const int64_t strips = p.sizes.num_layers * p.num_moves * p.sizes.num_kv_heads;
  if (strips == 0) return cudaSuccess;
  const int64_t chunks = head_bytes / size.bytes();
  const int64_t columns = chunks < kThreads ? kThreads / chunks : 1;
  const int64_t wanted = divide_up(kWantedThreads, strips * chunks * columns);
  const int64_t most = divide_up(p.sizes.capacity, columns * kUnroll);
  const int64_t slices = wanted < most ? wanted : most;
  a.slices = static_cast<int32_t>(slices);
  if (p.num_moves * slices > INT32_MAX || p.sizes.num_layers > kMaxGridYZ ||
      p.sizes.num_kv_heads > kMaxGridYZ) {
    return cudaErrorInvalidConfiguration;
  }
  const dim3 grid(static_cast<unsigned>(p.num_moves * slices),
                  static_cast<unsigned>(p.sizes.num_layers),
                  static_cast<unsigned>(p.sizes.num_kv_heads));
  const dim3 block(static_cast<unsigned>(chunks), static_cast<unsigned>(columns));
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_int<16, 4, 2>(size.bytes(), [&]<int kBytes>() {
    error = launch(move_kv_kernel<kBytes>, grid, block, 0, stream, a);
  });
  return error;
}

}  // namespace baton::cuda

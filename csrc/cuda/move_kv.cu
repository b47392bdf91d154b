// move_kv: columns [source_start, source_start + length) of one slot become columns
// [target_start, ...) of another or the same slot, in place, as if the source were read whole
// before the target is written.
//
// A thread has a line: one chunk (16 bytes where alignment allows) of one head and layer of one
// move's keys or values, in all its columns. Lines do not touch one another, so no thread waits for
// another, however source and target overlap: a line only has to be walked from the end that its
// target does not overwrite, kUnroll columns loaded before the first of them is stored. Neighboring
// lanes have neighboring chunks.
//
// Short lines alone would leave a large device idle. A move by `distance` columns only ever writes
// column c where c + distance is read, so the columns of one residue modulo the distance depend on
// no others: `slices` threads share a line, each with a range of residues. A move between slots, or
// past its own length, has one column per residue and splits freely.
#include "cuda/chunk.h"
#include "cuda/kernels.h"

namespace baton::cuda {

namespace {

constexpr int kThreads = 128;
// Loads on their way per thread: 128 bytes.
constexpr int kUnroll = 8;
// Threads that keep the largest device busy with kUnroll loads each, and the fewest columns of the
// capacity that make a slice worth its start.
constexpr int64_t kWantedThreads = 128 * 1024;
constexpr int64_t kSliceColumns = 64;

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
  int32_t chunks_per_head, chunks;  // of a column, all heads
  int32_t lines;                    // of a move and layer: keys and values
  int32_t blocks_per_move;          // and layer and slice
  int32_t slices;
};

// The columns of a slice in the order they are moved: residues first, then one distance further.
struct Walk {
  int32_t first, num_residues, distance;
  int32_t residue = 0, base = 0;

  __device__ __forceinline__ int32_t next() {
    const int32_t column = base + first + residue;
    if (++residue == num_residues) {
      residue = 0;
      base += distance;
    }
    return column;
  }
};

template <int kBytes>
__global__ void __launch_bounds__(kThreads) move_kv_kernel(const __grid_constant__ MoveArgs a) {
  int32_t block = blockIdx.x;
  int32_t line = block % a.blocks_per_move * kThreads + threadIdx.x;
  block /= a.blocks_per_move;
  const int32_t slice = block % a.slices;
  block /= a.slices;
  const int32_t move = block % a.num_moves;
  const int64_t layer = block / a.num_moves;
  if (line >= a.lines) return;
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
  int32_t distance = length;
  if (same_slot) distance = min(length, abs(shift));

  // This slice's residues; their columns are walked backwards when the target lies behind the
  // source.
  Walk walk;
  walk.first = static_cast<int32_t>(int64_t{distance} * slice / a.slices);
  walk.num_residues = static_cast<int32_t>(int64_t{distance} * (slice + 1) / a.slices) - walk.first;
  walk.distance = distance;
  if (walk.num_residues == 0) return;
  const int32_t full = length / distance, rest = length % distance;
  // Columns in full rows of residues, and those of the last, partial one.
  const int32_t last = min(max(rest - walk.first, 0), walk.num_residues);
  int32_t count = full * walk.num_residues + last;
  const bool backwards = same_slot && shift > 0;

  const int32_t which = line >= a.chunks ? 1 : 0;
  const int32_t c = line - which * a.chunks;
  const CacheStrides& s = a.cache_strides[which];
  char* base = a.cache[which] + layer * s.layer_stride + c / a.chunks_per_head * s.head_stride +
               c % a.chunks_per_head * kBytes;
  const char* source = base + source_slot * s.slot_stride + source_start * s.column_stride;
  char* target = base + target_slot * s.slot_stride + target_start * s.column_stride;
  // The end of the line mirrors its beginning, residues included.
  int64_t stride = s.column_stride;
  if (backwards) {
    source += (length - 1) * stride;
    target += (length - 1) * stride;
    stride = -stride;
  }

  for (; count > 0; count -= kUnroll) {
    Chunk<kBytes> chunks[kUnroll];
    int32_t columns[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (i < count) {
        columns[i] = walk.next();
        chunks[i] = load_chunk<kBytes>(source + columns[i] * stride);
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (i < count) store_chunk<kBytes>(target + columns[i] * stride, chunks[i]);
    }
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
  a.chunks_per_head = static_cast<int32_t>(head_bytes / size.bytes());
  a.chunks = static_cast<int32_t>(a.chunks_per_head * p.sizes.num_kv_heads);
  a.lines = 2 * a.chunks;
  a.blocks_per_move = static_cast<int32_t>(divide_up(a.lines, kThreads));
  const int64_t move_blocks = p.sizes.num_layers * p.num_moves * a.blocks_per_move;
  if (move_blocks == 0) return cudaSuccess;
  const int64_t wanted = divide_up(kWantedThreads, move_blocks * kThreads);
  const int64_t most = divide_up(p.sizes.capacity, kSliceColumns);
  a.slices = static_cast<int32_t>(wanted < most ? wanted : most);
  if (a.slices < 1) a.slices = 1;
  if (move_blocks * a.slices > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_int<16, 4, 2>(size.bytes(), [&]<int kBytes>() {
    error = launch(move_kv_kernel<kBytes>, dim3(static_cast<unsigned>(move_blocks * a.slices)),
                   dim3(kThreads), 0, stream, a);
  });
  return error;
}

}  // namespace baton::cuda

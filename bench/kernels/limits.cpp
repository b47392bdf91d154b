// The limits of this machine's memory: the ceilings that kernels are compared with.
//
// C interface for ctypes, compiled on first use. Threads are OpenMP's. If torch is loaded first,
// they are torch's pool, so that waking them takes as long as for an op.
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// Small enough that no thread waits long for another one's last chunk.
constexpr int64_t kChunk = 256 * 1024;
constexpr int64_t kLine = 64;
using Line = uint64_t __attribute__((vector_size(kLine)));

// Reads one chunk as kStreams runs in parallel: some machines fetch several runs faster than one.
template <int kStreams>
Line read_chunk(const char* begin, int64_t bytes, int64_t prefetch) {
  Line sum[kStreams] = {};
  const int64_t run = bytes / kStreams / kLine * kLine;
  for (int64_t i = 0; i < run; i += kLine) {
    for (int s = 0; s < kStreams; ++s) {
      const char* line = begin + s * run + i;
      // Into the second-level cache, which is faster here than the first-level one.
      if (prefetch > 0) __builtin_prefetch(line + prefetch, 0, 2);
      sum[s] ^= *reinterpret_cast<const Line*>(line);
    }
  }
  for (int64_t i = kStreams * run; i + kLine <= bytes; i += kLine) {
    sum[0] ^= *reinterpret_cast<const Line*>(begin + i);
  }
  for (int s = 1; s < kStreams; ++s) sum[0] ^= sum[s];
  return sum[0];
}

void stream_chunk(char* target, const char* source, int64_t bytes) {
#ifdef __AVX512F__
  for (int64_t i = 0; i < bytes; i += kLine) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
  }
  _mm_sfence();
#else
  std::memcpy(target, source, bytes);
#endif
}

}  // namespace

extern "C" {

// Reads `bytes` (a multiple of 64) from `source` (aligned to 64) once; returns their xor, so that
// the compiler cannot remove a load.
uint64_t limits_read(const char* source, int64_t bytes, int threads, int streams,
                     int64_t prefetch) {
  uint64_t result = 0;
  const int64_t chunks = (bytes + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(^ : result)
  for (int64_t c = 0; c < chunks; ++c) {
    const char* begin = source + c * kChunk;
    const int64_t count = bytes - c * kChunk < kChunk ? bytes - c * kChunk : kChunk;
    const Line sum = streams == 1   ? read_chunk<1>(begin, count, prefetch)
                     : streams == 2 ? read_chunk<2>(begin, count, prefetch)
                     : streams == 4 ? read_chunk<4>(begin, count, prefetch)
                                    : read_chunk<8>(begin, count, prefetch);
    for (int i = 0; i < 8; ++i) result ^= sum[i];
  }
  return result;
}

// C memcpy, one part per thread.
void limits_memcpy(char* target, const char* source, int64_t bytes, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int t = 0; t < threads; ++t) {
    const int64_t begin = bytes / kLine * t / threads * kLine;
    const int64_t end = t + 1 == threads ? bytes : bytes / kLine * (t + 1) / threads * kLine;
    std::memcpy(target + begin, source + begin, end - begin);
  }
}

// A copy with streaming stores, which do not read the target first. All multiples of 64.
void limits_stream(char* target, const char* source, int64_t bytes, int threads) {
  const int64_t chunks = (bytes + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t begin = c * kChunk;
    stream_chunk(target + begin, source + begin, bytes - begin < kChunk ? bytes - begin : kChunk);
  }
}
}

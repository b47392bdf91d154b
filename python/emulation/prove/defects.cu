// Attention of one token per row in a few lines: right, and wrong in ways that an example with
// finite values does not show, without and with a block table. A block is a row, a thread a dim of
// four.
#include <cstdint>

enum Defect { kNone, kMultipliesByZero, kSplitsByRows, kReadsTail };
enum PagedDefect { kNoneInPages, kReadsForeignPage, kSplitsByPage };

// For what is thrown away: a load that no compiler removes.
__device__ float load(const float* address) {
  float x;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(address) : "memory");
  return x;
}

// A dim of a row's result; at(key) is where a key's and a value's dims begin.
template <bool kMultiplies, typename At>
struct Attention {
  const float *query, *key, *value;
  int32_t length;
  At at;
  float result = 0.0f, total = 0.0f;

  // Keys behind the row are multiplied by zero, or loaded and left out.
  __device__ void add(int32_t first, int32_t last) {
    float sum = 0.0f, weights = 0.0f;
#pragma unroll 1
    for (int32_t k = first; k < last; ++k) {
      const int64_t place = at(k) * 4;
      float score = 0.0f;
      for (int32_t i = 0; i < 4; ++i) score += query[i] * key[place + i];
      const float x = load(value + place + threadIdx.x), weight = k < length ? exp2f(score) : 0.0f;
      if (kMultiplies || k < length) {
        sum += weight * x;
        weights += weight;
      }
    }
    result += sum;
    total += weights;
  }
};
template <bool kMultiplies, typename At>
__device__ Attention<kMultiplies, At> attention(const float* query, const float* key,
                                                const float* value, int32_t length, At at) {
  return {query + blockIdx.x * 4, key, value, length, at};
}

template <int kDefect>
__global__ void attend_kernel(const float* query, const float* key, const float* value, float* out,
                              const int32_t* starts, const int32_t* lengths, int32_t capacity) {
  const int32_t row = blockIdx.x, start = starts[row], length = lengths[row];
  auto x = attention<kDefect == kMultipliesByZero>(
      query, key, value, length, [=](int32_t k) { return int64_t{row} * capacity + start + k; });
  if (kDefect == kSplitsByRows && gridDim.x > 1) {
    x.add(0, length / 2);
    x.add(length / 2, length);
  } else if (kDefect == kMultipliesByZero || kDefect == kReadsTail) {
    x.add(0, (length + 3) / 4 * 4);  // the cache has room
  } else {
    x.add(0, length);
  }
  out[row * 4 + threadIdx.x] = x.result / x.total;
}

// table: [rows, max_pages]; every row has a page more than its columns need.
template <int kDefect>
__global__ void attend_pages_kernel(const float* query, const float* key, const float* value,
                                    float* out, const int32_t* table, const int32_t* lengths,
                                    int32_t page, int32_t max_pages) {
  const int32_t row = blockIdx.x, length = lengths[row];
  auto x = attention<true>(query, key, value, length, [=](int32_t k) {
    return int64_t{table[row * max_pages + k / page]} * page + k % page;
  });
  if (kDefect == kSplitsByPage) {
    for (int32_t k = 0; k < length; k += page) x.add(k, min(k + page, length));
  } else {
    x.add(0, kDefect == kReadsForeignPage ? ((length - 1) / page + 2) * page : length);
  }
  out[row * 4 + threadIdx.x] = x.result / x.total;
}

#define BATON_SLOTS(defect)                                                                        \
  template __global__ void attend_kernel<defect>(const float*, const float*, const float*, float*, \
                                                 const int32_t*, const int32_t*, int32_t);
#define BATON_PAGES(defect)                                                                      \
  template __global__ void attend_pages_kernel<defect>(const float*, const float*, const float*, \
                                                       float*, const int32_t*, const int32_t*,   \
                                                       int32_t, int32_t);
BATON_SLOTS(kNone)
BATON_SLOTS(kMultipliesByZero)
BATON_SLOTS(kSplitsByRows)
BATON_SLOTS(kReadsTail)
BATON_PAGES(kNoneInPages)
BATON_PAGES(kReadsForeignPage)
BATON_PAGES(kSplitsByPage)

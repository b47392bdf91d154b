// Turns the scores of one block into probabilities, relative to a running maximum.
#pragma once

#include "cpu/ragged_attention/item.h"
#include "cpu/ragged_attention/tile.h"
#include "cpu/simd/exponential.h"

namespace baton::cpu::BATON_ISA {

constexpr float kNothing = -__builtin_inff();

// The keys that one query vector sees, and its ALiBi slope.
struct View {
  Range range;       // keys
  int64_t position;  // the query vector's own
  float slope;       // ALiBi's

  // Whether any of these keys is hidden from it.
  bool hides(int64_t begin, int64_t end) const { return range.begin > begin || range.end < end; }
};

// Probabilities are relative to a reference that follows the largest score lazily: earlier sums are
// rescaled only when a score exceeds it by more than this. A factor of e^10 loses no float
// accuracy. Each query vector decides this from its own scores of whole blocks, so it does not
// matter with which other vectors it shares a tile.
constexpr float kSlack = 10.0f;

// The softmax of one block, for all query vectors of a tile. The constructor moves the references.
// Where values are used straight from the cache, probabilities are computed on demand, sixteen keys
// at a time: memory would be idle during the exponentials of a whole block.
template <typename Products>
class BlockSoftmax {
 public:
  BlockSoftmax(const RaggedAttentionParams& p, const View* views, int count, int64_t first_key,
               int64_t num_keys, AttentionScratch& scratch)
      : p_(p),
        views_(views),
        count_(count),
        first_key_(first_key),
        has_scales_(p.scales.key != nullptr && p.dtype != Dtype::kFloat32),
        scratch_(scratch) {
    const int num_vecs = static_cast<int>((num_keys + kLanes - 1) / kLanes);
    const bool now = !Products::uses_block_in_place(count);
    for (int m = 0; m < count; ++m) {
      // An unrolled loop for whole blocks; for others, a loop over the vectors that they have.
      if (num_vecs == kBlockVecs) {
        begin(views[m], first_key, kBlockVecs, m, now);
      } else {
        begin(views[m], first_key, num_vecs, m, now);
      }
    }
    if (now) done_ = num_vecs;
  }

  // Converts the scores of all keys below `key` to probabilities.
  BATON_INLINE void until(int64_t key) {
    for (; done_ * kLanes < key; ++done_) {
      for (int m = 0; m < count_; ++m) {
        const Vec score = load(scratch_.scores[m] + done_ * kLanes) * set1(factor_[m]);
        const Vec probability = exp(score - set1(reference_[m]));
        store(scratch_.sum[m], load(scratch_.sum[m]) + probability);
        put(m, done_, probability);
      }
    }
  }

 private:
  // Moves the reference of query vector m, whose scores fill num_vecs vectors; with `now` also
  // computes its probabilities. A block of which the vector sees nothing changes nothing.
  BATON_INLINE void begin(const View& view, int64_t first_key, int num_vecs, int m, bool now) {
    float* scores = scratch_.scores[m];
    Vec s[kBlockVecs];
    const bool plain = finish_scores(view, scores, first_key, num_vecs, s);
    Vec top = s[0];
    BATON_UNROLL
    for (int i = 1; i < num_vecs; ++i) top = max(s[i], top);
    const float old = scratch_.maximum[m];
    if (any(top > set1(old + kSlack))) move_reference(m, reduce_max(top));
    // If nothing was seen yet, subtracting 0 keeps exp(-inf) = 0, and a NaN score stays NaN.
    const float maximum = scratch_.maximum[m];
    const float reference = maximum == kNothing ? 0.0f : maximum;
    if (now) {
      Vec total = load(scratch_.sum[m]);
      BATON_UNROLL
      for (int i = 0; i < num_vecs; ++i) {
        const Vec probability = exp(s[i] - set1(reference));
        total = total + probability;
        put(m, i, probability);
      }
      store(scratch_.sum[m], total);
      return;
    }
    factor_[m] = plain ? p_.scale : 1.0f;
    reference_[m] = reference;
    if (plain) return;
    for (int i = 0; i < num_vecs; ++i) store(scores + i * kLanes, s[i]);
  }

  // Stores what values are multiplied by: probabilities, times the scales of eight-bit values.
  BATON_INLINE void put(int m, int i, Vec probability) {
    if (has_scales_) probability = weight(views_[m], i, probability);
    Products::put_probabilities(scratch_.scores[m], i, probability);
  }

  // Masked again, because the scale of a hidden value may be NaN.
  Vec weight(const View& view, int i, Vec probability) const {
    const int32_t from = in_block(view.range.begin), to = in_block(view.range.end);
    IntVec key;
    for (int lane = 0; lane < kLanes; ++lane) key[lane] = i * kLanes + lane;
    const Vec weights = probability * load(scratch_.value_scales + i * kLanes);
    return (key >= from) & (key < to) ? weights : zero();
  }

  // A key's index relative to the block, so that 32 bits are enough.
  int32_t in_block(int64_t key) const {
    key -= first_key_;
    return key <= 0 ? 0 : static_cast<int32_t>(key < kBlockKeys ? key : kBlockKeys);
  }

  BATON_INLINE void move_reference(int m, float now) {
    const float old = scratch_.maximum[m];
    scratch_.maximum[m] = now;
    if (old == kNothing) return;
    const Vec correction = exp(set1(old - now));
    store(scratch_.sum[m], load(scratch_.sum[m]) * correction);
    for (int64_t d = 0; d < attention_sums(p_.sizes.head_dim); d += kLanes) {
      store(&scratch_.out[m][d], load(&scratch_.out[m][d]) * correction);
    }
  }

  // Applies scale, softcap, ALiBi and mask to one query vector's scores; true if only p_.scale
  // applied.
  BATON_INLINE bool finish_scores(const View& view, const float* scores, int64_t first_key,
                                  int num_vecs, Vec (&out)[kBlockVecs]) const {
    const Vec scale = set1(p_.scale);
    const int64_t low = view.range.begin - first_key, high = view.range.end - first_key;
    BATON_UNROLL
    for (int i = 0; i < num_vecs; ++i) out[i] = load(scores + i * kLanes) * scale;
    if (has_scales_) {
      for (int i = 0; i < num_vecs; ++i) {
        out[i] = out[i] * load(scratch_.key_scales + i * kLanes);
      }
    }
    if (low <= 0 && high >= num_vecs * kLanes && p_.softcap == 0.0f && !p_.alibi_slopes) {
      return !has_scales_;
    }
    const int32_t from = in_block(view.range.begin), to = in_block(view.range.end);
    const float distance = static_cast<float>(view.position - first_key);
    IntVec key;
    for (int i = 0; i < kLanes; ++i) key[i] = i;
    for (int i = 0; i < num_vecs; ++i) {
      Vec s = out[i];
      if (p_.softcap > 0.0f) s = set1(p_.softcap) * tanh(s / set1(p_.softcap));
      if (p_.alibi_slopes) {
        const Vec signed_distance = set1(distance) - __builtin_convertvector(key, Vec);
        s = s - set1(view.slope) * as_float(as_bits(signed_distance) & 0x7fffffffu);
      }
      out[i] = (key >= from) & (key < to) ? s : set1(kNothing);
      key += kLanes;
    }
    return false;
  }

  const RaggedAttentionParams& p_;
  const View* const views_;
  const int count_;
  const int64_t first_key_;
  const bool has_scales_;
  AttentionScratch& scratch_;
  int done_ = 0;  // vectors of keys whose probabilities are computed
  float factor_[kMaxQueries], reference_[kMaxQueries];
};

}  // namespace baton::cpu::BATON_ISA

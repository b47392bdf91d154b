// move_kv as torch calls it: checks, parameters, and the call of a device's kernel.
#pragma once

#include "bindings/checks.h"
#include "common/move_kv.h"

namespace baton::bindings {

template <typename Device>
void move_kv(const Tensor& key_cache, const Tensor& value_cache, const Tensor& source_slots,
             const Tensor& source_starts, const Tensor& target_slots, const Tensor& target_starts,
             const Tensor& lengths) {
  const Checker check("move_kv", Device::kType, key_cache);
  MoveKvParams p{};
  p.sizes = check.caches(key_cache, value_cache, true, true);
  p.dtype = check.floating("key_cache", key_cache);
  p.source_slots = check.index("source_slots", source_slots, -1);
  p.num_moves = source_slots.numel();
  p.source_starts = check.index("source_starts", source_starts, p.num_moves);
  p.target_slots = check.index("target_slots", target_slots, p.num_moves);
  p.target_starts = check.index("target_starts", target_starts, p.num_moves);
  p.lengths = check.index("lengths", lengths, p.num_moves);
  Device::check_values(check, p);

  const Device device(check, key_cache);
  p.key_cache = key_cache.mutable_data_ptr();
  p.value_cache = value_cache.mutable_data_ptr();
  p.key_cache_strides = cache_strides(key_cache);
  p.value_cache_strides = cache_strides(value_cache);
  device.run(p, key_cache);
}

}  // namespace baton::bindings

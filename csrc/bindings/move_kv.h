// move_kv as torch calls it: checks, parameters, and the call of a device's kernel.
#pragma once

#include "bindings/index_arguments.h"
#include "common/move_kv.h"

namespace baton::bindings {

// The scales are those of an eight-bit cache, else null.
template <typename Device>
void run_move_kv(const Tensor& key_cache, const Tensor& value_cache, const Tensor* key_scale,
                 const Tensor* value_scale, const std::optional<Tensor>& source_slots,
                 const std::optional<Tensor>& source_starts,
                 const std::optional<Tensor>& target_slots,
                 const std::optional<Tensor>& target_starts, const Tensor& lengths) {
  const Checker check("move_kv", Device::kType, key_cache);
  MoveKvParams p{};
  p.sizes = check.caches(key_cache, value_cache, true, true, key_scale != nullptr);
  p.dtype = check.cache_dtype(key_cache);
  if (key_scale) p.scales = check.scales(*key_scale, *value_scale, key_cache, value_cache, true);
  p.num_moves =
      count_rows({&source_slots, &source_starts, &target_slots, &target_starts}, lengths.numel());
  IndexArguments<Device> indices(check, key_cache, p.num_moves);
  p.source_slots = indices.slots("source_slots", source_slots);
  p.source_starts = indices.starts("source_starts", source_starts);
  p.target_slots = indices.slots("target_slots", target_slots);
  p.target_starts = indices.starts("target_starts", target_starts);
  p.lengths = check.index("lengths", lengths, p.num_moves);
  check.written_apart({{"key_cache", extent_of(key_cache)},
                       {"value_cache", extent_of(value_cache)},
                       {"key_scale", extent_if(key_scale)},
                       {"value_scale", extent_if(value_scale)}},
                      {{"source_slots", if_given(source_slots)},
                       {"source_starts", if_given(source_starts)},
                       {"target_slots", if_given(target_slots)},
                       {"target_starts", if_given(target_starts)},
                       {"lengths", &lengths}});
  Device::check_values(check, p);
  if (key_cache.numel() == 0) return;

  const Device device(check, key_cache);
  p.key_cache = key_cache.mutable_data_ptr();
  p.value_cache = value_cache.mutable_data_ptr();
  p.key_cache_strides = cache_strides(key_cache);
  p.value_cache_strides = cache_strides(value_cache);
  device.run(p, key_cache);
}

template <typename Device>
void move_kv(const Tensor& key_cache, const Tensor& value_cache,
             const std::optional<Tensor>& source_slots, const std::optional<Tensor>& source_starts,
             const std::optional<Tensor>& target_slots, const std::optional<Tensor>& target_starts,
             const Tensor& lengths) {
  run_move_kv<Device>(key_cache, value_cache, nullptr, nullptr, source_slots, source_starts,
                      target_slots, target_starts, lengths);
}

template <typename Device>
void move_kv_scaled(const Tensor& key_cache, const Tensor& value_cache,
                    const std::optional<Tensor>& source_slots,
                    const std::optional<Tensor>& source_starts,
                    const std::optional<Tensor>& target_slots,
                    const std::optional<Tensor>& target_starts, const Tensor& lengths,
                    const Tensor& key_scale, const Tensor& value_scale) {
  run_move_kv<Device>(key_cache, value_cache, &key_scale, &value_scale, source_slots, source_starts,
                      target_slots, target_starts, lengths);
}

}  // namespace baton::bindings

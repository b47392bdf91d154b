"""The state machine of cache_machine.py for every kind of cache; `scripts/soak.py operations` runs
those of MACHINES."""

import torch
from cache_machine import KVCacheMachine
from numbered_tokens import quantized

from baton_kernels.reference._eight_bit import as_they_are


class AlignedMachine(KVCacheMachine):
    aligned = True


class EightBitMachine(KVCacheMachine):
    """Elements of eight bits, whose scales go wherever they go. Tokens come as floats, or parked
    ones as they are."""

    stored = torch.int8

    def new_cache(self, dtype):
        return super().new_cache(self.stored)

    def held(self, tokens):
        return [as_they_are(*pair) for pair in quantized(tokens, self.stored)]

    def alone(self, tokens):
        named = {}
        for name, (elements, scale) in zip(
            ("key", "value"), quantized(tokens, self.stored), strict=True
        ):
            named[f"{name}_cache"] = elements[-1].transpose(0, 1)[None].contiguous()
            named[f"{name}_scale"] = scale[-1].transpose(0, 1)[None].contiguous()
        return named

    def tensors(self, cache):
        return [cache.keys, cache.values, cache.key_scales, cache.value_scales]

    def poison(self, cache, padding):
        keys, values, *scales = self.tensors(cache)
        worst = -128 if self.stored == torch.int8 else 0x7F
        for elements in (keys, values):
            elements.view(torch.int8).masked_fill_(padding[:, None, :, None], worst)
        for tensor in scales:
            tensor.masked_fill_(padding[:, None, :], float("nan"))


class AlignedFloat8Machine(EightBitMachine):
    aligned = True
    stored = torch.float8_e4m3fn


class HalfAlignedMachine(AlignedMachine):
    dtype = torch.bfloat16


MACHINES = {
    "cache, ragged": KVCacheMachine,
    "cache, aligned": AlignedMachine,
    "cache, aligned, bfloat16": HalfAlignedMachine,
    "cache, int8": EightBitMachine,
    "cache, aligned, float8": AlignedFloat8Machine,
}

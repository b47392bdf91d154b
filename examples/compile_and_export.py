"""A decode step under torch.compile without a graph break, and as a file made by torch.export.

The ops are ordinary torch ops with schemas that say what they write, so nothing has to be declared
here. One compiled step serves every shape of the batch: slots, starts and lengths are tensors.
"""

import tempfile
from pathlib import Path

import torch

from baton_kernels import append_kv, ragged_attention

HEADS, KV_HEADS, HEAD_DIM, ROWS = 4, 2, 64, 3


class DecodeStep(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.nn.Linear(256, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)

    def forward(self, x, key_cache, value_cache, slots, lengths):
        """x: `[rows, 256]`; each row's token goes to column lengths[i] of its slot."""
        heads = self.projection(x).unflatten(1, (-1, HEAD_DIM))
        query, key, value = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        append_kv(key, value, key_cache, value_cache, slots, lengths)
        cu_seqlens_q = torch.arange(x.shape[0] + 1, dtype=torch.int32)
        starts = torch.zeros_like(lengths)
        return ragged_attention(
            query, key_cache, value_cache, cu_seqlens_q, slots, starts, lengths + 1
        )


def arguments(lengths: list[int]) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    key_cache, value_cache = torch.randn(2, 4, KV_HEADS, 128, HEAD_DIM)
    slots = torch.tensor([3, 0, 2], dtype=torch.int32)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    return torch.randn(ROWS, 256), key_cache, value_cache, slots, lengths


step = DecodeStep().eval()
with torch.inference_mode():
    expected = [step(*arguments(lengths)) for lengths in ([10, 20, 30], [1, 127, 64])]

    compiled = torch.compile(step, fullgraph=True)
    for lengths, out in zip(([10, 20, 30], [1, 127, 64]), expected, strict=True):
        torch.testing.assert_close(compiled(*arguments(lengths)), out)
    print("compiled: the results of the eager step, for both shapes of the batch")

with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "decode_step.pt2"
    torch.export.save(torch.export.export(step, arguments([10, 20, 30])), file)
    # A program that loads it needs `import baton_kernels` and none of the classes above.
    loaded = torch.export.load(file).module()
    x, key_cache, value_cache, slots, lengths = arguments([1, 127, 64])
    before = key_cache.clone()
    torch.testing.assert_close(loaded(x, key_cache, value_cache, slots, lengths), expected[1])
    written = (key_cache != before).any(dim=(1, 3)).nonzero().tolist()
    print(f"exported and loaded: the same results; it wrote (slot, column) {written}")
    assert written == [[0, 127], [2, 64], [3, 1]]

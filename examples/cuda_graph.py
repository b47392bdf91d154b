"""A decode step captured once in a CUDA graph and replayed while rows grow. Needs an NVIDIA GPU.

The host gives the bounds max_query_length and max_length, which decide the grids; slots, starts and
lengths are read on the device at every replay. Rows of a smaller batch are marked idle by slot -1.
"""

import torch

from baton_kernels import append_kv, ragged_attention

ROWS, HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 4, 32, 8, 128, 4096

if not torch.cuda.is_available():
    raise SystemExit("cuda_graph.py: needs an NVIDIA GPU, and torch finds none")

device = torch.device("cuda")
torch.manual_seed(0)
caches = torch.zeros(2, ROWS, KV_HEADS, CAPACITY, HEAD_DIM, dtype=torch.bfloat16, device=device)
query = torch.zeros(ROWS, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
key, value = torch.zeros(2, ROWS, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
cu_seqlens_q = torch.arange(ROWS + 1, dtype=torch.int32, device=device)
slots = torch.arange(ROWS, dtype=torch.int32, device=device)
starts = torch.zeros(ROWS, dtype=torch.int32, device=device)
lengths = torch.zeros(ROWS, dtype=torch.int32, device=device)  # without the step's own token


def decode_step() -> torch.Tensor:
    append_kv(key, value, *caches, slots, starts + lengths)
    out = ragged_attention(
        query, *caches, cu_seqlens_q, slots, starts, lengths + 1,
        max_query_length=1, max_length=CAPACITY,
    )  # fmt: skip
    lengths.add_(1)
    return out


with torch.inference_mode():
    side = torch.cuda.Stream()  # torch requires a first call outside of the capture
    with torch.cuda.stream(side):
        decode_step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_step()

    lengths.zero_()
    slots[3] = -1  # three of the four rows are in use
    keys, values = [], []
    for step in range(8):
        for tensor in (query, key, value):
            tensor.normal_()
        keys.append(key[:3].clone())
        values.append(value[:3].clone())
        graph.replay()
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[:3, :, None], torch.stack(keys, dim=2), torch.stack(values, dim=2),
            enable_gqa=True,
        )[:, :, 0]  # fmt: skip
        torch.testing.assert_close(out[:3], expected, atol=2e-2, rtol=2e-2)
        print(f"replay {step}: {step + 1} tokens per row, as torch's own attention")

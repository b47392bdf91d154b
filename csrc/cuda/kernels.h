// The CUDA kernels: raw device pointers in, the launch's error out. Asynchronous on the stream;
// nothing is allocated and the host waits for nothing, so every call may be captured in a CUDA
// graph. The grid comes from sizes that the host knows; slots, starts, lengths and cu_seqlens are
// read on the device, and a replayed graph may find other values there. Values out of range are
// skipped.
#pragma once

#include <driver_types.h>

#include "common/append_kv.h"
#include "common/extract_kv.h"
#include "common/indices.h"
#include "common/insert_kv.h"
#include "common/merge_attention.h"
#include "common/move_kv.h"
#include "common/ragged_attention.h"

namespace baton::cuda {

cudaError_t insert_kv(const InsertKvParams& p, cudaStream_t stream);
cudaError_t append_kv(const AppendKvParams& p, cudaStream_t stream);
cudaError_t move_kv(const MoveKvParams& p, cudaStream_t stream);
cudaError_t extract_kv(const ExtractKvParams& p, cudaStream_t stream);
cudaError_t merge_attention(const MergeAttentionParams& p, cudaStream_t stream);
cudaError_t ragged_attention(const RaggedAttentionParams& p, cudaStream_t stream);

// Before another op whose call leaves index arguments out.
cudaError_t fill_indices(const IndicesParams& p, cudaStream_t stream);

// Floats of `workspace` that ragged_attention writes and reads again: partial results of split
// rows. Depends on sizes and bounds only.
int64_t ragged_attention_workspace(const RaggedAttentionParams& p);

}  // namespace baton::cuda

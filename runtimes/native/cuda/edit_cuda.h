// The edit on an NVIDIA GPU.
#pragma once

#include "reft/edit.h"

namespace reft {

// Device memory that an edit of so many tokens and this rank may use beside its tensors: bytes, 0 where it needs none.
int64_t workspace_bytes(int64_t tokens, int64_t rank);
// The most of any edit of up to so many tokens and this rank.
int64_t most_workspace_bytes(int64_t tokens, int64_t rank);

// Queues the edit on stream (a cudaStream_t) and returns at once: null, or the name and text of the launch's error. All pointers are the
// device's. Reads no slot on the host and allocates nothing, so that it can be captured in a CUDA graph. workspace: as many bytes as
// workspace_bytes says, which no other stream uses meanwhile, or null: then one block takes a token whatever its rank.
const char* launch_edit(const Edit& edit, void* stream, void* workspace = nullptr);
const char* launch_edit(const RedEdit& edit, void* stream);

}  // namespace reft

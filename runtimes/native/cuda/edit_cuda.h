// The edit on an NVIDIA GPU.
#pragma once

#include "reft/edit.h"

namespace reft {

// Queues the edit on stream (a cudaStream_t) and returns at once: null, or the name and text of the launch's error. All pointers are the
// device's. Reads no slot on the host and allocates nothing, so that it can be captured in a CUDA graph.
const char* launch_edit(const Edit& edit, void* stream);
const char* launch_edit(const RedEdit& edit, void* stream);

}  // namespace reft

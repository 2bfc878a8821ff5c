// The op library's CUDA branch where no GPU is: onnxruntime's C API is a table of functions of this file, as far as the ops call them, the
// launcher's place is taken by the CPU kernels, and device memory is malloc's. Prints a line and ends with 1 at the first thing that is wrong.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/edit_cpu.h"
#include "cuda/edit_cuda.h"
#include "ort/op.h"
#include "ort/statistics.h"

namespace reft {
Statistics statistics;
}

namespace {

using namespace reft;
using namespace reft::ort;

#define EXPECT(condition)                                                       \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::printf("line %d: not so: %s\n", __LINE__, #condition);               \
      std::exit(1);                                                             \
    }                                                                           \
  } while (false)

// What the double was asked for, and how it answers.
struct Observed {
  void* stream = nullptr;
  bool scratch_refused = false, launch_refused = false;
  int allocators = 0, scratches = 0, launches = 0;
  size_t bytes = 0;            // of the last scratch
  void* scratch = nullptr;     // that is not yet freed
  void* workspace = nullptr;   // of the last launch
};
Observed seen;

struct Message {
  std::string text;
};
Status status_of(const char* text) { return reinterpret_cast<Status>(new Message{text}); }
std::string text_of(Status status) {
  auto* message = reinterpret_cast<Message*>(status);
  std::string text = message == nullptr ? "" : message->text;
  delete message;
  return text;
}

struct Held {
  int element;
  std::vector<int64_t> dims;
  void* data;
};

// The inputs of a node, then its output.
struct Node {
  std::vector<Held> tensors;
};

const char kWhere = 0;
const MemoryInfo* const kDevice = reinterpret_cast<const MemoryInfo*>(&kWhere);

Allocator allocator{18, nullptr,
                    [](Allocator*, void* memory) {
                      EXPECT(memory == seen.scratch && memory != nullptr);
                      std::free(memory);
                      seen.scratch = nullptr;
                    },
                    [](const Allocator*) { return kDevice; }};

const Held& held(const Value* value) { return *reinterpret_cast<const Held*>(value); }

// The functions by their places in OrtApi.
struct Table {
  const void* at[415] = {};
  template <int kPosition, class Signature, class Function>
  void set(ApiFunction<kPosition, Signature>, Function function) {
    at[kPosition] = reinterpret_cast<const void*>(static_cast<Signature*>(function));
  }
  Table() {
    set(CreateStatus{}, [](int, const char* text) { return status_of(text); });
    set(GetErrorMessage{}, [](Status status) { return reinterpret_cast<Message*>(status)->text.c_str(); });
    set(ReleaseStatus{}, [](Status status) { text_of(status); });
    set(GetAttributeString{}, [](const KernelInfo*, const char*, char*, size_t*) { return status_of("No attribute with this name"); });
    set(GetInput{}, [](const Context* context, size_t index, const Value** value) -> Status {
      *value = reinterpret_cast<const Value*>(&reinterpret_cast<const Node*>(context)->tensors[index]);
      return nullptr;
    });
    set(GetOutput{}, [](Context* context, size_t, const int64_t*, size_t, Value** value) -> Status {
      *value = reinterpret_cast<Value*>(&reinterpret_cast<Node*>(context)->tensors.back());
      return nullptr;
    });
    set(GetTensorMutableData{}, [](Value* value, void** data) -> Status {
      *data = held(value).data;
      return nullptr;
    });
    set(GetTypeAndShapeReference{}, [](const Value* value, int* element, const int64_t** dims, size_t* rank) -> Status {
      *element = held(value).element;
      *dims = held(value).dims.data();
      *rank = held(value).dims.size();
      return nullptr;
    });
    set(GetComputeStream{}, [](const Context*, void** stream) -> Status {
      *stream = seen.stream;
      return nullptr;
    });
    set(KernelInfoGetAllocator{}, [](const KernelInfo*, int type, Allocator** out) -> Status {
      EXPECT(type == kMemoryDefault);
      ++seen.allocators;
      *out = &allocator;
      return nullptr;
    });
    set(ReleaseAllocator{}, [](Allocator* given) {
      EXPECT(given == &allocator);
      --seen.allocators;
    });
    set(GetScratchBuffer{}, [](const Context*, const MemoryInfo* where, size_t bytes, void** out) -> Status {
      EXPECT(where == kDevice && seen.scratch == nullptr && seen.stream != nullptr);
      ++seen.scratches;
      seen.bytes = bytes;
      if (seen.scratch_refused) return status_of("no memory on the device");
      *out = seen.scratch = std::malloc(bytes);
      return nullptr;
    });
  }
};

const Table table;
const Api* api() { return reinterpret_cast<const Api*>(&table); }

// A node of float32 with one slot, tokens alternately edited; y is the CPU kernels' answer where all is well.
struct Run {
  int64_t tokens, width = 24, rank;
  std::vector<float> h, y, first, second, b;
  std::vector<int32_t> slot;

  Run(int64_t tokens, int64_t rank) : tokens(tokens), rank(rank), y(tokens * width, -1.0f), slot(tokens) {
    const auto values = [](int64_t count, int step) {
      std::vector<float> made(count);
      for (int64_t i = 0; i < count; ++i) made[i] = static_cast<float>(i * step % 17 - 8) / 64;
      return made;
    };
    h = values(tokens * width, 5);
    first = values(rank * width, 3);
    second = values(rank * width, 7);
    b = values(rank, 11);
    for (int64_t t = 0; t < tokens; ++t) slot[t] = t % 2 == 0 ? 0 : -1;
  }

  // What the op says of itself; "" where it succeeds.
  std::string operator()(const Definition& definition) {
    const Op op = make_op(definition, DType::kFloat32, "CUDAExecutionProvider");
    void* kernel = nullptr;
    if (Status status = op.CreateKernelV2(&op, api(), nullptr, &kernel)) return text_of(status);
    const bool lo_reft = definition.inputs == 5;
    EXPECT(seen.allocators == (lo_reft ? 1 : 0));
    const std::vector<int64_t> rows{tokens, width}, bank = lo_reft ? std::vector<int64_t>{1, rank, width} : std::vector<int64_t>{1, width};
    Node node{{{1, rows, h.data()}, {kElementInt32, {tokens}, slot.data()}, {1, bank, first.data()}, {1, bank, second.data()}}};
    if (lo_reft) node.tensors.push_back({1, {1, rank}, b.data()});
    node.tensors.push_back({1, rows, y.data()});
    const std::string said = text_of(op.KernelComputeV2(kernel, reinterpret_cast<Context*>(&node)));
    op.KernelDestroy(kernel);
    EXPECT(seen.allocators == 0 && seen.scratch == nullptr);
    return said;
  }

  bool right() const {
    std::vector<float> expected(y.size());
    edit_tokens(Edit{DType::kFloat32, Activation::kNone, false, h.data(), expected.data(), slot.data(), first.data(), second.data(), b.data(),
                     tokens, 1, rank, width},
                0, tokens, **usable_row_kernels());
    return expected == y;
  }
};

void anew(uintptr_t stream) {
  seen = Observed{};
  seen.stream = reinterpret_cast<void*>(stream);
}

const char* launched(void* stream) {
  EXPECT(stream == seen.stream);
  ++seen.launches;
  return seen.launch_refused ? "cudaErrorOnPurpose" : nullptr;
}

}  // namespace

int64_t reft::workspace_bytes(int64_t tokens, int64_t rank) { return tokens < 9 ? tokens * rank * 4 : 0; }

const char* reft::launch_edit(const Edit& edit, void* stream, void* workspace) {
  EXPECT(workspace == seen.scratch);
  seen.workspace = workspace;
  if (workspace != nullptr) std::memset(workspace, 0xff, static_cast<size_t>(workspace_bytes(edit.tokens, edit.rank)));
  edit_tokens(edit, 0, edit.tokens, **usable_row_kernels());
  return launched(stream);
}

const char* reft::launch_edit(const RedEdit& edit, void* stream) {
  edit_tokens(edit, 0, edit.tokens, **usable_row_kernels());
  return launched(stream);
}

int main() {
  library = {api(), 31};

  anew(5);
  Run few(3, 40);
  EXPECT(few(kLoReft) == "" && few.right());
  EXPECT(seen.scratches == 1 && seen.bytes == 3 * 40 * 4 && seen.workspace != nullptr && seen.launches == 1);

  // A workspace that the edit does not need is not asked for, nor one that belongs to no stream.
  anew(5);
  Run many(12, 40);
  EXPECT(many(kLoReft) == "" && many.right() && seen.scratches == 0 && seen.launches == 1);
  anew(0);
  EXPECT(few(kLoReft) == "" && seen.scratches == 0 && seen.workspace == nullptr && seen.launches == 1);

  anew(5);
  seen.scratch_refused = true;
  EXPECT(few(kLoReft) == "no memory on the device" && seen.launches == 0);
  anew(5);
  seen.launch_refused = true;
  EXPECT(few(kLoReft) == "LoReFT: CUDA launch failed: cudaErrorOnPurpose" && seen.scratches == 1);

  anew(5);
  EXPECT(few(kRed) == "" && seen.scratches == 0 && seen.launches == 1);
  std::puts("the ops queue their edits, and give their scratch back");
  return 0;
}

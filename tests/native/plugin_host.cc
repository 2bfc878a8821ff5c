// A stand-in for TensorRT's side of a plugin, driven through ctypes: it opens the library, creates plugins, and calls them as a builder and
// an execution context do. Compiled against the same headers as the plugin.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstring>
#include <string>

using namespace nvinfer1;

#define HOST extern "C" __attribute__((visibility("default")))

namespace {

std::string logged;
std::string shown;

struct Logger final : ILogger {
  void log(Severity, const AsciiChar* text) noexcept override { logged = text; }
};
Logger logger;

struct Finder final : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
};
Finder finder;

IPluginCreatorV3One* creator = nullptr;

struct Known final : apiv::VDimensionExpr {
  int64_t value = -1;
  bool isConstant() const override { return value >= 0; }
  int64_t getConstantValue() const override { return value; }
  bool isSizeTensor() const override { return false; }
};

struct Expression final : IDimensionExpr {
  Known known;
  Expression() { mImpl = &known; }
};

Dims dims_of(int rank, const int64_t* extents) {
  Dims dims{};
  dims.nbDims = rank;
  for (int i = 0; i < rank; ++i) dims.d[i] = extents[i];
  return dims;
}

IPluginV3OneBuild* build_of(void* plugin) {
  return static_cast<IPluginV3OneBuild*>(static_cast<IPluginV3*>(plugin)->getCapabilityInterface(PluginCapabilityType::kBUILD));
}

IPluginV3OneRuntime* runtime_of(void* plugin) {
  return static_cast<IPluginV3OneRuntime*>(static_cast<IPluginV3*>(plugin)->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

constexpr int kMaxTensors = 8;

// ranks [count], extents [count][8]
void describe(int count, const int* types, const int* ranks, const int64_t* extents, PluginTensorDesc* tensors) {
  for (int i = 0; i < count; ++i) {
    tensors[i] = {dims_of(ranks[i], extents + 8 * i), static_cast<DataType>(types[i]), TensorFormat::kLINEAR, 1.0f};
  }
}

}  // namespace

// What this host offers to getInferLibVersion and getLogger, which the plugin looks up where the finder came from.
HOST int32_t getInferLibVersion() noexcept { return NV_TENSORRT_VERSION; }
HOST ILogger* getLogger() noexcept { return &logger; }

// Null, or the error. op: the plugin that everything after is asked of. with_finder: call setLoggerFinder, as TensorRT does.
HOST const char* host_open(const char* path, const char* op, int with_finder) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return dlerror();
  const auto set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  const auto creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  if (set_finder == nullptr || creators == nullptr) return "getCreators or setLoggerFinder is missing";
  set_finder(with_finder ? &finder : nullptr);
  int32_t count = 0;
  IPluginCreatorInterface* const* list = creators(count);
  if (count != 2) return "expected two creators";
  for (int32_t i = 0; i < count; ++i) {
    if (std::strcmp(list[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) return "not a creator of V3 plugins";
    creator = static_cast<IPluginCreatorV3One*>(list[i]);
    if (std::strcmp(creator->getPluginName(), op) == 0) return nullptr;
  }
  return "no creator of that name";
}

// The last message; reading it forgets it.
HOST const char* host_logged() {
  shown.swap(logged);
  logged.clear();
  return shown.c_str();
}

// "LoReFT|1|ai.reft|activation,activated"
HOST const char* host_identity() {
  shown = std::string(creator->getPluginName()) + "|" + creator->getPluginVersion() + "|" + creator->getPluginNamespace() + "|";
  const PluginFieldCollection* fields = creator->getFieldNames();
  for (int32_t i = 0; i < fields->nbFields; ++i) shown += std::string(i > 0 ? "," : "") + fields->fields[i].name;
  return shown.c_str();
}

HOST void* host_create(int count, const char* const* names, const void* const* data, const int* types, const int* lengths, int phase) {
  PluginField fields[kMaxTensors];
  for (int i = 0; i < count; ++i) fields[i] = {names[i], data[i], static_cast<PluginFieldType>(types[i]), lengths[i]};
  const PluginFieldCollection collection{count, fields};
  return creator->createPlugin("edit", &collection, static_cast<TensorRTPhase>(phase));
}

// What an engine stores of one plugin, given to the creator as an engine does when it is read back.
HOST void* host_read_back(void* plugin) {
  return creator->createPlugin("edit", runtime_of(plugin)->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
}

HOST void* host_clone(void* plugin) { return static_cast<IPluginV3*>(plugin)->clone(); }

HOST void* host_attach(void* plugin) { return runtime_of(plugin)->attachToContext(nullptr); }

HOST void host_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

// "activation=gelu activated=all"; each value of a string field, its last NUL excluded
HOST const char* host_fields(void* plugin) {
  const PluginFieldCollection* fields = runtime_of(plugin)->getFieldsToSerialize();
  shown.clear();
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    if (field.type != PluginFieldType::kCHAR || field.length < 1) return "a field is not a string";
    shown += std::string(i > 0 ? " " : "") + field.name + "=" +
             std::string(static_cast<const char*>(field.data), static_cast<size_t>(field.length) - 1);
  }
  return shown.c_str();
}

HOST int host_output_type(void* plugin, int count, const int* types) {
  DataType inputs[kMaxTensors], output = DataType::kINT8;
  for (int i = 0; i < count; ++i) inputs[i] = static_cast<DataType>(types[i]);
  return build_of(plugin)->getOutputDataTypes(&output, 1, inputs, count) == 0 ? static_cast<int>(output) : -1;
}

// A negative extent is not known yet. The rank of the output, or -1.
HOST int host_output_rank(void* plugin, int count, const int* ranks, const int64_t* extents) {
  Expression expressions[kMaxTensors][8];
  DimsExprs inputs[kMaxTensors], output{};
  for (int i = 0; i < count; ++i) {
    inputs[i].nbDims = ranks[i];
    for (int d = 0; d < ranks[i]; ++d) {
      expressions[i][d].known.value = extents[8 * i + d];
      inputs[i].d[d] = &expressions[i][d];
    }
  }
  // The plugin builds no expressions, so that there is nothing behind this reference.
  alignas(8) static char no_builder[64];
  const int failed = build_of(plugin)->getOutputShapes(inputs, count, nullptr, 0, &output, 1, *reinterpret_cast<IExprBuilder*>(no_builder));
  return failed ? -1 : output.nbDims;
}

namespace {

// Inputs within a profile; an extent whose bounds differ is not known yet.
struct Profile {
  DynamicPluginTensorDesc inputs[kMaxTensors];
  Profile(int count, const int* types, const int* ranks, const int64_t* lowest, const int64_t* highest) {
    PluginTensorDesc low[kMaxTensors], high[kMaxTensors];
    describe(count, types, ranks, lowest, low);
    describe(count, types, ranks, highest, high);
    for (int i = 0; i < count; ++i) {
      inputs[i] = {low[i], low[i].dims, high[i].dims, high[i].dims};
      for (int d = 0; d < ranks[i]; ++d) {
        if (low[i].dims.d[d] != high[i].dims.d[d]) inputs[i].desc.dims.d[d] = -1;
      }
    }
  }
};

}  // namespace

HOST int host_configure(void* plugin, int count, const int* types, const int* ranks, const int64_t* lowest, const int64_t* highest) {
  const Profile profile(count, types, ranks, lowest, highest);
  const DynamicPluginTensorDesc output{};
  return build_of(plugin)->configurePlugin(profile.inputs, count, &output, 1);
}

HOST int64_t host_workspace(void* plugin, int count, const int* types, const int* ranks, const int64_t* lowest, const int64_t* highest) {
  const Profile profile(count, types, ranks, lowest, highest);
  const DynamicPluginTensorDesc output{};
  return static_cast<int64_t>(build_of(plugin)->getWorkspaceSize(profile.inputs, count, &output, 1));
}

// types [count], the output's the last
HOST int host_supports(void* plugin, int position, int count, const int* types, int format) {
  DynamicPluginTensorDesc tensors[kMaxTensors]{};
  for (int i = 0; i < count; ++i) {
    tensors[i].desc.type = static_cast<DataType>(types[i]);
    tensors[i].desc.format = i == position ? static_cast<TensorFormat>(format) : TensorFormat::kLINEAR;
  }
  return build_of(plugin)->supportsFormatCombination(position, tensors, count - 1, 1);
}

HOST int host_shapes(void* plugin, int count, const int* types, const int* ranks, const int64_t* extents) {
  PluginTensorDesc inputs[kMaxTensors];
  describe(count, types, ranks, extents, inputs);
  return runtime_of(plugin)->onShapeChange(inputs, count, inputs, 1);
}

HOST int host_enqueue(void* plugin, int count, const int* types, const int* ranks, const int64_t* extents, const void* const* data,
                      void* output, void* stream) {
  PluginTensorDesc inputs[kMaxTensors];
  describe(count, types, ranks, extents, inputs);
  static char workspace;
  return runtime_of(plugin)->enqueue(inputs, inputs, data, &output, &workspace, static_cast<cudaStream_t>(stream));
}

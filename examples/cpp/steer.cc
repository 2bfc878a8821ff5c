// Greedy answers of a steered bundle over onnxruntime's C++ API; adapters swap between them. Nothing of this project is included.
//
//     steer BUNDLE LIBRARY ADAPTERS COUNT ID...
//
//     LIBRARY     the op library, libreft_ort.so; "-" leaves the edits to the ONNX function in the graph
//     ADAPTERS    names of the bundle's adapters, between commas, in the order of the answers; "-" is the base
//     COUNT       the most new tokens of an answer
//     ID...       the prompt's token ids; what makes them out of text is the bundle's tokenizer.json
//
// Prints the name of each adapter and below it the answer's token ids, one a line, as they come.
//
// What the graph takes, of one row that has T tokens, S of which are new:
//
//     input_ids, position_ids [1, S]     int64; a graph without position_ids counts the mask
//     attention_mask [1, T]              int64 ones
//     past_key_values.<i>.key|value      [1, heads, capacity, dim]; where the manifest says "in-place" the same memory is given as the
//                                        output present.<i>.key|value, and a call writes its S columns behind those of the calls before
//     reft.prompt_length [1]             int64, has a default: by it the edits find their tokens though the prompt comes in several calls
//     reft.first_logit [1]               int64, has a default: tokens before it get no logits
//     reft.* banks and position rules    have defaults, which edit nothing; an active adapter brings all of them
//
// The cache is given to Run as its outputs: with an Ort::IoBinding onnxruntime ignores active adapters without a word.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Ids = std::vector<int64_t>;

constexpr size_t kPrefillChunk = 512;  // tokens of a call: the attention of a whole prompt takes memory by its square
constexpr const char* kOnlyFloat = "the cache or the logits are not float32 (a cache may be int8); export with -p fp32, int8 or int4";

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

// What follows a key in manifest.json, which is canonical JSON: one space behind a colon, and no bare quotation mark inside a text.
std::string value_of(const std::string& manifest, const std::string& key) {
  const std::string pattern = '"' + key + "\": ";
  const size_t at = manifest.find(pattern);
  if (at == std::string::npos) fail("manifest.json has no " + key + "; expected a bundle of reft-export");
  return manifest.substr(at + pattern.size());
}

Ids integers(std::string list) {  // "[1, 2], ...": up to the bracket
  list = list.substr(1, list.find(']') - 1);
  std::replace(list.begin(), list.end(), ',', ' ');
  std::istringstream stream(list);
  return Ids(std::istream_iterator<int64_t>(stream), {});
}

// One row of a bundle's decoder: the session, a KV cache of `capacity` tokens, and the inputs of a call.
class Decoder {
 public:
  Decoder(const std::string& bundle, const std::string& library, int64_t capacity) {
    Ort::SessionOptions options;
    if (library != "-") options.RegisterCustomOpsLibrary(library.c_str());
    session_ = Ort::Session(env_, (bundle + "/model.onnx").c_str(), options);
    outputs_.emplace_back(nullptr);  // the logits, which onnxruntime allocates
    for (size_t i = 0; i < session_.GetInputCount(); ++i) {
      const std::string name = session_.GetInputNameAllocated(i, allocator_).get();
      const bool integers = name == "input_ids" || name == "attention_mask" || name == "position_ids", cache = name.rfind("past_", 0) == 0;
      if (!integers && !cache) fail("the graph takes " + name + ", which is unknown here; expected a decoder with attention_mask");
      if (integers) add_integers(name);
      if (cache) add_cache(name, session_.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo(), capacity);
    }
    for (size_t i = 0; i < session_.GetOverridableInitializerCount(); ++i) {
      const std::string name = session_.GetOverridableInitializerNameAllocated(i, allocator_).get();
      if (name == "reft.prompt_length" || name == "reft.first_logit") add_integers(name);
    }
  }

  // The likeliest token behind `tokens`, the first `cached` of which are in the cache and the first `prompt` of which are the prompt.
  int64_t next(const Ort::RunOptions& run, const Ids& tokens, size_t cached, size_t prompt) {
    std::vector<const char*> inputs, outputs;
    for (const std::string& name : input_names_) inputs.push_back(name.c_str());
    for (const std::string& name : output_names_) outputs.push_back(name.c_str());
    while (cached < tokens.size()) {
      const size_t stop = std::min(tokens.size(), cached + kPrefillChunk);
      Ids positions(stop - cached);
      std::iota(positions.begin(), positions.end(), cached);
      feed("input_ids", Ids(tokens.begin() + cached, tokens.begin() + stop));
      feed("position_ids", positions);
      feed("attention_mask", Ids(stop, 1));
      feed("reft.prompt_length", {static_cast<int64_t>(prompt)});
      feed("reft.first_logit", {static_cast<int64_t>(stop - cached - 1)});
      outputs_[0] = Ort::Value(nullptr);
      session_.Run(run, inputs.data(), inputs_.data(), inputs_.size(), outputs.data(), outputs_.data(), outputs_.size());
      cached = stop;
    }
    const auto type = outputs_[0].GetTensorTypeAndShapeInfo();  // [1, 1 to S, V]: the last V are the last token's
    if (type.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) fail(kOnlyFloat);
    const float* end = outputs_[0].GetTensorData<float>() + type.GetElementCount();
    const float* first = end - type.GetShape().back();
    const float* likeliest = std::max_element(first, end);
    if (!std::isfinite(*likeliest)) fail("the logits are not finite; export the bundle again");
    return likeliest - first;
  }

 private:
  void add_integers(const std::string& name) {
    input_names_.push_back(name);
    inputs_.emplace_back(nullptr);
    fed_.resize(inputs_.size());
  }

  // One tensor of the cache, and a second view of its memory as the output.
  void add_cache(const std::string& past, const Ort::ConstTensorTypeAndShapeInfo& type, int64_t capacity) {
    const ONNXTensorElementDataType element = type.GetElementType();
    const bool int8 = element == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    if (!int8 && element != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) fail(kOnlyFloat);
    const int64_t shape[] = {1, type.GetShape()[1], capacity, type.GetShape()[3]};
    Ort::Value value = Ort::Value::CreateTensor(allocator_, shape, 4, element);
    const size_t bytes = value.GetTensorTypeAndShapeInfo().GetElementCount() * (int8 ? 1 : sizeof(float));
    outputs_.push_back(Ort::Value::CreateTensor(memory_, value.GetTensorMutableRawData(), bytes, shape, 4, element));
    output_names_.push_back("present" + past.substr(past.find('.')));
    add_integers(past);
    inputs_.back() = std::move(value);
  }

  // An input of the next call, where the graph has it: [n] for the numbers of a call, [1, n] for a row's.
  void feed(const std::string& name, Ids values) {
    const size_t i = std::find(input_names_.begin(), input_names_.end(), name) - input_names_.begin();
    if (i == input_names_.size()) return;
    fed_[i] = std::move(values);
    const bool row = name.rfind("reft.", 0) != 0;
    const int64_t shape[] = {1, static_cast<int64_t>(fed_[i].size())};
    inputs_[i] = Ort::Value::CreateTensor<int64_t>(memory_, fed_[i].data(), fed_[i].size(), row ? shape : shape + 1, row ? 2 : 1);
  }

  Ort::Env env_{ORT_LOGGING_LEVEL_ERROR, "steer"};  // it warns of initializers that are inputs, too: they are, so that adapters swap
  Ort::AllocatorWithDefaultOptions allocator_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  Ort::Session session_{nullptr};
  std::vector<std::string> input_names_, output_names_{"logits"};
  std::vector<Ort::Value> inputs_, outputs_;
  std::vector<Ids> fed_;  // what the integers among the inputs are views of
};

void answer(const std::string& bundle, const std::string& library, const std::string& adapters, int64_t count, const Ids& prompt) {
  std::ifstream file(bundle + "/manifest.json");
  const std::string manifest(std::istreambuf_iterator<char>(file), {});
  const bool in_place = value_of(manifest, "kv_cache").rfind("\"in-place\"", 0) == 0;
  if (!in_place) fail("the graph of " + bundle + " copies its KV cache; export it with --target onnxruntime");
  const int64_t context = std::stoll(value_of(manifest, "context_length")), given = static_cast<int64_t>(prompt.size());
  if (count > context - given) fail("prompt and answer exceed the context of " + std::to_string(context) + " tokens; ask for fewer");
  const Ids eos = integers(value_of(manifest, "eos_token_ids"));
  Decoder decoder(bundle, library, given + count);
  std::istringstream names(adapters);
  for (std::string name; std::getline(names, name, ',');) {
    Ort::LoraAdapter adapter{nullptr};  // onnxruntime's container of tensors that override initializers; a call reads them where they are
    Ort::RunOptions run;
    if (name != "-") {
      const std::string path = bundle + "/adapters/" + name + ".onnx_adapter";
      if (!std::ifstream(path)) fail("there is no " + path + "; expected an adapter of the bundle, or - for its base");
      adapter = Ort::LoraAdapter::CreateLoraAdapter(path, nullptr);
      run.AddActiveLoraAdapter(adapter);
    }
    std::cout << name << std::endl;
    Ids tokens = prompt;  // from the cache's first column on: keys and values of one adapter are not another's
    for (size_t cached = 0; tokens.size() < prompt.size() + count; cached = tokens.size() - 1) {
      tokens.push_back(decoder.next(run, tokens, cached, prompt.size()));
      std::cout << tokens.back() << std::endl;
      if (std::find(eos.begin(), eos.end(), tokens.back()) != eos.end()) break;
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    bool usage = argc < 6;
    for (int i = 4; i < argc; ++i) {
      const std::string number = argv[i];
      usage |= number.empty() || number.size() > 18 || number.find_first_not_of("0123456789") != std::string::npos;
    }
    if (usage) fail("usage: steer BUNDLE LIBRARY ADAPTERS COUNT ID...");
    const bool recent = OrtGetApiBase()->GetApi(ORT_API_VERSION) != nullptr;
    if (!recent) fail("onnxruntime is older than the headers; expected 1." + std::to_string(ORT_API_VERSION) + " or later");
    Ids prompt;
    for (int i = 5; i < argc; ++i) prompt.push_back(std::stoll(argv[i]));
    answer(argv[1], argv[2], argv[3], std::stoll(argv[4]), prompt);
  } catch (const std::exception& error) {
    std::cerr << "steer: " << error.what() << '\n';
    return 1;
  }
}

// Greedy answers of a steered bundle over onnxruntime's C API; adapters swap between them. Nothing of this project is included.
//
//     steer BUNDLE LIBRARY ADAPTERS COUNT ID...
//
// Arguments, output and what the graph takes are those of steer.cc beside this file, which says them.

#include <math.h>
#include <onnxruntime_c_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kPrefillChunk = 512 };  // tokens of a call: the attention of a whole prompt takes memory by its square

static const OrtApi* ort;

#define fail(...) (fprintf(stderr, "steer: " __VA_ARGS__), fputc('\n', stderr), exit(1))

static void check(OrtStatus* status) {
  if (status) fail("%s", ort->GetErrorMessage(status));
}

static void* zeros(size_t count, size_t size) {  // memory for as long as the program runs
  void* memory = calloc(count, size);
  if (!memory) fail("%zu bytes of memory are not to be had; ask for fewer tokens", count * size);
  return memory;
}

static char* joined(const char* first, const char* second, const char* third) {
  char* text = zeros(strlen(first) + strlen(second) + strlen(third) + 1, 1);
  return strcat(strcat(strcpy(text, first), second), third);
}

// What follows a key in manifest.json, which is canonical JSON: one space behind a colon, and no bare quotation mark inside a text.
static const char* value_of(const char* manifest, const char* key) {
  const char* pattern = joined("\"", key, "\": ");
  const char* at = strstr(manifest, pattern);
  if (!at) fail("manifest.json has no %s; expected a bundle of reft-export", key);
  return at + strlen(pattern);
}

static int listed(int64_t token, const char* list) {  // "[1, 2], ...": up to the bracket
  for (char* at = strpbrk(list, "0123456789]"); *at != ']'; at = strpbrk(at, "0123456789]")) {
    if (strtoll(at, &at, 10) == token) return 1;
  }
  return 0;
}

// One row of a bundle's decoder: the session, and what a call takes and gives. The cache's tensors are inputs and outputs at once.
typedef struct {
  OrtSession* session;
  OrtMemoryInfo* memory;
  size_t inputs, outputs;
  const char **input_names, **output_names;
  OrtValue **taken, **given;
} Decoder;

// Binds the graph's cache input of that number, and its output, to one new tensor.
static void bind_cache(Decoder* decoder, OrtAllocator* allocator, size_t input, int64_t capacity) {
  OrtTypeInfo* type;
  const OrtTensorTypeAndShapeInfo* tensor;
  ONNXTensorElementDataType element;
  int64_t shape[4];
  check(ort->SessionGetInputTypeInfo(decoder->session, input, &type));
  check(ort->CastTypeInfoToTensorInfo(type, &tensor));
  check(ort->GetTensorElementType(tensor, &element));
  check(ort->GetDimensions(tensor, shape, 4));
  ort->ReleaseTypeInfo(type);
  check(ort->CreateTensorAsOrtValue(allocator, (int64_t[]){1, shape[1], capacity, shape[3]}, 4, element, &decoder->taken[input]));
  decoder->given[decoder->outputs] = decoder->taken[input];
  decoder->output_names[decoder->outputs++] = joined("present", strchr(decoder->input_names[input], '.'), "");
}

static Decoder open_decoder(const OrtEnv* env, const char* bundle, const char* library, int64_t capacity) {
  Decoder decoder = {0};
  OrtSessionOptions* options;
  OrtAllocator* allocator;
  size_t overridable;
  check(ort->CreateSessionOptions(&options));
  if (strcmp(library, "-")) check(ort->RegisterCustomOpsLibrary_V2(options, library));
  check(ort->CreateSession(env, joined(bundle, "/model.onnx", ""), options, &decoder.session));
  check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &decoder.memory));
  check(ort->GetAllocatorWithDefaultOptions(&allocator));
  check(ort->SessionGetInputCount(decoder.session, &decoder.inputs));
  check(ort->SessionGetOverridableInitializerCount(decoder.session, &overridable));
  const size_t inputs = decoder.inputs;
  decoder.input_names = zeros(inputs + overridable, sizeof(char*));
  decoder.output_names = zeros(inputs + 1, sizeof(char*));
  decoder.taken = zeros(inputs + overridable, sizeof(OrtValue*));
  decoder.given = zeros(inputs + 1, sizeof(OrtValue*));
  decoder.output_names[decoder.outputs++] = "logits";
  for (size_t i = 0; i < inputs; ++i) {
    check(ort->SessionGetInputName(decoder.session, i, allocator, (char**)&decoder.input_names[i]));
    const char* name = decoder.input_names[i];
    const int integers = !strcmp(name, "input_ids") || !strcmp(name, "attention_mask") || !strcmp(name, "position_ids");
    if (!strncmp(name, "past_key_values.", 16)) bind_cache(&decoder, allocator, i, capacity);
    else if (!integers) fail("the graph takes %s, which is unknown here; expected a decoder with attention_mask", name);
  }
  for (size_t i = 0; i < overridable; ++i) {
    const char** name = &decoder.input_names[decoder.inputs];
    check(ort->SessionGetOverridableInitializerName(decoder.session, i, allocator, (char**)name));
    if (!strcmp(*name, "reft.prompt_length") || !strcmp(*name, "reft.first_logit")) ++decoder.inputs;
  }
  return decoder;
}

// An input of the next call, where the graph has it: [n] for the numbers of a call, [1, n] for a row's. `values` stay where they are.
static void feed(Decoder* decoder, const char* name, int64_t* values, size_t count) {
  const int row = strncmp(name, "reft.", 5) != 0;
  const int64_t shape[] = {1, (int64_t)count};
  for (size_t i = 0; i < decoder->inputs; ++i) {
    if (strcmp(decoder->input_names[i], name)) continue;
    if (decoder->taken[i]) ort->ReleaseValue(decoder->taken[i]);
    check(ort->CreateTensorWithDataAsOrtValue(decoder->memory, values, count * sizeof *values, row ? shape : shape + 1, row ? 2 : 1,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &decoder->taken[i]));
  }
}

// The likeliest token behind `count` tokens, the first `cached` of which are in the cache and the first `prompt` of which are the prompt.
static int64_t next(Decoder* decoder, const OrtRunOptions* run, int64_t* tokens, size_t count, size_t cached, int64_t prompt, int64_t* ones,
                    int64_t* positions) {
  OrtValue** logits = &decoder->given[0];  // which onnxruntime allocates
  while (cached < count) {
    const size_t stop = count < cached + kPrefillChunk ? count : cached + kPrefillChunk;
    int64_t first_logit = (int64_t)(stop - cached - 1);
    feed(decoder, "input_ids", tokens + cached, stop - cached);
    feed(decoder, "position_ids", positions + cached, stop - cached);
    feed(decoder, "attention_mask", ones, stop);
    feed(decoder, "reft.prompt_length", &prompt, 1);
    feed(decoder, "reft.first_logit", &first_logit, 1);
    if (*logits) ort->ReleaseValue(*logits);
    *logits = NULL;
    check(ort->Run(decoder->session, run, decoder->input_names, (const OrtValue* const*)decoder->taken, decoder->inputs,
                   decoder->output_names, decoder->outputs, decoder->given));
    cached = stop;
  }
  OrtTensorTypeAndShapeInfo* type;
  ONNXTensorElementDataType element;
  int64_t shape[3], likeliest = 0;
  float* values;  // [1, 1 to S, V], of which the last V are the last token's
  check(ort->GetTensorTypeAndShape(*logits, &type));
  check(ort->GetTensorElementType(type, &element));
  check(ort->GetDimensions(type, shape, 3));
  ort->ReleaseTensorTypeAndShapeInfo(type);
  if (element != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) fail("the logits are not float32; export with -p fp32, int8 or int4");
  check(ort->GetTensorMutableData(*logits, (void**)&values));
  values += (shape[1] - 1) * shape[2];
  for (int64_t i = 1; i < shape[2]; ++i) likeliest = values[i] > values[likeliest] ? i : likeliest;
  if (!isfinite(values[likeliest])) fail("the logits are not finite; export the bundle again");
  return likeliest;
}

int main(int argc, char** argv) {
  int usage = argc < 6;
  for (int i = 4; i < argc; ++i) usage |= !argv[i][0] || strlen(argv[i]) > 18 || argv[i][strspn(argv[i], "0123456789")];
  if (usage) fail("usage: steer BUNDLE LIBRARY ADAPTERS COUNT ID...");
  ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (!ort) fail("onnxruntime is older than the headers; expected 1.%d or later", ORT_API_VERSION);
  const char* bundle = argv[1];
  static char manifest[1 << 24];
  FILE* file = fopen(joined(bundle, "/manifest.json", ""), "rb");
  if (file && fread(manifest, 1, sizeof manifest - 1, file)) fclose(file);
  const int in_place = !strncmp(value_of(manifest, "kv_cache"), "\"in-place\"", 10);
  if (!in_place) fail("the graph of %s copies its KV cache; export it with --target onnxruntime", bundle);
  const int64_t prompt = argc - 5, count = strtoll(argv[4], NULL, 10), context = strtoll(value_of(manifest, "context_length"), NULL, 10);
  if (count > context - prompt) fail("prompt and answer exceed the context of %d tokens; ask for fewer", (int)context);
  const int64_t capacity = prompt + count;
  int64_t *tokens = zeros(capacity, 8), *ones = zeros(capacity, 8), *positions = zeros(capacity, 8);
  for (int64_t i = 0; i < prompt; ++i) tokens[i] = strtoll(argv[i + 5], NULL, 10);
  for (int64_t i = 0; i < capacity; ++i) positions[i] = i;
  for (int64_t i = 0; i < capacity; ++i) ones[i] = 1;
  setvbuf(stdout, NULL, _IOLBF, 0);  // a token leaves as it comes, into a pipe too
  OrtEnv* env;  // of errors only: onnxruntime warns of initializers that are inputs, too. They are, so that adapters swap.
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "steer", &env));
  Decoder decoder = open_decoder(env, bundle, argv[2], capacity);
  for (char* name = strtok(argv[3], ","); name; name = strtok(NULL, ",")) {
    OrtRunOptions* run;
    OrtLoraAdapter* adapter = NULL;  // onnxruntime's container of tensors that override initializers; a call reads them where they are
    check(ort->CreateRunOptions(&run));
    if (strcmp(name, "-")) {
      const char* path = joined(joined(bundle, "/adapters/", name), ".onnx_adapter", "");
      if (!(file = fopen(path, "rb"))) fail("there is no %s; expected an adapter of the bundle, or - for its base", path);
      fclose(file);
      check(ort->CreateLoraAdapter(path, NULL, &adapter));
      check(ort->RunOptionsAddActiveLoraAdapter(run, adapter));
    }
    puts(name);
    // From the cache's first column on: keys and values of one adapter are not another's.
    for (int64_t seen = prompt, cached = 0; seen < capacity; cached = seen++) {
      tokens[seen] = next(&decoder, run, tokens, seen, cached, prompt, ones, positions);
      printf("%lld\n", (long long)tokens[seen]);
      if (listed(tokens[seen], value_of(manifest, "eos_token_ids"))) break;
    }
    ort->ReleaseRunOptions(run);
    if (adapter) ort->ReleaseLoraAdapter(adapter);
  }
}

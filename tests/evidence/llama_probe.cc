// What llama.cpp makes of a GGUF file: milliseconds a token as the context grows, the file quantized by its own library, log-likelihoods.
//
//   llama-probe bench FILE THREADS FLASH COLUMNS...     one line: minima of decoding at each, then the prefill's seconds up to each, peak MB
//   llama-probe quantize IN OUT FTYPE THREADS           FTYPE: LLAMA_FTYPE_MOSTLY_Q4_0 and so on, by name (Q4_0, Q4_1, Q4_K_M, Q5_K_M, Q8_0)
//   llama-probe likelihood FILE THREADS                 stdin: a line of token ids a text; stdout: a line of (tokens, negative log-likelihood)
//
// Built and run by llama_cpp.py.

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"

namespace {

[[noreturn]] void fail(const std::string &what) {
    std::fprintf(stderr, "llama-probe: %s\n", what.c_str());
    std::exit(1);
}

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Opened {
    llama_model *model;
    llama_context *context;
    int vocabulary;
};

Opened open(const char *file, int threads, bool flash, int columns) {
    llama_model *model = llama_model_load_from_file(file, llama_model_default_params());
    if (!model) fail(std::string("cannot load ") + file);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = columns;
    params.n_batch = params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = threads;
    params.flash_attn_type = flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context *context = llama_init_from_model(model, params);
    if (!context || llama_n_ctx(context) < static_cast<unsigned>(columns)) fail("the context cannot be made");
    return {model, context, llama_vocab_n_tokens(llama_model_get_vocab(model))};
}

void decode(llama_context *context, const int32_t *tokens, int count) {
    if (llama_decode(context, llama_batch_get_one(const_cast<int32_t *>(tokens), count))) fail("llama_decode failed");
    if (!llama_get_logits_ith(context, -1)) fail("no logits");
}

int bench(int argc, char **argv) {
    std::vector<int> contexts;
    for (int i = 5; i < argc; ++i) contexts.push_back(std::atoi(argv[i]));
    const Opened opened = open(argv[2], std::atoi(argv[3]), std::atoi(argv[4]) != 0, contexts.back() + 64);
    std::mt19937 random(0);
    std::vector<int32_t> tokens(contexts.back());
    for (int32_t &token : tokens) token = static_cast<int32_t>(random() % opened.vocabulary);
    std::ostringstream decoding, prefill;
    double seconds = 0;
    int fed = 0;
    for (int columns : contexts) {
        const double started = now();
        for (; fed < columns; fed += std::min(512, columns - fed)) decode(opened.context, &tokens[fed], std::min(512, columns - fed));
        seconds += now() - started;
        double best = 1e9;
        for (int block = 0; block < 3; ++block) {
            for (int step = 0; step < 8; ++step) {
                const int32_t token = 7;
                const double before = now();
                decode(opened.context, &token, 1);
                best = std::min(best, now() - before);
            }
            llama_memory_seq_rm(llama_get_memory(opened.context), 0, fed, -1);
        }
        decoding << best * 1e3 << ' ';
        prefill << seconds << ' ';
    }
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    std::cout << decoding.str() << prefill.str() << usage.ru_maxrss / 1000 << std::endl;
    return 0;
}

int quantize(char **argv) {
    const std::map<std::string, llama_ftype> kinds = {
        {"F32", LLAMA_FTYPE_ALL_F32},          {"F16", LLAMA_FTYPE_MOSTLY_F16},       {"Q4_0", LLAMA_FTYPE_MOSTLY_Q4_0},
        {"Q4_1", LLAMA_FTYPE_MOSTLY_Q4_1},     {"Q4_K_S", LLAMA_FTYPE_MOSTLY_Q4_K_S}, {"Q4_K_M", LLAMA_FTYPE_MOSTLY_Q4_K_M},
        {"Q5_K_M", LLAMA_FTYPE_MOSTLY_Q5_K_M}, {"Q6_K", LLAMA_FTYPE_MOSTLY_Q6_K},     {"Q8_0", LLAMA_FTYPE_MOSTLY_Q8_0}};
    const auto kind = kinds.find(argv[4]);
    if (kind == kinds.end()) fail(std::string("unknown type ") + argv[4]);
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = kind->second;
    params.nthread = std::atoi(argv[5]);
    return static_cast<int>(llama_model_quantize(argv[2], argv[3], &params));
}

int likelihood(char **argv) {
    const Opened opened = open(argv[2], std::atoi(argv[3]), true, 512);
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::vector<int32_t> tokens;
        for (int32_t token; words >> token;) tokens.push_back(token);
        llama_memory_clear(llama_get_memory(opened.context), true);
        llama_batch batch = llama_batch_init(static_cast<int32_t>(tokens.size()), 0, 1);
        for (size_t i = 0; i < tokens.size(); ++i) {
            batch.token[i] = tokens[i];
            batch.pos[i] = static_cast<llama_pos>(i);
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = 1;
        }
        batch.n_tokens = static_cast<int32_t>(tokens.size());
        if (llama_decode(opened.context, batch)) fail("llama_decode failed");
        double total = 0;
        for (size_t i = 0; i + 1 < tokens.size(); ++i) {
            const float *logits = llama_get_logits_ith(opened.context, static_cast<int32_t>(i));
            const float largest = *std::max_element(logits, logits + opened.vocabulary);
            double sum = 0;
            for (int v = 0; v < opened.vocabulary; ++v) sum += std::exp(static_cast<double>(logits[v] - largest));
            total += std::log(sum) + largest - logits[tokens[i + 1]];
        }
        llama_batch_free(batch);
        std::printf("%zu %.9g\n", tokens.size() - 1, total);
    }
    return 0;
}

}  // namespace

int main(int argc, char **argv) {
    llama_log_set([](ggml_log_level level, const char *text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
    }, nullptr);
    ggml_backend_load_all_from_path(std::getenv("LLAMA_BACKENDS"));
    llama_backend_init();
    const std::string verb = argc > 1 ? argv[1] : "";
    if (verb == "bench" && argc > 5) return bench(argc, argv);
    if (verb == "quantize" && argc == 6) return quantize(argv);
    if (verb == "likelihood" && argc == 4) return likelihood(argv);
    fail("usage: bench FILE THREADS FLASH COLUMNS... | quantize IN OUT FTYPE THREADS | likelihood FILE THREADS");
}

// What llama.cpp makes of a GGUF file: milliseconds a token as the context grows, the file quantized by its own library, log-likelihoods.
//
//   llama-probe bench FILE THREADS FLASH COLUMNS...     one line: minima of decoding at each, then the prefill's seconds up to each, peak MB
//   llama-probe quantize IN OUT FTYPE THREADS           FTYPE: LLAMA_FTYPE_MOSTLY_Q4_0 and so on, by name (Q4_0, Q4_1, Q4_K_M, Q5_K_M, Q8_0)
//   llama-probe likelihood FILE THREADS                 stdin: a line of token ids a text; stdout: a line of (tokens, negative log-likelihood)
//   llama-probe requests FILE THREADS LORA...           stdin: a line of token ids for each adapter, which is a request's prompt, then lines
//                                                       "HOW COUNT NEW SHIFT", each answered by "SECONDS MILLISECONDS-OF-DECODES..." and
//                                                       COUNT lines of NEW greedy tokens; request i has adapter i + SHIFT. HOW:
//     swapped      a request at a time, its adapter set before it, in a context of one sequence
//     regrouped    a context of all sequences: a prompt, then a token, of each adapter in turn, the adapter set before each
//     alone        as swapped, without adapters
//     batched      without adapters: all prompts in a batch, then steps of a token of every request
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
#include "ggml-cpu.h"
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

// A batch of tokens of several sequences.
class Batch {
   public:
    explicit Batch(int most) : batch_(llama_batch_init(most, 0, 1)) {}
    ~Batch() { llama_batch_free(batch_); }
    Batch(const Batch &) = delete;
    Batch &operator=(const Batch &) = delete;

    void clear() { batch_.n_tokens = 0; }

    // Where its logits are, if it has any.
    int add(int32_t token, int position, int sequence, bool logits) {
        const int i = batch_.n_tokens++;
        batch_.token[i] = token;
        batch_.pos[i] = position;
        batch_.n_seq_id[i] = 1;
        batch_.seq_id[i][0] = sequence;
        batch_.logits[i] = logits;
        return i;
    }

    int add(const std::vector<int32_t> &prompt, int sequence) {
        int last = -1;
        for (size_t i = 0; i < prompt.size(); ++i) last = add(prompt[i], static_cast<int>(i), sequence, i + 1 == prompt.size());
        return last;
    }

    void decode(llama_context *context) const {
        if (llama_decode(context, batch_)) fail("llama_decode failed");
    }

   private:
    llama_batch batch_;
};

class Requests {
   public:
    static constexpr int MOST = 2048;  // tokens of a batch

    Requests(const char *file, int threads, const std::vector<const char *> &adapters)
        : count_(static_cast<int>(adapters.size())), batch_(MOST) {
        model_ = llama_model_load_from_file(file, llama_model_default_params());
        if (!model_) fail(std::string("cannot load ") + file);
        vocabulary_ = llama_vocab_n_tokens(llama_model_get_vocab(model_));
        for (const char *path : adapters) {
            adapters_.push_back(llama_adapter_lora_init(model_, path));
            if (!adapters_.back()) fail(std::string("cannot load the adapter ") + path);
        }
        // One pool of threads, as llama-server attaches it.
        ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
        void *found = ggml_backend_reg_get_proc_address(registry, "ggml_threadpool_new");
        const auto make = reinterpret_cast<decltype(ggml_threadpool_new) *>(found);
        ggml_threadpool_params pool_params = ggml_threadpool_params_default(threads);
        ggml_threadpool *pool = make ? make(&pool_params) : nullptr;
        if (!pool) fail("no pool of threads can be made");
        one_ = context(threads, 1, pool);
        all_ = context(threads, count_, pool);
    }

    void run(const std::string &how, const std::vector<std::vector<int32_t>> &prompts, int count, int new_tokens, int shift) {
        answers_.assign(count, {});
        steps_.clear();
        const double started = now();
        if (how == "swapped" || how == "alone") {
            for (int i = 0; i < count; ++i) {
                set(one_, how == "alone" ? nullptr : adapters_[(i + shift) % count_]);
                llama_memory_clear(llama_get_memory(one_), false);
                prompt(one_, prompts[i], 0, i);
                while (static_cast<int>(answers_[i].size()) < new_tokens) step(one_, {i}, {0}, prompts);
            }
        } else if (how == "regrouped") {
            llama_memory_clear(llama_get_memory(all_), false);
            for (int i = 0; i < count; ++i) {
                set(all_, adapters_[(i + shift) % count_]);
                prompt(all_, prompts[i], i, i);
            }
            for (int made = 1; made < new_tokens; ++made) {
                for (int i = 0; i < count; ++i) step(all_, {i}, {i}, prompts, adapters_[(i + shift) % count_]);
            }
        } else if (how == "batched") {
            llama_memory_clear(llama_get_memory(all_), false);
            set(all_, nullptr);
            std::vector<int> requests(count), last(count);
            batch_.clear();
            for (int i = 0; i < count; ++i) {
                requests[i] = i;
                last[i] = batch_.add(prompts[i], i);
            }
            batch_.decode(all_);
            for (int i = 0; i < count; ++i) choose(all_, i, last[i]);
            for (int made = 1; made < new_tokens; ++made) step(all_, requests, requests, prompts);
        } else {
            fail("unknown way " + how);
        }
        const double seconds = now() - started;
        std::cout << seconds;
        for (double step : steps_) std::cout << ' ' << step;
        std::cout << '\n';
        for (const auto &answer : answers_) {
            for (int32_t token : answer) std::cout << token << ' ';
            std::cout << '\n';
        }
        std::cout << std::flush;
    }

   private:
    llama_context *context(int threads, int sequences, ggml_threadpool *pool) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx = 256 * sequences;
        params.n_seq_max = params.n_outputs_max = sequences;
        params.n_batch = MOST;  // as llama-server's, like n_ubatch; flash attention is left to llama.cpp, as there
        params.n_ubatch = 512;
        params.n_threads = params.n_threads_batch = threads;
        llama_context *made = llama_init_from_model(model_, params);
        if (!made) fail("the context cannot be made");
        llama_attach_threadpool(made, pool, nullptr);
        return made;
    }

    void set(llama_context *context, llama_adapter_lora *adapter) {
        float scale = 1;
        if (llama_set_adapters_lora(context, &adapter, adapter ? 1 : 0, &scale)) fail("the adapter cannot be set");
    }

    void prompt(llama_context *context, const std::vector<int32_t> &tokens, int sequence, int request) {
        batch_.clear();
        const int last = batch_.add(tokens, sequence);
        batch_.decode(context);
        choose(context, request, last);
    }

    // The next token of some requests; ``adapter``: set before it, in its time.
    void step(llama_context *context, const std::vector<int> &requests, const std::vector<int> &sequences,
              const std::vector<std::vector<int32_t>> &prompts, llama_adapter_lora *adapter = nullptr) {
        const double before = now();
        if (adapter) set(context, adapter);
        batch_.clear();
        for (size_t i = 0; i < requests.size(); ++i) {
            const auto &answer = answers_[requests[i]];
            batch_.add(answer.back(), static_cast<int>(prompts[requests[i]].size() + answer.size()) - 1, sequences[i], true);
        }
        batch_.decode(context);
        for (size_t i = 0; i < requests.size(); ++i) choose(context, requests[i], static_cast<int>(i));
        steps_.push_back((now() - before) * 1e3);
    }

    void choose(llama_context *context, int request, int place) {
        const float *logits = llama_get_logits_ith(context, place);
        if (!logits) fail("no logits");
        answers_[request].push_back(static_cast<int32_t>(std::max_element(logits, logits + vocabulary_) - logits));
    }

    int count_, vocabulary_;
    Batch batch_;
    llama_model *model_;
    llama_context *one_, *all_;
    std::vector<llama_adapter_lora *> adapters_;
    std::vector<std::vector<int32_t>> answers_;
    std::vector<double> steps_;
};

int requests(int argc, char **argv) {
    const std::vector<const char *> adapters(argv + 4, argv + argc);
    Requests requests(argv[2], std::atoi(argv[3]), adapters);
    std::vector<std::vector<int32_t>> prompts;
    size_t tokens = 0;
    for (std::string line; prompts.size() < adapters.size() && std::getline(std::cin, line);) {
        std::istringstream words(line);
        prompts.emplace_back();
        for (int32_t token; words >> token;) prompts.back().push_back(token);
        tokens += prompts.back().size();
    }
    if (tokens > Requests::MOST) fail("the prompts have more tokens than one batch takes");
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string how;
        size_t count = 0;
        int new_tokens = 0, shift = 0;
        if (!(words >> how >> count >> new_tokens >> shift) || count > prompts.size()) fail("not a command: " + line);
        requests.run(how, prompts, static_cast<int>(count), new_tokens, shift);
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
    if (verb == "requests" && argc > 4) return requests(argc, argv);
    fail(
        "usage: bench FILE THREADS FLASH COLUMNS... | quantize IN OUT FTYPE THREADS | likelihood FILE THREADS | "
        "requests FILE THREADS LORA...");
}

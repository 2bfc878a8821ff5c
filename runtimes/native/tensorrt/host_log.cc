#include "tensorrt/host_log.h"

#include <cstdarg>
#include <cstdio>
#include <mutex>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace reft::trt {
namespace {

using GetLogger = nvinfer1::ILogger* (*)() noexcept;

struct Host {
  nvinfer1::ILoggerFinder* finder = nullptr;
  GetLogger get_logger = nullptr;
};
std::mutex mutex;
Host host;

// ILogger and ILoggerFinder became versioned interfaces in TensorRT 11 (and within TensorRT-RTX 1): log() and findLogger() moved by four
// virtual slots, while the plugin interfaces stayed as they were. A library may well run where its headers' logger does not fit.
bool same_logger(int32_t version) {
  constexpr int32_t kHeaders = NV_TENSORRT_VERSION;
  const int32_t major = version / 10000;
  if (major != kHeaders / 10000) return false;
  const bool rtx = major < 10;
  return !rtx || version / 100 == kHeaders / 100;
}

#if defined(__linux__)
// The TensorRT library that finder's class lives in: one process may hold several of them, and none may be in the global scope.
void* library_of(nvinfer1::ILoggerFinder* finder) {
  Dl_info info{};
  const void* table = *reinterpret_cast<void**>(finder);
  if (dladdr(table, &info) == 0 || info.dli_fname == nullptr) return nullptr;
  return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
}
#endif

}  // namespace

void use_logger_finder(nvinfer1::ILoggerFinder* finder) {
  Host found;
#if defined(__linux__)
  if (finder != nullptr) {
    if (void* library = library_of(finder)) {
      const auto version = reinterpret_cast<int32_t (*)() noexcept>(dlsym(library, "getInferLibVersion"));
      if (version != nullptr && same_logger(version())) {
        found.finder = finder;
        found.get_logger = reinterpret_cast<GetLogger>(dlsym(library, "getLogger"));
      }
      dlclose(library);
    }
  }
#else
  static_cast<void>(finder);
#endif
  const std::lock_guard<std::mutex> lock(mutex);
  host = found;
}

void use_global_logger(GetLogger get_logger, int32_t version) {
  const std::lock_guard<std::mutex> lock(mutex);
  host = {nullptr, same_logger(version) ? get_logger : nullptr};
}

void log_error(const char* op, const char* node, const char* format, ...) {
  char text[768];
  const int used = std::snprintf(text, sizeof text, "%s plugin%s%s: ", op, node[0] != '\0' ? ", node " : "", node);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text + used, sizeof text - static_cast<size_t>(used), format, arguments);
  va_end(arguments);
  Host current;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    current = host;
  }
  // The finder knows the logger of the engine or context that this thread works for; while a network is built there is none yet.
  nvinfer1::ILogger* logger = current.finder != nullptr ? current.finder->findLogger() : nullptr;
  if (logger == nullptr && current.get_logger != nullptr) logger = current.get_logger();
  if (logger != nullptr) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, text);
  } else {
    std::fprintf(stderr, "%s\n", text);
  }
}

}  // namespace reft::trt

// Messages for whoever runs TensorRT: through its logger where that is safe, else on stderr.
#pragma once

#include <NvInferRuntime.h>

namespace reft::trt {

// finder: what TensorRT hands to setLoggerFinder. Null takes it back.
void use_logger_finder(nvinfer1::ILoggerFinder* finder);

// For a host that hands out no finder: get_logger is its exported getLogger, version its getInferLibVersion().
void use_global_logger(nvinfer1::ILogger* (*get_logger)() noexcept, int32_t version);

// "LoReFT plugin, node layer_3: ..."
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
void log_error(const char* op, const char* node, const char* format, ...);

}  // namespace reft::trt

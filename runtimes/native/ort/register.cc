// RegisterCustomOps: the domain ai.reft with every op of this library.

#include <cstdio>
#include <iterator>
#include <mutex>

#include "c_api/reft.h"
#include "ort/op.h"

namespace reft::ort {
namespace {

// The domain and its ops, made once per process: sessions borrow them for as long as they live.
Status domain_of(const Api* api, Domain** out) {
  static std::mutex mutex;
  static Domain* domain = nullptr;
  static Op ops[2 * std::size(kDTypes) * std::size(kProviders)];
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    Domain* made = nullptr;
    if (Status status = CreateCustomOpDomain::call(api, "ai.reft", &made)) return status;
    size_t count = 0;
    for (const Definition* definition : {&kLoReft, &kRed}) {
      for (DType dtype : kDTypes) {
        for (const char* provider : kProviders) {
          Op& op = ops[count++] = make_op(*definition, dtype, provider);
          if (Status status = CustomOpDomainAdd::call(api, made, &op)) return status;
        }
      }
    }
    domain = made;
  }
  *out = domain;
  return nullptr;
}

}  // namespace
}  // namespace reft::ort

// onnxruntime calls this by name when the library is registered on session options.
REFT_EXPORT reft::ort::Status RegisterCustomOps(reft::ort::SessionOptions* options, const reft::ort::ApiBase* base) {
  using namespace reft::ort;
  int major = 0, minor = 0;
  const bool parsed = std::sscanf(base->GetVersionString(), "%d.%d", &major, &minor) == 2;
  if (!parsed || major < 1 || (major == 1 && minor < static_cast<int>(kApiVersion))) {
    // Every release knows version 1 of the API, whose first function makes an error.
    char text[128];
    std::snprintf(text, sizeof text, "ai.reft: onnxruntime %.32s is too old, expected 1.%u or later", base->GetVersionString(), kApiVersion);
    return CreateStatus::call(base->GetApi(1), kNotImplemented, text);
  }
  const Api* api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    return CreateStatus::call(base->GetApi(1), kNotImplemented, "ai.reft: this onnxruntime does not offer version 18 of its C API");
  }
  library = {api, major > 1 ? kShapeReferenceVersion : static_cast<uint32_t>(minor)};
  Domain* domain = nullptr;
  if (Status status = domain_of(api, &domain)) return status;
  return AddCustomOpDomain::call(api, options, domain);
}

// How a failure travels: a status code, and a message kept for sf_last_error().
#ifndef SWIFTFUSION_STATUS_H_
#define SWIFTFUSION_STATUS_H_

#include <cuda_runtime_api.h>

#include "swiftfusion.h"

namespace sf {

// Keeps the message and returns the status.
__attribute__((format(printf, 2, 3))) int fail(int status, const char* format, ...);
// Puts text in front of the message that is kept.
__attribute__((format(printf, 1, 2))) void add_context(const char* format, ...);

// SF_OK, or keeps "call: what CUDA says".
int check(cudaError_t error, const char* call);

int preload_merge();
int preload_pack();
int preload_put();

}  // namespace sf

#define SF_TRY(expression)                      \
  do {                                          \
    const int sf_status_ = (expression);        \
    if (sf_status_ != SF_OK) return sf_status_; \
  } while (0)

#endif  // SWIFTFUSION_STATUS_H_

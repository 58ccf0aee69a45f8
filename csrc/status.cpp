#include "status.h"

#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstring>

namespace {

constexpr size_t kMessageBytes = 512;
thread_local char last_error[kMessageBytes] = "";

struct LayoutEntry {
  const char* name;
  uint64_t offset, size;
};

#define SF_STRUCT(type) {#type, 0, sizeof(type)}
#define SF_FIELD(type, field) {#type "." #field, offsetof(type, field), sizeof(type::field)}

constexpr LayoutEntry kLayout[] = {
    SF_STRUCT(sf_op),
    SF_FIELD(sf_op, kind),
    SF_FIELD(sf_op, stream),
    SF_FIELD(sf_op, src_base),
    SF_FIELD(sf_op, dst_base),
    SF_FIELD(sf_op, src_offset),
    SF_FIELD(sf_op, dst_offset),
    SF_FIELD(sf_op, width),
    SF_FIELD(sf_op, height),
    SF_FIELD(sf_op, depth),
    SF_FIELD(sf_op, src_pitch),
    SF_FIELD(sf_op, src_plane),
    SF_FIELD(sf_op, dst_pitch),
    SF_FIELD(sf_op, dst_plane),
    SF_FIELD(sf_op, value),
    SF_FIELD(sf_op, event),
    SF_STRUCT(sf_program_options),
    SF_FIELD(sf_program_options, flags),
    SF_FIELD(sf_program_options, reserved),
    SF_STRUCT(sf_merge_args),
    SF_FIELD(sf_merge_args, out),
    SF_FIELD(sf_merge_args, out_stride),
    SF_FIELD(sf_merge_args, lse),
    SF_FIELD(sf_merge_args, lse_stride),
    SF_FIELD(sf_merge_args, dst),
    SF_FIELD(sf_merge_args, dst_stride),
    SF_FIELD(sf_merge_args, num_partials),
    SF_FIELD(sf_merge_args, batch),
    SF_FIELD(sf_merge_args, rows),
    SF_FIELD(sf_merge_args, heads),
    SF_FIELD(sf_merge_args, head_dim),
    SF_FIELD(sf_merge_args, in_dtype),
    SF_FIELD(sf_merge_args, dst_dtype),
    SF_STRUCT(sf_pack_item),
    SF_FIELD(sf_pack_item, src),
    SF_FIELD(sf_pack_item, dst),
    SF_FIELD(sf_pack_item, src_stride),
    SF_FIELD(sf_pack_item, dst_stride),
    SF_FIELD(sf_pack_item, batch),
    SF_FIELD(sf_pack_item, rows),
    SF_FIELD(sf_pack_item, heads),
    SF_FIELD(sf_pack_item, head_bytes),
    SF_STRUCT(sf_pack_args),
    SF_FIELD(sf_pack_args, items),
    SF_FIELD(sf_pack_args, num_items),
    SF_FIELD(sf_pack_args, reserved),
    SF_STRUCT(sf_put_item),
    SF_FIELD(sf_put_item, src),
    SF_FIELD(sf_put_item, dst),
    SF_FIELD(sf_put_item, flag),
    SF_FIELD(sf_put_item, src_stride),
    SF_FIELD(sf_put_item, dst_stride),
    SF_FIELD(sf_put_item, batch),
    SF_FIELD(sf_put_item, rows),
    SF_FIELD(sf_put_item, heads),
    SF_FIELD(sf_put_item, head_bytes),
    SF_STRUCT(sf_put_args),
    SF_FIELD(sf_put_args, items),
    SF_FIELD(sf_put_args, counters),
    SF_FIELD(sf_put_args, num_items),
    SF_FIELD(sf_put_args, num_peers),
    SF_FIELD(sf_put_args, num_blocks),
    SF_FIELD(sf_put_args, reserved),
};
constexpr int kLayoutEntries = sizeof(kLayout) / sizeof(kLayout[0]);

}  // namespace

namespace sf {

int fail(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, kMessageBytes, format, arguments);
  va_end(arguments);
  return status;
}

void add_context(const char* format, ...) {
  char message[kMessageBytes], context[128];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(context, sizeof(context), format, arguments);
  va_end(arguments);
  memcpy(message, last_error, kMessageBytes);
  fail(SF_OK, "%s: %s", context, message);
}

int check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return SF_OK;
  // CUDA keeps the error until it is read; the next check of a launch must not see this one.
  (void)cudaGetLastError();
  return fail(SF_CUDA_ERROR, "%s: %s (%s)", call, cudaGetErrorString(error),
              cudaGetErrorName(error));
}

}  // namespace sf

extern "C" {

const char* sf_error_string(int status) {
  switch (status) {
    case SF_OK: return "success";
    case SF_INVALID_ARGUMENT: return "invalid argument";
    case SF_CUDA_ERROR: return "a CUDA call failed";
    case SF_OUT_OF_MEMORY: return "out of host memory";
    default: return "unknown status";
  }
}

const char* sf_last_error(void) { return last_error; }

const char* sf_source_digest(void) { return SF_SOURCE_DIGEST; }

int sf_layout(int index, const char** name, uint64_t* offset, uint64_t* size) {
  if (index < 0 || index >= kLayoutEntries || !name || !offset || !size) {
    return sf::fail(SF_INVALID_ARGUMENT, "sf_layout: index %d of %d entries, or a NULL result",
                    index, kLayoutEntries);
  }
  *name = kLayout[index].name;
  *offset = kLayout[index].offset;
  *size = kLayout[index].size;
  return SF_OK;
}

int sf_preload(void) {
  SF_TRY(sf::preload_merge());
  SF_TRY(sf::preload_pack());
  return sf::preload_put();
}

}  // extern "C"

// Strided blocks of bytes as the kernels that move them step through them: runs of contiguous
// units, counted and placed from the innermost dim out.
#ifndef SWIFTFUSION_STRIDED_H_
#define SWIFTFUSION_STRIDED_H_

#include <climits>
#include <cstdint>

#include "status.h"
#include "swiftfusion.h"

namespace sf {

constexpr int kMaxUnits = INT_MAX;  // of an item

// Counts and strides from the innermost dim out.
struct Strided {
  int64_t src_stride[3], dst_stride[3];  // bytes
  uint32_t count[3];
  uint32_t run_units, num_units;
};

// Where a unit lies, in bytes from the start of the source and of the destination.
template <typename Unit>
__device__ __forceinline__ void locate(const Strided& shape, uint32_t unit, int64_t* src_offset,
                                       int64_t* dst_offset) {
  const uint32_t run = unit / shape.run_units;
  const uint32_t i1 = run / shape.count[0];
  const uint32_t i2 = i1 / shape.count[1];
  const int64_t at[3] = {run - i1 * shape.count[0], i1 - i2 * shape.count[1], i2};
  const int64_t start = int64_t{unit - run * shape.run_units} * static_cast<int64_t>(sizeof(Unit));
  *src_offset = *dst_offset = start;
#pragma unroll
  for (int dim = 0; dim < 3; ++dim) {
    *src_offset += at[dim] * shape.src_stride[dim];
    *dst_offset += at[dim] * shape.dst_stride[dim];
  }
}

// The items of the C interface have the same names for their sizes and strides.
template <typename Item>
int check_sizes(const char* function, int index, const Item& item) {
  if (item.batch >= 0 && item.rows >= 0 && item.heads >= 0 && item.head_bytes >= 0) return SF_OK;
  return fail(SF_INVALID_ARGUMENT,
              "%s: item %d has a negative size: batch=%d rows=%d heads=%d head_bytes=%d", function,
              index, item.batch, item.rows, item.heads, item.head_bytes);
}

template <typename Item>
bool is_empty(const Item& item) {
  return item.batch == 0 || item.rows == 0 || item.heads == 0 || item.head_bytes == 0;
}

// Returns the bytes of a contiguous run as long as the strides allow; set_units counts them.
template <typename Item>
int64_t fold(const Item& item, Strided* folded) {
  const int32_t counts[3] = {item.heads, item.rows, item.batch};
  int64_t run_bytes = item.head_bytes;
  int num_dims = 0;
  for (int dim = 0; dim < 3; ++dim) {
    const int64_t src_stride = item.src_stride[2 - dim], dst_stride = item.dst_stride[2 - dim];
    if (counts[dim] == 1) continue;
    if (num_dims == 0 && src_stride == run_bytes && dst_stride == run_bytes) {
      run_bytes *= counts[dim];
      continue;
    }
    folded->count[num_dims] = static_cast<uint32_t>(counts[dim]);
    folded->src_stride[num_dims] = src_stride;
    folded->dst_stride[num_dims] = dst_stride;
    ++num_dims;
  }
  for (; num_dims < 3; ++num_dims) {
    folded->count[num_dims] = 1;
    folded->src_stride[num_dims] = folded->dst_stride[num_dims] = 0;
  }
  return run_bytes;
}

// Whether every address is a multiple of `bytes`; `starts` has the bits of every src and dst.
inline bool is_aligned(const Strided& folded, int64_t run_bytes, uintptr_t starts, int64_t bytes) {
  int64_t bits = run_bytes | static_cast<int64_t>(starts);
  for (int dim = 0; dim < 3; ++dim) bits |= folded.src_stride[dim] | folded.dst_stride[dim];
  return bits % bytes == 0;
}

// Returns how many units there are, in a type that holds too many, and sets them if they are not.
inline double set_units(int64_t run_bytes, int64_t unit_bytes, Strided* folded) {
  const int64_t run_units = run_bytes / unit_bytes;
  const double num_units = static_cast<double>(run_units) * folded->count[0] * folded->count[1] *
                           folded->count[2];
  if (num_units > kMaxUnits) return num_units;
  folded->run_units = static_cast<uint32_t>(run_units);
  folded->num_units =
      folded->run_units * folded->count[0] * folded->count[1] * folded->count[2];
  return num_units;
}

}  // namespace sf

#endif  // SWIFTFUSION_STRIDED_H_

// Copies strided tensors with one kernel: for staging, and for scatters so small that the launches
// of one copy each would cost more than the copies.
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>

#include "status.h"
#include "swiftfusion.h"

namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 4;  // loads in flight before the first store
constexpr int kUnitsPerBlock = kThreads * kUnitsPerThread;

// Runs of contiguous units; counts and strides from the innermost dim out.
struct Item {
  const char* src;
  char* dst;
  int64_t src_stride[3], dst_stride[3];  // bytes
  uint32_t count[3];
  uint32_t run_units, num_units;
};

struct PackLaunch {
  Item items[SF_MAX_PACK_ITEMS];
};

template <typename Unit>
__device__ __forceinline__ void locate(const Item& item, uint32_t unit, const Unit** src,
                                       Unit** dst) {
  const uint32_t run = unit / item.run_units;
  const uint32_t i1 = run / item.count[0];
  const uint32_t i2 = i1 / item.count[1];
  const int64_t at[3] = {run - i1 * item.count[0], i1 - i2 * item.count[1], i2};
  const int64_t start = int64_t{unit - run * item.run_units} * static_cast<int64_t>(sizeof(Unit));
  int64_t src_offset = start, dst_offset = start;
#pragma unroll
  for (int dim = 0; dim < 3; ++dim) {
    src_offset += at[dim] * item.src_stride[dim];
    dst_offset += at[dim] * item.dst_stride[dim];
  }
  *src = reinterpret_cast<const Unit*>(item.src + src_offset);
  *dst = reinterpret_cast<Unit*>(item.dst + dst_offset);
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackLaunch p) {
  const Item& item = p.items[blockIdx.y];
  const uint32_t first = blockIdx.x * kUnitsPerBlock + threadIdx.x;
  Unit value[kUnitsPerThread];
  Unit* dst[kUnitsPerThread];
#pragma unroll
  for (int i = 0; i < kUnitsPerThread; ++i) {
    const uint32_t unit = first + i * kThreads;
    if (unit >= item.num_units) break;
    const Unit* src;
    locate(item, unit, &src, &dst[i]);
    value[i] = __ldcs(src);
  }
#pragma unroll
  for (int i = 0; i < kUnitsPerThread; ++i) {
    if (first + i * kThreads < item.num_units) *dst[i] = value[i];
  }
}

using Kernel = void (*)(PackLaunch);

struct Width {
  int64_t bytes;
  Kernel kernel;
};

const Width kWidths[] = {
    {16, pack_kernel<uint4>},
    {4, pack_kernel<uint32_t>},
    {2, pack_kernel<uint16_t>},
    {1, pack_kernel<uint8_t>},
};

int check_args(const sf_pack_args& args) {
  if (args.num_items < 0 || args.num_items > SF_MAX_PACK_ITEMS) {
    return sf::fail(SF_INVALID_ARGUMENT, "sf_pack: num_items must be 0 to %d, got %d",
                    SF_MAX_PACK_ITEMS, args.num_items);
  }
  for (int i = 0; i < args.num_items; ++i) {
    const sf_pack_item& item = args.items[i];
    if (item.batch < 0 || item.rows < 0 || item.heads < 0 || item.head_bytes < 0) {
      return sf::fail(SF_INVALID_ARGUMENT,
                      "sf_pack: item %d has a negative size: batch=%d rows=%d heads=%d "
                      "head_bytes=%d",
                      i, item.batch, item.rows, item.heads, item.head_bytes);
    }
  }
  return SF_OK;
}

bool is_empty(const sf_pack_item& item) {
  return item.batch == 0 || item.rows == 0 || item.heads == 0 || item.head_bytes == 0;
}

// A contiguous run as long as the strides allow; run_units still counts bytes.
int64_t fold(const sf_pack_item& item, Item* folded) {
  const int32_t counts[3] = {item.heads, item.rows, item.batch};
  folded->src = static_cast<const char*>(item.src);
  folded->dst = static_cast<char*>(item.dst);
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

// Whether every address of the item is a multiple of `bytes`.
bool is_aligned(const Item& item, int64_t run_bytes, int64_t bytes) {
  int64_t bits = run_bytes | static_cast<int64_t>(reinterpret_cast<uintptr_t>(item.src)) |
                 static_cast<int64_t>(reinterpret_cast<uintptr_t>(item.dst));
  for (int dim = 0; dim < 3; ++dim) bits |= item.src_stride[dim] | item.dst_stride[dim];
  return bits % bytes == 0;
}

}  // namespace

namespace sf {

int preload_pack() {
  for (const Width& width : kWidths) {
    cudaFuncAttributes attributes;
    SF_TRY(check(cudaFuncGetAttributes(&attributes, width.kernel), "load pack_kernel"));
  }
  return SF_OK;
}

}  // namespace sf

extern "C" int sf_pack(const sf_pack_args* args, void* stream) {
  if (!args) return sf::fail(SF_INVALID_ARGUMENT, "sf_pack: args is NULL");
  SF_TRY(check_args(*args));
  PackLaunch launch;
  int64_t run_bytes[SF_MAX_PACK_ITEMS];
  int num_items = 0;
  for (int i = 0; i < args->num_items; ++i) {
    if (is_empty(args->items[i])) continue;
    if (!args->items[i].src || !args->items[i].dst) {
      return sf::fail(SF_INVALID_ARGUMENT, "sf_pack: src or dst of item %d is NULL", i);
    }
    run_bytes[num_items] = fold(args->items[i], &launch.items[num_items]);
    ++num_items;
  }
  if (num_items == 0) return SF_OK;
  const Width* width = kWidths;
  for (int i = 0; i < num_items; ++i) {
    while (!is_aligned(launch.items[i], run_bytes[i], width->bytes)) ++width;
  }
  int64_t most_units = 0;
  for (int i = 0; i < num_items; ++i) {
    Item& item = launch.items[i];
    const int64_t run_units = run_bytes[i] / width->bytes;
    // count[0] * count[1] < 2^62, and a product that does not fit in 32 bits is refused.
    const double num_units = static_cast<double>(run_units) * item.count[0] * item.count[1] *
                             item.count[2];
    if (num_units > INT_MAX) {
      return sf::fail(SF_INVALID_ARGUMENT,
                      "sf_pack: an item must have at most %d units of %d bytes, got %.0f", INT_MAX,
                      static_cast<int>(width->bytes), num_units);
    }
    item.run_units = static_cast<uint32_t>(run_units);
    item.num_units = item.run_units * item.count[0] * item.count[1] * item.count[2];
    most_units = std::max(most_units, int64_t{item.num_units});
  }
  const dim3 grid(static_cast<uint32_t>((most_units + kUnitsPerBlock - 1) / kUnitsPerBlock),
                  static_cast<uint32_t>(num_items));
  width->kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
  return sf::check(cudaGetLastError(), "sf_pack: launch of pack_kernel");
}

// Copies strided tensors with one kernel: for staging, and for scatters so small that the launches
// of one copy each would cost more than the copies.
#include <cuda_runtime.h>

#include <algorithm>

#include "status.h"
#include "strided.h"
#include "swiftfusion.h"

namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 4;  // loads in flight before the first store
constexpr int kUnitsPerBlock = kThreads * kUnitsPerThread;

struct Item {
  const char* src;
  char* dst;
  sf::Strided shape;
};

struct PackLaunch {
  Item items[SF_MAX_PACK_ITEMS];
};

template <typename Unit>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackLaunch p) {
  const Item& item = p.items[blockIdx.y];
  const uint32_t first = blockIdx.x * kUnitsPerBlock + threadIdx.x;
  Unit value[kUnitsPerThread];
  Unit* dst[kUnitsPerThread];
#pragma unroll
  for (int i = 0; i < kUnitsPerThread; ++i) {
    const uint32_t unit = first + i * kThreads;
    if (unit >= item.shape.num_units) break;
    int64_t src_offset, dst_offset;
    sf::locate<Unit>(item.shape, unit, &src_offset, &dst_offset);
    dst[i] = reinterpret_cast<Unit*>(item.dst + dst_offset);
    value[i] = __ldcs(reinterpret_cast<const Unit*>(item.src + src_offset));
  }
#pragma unroll
  for (int i = 0; i < kUnitsPerThread; ++i) {
    if (first + i * kThreads < item.shape.num_units) *dst[i] = value[i];
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
    SF_TRY(sf::check_sizes("sf_pack", i, args.items[i]));
  }
  return SF_OK;
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
    const sf_pack_item& item = args->items[i];
    if (sf::is_empty(item)) continue;
    if (!item.src || !item.dst) {
      return sf::fail(SF_INVALID_ARGUMENT, "sf_pack: src or dst of item %d is NULL", i);
    }
    Item* const folded = &launch.items[num_items];
    folded->src = static_cast<const char*>(item.src);
    folded->dst = static_cast<char*>(item.dst);
    run_bytes[num_items] = sf::fold(item, &folded->shape);
    ++num_items;
  }
  if (num_items == 0) return SF_OK;
  const Width* width = kWidths;
  for (int i = 0; i < num_items; ++i) {
    const Item& item = launch.items[i];
    const uintptr_t starts =
        reinterpret_cast<uintptr_t>(item.src) | reinterpret_cast<uintptr_t>(item.dst);
    while (!sf::is_aligned(item.shape, run_bytes[i], starts, width->bytes)) ++width;
  }
  int64_t most_units = 0;
  for (int i = 0; i < num_items; ++i) {
    const double num_units = sf::set_units(run_bytes[i], width->bytes, &launch.items[i].shape);
    if (num_units > sf::kMaxUnits) {
      return sf::fail(SF_INVALID_ARGUMENT,
                      "sf_pack: an item must have at most %d units of %d bytes, got %.0f",
                      sf::kMaxUnits, static_cast<int>(width->bytes), num_units);
    }
    most_units = std::max(most_units, int64_t{launch.items[i].shape.num_units});
  }
  const dim3 grid(static_cast<uint32_t>((most_units + kUnitsPerBlock - 1) / kUnitsPerBlock),
                  static_cast<uint32_t>(num_items));
  width->kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
  return sf::check(cudaGetLastError(), "sf_pack: launch of pack_kernel");
}

// Puts the same strided blocks to several peers with one kernel of few thread blocks, and tells
// each peer by a flag what is there.
//
// Every unit is loaded once and stored to every peer. The blocks begin with different peers, so
// that the links to all of them are busy. One peer after another, each message at a time, was
// slower: ranks fall out of step and meet at a peer.
//
// It runs while an attention kernel waits for such flags on the other multiprocessors. Ranks would
// wait for one another forever if that kernel held all multiprocessors and kept this one off them.
// So this kernel waits for nothing, and the one that waits comes behind it on its stream, launched
// with programmatic stream serialization: none of its blocks starts before every block of this
// kernel has started and said so, which each does first thing. It sees what ran before this kernel,
// which itself starts in plain stream order; of this kernel it sees what flags tell. It must
// execute griddepcontrol.wait before it ends: else it may be over before this kernel is, and what
// comes next on the stream may overwrite what is still being put.
#include <cuda_runtime.h>

#include "status.h"
#include "strided.h"
#include "swiftfusion.h"

namespace {

constexpr int kThreads = 512;
constexpr int kUnitsPerThread = 8;  // loads in flight before the first store
constexpr int kMaxBlocks = 1024;

struct Item {
  const char* src;
  char* dst[SF_MAX_PUT_PEERS];
  uint32_t* flag[SF_MAX_PUT_PEERS];  // the first is NULL: none
  sf::Strided shape;
};

struct PutLaunch {
  Item items[SF_MAX_PUT_ITEMS];
  uint32_t* counters;
  uint32_t num_items, num_peers;
};
static_assert(sizeof(PutLaunch) <= 4096, "what kernels take with any driver");

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

__device__ __forceinline__ void set_flag(uint32_t* flag) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
}

template <typename Unit>
__device__ __forceinline__ void put_item(const Item& item, uint32_t first_peer,
                                         uint32_t num_peers) {
  const uint32_t num_units = item.shape.num_units, step = gridDim.x * kThreads;
  for (uint32_t first = blockIdx.x * kThreads + threadIdx.x; first < num_units;
       first += kUnitsPerThread * step) {
    Unit value[kUnitsPerThread];
    int64_t dst_offset[kUnitsPerThread];
#pragma unroll
    for (int i = 0; i < kUnitsPerThread; ++i) {
      const uint32_t unit = first + i * step;
      if (unit >= num_units) break;
      int64_t src_offset;
      sf::locate<Unit>(item.shape, unit, &src_offset, &dst_offset[i]);
      // Not a streaming load: attention may read the same bytes, and should find them in the cache.
      value[i] = *reinterpret_cast<const Unit*>(item.src + src_offset);
    }
    uint32_t peer = first_peer;
#pragma unroll 1
    for (uint32_t j = 0; j < num_peers; ++j) {
      char* const dst = item.dst[peer];
#pragma unroll
      for (int i = 0; i < kUnitsPerThread; ++i) {
        if (first + i * step < num_units) *reinterpret_cast<Unit*>(dst + dst_offset[i]) = value[i];
      }
      peer = peer + 1 == num_peers ? 0 : peer + 1;
    }
  }
}

// By one thread of each block, behind a barrier that all its threads reach after their stores. The
// last block to come sets the flags, so no block waits for another.
__device__ __forceinline__ void signal(const Item& item, uint32_t* counter, uint32_t first_peer,
                                       uint32_t num_peers) {
  fence_system();  // this block's stores of this item and of those before it, then its count
  if (atomicAdd(counter, 1) != gridDim.x - 1) return;
  *counter = 0;
  fence_system();  // every block's count, and so its stores, then the flags
  uint32_t peer = first_peer;
#pragma unroll 1
  for (uint32_t j = 0; j < num_peers; ++j) {
    // The fence makes this a release; a release of its own each would wait for the flag before it.
    set_flag(item.flag[peer]);
    peer = peer + 1 == num_peers ? 0 : peer + 1;
  }
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads, 1) put_kernel(const __grid_constant__ PutLaunch p) {
  let_next_kernel_start();
  const uint32_t first_peer = blockIdx.x % p.num_peers;
  for (uint32_t i = 0; i < p.num_items; ++i) {
    const Item& item = p.items[i];
    put_item<Unit>(item, first_peer, p.num_peers);
    if (!item.flag[0]) continue;
    __syncthreads();
    // Meanwhile the other warps go on: a flag says what is there, not what is not there yet.
    if (threadIdx.x == 0) signal(item, &p.counters[i], first_peer, p.num_peers);
  }
}

using Kernel = void (*)(PutLaunch);

struct Width {
  int64_t bytes;
  Kernel kernel;
};

const Width kWidths[] = {
    {16, put_kernel<uint4>},
    {4, put_kernel<uint32_t>},
    {2, put_kernel<uint16_t>},
    {1, put_kernel<uint8_t>},
};

int check_range(const char* name, int value, int least, int most) {
  if (value >= least && value <= most) return SF_OK;
  return sf::fail(SF_INVALID_ARGUMENT, "sf_put: %s must be %d to %d, got %d", name, least, most,
                  value);
}

int check_pointers(const sf_put_args& args, int index) {
  const sf_put_item& item = args.items[index];
  int num_flags = 0;
  for (int peer = 0; peer < args.num_peers; ++peer) num_flags += item.flag[peer] != nullptr;
  if (num_flags != 0 && num_flags != args.num_peers) {
    return sf::fail(SF_INVALID_ARGUMENT,
                    "sf_put: item %d must have a flag at each of its %d peers or at none, got %d",
                    index, args.num_peers, num_flags);
  }
  if (num_flags != 0 && !args.counters) {
    return sf::fail(SF_INVALID_ARGUMENT, "sf_put: item %d has flags, but counters is NULL", index);
  }
  if (sf::is_empty(item)) return SF_OK;
  if (!item.src) return sf::fail(SF_INVALID_ARGUMENT, "sf_put: src of item %d is NULL", index);
  for (int peer = 0; peer < args.num_peers; ++peer) {
    if (item.dst[peer]) continue;
    return sf::fail(SF_INVALID_ARGUMENT, "sf_put: dst[%d] of item %d is NULL", peer, index);
  }
  return SF_OK;
}

int check_args(const sf_put_args& args) {
  SF_TRY(check_range("num_items", args.num_items, 0, SF_MAX_PUT_ITEMS));
  SF_TRY(check_range("num_peers", args.num_peers, 1, SF_MAX_PUT_PEERS));
  SF_TRY(check_range("num_blocks", args.num_blocks, 1, kMaxBlocks));
  for (int i = 0; i < args.num_items; ++i) {
    SF_TRY(sf::check_sizes("sf_put", i, args.items[i]));
    SF_TRY(check_pointers(args, i));
  }
  return SF_OK;
}

// Returns the bits of all its addresses.
uintptr_t copy_pointers(const sf_put_item& item, int num_peers, Item* to) {
  uintptr_t starts = reinterpret_cast<uintptr_t>(item.src);
  to->src = static_cast<const char*>(item.src);
  for (int peer = 0; peer < num_peers; ++peer) {
    starts |= reinterpret_cast<uintptr_t>(item.dst[peer]);
    to->dst[peer] = static_cast<char*>(item.dst[peer]);
    to->flag[peer] = item.flag[peer];
  }
  return starts;
}

// Fills the items of a launch, and chooses the kernel whose units they all consist of; NULL where
// there is nothing to do.
int prepare(const sf_put_args& args, PutLaunch* launch, Kernel* kernel) {
  const Width* width = kWidths;
  int64_t run_bytes[SF_MAX_PUT_ITEMS] = {};
  bool has_work = false;
  for (int i = 0; i < args.num_items; ++i) {
    Item* const item = &launch->items[i];
    const uintptr_t starts = copy_pointers(args.items[i], args.num_peers, item);
    item->shape.num_units = 0;
    has_work = has_work || item->flag[0] || !sf::is_empty(args.items[i]);
    if (sf::is_empty(args.items[i])) continue;
    run_bytes[i] = sf::fold(args.items[i], &item->shape);
    while (!sf::is_aligned(item->shape, run_bytes[i], starts, width->bytes)) ++width;
  }
  for (int i = 0; i < args.num_items; ++i) {
    if (run_bytes[i] == 0) continue;
    const double num_units = sf::set_units(run_bytes[i], width->bytes, &launch->items[i].shape);
    if (num_units > sf::kMaxUnits) {
      return sf::fail(SF_INVALID_ARGUMENT,
                      "sf_put: item %d must have at most %d units of %d bytes, got %.0f", i,
                      sf::kMaxUnits, static_cast<int>(width->bytes), num_units);
    }
  }
  *kernel = has_work ? width->kernel : nullptr;
  return SF_OK;
}

}  // namespace

namespace sf {

int preload_put() {
  for (const Width& width : kWidths) {
    cudaFuncAttributes attributes;
    SF_TRY(check(cudaFuncGetAttributes(&attributes, width.kernel), "load put_kernel"));
  }
  return SF_OK;
}

}  // namespace sf

extern "C" int sf_put(const sf_put_args* args, void* stream) {
  if (!args) return sf::fail(SF_INVALID_ARGUMENT, "sf_put: args is NULL");
  SF_TRY(check_args(*args));
  PutLaunch launch;
  Kernel kernel = nullptr;
  SF_TRY(prepare(*args, &launch, &kernel));
  if (!kernel) return SF_OK;
  launch.counters = args->counters;
  launch.num_items = static_cast<uint32_t>(args->num_items);
  launch.num_peers = static_cast<uint32_t>(args->num_peers);
  kernel<<<static_cast<uint32_t>(args->num_blocks), kThreads, 0,
           static_cast<cudaStream_t>(stream)>>>(launch);
  return sf::check(cudaGetLastError(), "sf_put: launch of put_kernel");
}

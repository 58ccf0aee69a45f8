// Merges partial attention outputs of the same queries over disjoint sets of keys.
//
// Plainly: dst = sum_i exp(lse_i) out_i / sum_i exp(lse_i). exp(lse) overflows fp32 above 88, so
// the largest lse is subtracted first, which cancels out.
//
// Memory bound: each thread owns kVector elements of one (batch, row, head), has the loads of all
// partials in flight before the first use, and stores once. Nothing is shared between threads, so
// dst may be one of the partials.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>

#include <climits>

#include "status.h"
#include "swiftfusion.h"

namespace {

constexpr int kThreads = 256;
constexpr int kVectorElements = 8;
constexpr int kAlignment = 16;
constexpr int kMaxBatch = 65535;  // gridDim.y

struct MergeLaunch {
  sf_merge_args args;
  uint32_t threads_per_item;  // an item is one (row, head) of a batch entry
  uint32_t items_per_block;
  uint32_t num_items;
};

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ void from_float(float x, __nv_bfloat16* y) {
  *y = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void from_float(float x, __half* y) { *y = __float2half_rn(x); }
__device__ __forceinline__ void from_float(float x, float* y) { *y = x; }

// Approximations that flush denormals, err by about 1e-7 and have no slow path: enough for weights,
// whose exponents are at most 0 and whose sum is 1 to 8.
__device__ __forceinline__ float fast_exp(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * kLog2E));
  return y;
}

__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// kCount elements that move in 16-byte accesses, or one element.
template <typename T, int kCount>
struct Vector {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  static constexpr int kAccesses = kBytes / kAlignment;

  union {
    uint4 words[kAccesses];
    T elements[kCount];
  };

  __device__ __forceinline__ Vector() {}
  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    // Read once: keep it out of the way of what the next kernel reads.
    for (int i = 0; i < kAccesses; ++i) words[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
  }
  __device__ __forceinline__ void clear_unless(bool keep) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      words[i].x = keep ? words[i].x : 0;
      words[i].y = keep ? words[i].y : 0;
      words[i].z = keep ? words[i].z : 0;
      words[i].w = keep ? words[i].w : 0;
    }
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) reinterpret_cast<uint4*>(to)[i] = words[i];
  }
};

template <typename T>
struct Vector<T, 1> {
  T elements[1];

  __device__ __forceinline__ Vector() {}
  __device__ __forceinline__ void load(const T* from) { elements[0] = *from; }
  __device__ __forceinline__ void clear_unless(bool keep) {
    if (!keep) elements[0] = T(0.0f);
  }
  __device__ __forceinline__ void store(T* to) const { *to = elements[0]; }
};

// lse -> share of each partial; 0 where its lse is -inf, and for those that do not exist.
template <int kPartials>
__device__ __forceinline__ void normalise(float (&share)[kPartials]) {
  float largest = -CUDART_INF_F;
#pragma unroll
  for (int i = 0; i < kPartials; ++i) largest = fmaxf(largest, share[i]);
  // All -inf: anything finite keeps -inf - -inf = nan away.
  const float shift = largest == -CUDART_INF_F ? 0.0f : largest;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPartials; ++i) {
    share[i] = fast_exp(share[i] - shift);
    sum += share[i];
  }
  const float scale = sum == 0.0f ? 0.0f : fast_reciprocal(sum);
#pragma unroll
  for (int i = 0; i < kPartials; ++i) share[i] *= scale;
}

// With vectors kPartials is exactly num_partials: a branch around a load would make the next load
// wait for it. One element at a time, kPartials is the most.
template <typename In, typename Out, int kVector, int kPartials>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeLaunch p) {
  const sf_merge_args& a = p.args;
  const uint32_t item_in_block = threadIdx.x / p.threads_per_item;
  const uint32_t item = blockIdx.x * p.items_per_block + item_in_block;
  if (item_in_block >= p.items_per_block || item >= p.num_items) return;
  const uint32_t heads = static_cast<uint32_t>(a.heads);
  const int64_t b = blockIdx.y, s = item / heads, h = item % heads;
  const int64_t d = (threadIdx.x - item_in_block * p.threads_per_item) * kVector;

  const int num_partials = kVector > 1 ? kPartials : a.num_partials;
  Vector<In, kVector> partial[kPartials];
  float share[kPartials];
#pragma unroll
  for (int i = 0; i < kPartials; ++i) {
    share[i] = -CUDART_INF_F;
    if (i < num_partials) {
      const int64_t* const stride = a.out_stride[i];
      partial[i].load(static_cast<const In*>(a.out[i]) + b * stride[0] + s * stride[1] +
                      h * stride[2] + d);
      const int64_t* const lse_stride = a.lse_stride[i];
      share[i] = num_partials == 1
                     ? 0.0f
                     : a.lse[i][b * lse_stride[0] + h * lse_stride[1] + s * lse_stride[2]];
    }
  }
  normalise(share);

  float total[kVector] = {};
#pragma unroll
  for (int i = 0; i < kPartials; ++i) {
    // Without a share a partial may hold anything, nan included. Not a branch: the compiler would
    // move the load into it, behind the loads that its condition needs.
    partial[i].clear_unless(share[i] != 0.0f);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      total[j] = fmaf(share[i], to_float(partial[i].elements[j]), total[j]);
    }
  }
  Vector<Out, kVector> merged;
#pragma unroll
  for (int j = 0; j < kVector; ++j) from_float(total[j], &merged.elements[j]);
  merged.store(static_cast<Out*>(a.dst) + b * a.dst_stride[0] + s * a.dst_stride[1] +
               h * a.dst_stride[2] + d);
}

using Kernel = void (*)(MergeLaunch);

template <typename In, typename Out>
Kernel choose_by_count(bool vectors, int num_partials) {
  if (!vectors) return merge_kernel<In, Out, 1, SF_MAX_PARTIALS>;
  static const Kernel by_count[SF_MAX_PARTIALS] = {
      merge_kernel<In, Out, kVectorElements, 1>, merge_kernel<In, Out, kVectorElements, 2>,
      merge_kernel<In, Out, kVectorElements, 3>, merge_kernel<In, Out, kVectorElements, 4>,
      merge_kernel<In, Out, kVectorElements, 5>, merge_kernel<In, Out, kVectorElements, 6>,
      merge_kernel<In, Out, kVectorElements, 7>, merge_kernel<In, Out, kVectorElements, 8>,
  };
  static_assert(SF_MAX_PARTIALS == 8, "one kernel for each count");
  return by_count[num_partials - 1];
}

// NULL where the pair of dtypes is not supported.
Kernel choose_kernel(int in, int out, bool vectors, int num_partials) {
  if (in == SF_BF16 && out == SF_BF16) {
    return choose_by_count<__nv_bfloat16, __nv_bfloat16>(vectors, num_partials);
  }
  if (in == SF_BF16 && out == SF_FP32) {
    return choose_by_count<__nv_bfloat16, float>(vectors, num_partials);
  }
  if (in == SF_FP16 && out == SF_FP16) {
    return choose_by_count<__half, __half>(vectors, num_partials);
  }
  if (in == SF_FP16 && out == SF_FP32) return choose_by_count<__half, float>(vectors, num_partials);
  if (in == SF_FP32 && out == SF_BF16) {
    return choose_by_count<float, __nv_bfloat16>(vectors, num_partials);
  }
  if (in == SF_FP32 && out == SF_FP16) {
    return choose_by_count<float, __half>(vectors, num_partials);
  }
  if (in == SF_FP32 && out == SF_FP32) return choose_by_count<float, float>(vectors, num_partials);
  return nullptr;
}

bool is_aligned(const void* pointer, const int64_t (&stride)[3], int dtype) {
  const int64_t element_bytes = dtype == SF_FP32 ? 4 : 2;
  if (reinterpret_cast<uintptr_t>(pointer) % kAlignment != 0) return false;
  for (int64_t elements : stride) {
    if (elements * element_bytes % kAlignment != 0) return false;
  }
  return true;
}

bool fits_vectors(const sf_merge_args& args) {
  if (args.head_dim % kVectorElements != 0) return false;
  for (int i = 0; i < args.num_partials; ++i) {
    if (!is_aligned(args.out[i], args.out_stride[i], args.in_dtype)) return false;
  }
  return is_aligned(args.dst, args.dst_stride, args.dst_dtype);
}

int check_args(const sf_merge_args& args) {
  if (args.num_partials < 1 || args.num_partials > SF_MAX_PARTIALS) {
    return sf::fail(SF_INVALID_ARGUMENT, "sf_merge: num_partials must be 1 to %d, got %d",
                    SF_MAX_PARTIALS, args.num_partials);
  }
  if (args.batch < 0 || args.batch > kMaxBatch || args.rows < 0 || args.heads < 0 ||
      int64_t{args.rows} * args.heads > INT_MAX) {
    return sf::fail(SF_INVALID_ARGUMENT,
                    "sf_merge: batch must be 0 to %d and rows * heads 0 to %d, got batch=%d "
                    "rows=%d heads=%d",
                    kMaxBatch, INT_MAX, args.batch, args.rows, args.heads);
  }
  if (args.head_dim < 1 || args.head_dim > SF_MAX_HEAD_DIM) {
    return sf::fail(SF_INVALID_ARGUMENT, "sf_merge: head_dim must be 1 to %d, got %d",
                    SF_MAX_HEAD_DIM, args.head_dim);
  }
  if (!choose_kernel(args.in_dtype, args.dst_dtype, false, 1)) {
    return sf::fail(SF_INVALID_ARGUMENT,
                    "sf_merge: dtypes must be equal or one of them fp32 (bf16 0, fp16 1, fp32 2), "
                    "got in %d and dst %d",
                    args.in_dtype, args.dst_dtype);
  }
  return SF_OK;
}

int check_pointers(const sf_merge_args& args) {
  bool present = args.dst != nullptr;
  for (int i = 0; i < args.num_partials; ++i) {
    present = present && args.out[i] && (args.num_partials == 1 || args.lse[i]);
  }
  if (present) return SF_OK;
  return sf::fail(SF_INVALID_ARGUMENT, "sf_merge: dst, or out or lse of a partial, is NULL");
}

}  // namespace

namespace sf {

int preload_merge() {
  for (int in : {SF_BF16, SF_FP16, SF_FP32}) {
    for (int out : {SF_BF16, SF_FP16, SF_FP32}) {
      for (int count = 0; count <= SF_MAX_PARTIALS; ++count) {  // 0: the one without vectors
        const Kernel kernel = choose_kernel(in, out, count > 0, count);
        cudaFuncAttributes attributes;
        if (kernel) SF_TRY(check(cudaFuncGetAttributes(&attributes, kernel), "load merge_kernel"));
      }
    }
  }
  return SF_OK;
}

}  // namespace sf

extern "C" int sf_merge(const sf_merge_args* args, void* stream) {
  if (!args) return sf::fail(SF_INVALID_ARGUMENT, "sf_merge: args is NULL");
  SF_TRY(check_args(*args));
  if (args->batch == 0 || args->rows == 0 || args->heads == 0) return SF_OK;
  SF_TRY(check_pointers(*args));
  const bool vectors = fits_vectors(*args);
  MergeLaunch launch;
  launch.args = *args;
  launch.threads_per_item = static_cast<uint32_t>(args->head_dim / (vectors ? kVectorElements : 1));
  launch.items_per_block = kThreads / launch.threads_per_item;
  launch.num_items = static_cast<uint32_t>(args->rows) * static_cast<uint32_t>(args->heads);
  const uint32_t num_blocks =
      (launch.num_items + launch.items_per_block - 1) / launch.items_per_block;
  const Kernel kernel =
      choose_kernel(args->in_dtype, args->dst_dtype, vectors, args->num_partials);
  kernel<<<dim3(num_blocks, static_cast<uint32_t>(args->batch)), kThreads, 0,
           static_cast<cudaStream_t>(stream)>>>(launch);
  return sf::check(cudaGetLastError(), "sf_merge: launch of merge_kernel");
}

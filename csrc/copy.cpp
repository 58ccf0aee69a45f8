#include "copy.h"

#include <climits>
#include <utility>

#include "status.h"

namespace sf {
namespace {

// cudaDevAttrMaxPitch of every device so far.
constexpr uint64_t kMaxPitch = 0x7fffffff;

void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

}  // namespace

Copy::Copy(const sf_op& op, bool plane_loop)
    : num_bytes_(op.width * op.height * op.depth),
      width_(op.width),
      inner_{op.height, op.src_pitch, op.dst_pitch},
      outer_{op.depth, op.src_plane, op.dst_plane} {
  if (num_bytes_ == 0) return;
  fold();
  choose_form(plane_loop);
}

// Afterwards a dim with count 1 is absent, and if only one dim is left it is inner_.
void Copy::fold() {
  for (int round = 0; round < 2; ++round) {
    for (Dim* dim : {&inner_, &outer_}) {
      const bool contiguous = dim->src_stride == width_ && dim->dst_stride == width_;
      if (dim->count > 1 && contiguous) {
        width_ *= dim->count;
        *dim = Dim{};
      }
    }
  }
  if (!fold_pair(&inner_, &outer_)) fold_pair(&outer_, &inner_);
  if (inner_.count == 1) std::swap(inner_, outer_);
}

// One dim instead of two where outer goes on where inner ends.
bool Copy::fold_pair(Dim* inner, Dim* outer) {
  if (inner->count == 1 || outer->count == 1) return false;
  if (outer->src_stride != inner->count * inner->src_stride) return false;
  if (outer->dst_stride != inner->count * inner->dst_stride) return false;
  inner->count *= outer->count;
  *outer = Dim{};
  return true;
}

bool Copy::is_pitched(const Dim& dim) const {
  return dim.src_stride >= width_ && dim.dst_stride >= width_ && dim.src_stride <= kMaxPitch &&
         dim.dst_stride <= kMaxPitch;
}

// A 3D copy has planes that are a whole number of rows apart.
bool Copy::has_planes(const Dim& inner, const Dim& outer) const {
  return is_pitched(inner) && outer.src_stride % inner.src_stride == 0 &&
         outer.dst_stride % inner.dst_stride == 0 &&
         outer.src_stride / inner.src_stride >= inner.count &&
         outer.dst_stride / inner.dst_stride >= inner.count;
}

void Copy::choose_form(bool plane_loop) {
  if (inner_.count == 1) {
    form_ = Form::kFlat;
  } else if (outer_.count == 1) {
    form_ = is_pitched(inner_) ? Form::kRows : Form::kLoopOfLoops;
  } else if (!plane_loop && has_planes(inner_, outer_)) {
    form_ = Form::kPlanes;
  } else if (!plane_loop && has_planes(outer_, inner_)) {
    std::swap(inner_, outer_);
    form_ = Form::kPlanes;
  } else {
    // One 2D copy for each index of the outer dim: the shorter one, if either will do.
    const bool outer_is_pitched = is_pitched(outer_);
    if (!is_pitched(inner_) || (outer_is_pitched && outer_.count > inner_.count)) {
      std::swap(inner_, outer_);
    }
    form_ = is_pitched(inner_) ? Form::kLoopOfRows : Form::kLoopOfLoops;
  }
}

int Copy::enqueue(uint64_t src, uint64_t dst, cudaStream_t stream) const {
  switch (form_) {
    case Form::kNothing:
      return SF_OK;
    case Form::kFlat:
      return check(
          cudaMemcpyAsync(pointer(dst), pointer(src), width_, cudaMemcpyDefault, stream),
          "cudaMemcpyAsync");
    case Form::kRows:
      return enqueue_rows(src, dst, stream);
    case Form::kPlanes:
      return enqueue_planes(src, dst, stream);
    case Form::kLoopOfRows:
    case Form::kLoopOfLoops:
      for (uint64_t i = 0; i < outer_.count; ++i) {
        const uint64_t from = src + i * outer_.src_stride, to = dst + i * outer_.dst_stride;
        SF_TRY(form_ == Form::kLoopOfRows ? enqueue_rows(from, to, stream)
                                          : enqueue_flat_rows(from, to, stream));
      }
      return SF_OK;
  }
  return fail(SF_INVALID_ARGUMENT, "copy of unknown form");
}

int Copy::enqueue_rows(uint64_t src, uint64_t dst, cudaStream_t stream) const {
  return check(cudaMemcpy2DAsync(pointer(dst), inner_.dst_stride, pointer(src), inner_.src_stride,
                                 width_, inner_.count, cudaMemcpyDefault, stream),
               "cudaMemcpy2DAsync");
}

int Copy::enqueue_planes(uint64_t src, uint64_t dst, cudaStream_t stream) const {
  cudaMemcpy3DParms parameters = {};
  parameters.srcPtr = {pointer(src), inner_.src_stride, width_,
                       outer_.src_stride / inner_.src_stride};
  parameters.dstPtr = {pointer(dst), inner_.dst_stride, width_,
                       outer_.dst_stride / inner_.dst_stride};
  parameters.extent = {width_, inner_.count, outer_.count};
  parameters.kind = cudaMemcpyDefault;
  return check(cudaMemcpy3DAsync(&parameters, stream), "cudaMemcpy3DAsync");
}

int Copy::enqueue_flat_rows(uint64_t src, uint64_t dst, cudaStream_t stream) const {
  for (uint64_t i = 0; i < inner_.count; ++i) {
    void* const to = pointer(dst + i * inner_.dst_stride);
    const void* const from = pointer(src + i * inner_.src_stride);
    SF_TRY(check(cudaMemcpyAsync(to, from, width_, cudaMemcpyDefault, stream), "cudaMemcpyAsync"));
  }
  return SF_OK;
}

bool Copy::as_pack_item(sf_pack_item* item) const {
  if (width_ > INT_MAX || inner_.count > INT_MAX || outer_.count > INT_MAX) return false;
  *item = {};
  item->src_stride[0] = static_cast<int64_t>(outer_.src_stride);
  item->src_stride[1] = static_cast<int64_t>(inner_.src_stride);
  item->dst_stride[0] = static_cast<int64_t>(outer_.dst_stride);
  item->dst_stride[1] = static_cast<int64_t>(inner_.dst_stride);
  item->batch = static_cast<int32_t>(outer_.count);
  item->rows = static_cast<int32_t>(inner_.count);
  item->heads = num_bytes_ > 0 ? 1 : 0;
  item->head_bytes = static_cast<int32_t>(width_);
  return true;
}

}  // namespace sf

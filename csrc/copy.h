// A copy of width x height x depth bytes as the fewest calls that the copy engines offer for it.
#ifndef SWIFTFUSION_COPY_H_
#define SWIFTFUSION_COPY_H_

#include <cuda_runtime_api.h>

#include "swiftfusion.h"

namespace sf {

class Copy {
 public:
  // width * height * depth must fit in 64 bits.
  Copy(const sf_op& op, bool plane_loop);
  Copy() = default;

  // SF_OK, or keeps the message of the call that failed.
  int enqueue(uint64_t src, uint64_t dst, cudaStream_t stream) const;
  // The same as an item of sf_pack; false where its counts do not fit in one.
  bool as_pack_item(sf_pack_item* item) const;

 private:
  struct Dim {
    uint64_t count = 1, src_stride = 0, dst_stride = 0;
  };
  enum class Form { kNothing, kFlat, kRows, kPlanes, kLoopOfRows, kLoopOfLoops };

  void fold();
  bool fold_pair(Dim* inner, Dim* outer);
  bool is_pitched(const Dim& dim) const;
  bool has_planes(const Dim& inner, const Dim& outer) const;
  void choose_form(bool plane_loop);
  int enqueue_rows(uint64_t src, uint64_t dst, cudaStream_t stream) const;
  int enqueue_planes(uint64_t src, uint64_t dst, cudaStream_t stream) const;
  int enqueue_flat_rows(uint64_t src, uint64_t dst, cudaStream_t stream) const;

  Form form_ = Form::kNothing;
  uint64_t num_bytes_ = 0;
  uint64_t width_ = 0;
  Dim inner_, outer_;
};

}  // namespace sf

#endif  // SWIFTFUSION_COPY_H_

// The C interface of the compiled part: stream programs, merging, packing, putting.
//
// Raw pointers, sizes and stream handles only, so that one build serves every version of torch.
// Every function returns SF_OK or another sf_status; sf_last_error() then says what failed. Nothing
// synchronises with the device, and everything that takes a stream may run under stream capture.
// The device of the streams must be current. Strides count bytes, except in sf_merge_args, where
// they count elements.
#ifndef SWIFTFUSION_H_
#define SWIFTFUSION_H_

#include <stdint.h>

#define SF_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum sf_status {
  SF_OK = 0,
  SF_INVALID_ARGUMENT = 1,
  SF_CUDA_ERROR = 2,
  SF_OUT_OF_MEMORY = 3,
};

// What a status means; never NULL.
SF_API const char* sf_error_string(int status);
// The failing call of this thread's last function that did not return SF_OK: where, and why.
SF_API const char* sf_last_error(void);
// Digest of the sources that this library was built from.
SF_API const char* sf_source_digest(void);
// Entry `index` of the table of all structs and their fields, "sf_op" or "sf_op.kind", so that a
// binding can prove that it agrees. SF_INVALID_ARGUMENT past the end.
SF_API int sf_layout(int index, const char** name, uint64_t* offset, uint64_t* size);
// Loads every kernel on the current device. CUDA loads kernels at their first launch otherwise,
// which may synchronise, and never returns if a stream waits for a peer that waits for this rank.
SF_API int sf_preload(void);

// ---- Stream programs -------------------------------------------------------------------------

enum sf_op_kind {
  SF_COPY = 0,        // copy width x height x depth bytes from src to dst, by a copy engine if it
                      // crosses to a peer; CUDA itself takes a kernel inside one GPU
  SF_WRITE = 1,       // *dst = value, after the stream's earlier copies are visible system-wide
  SF_WAIT = 2,        // wait until *src == value
  SF_RECORD = 3,      // record event
  SF_WAIT_EVENT = 4,  // wait for event, recorded by an earlier op
  SF_CLEAR = 5,       // *dst = 0, in stream order
  SF_COPY_KERNEL = 6, // as SF_COPY, by sf_pack: one launch for consecutive ones of a stream, of which
                      // none may read or write what another writes
};

// An address is bases[base] + offset of the run call, or offset itself where base is -1.
typedef struct {
  int32_t kind;
  int32_t stream;  // index into the streams of the run call
  int32_t src_base, dst_base;
  uint64_t src_offset, dst_offset;      // bytes
  uint64_t width, height, depth;        // copy: bytes per row, rows per plane, planes
  uint64_t src_pitch, src_plane;        // copy: bytes from row to row, from plane to plane
  uint64_t dst_pitch, dst_plane;
  uint32_t value;                       // flags: 32-bit words, 4-byte aligned
  int32_t event;
} sf_op;

enum sf_program_flags {
  SF_SINGLE_FLAG_OPS = 1,  // one driver call per flag operation instead of one per batch
  SF_PLANE_LOOP = 2,       // one 2D copy per plane instead of a 3D copy
};

typedef struct {
  uint32_t flags;     // sf_program_flags
  uint32_t reserved;  // 0
} sf_program_options;

typedef struct sf_program sf_program;

// Checks and compiles ops, and creates num_events events on the current device. options may be
// NULL. A program belongs to one thread at a time.
SF_API int sf_program_create(const sf_op* ops, int num_ops, int num_events,
                             const sf_program_options* options, sf_program** out);
SF_API int sf_program_destroy(sf_program* program);
// Enqueues ops [begin, end). The tables must cover every index that the whole program names.
SF_API int sf_program_run(sf_program* program, int begin, int end, const uint64_t* bases,
                          int num_bases, const void* const* streams, int num_streams);

// ---- Merge -----------------------------------------------------------------------------------

enum { SF_MAX_PARTIALS = 8, SF_MAX_HEAD_DIM = 256 };
enum sf_dtype { SF_BF16 = 0, SF_FP16 = 1, SF_FP32 = 2 };

// out[i] [batch, rows, heads, head_dim] with lse[i] [batch, heads, rows], fp32, natural log. The
// last dim is contiguous everywhere. dst may be a peer's memory, or one of the partials with that
// partial's strides.
typedef struct {
  const void* out[SF_MAX_PARTIALS];
  int64_t out_stride[SF_MAX_PARTIALS][3];  // elements: batch, row, head
  const float* lse[SF_MAX_PARTIALS];
  int64_t lse_stride[SF_MAX_PARTIALS][3];  // elements: batch, head, row
  void* dst;
  int64_t dst_stride[3];                   // elements: batch, row, head
  int32_t num_partials, batch, rows, heads, head_dim;
  int32_t in_dtype, dst_dtype;             // equal, or one of them SF_FP32
} sf_merge_args;

// dst = sum_i exp(lse_i - logsumexp(lse)) * out_i, in fp32 and in the order of i. A partial with
// lse -inf has no say; a row where all are -inf becomes 0. A single partial is copied and its lse
// not read.
SF_API int sf_merge(const sf_merge_args* args, void* stream);

// ---- Pack ------------------------------------------------------------------------------------

enum { SF_MAX_PACK_ITEMS = 16 };

// [batch, rows, heads] runs of head_bytes contiguous bytes.
typedef struct {
  const void* src;
  void* dst;
  int64_t src_stride[3], dst_stride[3];  // bytes: batch, row, head
  int32_t batch, rows, heads, head_bytes;
} sf_pack_item;

typedef struct {
  sf_pack_item items[SF_MAX_PACK_ITEMS];
  int32_t num_items, reserved;
} sf_pack_args;

// Copies all items in one launch; they must not overlap. Any src or dst may be a peer's memory.
SF_API int sf_pack(const sf_pack_args* args, void* stream);

// ---- Put -------------------------------------------------------------------------------------

enum { SF_MAX_PUT_ITEMS = 16, SF_MAX_PUT_PEERS = 7 };

// [batch, rows, heads] runs of head_bytes contiguous bytes, to every peer.
typedef struct {
  const void* src;
  void* dst[SF_MAX_PUT_PEERS];           // the same strides at every peer
  uint32_t* flag[SF_MAX_PUT_PEERS];      // set to 1 for a peer; all NULL: none
  int64_t src_stride[3], dst_stride[3];  // bytes: batch, row, head
  int32_t batch, rows, heads, head_bytes;
} sf_put_item;

typedef struct {
  sf_put_item items[SF_MAX_PUT_ITEMS];
  uint32_t* counters;  // this GPU's, one an item: 0 before and after, and no other launch's between
  int32_t num_items, num_peers;
  int32_t num_blocks;  // thread blocks, and so the most multiprocessors that it takes
  int32_t reserved;
} sf_put_args;

// Copies the items, one after another, to each of num_peers peers in one launch; they must not
// overlap. A peer that reads an item's flag as 1, with system-wide acquire, sees the bytes of that
// item and of those before it, also while later ones still move. An empty item sets its flags too.
//
// The kernel waits for nothing. One behind it on the stream that waits for flags of peers must be
// launched with programmatic stream serialization; csrc/put.cu has the rules.
SF_API int sf_put(const sf_put_args* args, void* stream);

#ifdef __cplusplus
}
#endif
#endif  // SWIFTFUSION_H_

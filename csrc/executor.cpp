// Stream programs: what one rank enqueues between two attention calls, in one C call.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "copy.h"
#include "status.h"
#include "swiftfusion.h"

namespace {

using sf::check;
using sf::fail;

// cuStreamBatchMemOp takes fewer than 256 operations.
constexpr int kMaxFlagOpsPerBatch = 255;
// The driver API that cuStreamBatchMemOp (v2) and the value operations are asked for by.
constexpr unsigned kDriverVersion = 12000;

const char* const kKindNames[] = {"copy", "write", "wait", "record", "wait_event", "clear",
                                   "copy_kernel"};

// The driver's functions are looked up, not linked: the library loads where there is no driver.
struct Driver {
  decltype(&cuStreamBatchMemOp) batch = nullptr;
  decltype(&cuStreamWriteValue32) write = nullptr;
  decltype(&cuStreamWaitValue32) wait = nullptr;
  decltype(&cuGetErrorString) error_string = nullptr;
};

template <typename Function>
int look_up(const char* name, Function* function) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &entry, kDriverVersion,
                                                             cudaEnableLegacyStream, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &entry, cudaEnableLegacyStream, &found);
#endif
  SF_TRY(check(error, name));
  if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
    return fail(SF_CUDA_ERROR, "%s: the driver does not have it (needs CUDA %u.%u or later)", name,
                kDriverVersion / 1000, kDriverVersion % 1000 / 10);
  }
  *function = reinterpret_cast<Function>(entry);
  return SF_OK;
}

int load_driver(Driver* driver) {
  SF_TRY(look_up("cuStreamBatchMemOp", &driver->batch));
  SF_TRY(look_up("cuStreamWriteValue32", &driver->write));
  SF_TRY(look_up("cuStreamWaitValue32", &driver->wait));
  return look_up("cuGetErrorString", &driver->error_string);
}

bool is_flag(const sf_op& op) {
  return op.kind == SF_WRITE || op.kind == SF_WAIT || op.kind == SF_CLEAR;
}
bool is_kernel_copy(const sf_op& op) { return op.kind == SF_COPY_KERNEL; }
bool is_copy(const sf_op& op) { return op.kind == SF_COPY || is_kernel_copy(op); }
bool is_event(const sf_op& op) { return op.kind == SF_RECORD || op.kind == SF_WAIT_EVENT; }

int check_copy(const sf_op& op) {
  uint64_t num_bytes = 0;
  if (__builtin_mul_overflow(op.width, op.height, &num_bytes) ||
      __builtin_mul_overflow(num_bytes, op.depth, &num_bytes)) {
    return fail(SF_INVALID_ARGUMENT, "width * height * depth must fit in 64 bits");
  }
  return SF_OK;
}

int check_op(const sf_op& op, int num_events) {
  if (op.kind < SF_COPY || op.kind > SF_COPY_KERNEL) {
    return fail(SF_INVALID_ARGUMENT, "kind must be 0 to %d, got %d", SF_COPY_KERNEL, op.kind);
  }
  if (op.stream < 0) return fail(SF_INVALID_ARGUMENT, "stream must be >= 0, got %d", op.stream);
  if (op.src_base < -1 || op.dst_base < -1) {
    return fail(SF_INVALID_ARGUMENT, "src_base and dst_base must be >= -1, got %d and %d",
                op.src_base, op.dst_base);
  }
  if (is_event(op) && (op.event < 0 || op.event >= num_events)) {
    return fail(SF_INVALID_ARGUMENT, "event must be 0 to num_events - 1 = %d, got %d",
                num_events - 1, op.event);
  }
  if (op.kind == SF_WAIT && op.value == 0) {
    return fail(SF_INVALID_ARGUMENT, "wait needs a value other than 0, which is a clear flag's");
  }
  return is_copy(op) ? check_copy(op) : SF_OK;
}

// A wait for an event that nothing recorded orders nothing, without an error from CUDA.
int check_order(const std::vector<sf_op>& ops, int num_events) {
  std::vector<bool> recorded(static_cast<size_t>(num_events), false);
  for (size_t i = 0; i < ops.size(); ++i) {
    if (!is_event(ops[i])) continue;
    const size_t event = static_cast<size_t>(ops[i].event);
    if (ops[i].kind == SF_RECORD) recorded[event] = true;
    if (!recorded[event]) {
      return fail(SF_INVALID_ARGUMENT, "op %zu waits for event %zu, which no earlier op records", i,
                  event);
    }
  }
  return SF_OK;
}

// How many consecutive ops, from each on, satisfy `joins` on one stream; at least 1.
template <typename Predicate>
std::vector<int> run_lengths(const std::vector<sf_op>& ops, Predicate joins) {
  std::vector<int> lengths(ops.size(), 1);
  for (size_t i = ops.size(); i-- > 1;) {
    const sf_op &before = ops[i - 1], &op = ops[i];
    if (joins(before) && joins(op) && before.stream == op.stream) lengths[i - 1] += lengths[i];
  }
  return lengths;
}

}  // namespace

struct sf_program {
 public:
  sf_program() = default;
  sf_program(const sf_program&) = delete;
  sf_program& operator=(const sf_program&) = delete;
  ~sf_program() { (void)destroy_events(); }

  int create(const sf_op* ops, int num_ops, int num_events, const sf_program_options& options);
  int destroy_events();
  int run(int begin, int end, const uint64_t* bases, int num_bases, const void* const* streams,
          int num_streams);

 private:
  int driver_check(CUresult result, const char* call) const;
  int step(int index, int end, const uint64_t* bases, cudaStream_t stream, int* num_done);
  int run_flags(int begin, int end, const uint64_t* bases, cudaStream_t stream);
  int run_one_flag(const sf_op& op, uint64_t address, CUstream stream) const;
  int run_copies(int begin, int end, const uint64_t* bases, cudaStream_t stream, int* num_done);
  void prepare_flags();
  int located(int index, int num_done, int status) const;

  static uint64_t resolve(int32_t base, uint64_t offset, const uint64_t* bases) {
    return base < 0 ? offset : bases[base] + offset;
  }
  static uint64_t source(const sf_op& op, const uint64_t* bases) {
    return resolve(op.src_base, op.src_offset, bases);
  }
  static uint64_t destination(const sf_op& op, const uint64_t* bases) {
    return resolve(op.dst_base, op.dst_offset, bases);
  }

  Driver driver_;
  sf_program_options options_ = {};
  std::vector<sf_op> ops_;
  std::vector<sf::Copy> copies_;                  // one per op, empty for other kinds
  std::vector<int> run_length_;                   // of flag ops or of copies, from each op on
  std::vector<CUstreamBatchMemOpParams> params_;  // of all flag ops; addresses are set by run
  std::vector<size_t> first_param_;               // of each op, and one past the last
  std::vector<cudaEvent_t> events_;
  int num_bases_ = 0, num_streams_ = 0;
};

int sf_program::create(const sf_op* ops, int num_ops, int num_events,
                       const sf_program_options& options) {
  ops_.assign(ops, ops + num_ops);
  options_ = options;
  bool has_flags = false;
  for (int i = 0; i < num_ops; ++i) {
    const sf_op& op = ops_[static_cast<size_t>(i)];
    const int status = check_op(op, num_events);
    if (status != SF_OK) return located(i, 1, status);
    has_flags = has_flags || is_flag(op);
    num_streams_ = std::max(num_streams_, op.stream + 1);
    const bool reads = is_copy(op) || op.kind == SF_WAIT;
    const bool writes = is_copy(op) || (is_flag(op) && !reads);
    if (reads) num_bases_ = std::max(num_bases_, op.src_base + 1);
    if (writes) num_bases_ = std::max(num_bases_, op.dst_base + 1);
    const bool plane_loop = (options.flags & SF_PLANE_LOOP) != 0;
    copies_.push_back(is_copy(op) ? sf::Copy(op, plane_loop) : sf::Copy());
  }
  SF_TRY(check_order(ops_, num_events));
  const std::vector<int> flags = run_lengths(ops_, is_flag), copies = run_lengths(ops_, is_kernel_copy);
  run_length_.resize(ops_.size());
  std::transform(flags.begin(), flags.end(), copies.begin(), run_length_.begin(),
                 [](int a, int b) { return std::max(a, b); });
  prepare_flags();
  if (has_flags) SF_TRY(load_driver(&driver_));
  for (int i = 0; i < num_events; ++i) {
    cudaEvent_t event = nullptr;
    SF_TRY(check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming),
                 "cudaEventCreateWithFlags"));
    events_.push_back(event);
  }
  return SF_OK;
}

void sf_program::prepare_flags() {
  for (const sf_op& op : ops_) {
    first_param_.push_back(params_.size());
    if (!is_flag(op)) continue;
    CUstreamBatchMemOpParams param = {};
    if (op.kind == SF_WAIT) {
      param.waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32;
      param.waitValue.value = op.value;
      param.waitValue.flags = CU_STREAM_WAIT_VALUE_EQ;
    } else {
      param.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32;
      param.writeValue.value = op.kind == SF_WRITE ? op.value : 0;
      // The default is a system-wide fence before the write: a peer that sees the flag sees what
      // this stream's earlier copies wrote. A batch takes no other.
      param.writeValue.flags = CU_STREAM_WRITE_VALUE_DEFAULT;
    }
    params_.push_back(param);
  }
  first_param_.push_back(params_.size());
}

int sf_program::destroy_events() {
  int status = SF_OK;
  for (cudaEvent_t event : events_) {
    const int destroyed = check(cudaEventDestroy(event), "cudaEventDestroy");
    if (status == SF_OK) status = destroyed;
  }
  events_.clear();
  return status;
}

int sf_program::run(int begin, int end, const uint64_t* bases, int num_bases,
                    const void* const* streams, int num_streams) {
  if (begin < 0 || end < begin || static_cast<size_t>(end) > ops_.size()) {
    return fail(SF_INVALID_ARGUMENT, "ops must lie in 0 to %zu, got begin=%d end=%d", ops_.size(),
                begin, end);
  }
  if (num_bases < num_bases_ || num_streams < num_streams_ || (num_bases_ > 0 && !bases) ||
      (num_streams_ > 0 && !streams)) {
    return fail(SF_INVALID_ARGUMENT, "the program needs %d bases and %d streams, got %d and %d",
                num_bases_, num_streams_, bases ? num_bases : 0, streams ? num_streams : 0);
  }
  for (int i = begin; i < end;) {
    const void* const handle = streams[ops_[static_cast<size_t>(i)].stream];
    const cudaStream_t stream = static_cast<cudaStream_t>(const_cast<void*>(handle));
    int num_done = 1;
    const int status = step(i, end, bases, stream, &num_done);
    if (status != SF_OK) return located(i, num_done, status);
    i += num_done;
  }
  return SF_OK;
}

// Enqueues op `index` and those that go out with it; *num_done says how many.
int sf_program::step(int index, int end, const uint64_t* bases, cudaStream_t stream,
                     int* num_done) {
  const size_t i = static_cast<size_t>(index);
  const sf_op& op = ops_[i];
  const int together = std::min(run_length_[i], end - index);
  switch (op.kind) {
    case SF_COPY:
      return copies_[i].enqueue(source(op, bases), destination(op, bases), stream);
    case SF_COPY_KERNEL:
      SF_TRY(run_copies(index, index + together, bases, stream, num_done));
      if (*num_done > 0) return SF_OK;
      *num_done = 1;
      return copies_[i].enqueue(source(op, bases), destination(op, bases), stream);
    case SF_WRITE:
    case SF_WAIT:
    case SF_CLEAR:
      *num_done = std::min(together, kMaxFlagOpsPerBatch);
      return run_flags(index, index + *num_done, bases, stream);
    case SF_RECORD:
      return check(cudaEventRecord(events_[static_cast<size_t>(op.event)], stream),
                   "cudaEventRecord");
    case SF_WAIT_EVENT:
      return check(cudaStreamWaitEvent(stream, events_[static_cast<size_t>(op.event)], 0),
                   "cudaStreamWaitEvent");
    default:
      return fail(SF_INVALID_ARGUMENT, "unknown kind");  // create refused it
  }
}

int sf_program::run_flags(int begin, int end, const uint64_t* bases, cudaStream_t stream) {
  const size_t first = static_cast<size_t>(begin), last = static_cast<size_t>(end);
  const bool single = (options_.flags & SF_SINGLE_FLAG_OPS) != 0;
  for (size_t i = first; i < last; ++i) {
    const sf_op& op = ops_[i];
    const uint64_t address = op.kind == SF_WAIT ? source(op, bases) : destination(op, bases);
    if (single) {
      SF_TRY(run_one_flag(op, address, stream));
      continue;
    }
    // address lies at one offset in every member of the union.
    for (size_t p = first_param_[i]; p < first_param_[i + 1]; ++p) {
      params_[p].writeValue.address = address;
    }
  }
  if (single) return SF_OK;
  const size_t count = first_param_[last] - first_param_[first];
  return driver_check(
      driver_.batch(stream, static_cast<unsigned>(count), &params_[first_param_[first]], 0),
      "cuStreamBatchMemOp");
}

int sf_program::run_one_flag(const sf_op& op, uint64_t address, CUstream stream) const {
  if (op.kind == SF_WAIT) {
    return driver_check(driver_.wait(stream, address, op.value, CU_STREAM_WAIT_VALUE_EQ),
                        "cuStreamWaitValue32");
  }
  const uint32_t value = op.kind == SF_WRITE ? op.value : 0;
  return driver_check(driver_.write(stream, address, value, CU_STREAM_WRITE_VALUE_DEFAULT),
                      "cuStreamWriteValue32");
}

// One kernel for as many of the copies as it takes; *num_done says how many, 0 if it takes none.
int sf_program::run_copies(int begin, int end, const uint64_t* bases, cudaStream_t stream,
                           int* num_done) {
  sf_pack_args args;
  args.reserved = 0;
  int count = 0;
  for (int i = begin; i < end && count < SF_MAX_PACK_ITEMS; ++i, ++count) {
    const sf_op& op = ops_[static_cast<size_t>(i)];
    const sf::Copy& copy = copies_[static_cast<size_t>(i)];
    sf_pack_item* const item = &args.items[count];
    if (!copy.as_pack_item(item)) break;
    item->src = reinterpret_cast<const void*>(source(op, bases));
    item->dst = reinterpret_cast<void*>(destination(op, bases));
  }
  *num_done = count;
  if (count == 0) return SF_OK;
  args.num_items = count;
  return sf_pack(&args, stream);
}

int sf_program::driver_check(CUresult result, const char* call) const {
  if (result == CUDA_SUCCESS) return SF_OK;
  const char* text = nullptr;
  if (driver_.error_string(result, &text) != CUDA_SUCCESS || !text) text = "unknown error";
  return fail(SF_CUDA_ERROR, "%s: %s (%d)", call, text, static_cast<int>(result));
}

int sf_program::located(int index, int num_done, int status) const {
  const sf_op& op = ops_[static_cast<size_t>(index)];
  const char* const kind =
      op.kind >= SF_COPY && op.kind <= SF_COPY_KERNEL ? kKindNames[op.kind] : "unknown";
  if (num_done > 1) {
    sf::add_context("ops %d to %d (from %s, stream %d)", index, index + num_done - 1, kind,
                    op.stream);
  } else {
    sf::add_context("op %d (%s, stream %d)", index, kind, op.stream);
  }
  return status;
}

extern "C" {

int sf_program_create(const sf_op* ops, int num_ops, int num_events,
                      const sf_program_options* options, sf_program** out) {
  if (!out || num_ops < 0 || num_events < 0 || (num_ops > 0 && !ops)) {
    return fail(SF_INVALID_ARGUMENT,
                "sf_program_create: NULL ops or out, or num_ops=%d, num_events=%d negative",
                num_ops, num_events);
  }
  const sf_program_options chosen = options ? *options : sf_program_options{};
  const uint32_t known = SF_SINGLE_FLAG_OPS | SF_PLANE_LOOP;
  if ((chosen.flags & ~known) != 0 || chosen.reserved != 0) {
    return fail(SF_INVALID_ARGUMENT, "sf_program_create: unknown option bits 0x%x, reserved %u",
                chosen.flags, chosen.reserved);
  }
  try {
    auto program = std::make_unique<sf_program>();
    SF_TRY(program->create(ops, num_ops, num_events, chosen));
    *out = program.release();
    return SF_OK;
  } catch (const std::bad_alloc&) {
    return fail(SF_OUT_OF_MEMORY, "sf_program_create: no memory for %d ops", num_ops);
  }
}

int sf_program_destroy(sf_program* program) {
  if (!program) return SF_OK;
  const int status = program->destroy_events();
  delete program;
  return status;
}

int sf_program_run(sf_program* program, int begin, int end, const uint64_t* bases, int num_bases,
                   const void* const* streams, int num_streams) {
  if (!program) return fail(SF_INVALID_ARGUMENT, "sf_program_run: program is NULL");
  return program->run(begin, end, bases, num_bases, streams, num_streams);
}

}  // extern "C"

// Handlers of dsv4.program: calls of other targets, one after another, as one call. On the CPU that
// is all. On a GPU their launches stand side by side in one graph, so that a kernel may begin while
// the one ahead ends, and those of a second lane run beside the first one's.
//
// Operands: what the calls read and nothing in the program makes. Results: what they make, scratch
// included; one that is an operand written in place shares its buffer. `code` says which call has
// what (dsv4_jax/program.py writes it): the number of calls, then of each
//
//   target, lane, signals
//   n, then calls that it waits for before it begins
//   n, then calls that it waits for before its last launches (AwaitLate)
//   operands, then results: n, then of each buffer, rank, dims
//   attributes: n, then of each name, is_float, bits
//
// Targets and names of attributes index `names`, which has a line each; buffers count operands of
// the program first. Calls that others wait for have `signals`.
#include <algorithm>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/program.h"
#include "targets.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "program";
constexpr int kLanes = 2;

LaunchCounts counts;

// What the calls need of the frame of their caller.
struct Caller {
  const XLA_FFI_Api* api;
  XLA_FFI_ExecutionContext* context;
};

}  // namespace
}  // namespace dsv4

template <>
struct xla::ffi::CtxDecoding<dsv4::Caller> {
  using Type = dsv4::Caller;
  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine&) {
    return dsv4::Caller{api, context};
  }
};

namespace dsv4 {
namespace {

using Code = ffi::Span<const int32_t>;

// Gives 0 once it has failed.
class Reader {
 public:
  explicit Reader(Code code) : at_(code.begin()), end_(code.end()) {}

  int32_t Next() {
    if (at_ == end_) Fail(kEndsWithin);
    return failed() ? 0 : *at_++;
  }
  // Below `limit`.
  int32_t Next(size_t limit, const char* what) {
    const int32_t value = Next();
    if (!failed() && (value < 0 || static_cast<size_t>(value) >= limit)) {
      Fail(std::string(what) + " must be in [0, " + std::to_string(limit) + "), got " +
           std::to_string(value));
    }
    return failed() ? 0 : value;
  }
  // Of things that take a number each or more.
  size_t Count() {
    const int32_t value = Next();
    if (value < 0 || static_cast<size_t>(value) > left()) Fail(kEndsWithin);
    return failed() ? 0 : static_cast<size_t>(value);
  }
  void Fail(std::string why) {
    if (why_.empty()) why_ = std::move(why);
  }
  bool failed() const { return !why_.empty(); }
  const std::string& why() const { return why_; }
  size_t left() const { return static_cast<size_t>(end_ - at_); }

 private:
  static constexpr char kEndsWithin[] = "code must hold all of its calls, it ends within one";
  const int32_t *at_, *end_;
  std::string why_;
};

// One call, and the frame that its handler reads, which points into this.
struct Call {
  const Target* target = nullptr;
  int lane = 0;
  bool signals = false;
  std::vector<int32_t> waits, late;
  std::vector<int32_t> read, made;  // buffers
  std::vector<int64_t> dims;
  std::vector<XLA_FFI_Buffer> buffers;
  std::vector<void*> operands, results, attributes;
  std::vector<XLA_FFI_ArgType> operand_types;
  std::vector<XLA_FFI_RetType> result_types;
  std::vector<XLA_FFI_AttrType> attribute_types;
  std::vector<XLA_FFI_ByteSpan> names;
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  std::vector<int32_t> values;
  std::vector<XLA_FFI_Scalar> scalars;
};

struct Buffer {
  void* data;
  ffi::DataType dtype;
  int64_t elements;
};

std::vector<std::string_view> Lines(std::string_view text) {
  std::vector<std::string_view> lines;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    lines.push_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return lines;
}

const Target* Find(std::string_view name) {
  static const auto targets = Targets();
  for (const Target& target : targets) {
    if (name == target.name && name != "dsv4.program") return &target;
  }
  return nullptr;
}

// Calls before this one.
void ReadCalls(Reader& reader, size_t before, std::vector<int32_t>& calls) {
  const size_t n = reader.Count();
  for (size_t i = 0; i < n && !reader.failed(); ++i) {
    calls.push_back(reader.Next(before, "call to wait for"));
  }
}

// Shapes of buffers, whose data and dtypes are known already.
void ReadBuffers(Reader& reader, const std::vector<Buffer>& buffers, std::vector<int32_t>& which,
                 Call& call) {
  const size_t n = reader.Count();
  for (size_t i = 0; i < n && !reader.failed(); ++i) {
    const int32_t buffer = reader.Next(buffers.size(), "buffer");
    const size_t rank = reader.Count();
    if (reader.failed()) return;
    const Buffer& from = buffers[static_cast<size_t>(buffer)];
    int64_t elements = 1;
    for (size_t d = 0; d < rank; ++d) {
      const int32_t dim = reader.Next(size_t{1} << 31, "dim");
      // Short of overflow: no buffer has as many.
      elements = elements > INT64_MAX / (int64_t{dim} + 1) ? INT64_MAX : elements * dim;
      call.dims.push_back(dim);
    }
    if (!reader.failed() && elements != from.elements) {
      reader.Fail("buffer " + std::to_string(buffer) + " must have its shape's " +
                  std::to_string(elements) + " elements, got " + std::to_string(from.elements));
    }
    if (reader.failed()) return;
    XLA_FFI_Buffer view = {};
    view.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    view.rank = static_cast<int64_t>(rank);
    view.data = from.data;
    view.dtype = static_cast<XLA_FFI_DataType>(from.dtype);
    call.buffers.push_back(view);
    which.push_back(buffer);
  }
}

void ReadAttributes(Reader& reader, const std::vector<std::string_view>& names, Call& call) {
  const size_t n = reader.Count();
  for (size_t i = 0; i < n && !reader.failed(); ++i) {
    const int32_t name = reader.Next(names.size(), "name");
    const bool is_float = reader.Next(2, "is_float") != 0;
    call.values.push_back(reader.Next());
    if (reader.failed()) return;
    const std::string_view text = names[static_cast<size_t>(name)];
    call.names.push_back({text.data(), text.size()});
    call.scalars.push_back({is_float ? XLA_FFI_DataType_F32 : XLA_FFI_DataType_S32, nullptr});
  }
}

// Pointers into the call, once nothing in it moves any more.
void Connect(Call& call) {
  int64_t* dims = call.dims.data();
  for (XLA_FFI_Buffer& view : call.buffers) {
    view.dims = dims;
    dims += view.rank;
  }
  const size_t n = call.read.size();
  for (size_t i = 0; i < call.buffers.size(); ++i) {
    (i < n ? call.operands : call.results).push_back(&call.buffers[i]);
  }
  call.operand_types.assign(n, XLA_FFI_ArgType_BUFFER);
  call.result_types.assign(call.made.size(), XLA_FFI_RetType_BUFFER);
  call.attribute_types.assign(call.scalars.size(), XLA_FFI_AttrType_SCALAR);
  for (size_t i = 0; i < call.scalars.size(); ++i) {
    call.scalars[i].value = &call.values[i];
    call.name_pointers.push_back(&call.names[i]);
    call.attributes.push_back(&call.scalars[i]);
  }
}

// Runs a call's handler in its caller's place.
ffi::Error Run(const Caller& caller, XLA_FFI_Handler* handler, Call& call) {
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = caller.api;
  frame.ctx = caller.context;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(call.operands.size()),
                call.operand_types.data(), call.operands.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(call.results.size()),
                call.result_types.data(), call.results.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE,
                 nullptr,
                 static_cast<int64_t>(call.attributes.size()),
                 call.attribute_types.data(),
                 call.name_pointers.data(),
                 call.attributes.data()};
  XLA_FFI_Error* const error = handler(&frame);
  if (error == nullptr) return ffi::Error::Success();
  std::string message = ffi::internal::GetErrorMessage(caller.api, error);
  ffi::internal::DestroyError(caller.api, error);
  // XLA, which decodes the frame, names no op.
  if (message.rfind("dsv4.", 0) != 0) message = std::string(call.target->name) + ": " + message;
  return ffi::Error(ffi::ErrorCode::kInternal, message);
}

ffi::Error Parse(int32_t abi, std::string_view names, Code code, const ffi::RemainingArgs& operands,
                 const ffi::RemainingRets& results, std::vector<Buffer>& buffers,
                 std::vector<Call>& calls) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, abi));
  const std::vector<std::string_view> lines = Lines(names);
  for (size_t i = 0; i < operands.size(); ++i) {
    auto operand = operands.get<ffi::AnyBuffer>(i);
    if (!operand) return InvalidArgument(kOp, "operands must be buffers");
    buffers.push_back({operand->untyped_data(), operand->element_type(),
                       static_cast<int64_t>(operand->element_count())});
  }
  for (size_t i = 0; i < results.size(); ++i) {
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!result) return InvalidArgument(kOp, "results must be buffers");
    buffers.push_back({(*result)->untyped_data(), (*result)->element_type(),
                       static_cast<int64_t>((*result)->element_count())});
  }
  Reader reader(code);
  calls.resize(reader.Count());
  for (size_t i = 0; i < calls.size() && !reader.failed(); ++i) {
    Call& call = calls[i];
    const size_t target = static_cast<size_t>(reader.Next(lines.size(), "target"));
    if (reader.failed()) break;
    call.target = Find(lines[target]);
    if (call.target == nullptr) {
      return InvalidArgument(
          kOp, "calls must be of this library's targets, got " + std::string(lines[target]));
    }
    call.lane = reader.Next(kLanes, "lane");
    call.signals = reader.Next(2, "signals") != 0;
    ReadCalls(reader, i, call.waits);
    ReadCalls(reader, i, call.late);
    ReadBuffers(reader, buffers, call.read, call);
    ReadBuffers(reader, buffers, call.made, call);
    ReadAttributes(reader, lines, call);
    Connect(call);
  }
  if (!reader.failed() && reader.left() > 0) reader.Fail("code must end with its last call");
  if (reader.failed()) return InvalidArgument(kOp, reader.why());
  return ffi::Error::Success();
}

ffi::Error CpuImpl(Caller caller, int32_t abi, std::string_view names, Code code,
                   ffi::RemainingArgs operands, ffi::RemainingRets results) {
  std::vector<Buffer> buffers;
  std::vector<Call> calls;
  DSV4_RETURN_IF_ERROR(Parse(abi, names, code, operands, results, buffers, calls));
  for (Call& call : calls) DSV4_RETURN_IF_ERROR(Run(caller, call.target->cpu, call));
  return ffi::Error::Success();
}

#ifdef DSV4_CUDA

// The second lane's stream and the events of a device; one program at a time is launched there.
struct Lanes {
  std::mutex mutex;
  cudaStream_t side = nullptr;
  std::vector<cudaEvent_t> events;

  cudaError_t Prepare(size_t n_events) {
    // May be called while a stream is captured: nothing made here has to do with that.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaError_t error = cudaSuccess;
    if (side == nullptr) error = cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking);
    while (error == cudaSuccess && events.size() < n_events) {
      cudaEvent_t event = nullptr;
      error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
      if (error == cudaSuccess) events.push_back(event);
    }
    cudaThreadExchangeStreamCaptureMode(&mode);
    return error;
  }
};

Lanes& LanesOf(int device) {
  constexpr int kMaxDevices = 64;
  static Lanes lanes[kMaxDevices];
  return lanes[device % kMaxDevices];
}

thread_local cudaStream_t side_stream = nullptr;

XLA_FFI_Error* GetSideStream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = side_stream;
  return nullptr;
}

// The caller's, but for its stream.
struct SideApi {
  std::vector<char> bytes;
  explicit SideApi(const XLA_FFI_Api& api)
      : bytes(reinterpret_cast<const char*>(&api),
              reinterpret_cast<const char*>(&api) + api.struct_size) {
    reinterpret_cast<XLA_FFI_Api*>(bytes.data())->XLA_FFI_Stream_Get = GetSideStream;
  }
  const XLA_FFI_Api* get() const { return reinterpret_cast<const XLA_FFI_Api*>(bytes.data()); }
};

struct ProgramScope {
  Program program;
  ProgramScope() { CurrentProgram() = &program; }
  ~ProgramScope() { CurrentProgram() = nullptr; }
};

// Launches the calls into the lanes. Returns the first error of CUDA, or in `failed` a call's.
cudaError_t Launch(const Caller& caller, cudaStream_t stream, const std::vector<Buffer>& buffers,
                   size_t n_operands, std::vector<Call>& calls, ffi::Error& failed) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  // A call at a time has to be over before the next is launched: the second lane is of no use.
  const bool one_lane = SyncAfterLaunch().load(std::memory_order_relaxed);
  bool forks = false;
  for (Call& call : calls) {
    if (one_lane) call.lane = 0;
    forks = forks || call.lane > 0;
  }
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  error = cudaStreamIsCapturing(stream, &capture);
  if (error != cudaSuccess) return error;
  const bool eager = capture == cudaStreamCaptureStatusNone;
  Lanes& lanes = LanesOf(device);
  const std::lock_guard<std::mutex> lock(lanes.mutex);
  const size_t n = calls.size();
  if (forks) error = lanes.Prepare(n + 2);
  if (error != cudaSuccess) return error;

  ProgramScope scope;
  Program& program = scope.program;
  program.settled.reserve(n_operands);
  for (size_t i = 0; i < n_operands; ++i) program.settled.push_back(buffers[i].data);
  std::vector<const void*> written;
  for (const Call& call : calls) {
    for (int32_t made : call.made) written.push_back(buffers[static_cast<size_t>(made)].data);
  }
  std::sort(written.begin(), written.end());
  program.settled.erase(std::remove_if(program.settled.begin(), program.settled.end(),
                                       [&](const void* operand) {
                                         return std::binary_search(written.begin(), written.end(),
                                                                   operand);
                                       }),
                        program.settled.end());
  std::sort(program.settled.begin(), program.settled.end());

  side_stream = lanes.side;
  const SideApi side(*caller.api);
  const Caller callers[kLanes] = {caller, {side.get(), caller.context}};
  const cudaStream_t streams[kLanes] = {stream, lanes.side};
  if (forks) {
    error = cudaEventRecord(lanes.events[n], stream);
    if (error == cudaSuccess) error = cudaStreamWaitEvent(lanes.side, lanes.events[n], 0);
    if (error != cudaSuccess) return error;
  }
  const auto event_of = [&](int32_t call) { return lanes.events[static_cast<size_t>(call)]; };
  program.joins_wait = eager;
  bool begun[kLanes] = {};
  for (size_t i = 0; i < n && error == cudaSuccess; ++i) {
    Call& call = calls[i];
    const cudaStream_t on = streams[call.lane];
    const auto elsewhere = [&](int32_t other) {
      return calls[static_cast<size_t>(other)].lane != call.lane;
    };
    // Of the first in a lane, and of one behind an event outside of a graph, it is not known what
    // is ahead.
    program.barrier = !begun[call.lane] && (call.lane == 0 || eager);
    begun[call.lane] = true;
    for (int32_t other : call.waits) {
      if (!elsewhere(other)) continue;
      program.barrier = program.barrier || program.joins_wait;
      if (error == cudaSuccess) error = cudaStreamWaitEvent(on, event_of(other), 0);
    }
    for (int32_t other : call.late) {
      if (elsewhere(other)) program.late.push_back(event_of(other));
    }
    if (error != cudaSuccess) break;
    if (ffi::Error result = Run(callers[call.lane], call.target->cuda, call); result.failure()) {
      failed = result;
      break;
    }
    error = AwaitLate(on);  // if the op did not
    if (error == cudaSuccess && forks && call.signals) error = cudaEventRecord(lanes.events[i], on);
  }
  // Whatever happened, a capture must end in the stream that it began in.
  if (forks) {
    const cudaError_t recorded = cudaEventRecord(lanes.events[n + 1], lanes.side);
    if (error == cudaSuccess) error = recorded;
    const cudaError_t joined = cudaStreamWaitEvent(stream, lanes.events[n + 1], 0);
    if (error == cudaSuccess) error = joined;
  }
  return error;
}

#endif

ffi::Error CudaImpl(CudaStream stream, [[maybe_unused]] Caller caller, int32_t abi,
                    std::string_view names, Code code, ffi::RemainingArgs operands,
                    ffi::RemainingRets results) {
  std::vector<Buffer> buffers;
  std::vector<Call> calls;
  DSV4_RETURN_IF_ERROR(Parse(abi, names, code, operands, results, buffers, calls));
  ffi::Error failed = ffi::Error::Success();
  ffi::Error launched = LaunchCuda(kOp, stream, counts, [&](cudaStream_t on) {
    return Launch(caller, on, buffers, operands.size(), calls, failed);
  });
  return failed.failure() ? failed : launched;
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Ctx<Caller>()
      .Attr<int32_t>("abi")
      .Attr<std::string_view>("names")
      .Attr<Code>("code")
      .RemainingArgs()
      .RemainingRets();
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<Caller>()
                           .Attr<int32_t>("abi")
                           .Attr<std::string_view>("names")
                           .Attr<Code>("code")
                           .RemainingArgs()
                           .RemainingRets());
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target ProgramTarget() { return {"dsv4.program", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4

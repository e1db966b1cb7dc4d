// torch's own CUDA caching allocator on a pretended CUDA runtime: addresses are numbers, no memory is behind them.
// Linked with the installed libc10_cuda, whose calls of CUDA end in the functions below. Like AddressSpace in
// vdnn/sim/allocator/driver.py, the lowest free address is taken. Streams are numbers; "finish" ends their events.
//
//     pretended_cuda CAPACITY FRACTION < calls      malloc ID SIZE STREAM | free ID | use ID STREAM | finish STREAM | empty
//
// prints every event (E), every segment (S) with its blocks (B), and the statistics (N).
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>
#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime_api.h>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <string>
#include <vector>

static size_t capacity = size_t(1) << 44, used = 0;
static const size_t kAlign = 2 << 20, kFirst = 0x7F0000000000;
static std::map<size_t, size_t> gaps{{kFirst, kFirst + (size_t(1) << 46)}};
static std::map<size_t, size_t> segments;
struct FakeEvent { size_t stream = 0, number = 0; };
static std::map<size_t, size_t> recorded, passed;
static size_t upto(size_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

extern "C" {
cudaError_t cudaMalloc(void** p, size_t size) {
  if (used + size > capacity) return cudaErrorMemoryAllocation;
  for (auto it = gaps.begin(); it != gaps.end(); ++it) {
    size_t start = it->first, end = it->second;
    if (end - start >= upto(size)) {
      gaps.erase(it);
      if (start + upto(size) < end) gaps[start + upto(size)] = end;
      used += size; segments[start] = size; *p = (void*)start;
      return cudaSuccess;
    }
  }
  return cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* p) {
  size_t start = (size_t)p;
  if (!start) return cudaSuccess;
  auto it = segments.find(start);
  if (it == segments.end()) { fprintf(stderr, "cudaFree of no segment\n"); abort(); }
  used -= it->second;
  size_t end = start + upto(it->second);
  segments.erase(it);
  auto after = gaps.find(end);
  if (after != gaps.end()) { end = after->second; gaps.erase(after); }
  for (auto g = gaps.begin(); g != gaps.end(); ++g) if (g->second == start) { start = g->first; gaps.erase(g); break; }
  gaps[start] = end;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* f, size_t* t) { *f = capacity - used; *t = capacity; return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* n) { *n = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int* d) { *d = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* a, int* b) { *a = 0; *b = -1; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) { memset(p, 0, sizeof *p); p->totalGlobalMem = capacity; p->major = 9; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) { *s = cudaStreamCaptureStatusNone; return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* s, unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) { *s = cudaStreamCaptureStatusNone; if (id) *id = 0; return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { *e = (cudaEvent_t) new FakeEvent; return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { auto f = (FakeEvent*)e; f->stream = (size_t)s; f->number = ++recorded[(size_t)s]; return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t e) { auto f = (FakeEvent*)e; return f->number <= passed[f->stream] ? cudaSuccess : cudaErrorNotReady; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "error"; }
const char* cudaGetErrorName(cudaError_t) { return "error"; }
}

namespace c10::cuda::_internal { void setHasPrimaryContext(bool (*func)(c10::DeviceIndex)); }
using namespace c10::cuda;
namespace A = c10::cuda::CUDACachingAllocator;
static const char* names[] = {"alloc","free_requested","free_completed","segment_alloc","segment_free","segment_map","segment_unmap","snapshot","oom","annotate"};

int main(int argc, char** argv) {
  if (argc > 1) capacity = strtoull(argv[1], 0, 10);
  c10::cuda::_internal::setHasPrimaryContext([](c10::DeviceIndex) { return true; });
  A::init(1);
  double fraction = argc > 2 ? atof(argv[2]) : 0;
  if (fraction > 0) A::setMemoryFraction(fraction, 0);
  A::recordHistory(true, nullptr, 10000000, c10::CachingDeviceAllocator::RecordContext::NEVER, true, {});
  std::map<long, c10::DataPtr> live;
  std::string call;
  auto stream_of = [](long s) { return s ? getStreamFromExternal((cudaStream_t)s, 0) : getDefaultCUDAStream(0); };
  while (std::cin >> call) {
    long a, b, c;
    if (call == "malloc") {
      std::cin >> a >> b >> c;
      setCurrentCUDAStream(stream_of(c));
      try { live[a] = A::get()->allocate(b); } catch (const c10::OutOfMemoryError&) { }
    } else if (call == "free") { std::cin >> a; live.erase(a); }
    else if (call == "use") { std::cin >> a >> b; if (live.count(a)) A::recordStream(live[a], stream_of(b)); }
    else if (call == "finish") { std::cin >> a; passed[a] = recorded[a]; }
    else if (call == "empty") A::emptyCache();
  }
  auto info = A::get()->snapshot();
  for (auto& te : info.device_traces[0])
    if (te.action_ != c10::CachingDeviceAllocator::TraceEntry::SNAPSHOT)
      printf("E %s %zu %zu %zu\n", names[te.action_], te.addr_, te.size_, (size_t)te.stream_);
  for (auto& s : info.segments) {
    printf("S %zu %zu %zu %d\n", s.address, s.total_size, (size_t)s.stream, (int)s.is_large);
    for (auto& b : s.blocks) printf("B %zu %zu %d\n", b.size, b.active ? b.requested_size : 0, b.allocated ? 1 : b.active ? 2 : 0);
  }
  auto st = A::getDeviceStats(0);
  const char* pools[] = {"all", "small_pool", "large_pool"};
  auto out = [&](const char* n, auto& arr) { for (int i = 0; i < 3; i++) printf("N %s.%s.current %" PRId64 "\nN %s.%s.peak %" PRId64 "\n", n, pools[i], arr[i].current, n, pools[i], arr[i].peak); };
  out("allocation", st.allocation); out("segment", st.segment); out("active", st.active); out("inactive_split", st.inactive_split);
  out("allocated_bytes", st.allocated_bytes); out("reserved_bytes", st.reserved_bytes); out("active_bytes", st.active_bytes);
  out("inactive_split_bytes", st.inactive_split_bytes); out("requested_bytes", st.requested_bytes);
  printf("N num_alloc_retries %" PRId64 "\nN num_ooms %" PRId64 "\nN num_sync_all_streams %" PRId64 "\nN num_device_alloc %" PRId64 "\nN num_device_free %" PRId64 "\n", st.num_alloc_retries, st.num_ooms, st.num_sync_all_streams, st.num_device_alloc, st.num_device_free);
  printf("N oversize_allocations.current %" PRId64 "\nN oversize_segments.current %" PRId64 "\n", st.oversize_allocations.current, st.oversize_segments.current);
  fflush(stdout);
  _exit(0);
}

/* The CUDA runtime where there is no GPU: device memory is host memory, kernels do nothing, and every allocation, copy,
 * launch and capture is written down. Compiled against NVIDIA's own headers; what is not here is answered with success
 * by functions that dry_run.py adds. */
#include <cuda_runtime_api.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef cudaGetDeviceProperties
#undef cudaStreamGetCaptureInfo

static char *text;
static size_t used, room;
static const char *who = "ort";
static int capturing, capability = 90;

static void note(const char *format, ...) {
  char line[512];
  va_list given;
  va_start(given, format);
  int n = snprintf(line, sizeof line, "%s ", who);
  n += vsnprintf(line + n, sizeof line - n - 2, format, given);
  va_end(given);
  if (n > (int)sizeof line - 2) n = sizeof line - 2;
  line[n++] = '\n';
  if (used + n + 1 > room) text = realloc(text, room = 2 * (used + n + 1));
  memcpy(text + used, line, n);
  text[used += n] = 0;
}

/* For dry_run.py: what happened since the last call; whose calls follow; the GPU to be. */
const char *stand_in_take(void) { used = 0; return text ? text : ""; }
void stand_in_who(const char *name) { who = name; }
void stand_in_capability(int value) { capability = value; }

/* What nvcc's host code calls. */
void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **h, char *a, char *b, const char *c, int d, size_t e, int f, int g) {}
static struct { const void *key; const char *name; } *kernels;
static size_t count, space;
void __cudaRegisterFunction(void **h, const char *key, char *f, const char *name, int l, uint3 *t, uint3 *b, dim3 *bd,
                            dim3 *gd, int *w) {
  if (count == space) kernels = realloc(kernels, (space = space ? 2 * space : 65536) * sizeof *kernels);
  kernels[count].key = key;
  kernels[count++].name = strdup(name);
}
static const char *kernel(const void *key) {
  for (size_t i = 0; i < count; i++)
    if (kernels[i].key == key) return kernels[i].name;
  return "unknown";
}
cudaError_t __cudaGetKernel(void **found, const void *key) { *found = (void *)key; return 0; }
static dim3 grid, block;
static size_t shared;
static void *stream_of;
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, void *t) {
  grid = g, block = b, shared = s, stream_of = t;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *s, void *t) {
  *g = grid, *b = block, *s = shared, *(void **)t = stream_of;
  return 0;
}
static cudaError_t launch(const void *key) { note("launch %s", kernel(key)); return 0; }
cudaError_t __cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, void *t) { return launch(f); }
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) { return launch(f); }
cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) {
  return launch(f);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return launch(f); }

/* The device: one H100, as far as ONNX Runtime asks. */
cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return 0; }
cudaError_t cudaGetDevice(int *n) { *n = 0; return 0; }
cudaError_t cudaRuntimeGetVersion(int *n) { *n = CUDART_VERSION; return 0; }
cudaError_t cudaDriverGetVersion(int *n) { *n = CUDART_VERSION; return 0; }
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int device) {
  switch (a) {
    case cudaDevAttrComputeCapabilityMajor: *v = capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *v = capability % 10; break;
    case cudaDevAttrMultiProcessorCount: *v = 132; break;
    case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = 232448; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = 2048; break;
    default: *v = 1;
  }
  return 0;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "stand-in");
  p->totalGlobalMem = 80ull << 30;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = 65536, p->warpSize = 32, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = capability / 10, p->minor = capability % 10;
  p->multiProcessorCount = 132, p->l2CacheSize = 50 << 20;
  return 0;
}
int stand_in_major(void) { return capability / 10; }
int stand_in_minor(void) { return capability % 10; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->binaryVersion = capability;
  return 0;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *at) {
  memset(a, 0, sizeof *a);
  a->type = cudaMemoryTypeDevice, a->devicePointer = (void *)at;
  return 0;
}
const char *cudaGetErrorName(cudaError_t e) { return "stand-in"; }
const char *cudaGetErrorString(cudaError_t e) { return "stand-in"; }

/* Memory. */
cudaError_t cudaMalloc(void **at, size_t n) {
  note("malloc %zu", n);
  size_t size = (n + 255) / 256 * 256 + 256;
  memset(*at = aligned_alloc(256, size), 0, size);
  return 0;
}
cudaError_t cudaFree(void *at) { free(at); return 0; }
cudaError_t cudaMallocFromPoolAsync(void **at, size_t n, cudaMemPool_t p, cudaStream_t s) { return cudaMalloc(at, n); }
cudaError_t cudaFreeAsync(void *at, cudaStream_t s) { return cudaFree(at); }
cudaError_t cudaMallocHost(void **at, size_t n) { *at = calloc(1, n ? n : 1); return 0; }
cudaError_t cudaHostAlloc(void **at, size_t n, unsigned flags) { return cudaMallocHost(at, n); }
cudaError_t cudaFreeHost(void *at) { free(at); return 0; }
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) { *left = 70ull << 30, *all = 80ull << 30; return 0; }
static cudaError_t copy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) {
  static const char *names[] = {"H2H", "H2D", "D2H", "D2D", "any"};
  note("copy-%s %zu", names[kind], n);
  memmove(to, from, n);
  return 0;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind k) { return copy(to, from, n, k); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k, cudaStream_t s) {
  return copy(to, from, n, k);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t tp, const void *from, size_t fp, size_t w, size_t h,
                              enum cudaMemcpyKind kind, cudaStream_t s) {
  note("copy-%s %zu", kind == cudaMemcpyDeviceToDevice ? "D2D" : "any", w * h);
  for (size_t i = 0; i < h; i++) memmove((char *)to + i * tp, (const char *)from + i * fp, w);
  return 0;
}
cudaError_t cudaMemcpyFromSymbol(void *to, const void *f, size_t n, size_t o, enum cudaMemcpyKind k) {
  memset(to, 0, n);
  return 0;
}
cudaError_t cudaMemset(void *at, int v, size_t n) { memset(at, v, n); return 0; }
cudaError_t cudaMemsetAsync(void *at, int v, size_t n, cudaStream_t s) { memset(at, v, n); return 0; }

/* Streams, events and graphs are 16 bytes that nobody looks into. */
static cudaError_t handle(void **h) { *h = calloc(1, 16); return 0; }
cudaError_t cudaStreamCreate(cudaStream_t *s) { return handle((void **)s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { return handle((void **)s); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { note("sync"); return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return handle((void **)e); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { return handle((void **)e); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1; return 0; }
cudaError_t cudaMemPoolCreate(cudaMemPool_t *p, const struct cudaMemPoolProps *q) { return handle((void **)p); }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *now) {
  *now = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return 0;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) {
  note("capture-begin");
  capturing = 1;
  return 0;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
  note("capture-end");
  capturing = 0;
  return handle((void **)g);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long f) { return handle((void **)x); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s) { note("graph-launch"); return 0; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned l) {
  *n = 2;
  return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v, unsigned long long l,
                                             enum cudaDriverEntryPointQueryResult *q) {
  *f = 0;
  if (q) *q = cudaDriverEntryPointSymbolNotFound;
  return 0;
}

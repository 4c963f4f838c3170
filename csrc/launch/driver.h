// NVIDIA's driver, which is looked for when it is first asked for: nothing is linked to it, and the
// module loads where there is none.
#pragma once
#include <cuda.h>
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <mutex>

// By the versions that glibc 2.34 moved into libc, so that older ones serve too.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver dlopen,dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");
__asm__(".symver dlerror,dlerror@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver dlopen,dlopen@GLIBC_2.17");
__asm__(".symver dlsym,dlsym@GLIBC_2.17");
__asm__(".symver dlerror,dlerror@GLIBC_2.17");
#endif

#define FASTSEQ_DRIVER(X) \
  X(cuDriverGetVersion) \
  X(cuInit) \
  X(cuGetErrorName) \
  X(cuGetErrorString) \
  X(cuDeviceGetAttribute) \
  X(cuCtxGetDevice) \
  X(cuCtxSetCurrent) \
  X(cuDevicePrimaryCtxGetState) \
  X(cuDevicePrimaryCtxRetain) \
  X(cuThreadExchangeStreamCaptureMode) \
  X(cuLibraryLoadData) \
  X(cuLibraryGetKernel) \
  X(cuKernelGetFunction) \
  X(cuFuncLoad) \
  X(cuKernelGetAttribute) \
  X(cuKernelSetAttribute) \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessor) \
  X(cuOccupancyMaxActiveClusters) \
  X(cuLaunchKernelEx)

namespace {

struct Driver {
#define FASTSEQ_FUNCTION(name) decltype(&::name) name;
  FASTSEQ_DRIVER(FASTSEQ_FUNCTION)
#undef FASTSEQ_FUNCTION
  char reason[512];  // empty, or why there is none

  Driver() {
    reason[0] = '\0';
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      std::snprintf(reason, sizeof reason, "there is no NVIDIA driver (%.300s)", dlerror());
      return;
    }
#define FASTSEQ_FUNCTION(function)                                            \
  function = reinterpret_cast<decltype(function)>(dlsym(library, #function)); \
  if (!function && !reason[0])                                                \
    std::snprintf(reason, sizeof reason, "the NVIDIA driver is too old, it has no " #function);
    FASTSEQ_DRIVER(FASTSEQ_FUNCTION)
#undef FASTSEQ_FUNCTION
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

// What a function of the driver gave, and which one it was.
struct Outcome {
  CUresult code = CUDA_SUCCESS;
  const char* function = "";
  explicit operator bool() const { return code == CUDA_SUCCESS; }
};

#define FASTSEQ_TRY(function, ...)                            \
  do {                                                        \
    const CUresult code = driver().function(__VA_ARGS__);     \
    if (code != CUDA_SUCCESS) return Outcome{code, #function}; \
  } while (false)

// While another thread, or this one, captures a graph, the driver refuses to load but in this mode.
class Relaxed {
 public:
  Relaxed() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }
  ~Relaxed() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

}  // namespace

// The kernels that were compiled, of each cell one image (a unit), and their way onto a device.
//
// An image is loaded when a kernel of it is first launched, for all devices at once; on each device a
// kernel is made ready at its first launch there, or when it takes more shared memory than before. Both
// may happen while a graph is captured. What is ready is launched without a lock.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstring>

#include "../cuda/arguments.h"
#include "../cuda/list.h"
#include "driver.h"

// Each unit's image, from FASTSEQ_IMAGES/<unit>.fatbin.
#define FASTSEQ_IMAGE(unit)                                                          \
  __asm__(".section .rodata\n.balign 64\n"                                           \
          ".global fastseq_image_" #unit "\n.hidden fastseq_image_" #unit "\n"        \
          "fastseq_image_" #unit ":\n.incbin \"" FASTSEQ_IMAGES "/" #unit ".fatbin\"\n" \
          ".global fastseq_end_" #unit "\n.hidden fastseq_end_" #unit "\n"            \
          "fastseq_end_" #unit ":\n.byte 0\n.previous\n");                            \
  extern "C" __attribute__((visibility("hidden"))) const unsigned char                \
      fastseq_image_##unit[], fastseq_end_##unit[];
FASTSEQ_UNITS(FASTSEQ_IMAGE)
#undef FASTSEQ_IMAGE

namespace {

constexpr int MOST_DEVICES = 64;

struct Unit {
  const char* name;
  const unsigned char *begin, *end;
  CUlibrary library = nullptr;  // whoever holds `loading` may look
};

Unit units[] = {
#define FASTSEQ_UNIT(unit) {#unit, fastseq_image_##unit, fastseq_end_##unit},
    FASTSEQ_UNITS(FASTSEQ_UNIT)
#undef FASTSEQ_UNIT
};
constexpr int UNITS = sizeof units / sizeof *units;

enum UnitNumber {
#define FASTSEQ_UNIT(unit) UNIT_##unit,
  FASTSEQ_UNITS(FASTSEQ_UNIT)
#undef FASTSEQ_UNIT
};

struct Kernel {
  const char* name;
  int unit;
  std::atomic<CUkernel> handle{nullptr};
  // 1 + the shared memory, in bytes, that it may have on a device; 0 where it is not ready
  std::atomic<int> ready[MOST_DEVICES]{};
};

Kernel kernels[] = {
#define FASTSEQ_KERNEL(way, cell, Cell, type, HC) {#way "_" #cell "_" #type "_" #HC, UNIT_##cell},
#define FASTSEQ_UNIT(unit) FASTSEQ_KERNELS_##unit(FASTSEQ_KERNEL)
    FASTSEQ_UNITS(FASTSEQ_UNIT)
#undef FASTSEQ_UNIT
#undef FASTSEQ_KERNEL
};
constexpr int KERNELS = sizeof kernels / sizeof *kernels;

// Those of a name, by halving; null where there is none.
Kernel* find_kernel(const char* name) {
  static Kernel* const* const sorted = [] {
    static Kernel* order[KERNELS];
    for (int k = 0; k < KERNELS; ++k) order[k] = kernels + k;
    std::sort(order, order + KERNELS,
              [](const Kernel* a, const Kernel* b) { return std::strcmp(a->name, b->name) < 0; });
    return order;
  }();
  Kernel* const* found =
      std::lower_bound(sorted, sorted + KERNELS, name,
                       [](const Kernel* a, const char* b) { return std::strcmp(a->name, b) < 0; });
  return found < sorted + KERNELS && !std::strcmp((*found)->name, name) ? *found : nullptr;
}

std::mutex loading;

// The caller holds `loading`.
Outcome load(Kernel& kernel) {
  if (kernel.handle.load()) return {};
  Unit& unit = units[kernel.unit];
  if (!unit.library) {
    CUlibraryOption options[] = {CU_LIBRARY_BINARY_IS_PRESERVED};  // the driver makes no copy
    void* values[] = {reinterpret_cast<void*>(1)};
    CUlibrary library;
    FASTSEQ_TRY(cuInit, 0);
    FASTSEQ_TRY(cuLibraryLoadData, &library, unit.begin, nullptr, nullptr, 0, options, values, 1);
    unit.library = library;
  }
  CUkernel handle;
  FASTSEQ_TRY(cuLibraryGetKernel, &handle, unit.library, kernel.name);
  kernel.handle.store(handle);
  return {};
}

bool is_ready(const Kernel& kernel, int device, int shared) {
  return kernel.ready[device].load(std::memory_order_acquire) > shared;
}

// So that the kernel can be launched on the device, whose context is current. The driver would
// otherwise load it at the first launch, which takes memory.
Outcome make_ready(Kernel& kernel, int device, int shared) {
  const std::lock_guard<std::mutex> lock(loading);
  if (is_ready(kernel, device, shared)) return {};  // another thread was quicker
  const Relaxed relaxed;
  const Outcome loaded = load(kernel);
  if (!loaded) return loaded;
  const CUkernel handle = kernel.handle.load();
  if (!is_ready(kernel, device, 0)) {
    CUfunction function;
    FASTSEQ_TRY(cuKernelGetFunction, &function, handle);
    FASTSEQ_TRY(cuFuncLoad, function);
  }
  if (shared)
    FASTSEQ_TRY(cuKernelSetAttribute, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared,
                handle, device);
  kernel.ready[device].store(shared + 1);
  return {};
}

struct Launch {
  unsigned grid[3], threads, shared;
  CUstream stream;
  fastseq::Arguments arguments;
};

Outcome launch_kernel(Kernel& kernel, Launch& launch) {
  CUlaunchConfig config = {};
  config.gridDimX = launch.grid[0], config.gridDimY = launch.grid[1];
  config.gridDimZ = launch.grid[2];
  config.blockDimX = launch.threads, config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = launch.shared;
  config.hStream = launch.stream;
  void* parameters[] = {&launch.arguments};
  FASTSEQ_TRY(cuLaunchKernelEx, &config,
              reinterpret_cast<CUfunction>(kernel.handle.load(std::memory_order_relaxed)),
              parameters, nullptr);
  return {};
}

}  // namespace

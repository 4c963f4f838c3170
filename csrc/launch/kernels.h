// The kernels that were compiled, of each cell one image (a unit), and their way onto a device.
//
// An image is loaded when a kernel of it is first launched, for all devices at once. On each device
// a kernel is made ready at its first launch there, and again when it takes more shared memory, or
// larger clusters, than it was allowed. All of that may happen while a graph is captured. What is
// ready is launched without a lock.
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
constexpr int MOST_SHARED = 1 << 24;  // bytes, more than any device has
constexpr int MOST_CLUSTER = 16;      // CTAs
constexpr int PORTABLE_CLUSTER = 8;   // CTAs; a kernel has to be allowed more, on each device

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

// Set in Kernel::ready where a kernel may have clusters beyond the portable size.
constexpr unsigned LARGE_CLUSTERS = 1u << 31;
static_assert(MOST_SHARED + 1u < LARGE_CLUSTERS);

struct Kernel {
  const char* name;
  int unit;
  std::atomic<CUkernel> handle{nullptr};
  // 1 + the shared memory, in bytes, that it may have on a device, and LARGE_CLUSTERS; 0 where it
  // is not ready. One word, so that one look tells all.
  std::atomic<unsigned> ready[MOST_DEVICES]{};
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

struct Launch {
  unsigned grid[3] = {1, 1, 1}, threads = 1, shared = 0;
  unsigned cluster = 1;   // CTAs in x of a cluster; 1: the CTAs are in none
  bool together = false;  // all CTAs are on the device at once, or the driver refuses
  CUstream stream = nullptr;
  fastseq::Arguments arguments;
};

bool is_ready(const Kernel& kernel, int device, const Launch& launch) {
  const unsigned allowed = kernel.ready[device].load(std::memory_order_acquire);
  return (allowed & ~LARGE_CLUSTERS) > launch.shared &&
         (launch.cluster <= PORTABLE_CLUSTER || allowed & LARGE_CLUSTERS);
}

// So that the kernel can be launched on the device, whose context is current. The driver would
// otherwise load it at the first launch, which takes memory.
Outcome make_ready(Kernel& kernel, int device, const Launch& launch) {
  const std::lock_guard<std::mutex> lock(loading);
  if (is_ready(kernel, device, launch)) return {};  // another thread was quicker
  const Relaxed relaxed;
  const Outcome loaded = load(kernel);
  if (!loaded) return loaded;
  const CUkernel handle = kernel.handle.load();
  const unsigned before = kernel.ready[device].load();
  unsigned bytes = before & ~LARGE_CLUSTERS, large = before & LARGE_CLUSTERS;
  if (!bytes) {
    CUfunction function;
    FASTSEQ_TRY(cuKernelGetFunction, &function, handle);
    FASTSEQ_TRY(cuFuncLoad, function);
    bytes = 1;
  }
  if (launch.shared >= bytes) {
    FASTSEQ_TRY(cuKernelSetAttribute, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                static_cast<int>(launch.shared), handle, device);
    bytes = launch.shared + 1;
  }
  if (launch.cluster > PORTABLE_CLUSTER && !large) {
    FASTSEQ_TRY(cuKernelSetAttribute, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1,
                handle, device);
    large = LARGE_CLUSTERS;
  }
  kernel.ready[device].store(bytes | large);
  return {};
}

// As the driver takes it. The attributes are those that were asked for, and no others.
class Config {
 public:
  Config(const Launch& launch, bool in_clusters) {
    config_.gridDimX = launch.grid[0], config_.gridDimY = launch.grid[1];
    config_.gridDimZ = launch.grid[2];
    config_.blockDimX = launch.threads, config_.blockDimY = config_.blockDimZ = 1;
    config_.sharedMemBytes = launch.shared;
    config_.hStream = launch.stream;
    if (in_clusters)
      add(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION).clusterDim = {launch.cluster, 1, 1};
    if (launch.together) add(CU_LAUNCH_ATTRIBUTE_COOPERATIVE).cooperative = 1;
  }
  Config(const Config&) = delete;
  Config& operator=(const Config&) = delete;
  operator const CUlaunchConfig*() const { return &config_; }

 private:
  CUlaunchAttributeValue& add(CUlaunchAttributeID id) {
    CUlaunchAttribute& attribute = attributes_[config_.numAttrs++];
    attribute = {};
    attribute.id = id;
    config_.attrs = attributes_;
    return attribute.value;
  }
  CUlaunchConfig config_ = {};
  CUlaunchAttribute attributes_[2];
};

CUfunction function_of(const Kernel& kernel) {
  return reinterpret_cast<CUfunction>(kernel.handle.load(std::memory_order_relaxed));
}

Outcome launch_kernel(const Kernel& kernel, Launch& launch) {
  const Config config(launch, launch.cluster > 1);
  void* parameters[] = {&launch.arguments};
  FASTSEQ_TRY(cuLaunchKernelEx, config, function_of(kernel), parameters, nullptr);
  return {};
}

}  // namespace

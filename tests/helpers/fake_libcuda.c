/* A libcuda.so.1 that loads and launches nothing, and takes down what it is asked, for tests without
   a GPU. By variables of the environment:

   FAKE_LOG      a file that gets a line for each call, with the thread's capture mode where it matters
   FAKE_FAIL     name=code: what that function returns
   FAKE_CONTEXT  the device whose context is current, or "none", or "primary" where device 0 has one
                 that is not current
   FAKE_SLOW     how many microseconds it takes to load, and to set an attribute
   FAKE_VERSION  of CUDA, 13000 if not given
   FAKE_UNKNOWN  an attribute of devices that the driver does not know

   -DOLD leaves out what drivers of CUDA 11 lack. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int CUresult;
enum { INVALID_CONTEXT = 201 };

enum { COOPERATIVE = 2, CLUSTER_DIMENSION = 4 };

struct attribute {
  int id, pad;
  union {
    char all[64];
    unsigned cluster[3];
    int cooperative;
  } value;
};

struct config {
  unsigned grid[3], block[3], shared;
  void* stream;
  const struct attribute* attributes;
  unsigned attribute_count;
};

static __thread int mode = 0; /* global */
static __thread int current = -2;

static CUresult said(const char* function, const char* format, ...) {
  char line[512] = "";
  const char* path = getenv("FAKE_LOG");
  if (path) {
    va_list given;
    va_start(given, format);
    vsnprintf(line, sizeof line, format, given);
    va_end(given);
    FILE* log = fopen(path, "a");
    fprintf(log, "%s%s%s\n", function, *line ? " " : "", line);
    fclose(log);
  }
  const char* fail = getenv("FAKE_FAIL");
  const size_t length = strlen(function);
  if (fail && !strncmp(fail, function, length) && fail[length] == '=') return atoi(fail + length + 1);
  return 0;
}

/* A blank before each that is there. */
static void write_attributes(char* to, size_t size, const struct config* c) {
  size_t length = 0;
  *to = 0;
  for (unsigned k = 0; k < c->attribute_count; ++k) {
    const struct attribute* a = c->attributes + k;
    if (a->id == CLUSTER_DIMENSION)
      length += snprintf(to + length, size - length, " cluster %u %u %u", a->value.cluster[0],
                         a->value.cluster[1], a->value.cluster[2]);
    else if (a->id == COOPERATIVE)
      length += snprintf(to + length, size - length, " cooperative %d", a->value.cooperative);
    else
      length += snprintf(to + length, size - length, " attribute %d", a->id);
  }
}

static void load(void) {
  const char* given = getenv("FAKE_SLOW");
  if (given) usleep(atoi(given));
}

static const char* context(void) {
  const char* given = getenv("FAKE_CONTEXT");
  return given ? given : "0";
}

CUresult cuDriverGetVersion(int* version) {
  const char* given = getenv("FAKE_VERSION");
  *version = given ? atoi(given) : 13000;
  return 0;
}
CUresult cuInit(unsigned flags) { return said("cuInit", "%u", flags); }
CUresult cuGetErrorName(CUresult code, const char** name) {
  *name = code == 1 ? "CUDA_ERROR_INVALID_VALUE" : code == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : 0;
  return *name ? 0 : 1;
}
CUresult cuGetErrorString(CUresult code, const char** text) {
  *text = code == 1 ? "invalid argument" : code == 209 ? "no kernel image is available" : 0;
  return *text ? 0 : 1;
}
/* Cooperative launches (95) on every device, MPS (133) on device 1. */
CUresult cuDeviceGetAttribute(int* value, int attribute, int device) {
  const char* unknown = getenv("FAKE_UNKNOWN");
  if (unknown && atoi(unknown) == attribute) return *value = 1; /* an invalid value */
  *value = attribute == 95 || (attribute == 133 && device == 1);
  return said("cuDeviceGetAttribute", "%d of %d", attribute, device);
}
CUresult cuCtxGetDevice(int* device) {
  if (current >= 0) *device = current;
  else if (*context() < '0' || *context() > '9') return INVALID_CONTEXT;
  else *device = atoi(context());
  return 0;
}
CUresult cuCtxSetCurrent(void* made) {
  current = (int)(intptr_t)made - 1;
  return said("cuCtxSetCurrent", "%d", current);
}
CUresult cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  *flags = 0;
  *active = device == 0 && !strcmp(context(), "primary");
  return 0;
}
CUresult cuDevicePrimaryCtxRetain(void** made, int device) {
  *made = (void*)(intptr_t)(device + 1);
  return said("cuDevicePrimaryCtxRetain", "%d", device);
}
CUresult cuThreadExchangeStreamCaptureMode(int* other) {
  const int before = mode;
  mode = *other;
  *other = before;
  return 0;
}
#ifndef OLD
CUresult cuLibraryLoadData(void** library, const void* code, void* a, void** b, unsigned c,
                           int* options, void** values, unsigned count) {
  (void)a, (void)b, (void)c;
  *library = (void*)code;
  load();
  return said("cuLibraryLoadData", "magic %x, preserved %d, mode %d", *(const uint32_t*)code,
              count == 1 && *options == 1 && values[0] != 0, mode);
}
#endif
CUresult cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  (void)library;
  *kernel = strdup(name);
  load();
  return said("cuLibraryGetKernel", "%s", name);
}
CUresult cuKernelGetFunction(void** function, void* kernel) {
  *function = kernel;
  return said("cuKernelGetFunction", "%s, mode %d", (char*)kernel, mode);
}
CUresult cuFuncLoad(void* function) {
  return said("cuFuncLoad", "%s, mode %d", (char*)function, mode);
}
CUresult cuKernelGetAttribute(int* value, int attribute, void* kernel, int device) {
  *value = 100 * device + attribute;
  return said("cuKernelGetAttribute", "%d of %s", attribute, (char*)kernel);
}
CUresult cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  load();
  return said("cuKernelSetAttribute", "%d = %d of %s on %d", attribute, value, (char*)kernel, device);
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, void* kernel, int threads,
                                                     size_t shared) {
  *count = 3;
  return said("cuOccupancyMaxActiveBlocksPerMultiprocessor", "%s %d %zu", (char*)kernel, threads,
              shared);
}
CUresult cuOccupancyMaxActiveClusters(int* count, void* kernel, const struct config* c) {
  char attributes[128];
  write_attributes(attributes, sizeof attributes, c);
  *count = 32 / c->grid[0];
  return said("cuOccupancyMaxActiveClusters",
              "%s grid %u %u %u block %u %u %u shared %u%s%s", (char*)kernel, c->grid[0],
              c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared,
              c->stream ? " stream" : "", attributes);
}
CUresult cuLaunchKernelEx(const struct config* c, void* kernel, void** parameters, void** extra) {
  const int64_t* fields = parameters[0];
  char attributes[128];
  write_attributes(attributes, sizeof attributes, c);
  return said("cuLaunchKernelEx",
              "%s grid %u %u %u block %u %u %u shared %u stream %p first %lld%s%s", (char*)kernel,
              c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared,
              c->stream, (long long)fields[0], attributes, extra ? " and more" : "");
}

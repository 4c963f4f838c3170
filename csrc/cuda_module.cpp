// The extension module fastseq._cuda: the kernels of csrc/cuda, which it carries as data, and their
// launches.
//
// It uses Python's limited API, and no header or symbol of torch. Of CUDA it takes the types of the
// driver's functions, which it finds when they are first asked for: it loads where there is no driver,
// and says what it holds.
//
// A kernel goes by its name: way, cell, type and number of hidden units, forward_lstm_bfloat16_128.
// The arguments of all of them are one struct (cuda/arguments.h). Nothing here waits for a device or
// takes its memory, so that a graph can capture every launch.
//
// launch/driver.h finds the driver, launch/kernels.h loads and launches.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "launch/kernels.h"

namespace {

struct PythonError {};

int number(PyObject* object, const char* name, long long least, long long most) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  if (value < least || value > most) {
    PyErr_Format(PyExc_ValueError, "%s: expected %lld to %lld, got %lld", name, least, most, value);
    throw PythonError();
  }
  return static_cast<int>(value);
}

const char* text(PyObject* object) {
  const char* given = PyUnicode_AsUTF8AndSize(object, nullptr);
  if (!given) throw PythonError();
  return given;
}

size_t shared_start(const char* a, const char* b) {
  size_t length = 0;
  while (a[length] && a[length] == b[length]) ++length;
  return length;
}

Kernel& kernel_of(PyObject* object) {
  const char* name = text(object);
  Kernel* found = find_kernel(name);
  if (found) return *found;
  size_t longest = 0;
  for (const Kernel& kernel : kernels) longest = std::max(longest, shared_start(kernel.name, name));
  char near[512] = "";
  size_t length = 0;
  for (const Kernel& kernel : kernels) {
    const size_t more = std::strlen(kernel.name) + 2;
    if (shared_start(kernel.name, name) < longest || length + more >= sizeof near) continue;
    length += std::snprintf(near + length, sizeof near - length, "%s%s", length ? ", " : "",
                            kernel.name);
  }
  PyErr_Format(PyExc_ValueError, "name: no kernel %R was built; near it are %s", object, near);
  throw PythonError();
}

void need_driver() {
  if (!driver().reason[0]) return;
  PyErr_SetString(PyExc_RuntimeError, driver().reason);
  throw PythonError();
}

// `of` says which call it was, and may be empty.
void raise(const Kernel& kernel, const char* of, const Outcome& outcome) {
  const char *name = nullptr, *meaning = nullptr;
  driver().cuGetErrorName(outcome.code, &name);
  driver().cuGetErrorString(outcome.code, &meaning);
  const char* built = outcome.code == CUDA_ERROR_NO_BINARY_FOR_GPU
                          ? "; built for the architectures " FASTSEQ_ARCHITECTURES
                          : "";
  PyErr_Format(PyExc_RuntimeError, "%s%s: %s: %s (%d)%s%s%s", kernel.name, of, outcome.function,
               name ? name : "an unknown error", static_cast<int>(outcome.code),
               meaning ? ", " : "", meaning ? meaning : "", built);
  throw PythonError();
}

// Raises where no context of the device is current. A thread that has called nothing of CUDA's
// runtime, as autograd's, gets the one that torch has made.
void enter(int device) {
  const Driver& d = driver();
  CUdevice current;
  CUresult code = d.cuCtxGetDevice(&current);
  if (code == CUDA_SUCCESS && current != device) {
    PyErr_Format(PyExc_RuntimeError,
                 "the current CUDA context is of device %d, expected one of device %d: call within "
                 "torch.cuda.device(%d)",
                 static_cast<int>(current), device, device);
    throw PythonError();
  }
  if (code == CUDA_SUCCESS) return;
  unsigned flags;
  int active = 0;
  CUcontext context;
  code = d.cuDevicePrimaryCtxGetState(device, &flags, &active);
  if (code == CUDA_SUCCESS && active) {
    code = d.cuDevicePrimaryCtxRetain(&context, device);
    if (code == CUDA_SUCCESS) code = d.cuCtxSetCurrent(context);
    if (code == CUDA_SUCCESS) return;
  }
  PyErr_Format(PyExc_RuntimeError,
               "no CUDA context is current, and device %d has none: torch makes it with its first "
               "tensor there",
               device);
  throw PythonError();
}

// The interpreter may run other threads meanwhile: what loads may wait for a device, and a launch
// for a place in a full queue.
template <class Function>
Outcome released(Function function) {
  PyThreadState* state = PyEval_SaveThread();
  const Outcome outcome = function();
  PyEval_RestoreThread(state);
  return outcome;
}

void read_arguments(PyObject* object, fastseq::Arguments& to) {
  PyObject* bytes = PyBytes_Check(object) ? (Py_INCREF(object), object) : PyBytes_FromObject(object);
  if (!bytes) throw PythonError();
  const Py_ssize_t size = PyBytes_Size(bytes);
  const bool fits = size == static_cast<Py_ssize_t>(sizeof to);
  if (fits) std::memcpy(&to, PyBytes_AsString(bytes), sizeof to);
  Py_DECREF(bytes);
  if (fits) return;
  PyErr_Format(PyExc_ValueError, "arguments: expected %zu bytes, got %zd", sizeof to, size);
  throw PythonError();
}

PyObject* find_driver(PyObject*, PyObject*) {
  int version = 0;
  if (driver().reason[0]) return PyUnicode_FromString(driver().reason);
  if (driver().cuDriverGetVersion(&version) != CUDA_SUCCESS)
    return PyUnicode_FromString("the NVIDIA driver does not say its version");
  return PyLong_FromLong(version);
}

PyObject* toolkit(PyObject*, PyObject*) { return PyLong_FromLong(CUDA_VERSION); }
PyObject* architectures(PyObject*, PyObject*) {
  return PyUnicode_FromString(FASTSEQ_ARCHITECTURES);
}
PyObject* fields(PyObject*, PyObject*) { return PyUnicode_FromString(fastseq::ARGUMENT_NAMES); }

template <class Named, int COUNT>
PyObject* names_of(const Named (&all)[COUNT]) {
  PyObject* names = PyTuple_New(COUNT);
  for (int k = 0; names && k < COUNT; ++k) {
    PyObject* name = PyUnicode_FromString(all[k].name);
    if (!name || PyTuple_SetItem(names, k, name)) Py_CLEAR(names);
  }
  return names;
}
PyObject* kernel_names(PyObject*, PyObject*) { return names_of(kernels); }
PyObject* unit_names(PyObject*, PyObject*) { return names_of(units); }

PyObject* image(PyObject*, PyObject* object) {
  const char* name = PyUnicode_AsUTF8AndSize(object, nullptr);
  if (!name) return nullptr;
  for (const Unit& unit : units)
    if (!std::strcmp(unit.name, name))
      return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(unit.begin),
                                       unit.end - unit.begin);
  PyErr_Format(PyExc_ValueError, "unit: no image of %R was built", object);
  return nullptr;
}

// Makes the kernel ready for such a launch, then calls.
template <class Function>
Outcome when_ready(Kernel& kernel, int device, const Launch& launch, Function function) {
  const bool ready = is_ready(kernel, device, launch);
  return released([&] {
    const Outcome made = ready ? Outcome{} : make_ready(kernel, device, launch);
    return made ? function() : made;
  });
}

PyObject* launch(PyObject* const* a) {
  Kernel& kernel = kernel_of(a[0]);
  const int device = number(a[1], "device", 0, MOST_DEVICES - 1);
  Launch given;
  given.stream = reinterpret_cast<CUstream>(PyLong_AsVoidPtr(a[2]));
  if (!given.stream && PyErr_Occurred()) throw PythonError();
  if (!PyTuple_Check(a[3]) || PyTuple_Size(a[3]) != 3) {
    PyErr_Format(PyExc_ValueError, "grid: expected a tuple of three sizes, got %R", a[3]);
    throw PythonError();
  }
  for (int k = 0; k < 3; ++k)
    given.grid[k] = number(PyTuple_GetItem(a[3], k), "grid", 1, k ? 65535 : 2147483647);
  given.threads = number(a[4], "threads", 1, 1024);
  given.shared = number(a[5], "shared", 0, MOST_SHARED);
  read_arguments(a[6], given.arguments);
  given.cluster = number(a[7], "cluster", 1, MOST_CLUSTER);
  if (given.grid[0] % given.cluster) {
    PyErr_Format(PyExc_ValueError, "grid: %u CTAs in x cannot be in clusters of %u", given.grid[0],
                 given.cluster);
    throw PythonError();
  }
  const int together = PyObject_IsTrue(a[8]);
  if (together < 0) throw PythonError();
  given.together = together;
  need_driver();
  enter(device);
  const Outcome outcome =
      when_ready(kernel, device, given, [&] { return launch_kernel(kernel, given); });
  if (outcome) Py_RETURN_NONE;
  char of[200], clusters[40] = "";
  if (given.cluster > 1)
    std::snprintf(clusters, sizeof clusters, " in clusters of %u", given.cluster);
  std::snprintf(of, sizeof of,
                " on device %d, grid (%u, %u, %u)%s, %u threads, %u bytes of shared memory%s",
                device, given.grid[0], given.grid[1], given.grid[2], clusters, given.threads,
                given.shared, given.together ? ", all at once" : "");
  raise(kernel, of, outcome);
  return nullptr;
}

PyObject* attributes(PyObject* const* a) {
  Kernel& kernel = kernel_of(a[0]);
  const int device = number(a[1], "device", 0, MOST_DEVICES - 1);
  need_driver();
  constexpr struct {
    const char* name;
    CUfunction_attribute attribute;
  } asked[] = {{"registers", CU_FUNC_ATTRIBUTE_NUM_REGS},
               {"local", CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES},
               {"shared", CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES},
               {"threads", CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK},
               {"binary", CU_FUNC_ATTRIBUTE_BINARY_VERSION}};
  constexpr int COUNT = sizeof asked / sizeof *asked;
  int values[COUNT];
  const Outcome outcome = released([&]() -> Outcome {
    const std::lock_guard<std::mutex> lock(loading);
    const Relaxed relaxed;
    const Outcome loaded = load(kernel);
    if (!loaded) return loaded;
    for (int k = 0; k < COUNT; ++k)
      FASTSEQ_TRY(cuKernelGetAttribute, values + k, asked[k].attribute, kernel.handle.load(),
                  device);
    return {};
  });
  if (!outcome) raise(kernel, "", outcome);
  PyObject* found = PyDict_New();
  for (int k = 0; found && k < COUNT; ++k) {
    PyObject* value = PyLong_FromLong(values[k]);
    if (!value || PyDict_SetItemString(found, asked[k].name, value)) Py_CLEAR(found);
    Py_XDECREF(value);
  }
  return found;
}

PyObject* occupancy(PyObject* const* a) {
  Kernel& kernel = kernel_of(a[0]);
  const int device = number(a[1], "device", 0, MOST_DEVICES - 1);
  Launch asked;
  asked.threads = number(a[2], "threads", 1, 1024);
  asked.shared = number(a[3], "shared", 0, MOST_SHARED);
  need_driver();
  enter(device);
  int ctas = 0;
  const Outcome outcome = when_ready(kernel, device, asked, [&]() -> Outcome {
    FASTSEQ_TRY(cuOccupancyMaxActiveBlocksPerMultiprocessor, &ctas, function_of(kernel),
                static_cast<int>(asked.threads), asked.shared);
    return {};
  });
  if (!outcome) raise(kernel, "", outcome);
  return PyLong_FromLong(ctas);
}

PyObject* clusters(PyObject* const* a) {
  Kernel& kernel = kernel_of(a[0]);
  const int device = number(a[1], "device", 0, MOST_DEVICES - 1);
  Launch asked;
  asked.grid[0] = asked.cluster = number(a[2], "size", 1, MOST_CLUSTER);
  asked.threads = number(a[3], "threads", 1, 1024);
  asked.shared = number(a[4], "shared", 0, MOST_SHARED);
  need_driver();
  enter(device);
  int count = 0;
  const Outcome outcome = when_ready(kernel, device, asked, [&]() -> Outcome {
    const Config config(asked, true);
    FASTSEQ_TRY(cuOccupancyMaxActiveClusters, &count, function_of(kernel), config);
    return {};
  });
  if (outcome) return PyLong_FromLong(count);
  char of[120];
  std::snprintf(of, sizeof of,
                " on device %d, clusters of %u, %u threads, %u bytes of shared memory", device,
                asked.cluster, asked.threads, asked.shared);
  raise(kernel, of, outcome);
  return nullptr;
}

// An attribute that the driver does not tell, as an older one does of what it does not know, is 0.
PyObject* limits(PyObject*, PyObject* object) {
  constexpr struct {
    const char* name;
    CUdevice_attribute attribute;
  } asked[] = {{"mps", CU_DEVICE_ATTRIBUTE_MPS_ENABLED},
               {"cooperative", CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH}};
  try {
    const int device = number(object, "device", 0, MOST_DEVICES - 1);
    need_driver();
    driver().cuInit(0);
    PyObject* found = PyDict_New();
    for (const auto& each : asked) {
      int told = 0;
      if (driver().cuDeviceGetAttribute(&told, each.attribute, device) != CUDA_SUCCESS) told = 0;
      PyObject* value = found ? PyLong_FromLong(told) : nullptr;
      if (!value || PyDict_SetItemString(found, each.name, value)) Py_CLEAR(found);
      Py_XDECREF(value);
    }
    return found;
  } catch (const PythonError&) {
    return nullptr;
  }
}

template <PyObject* (*FUNCTION)(PyObject* const*), int COUNT>
PyObject* counted(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != COUNT) {
    PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", COUNT, count);
    return nullptr;
  }
  try {
    return FUNCTION(a);
  } catch (const PythonError&) {
    return nullptr;
  }
}

template <class Function>
PyCFunction fast(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// By these a build of other sources is told: whoever changes what a function takes or gives changes
// its text, here and in Python.
constexpr char LAUNCH[] =
    "(name, device, stream, (x, y, z), threads, shared, arguments, cluster, together)";
constexpr char ATTRIBUTES[] =
    "(name, device) -> {registers, local, shared, threads, binary}";
constexpr char OCCUPANCY[] = "(name, device, threads, shared) -> CTAs of a multiprocessor";
constexpr char CLUSTERS[] =
    "(name, device, size, threads, shared) -> clusters on the device at once";
constexpr char LIMITS[] = "(device) -> {mps, cooperative}";

PyMethodDef methods[] = {
    {"driver", find_driver, METH_NOARGS, "() -> version | why there is none"},
    {"toolkit", toolkit, METH_NOARGS, "() -> version of CUDA"},
    {"architectures", architectures, METH_NOARGS, "() -> names, as in 80 90a 100"},
    {"fields", fields, METH_NOARGS, "() -> names of the arguments, a blank behind each"},
    {"kernels", kernel_names, METH_NOARGS, "() -> (name, ...)"},
    {"units", unit_names, METH_NOARGS, "() -> (name, ...)"},
    {"image", image, METH_O, "(unit) -> fat binary"},
    {"launch", fast(counted<launch, 9>), METH_FASTCALL, LAUNCH},
    {"attributes", fast(counted<attributes, 2>), METH_FASTCALL, ATTRIBUTES},
    {"occupancy", fast(counted<occupancy, 4>), METH_FASTCALL, OCCUPANCY},
    {"clusters", fast(counted<clusters, 5>), METH_FASTCALL, CLUSTERS},
    {"limits", limits, METH_O, LIMITS},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "fastseq._cuda",
                          "Fused loops over time for NVIDIA GPUs, in CUDA C++.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&definition); }

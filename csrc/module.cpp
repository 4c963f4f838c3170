// The extension module fastseq._cpu: the kernels of csrc/cpu on torch's tensors.
//
// It uses Python's limited API and DLPack's C exchange interface, and no header or symbol of torch:
// one binary serves every Python from 3.10 and every torch that has the interface, and it is built
// where torch cannot be seen.
//
// Python finds what a user can do wrong before a call comes here. A call that is not laid out as the
// kernels read it (another type, strides) is declined: the function returns None.
//
// Here stand the table of functions and those that set up the process. python/tensors.h reads and
// makes tensors, python/call.h reads a call, python/layers.h runs it, python/stream.h steps; python/chains.h
// is for conditional random fields. They are one translation unit, since all are small and share the connection to torch.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "python/chains.h"
#include "python/layers.h"
#include "python/stream.h"

namespace {

// (the capsule of torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor, torch.nn.Parameter)
PyObject* connect(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "expected a capsule and two types");
    return nullptr;
  }
  auto* found =
      static_cast<const DLExchangeApi*>(PyCapsule_GetPointer(a[0], "dlpack_exchange_api"));
  if (!found) return nullptr;
  while (found && found->major > 1) found = found->previous;
  if (!found || !found->view) {
    PyErr_SetString(PyExc_ImportError, "torch's DLPack exchange interface is of an unknown version");
    return nullptr;
  }
  PyObject* method = PyObject_GetAttrString(a[1], "is_neg");
  if (!method) return nullptr;
  is_neg = method;
  Py_INCREF(a[1]), Py_INCREF(a[2]);
  tensor_type = a[1], parameter_type = a[2];
  api = found;
  Py_RETURN_NONE;
}

// (GOMP_parallel, omp_get_thread_num, omp_get_num_threads, omp_get_num_procs, quota): addresses, zeros
// for no threads; and how many processors' time the process may use, zero for any number's
PyObject* use_pool(PyObject*, PyObject* const* a, Py_ssize_t count) {
  try {
    if (count != 5) throw PythonError();
    pool.parallel = reinterpret_cast<decltype(pool.parallel)>(integer(a[0]));
    pool.thread_num = reinterpret_cast<decltype(pool.thread_num)>(integer(a[1]));
    pool.num_threads = reinterpret_cast<decltype(pool.num_threads)>(integer(a[2]));
    pool.num_procs = reinterpret_cast<decltype(pool.num_procs)>(integer(a[3]));
    pool.quota = static_cast<int>(integer(a[4]));
  } catch (const PythonError&) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "expected four addresses and a number");
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* sets(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (const InstructionSet* const* set = instruction_sets; list && *set; ++set) {
    if (!(*set)->runs_here()) continue;
    PyObject* name = PyUnicode_FromString((*set)->name);
    if (!name || PyList_Append(list, name)) {
      Py_XDECREF(name);
      Py_DECREF(list);
      return nullptr;
    }
    Py_DECREF(name);
  }
  return list;
}

PyObject* use_set(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const char* before = instruction_set().name;
  const bool done = use_instruction_set(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  if (!done) {
    PyErr_Format(PyExc_ValueError, "instruction set: this machine cannot run %R", name);
    return nullptr;
  }
  return PyUnicode_FromString(before);
}

// (name of the function as a number, x, y), for the tests of the vocabulary. Of a function of two, y
// holds the second argument.
PyObject* vocabulary(PyObject*, PyObject* const* a, Py_ssize_t count) {
  try {
    need_connection();
    if (count != 3 || !PyObject_IsInstance(a[1], tensor_type) ||
        !PyObject_IsInstance(a[2], tensor_type)) {
      PyErr_SetString(PyExc_TypeError, "expected a number and two tensors");
      throw PythonError();
    }
    const int name = static_cast<int>(integer(a[0]));
    const DLTensor x = view(a[1]), y = view(a[2]);
    if (x.dtype.bits == 32)
      instruction_set().f32.vocabulary(name, static_cast<float*>(x.data),
                                       static_cast<float*>(y.data), x.shape[0]);
    else
      instruction_set().f64.vocabulary(name, static_cast<double*>(x.data),
                                       static_cast<double*>(y.data), x.shape[0]);
  } catch (const PythonError&) {
    return nullptr;
  }
  Py_RETURN_NONE;
}

// (threads, flops) -> how many of the threads a call takes
PyObject* threads_of(PyObject*, PyObject* args) {
  int threads;
  double flops;
  if (!PyArg_ParseTuple(args, "id", &threads, &flops)) return nullptr;
  return PyLong_FromLong(useful_threads(threads, flops));
}

// (threads, batch, blocks, flops, bytes) -> (rows, units)
PyObject* plan(PyObject*, PyObject* args) {
  int threads;
  long long batch, blocks;
  double flops, bytes;
  if (!PyArg_ParseTuple(args, "iLLdd", &threads, &batch, &blocks, &flops, &bytes)) return nullptr;
  const Plan found = make_plan(threads, batch, blocks, flops, bytes);
  return Py_BuildValue("ii", found.rows, found.units);
}

// As contract.py's Draws: what is kept, (sites, rows, units) bool.
PyObject* keep(PyObject*, PyObject* const* a, Py_ssize_t count) {
  enum { SEED, SITES, IDS, STEPS, UNITS, THRESHOLD, THREADS, COUNT };
  try {
    need_connection();
    if (count != COUNT) {
      PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", COUNT, count);
      throw PythonError();
    }
    DrawCall call{};
    const uint64_t seed = static_cast<uint64_t>(*whole_numbers(a[SEED], 1));
    call.key[0] = static_cast<uint32_t>(seed), call.key[1] = static_cast<uint32_t>(seed >> 32);
    call.sites = PyTuple_Size(a[SITES]);
    std::vector<int64_t> sites(call.sites);
    for (int64_t k = 0; k < call.sites; ++k) sites[k] = integer(item(a[SITES], k));
    call.site = sites.data();
    call.rows = numbers(plain(a[IDS]));
    call.ids = whole_numbers(a[IDS], call.rows);
    if (!is_none(a[STEPS])) call.steps = whole_numbers(a[STEPS], call.rows);
    call.units = integer(a[UNITS]);
    call.threshold = static_cast<uint64_t>(integer(a[THRESHOLD]));
    New<bool> made({call.sites, call.rows, call.units});
    call.out = reinterpret_cast<uint8_t*>(made.data());
    // a unit takes as long as some 50 operations of a product
    const double flops = 50.0 * call.sites * call.rows * call.units;
    const int threads = useful_threads(static_cast<int>(integer(a[THREADS])), flops);
    PyThreadState* state = PyEval_SaveThread();
    run(call, threads);
    PyEval_RestoreThread(state);
    return made.give();
  } catch (const Declined&) {
    Py_RETURN_NONE;
  } catch (const PythonError&) {
    return nullptr;
  }
}

template <class Function>
PyCFunction fast(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// What native.py must know of each function. It refuses a build whose texts are not its own: whoever
// changes what a function takes or gives changes its text in both.
#define FASTSEQ_COMMON \
  "cell, x, batch_sizes, states, weights, layers, reverse, order, reset, h_mask, dropout, kept," \
  " input_masks, stay, part, threads, deterministic, bf16"
constexpr char CONNECT[] = "(capsule, tensor type, parameter type)";
constexpr char USE_POOL[] =
    "(GOMP_parallel, omp_get_thread_num, omp_get_num_threads, omp_get_num_procs, quota)";
constexpr char SETS[] = "() -> [name]";
constexpr char USE_SET[] = "(name) -> name before";
constexpr char VOCABULARY[] = "(function, x, y)";
constexpr char THREADS_OF[] = "(threads, flops) -> threads";
constexpr char PLAN[] = "(threads, batch, blocks, flops, bytes) -> (rows, units)";
constexpr char FORWARD[] =
    "(" FASTSEQ_COMMON ", save, trajectory, known) -> (y, states, saved) | None";
constexpr char BACKWARD[] =
    "(" FASTSEQ_COMMON ", y, saved, dy, dstates, dtrajectory, wants_x, wants_weights,"
    " wants_states)"
    " -> [dx, *dstates, *dweights] | None";
constexpr char KEEP[] = "(seed, sites, ids, steps, units, threshold, threads) -> kept | None";
constexpr char STREAM[] = "(cell, weights, layers, h, others) -> stream | None";
constexpr char STREAM_STEP[] = "(stream, x, out, threads) -> y | None";
#define FASTSEQ_SCORES "emissions, lengths, start, end, transitions"
constexpr char CRF[] = "(" FASTSEQ_SCORES ", tags, save, threads) -> (value, u) | None";
constexpr char CRF_BACKWARD[] =
    "(" FASTSEQ_SCORES ", tags, u, dvalue, wants_parameters, threads)"
    " -> [demissions, dstart, dend, dtransitions] | None";
constexpr char CRF_VITERBI[] = "(" FASTSEQ_SCORES ", n, threads) -> (scores, tags) | None";

constexpr int count_of(const char* text) {  // of its arguments
  int count = 1;
  for (; *text != ')'; ++text) count += *text == ',';
  return count;
}
static_assert(count_of(FORWARD) == COMMON + 3 && count_of(BACKWARD) == COMMON + 8 &&
              count_of(STREAM) == Stream<float>::COUNT);

PyMethodDef methods[] = {
    {"connect", fast(connect), METH_FASTCALL, CONNECT},
    {"use_pool", fast(use_pool), METH_FASTCALL, USE_POOL},
    {"instruction_sets", sets, METH_NOARGS, SETS},
    {"use_instruction_set", use_set, METH_O, USE_SET},
    {"vocabulary", fast(vocabulary), METH_FASTCALL, VOCABULARY},
    {"threads", threads_of, METH_VARARGS, THREADS_OF},
    {"plan", plan, METH_VARARGS, PLAN},
    {"forward", fast(dispatch<forward<float>, forward<double>, count_of(FORWARD)>), METH_FASTCALL,
     FORWARD},
    {"backward", fast(dispatch<backward<float>, backward<double>, count_of(BACKWARD)>),
     METH_FASTCALL, BACKWARD},
    {"keep", fast(keep), METH_FASTCALL, KEEP},
    {"stream", fast(stream), METH_FASTCALL, STREAM},
    {"stream_step", fast(stream_step), METH_FASTCALL, STREAM_STEP},
    {"crf", fast(dispatch_chains<crf<float>, crf<double>, count_of(CRF)>), METH_FASTCALL, CRF},
    {"crf_backward",
     fast(dispatch_chains<crf_backward<float>, crf_backward<double>, count_of(CRF_BACKWARD)>),
     METH_FASTCALL, CRF_BACKWARD},
    {"crf_viterbi",
     fast(dispatch_chains<crf_viterbi<float>, crf_viterbi<double>, count_of(CRF_VITERBI)>),
     METH_FASTCALL, CRF_VITERBI},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "fastseq._cpu",
                          "Fused loops over time for the CPU, in C++.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

// What is compared with a cell's Python declaration: the names, which gates of w_hh each phase
// multiplies, how many gates take x and s apart, whether gates are kept, and which states a backward
// text takes.
PyObject* row_of(const Form& f) {
  PyObject* first = PyTuple_New(f.phases + 1);
  for (int k = 0; first && k <= f.phases; ++k)
    PyTuple_SetItem(first, k, PyLong_FromLong(f.first[k]));
  PyObject* taken = PyTuple_New(1 + f.C);
  for (int k = 0; taken && k < 1 + f.C; ++k)
    PyTuple_SetItem(taken, k, PyBool_FromLong(f.taken_back[k]));
  return Py_BuildValue("sssssNiiN", f.name, f.gates, f.states, f.extras, f.units, first, f.apart,
                       int(f.keeps_gates), taken);
}

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
  PyObject* module = PyModule_Create(&definition);
  if (!module) return nullptr;
  PyObject* cells = PyList_New(0);
  for (int k = 0; cells && k < CELLS; ++k) {
    PyObject* row = row_of(forms[k]);
    if (!row || PyList_Append(cells, row)) return nullptr;
    Py_DECREF(row);
  }
  if (!cells || PyModule_AddObject(module, "CELLS", cells)) return nullptr;
  return module;
}

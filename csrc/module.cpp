// The extension module fastseq._cpu: the kernels of csrc/cpu on torch's tensors.
//
// It uses Python's limited API and DLPack's C exchange interface, and no header or symbol of torch:
// one binary serves every Python from 3.10 and every torch that has the interface, and it is built
// where torch cannot be seen. Reading a tensor through it takes 50 ns, making one 0.7 us.
//
// What a user can do wrong is found in Python, before a call comes here. A call that is not laid
// out as the kernels want it (another type, strides) is declined: the function returns None.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#define FASTSEQ_ISA module  // of the cells, their declarations alone are used here
#include "cells/elman.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cpu/run.h"
#include "dlpack.h"

using namespace fastseq;

namespace {

const DLExchangeApi* api = nullptr;

// An error that Python knows of already.
struct PythonError {};
// The call is not laid out as the kernels want it.
struct Declined {};

void set_error(void*, const char*, const char* message) {
  PyErr_SetString(PyExc_RuntimeError, message);
}

bool is_none(PyObject* object) { return object == Py_None; }

void need_connection() {
  if (api) return;
  PyErr_SetString(PyExc_RuntimeError, "fastseq._cpu: connect() must be called first");
  throw PythonError();
}

DLTensor view(PyObject* object) {
  DLTensor tensor;
  if (api->view(object, &tensor)) throw PythonError();
  tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return tensor;
}

bool contiguous(const DLTensor& t) {
  int64_t expected = 1;
  for (int k = t.ndim - 1; k >= 0; --k) {
    if (t.shape[k] != 1 && t.strides[k] != expected) {
      for (int j = 0; j < t.ndim; ++j)
        if (t.shape[j] == 0) return true;
      return false;
    }
    expected *= t.shape[k];
  }
  return true;
}

template <class T>
const T* floats(const DLTensor& t) {
  if (t.device.type != 1 || t.dtype.code != 2 || t.dtype.bits != 8 * sizeof(T)) throw Declined();
  return static_cast<const T*>(t.data);
}

template <class T>
const T* dense(PyObject* object) {
  if (is_none(object)) return nullptr;
  const DLTensor t = view(object);
  if (!contiguous(t)) throw Declined();
  return floats<T>(t);
}

int64_t numbers(const DLTensor& t) {
  int64_t size = 1;
  for (int k = 0; k < t.ndim; ++k) size *= t.shape[k];
  return size;
}

// The same of so many numbers: hooks on saved tensors may give back anything.
template <class T>
T* sized(PyObject* object, int64_t count) {
  if (numbers(view(object)) != count) throw Declined();
  return const_cast<T*>(dense<T>(object));
}

// The same, or, counted in *halves, bfloat16 as it is.
template <class T>
const T* matrix(PyObject* object, int* halves) {
  const DLTensor t = view(object);
  if (t.dtype.code != 4 || sizeof(T) != 4) return dense<T>(object);
  if (!contiguous(t) || t.device.type != 1 || reinterpret_cast<uintptr_t>(t.data) % sizeof(T))
    throw Declined();
  ++*halves;
  return static_cast<const T*>(t.data);
}

// Asks for large pages where new memory is large: its first touch costs 0.4 ms a MB in pages of 4 KB,
// 0.05 in pages of 2 MB.
void on_large_pages(void* data, int64_t size) {
#if defined(__linux__)
  constexpr int64_t LARGE = int64_t(2) << 20;
  if (size < 2 * LARGE) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + LARGE - 1) / LARGE * LARGE;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + size) / LARGE * LARGE;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)size;
#endif
}

// A new tensor, owned until it is given away.
template <class T>
class New {
 public:
  New() = default;
  explicit New(std::vector<int64_t> shape) {
    DLTensor prototype{};
    prototype.device = {1, 0};
    prototype.ndim = static_cast<int32_t>(shape.size());
    prototype.dtype = {2, 8 * sizeof(T), 1};
    prototype.shape = shape.data();
    DLManagedTensorVersioned* tensor = nullptr;
    if (api->allocate(&prototype, &tensor, nullptr, set_error)) throw PythonError();
    void* made = nullptr;
    if (api->to_object(tensor, &made)) throw PythonError();
    object_ = static_cast<PyObject*>(made);
    data_ = static_cast<T*>(view(object_).data);
    int64_t size = sizeof(T);
    for (int64_t n : shape) size *= n;
    on_large_pages(data_, size);
  }
  New(New&& other) noexcept : object_(other.object_), data_(other.data_) { other.object_ = nullptr; }
  New& operator=(New&& other) noexcept {
    Py_XDECREF(object_);
    object_ = other.object_, data_ = other.data_;
    other.object_ = nullptr;
    return *this;
  }
  ~New() { Py_XDECREF(object_); }
  T* data() const { return object_ ? data_ : nullptr; }
  PyObject* give() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_ = nullptr;
  T* data_ = nullptr;
};

class List {
 public:
  List() : list_(PyList_New(0)) {
    if (!list_) throw PythonError();
  }
  ~List() { Py_XDECREF(list_); }
  List(const List&) = delete;
  void add(PyObject* object) {  // takes it over
    if (!object || PyList_Append(list_, object)) {
      Py_XDECREF(object);
      throw PythonError();
    }
    Py_DECREF(object);
  }
  void add_none() {
    Py_INCREF(Py_None);
    add(Py_None);
  }
  PyObject* give() {
    PyObject* list = list_;
    list_ = nullptr;
    return list;
  }

 private:
  PyObject* list_;
};

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

bool truth(PyObject* object) { return PyObject_IsTrue(object) == 1; }

PyObject* item(PyObject* sequence, Py_ssize_t k) {  // borrowed; of a tuple
  PyObject* object = PyTuple_GetItem(sequence, k);
  if (!object) throw PythonError();
  return object;
}

struct Shape {  // of a cell, as its header declares it
  const char* name;
  int G, G_hh;
  bool has_c, has_extra, has_unit, keeps_gates;
  int apart;
};

template <class C>
constexpr Shape shape_of() {
  return {C::NAME,      C::G,        C::FIRST[C::PHASES], C::HAS_C,
          C::HAS_EXTRA, C::HAS_UNIT, C::KEEPS_GATES,      C::APART};
}

const Shape shapes[CELLS] = {  // in the order of enum Cell
    shape_of<module::Lstm>(),    shape_of<module::Gru>(),     shape_of<module::GruResetBefore>(),
    shape_of<module::RnnTanh>(), shape_of<module::RnnRelu>(), shape_of<module::IndRnn>(),
};

// What forward and backward are both given:
// cell, x, batch_sizes, states, weights, reverse, reset, h_mask, threads, bfloat16
enum { CELL, X, SIZES, STATES, WEIGHTS, REVERSE, RESET, H_MASK, THREADS, BF16, COMMON };

template <class T>
const Kernels<T>& kernels() {
  if constexpr (sizeof(T) == 4) return instruction_set().f32;
  else return instruction_set().f64;
}

// What batch_sizes says of the packed rows of x.
template <class T>
void read_sizes(const DLTensor& sizes, const DLTensor& x, Input<T>* in, std::vector<int64_t>* offsets) {
  if (sizes.dtype.code != 0 || sizes.dtype.bits != 64 || !contiguous(sizes)) throw Declined();
  in->sizes = static_cast<const int64_t*>(sizes.data);
  in->steps = sizes.shape[0];
  offsets->resize(in->steps + 1);
  for (int64_t t = 0; t < in->steps; ++t) (*offsets)[t + 1] = (*offsets)[t] + in->sizes[t];
  in->offsets = offsets->data();
  in->rows = (*offsets)[in->steps];
  in->batch = in->steps ? in->sizes[0] : 0;
  in->x_row = x.strides[0];
}

template <class T>
struct Common {
  Cell cell;
  Shape shape;
  int R;
  Input<T> in{};
  std::vector<int64_t> lead;  // of x, and so of y
  int64_t capacity;           // rows of x, with its padding
  std::vector<int64_t> offsets;
  std::vector<Recurrence<T>> recurrence;
  int each;  // weights of a recurrence
  int threads;
  double flops = 0;  // of one pass
  bool bf16, halves;

  explicit Common(PyObject* const* a) {
    cell = static_cast<Cell>(integer(a[CELL]));
    shape = shapes[cell];
    each = 5 + shape.has_unit;
    R = static_cast<int>(PyTuple_Size(a[REVERSE]));
    recurrence.resize(R);
    const DLTensor x = view(a[X]);
    in.x = floats<T>(x);
    in.I = x.shape[x.ndim - 1];
    if (in.I > 1 && x.strides[x.ndim - 1] != 1) throw Declined();
    lead.assign(x.shape, x.shape + x.ndim - 1);
    if (is_none(a[SIZES])) {
      in.steps = x.shape[0], in.batch = x.shape[1];
      in.rows = capacity = in.steps * in.batch;
      in.x_step = x.strides[0], in.x_row = x.strides[1];
      if (in.batch == 1) in.x_row = in.x_step;
    } else {
      read_sizes(view(a[SIZES]), x, &in, &offsets);
      capacity = x.shape[0];
    }
    int matrices = 0, halved = 0;
    for (int r = 0; r < R; ++r) {
      Recurrence<T>& at = recurrence[r];
      const DLTensor w_ih = view(item(a[WEIGHTS], r * each));
      in.H = w_ih.shape[0] / shape.G;
      auto part = [&](int k) { return dense<T>(item(a[WEIGHTS], r * each + k)); };
      auto product = [&](int k) -> const T* {
        PyObject* w = item(a[WEIGHTS], r * each + k);
        return is_none(w) ? nullptr : (++matrices, matrix<T>(w, &halved));
      };
      at.weights = {product(0), product(1), part(2), part(3), product(4),
                    shape.has_unit ? part(5) : nullptr};
      at.reverse = truth(item(a[REVERSE], r));
    }
    PyObject* w_hr = item(a[WEIGHTS], 4);
    in.P = is_none(w_hr) ? in.H : view(w_hr).shape[0];
    const Py_ssize_t states = PyTuple_Size(a[STATES]);
    if (states) in.batch = view(item(a[STATES], 0)).shape[1];
    for (int r = 0; r < R; ++r) {
      Recurrence<T>& at = recurrence[r];
      if (states) {
        at.h_0 = dense<T>(item(a[STATES], 0)) + r * in.batch * in.P;
        if (shape.has_c) at.c_0 = dense<T>(item(a[STATES], 1)) + r * in.batch * in.H;
      }
      if (!is_none(a[RESET])) {
        const DLTensor reset = view(a[RESET]);
        if (reset.dtype.bits != 8 || !contiguous(reset)) throw Declined();
        at.reset = static_cast<const uint8_t*>(reset.data) + r * capacity;
      }
      if (!is_none(a[H_MASK])) at.h_mask = dense<T>(a[H_MASK]) + r * in.batch * in.P;
    }
    flops = 2.0 * R * in.rows * in.H *
            (shape.G * static_cast<double>(in.I) + shape.G_hh * in.P + 30 * shape.G);
    threads = useful_threads(static_cast<int>(integer(a[THREADS])), flops);
    bf16 = truth(a[BF16]);
    halves = halved > 0;
    if (halves && !(halved == matrices && bf16 && kernels<T>().in_pairs(in))) throw Declined();
  }

  bool projected() const { return recurrence[0].weights.w_hr != nullptr; }
  std::vector<int64_t> with(int64_t last) const {
    // not a copy, whose size check is a function of GCC 11's libstdc++
    std::vector<int64_t> shape(lead.begin(), lead.end());
    shape.push_back(last);
    return shape;
  }
};

template <class T>
void zero_padding(T* data, int64_t rows, int64_t capacity, int64_t width) {
  if (capacity > rows) std::memset(data + rows * width, 0, sizeof(T) * (capacity - rows) * width);
}

// The interpreter may run other threads meanwhile.
template <class Call>
bool run_released(Call& call, int threads) {
  PyThreadState* state = PyEval_SaveThread();
  const bool done = run(call, threads);
  PyEval_RestoreThread(state);
  return done;
}

// Packing a weight costs about as much as its use for this many rows (H = 128 and 512, B = 1 and 4).
bool worth_packing(int64_t rows) { return rows > 8; }

// Makes the buffers for what backward wants of a recurrence, in the order in which it reads them.
template <class T>
void keep(const Shape& shape, bool projected, int64_t rows, int64_t H, Recurrence<T>* at,
          std::vector<New<T>>* saved) {
  auto made = [&](int64_t width) {
    saved->emplace_back(std::vector<int64_t>{rows, width});
    return saved->back().data();
  };
  if (shape.keeps_gates || projected) at->gates = made(shape.G * H);
  if (shape.has_extra) at->extra = made(H);
  if (projected) at->m = made(H);
}

// The same, found again by what gives the next one, of so many numbers in each row.
template <class T, class Next>
void kept(const Shape& shape, bool projected, int64_t H, Recurrence<T>* at, Next next) {
  if (shape.keeps_gates || projected) at->gates = next(shape.G * H);
  if (shape.has_extra) at->extra = next(H);
  if (projected) at->m = next(H);
}

// (..., save, trajectory, deterministic, y or None) -> [y, *states, *trajectory, *saved]; with y, what
// was known before, only what is saved is made again: [*saved]
template <class T>
PyObject* forward(PyObject* const* a) {
  Common<T> c(a);
  const bool save = truth(a[COMMON]), trajectory = truth(a[COMMON + 1]);
  const bool deterministic = truth(a[COMMON + 2]);
  const T* known = dense<T>(a[COMMON + 3]);
  const int R = c.R;
  const int64_t B = c.in.batch, H = c.in.H, P = c.in.P;
  New<T> y, h_n({R, B, P}), c_n, c_all;
  if (!known) y = New<T>(c.with(R * P));
  if (c.shape.has_c) c_n = New<T>({R, B, H});
  if (c.shape.has_c && (save || trajectory)) c_all = New<T>(c.with(R * H));
  std::vector<New<T>> saved;
  for (int r = 0; r < R; ++r) {
    Recurrence<T>& at = c.recurrence[r];
    at.h_n = h_n.data() + r * B * P;
    if (c.shape.has_c) at.c_n = c_n.data() + r * B * H;
    if (save) keep(c.shape, c.projected(), c.capacity, H, &at, &saved);
  }
  if (!known) zero_padding(y.data(), c.in.rows, c.capacity, R * P);
  if (c_all.data()) zero_padding(c_all.data(), c.in.rows, c.capacity, R * H);
  ForwardCall<T> call{};
  call.cell = c.cell, call.R = R, call.input = c.in, call.recurrence = c.recurrence.data();
  call.y = y.data(), call.known = known, call.c_all = c_all.data();
  call.pack = deterministic || known || worth_packing(c.in.rows);
  call.bf16 = c.bf16, call.halves = c.halves;
  if (call.halves && !call.pack) throw Declined();
  if (!run_released(call, c.threads)) return PyErr_NoMemory();
  List out;
  if (!known) {
    out.add(y.give());
    out.add(h_n.give());
    if (c.shape.has_c) out.add(c_n.give());
  }
  if (trajectory && c.shape.has_c) out.add(c_all.give());
  for (New<T>& tensor : saved) out.add(tensor.give());
  if (save && !trajectory && c.shape.has_c) out.add(c_all.give());
  return out.give();
}

// (..., y, saved, c_all, dy, dstates, dc_all, wants x, wants weights, wants states)
// -> [dx or None, *dstates, *gradients of the weights that are there]
template <class T>
PyObject* backward(PyObject* const* a) {
  Common<T> c(a);
  PyObject* const* b = a + COMMON;
  enum { Y, SAVED, C_ALL, DY, DSTATES, DC_ALL, WANTS_X, WANTS_WEIGHTS, WANTS_STATES };
  const bool wants_x = truth(b[WANTS_X]), wants_weights = truth(b[WANTS_WEIGHTS]);
  const int R = c.R;
  const int64_t B = c.in.batch, H = c.in.H, P = c.in.P, N = c.in.rows;
  const int states = 1 + c.shape.has_c;
  Py_ssize_t at_saved = 0;
  auto next_saved = [&](int64_t width) {
    return sized<T>(item(b[SAVED], at_saved++), c.capacity * width);
  };
  for (Recurrence<T>& r : c.recurrence) kept(c.shape, c.projected(), H, &r, next_saved);

  BackwardCall<T> call{};
  call.cell = c.cell, call.R = R, call.input = c.in, call.recurrence = c.recurrence.data();
  call.y = sized<T>(b[Y], c.capacity * R * P);
  if (c.shape.has_c) call.c_all = sized<T>(b[C_ALL], c.capacity * R * H);
  call.dy = dense<T>(b[DY]), call.dc_all = dense<T>(b[DC_ALL]);
  call.weights = wants_weights, call.states = truth(b[WANTS_STATES]);
  call.bf16 = c.bf16, call.halves = c.halves;

  New<T> dx, dstate[2];
  if (wants_x) {
    dx = New<T>(c.with(c.in.I));
    zero_padding(dx.data(), N, c.capacity, c.in.I);
    call.dx = dx.data();
  }
  for (int s = 0; s < states; ++s) {
    const int64_t size = s ? H : P;
    dstate[s] = New<T>({R, B, size});
    const T* given = dense<T>(item(b[DSTATES], s));
    if (given)
      std::memcpy(dstate[s].data(), given, sizeof(T) * R * B * size);
    else
      std::memset(dstate[s].data(), 0, sizeof(T) * R * B * size);
  }

  if (R > 1 && wants_x) std::memset(dx.data(), 0, sizeof(T) * N * c.in.I);  // both add

  std::vector<RecurrenceGradients<T>> gradients(R);
  std::vector<New<T>> out;
  for (int r = 0; r < R; ++r) {
    RecurrenceGradients<T>& d = gradients[r];
    d.dh = dstate[0].data() + r * B * P;
    if (c.shape.has_c) d.dc = dstate[1].data() + r * B * H;
    if (!wants_weights) continue;
    const T** places[6] = {&d.out.w_ih, &d.out.w_hh, &d.out.b_ih,
                           &d.out.b_hh, &d.out.w_hr, &d.out.unit};
    for (int k = 0; k < c.each; ++k) {
      PyObject* weight = item(a[WEIGHTS], r * c.each + k);
      if (is_none(weight)) continue;
      const DLTensor w = view(weight);
      out.emplace_back(std::vector<int64_t>(w.shape, w.shape + w.ndim));
      *places[k] = out.back().data();
    }
  }
  call.gradients = gradients.data();
  if (!run_released(call, c.threads)) return PyErr_NoMemory();
  List list;
  if (wants_x)
    list.add(dx.give());
  else
    list.add_none();
  for (int s = 0; s < states; ++s) list.add(dstate[s].give());
  for (New<T>& tensor : out) list.add(tensor.give());
  return list.give();
}

// The plain case in one call: all layers and directions, dense or packed, nothing but tensors of one
// type that are laid out as they are made. Whatever else a module may be given is declined, and goes
// the long way, where every mistake is told.
//
// What layers and layers_backward are both given: cell, x, batch_sizes or None, states (), (h_0,) or
// (h_0, c_0), weights, layers, directions, biased, projected, order, threads, deterministic,
// masks: of what the layers but the first take, () or one a layer, (..., D*P) bool, and how much of it
// is kept. order: how x is laid out; all that is made has time first.
enum Order { TIME_FIRST, BATCH_FIRST, ONE_STEP };  // ONE_STEP: x (B, I), states (B, ...), one layer
enum { L_CELL, L_X, L_SIZES, L_STATES, L_WEIGHTS, L_LAYERS, L_DIRECTIONS, L_BIASED, L_PROJECTED,
       L_ORDER, L_THREADS, L_DETERMINISTIC, L_MASKS, L_KEPT, L_COUNT };

PyObject *tensor_type = nullptr, *parameter_type = nullptr;

// A tensor of this very type: a subclass may mean something else by its data.
DLTensor plain(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_type && type != parameter_type) throw Declined();
  try {
    return view(object);
  } catch (const PythonError&) {  // it has no memory of its own, on meta or inside a transform
    PyErr_Clear();
    throw Declined();
  }
}

template <class T>
const T* shaped(PyObject* object, const std::vector<int64_t>& shape) {
  const DLTensor t = plain(object);
  if (t.ndim != static_cast<int>(shape.size()) || !contiguous(t)) throw Declined();
  int k = 0;
  for (int64_t size : shape)
    if (t.shape[k++] != size) throw Declined();
  return floats<T>(t);
}

template <class T>
struct Layers {
  Cell cell;
  Shape shape;
  int layers, D, each, threads;  // each: weights of a recurrence
  Order order;
  bool batched, biased, projected, deterministic;
  Input<T> in{};  // of the layer that is entered
  Input<T> first{};
  std::vector<int64_t> lead, offsets;
  std::vector<Recurrence<T>> recurrence;
  const T *h_0 = nullptr, *c_0 = nullptr;
  std::vector<const uint8_t*> masks;
  T scale;

  explicit Layers(PyObject* const* a)
      : cell(static_cast<Cell>(integer(a[L_CELL]))),
        shape(shapes[cell]),
        layers(static_cast<int>(integer(a[L_LAYERS]))),
        D(static_cast<int>(integer(a[L_DIRECTIONS]))),
        threads(static_cast<int>(integer(a[L_THREADS]))),
        order(static_cast<Order>(integer(a[L_ORDER]))),
        biased(truth(a[L_BIASED])),
        projected(truth(a[L_PROJECTED])),
        deterministic(truth(a[L_DETERMINISTIC])),
        recurrence(D),
        scale(T(1) / static_cast<T>(PyFloat_AsDouble(a[L_KEPT]))),
        weights_(a[L_WEIGHTS]) {
    each = 2 + 2 * biased + projected;
    if (shape.has_unit || (order == ONE_STEP && layers * D > 1)) throw Declined();
    read_input(a);
    const DLTensor w_hh = plain(weight(0, 0, 1));
    if (w_hh.ndim != 2) throw Declined();
    first.H = w_hh.shape[0] / shape.G, first.P = w_hh.shape[1];
    in = first;
    const Py_ssize_t states = PyTuple_Size(a[L_STATES]);
    if (states) {
      if (states != 1 + shape.has_c) throw Declined();
      h_0 = shaped<T>(item(a[L_STATES], 0), of_states(in.P));
      if (shape.has_c) c_0 = shaped<T>(item(a[L_STATES], 1), of_states(in.H));
    }
    for (Py_ssize_t k = 0; k < PyTuple_Size(a[L_MASKS]); ++k) {
      const DLTensor mask = view(item(a[L_MASKS], k));
      if (mask.dtype.bits != 8 || !contiguous(mask) || numbers(mask) != in.rows * D * in.P)
        throw Declined();
      masks.push_back(static_cast<const uint8_t*>(mask.data));
    }
  }

  PyObject* weight(int layer, int d, int place) const {
    return item(weights_, (layer * D + d) * each + place);
  }
  std::vector<int64_t> of_states(int64_t size) const {
    if (order == ONE_STEP) return {in.batch, size};
    if (batched) return {layers * D, in.batch, size};
    return {layers * D, size};
  }
  std::vector<int64_t> with(int64_t last) const {
    std::vector<int64_t> shape(lead.begin(), lead.end());
    shape.push_back(last);
    return shape;
  }
  double flops() const {
    return 2.0 * D * in.rows * shape.G * in.H *
           (static_cast<double>(in.I) + static_cast<double>(in.P) + 30);
  }

  // Makes `layer` the one at hand; x: its input, if it is not the first.
  void enter(int layer, const T* x) {
    in = first;
    if (layer) {
      in.x = x, in.I = in.x_row = D * in.P;
      in.x_step = in.batch * in.x_row;
    }
    const int64_t G_H = shape.G * in.H;
    for (int d = 0; d < D; ++d) {
      Recurrence<T>& r = recurrence[d];
      r = {};
      auto given = [&](int place, const std::vector<int64_t>& shape) {
        return shaped<T>(weight(layer, d, place), shape);
      };
      r.weights.w_ih = given(0, {G_H, in.I}), r.weights.w_hh = given(1, {G_H, in.P});
      if (biased) r.weights.b_ih = given(2, {G_H}), r.weights.b_hh = given(3, {G_H});
      if (projected) r.weights.w_hr = given(2 + 2 * biased, {in.P, in.H});
      r.reverse = d == 1;
      const int64_t rows = (layer * D + d) * in.batch;
      if (h_0) r.h_0 = h_0 + rows * in.P;
      if (c_0) r.c_0 = c_0 + rows * in.H;
    }
  }

  // What a layer but the first takes: `from`, dropped out; also the gradient of `from`, from its own.
  void mask(int layer, const T* from, T* to) const {
    const uint8_t* keep = masks[layer - 1];
    const int64_t size = in.rows * D * in.P;
    for (int64_t i = 0; i < size; ++i) to[i] = keep[i] ? from[i] * scale : T(0);
  }

 private:
  void read_input(PyObject* const* a) {
    const DLTensor x = plain(a[L_X]);
    const bool packed = !is_none(a[L_SIZES]);
    const bool rows = packed || order == ONE_STEP;
    if (x.ndim != 2 && (rows || x.ndim != 3)) throw Declined();
    batched = rows || x.ndim == 3;
    first.x = floats<T>(x);
    first.I = x.shape[x.ndim - 1];
    if (packed) {
      read_sizes(plain(a[L_SIZES]), x, &first, &offsets);
      if (first.rows != x.shape[0]) throw Declined();
      lead = {first.rows};
    } else if (order == ONE_STEP) {
      first.steps = 1, first.batch = first.rows = x.shape[0];
      first.x_row = x.strides[0];
      lead = {first.batch};
    } else {
      const bool swapped = batched && order == BATCH_FIRST;
      const int step = swapped ? 1 : 0, row = swapped ? 0 : 1;
      first.steps = x.shape[step], first.x_step = x.strides[step];
      first.batch = batched ? x.shape[row] : 1, first.x_row = batched ? x.strides[row] : 0;
      if (first.batch == 1) first.x_row = first.x_step;
      first.rows = first.steps * first.batch;
      lead = {first.steps};
      if (batched) lead.push_back(first.batch);
    }
    if (!first.rows || (first.I > 1 && x.strides[x.ndim - 1] != 1)) throw Declined();
  }

  PyObject* weights_;
};

PyObject* give_all(std::initializer_list<PyObject*> objects) {  // takes them over
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(objects.size()));
  Py_ssize_t k = 0;
  for (PyObject* object : objects) {
    if (tuple && object) PyTuple_SetItem(tuple, k++, object);
    else Py_XDECREF(object);
  }
  return tuple;
}

// (..., save) -> (y, (h_n, c_n) or (h_n,), saved); saved, where it is wanted: of each layer what `keep`
// made, every c, and, but for the last, its y.
template <class T>
PyObject* layers(PyObject* const* a) {
  Layers<T> s(a);
  const bool save = truth(a[L_COUNT]), has_c = s.shape.has_c;
  const int D = s.D;
  const int64_t B = s.in.batch, H = s.in.H, P = s.in.P, N = s.in.rows;
  New<T> h_n(s.of_states(P)), c_n, y, x;
  if (has_c) c_n = New<T>(s.of_states(H));
  List saved;
  for (int layer = 0; layer < s.layers; ++layer) {
    s.enter(layer, x.data() ? x.data() : y.data());
    New<T> out(s.with(D * P)), c_all;
    std::vector<New<T>> buffers;
    for (int d = 0; d < D; ++d) {
      Recurrence<T>& r = s.recurrence[d];
      r.h_n = h_n.data() + (layer * D + d) * B * P;
      if (has_c) r.c_n = c_n.data() + (layer * D + d) * B * H;
      if (save) keep(s.shape, s.projected, N, H, &r, &buffers);
    }
    if (save && has_c) c_all = New<T>({N, D * H});
    ForwardCall<T> call{};
    call.cell = s.cell, call.R = D, call.input = s.in, call.recurrence = s.recurrence.data();
    call.y = out.data(), call.c_all = c_all.data();
    call.pack = s.deterministic || worth_packing(N);
    if (!run_released(call, useful_threads(s.threads, s.flops()))) return PyErr_NoMemory();
    for (New<T>& buffer : buffers) saved.add(buffer.give());
    if (c_all.data()) saved.add(c_all.give());
    if (save && layer) saved.add(y.give());
    y = std::move(out);
    if (layer + 1 < s.layers && !s.masks.empty()) {
      x = New<T>(s.with(D * P));
      s.mask(layer + 1, y.data(), x.data());
    }
  }
  PyObject* states = has_c ? give_all({h_n.give(), c_n.give()}) : give_all({h_n.give()});
  return give_all({y.give(), states, saved.give()});
}

// (..., y, saved, dy or None, dstates, wants x, wants weights, wants states)
// -> [dx or None, *dstates, *gradients of the weights]
template <class T>
PyObject* layers_backward(PyObject* const* a) {
  Layers<T> s(a);
  PyObject* const* b = a + L_COUNT;
  enum { Y, SAVED, DY, DSTATES, WANTS_X, WANTS_WEIGHTS, WANTS_STATES };
  const bool wants_x = truth(b[WANTS_X]), wants_weights = truth(b[WANTS_WEIGHTS]);
  const int D = s.D, states = 1 + s.shape.has_c;
  const int64_t B = s.in.batch, H = s.in.H, P = s.in.P, N = s.in.rows;

  struct Kept {  // of a layer
    std::vector<Recurrence<T>> of;
    const T *c_all = nullptr, *y = nullptr;
  };
  std::vector<Kept> layer_kept(s.layers);
  Py_ssize_t at = 0;
  auto next = [&](int64_t width) { return sized<T>(item(b[SAVED], at++), N * width); };
  for (int layer = 0; layer < s.layers; ++layer) {
    Kept& one = layer_kept[layer];
    one.of.resize(D);
    for (Recurrence<T>& r : one.of) kept(s.shape, s.projected, H, &r, next);
    if (s.shape.has_c) one.c_all = next(D * H);
    if (layer) layer_kept[layer - 1].y = next(D * P);
  }
  layer_kept[s.layers - 1].y = sized<T>(b[Y], N * D * P);

  New<T> dstate[2];
  for (int k = 0; k < states; ++k) {
    dstate[k] = New<T>(s.of_states(k ? H : P));
    const int64_t bytes = sizeof(T) * s.layers * D * B * (k ? H : P);
    const T* given = dense<T>(item(b[DSTATES], k));
    if (given)
      std::memcpy(dstate[k].data(), given, bytes);
    else
      std::memset(dstate[k].data(), 0, bytes);
  }
  std::vector<New<T>> out(wants_weights ? s.layers * D * s.each : 0);
  const T* dy = dense<T>(b[DY]);
  New<T> dx;
  for (int layer = s.layers - 1; layer >= 0; --layer) {
    const Kept& one = layer_kept[layer];
    New<T> dropped;
    const T* x = layer ? layer_kept[layer - 1].y : nullptr;
    if (layer && !s.masks.empty()) {  // made again, not kept
      dropped = New<T>(s.with(D * P));
      s.mask(layer, x, dropped.data());
      x = dropped.data();
    }
    s.enter(layer, x);
    std::vector<RecurrenceGradients<T>> gradients(D);
    for (int d = 0; d < D; ++d) {
      Recurrence<T>& r = s.recurrence[d];
      r.gates = one.of[d].gates, r.extra = one.of[d].extra, r.m = one.of[d].m;
      RecurrenceGradients<T>& to = gradients[d];
      const int64_t rows = (layer * D + d) * B;
      to.dh = dstate[0].data() + rows * P;
      if (s.shape.has_c) to.dc = dstate[1].data() + rows * H;
      if (!wants_weights) continue;
      New<T>* made = &out[(layer * D + d) * s.each];
      for (int k = 0; k < s.each; ++k) {
        const DLTensor w = view(s.weight(layer, d, k));
        made[k] = New<T>(std::vector<int64_t>(w.shape, w.shape + w.ndim));
      }
      to.out.w_ih = made[0].data(), to.out.w_hh = made[1].data();
      if (s.biased) to.out.b_ih = made[2].data(), to.out.b_hh = made[3].data();
      if (s.projected) to.out.w_hr = made[2 + 2 * s.biased].data();
    }
    New<T> above = std::move(dx);  // dy, until the call is done
    if (layer || wants_x) {
      dx = New<T>(s.with(s.in.I));
      if (D > 1) std::memset(dx.data(), 0, sizeof(T) * N * s.in.I);  // both add
    }
    BackwardCall<T> call{};
    call.cell = s.cell, call.R = D, call.input = s.in, call.recurrence = s.recurrence.data();
    call.gradients = gradients.data();
    call.y = one.y, call.c_all = one.c_all, call.dy = dy, call.dx = dx.data();
    call.weights = wants_weights, call.states = truth(b[WANTS_STATES]);
    if (!run_released(call, useful_threads(s.threads, s.flops()))) return PyErr_NoMemory();
    if (layer && !s.masks.empty()) s.mask(layer, dx.data(), dx.data());
    dy = dx.data();
  }
  List list;
  if (wants_x)
    list.add(dx.give());
  else
    list.add_none();
  for (int k = 0; k < states; ++k) list.add(dstate[k].give());
  for (New<T>& tensor : out) list.add(tensor.give());
  return list.give();
}

template <PyObject* (*F32)(PyObject* const*), PyObject* (*F64)(PyObject* const*), int COUNT,
          bool PLAIN = false>
PyObject* dispatch(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != COUNT) {
    PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", COUNT, count);
    return nullptr;
  }
  try {
    need_connection();
    if (!PyObject_IsInstance(a[X], tensor_type)) throw Declined();
    const DLTensor x = PLAIN ? plain(a[X]) : view(a[X]);
    if (x.dtype.code == 2 && x.dtype.bits == 32) return F32(a);
    if (x.dtype.code == 2 && x.dtype.bits == 64) return F64(a);
    throw Declined();
  } catch (const Declined&) {
    Py_RETURN_NONE;
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// Step by step with packed weights and the state at hand. The state lives in two buffers that take
// turns: a step reads one and writes the other, whose last layer is its output.
struct StreamBase {
  virtual ~StreamBase() = default;
  virtual PyObject* step(PyObject* x, int threads) = 0;
};

template <class T>
class Stream : public StreamBase {
 public:
  // (cell, weights, layers, biased, projected, h (2, layers, B, P), c (layers, B, H) or None,
  //  outputs: h[0][-1] and h[1][-1])
  enum { CELL_, WEIGHTS_, LAYERS_, BIASED_, PROJECTED_, H_, C_, OUTPUTS_, COUNT };

  Stream() = default;
  explicit Stream(PyObject* const* a) : Stream() {  // so what it has so far is freed if it throws
    for (int k : {int(WEIGHTS_), int(H_), int(C_), int(OUTPUTS_)}) {
      Py_INCREF(a[k]);
      kept_.push_back(a[k]);
    }
    const Cell cell = static_cast<Cell>(integer(a[CELL_]));
    const Shape& shape = shapes[cell];
    const int layers = static_cast<int>(integer(a[LAYERS_]));
    const bool biased = truth(a[BIASED_]), projected = truth(a[PROJECTED_]);
    const int each = 2 + 2 * biased + projected;
    const DLTensor h = view(a[H_]);
    const int64_t B = h.shape[2], P = h.shape[3];
    const T* states = floats<T>(h);
    const T* c = is_none(a[C_]) ? nullptr : floats<T>(view(a[C_]));
    outputs_[0] = item(a[OUTPUTS_], 0), outputs_[1] = item(a[OUTPUTS_], 1);
    for (int layer = 0; layer < layers; ++layer) {
      auto weight = [&](int k) { return item(a[WEIGHTS_], layer * each + k); };
      const DLTensor w_ih = view(weight(0));
      Layer one{};
      one.r.weights.w_ih = dense<T>(weight(0));
      one.r.weights.w_hh = dense<T>(weight(1));
      if (biased) one.r.weights.b_ih = dense<T>(weight(2)), one.r.weights.b_hh = dense<T>(weight(3));
      if (projected) one.r.weights.w_hr = dense<T>(weight(2 + 2 * biased));
      Input<T>& in = one.in;
      in.steps = 1, in.batch = in.rows = B;
      in.I = in.x_row = w_ih.shape[1], in.H = w_ih.shape[0] / shape.G, in.P = P;
      for (int turn = 0; turn < 2; ++turn)
        one.h[turn] = const_cast<T*>(states) + (turn * layers + layer) * B * P;
      if (c) one.r.c_0 = one.r.c_n = const_cast<T*>(c) + layer * B * in.H;
      one.call.cell = cell, one.call.R = 1, one.call.pack = true;
      one.flops = 2.0 * B * shape.G * in.H * (in.I + P + 30.0);
      layers_.push_back(one);
    }
    pack();
  }
  ~Stream() override {
    for (PyObject* object : kept_) Py_DECREF(object);
    for (Layer& layer : layers_) free(layer.packed);
  }

  void pack() {
    for (Layer& layer : layers_) {
      settle(layer, 0);
      const Kernels<T>& k = kernels<T>();
      const size_t size = k.pack(layer.call, 0, nullptr);
      if (!layer.packed &&
          posix_memalign(reinterpret_cast<void**>(&layer.packed), 64, size ? size : 64))
        throw std::bad_alloc();
      k.pack(layer.call, 0, layer.packed);
      layer.r.packed = layer.packed;
    }
  }

  PyObject* step(PyObject* object, int threads) override {
    const DLTensor x = view(object);
    const Input<T>& first = layers_[0].in;
    if (x.ndim != 2 || x.shape[0] != first.batch || x.shape[1] != first.I ||
        (first.I > 1 && x.strides[1] != 1))
      throw Declined();
    const T* from = floats<T>(x);
    int64_t row = x.strides[0];
    const int turn = turn_;
    for (Layer& layer : layers_) {
      settle(layer, turn);
      layer.call.input.x = from, layer.call.input.x_row = row;
      if (!run(layer.call, useful_threads(threads, layer.flops))) return PyErr_NoMemory();
      from = layer.call.y, row = layer.in.P;
    }
    turn_ = 1 - turn;
    Py_INCREF(outputs_[turn_]);
    return outputs_[turn_];
  }

 private:
  struct Layer {
    Input<T> in;
    Recurrence<T> r;
    ForwardCall<T> call;
    T* h[2];
    T* packed;
    double flops;
  };
  static void settle(Layer& layer, int turn) {
    layer.r.h_0 = layer.h[turn];
    layer.call.y = layer.r.h_n = layer.h[1 - turn];
    layer.call.input = layer.in;
    layer.call.recurrence = &layer.r;
  }

  std::vector<Layer> layers_;
  std::vector<PyObject*> kept_;
  PyObject* outputs_[2];
  int turn_ = 0;
};

void delete_stream(PyObject* capsule) {
  delete static_cast<StreamBase*>(PyCapsule_GetPointer(capsule, "fastseq.stream"));
}

PyObject* stream(PyObject*, PyObject* const* a, Py_ssize_t count) {
  try {
    need_connection();
    if (count != Stream<float>::COUNT) {
      PyErr_SetString(PyExc_TypeError, "stream: wrong number of arguments");
      return nullptr;
    }
    const DLTensor h = view(a[Stream<float>::H_]);
    StreamBase* made = h.dtype.bits == 32 ? static_cast<StreamBase*>(new Stream<float>(a))
                                          : new Stream<double>(a);
    PyObject* capsule = PyCapsule_New(made, "fastseq.stream", delete_stream);
    if (!capsule) delete made;
    return capsule;
  } catch (const Declined&) {
    Py_RETURN_NONE;
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// (stream, x, threads) -> y, or None where x is not laid out as it must be
PyObject* stream_step(PyObject*, PyObject* const* a, Py_ssize_t count) {
  try {
    need_connection();
    if (count != 3) throw Declined();
    auto* stream = static_cast<StreamBase*>(PyCapsule_GetPointer(a[0], "fastseq.stream"));
    if (!stream) return nullptr;
    if (!PyObject_IsInstance(a[1], tensor_type)) throw Declined();
    return stream->step(a[1], static_cast<int>(integer(a[2])));
  } catch (const Declined&) {
    Py_RETURN_NONE;
  } catch (const PythonError&) {
    return nullptr;
  }
}

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
  Py_INCREF(a[1]), Py_INCREF(a[2]);
  tensor_type = a[1], parameter_type = a[2];
  api = found;
  Py_RETURN_NONE;
}

// (GOMP_parallel, omp_get_thread_num, omp_get_num_threads), addresses; zeros: no threads
PyObject* use_pool(PyObject*, PyObject* const* a, Py_ssize_t count) {
  try {
    if (count != 3) throw PythonError();
    pool.parallel = reinterpret_cast<decltype(pool.parallel)>(integer(a[0]));
    pool.thread_num = reinterpret_cast<decltype(pool.thread_num)>(integer(a[1]));
    pool.num_threads = reinterpret_cast<decltype(pool.num_threads)>(integer(a[2]));
  } catch (const PythonError&) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "expected three addresses");
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

// (name of the function as a number, x, y), for the tests of the vocabulary
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

// (threads, batch, blocks, flops, bytes) -> (rows, units)
PyObject* plan(PyObject*, PyObject* args) {
  int threads;
  long long batch, blocks;
  double flops, bytes;
  if (!PyArg_ParseTuple(args, "iLLdd", &threads, &batch, &blocks, &flops, &bytes)) return nullptr;
  const Plan found = make_plan(threads, batch, blocks, flops, bytes);
  return Py_BuildValue("ii", found.rows, found.units);
}

template <class Function>
PyCFunction fast(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// What native.py must know of each function. A build whose texts are not native.py's is refused there,
// so who changes what a function takes or gives, changes its text in both.
#define FASTSEQ_COMMON "cell, x, batch_sizes, states, weights, reverse, reset, h_mask, threads, bf16"
constexpr char CONNECT[] = "(capsule, tensor type, parameter type)";
constexpr char USE_POOL[] = "(GOMP_parallel, omp_get_thread_num, omp_get_num_threads)";
constexpr char SETS[] = "() -> [name]";
constexpr char USE_SET[] = "(name) -> name before";
constexpr char VOCABULARY[] = "(function, x, y)";
constexpr char PLAN[] = "(threads, batch, blocks, flops, bytes) -> (rows, units)";
constexpr char FORWARD[] =
    "(" FASTSEQ_COMMON ", save, trajectory, deterministic, known)"
    " -> [y, *states, *trajectory, *saved] | None";
constexpr char BACKWARD[] =
    "(" FASTSEQ_COMMON ", y, saved, c_all, dy, dstates, dc_all, wants_x, wants_weights,"
    " wants_states)"
    " -> [dx, *dstates, *dweights] | None";
#define FASTSEQ_LAYERS \
  "cell, x, batch_sizes, states, weights, layers, directions, biased, projected, order, threads," \
  " deterministic, masks, kept"
constexpr char LAYERS[] = "(" FASTSEQ_LAYERS ", save) -> (y, states, saved) | None";
constexpr char LAYERS_BACKWARD[] =
    "(" FASTSEQ_LAYERS ", y, saved, dy, dstates, wants_x, wants_weights, wants_states)"
    " -> [dx, *dstates, *dweights] | None";
constexpr char STREAM[] =
    "(cell, weights, layers, biased, projected, h, c, outputs) -> stream | None";
constexpr char STREAM_STEP[] = "(stream, x, threads) -> y | None";

constexpr int count_of(const char* text) {  // of its arguments
  int count = 1;
  for (; *text != ')'; ++text) count += *text == ',';
  return count;
}
static_assert(count_of(FORWARD) == COMMON + 4 && count_of(BACKWARD) == COMMON + 9 &&
              count_of(LAYERS) == L_COUNT + 1 && count_of(LAYERS_BACKWARD) == L_COUNT + 7 &&
              count_of(STREAM) == Stream<float>::COUNT);

PyMethodDef methods[] = {
    {"connect", fast(connect), METH_FASTCALL, CONNECT},
    {"use_pool", fast(use_pool), METH_FASTCALL, USE_POOL},
    {"instruction_sets", sets, METH_NOARGS, SETS},
    {"use_instruction_set", use_set, METH_O, USE_SET},
    {"vocabulary", fast(vocabulary), METH_FASTCALL, VOCABULARY},
    {"plan", plan, METH_VARARGS, PLAN},
    {"forward", fast(dispatch<forward<float>, forward<double>, count_of(FORWARD)>), METH_FASTCALL,
     FORWARD},
    {"backward", fast(dispatch<backward<float>, backward<double>, count_of(BACKWARD)>),
     METH_FASTCALL, BACKWARD},
    {"layers", fast(dispatch<layers<float>, layers<double>, count_of(LAYERS), true>), METH_FASTCALL,
     LAYERS},
    {"layers_backward",
     fast(dispatch<layers_backward<float>, layers_backward<double>, count_of(LAYERS_BACKWARD), true>),
     METH_FASTCALL, LAYERS_BACKWARD},
    {"stream", fast(stream), METH_FASTCALL, STREAM},
    {"stream_step", fast(stream_step), METH_FASTCALL, STREAM_STEP},
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

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
  PyObject* module = PyModule_Create(&definition);
  if (!module) return nullptr;
  PyObject* cells = PyList_New(0);
  for (int k = 0; cells && k < CELLS; ++k) {
    const Shape& s = shapes[k];
    PyObject* row = Py_BuildValue("siiiiiii", s.name, s.G, s.G_hh, int(s.has_c), int(s.has_extra),
                                  int(s.has_unit), int(s.keeps_gates), s.apart);
    if (!row || PyList_Append(cells, row)) return nullptr;
    Py_DECREF(row);
  }
  if (!cells || PyModule_AddObject(module, "CELLS", cells)) return nullptr;
  return module;
}

// One struct for every call of the kernels: what forward and backward are both given, read from
// Python's arguments: a stack of layers with their options. One layer, as the contract of a backend has
// it, is the case of one.
//
// Letters are those of cpu/call.h; L layers.
#pragma once
#define FASTSEQ_ISA module  // of the cells, their declarations alone are used here
#include "../cells/generated.h"
#include "../cpu/run.h"
#include "tensors.h"

namespace {

using namespace fastseq;

struct Form {  // of a cell, as its struct declares it
  const char *name, *gates, *states, *extras, *units;
  int G, G_hh, C, E, U, phases;
  const int* first;
  int apart;
  bool keeps_gates;
  const bool* taken_back;
};

constexpr int words(const char* text) {
  int count = *text != '\0';
  for (; *text; ++text) count += *text == ' ';
  return count;
}

template <class Cell>
constexpr Form form_of() {
  static_assert(words(Cell::GATES) == Cell::G && words(Cell::STATES) == Cell::C + 1 &&
                words(Cell::EXTRAS) == Cell::E && words(Cell::UNITS) == Cell::U);
  return {Cell::NAME, Cell::GATES, Cell::STATES, Cell::EXTRAS, Cell::UNITS,
          Cell::G, Cell::FIRST[Cell::PHASES], Cell::C, Cell::E, Cell::U, Cell::PHASES,
          Cell::FIRST, Cell::APART, Cell::KEEPS_GATES, Cell::TAKEN_BACK};
}

const Form forms[CELLS] = {  // in the order of enum Cell
#define FASTSEQ_FORM(name, type) form_of<module::type>(),
    FASTSEQ_CELLS(FASTSEQ_FORM)
#undef FASTSEQ_FORM
};

Cell cell_of(PyObject* number) {
  const int64_t cell = integer(number);
  if (cell < 0 || cell >= CELLS) throw Declined();
  return static_cast<Cell>(cell);
}

template <class T>
const Kernels<T>& kernels() {
  if constexpr (sizeof(T) == 4) return instruction_set().f32;
  else return instruction_set().f64;
}

// Rows masked outside of the kernels. At the optimization of the rest gcc makes no vectors of a loop
// whose length it does not know. `to` is `from` or does not meet it.
#if defined(__GNUC__) && !defined(__clang__)
#define FASTSEQ_IN_VECTORS __attribute__((optimize("O3"), noinline))
#define FASTSEQ_APART _Pragma("GCC ivdep")
#else
#define FASTSEQ_IN_VECTORS
#define FASTSEQ_APART
#endif
template <class T>
FASTSEQ_IN_VECTORS void multiplied(const T* from, const T* mask, int64_t size, T* to) {
  FASTSEQ_APART
  for (int64_t i = 0; i < size; ++i) to[i] = from[i] * mask[i];
}

// Where the weights of a recurrence stand in a tuple of so many: w_ih, w_hh, b_ih, b_hh, w_hr and the
// unit parameters, either all of them, with None for one that is not there, or without those that
// the layer has not. -1: no room for it.
struct Slots {
  int each, w_hh = 1, b_ih = 2, b_hh = 3, w_hr = 4, unit = 5;

  Slots() = default;
  Slots(const Form& form, Py_ssize_t all, int recurrences) {
    each = recurrences > 0 ? static_cast<int>(all / recurrences) : 0;
    if (!each || all % recurrences) throw Declined();
    if (each == 5 + form.U) return;
    const int product = form.G_hh > 0, biases = 1 + product;
    const int more = each - form.U - 1 - product;  // 0, or biases, or a projection, or both
    const bool biased = more >= biases, projected = more - biased * biases > 0;
    if (more < 0 || more > biases + 1 || more != biased * biases + projected) throw Declined();
    w_hh = product ? 1 : -1;
    b_ih = biased ? 1 + product : -1;
    b_hh = biased && product ? 3 : -1;
    w_hr = projected ? each - form.U - 1 : -1;
    unit = each - form.U;
  }
};

// What forward and backward are both given:
//
// states: (), or h_0 and each other state, (L*R, B, ...); without B for one sequence.
// weights: of each layer and recurrence, as `Slots` reads them.
// reverse: a flag for each of the R recurrences of a layer.
// order: how x is laid out, and who has looked at the call; all that is made has time first.
// reset: of the recurrences of a layer, and so of each, or None. h_mask: (L*R, B, P), or None.
// dropout: (), or of each layer but the first which numbers of its input it takes, (..., R*P) bool;
// kept: how much of it that is.
// input_masks: (), or of each layer (B, I), which multiplies its input at every step.
// stay: (), or of each state where it stays, (L*R, rows of x, size) bool, or None; part: (), or of each
// state the part of it that stays.
enum {
  CELL, X, SIZES, STATES, WEIGHTS, LAYERS, REVERSE, ORDER, RESET, H_MASK, DROPOUT, KEPT, INPUT_MASKS,
  STAY, PART, THREADS, DETERMINISTIC, BF16, COMMON
};
// The first three are a module's call, which nobody has looked at: whatever is not plain is declined
// (no step at all, padding, a subclass of Tensor), for Python to run or to say what is wrong.
// ONE_STEP: x (B, I), states (B, ...). CHECKED: a backend's call, x (T, B, I) or packed with padding;
// the batch of its states may be larger than that of its first step.
enum Order { TIME_FIRST, BATCH_FIRST, ONE_STEP, CHECKED };

template <class T>
struct Call {
  const Cell cell;
  const Form& form;
  const int L, R;
  const Order order;
  const Slots slots;
  const bool deterministic, bf16;
  bool batched, projected, halves = false;
  int64_t capacity;  // rows of x, with its padding
  Input<T> first{};  // of the first layer
  Input<T> in{};     // of the layer that is entered
  std::vector<Recurrence<T>> recurrence;  // its own

  explicit Call(PyObject* const* a)
      : cell(cell_of(a[CELL])),
        form(forms[cell]),
        L(static_cast<int>(integer(a[LAYERS]))),
        R(static_cast<int>(PyTuple_Size(a[REVERSE]))),
        order(static_cast<Order>(integer(a[ORDER]))),
        slots(form, PyTuple_Size(a[WEIGHTS]), L * R),
        deterministic(truth(a[DETERMINISTIC])),
        bf16(truth(a[BF16])),
        recurrence(R),
        arguments_(a),
        threads_(static_cast<int>(integer(a[THREADS]))),
        scale_(T(1) / static_cast<T>(PyFloat_AsDouble(a[KEPT]))) {
    if (order == ONE_STEP && L * R > 1) throw Declined();
    read_input();
    const DLTensor w_ih = see(weight(0, 0, 0));
    if (w_ih.ndim != 2) throw Declined();
    first.P = first.H = w_ih.shape[0] / form.G;
    PyObject* w_hr = slots.w_hr < 0 ? Py_None : weight(0, 0, slots.w_hr);
    projected = !is_none(w_hr);
    if (projected) first.P = see(w_hr).shape[0];
    read_states();
    if (!first.rows && (order != CHECKED || L > 1)) throw Declined();
    if (!is_none(a[RESET])) reset_ = flags(a[RESET], R * capacity);
    if (!is_none(a[H_MASK])) h_mask_ = sized<T>(a[H_MASK], L * R * first.batch * first.P);
    for (Py_ssize_t k = 0; k < PyTuple_Size(a[DROPOUT]); ++k)
      dropout_.push_back(flags(item(a[DROPOUT], k), first.rows * R * first.P));
    for (Py_ssize_t k = 0; k < PyTuple_Size(a[INPUT_MASKS]); ++k)
      input_masks_.push_back(sized<T>(item(a[INPUT_MASKS], k), first.batch * width(k)));
    read_zoneout();
    in = first;
  }

  // The size of a layer's input.
  int64_t width(int64_t layer) const { return layer ? R * first.P : first.I; }

  // Makes `layer` the one at hand; x: its input, where it is not the caller's.
  void enter(int layer, const T* x) {
    in = first;
    if (x) {
      in.x = x, in.I = in.x_row = width(layer);
      in.x_step = in.batch * in.x_row;
    }
    int matrices = 0, halved = 0;
    for (int d = 0; d < R; ++d) {
      Recurrence<T>& r = recurrence[d];
      r = {};
      each_weight(r.weights, [&](int slot, const T*& pointer, std::initializer_list<int64_t> shape) {
        PyObject* w = weight(layer, d, slot);
        if (is_none(w)) return;
        const DLTensor t = see_weight(w);
        need_shape(t, shape);
        const bool is_half = is_halved(t);
        if (shape.size() == 2) ++matrices, halved += is_half;
        else if (is_half) throw Declined();
        pointer = is_half ? static_cast<const T*>(t.data) : floats<T>(t);
      });
      r.reverse = truth(item(arguments_[REVERSE], d));
      const int64_t rows = (layer * R + d) * in.batch;
      if (h_0_) r.h_0 = h_0_ + rows * in.P;
      for (int k = 0; k < form.C; ++k)
        if (c_0_[k]) r.c_0[k] = c_0_[k] + rows * in.H;
      if (reset_) r.reset = reset_ + d * capacity;
      if (h_mask_) r.h_mask = h_mask_ + rows * in.P;
      for (int k = 0; k < 1 + form.C; ++k) {
        if (stay_[k]) r.stay[k] = stay_[k] + (layer * R + d) * capacity * (k ? in.H : in.P);
        r.part[k] = part_[k];
      }
    }
    halves = halved > 0;
    if (halves && !(halved == matrices && bf16 && kernels<T>().in_pairs(in))) throw Declined();
  }

  // f(its place in a recurrence's tuple, where it goes, its shape) for each weight of the layer.
  template <class Function>
  void each_weight(Weights<T>& w, Function f) const {
    const int64_t GH = form.G * in.H, SH = form.G_hh * in.H;
    f(0, w.w_ih, {GH, in.I});
    if (slots.w_hh >= 0) f(slots.w_hh, w.w_hh, {SH, in.P});
    if (slots.b_ih >= 0) f(slots.b_ih, w.b_ih, {GH});
    if (slots.b_hh >= 0) f(slots.b_hh, w.b_hh, {SH});
    if (slots.w_hr >= 0) f(slots.w_hr, w.w_hr, {in.P, in.H});
    for (int k = 0; k < form.U; ++k) f(slots.unit + k, w.unit[k], {in.H});
  }

  PyObject* weight(int layer, int d, int slot) const {
    return item(arguments_[WEIGHTS], (layer * R + d) * slots.each + slot);
  }

  std::vector<int64_t> of_states(int64_t size) const {
    if (order == ONE_STEP) return {in.batch, size};
    if (batched) return {L * R, in.batch, size};
    return {L * R, size};
  }
  std::vector<int64_t> with(int64_t last) const {  // the shape of x, but for its last size
    // not a copy, whose size check is a function of GCC 11's libstdc++
    std::vector<int64_t> shape(lead_.begin(), lead_.end());
    shape.push_back(last);
    return shape;
  }
  void zero_padding(T* data, int64_t width) const {
    if (capacity > in.rows)
      std::memset(data + in.rows * width, 0, sizeof(T) * (capacity - in.rows) * width);
  }

  int threads() const {
    const double flops =
        2.0 * R * in.rows * in.H *
        (form.G * static_cast<double>(in.I) + form.G_hh * static_cast<double>(in.P) + 30 * form.G);
    return useful_threads(threads_, flops);
  }

  // What a layer takes: what stands before it, `from` or the caller's input, dropped out and masked; null
  // where that is what it takes as it is.
  New<T> input_of(int layer, const T* from) const {
    const bool drops_out = layer && !dropout_.empty();
    if (!drops_out && input_masks_.empty()) return {};
    New<T> made(with(width(layer)));
    if (drops_out) drop_out(layer, from, made.data());
    if (!input_masks_.empty()) {
      Input<T> before = first;
      if (layer) {
        before.x = drops_out ? made.data() : from, before.x_row = width(layer);
        before.x_step = before.batch * before.x_row;
      }
      mask_input(layer, before, made.data());
    }
    return made;
  }
  // The gradient of what stands before a layer, in the place of that of its input.
  void input_gradient(int layer, T* dx) const {
    if (!input_masks_.empty()) {
      Input<T> before = first;
      before.x = dx, before.x_row = width(layer), before.x_step = before.batch * before.x_row;
      mask_input(layer, before, dx);
    }
    if (layer && !dropout_.empty()) drop_out(layer, dx, dx);
  }

  bool zones(int state) const { return stay_[state] || part_[state] != 0; }

  // f(pointer, numbers in a row) for each buffer that backward needs of a recurrence.
  template <class Function>
  void each_kept(Recurrence<T>& r, Function f) const {
    if (form.keeps_gates || projected) f(r.gates, form.G * in.H);
    for (int k = 0; k < form.E; ++k) f(r.extra[k], in.H);
    if (projected || (zones(0) && form.taken_back[0])) f(r.m, in.H);
    for (int k = 0; k < form.C; ++k)
      if (zones(1 + k) && form.taken_back[1 + k]) f(r.made[k], in.H);
  }

 private:
  DLTensor see(PyObject* object) const { return order == CHECKED ? view(object) : plain(object); }

  // A weight. Of x and the states Python knows that they are not negated lazily, as of Parameters.
  DLTensor see_weight(PyObject* object) const {
    const DLTensor w = see(object);
    const bool own = reinterpret_cast<PyObject*>(Py_TYPE(object)) == parameter_type;
    if (order != CHECKED && !own && negated(object)) throw Declined();
    return w;
  }

  void drop_out(int layer, const T* from, T* to) const {
    const uint8_t* keep = dropout_[layer - 1];
    const int64_t size = first.rows * width(layer);
    for (int64_t i = 0; i < size; ++i) to[i] = keep[i] ? from[i] * scale_ : T(0);
  }
  // The rows of `from`, masked, side by side.
  void mask_input(int layer, const Input<T>& from, T* to) const {
    const int64_t size = width(layer);
    for (int64_t t = 0; t < from.steps; ++t)
      for (int64_t b = 0; b < from.alive(t); ++b, to += size) {
        const T *x = from.at(t, b), *mask = input_masks_[layer] + b * size;
        multiplied(x, mask, size, to);
      }
  }

  void read_zoneout() {
    const Py_ssize_t stay = PyTuple_Size(arguments_[STAY]), part = PyTuple_Size(arguments_[PART]);
    if ((stay && stay != 1 + form.C) || (part && part != 1 + form.C)) throw Declined();
    for (int k = 0; k < 1 + form.C; ++k) {
      PyObject* flag = stay ? item(arguments_[STAY], k) : Py_None;
      if (!is_none(flag)) stay_[k] = flags(flag, L * R * capacity * (k ? first.H : first.P));
      if (part) part_[k] = static_cast<T>(PyFloat_AsDouble(item(arguments_[PART], k)));
    }
  }

  static bool is_halved(const DLTensor& t) {
    return sizeof(T) == 4 && t.dtype.code == 4 && t.dtype.bits == 16 && t.device.type == 1 &&
           reinterpret_cast<uintptr_t>(t.data) % sizeof(T) == 0;
  }

  void read_input() {
    const DLTensor x = see(arguments_[X]);
    const bool packed = !is_none(arguments_[SIZES]);
    const bool rows = packed || order == ONE_STEP;
    if (x.ndim != 2 && (rows || x.ndim != 3)) throw Declined();
    batched = rows || x.ndim == 3;
    first.x = floats<T>(x);
    first.I = x.shape[x.ndim - 1];
    if (first.I > 1 && x.strides[x.ndim - 1] != 1) throw Declined();
    if (packed) {
      read_sizes(see(arguments_[SIZES]));
      first.x_row = x.strides[0];
      capacity = x.shape[0];
      if (first.rows != capacity && order != CHECKED) throw Declined();
      lead_ = {capacity};
      return;
    }
    if (order == ONE_STEP) {
      first.steps = 1, first.batch = x.shape[0];
      first.x_row = x.strides[0];
      lead_ = {first.batch};
    } else {
      const bool swapped = batched && order == BATCH_FIRST;
      const int step = swapped ? 1 : 0, row = swapped ? 0 : 1;
      first.steps = x.shape[step], first.x_step = x.strides[step];
      first.batch = batched ? x.shape[row] : 1, first.x_row = batched ? x.strides[row] : 0;
      if (first.batch == 1) first.x_row = first.x_step;
      lead_ = {first.steps};
      if (batched) lead_.push_back(first.batch);
    }
    first.rows = capacity = first.steps * first.batch;
  }

  void read_sizes(const DLTensor& sizes) {
    if (sizes.dtype.code != 0 || sizes.dtype.bits != 64 || !contiguous(sizes)) throw Declined();
    first.sizes = static_cast<const int64_t*>(sizes.data);
    first.steps = sizes.shape[0];
    offsets_.resize(first.steps + 1);
    for (int64_t t = 0; t < first.steps; ++t) offsets_[t + 1] = offsets_[t] + first.sizes[t];
    first.offsets = offsets_.data();
    first.rows = offsets_[first.steps];
    first.batch = first.steps ? first.sizes[0] : 0;
  }

  void read_states() {
    PyObject* states = arguments_[STATES];
    const Py_ssize_t count = PyTuple_Size(states);
    if (count && count != 1 + form.C) throw Declined();
    if (count && order == CHECKED) {
      const DLTensor h_0 = see(item(states, 0));
      if (h_0.ndim == 3) first.batch = h_0.shape[1];  // those beyond the first step's are empty
    }
    in = first;
    for (int k = 0; k < count; ++k) {
      const DLTensor state = see(item(states, k));
      (k ? c_0_[k - 1] : h_0_) =
          floats<T>(need_shape(state, of_states(k ? first.H : first.P)));
    }
  }

  PyObject* const* arguments_;
  const int threads_;
  const T scale_;
  std::vector<int64_t> lead_, offsets_;
  const T *h_0_ = nullptr, *c_0_[MOST_EACH] = {};
  const uint8_t* reset_ = nullptr;
  const T* h_mask_ = nullptr;
  std::vector<const uint8_t*> dropout_;
  std::vector<const T*> input_masks_;
  const uint8_t* stay_[1 + MOST_EACH] = {};
  T part_[1 + MOST_EACH] = {};
};

// The interpreter may run other threads meanwhile.
template <class KernelCall>
bool run_released(KernelCall& call, int threads) {
  PyThreadState* state = PyEval_SaveThread();
  const bool done = run(call, threads);
  PyEval_RestoreThread(state);
  return done;
}

// Calls F32 or F64 by the type of x; None where the call is declined.
template <PyObject* (*F32)(PyObject* const*), PyObject* (*F64)(PyObject* const*), int COUNT>
PyObject* dispatch(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != COUNT) {
    PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", COUNT, count);
    return nullptr;
  }
  try {
    need_connection();
    if (!PyObject_IsInstance(a[X], tensor_type)) throw Declined();
    const DLTensor x = integer(a[ORDER]) == CHECKED ? view(a[X]) : plain(a[X]);
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

}  // namespace

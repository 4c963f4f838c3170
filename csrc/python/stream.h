// Step by step with packed weights and the state at hand, for inference.
//
// A stream owns the packed copy of the weights, and holds the tensors that it was made of: their
// memory is read and written at every step. A step reads the state and writes the next one in its
// place; its output is a tensor of the caller's own, so that nothing done to that reaches the state.
#pragma once
#include <utility>

#include "call.h"

namespace {

// Memory of a stream's own, on a line of the cache.
template <class T>
class Block {
 public:
  Block() = default;
  explicit Block(size_t count) {
    if (posix_memalign(reinterpret_cast<void**>(&data_), 64, count ? count * sizeof(T) : 64))
      throw std::bad_alloc();
  }
  Block(Block&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Block& operator=(Block&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Block() { free(data_); }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

struct StreamBase {
  virtual ~StreamBase() = default;
  virtual PyObject* step(PyObject* x, PyObject* out, int threads) = 0;
};

template <class T>
class Stream : public StreamBase {
 public:
  // (cell, weights, layers, h (layers, B, P), of each other state (layers, B, H))
  enum { CELL_, WEIGHTS_, LAYERS_, H_, OTHERS_, COUNT };

  Stream() = default;
  explicit Stream(PyObject* const* a) : Stream() {  // so what it has so far is freed if it throws
    for (int k : {int(WEIGHTS_), int(H_), int(OTHERS_)}) {
      Py_INCREF(a[k]);
      kept_.push_back(a[k]);
    }
    const Cell cell = cell_of(a[CELL_]);
    const Form& form = forms[cell];
    const int layers = static_cast<int>(integer(a[LAYERS_]));
    const Slots slots(form, PyTuple_Size(a[WEIGHTS_]), layers);
    const DLTensor h = view(a[H_]);
    const int64_t B = h.shape[1], P = h.shape[2];
    T* states = floats<T>(h);
    if (PyTuple_Size(a[OTHERS_]) != form.C) throw Declined();
    output_ = Block<T>(B * P);
    for (int layer = 0; layer < layers; ++layer) {
      auto weight = [&](int slot) -> T* {
        return slot < 0 ? nullptr : dense<T>(item(a[WEIGHTS_], layer * slots.each + slot));
      };
      const DLTensor w_ih = view(item(a[WEIGHTS_], layer * slots.each));
      Layer one{};
      one.r.weights = {weight(0), weight(slots.w_hh), weight(slots.b_ih), weight(slots.b_hh),
                       weight(slots.w_hr), {}};
      for (int k = 0; k < form.U; ++k) one.r.weights.unit[k] = weight(slots.unit + k);
      Input<T>& in = one.in;
      in.steps = 1, in.batch = in.rows = B;
      in.I = in.x_row = w_ih.shape[1], in.H = w_ih.shape[0] / form.G, in.P = P;
      one.r.h_0 = one.r.h_n = states + layer * B * P;
      for (int k = 0; k < form.C; ++k)
        one.r.c_0[k] = one.r.c_n[k] = floats<T>(view(item(a[OTHERS_], k))) + layer * B * in.H;
      one.call.cell = cell, one.call.R = 1, one.call.pack = true;
      one.flops = 2.0 * B * form.G * in.H * (in.I + P + 30.0);
      layers_.push_back(std::move(one));
    }
    pack();
  }
  ~Stream() override {
    for (PyObject* object : kept_) Py_DECREF(object);
  }

  void pack() {
    for (Layer& layer : layers_) {
      settle(layer);
      const Kernels<T>& k = kernels<T>();
      layer.packed = Block<T>((k.pack(layer.call, 0, nullptr) + sizeof(T) - 1) / sizeof(T));
      k.pack(layer.call, 0, layer.packed.data());
      layer.r.packed = layer.packed.data();
    }
  }

  // Declines before anything is written.
  PyObject* step(PyObject* object, PyObject* given, int threads) override {
    const DLTensor x = plain(object);
    const Input<T>& first = layers_[0].in;
    const int64_t B = first.batch, P = first.P;
    if (x.ndim != 2 || x.shape[0] != B || x.shape[1] != first.I ||
        (first.I > 1 && x.strides[1] != 1))
      throw Declined();
    const T* from = floats<T>(x);
    int64_t row = x.strides[0];
    New<T> made;
    T* y;
    if (is_none(given)) {
      made = New<T>({B, P});
      y = made.data();
    } else {
      y = floats<T>(need_shape(plain(given), std::initializer_list<int64_t>{B, P}));
    }
    for (Layer& layer : layers_) {
      settle(layer);
      layer.call.input.x = from, layer.call.input.x_row = row;
      // a buffer of the caller's may be the input itself, which all threads read
      layer.call.y = &layer == &layers_.back() && made ? y : output_.data();
      if (!run(layer.call, useful_threads(threads, layer.flops))) return PyErr_NoMemory();
      from = layer.r.h_n, row = P;
    }
    if (made) return made.give();
    std::memcpy(y, output_.data(), sizeof(T) * B * P);
    Py_INCREF(given);
    return given;
  }

 private:
  struct Layer {
    Input<T> in;
    Recurrence<T> r;
    ForwardCall<T> call;
    Block<T> packed;
    double flops;
  };
  static void settle(Layer& layer) {
    layer.call.input = layer.in;
    layer.call.recurrence = &layer.r;
  }

  std::vector<Layer> layers_;
  std::vector<PyObject*> kept_;
  Block<T> output_;
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

// (stream, x, out or None, threads) -> y, which is `out` if there is one; None where x or `out` is not
// laid out as it must be
PyObject* stream_step(PyObject*, PyObject* const* a, Py_ssize_t count) {
  try {
    need_connection();
    if (count != 4) throw Declined();
    auto* stream = static_cast<StreamBase*>(PyCapsule_GetPointer(a[0], "fastseq.stream"));
    if (!stream) return nullptr;
    return stream->step(a[1], a[2], static_cast<int>(integer(a[3])));
  } catch (const Declined&) {
    Py_RETURN_NONE;
  } catch (const PythonError&) {
    return nullptr;
  }
}

}  // namespace

// Step by step with packed weights and the state at hand, for inference.
//
// A stream owns the packed copy of the weights, and holds the tensors that it was made of: their
// memory is read and written at every step. The state lives in two buffers that take turns: a step
// reads one and writes the other, whose last layer is its output.
#pragma once
#include "call.h"

namespace {

struct StreamBase {
  virtual ~StreamBase() = default;
  virtual PyObject* step(PyObject* x, int threads) = 0;
};

template <class T>
class Stream : public StreamBase {
 public:
  // (cell, weights, layers, h (2, layers, B, P), of each other state (layers, B, H),
  //  outputs: h[0][-1] and h[1][-1])
  enum { CELL_, WEIGHTS_, LAYERS_, H_, OTHERS_, OUTPUTS_, COUNT };

  Stream() = default;
  explicit Stream(PyObject* const* a) : Stream() {  // so what it has so far is freed if it throws
    for (int k : {int(WEIGHTS_), int(H_), int(OTHERS_), int(OUTPUTS_)}) {
      Py_INCREF(a[k]);
      kept_.push_back(a[k]);
    }
    const Cell cell = cell_of(a[CELL_]);
    const Form& form = forms[cell];
    const int layers = static_cast<int>(integer(a[LAYERS_]));
    const Slots slots(form, PyTuple_Size(a[WEIGHTS_]), layers);
    const DLTensor h = view(a[H_]);
    const int64_t B = h.shape[2], P = h.shape[3];
    T* states = floats<T>(h);
    if (PyTuple_Size(a[OTHERS_]) != form.C) throw Declined();
    outputs_[0] = item(a[OUTPUTS_], 0), outputs_[1] = item(a[OUTPUTS_], 1);
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
      for (int turn = 0; turn < 2; ++turn)
        one.h[turn] = states + (turn * layers + layer) * B * P;
      for (int k = 0; k < form.C; ++k)
        one.r.c_0[k] = one.r.c_n[k] = floats<T>(view(item(a[OTHERS_], k))) + layer * B * in.H;
      one.call.cell = cell, one.call.R = 1, one.call.pack = true;
      one.flops = 2.0 * B * form.G * in.H * (in.I + P + 30.0);
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

}  // namespace

// The simple recurrent network (Elman 1990) with tanh or ReLU, and its diagonal relative IndRNN
// (Li et al. 2018), whose units see only their own past.
#pragma once
#include "cell.h"

namespace fastseq {
namespace FASTSEQ_ISA {

template <class T>
FASTSEQ_INLINE Values<T, 1> rnn_tanh_forward(T a_h) {
  const T h = tanh(a_h);
  return {h};
}

template <class T>
FASTSEQ_INLINE Values<T, 1> rnn_tanh_backward(T dh, T h) {
  const T da_h = dh * dtanh(h);
  return {da_h};
}

template <class T>
FASTSEQ_INLINE Values<T, 1> rnn_relu_forward(T a_h) {
  const T h = relu(a_h);
  return {h};
}

template <class T>
FASTSEQ_INLINE Values<T, 1> rnn_relu_backward(T dh, T h) {
  const T da_h = dh * drelu(h);
  return {da_h};
}

template <class T>
FASTSEQ_INLINE Values<T, 1> indrnn_forward(T x_h, T u, T h_prev) {
  const T h = relu(x_h + u * h_prev);
  return {h};
}

template <class T>
FASTSEQ_INLINE Values<T, 3> indrnn_backward(T dh, T h, T u, T h_prev) {
  const T dx_h = dh * drelu(h);
  const T du = dx_h * h_prev;
  const T dh_prev = dx_h * u;
  return {dx_h, du, dh_prev};
}

struct RnnTanh {
  static constexpr const char* NAME = "rnn_tanh";
  static constexpr const char *GATES = "h", *STATES = "h", *EXTRAS = "", *UNITS = "";
  static constexpr int G = 1, C = 0, E = 0, U = 0, PHASES = 1;
  static constexpr int FIRST[] = {0, 1};
  static constexpr int APART = 0;
  static constexpr bool KEEPS_GATES = false, READS_H = false;

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto v = rnn_tanh_forward(at.a(0));
    at.h(v[0]), at.save(0, v[0]);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    at.da(0, rnn_tanh_backward(at.dvalue(), at.h())[0]);
  }
};

struct RnnRelu : RnnTanh {
  static constexpr const char* NAME = "rnn_relu";

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto v = rnn_relu_forward(at.a(0));
    at.h(v[0]), at.save(0, v[0]);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    at.da(0, rnn_relu_backward(at.dvalue(), at.h())[0]);
  }
};

struct IndRnn {
  static constexpr const char* NAME = "indrnn";
  static constexpr const char *GATES = "h", *STATES = "h", *EXTRAS = "", *UNITS = "u";
  static constexpr int G = 1, C = 0, E = 0, U = 1, PHASES = 1;
  static constexpr int FIRST[] = {0, 0};
  static constexpr int APART = 0;
  static constexpr bool KEEPS_GATES = false, READS_H = true;

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto v = indrnn_forward(at.x(0), at.unit(0), at.h_prev());
    at.h(v[0]), at.save(0, v[0]);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    const auto v = indrnn_backward(at.dvalue(), at.h(), at.unit(0), at.h_prev());
    at.dx(0, v[0]), at.dunit(0, v[1]), at.dh_prev(v[2]);
  }
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

// Gated recurrent units: PyTorch's and cuDNN's form, with the reset gate after the product, and
// the form of the paper (Cho et al. 2014), with the reset gate before it.
#pragma once
#include "cell.h"

namespace fastseq {
namespace FASTSEQ_ISA {

template <class T>
FASTSEQ_INLINE Values<T, 4> gru_forward(T a_r, T a_z, T x_n, T s_n, T h_prev) {
  const T r = sigmoid(a_r);
  const T z = sigmoid(a_z);
  const T n = tanh(x_n + r * s_n);
  const T h = n + z * (h_prev - n);
  return {h, r, z, n};
}

template <class T>
FASTSEQ_INLINE Values<T, 5> gru_backward(T dh, T r, T z, T n, T s_n, T h_prev) {
  const T dx_n = (dh - dh * z) * dtanh(n);
  const T ds_n = dx_n * r;
  const T da_r = dx_n * s_n * dsigmoid(r);
  const T da_z = dh * (h_prev - n) * dsigmoid(z);
  const T dh_prev = dh * z;
  return {da_r, da_z, dx_n, ds_n, dh_prev};
}

template <class T>
FASTSEQ_INLINE Values<T, 3> gru_reset_before_gates_forward(T a_r, T a_z, T h_prev) {
  const T r = sigmoid(a_r);
  const T z = sigmoid(a_z);
  const T q = r * h_prev;
  return {q, r, z};
}

template <class T>
FASTSEQ_INLINE Values<T, 3> gru_reset_before_gates_backward(T dq, T dz, T r, T z, T h_prev) {
  const T da_r = dq * h_prev * dsigmoid(r);
  const T da_z = dz * dsigmoid(z);
  const T dh_prev = dq * r;
  return {da_r, da_z, dh_prev};
}

template <class T>
FASTSEQ_INLINE Values<T, 2> gru_reset_before_candidate_forward(T a_n, T z, T h_prev) {
  const T n = tanh(a_n);
  const T h = n + z * (h_prev - n);
  return {h, n};
}

template <class T>
FASTSEQ_INLINE Values<T, 3> gru_reset_before_candidate_backward(T dh, T z, T n, T h_prev) {
  const T da_n = (dh - dh * z) * dtanh(n);
  const T dz = dh * (h_prev - n);
  const T dh_prev = dh * z;
  return {da_n, dz, dh_prev};
}

struct Gru {
  static constexpr const char* NAME = "gru";
  static constexpr const char *GATES = "r z n", *STATES = "h", *EXTRAS = "s_n", *UNITS = "";
  static constexpr int G = 3, C = 0, E = 1, U = 0, PHASES = 1;
  static constexpr int FIRST[] = {0, 3};
  static constexpr int APART = 1;
  static constexpr bool KEEPS_GATES = true, READS_H = true;

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto s_n = at.s(2);
    const auto v = gru_forward(at.a(0), at.a(1), at.x(2), s_n, at.h_prev());
    at.h(v[0]);
    at.save(0, v[1]), at.save(1, v[2]), at.save(2, v[3]);
    at.save_extra(0, s_n);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    const auto v = gru_backward(at.dvalue(), at.saved(0), at.saved(1), at.saved(2), at.extra(0),
                                at.h_prev());
    at.da(0, v[0]), at.da(1, v[1]), at.dx(2, v[2]), at.ds(2, v[3]);
    at.dh_prev(v[4]);
  }
};

struct GruResetBefore {
  static constexpr const char* NAME = "gru_reset_before";
  static constexpr const char *GATES = "r z n", *STATES = "h", *EXTRAS = "q", *UNITS = "";
  static constexpr int G = 3, C = 0, E = 1, U = 0, PHASES = 2;
  static constexpr int FIRST[] = {0, 2, 3};
  static constexpr int APART = 0;
  static constexpr bool KEEPS_GATES = true, READS_H = true;

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    if constexpr (PHASE == 0) {
      const auto v = gru_reset_before_gates_forward(at.a(0), at.a(1), at.h_prev());
      at.save_extra(0, v[0]);
      at.save(0, v[1]), at.save(1, v[2]);
    } else {
      const auto v = gru_reset_before_candidate_forward(at.a(2), at.saved(1), at.h_prev());
      at.h(v[0]);
      at.save(2, v[1]);
    }
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    if constexpr (PHASE == 1) {
      const auto v = gru_reset_before_candidate_backward(at.dvalue(), at.saved(1), at.saved(2),
                                                         at.h_prev());
      at.da(2, v[0]), at.dz(1, v[1]), at.dh_prev(v[2]);
    } else {
      const auto v = gru_reset_before_gates_backward(at.dvalue(), at.dz(1), at.saved(0),
                                                     at.saved(1), at.h_prev());
      at.da(0, v[0]), at.da(1, v[1]), at.dh_prev(v[2]);
    }
  }
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

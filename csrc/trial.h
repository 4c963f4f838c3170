// A cell that no layer has, for driver.cpp alone: two unit parameters, three states and two extras,
// a gate of each kind. kernels.cpp has it where FASTSEQ_TRIAL is defined.
#pragma once
#include "cells/cell.h"

namespace fastseq {
namespace FASTSEQ_ISA {

template <class T>
FASTSEQ_INLINE Values<T, 6> trial_forward(T a_i, T x_g, T s_g, T u, T v, T c_prev, T n_prev) {
  const T i = sigmoid(a_i + u * c_prev);
  const T g = tanh(x_g + v * s_g);
  const T e = g * n_prev;
  const T c = i * c_prev + g;
  const T n = i * e + v * n_prev;
  const T h = i * c + n;
  return {h, c, n, i, g, e};
}

template <class T>
FASTSEQ_INLINE Values<T, 7> trial_backward(T dh, T dc, T dn, T i, T g, T s_g, T e, T u, T v, T c,
                                           T c_prev, T n_prev) {
  const T dn_total = dn + dh;
  const T dc_total = dc + dh * i;
  const T de = dn_total * i;
  const T da_i = (dh * c + dc_total * c_prev + dn_total * e) * dsigmoid(i);
  const T dx_g = (dc_total + de * n_prev) * dtanh(g);
  const T ds_g = dx_g * v;
  const T du = da_i * c_prev;
  const T dv = dx_g * s_g + dn_total * n_prev;
  const T dc_prev = dc_total * i + da_i * u;
  const T dn_prev = de * g + dn_total * v;
  return {da_i, dx_g, ds_g, du, dv, dc_prev, dn_prev};
}

struct Trial {
  static constexpr const char* NAME = "trial";
  static constexpr const char *GATES = "i g", *STATES = "h c n", *EXTRAS = "s_g e", *UNITS = "u v";
  static constexpr int G = 2, C = 2, E = 2, U = 2, PHASES = 1;
  static constexpr int FIRST[] = {0, 2};
  static constexpr int APART = 1;
  static constexpr bool KEEPS_GATES = true, READS_H = false;
  static constexpr bool TAKEN_BACK[] = {false, true, false};

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto s_g = at.s(1);
    const auto v = trial_forward(at.a(0), at.x(1), s_g, at.unit(0), at.unit(1), at.c_prev(0),
                                 at.c_prev(1));
    at.h(v[0]), at.c(0, v[1]), at.c(1, v[2]);
    at.save(0, v[3]), at.save(1, v[4]);
    at.save_extra(0, s_g), at.save_extra(1, v[5]);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    const auto v = trial_backward(at.dvalue(), at.dc(0), at.dc(1), at.saved(0), at.saved(1),
                                  at.extra(0), at.extra(1), at.unit(0), at.unit(1), at.c(0),
                                  at.c_prev(0), at.c_prev(1));
    at.da(0, v[0]), at.dx(1, v[1]), at.ds(1, v[2]);
    at.dunit(0, v[3]), at.dunit(1, v[4]);
    at.dc_prev(0, v[5]), at.dc_prev(1, v[6]);
  }
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

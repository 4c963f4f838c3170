// Long short-term memory (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al.
// 2000), in PyTorch's gate order i, f, g, o.
#pragma once
#include "cell.h"

namespace fastseq {
namespace FASTSEQ_ISA {

template <class T>
FASTSEQ_INLINE Values<T, 6> lstm_forward(T a_i, T a_f, T a_g, T a_o, T c_prev) {
  const T i = sigmoid(a_i);
  const T f = sigmoid(a_f);
  const T g = tanh(a_g);
  const T o = sigmoid(a_o);
  const T c = f * c_prev + i * g;
  const T h = o * tanh(c);
  return {h, c, i, f, g, o};
}

template <class T>
FASTSEQ_INLINE Values<T, 5> lstm_backward(T dh, T dc, T i, T f, T g, T o, T c, T c_prev) {
  const T tanh_c = tanh(c);
  const T dc_total = dc + dh * o * dtanh(tanh_c);
  const T da_i = dc_total * g * dsigmoid(i);
  const T da_f = dc_total * c_prev * dsigmoid(f);
  const T da_g = dc_total * i * dtanh(g);
  const T da_o = dh * tanh_c * dsigmoid(o);
  const T dc_prev = dc_total * f;
  return {da_i, da_f, da_g, da_o, dc_prev};
}

struct Lstm {
  static constexpr const char* NAME = "lstm";
  static constexpr const char *GATES = "i f g o", *STATES = "h c", *EXTRAS = "", *UNITS = "";
  static constexpr int G = 4, C = 1, E = 0, U = 0, PHASES = 1;
  static constexpr int FIRST[] = {0, 4};
  static constexpr int APART = 0;
  static constexpr bool KEEPS_GATES = true, READS_H = false;

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto v = lstm_forward(at.a(0), at.a(1), at.a(2), at.a(3), at.c_prev(0));
    at.h(v[0]), at.c(0, v[1]);
    at.save(0, v[2]), at.save(1, v[3]), at.save(2, v[4]), at.save(3, v[5]);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    const auto v = lstm_backward(at.dvalue(), at.dc(0), at.saved(0), at.saved(1), at.saved(2),
                                 at.saved(3), at.c(0), at.c_prev(0));
    at.da(0, v[0]), at.da(1, v[1]), at.da(2, v[2]), at.da(3, v[3]);
    at.dc_prev(0, v[4]);
  }
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

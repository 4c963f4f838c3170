// Written by tools/write_cells.py from fastseq/cells; change the cells there.
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
FASTSEQ_INLINE Values<T, 1> rnn_sigmoid_forward(T a_h) {
  const T h = sigmoid(a_h);
  return {h};
}

template <class T>
FASTSEQ_INLINE Values<T, 1> rnn_sigmoid_backward(T dh, T h) {
  const T da_h = dh * dsigmoid(h);
  return {da_h};
}

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

template <class T>
FASTSEQ_INLINE Values<T, 6> peephole_lstm_forward(T a_i, T a_f, T a_g, T a_o, T ci, T cf, T co, T
    c_prev) {
  const T i = sigmoid(a_i + ci * c_prev);
  const T f = sigmoid(a_f + cf * c_prev);
  const T g = tanh(a_g);
  const T c = f * c_prev + i * g;
  const T o = sigmoid(a_o + co * c);
  const T h = o * tanh(c);
  return {h, c, i, f, g, o};
}

template <class T>
FASTSEQ_INLINE Values<T, 8> peephole_lstm_backward(T dh, T dc, T i, T f, T g, T o, T c, T ci, T cf,
    T co, T c_prev) {
  const T tanh_c = tanh(c);
  const T da_o = dh * tanh_c * dsigmoid(o);
  const T dc_total = dc + dh * o * dtanh(tanh_c) + da_o * co;
  const T da_i = dc_total * g * dsigmoid(i);
  const T da_f = dc_total * c_prev * dsigmoid(f);
  const T da_g = dc_total * i * dtanh(g);
  const T dci = da_i * c_prev;
  const T dcf = da_f * c_prev;
  const T dco = da_o * c;
  const T dc_prev = dc_total * f + da_i * ci + da_f * cf;
  return {da_i, da_f, da_g, da_o, dci, dcf, dco, dc_prev};
}

template <class T>
FASTSEQ_INLINE Values<T, 5> coupled_lstm_forward(T a_f, T a_g, T a_o, T c_prev) {
  const T f = sigmoid(a_f);
  const T g = tanh(a_g);
  const T o = sigmoid(a_o);
  const T c = g + f * (c_prev - g);
  const T h = o * tanh(c);
  return {h, c, f, g, o};
}

template <class T>
FASTSEQ_INLINE Values<T, 4> coupled_lstm_backward(T dh, T dc, T f, T g, T o, T c, T c_prev) {
  const T tanh_c = tanh(c);
  const T dc_total = dc + dh * o * dtanh(tanh_c);
  const T dc_prev = dc_total * f;
  const T da_f = dc_total * (c_prev - g) * dsigmoid(f);
  const T da_g = (dc_total - dc_prev) * dtanh(g);
  const T da_o = dh * tanh_c * dsigmoid(o);
  return {da_f, da_g, da_o, dc_prev};
}

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

template <class T>
FASTSEQ_INLINE Values<T, 2> mgu_gate_forward(T a_f, T h_prev) {
  const T f = sigmoid(a_f);
  const T q = f * h_prev;
  return {q, f};
}

template <class T>
FASTSEQ_INLINE Values<T, 2> mgu_gate_backward(T dq, T df, T f, T h_prev) {
  const T da_f = (df + dq * h_prev) * dsigmoid(f);
  const T dh_prev = dq * f;
  return {da_f, dh_prev};
}

template <class T>
FASTSEQ_INLINE Values<T, 2> mgu_candidate_forward(T a_n, T f, T h_prev) {
  const T n = tanh(a_n);
  const T h = h_prev + f * (n - h_prev);
  return {h, n};
}

template <class T>
FASTSEQ_INLINE Values<T, 3> mgu_candidate_backward(T dh, T f, T n, T h_prev) {
  const T dn = dh * f;
  const T da_n = dn * dtanh(n);
  const T df = dh * (n - h_prev);
  const T dh_prev = dh - dn;
  return {da_n, df, dh_prev};
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

template <class T>
FASTSEQ_INLINE Values<T, 1> indrnn_tanh_forward(T x_h, T u, T h_prev) {
  const T h = tanh(x_h + u * h_prev);
  return {h};
}

template <class T>
FASTSEQ_INLINE Values<T, 3> indrnn_tanh_backward(T dh, T h, T u, T h_prev) {
  const T dx_h = dh * dtanh(h);
  const T du = dx_h * h_prev;
  const T dh_prev = dx_h * u;
  return {dx_h, du, dh_prev};
}

template <class T>
FASTSEQ_INLINE Values<T, 2> leaky_integrator_forward(T x_h, T u, T h_prev) {
  const T v = h_prev - x_h;
  const T h = x_h + u * v;
  return {h, v};
}

template <class T>
FASTSEQ_INLINE Values<T, 3> leaky_integrator_backward(T dh, T v, T u) {
  const T dh_prev = dh * u;
  const T dx_h = dh - dh_prev;
  const T du = dh * v;
  return {dx_h, du, dh_prev};
}

// Elman 1990, Finding Structure in Time
struct RnnTanh {
  static constexpr const char* NAME = "rnn_tanh";
  static constexpr const char* GATES = "h";
  static constexpr const char* STATES = "h";
  static constexpr const char* EXTRAS = "";
  static constexpr const char* UNITS = "";
  static constexpr int G = 1, C = 0, E = 0, U = 0, PHASES = 1;
  static constexpr int FIRST[] = {0, 1};
  static constexpr int APART = 0;
  static constexpr bool KEEPS_GATES = false, READS_H = false;
  static constexpr bool TAKEN_BACK[] = {true};

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto v = rnn_tanh_forward(at.a(0));
    at.h(v[0]);
    at.save(0, v[0]);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    const auto v = rnn_tanh_backward(at.dvalue(), at.h());
    at.da(0, v[0]);
  }
};

// Elman 1990, Finding Structure in Time; Le et al. 2015 for ReLU
struct RnnRelu {
  static constexpr const char* NAME = "rnn_relu";
  static constexpr const char* GATES = "h";
  static constexpr const char* STATES = "h";
  static constexpr const char* EXTRAS = "";
  static constexpr const char* UNITS = "";
  static constexpr int G = 1, C = 0, E = 0, U = 0, PHASES = 1;
  static constexpr int FIRST[] = {0, 1};
  static constexpr int APART = 0;
  static constexpr bool KEEPS_GATES = false, READS_H = false;
  static constexpr bool TAKEN_BACK[] = {true};

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto v = rnn_relu_forward(at.a(0));
    at.h(v[0]);
    at.save(0, v[0]);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    const auto v = rnn_relu_backward(at.dvalue(), at.h());
    at.da(0, v[0]);
  }
};

// Elman 1990, Finding Structure in Time; Mikolov et al. 2010, Recurrent Neural Network Based
// Language Model
struct RnnSigmoid {
  static constexpr const char* NAME = "rnn_sigmoid";
  static constexpr const char* GATES = "h";
  static constexpr const char* STATES = "h";
  static constexpr const char* EXTRAS = "";
  static constexpr const char* UNITS = "";
  static constexpr int G = 1, C = 0, E = 0, U = 0, PHASES = 1;
  static constexpr int FIRST[] = {0, 1};
  static constexpr int APART = 0;
  static constexpr bool KEEPS_GATES = false, READS_H = false;
  static constexpr bool TAKEN_BACK[] = {true};

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto v = rnn_sigmoid_forward(at.a(0));
    at.h(v[0]);
    at.save(0, v[0]);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    const auto v = rnn_sigmoid_backward(at.dvalue(), at.h());
    at.da(0, v[0]);
  }
};

// Hochreiter and Schmidhuber 1997, Long Short-Term Memory; Gers et al. 2000
struct Lstm {
  static constexpr const char* NAME = "lstm";
  static constexpr const char* GATES = "i f g o";
  static constexpr const char* STATES = "h c";
  static constexpr const char* EXTRAS = "";
  static constexpr const char* UNITS = "";
  static constexpr int G = 4, C = 1, E = 0, U = 0, PHASES = 1;
  static constexpr int FIRST[] = {0, 4};
  static constexpr int APART = 0;
  static constexpr bool KEEPS_GATES = true, READS_H = false;
  static constexpr bool TAKEN_BACK[] = {false, true};

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto v = lstm_forward(at.a(0), at.a(1), at.a(2), at.a(3), at.c_prev(0));
    at.h(v[0]);
    at.c(0, v[1]);
    at.save(0, v[2]);
    at.save(1, v[3]);
    at.save(2, v[4]);
    at.save(3, v[5]);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    const auto v = lstm_backward(at.dvalue(), at.dc(0), at.saved(0), at.saved(1), at.saved(2),
        at.saved(3), at.c(0), at.c_prev(0));
    at.da(0, v[0]);
    at.da(1, v[1]);
    at.da(2, v[2]);
    at.da(3, v[3]);
    at.dc_prev(0, v[4]);
  }
};

// Gers and Schmidhuber 2000, Recurrent Nets that Time and Count
struct PeepholeLstm {
  static constexpr const char* NAME = "peephole_lstm";
  static constexpr const char* GATES = "i f g o";
  static constexpr const char* STATES = "h c";
  static constexpr const char* EXTRAS = "";
  static constexpr const char* UNITS = "ci cf co";
  static constexpr int G = 4, C = 1, E = 0, U = 3, PHASES = 1;
  static constexpr int FIRST[] = {0, 4};
  static constexpr int APART = 0;
  static constexpr bool KEEPS_GATES = true, READS_H = false;
  static constexpr bool TAKEN_BACK[] = {false, true};

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto v = peephole_lstm_forward(at.a(0), at.a(1), at.a(2), at.a(3), at.unit(0), at.unit(1),
        at.unit(2), at.c_prev(0));
    at.h(v[0]);
    at.c(0, v[1]);
    at.save(0, v[2]);
    at.save(1, v[3]);
    at.save(2, v[4]);
    at.save(3, v[5]);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    const auto v = peephole_lstm_backward(at.dvalue(), at.dc(0), at.saved(0), at.saved(1),
        at.saved(2), at.saved(3), at.c(0), at.unit(0), at.unit(1), at.unit(2), at.c_prev(0));
    at.da(0, v[0]);
    at.da(1, v[1]);
    at.da(2, v[2]);
    at.da(3, v[3]);
    at.dunit(0, v[4]);
    at.dunit(1, v[5]);
    at.dunit(2, v[6]);
    at.dc_prev(0, v[7]);
  }
};

// Greff et al. 2017, LSTM: A Search Space Odyssey
struct CoupledLstm {
  static constexpr const char* NAME = "coupled_lstm";
  static constexpr const char* GATES = "f g o";
  static constexpr const char* STATES = "h c";
  static constexpr const char* EXTRAS = "";
  static constexpr const char* UNITS = "";
  static constexpr int G = 3, C = 1, E = 0, U = 0, PHASES = 1;
  static constexpr int FIRST[] = {0, 3};
  static constexpr int APART = 0;
  static constexpr bool KEEPS_GATES = true, READS_H = false;
  static constexpr bool TAKEN_BACK[] = {false, true};

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto v = coupled_lstm_forward(at.a(0), at.a(1), at.a(2), at.c_prev(0));
    at.h(v[0]);
    at.c(0, v[1]);
    at.save(0, v[2]);
    at.save(1, v[3]);
    at.save(2, v[4]);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    const auto v = coupled_lstm_backward(at.dvalue(), at.dc(0), at.saved(0), at.saved(1),
        at.saved(2), at.c(0), at.c_prev(0));
    at.da(0, v[0]);
    at.da(1, v[1]);
    at.da(2, v[2]);
    at.dc_prev(0, v[3]);
  }
};

// Cho et al. 2014, Learning Phrase Representations using RNN Encoder-Decoder, with the reset gate
// after the product as in cuDNN
struct Gru {
  static constexpr const char* NAME = "gru";
  static constexpr const char* GATES = "r z n";
  static constexpr const char* STATES = "h";
  static constexpr const char* EXTRAS = "s_n";
  static constexpr const char* UNITS = "";
  static constexpr int G = 3, C = 0, E = 1, U = 0, PHASES = 1;
  static constexpr int FIRST[] = {0, 3};
  static constexpr int APART = 1;
  static constexpr bool KEEPS_GATES = true, READS_H = true;
  static constexpr bool TAKEN_BACK[] = {false};

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto s_n = at.s(2);
    const auto v = gru_forward(at.a(0), at.a(1), at.x(2), s_n, at.h_prev());
    at.h(v[0]);
    at.save(0, v[1]);
    at.save(1, v[2]);
    at.save(2, v[3]);
    at.save_extra(0, s_n);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    const auto v = gru_backward(at.dvalue(), at.saved(0), at.saved(1), at.saved(2), at.extra(0),
        at.h_prev());
    at.da(0, v[0]);
    at.da(1, v[1]);
    at.dx(2, v[2]);
    at.ds(2, v[3]);
    at.dh_prev(v[4]);
  }
};

// Cho et al. 2014, Learning Phrase Representations using RNN Encoder-Decoder
struct GruResetBefore {
  static constexpr const char* NAME = "gru_reset_before";
  static constexpr const char* GATES = "r z n";
  static constexpr const char* STATES = "h";
  static constexpr const char* EXTRAS = "q";
  static constexpr const char* UNITS = "";
  static constexpr int G = 3, C = 0, E = 1, U = 0, PHASES = 2;
  static constexpr int FIRST[] = {0, 2, 3};
  static constexpr int APART = 0;
  static constexpr bool KEEPS_GATES = true, READS_H = true;
  static constexpr bool TAKEN_BACK[] = {false};

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    if constexpr (PHASE == 0) {
      const auto v = gru_reset_before_gates_forward(at.a(0), at.a(1), at.h_prev());
      at.save_extra(0, v[0]);
      at.save(0, v[1]);
      at.save(1, v[2]);
    } else {
      const auto v = gru_reset_before_candidate_forward(at.a(2), at.saved(1), at.h_prev());
      at.h(v[0]);
      at.save(2, v[1]);
    }
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    if constexpr (PHASE == 0) {
      const auto v = gru_reset_before_gates_backward(at.dvalue(), at.dz(1), at.saved(0),
          at.saved(1), at.h_prev());
      at.da(0, v[0]);
      at.da(1, v[1]);
      at.add_dh_prev(v[2]);
    } else {
      const auto v = gru_reset_before_candidate_backward(at.dvalue(), at.saved(1), at.saved(2),
          at.h_prev());
      at.da(2, v[0]);
      at.dz(1, v[1]);
      at.dh_prev(v[2]);
    }
  }
};

// Zhou et al. 2016, Minimal Gated Unit for Recurrent Neural Networks
struct Mgu {
  static constexpr const char* NAME = "mgu";
  static constexpr const char* GATES = "f n";
  static constexpr const char* STATES = "h";
  static constexpr const char* EXTRAS = "q";
  static constexpr const char* UNITS = "";
  static constexpr int G = 2, C = 0, E = 1, U = 0, PHASES = 2;
  static constexpr int FIRST[] = {0, 1, 2};
  static constexpr int APART = 0;
  static constexpr bool KEEPS_GATES = true, READS_H = true;
  static constexpr bool TAKEN_BACK[] = {false};

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    if constexpr (PHASE == 0) {
      const auto v = mgu_gate_forward(at.a(0), at.h_prev());
      at.save_extra(0, v[0]);
      at.save(0, v[1]);
    } else {
      const auto v = mgu_candidate_forward(at.a(1), at.saved(0), at.h_prev());
      at.h(v[0]);
      at.save(1, v[1]);
    }
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    if constexpr (PHASE == 0) {
      const auto v = mgu_gate_backward(at.dvalue(), at.dz(0), at.saved(0), at.h_prev());
      at.da(0, v[0]);
      at.add_dh_prev(v[1]);
    } else {
      const auto v = mgu_candidate_backward(at.dvalue(), at.saved(0), at.saved(1), at.h_prev());
      at.da(1, v[0]);
      at.dz(0, v[1]);
      at.dh_prev(v[2]);
    }
  }
};

// Li et al. 2018, Independently Recurrent Neural Network (IndRNN)
struct Indrnn {
  static constexpr const char* NAME = "indrnn";
  static constexpr const char* GATES = "h";
  static constexpr const char* STATES = "h";
  static constexpr const char* EXTRAS = "";
  static constexpr const char* UNITS = "u";
  static constexpr int G = 1, C = 0, E = 0, U = 1, PHASES = 1;
  static constexpr int FIRST[] = {0, 0};
  static constexpr int APART = 0;
  static constexpr bool KEEPS_GATES = false, READS_H = true;
  static constexpr bool TAKEN_BACK[] = {true};

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto v = indrnn_forward(at.x(0), at.unit(0), at.h_prev());
    at.h(v[0]);
    at.save(0, v[0]);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    const auto v = indrnn_backward(at.dvalue(), at.h(), at.unit(0), at.h_prev());
    at.dx(0, v[0]);
    at.dunit(0, v[1]);
    at.dh_prev(v[2]);
  }
};

// Li et al. 2018, Independently Recurrent Neural Network (IndRNN)
struct IndrnnTanh {
  static constexpr const char* NAME = "indrnn_tanh";
  static constexpr const char* GATES = "h";
  static constexpr const char* STATES = "h";
  static constexpr const char* EXTRAS = "";
  static constexpr const char* UNITS = "u";
  static constexpr int G = 1, C = 0, E = 0, U = 1, PHASES = 1;
  static constexpr int FIRST[] = {0, 0};
  static constexpr int APART = 0;
  static constexpr bool KEEPS_GATES = false, READS_H = true;
  static constexpr bool TAKEN_BACK[] = {true};

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto v = indrnn_tanh_forward(at.x(0), at.unit(0), at.h_prev());
    at.h(v[0]);
    at.save(0, v[0]);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    const auto v = indrnn_tanh_backward(at.dvalue(), at.h(), at.unit(0), at.h_prev());
    at.dx(0, v[0]);
    at.dunit(0, v[1]);
    at.dh_prev(v[2]);
  }
};

// Mikolov et al. 2014, Learning Longer Memory in Recurrent Neural Networks, the context units
struct LeakyIntegrator {
  static constexpr const char* NAME = "leaky_integrator";
  static constexpr const char* GATES = "h";
  static constexpr const char* STATES = "h";
  static constexpr const char* EXTRAS = "";
  static constexpr const char* UNITS = "u";
  static constexpr int G = 1, C = 0, E = 0, U = 1, PHASES = 1;
  static constexpr int FIRST[] = {0, 0};
  static constexpr int APART = 0;
  static constexpr bool KEEPS_GATES = true, READS_H = true;
  static constexpr bool TAKEN_BACK[] = {false};

  template <int PHASE, class At>
  FASTSEQ_INLINE static void forward(At& at) {
    const auto v = leaky_integrator_forward(at.x(0), at.unit(0), at.h_prev());
    at.h(v[0]);
    at.save(0, v[1]);
  }

  template <int PHASE, class At>
  FASTSEQ_INLINE static void backward(At& at) {
    const auto v = leaky_integrator_backward(at.dvalue(), at.saved(0), at.unit(0));
    at.dx(0, v[0]);
    at.dunit(0, v[1]);
    at.dh_prev(v[2]);
  }
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

// Written by tools/write_cells.py from fastseq/cells; change the cells there.
#pragma once

#define FASTSEQ_CELLS(X) \
  X(RNN_TANH, RnnTanh) \
  X(RNN_RELU, RnnRelu) \
  X(RNN_SIGMOID, RnnSigmoid) \
  X(LSTM, Lstm) \
  X(PEEPHOLE_LSTM, PeepholeLstm) \
  X(COUPLED_LSTM, CoupledLstm) \
  X(GRU, Gru) \
  X(GRU_RESET_BEFORE, GruResetBefore) \
  X(MGU, Mgu) \
  X(INDRNN, Indrnn) \
  X(INDRNN_TANH, IndrnnTanh) \
  X(LEAKY_INTEGRATOR, LeakyIntegrator)

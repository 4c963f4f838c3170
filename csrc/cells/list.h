// Written by tools/write_cells.py from fastseq/cells; change the cells there.
#pragma once

#define FASTSEQ_CELLS(X) \
  X(RNN_TANH, RnnTanh) \
  X(RNN_RELU, RnnRelu) \
  X(LSTM, Lstm) \
  X(GRU, Gru) \
  X(GRU_RESET_BEFORE, GruResetBefore) \
  X(INDRNN, Indrnn)

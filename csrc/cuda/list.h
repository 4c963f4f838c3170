// Written by tools/write_cells.py from fastseq/backends/cuda_plan.py; change the list there.
#pragma once

#define FASTSEQ_UNITS(X) \
  X(rnn_tanh) \
  X(lstm) \
  X(gru) \
  X(indrnn)

#define FASTSEQ_KERNELS_rnn_tanh(X) \
  X(forward, rnn_tanh, RnnTanh, bfloat16, 32) \
  X(forward, rnn_tanh, RnnTanh, bfloat16, 64) \
  X(forward, rnn_tanh, RnnTanh, bfloat16, 128) \
  X(forward, rnn_tanh, RnnTanh, float16, 32) \
  X(forward, rnn_tanh, RnnTanh, float16, 64) \
  X(forward, rnn_tanh, RnnTanh, float16, 128) \
  X(forward, rnn_tanh, RnnTanh, tf32, 32) \
  X(forward, rnn_tanh, RnnTanh, tf32, 64) \
  X(forward, rnn_tanh, RnnTanh, float32, 32) \
  X(forward, rnn_tanh, RnnTanh, float32, 64) \
  X(backward, rnn_tanh, RnnTanh, bfloat16, 32) \
  X(backward, rnn_tanh, RnnTanh, bfloat16, 64) \
  X(backward, rnn_tanh, RnnTanh, bfloat16, 128) \
  X(backward, rnn_tanh, RnnTanh, float16, 32) \
  X(backward, rnn_tanh, RnnTanh, float16, 64) \
  X(backward, rnn_tanh, RnnTanh, float16, 128) \
  X(backward, rnn_tanh, RnnTanh, tf32, 32) \
  X(backward, rnn_tanh, RnnTanh, tf32, 64) \
  X(backward, rnn_tanh, RnnTanh, float32, 32) \
  X(backward, rnn_tanh, RnnTanh, float32, 64)

#define FASTSEQ_KERNELS_lstm(X) \
  X(forward, lstm, Lstm, bfloat16, 32) \
  X(forward, lstm, Lstm, bfloat16, 64) \
  X(forward, lstm, Lstm, bfloat16, 128) \
  X(forward, lstm, Lstm, float16, 32) \
  X(forward, lstm, Lstm, float16, 64) \
  X(forward, lstm, Lstm, float16, 128) \
  X(forward, lstm, Lstm, tf32, 32) \
  X(forward, lstm, Lstm, tf32, 64) \
  X(forward, lstm, Lstm, float32, 32) \
  X(forward, lstm, Lstm, float32, 64) \
  X(backward, lstm, Lstm, bfloat16, 32) \
  X(backward, lstm, Lstm, bfloat16, 64) \
  X(backward, lstm, Lstm, bfloat16, 128) \
  X(backward, lstm, Lstm, float16, 32) \
  X(backward, lstm, Lstm, float16, 64) \
  X(backward, lstm, Lstm, float16, 128) \
  X(backward, lstm, Lstm, tf32, 32) \
  X(backward, lstm, Lstm, tf32, 64) \
  X(backward, lstm, Lstm, float32, 32) \
  X(backward, lstm, Lstm, float32, 64)

#define FASTSEQ_KERNELS_gru(X) \
  X(forward, gru, Gru, bfloat16, 32) \
  X(forward, gru, Gru, bfloat16, 64) \
  X(forward, gru, Gru, bfloat16, 128) \
  X(forward, gru, Gru, float16, 32) \
  X(forward, gru, Gru, float16, 64) \
  X(forward, gru, Gru, float16, 128) \
  X(forward, gru, Gru, tf32, 32) \
  X(forward, gru, Gru, tf32, 64) \
  X(forward, gru, Gru, float32, 32) \
  X(forward, gru, Gru, float32, 64) \
  X(backward, gru, Gru, bfloat16, 32) \
  X(backward, gru, Gru, bfloat16, 64) \
  X(backward, gru, Gru, bfloat16, 128) \
  X(backward, gru, Gru, float16, 32) \
  X(backward, gru, Gru, float16, 64) \
  X(backward, gru, Gru, float16, 128) \
  X(backward, gru, Gru, tf32, 32) \
  X(backward, gru, Gru, tf32, 64) \
  X(backward, gru, Gru, float32, 32) \
  X(backward, gru, Gru, float32, 64)

#define FASTSEQ_KERNELS_indrnn(X) \
  X(forward, indrnn, Indrnn, bfloat16, 32) \
  X(forward, indrnn, Indrnn, bfloat16, 64) \
  X(forward, indrnn, Indrnn, bfloat16, 128) \
  X(forward, indrnn, Indrnn, float16, 32) \
  X(forward, indrnn, Indrnn, float16, 64) \
  X(forward, indrnn, Indrnn, float16, 128) \
  X(forward, indrnn, Indrnn, tf32, 32) \
  X(forward, indrnn, Indrnn, tf32, 64) \
  X(forward, indrnn, Indrnn, float32, 32) \
  X(forward, indrnn, Indrnn, float32, 64) \
  X(backward, indrnn, Indrnn, bfloat16, 32) \
  X(backward, indrnn, Indrnn, bfloat16, 64) \
  X(backward, indrnn, Indrnn, bfloat16, 128) \
  X(backward, indrnn, Indrnn, float16, 32) \
  X(backward, indrnn, Indrnn, float16, 64) \
  X(backward, indrnn, Indrnn, float16, 128) \
  X(backward, indrnn, Indrnn, tf32, 32) \
  X(backward, indrnn, Indrnn, tf32, 64) \
  X(backward, indrnn, Indrnn, float32, 32) \
  X(backward, indrnn, Indrnn, float32, 64)

// Written by tools/write_cells.py from fastseq/backends/cuda_kernels.py; change the list there.
#pragma once

#define FASTSEQ_UNITS(X) \
  X(rnn_tanh) \
  X(rnn_relu) \
  X(rnn_sigmoid) \
  X(lstm) \
  X(peephole_lstm) \
  X(coupled_lstm) \
  X(gru) \
  X(indrnn) \
  X(indrnn_tanh) \
  X(leaky_integrator) \
  X(rows)

#define FASTSEQ_KERNELS_rnn_tanh(X) \
  X(forward, rnn_tanh, RnnTanh, bfloat16, 32) \
  X(backward, rnn_tanh, RnnTanh, bfloat16, 32) \
  X(forward, rnn_tanh, RnnTanh, bfloat16, 64) \
  X(backward, rnn_tanh, RnnTanh, bfloat16, 64) \
  X(forward, rnn_tanh, RnnTanh, bfloat16, 128) \
  X(backward, rnn_tanh, RnnTanh, bfloat16, 128) \
  X(forward, rnn_tanh, RnnTanh, bfloat16, 256) \
  X(backward, rnn_tanh, RnnTanh, bfloat16, 256) \
  X(forward, rnn_tanh, RnnTanh, float16, 32) \
  X(backward, rnn_tanh, RnnTanh, float16, 32) \
  X(forward, rnn_tanh, RnnTanh, float16, 64) \
  X(backward, rnn_tanh, RnnTanh, float16, 64) \
  X(forward, rnn_tanh, RnnTanh, float16, 128) \
  X(backward, rnn_tanh, RnnTanh, float16, 128) \
  X(forward, rnn_tanh, RnnTanh, float16, 256) \
  X(backward, rnn_tanh, RnnTanh, float16, 256) \
  X(forward, rnn_tanh, RnnTanh, tf32, 32) \
  X(backward, rnn_tanh, RnnTanh, tf32, 32) \
  X(forward, rnn_tanh, RnnTanh, tf32, 64) \
  X(backward, rnn_tanh, RnnTanh, tf32, 64) \
  X(forward, rnn_tanh, RnnTanh, tf32, 128) \
  X(backward, rnn_tanh, RnnTanh, tf32, 128) \
  X(forward, rnn_tanh, RnnTanh, float32, 32) \
  X(backward, rnn_tanh, RnnTanh, float32, 32) \
  X(forward, rnn_tanh, RnnTanh, float32, 64) \
  X(backward, rnn_tanh, RnnTanh, float32, 64) \
  X(forward, rnn_tanh, RnnTanh, bfloat16, cluster) \
  X(backward, rnn_tanh, RnnTanh, bfloat16, cluster) \
  X(forward, rnn_tanh, RnnTanh, bfloat16, grid) \
  X(backward, rnn_tanh, RnnTanh, bfloat16, grid) \
  X(forward, rnn_tanh, RnnTanh, bfloat16, wave) \
  X(backward, rnn_tanh, RnnTanh, bfloat16, wave) \
  X(forward, rnn_tanh, RnnTanh, float16, cluster) \
  X(backward, rnn_tanh, RnnTanh, float16, cluster) \
  X(forward, rnn_tanh, RnnTanh, float16, grid) \
  X(backward, rnn_tanh, RnnTanh, float16, grid) \
  X(forward, rnn_tanh, RnnTanh, float16, wave) \
  X(backward, rnn_tanh, RnnTanh, float16, wave) \
  X(forward, rnn_tanh, RnnTanh, tf32, cluster) \
  X(backward, rnn_tanh, RnnTanh, tf32, cluster) \
  X(forward, rnn_tanh, RnnTanh, tf32, grid) \
  X(backward, rnn_tanh, RnnTanh, tf32, grid) \
  X(forward, rnn_tanh, RnnTanh, tf32, wave) \
  X(backward, rnn_tanh, RnnTanh, tf32, wave) \
  X(forward, rnn_tanh, RnnTanh, bfloat16, wide) \
  X(backward, rnn_tanh, RnnTanh, bfloat16, wide) \
  X(forward, rnn_tanh, RnnTanh, float16, wide) \
  X(backward, rnn_tanh, RnnTanh, float16, wide)

#define FASTSEQ_KERNELS_rnn_relu(X) \
  X(forward, rnn_relu, RnnRelu, bfloat16, 32) \
  X(backward, rnn_relu, RnnRelu, bfloat16, 32) \
  X(forward, rnn_relu, RnnRelu, bfloat16, 64) \
  X(backward, rnn_relu, RnnRelu, bfloat16, 64) \
  X(forward, rnn_relu, RnnRelu, bfloat16, 128) \
  X(backward, rnn_relu, RnnRelu, bfloat16, 128) \
  X(forward, rnn_relu, RnnRelu, float16, 32) \
  X(backward, rnn_relu, RnnRelu, float16, 32) \
  X(forward, rnn_relu, RnnRelu, float16, 64) \
  X(backward, rnn_relu, RnnRelu, float16, 64) \
  X(forward, rnn_relu, RnnRelu, float16, 128) \
  X(backward, rnn_relu, RnnRelu, float16, 128) \
  X(forward, rnn_relu, RnnRelu, tf32, 32) \
  X(backward, rnn_relu, RnnRelu, tf32, 32) \
  X(forward, rnn_relu, RnnRelu, tf32, 64) \
  X(backward, rnn_relu, RnnRelu, tf32, 64) \
  X(forward, rnn_relu, RnnRelu, tf32, 128) \
  X(backward, rnn_relu, RnnRelu, tf32, 128) \
  X(forward, rnn_relu, RnnRelu, float32, 32) \
  X(backward, rnn_relu, RnnRelu, float32, 32) \
  X(forward, rnn_relu, RnnRelu, float32, 64) \
  X(backward, rnn_relu, RnnRelu, float32, 64) \
  X(forward, rnn_relu, RnnRelu, bfloat16, cluster) \
  X(backward, rnn_relu, RnnRelu, bfloat16, cluster) \
  X(forward, rnn_relu, RnnRelu, bfloat16, grid) \
  X(backward, rnn_relu, RnnRelu, bfloat16, grid) \
  X(forward, rnn_relu, RnnRelu, bfloat16, wave) \
  X(backward, rnn_relu, RnnRelu, bfloat16, wave) \
  X(forward, rnn_relu, RnnRelu, float16, cluster) \
  X(backward, rnn_relu, RnnRelu, float16, cluster) \
  X(forward, rnn_relu, RnnRelu, float16, grid) \
  X(backward, rnn_relu, RnnRelu, float16, grid) \
  X(forward, rnn_relu, RnnRelu, float16, wave) \
  X(backward, rnn_relu, RnnRelu, float16, wave) \
  X(forward, rnn_relu, RnnRelu, tf32, cluster) \
  X(backward, rnn_relu, RnnRelu, tf32, cluster) \
  X(forward, rnn_relu, RnnRelu, tf32, grid) \
  X(backward, rnn_relu, RnnRelu, tf32, grid) \
  X(forward, rnn_relu, RnnRelu, tf32, wave) \
  X(backward, rnn_relu, RnnRelu, tf32, wave) \
  X(forward, rnn_relu, RnnRelu, bfloat16, wide) \
  X(backward, rnn_relu, RnnRelu, bfloat16, wide) \
  X(forward, rnn_relu, RnnRelu, float16, wide) \
  X(backward, rnn_relu, RnnRelu, float16, wide)

#define FASTSEQ_KERNELS_rnn_sigmoid(X) \
  X(forward, rnn_sigmoid, RnnSigmoid, bfloat16, 32) \
  X(backward, rnn_sigmoid, RnnSigmoid, bfloat16, 32) \
  X(forward, rnn_sigmoid, RnnSigmoid, bfloat16, 64) \
  X(backward, rnn_sigmoid, RnnSigmoid, bfloat16, 64) \
  X(forward, rnn_sigmoid, RnnSigmoid, bfloat16, 128) \
  X(backward, rnn_sigmoid, RnnSigmoid, bfloat16, 128) \
  X(forward, rnn_sigmoid, RnnSigmoid, float16, 32) \
  X(backward, rnn_sigmoid, RnnSigmoid, float16, 32) \
  X(forward, rnn_sigmoid, RnnSigmoid, float16, 64) \
  X(backward, rnn_sigmoid, RnnSigmoid, float16, 64) \
  X(forward, rnn_sigmoid, RnnSigmoid, float16, 128) \
  X(backward, rnn_sigmoid, RnnSigmoid, float16, 128) \
  X(forward, rnn_sigmoid, RnnSigmoid, tf32, 32) \
  X(backward, rnn_sigmoid, RnnSigmoid, tf32, 32) \
  X(forward, rnn_sigmoid, RnnSigmoid, tf32, 64) \
  X(backward, rnn_sigmoid, RnnSigmoid, tf32, 64) \
  X(forward, rnn_sigmoid, RnnSigmoid, tf32, 128) \
  X(backward, rnn_sigmoid, RnnSigmoid, tf32, 128) \
  X(forward, rnn_sigmoid, RnnSigmoid, float32, 32) \
  X(backward, rnn_sigmoid, RnnSigmoid, float32, 32) \
  X(forward, rnn_sigmoid, RnnSigmoid, float32, 64) \
  X(backward, rnn_sigmoid, RnnSigmoid, float32, 64) \
  X(forward, rnn_sigmoid, RnnSigmoid, bfloat16, cluster) \
  X(backward, rnn_sigmoid, RnnSigmoid, bfloat16, cluster) \
  X(forward, rnn_sigmoid, RnnSigmoid, bfloat16, grid) \
  X(backward, rnn_sigmoid, RnnSigmoid, bfloat16, grid) \
  X(forward, rnn_sigmoid, RnnSigmoid, float16, cluster) \
  X(backward, rnn_sigmoid, RnnSigmoid, float16, cluster) \
  X(forward, rnn_sigmoid, RnnSigmoid, float16, grid) \
  X(backward, rnn_sigmoid, RnnSigmoid, float16, grid) \
  X(forward, rnn_sigmoid, RnnSigmoid, tf32, cluster) \
  X(backward, rnn_sigmoid, RnnSigmoid, tf32, cluster) \
  X(forward, rnn_sigmoid, RnnSigmoid, tf32, grid) \
  X(backward, rnn_sigmoid, RnnSigmoid, tf32, grid)

#define FASTSEQ_KERNELS_lstm(X) \
  X(forward, lstm, Lstm, bfloat16, 32) \
  X(backward, lstm, Lstm, bfloat16, 32) \
  X(forward, lstm, Lstm, bfloat16, 64) \
  X(backward, lstm, Lstm, bfloat16, 64) \
  X(forward, lstm, Lstm, bfloat16, 128) \
  X(backward, lstm, Lstm, bfloat16, 128) \
  X(forward, lstm, Lstm, float16, 32) \
  X(backward, lstm, Lstm, float16, 32) \
  X(forward, lstm, Lstm, float16, 64) \
  X(backward, lstm, Lstm, float16, 64) \
  X(forward, lstm, Lstm, float16, 128) \
  X(backward, lstm, Lstm, float16, 128) \
  X(forward, lstm, Lstm, tf32, 32) \
  X(backward, lstm, Lstm, tf32, 32) \
  X(forward, lstm, Lstm, tf32, 64) \
  X(backward, lstm, Lstm, tf32, 64) \
  X(forward, lstm, Lstm, float32, 32) \
  X(backward, lstm, Lstm, float32, 32) \
  X(forward, lstm, Lstm, float32, 64) \
  X(backward, lstm, Lstm, float32, 64) \
  X(forward, lstm, Lstm, bfloat16, cluster) \
  X(backward, lstm, Lstm, bfloat16, cluster) \
  X(forward, lstm, Lstm, bfloat16, grid) \
  X(backward, lstm, Lstm, bfloat16, grid) \
  X(forward, lstm, Lstm, bfloat16, wave) \
  X(backward, lstm, Lstm, bfloat16, wave) \
  X(forward, lstm, Lstm, float16, cluster) \
  X(backward, lstm, Lstm, float16, cluster) \
  X(forward, lstm, Lstm, float16, grid) \
  X(backward, lstm, Lstm, float16, grid) \
  X(forward, lstm, Lstm, float16, wave) \
  X(backward, lstm, Lstm, float16, wave) \
  X(forward, lstm, Lstm, tf32, cluster) \
  X(backward, lstm, Lstm, tf32, cluster) \
  X(forward, lstm, Lstm, tf32, grid) \
  X(backward, lstm, Lstm, tf32, grid) \
  X(forward, lstm, Lstm, tf32, wave) \
  X(backward, lstm, Lstm, tf32, wave) \
  X(forward, lstm, Lstm, bfloat16, wide) \
  X(backward, lstm, Lstm, bfloat16, wide) \
  X(forward, lstm, Lstm, float16, wide) \
  X(backward, lstm, Lstm, float16, wide)

#define FASTSEQ_KERNELS_peephole_lstm(X) \
  X(forward, peephole_lstm, PeepholeLstm, bfloat16, 32) \
  X(backward, peephole_lstm, PeepholeLstm, bfloat16, 32) \
  X(forward, peephole_lstm, PeepholeLstm, bfloat16, 64) \
  X(backward, peephole_lstm, PeepholeLstm, bfloat16, 64) \
  X(forward, peephole_lstm, PeepholeLstm, bfloat16, 128) \
  X(backward, peephole_lstm, PeepholeLstm, bfloat16, 128) \
  X(forward, peephole_lstm, PeepholeLstm, float16, 32) \
  X(backward, peephole_lstm, PeepholeLstm, float16, 32) \
  X(forward, peephole_lstm, PeepholeLstm, float16, 64) \
  X(backward, peephole_lstm, PeepholeLstm, float16, 64) \
  X(forward, peephole_lstm, PeepholeLstm, float16, 128) \
  X(backward, peephole_lstm, PeepholeLstm, float16, 128) \
  X(forward, peephole_lstm, PeepholeLstm, tf32, 32) \
  X(backward, peephole_lstm, PeepholeLstm, tf32, 32) \
  X(forward, peephole_lstm, PeepholeLstm, tf32, 64) \
  X(backward, peephole_lstm, PeepholeLstm, tf32, 64) \
  X(forward, peephole_lstm, PeepholeLstm, float32, 32) \
  X(backward, peephole_lstm, PeepholeLstm, float32, 32) \
  X(forward, peephole_lstm, PeepholeLstm, float32, 64) \
  X(backward, peephole_lstm, PeepholeLstm, float32, 64) \
  X(forward, peephole_lstm, PeepholeLstm, bfloat16, cluster) \
  X(backward, peephole_lstm, PeepholeLstm, bfloat16, cluster) \
  X(forward, peephole_lstm, PeepholeLstm, bfloat16, grid) \
  X(backward, peephole_lstm, PeepholeLstm, bfloat16, grid) \
  X(forward, peephole_lstm, PeepholeLstm, float16, cluster) \
  X(backward, peephole_lstm, PeepholeLstm, float16, cluster) \
  X(forward, peephole_lstm, PeepholeLstm, float16, grid) \
  X(backward, peephole_lstm, PeepholeLstm, float16, grid) \
  X(forward, peephole_lstm, PeepholeLstm, tf32, cluster) \
  X(backward, peephole_lstm, PeepholeLstm, tf32, cluster) \
  X(forward, peephole_lstm, PeepholeLstm, tf32, grid) \
  X(backward, peephole_lstm, PeepholeLstm, tf32, grid)

#define FASTSEQ_KERNELS_coupled_lstm(X) \
  X(forward, coupled_lstm, CoupledLstm, bfloat16, 32) \
  X(backward, coupled_lstm, CoupledLstm, bfloat16, 32) \
  X(forward, coupled_lstm, CoupledLstm, bfloat16, 64) \
  X(backward, coupled_lstm, CoupledLstm, bfloat16, 64) \
  X(forward, coupled_lstm, CoupledLstm, bfloat16, 128) \
  X(backward, coupled_lstm, CoupledLstm, bfloat16, 128) \
  X(forward, coupled_lstm, CoupledLstm, float16, 32) \
  X(backward, coupled_lstm, CoupledLstm, float16, 32) \
  X(forward, coupled_lstm, CoupledLstm, float16, 64) \
  X(backward, coupled_lstm, CoupledLstm, float16, 64) \
  X(forward, coupled_lstm, CoupledLstm, float16, 128) \
  X(backward, coupled_lstm, CoupledLstm, float16, 128) \
  X(forward, coupled_lstm, CoupledLstm, tf32, 32) \
  X(backward, coupled_lstm, CoupledLstm, tf32, 32) \
  X(forward, coupled_lstm, CoupledLstm, tf32, 64) \
  X(backward, coupled_lstm, CoupledLstm, tf32, 64) \
  X(forward, coupled_lstm, CoupledLstm, float32, 32) \
  X(backward, coupled_lstm, CoupledLstm, float32, 32) \
  X(forward, coupled_lstm, CoupledLstm, float32, 64) \
  X(backward, coupled_lstm, CoupledLstm, float32, 64) \
  X(forward, coupled_lstm, CoupledLstm, bfloat16, cluster) \
  X(backward, coupled_lstm, CoupledLstm, bfloat16, cluster) \
  X(forward, coupled_lstm, CoupledLstm, bfloat16, grid) \
  X(backward, coupled_lstm, CoupledLstm, bfloat16, grid) \
  X(forward, coupled_lstm, CoupledLstm, float16, cluster) \
  X(backward, coupled_lstm, CoupledLstm, float16, cluster) \
  X(forward, coupled_lstm, CoupledLstm, float16, grid) \
  X(backward, coupled_lstm, CoupledLstm, float16, grid) \
  X(forward, coupled_lstm, CoupledLstm, tf32, cluster) \
  X(backward, coupled_lstm, CoupledLstm, tf32, cluster) \
  X(forward, coupled_lstm, CoupledLstm, tf32, grid) \
  X(backward, coupled_lstm, CoupledLstm, tf32, grid)

#define FASTSEQ_KERNELS_gru(X) \
  X(forward, gru, Gru, bfloat16, 32) \
  X(backward, gru, Gru, bfloat16, 32) \
  X(forward, gru, Gru, bfloat16, 64) \
  X(backward, gru, Gru, bfloat16, 64) \
  X(forward, gru, Gru, bfloat16, 128) \
  X(backward, gru, Gru, bfloat16, 128) \
  X(forward, gru, Gru, float16, 32) \
  X(backward, gru, Gru, float16, 32) \
  X(forward, gru, Gru, float16, 64) \
  X(backward, gru, Gru, float16, 64) \
  X(forward, gru, Gru, float16, 128) \
  X(backward, gru, Gru, float16, 128) \
  X(forward, gru, Gru, tf32, 32) \
  X(backward, gru, Gru, tf32, 32) \
  X(forward, gru, Gru, tf32, 64) \
  X(backward, gru, Gru, tf32, 64) \
  X(forward, gru, Gru, tf32, 128) \
  X(backward, gru, Gru, tf32, 128) \
  X(forward, gru, Gru, float32, 32) \
  X(backward, gru, Gru, float32, 32) \
  X(forward, gru, Gru, float32, 64) \
  X(backward, gru, Gru, float32, 64) \
  X(forward, gru, Gru, bfloat16, cluster) \
  X(backward, gru, Gru, bfloat16, cluster) \
  X(forward, gru, Gru, bfloat16, grid) \
  X(backward, gru, Gru, bfloat16, grid) \
  X(forward, gru, Gru, bfloat16, wave) \
  X(backward, gru, Gru, bfloat16, wave) \
  X(forward, gru, Gru, float16, cluster) \
  X(backward, gru, Gru, float16, cluster) \
  X(forward, gru, Gru, float16, grid) \
  X(backward, gru, Gru, float16, grid) \
  X(forward, gru, Gru, float16, wave) \
  X(backward, gru, Gru, float16, wave) \
  X(forward, gru, Gru, tf32, cluster) \
  X(backward, gru, Gru, tf32, cluster) \
  X(forward, gru, Gru, tf32, grid) \
  X(backward, gru, Gru, tf32, grid) \
  X(forward, gru, Gru, tf32, wave) \
  X(backward, gru, Gru, tf32, wave) \
  X(forward, gru, Gru, bfloat16, wide) \
  X(backward, gru, Gru, bfloat16, wide) \
  X(forward, gru, Gru, float16, wide) \
  X(backward, gru, Gru, float16, wide)

#define FASTSEQ_KERNELS_indrnn(X) \
  X(forward, indrnn, Indrnn, bfloat16, 64) \
  X(backward, indrnn, Indrnn, bfloat16, 64) \
  X(forward, indrnn, Indrnn, float16, 64) \
  X(backward, indrnn, Indrnn, float16, 64) \
  X(forward, indrnn, Indrnn, float32, 64) \
  X(backward, indrnn, Indrnn, float32, 64)

#define FASTSEQ_KERNELS_indrnn_tanh(X) \
  X(forward, indrnn_tanh, IndrnnTanh, bfloat16, 64) \
  X(backward, indrnn_tanh, IndrnnTanh, bfloat16, 64) \
  X(forward, indrnn_tanh, IndrnnTanh, float16, 64) \
  X(backward, indrnn_tanh, IndrnnTanh, float16, 64) \
  X(forward, indrnn_tanh, IndrnnTanh, float32, 64) \
  X(backward, indrnn_tanh, IndrnnTanh, float32, 64)

#define FASTSEQ_KERNELS_leaky_integrator(X) \
  X(forward, leaky_integrator, LeakyIntegrator, bfloat16, 64) \
  X(backward, leaky_integrator, LeakyIntegrator, bfloat16, 64) \
  X(forward, leaky_integrator, LeakyIntegrator, float16, 64) \
  X(backward, leaky_integrator, LeakyIntegrator, float16, 64) \
  X(forward, leaky_integrator, LeakyIntegrator, float32, 64) \
  X(backward, leaky_integrator, LeakyIntegrator, float32, 64)

#define FASTSEQ_KERNELS_rows(X) \
  X(previous, rows, Rows, bfloat16, 256) \
  X(previous, rows, Rows, float16, 256) \
  X(previous, rows, Rows, float32, 256)

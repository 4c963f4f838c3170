// Written by tools/write_cells.py from fastseq/backends/cuda_kernels.py; change the list there.
//
// FASTSEQ_UNITS(X): each is compiled on its own. FASTSEQ_KERNELS_<unit>(X): unit, name, threads of
// a CTA, how many CTAs shall fit on a multiprocessor, and the function that it calls.
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
  X(previous)

#define FASTSEQ_KERNELS_rnn_tanh(X) \
  X(rnn_tanh, forward_rnn_tanh_bfloat16_32, 64, 8, (forward<RnnTanh, bfloat16, 32>)) \
  X(rnn_tanh, backward_rnn_tanh_bfloat16_32, 64, 8, (backward<RnnTanh, bfloat16, 32>)) \
  X(rnn_tanh, forward_rnn_tanh_bfloat16_64, 128, 3, (forward<RnnTanh, bfloat16, 64>)) \
  X(rnn_tanh, backward_rnn_tanh_bfloat16_64, 128, 3, (backward<RnnTanh, bfloat16, 64>)) \
  X(rnn_tanh, forward_rnn_tanh_bfloat16_128, 256, 1, (forward<RnnTanh, bfloat16, 128>)) \
  X(rnn_tanh, backward_rnn_tanh_bfloat16_128, 256, 1, (backward<RnnTanh, bfloat16, 128>)) \
  X(rnn_tanh, forward_rnn_tanh_bfloat16_256, 512, 1, (forward<RnnTanh, bfloat16, 256>)) \
  X(rnn_tanh, backward_rnn_tanh_bfloat16_256, 512, 1, (backward<RnnTanh, bfloat16, 256>)) \
  X(rnn_tanh, forward_rnn_tanh_float16_32, 64, 8, (forward<RnnTanh, float16, 32>)) \
  X(rnn_tanh, backward_rnn_tanh_float16_32, 64, 8, (backward<RnnTanh, float16, 32>)) \
  X(rnn_tanh, forward_rnn_tanh_float16_64, 128, 3, (forward<RnnTanh, float16, 64>)) \
  X(rnn_tanh, backward_rnn_tanh_float16_64, 128, 3, (backward<RnnTanh, float16, 64>)) \
  X(rnn_tanh, forward_rnn_tanh_float16_128, 256, 1, (forward<RnnTanh, float16, 128>)) \
  X(rnn_tanh, backward_rnn_tanh_float16_128, 256, 1, (backward<RnnTanh, float16, 128>)) \
  X(rnn_tanh, forward_rnn_tanh_float16_256, 512, 1, (forward<RnnTanh, float16, 256>)) \
  X(rnn_tanh, backward_rnn_tanh_float16_256, 512, 1, (backward<RnnTanh, float16, 256>)) \
  X(rnn_tanh, forward_rnn_tanh_tf32_32, 64, 7, (forward<RnnTanh, tf32, 32>)) \
  X(rnn_tanh, backward_rnn_tanh_tf32_32, 64, 7, (backward<RnnTanh, tf32, 32>)) \
  X(rnn_tanh, forward_rnn_tanh_tf32_64, 128, 3, (forward<RnnTanh, tf32, 64>)) \
  X(rnn_tanh, backward_rnn_tanh_tf32_64, 128, 3, (backward<RnnTanh, tf32, 64>)) \
  X(rnn_tanh, forward_rnn_tanh_tf32_128, 256, 1, (forward<RnnTanh, tf32, 128>)) \
  X(rnn_tanh, backward_rnn_tanh_tf32_128, 256, 1, (backward<RnnTanh, tf32, 128>)) \
  X(rnn_tanh, forward_rnn_tanh_float32_32, 64, 6, (forward<RnnTanh, float32, 32>)) \
  X(rnn_tanh, backward_rnn_tanh_float32_32, 64, 6, (backward<RnnTanh, float32, 32>)) \
  X(rnn_tanh, forward_rnn_tanh_float32_64, 128, 2, (forward<RnnTanh, float32, 64>)) \
  X(rnn_tanh, backward_rnn_tanh_float32_64, 128, 2, (backward<RnnTanh, float32, 64>))

#define FASTSEQ_KERNELS_rnn_relu(X) \
  X(rnn_relu, forward_rnn_relu_bfloat16_32, 64, 8, (forward<RnnRelu, bfloat16, 32>)) \
  X(rnn_relu, backward_rnn_relu_bfloat16_32, 64, 8, (backward<RnnRelu, bfloat16, 32>)) \
  X(rnn_relu, forward_rnn_relu_bfloat16_64, 128, 3, (forward<RnnRelu, bfloat16, 64>)) \
  X(rnn_relu, backward_rnn_relu_bfloat16_64, 128, 3, (backward<RnnRelu, bfloat16, 64>)) \
  X(rnn_relu, forward_rnn_relu_bfloat16_128, 256, 1, (forward<RnnRelu, bfloat16, 128>)) \
  X(rnn_relu, backward_rnn_relu_bfloat16_128, 256, 1, (backward<RnnRelu, bfloat16, 128>)) \
  X(rnn_relu, forward_rnn_relu_float16_32, 64, 8, (forward<RnnRelu, float16, 32>)) \
  X(rnn_relu, backward_rnn_relu_float16_32, 64, 8, (backward<RnnRelu, float16, 32>)) \
  X(rnn_relu, forward_rnn_relu_float16_64, 128, 3, (forward<RnnRelu, float16, 64>)) \
  X(rnn_relu, backward_rnn_relu_float16_64, 128, 3, (backward<RnnRelu, float16, 64>)) \
  X(rnn_relu, forward_rnn_relu_float16_128, 256, 1, (forward<RnnRelu, float16, 128>)) \
  X(rnn_relu, backward_rnn_relu_float16_128, 256, 1, (backward<RnnRelu, float16, 128>)) \
  X(rnn_relu, forward_rnn_relu_tf32_32, 64, 7, (forward<RnnRelu, tf32, 32>)) \
  X(rnn_relu, backward_rnn_relu_tf32_32, 64, 7, (backward<RnnRelu, tf32, 32>)) \
  X(rnn_relu, forward_rnn_relu_tf32_64, 128, 3, (forward<RnnRelu, tf32, 64>)) \
  X(rnn_relu, backward_rnn_relu_tf32_64, 128, 3, (backward<RnnRelu, tf32, 64>)) \
  X(rnn_relu, forward_rnn_relu_tf32_128, 256, 1, (forward<RnnRelu, tf32, 128>)) \
  X(rnn_relu, backward_rnn_relu_tf32_128, 256, 1, (backward<RnnRelu, tf32, 128>)) \
  X(rnn_relu, forward_rnn_relu_float32_32, 64, 6, (forward<RnnRelu, float32, 32>)) \
  X(rnn_relu, backward_rnn_relu_float32_32, 64, 6, (backward<RnnRelu, float32, 32>)) \
  X(rnn_relu, forward_rnn_relu_float32_64, 128, 2, (forward<RnnRelu, float32, 64>)) \
  X(rnn_relu, backward_rnn_relu_float32_64, 128, 2, (backward<RnnRelu, float32, 64>))

#define FASTSEQ_KERNELS_rnn_sigmoid(X) \
  X(rnn_sigmoid, forward_rnn_sigmoid_bfloat16_32, 64, 8, (forward<RnnSigmoid, bfloat16, 32>)) \
  X(rnn_sigmoid, backward_rnn_sigmoid_bfloat16_32, 64, 8, (backward<RnnSigmoid, bfloat16, 32>)) \
  X(rnn_sigmoid, forward_rnn_sigmoid_bfloat16_64, 128, 3, (forward<RnnSigmoid, bfloat16, 64>)) \
  X(rnn_sigmoid, backward_rnn_sigmoid_bfloat16_64, 128, 3, (backward<RnnSigmoid, bfloat16, 64>)) \
  X(rnn_sigmoid, forward_rnn_sigmoid_bfloat16_128, 256, 1, (forward<RnnSigmoid, bfloat16, 128>)) \
  X(rnn_sigmoid, backward_rnn_sigmoid_bfloat16_128, 256, 1, (backward<RnnSigmoid, bfloat16, 128>)) \
  X(rnn_sigmoid, forward_rnn_sigmoid_float16_32, 64, 8, (forward<RnnSigmoid, float16, 32>)) \
  X(rnn_sigmoid, backward_rnn_sigmoid_float16_32, 64, 8, (backward<RnnSigmoid, float16, 32>)) \
  X(rnn_sigmoid, forward_rnn_sigmoid_float16_64, 128, 3, (forward<RnnSigmoid, float16, 64>)) \
  X(rnn_sigmoid, backward_rnn_sigmoid_float16_64, 128, 3, (backward<RnnSigmoid, float16, 64>)) \
  X(rnn_sigmoid, forward_rnn_sigmoid_float16_128, 256, 1, (forward<RnnSigmoid, float16, 128>)) \
  X(rnn_sigmoid, backward_rnn_sigmoid_float16_128, 256, 1, (backward<RnnSigmoid, float16, 128>)) \
  X(rnn_sigmoid, forward_rnn_sigmoid_tf32_32, 64, 7, (forward<RnnSigmoid, tf32, 32>)) \
  X(rnn_sigmoid, backward_rnn_sigmoid_tf32_32, 64, 7, (backward<RnnSigmoid, tf32, 32>)) \
  X(rnn_sigmoid, forward_rnn_sigmoid_tf32_64, 128, 3, (forward<RnnSigmoid, tf32, 64>)) \
  X(rnn_sigmoid, backward_rnn_sigmoid_tf32_64, 128, 3, (backward<RnnSigmoid, tf32, 64>)) \
  X(rnn_sigmoid, forward_rnn_sigmoid_tf32_128, 256, 1, (forward<RnnSigmoid, tf32, 128>)) \
  X(rnn_sigmoid, backward_rnn_sigmoid_tf32_128, 256, 1, (backward<RnnSigmoid, tf32, 128>)) \
  X(rnn_sigmoid, forward_rnn_sigmoid_float32_32, 64, 6, (forward<RnnSigmoid, float32, 32>)) \
  X(rnn_sigmoid, backward_rnn_sigmoid_float32_32, 64, 6, (backward<RnnSigmoid, float32, 32>)) \
  X(rnn_sigmoid, forward_rnn_sigmoid_float32_64, 128, 2, (forward<RnnSigmoid, float32, 64>)) \
  X(rnn_sigmoid, backward_rnn_sigmoid_float32_64, 128, 2, (backward<RnnSigmoid, float32, 64>))

#define FASTSEQ_KERNELS_lstm(X) \
  X(lstm, forward_lstm_bfloat16_32, 64, 6, (forward<Lstm, bfloat16, 32>)) \
  X(lstm, backward_lstm_bfloat16_32, 64, 6, (backward<Lstm, bfloat16, 32>)) \
  X(lstm, forward_lstm_bfloat16_64, 128, 2, (forward<Lstm, bfloat16, 64>)) \
  X(lstm, backward_lstm_bfloat16_64, 128, 2, (backward<Lstm, bfloat16, 64>)) \
  X(lstm, forward_lstm_bfloat16_128, 256, 1, (forward<Lstm, bfloat16, 128>)) \
  X(lstm, backward_lstm_bfloat16_128, 256, 1, (backward<Lstm, bfloat16, 128>)) \
  X(lstm, forward_lstm_float16_32, 64, 6, (forward<Lstm, float16, 32>)) \
  X(lstm, backward_lstm_float16_32, 64, 6, (backward<Lstm, float16, 32>)) \
  X(lstm, forward_lstm_float16_64, 128, 2, (forward<Lstm, float16, 64>)) \
  X(lstm, backward_lstm_float16_64, 128, 2, (backward<Lstm, float16, 64>)) \
  X(lstm, forward_lstm_float16_128, 256, 1, (forward<Lstm, float16, 128>)) \
  X(lstm, backward_lstm_float16_128, 256, 1, (backward<Lstm, float16, 128>)) \
  X(lstm, forward_lstm_tf32_32, 64, 5, (forward<Lstm, tf32, 32>)) \
  X(lstm, backward_lstm_tf32_32, 64, 5, (backward<Lstm, tf32, 32>)) \
  X(lstm, forward_lstm_tf32_64, 128, 2, (forward<Lstm, tf32, 64>)) \
  X(lstm, backward_lstm_tf32_64, 128, 2, (backward<Lstm, tf32, 64>)) \
  X(lstm, forward_lstm_float32_32, 64, 4, (forward<Lstm, float32, 32>)) \
  X(lstm, backward_lstm_float32_32, 64, 4, (backward<Lstm, float32, 32>)) \
  X(lstm, forward_lstm_float32_64, 128, 2, (forward<Lstm, float32, 64>)) \
  X(lstm, backward_lstm_float32_64, 128, 2, (backward<Lstm, float32, 64>))

#define FASTSEQ_KERNELS_peephole_lstm(X) \
  X(peephole_lstm, forward_peephole_lstm_bfloat16_32, 64, 6, (forward<PeepholeLstm, bfloat16, 32>)) \
  X(peephole_lstm, backward_peephole_lstm_bfloat16_32, 64, 6, (backward<PeepholeLstm, bfloat16, 32>)) \
  X(peephole_lstm, forward_peephole_lstm_bfloat16_64, 128, 2, (forward<PeepholeLstm, bfloat16, 64>)) \
  X(peephole_lstm, backward_peephole_lstm_bfloat16_64, 128, 2, (backward<PeepholeLstm, bfloat16, 64>)) \
  X(peephole_lstm, forward_peephole_lstm_bfloat16_128, 256, 1, (forward<PeepholeLstm, bfloat16, 128>)) \
  X(peephole_lstm, backward_peephole_lstm_bfloat16_128, 256, 1, (backward<PeepholeLstm, bfloat16, 128>)) \
  X(peephole_lstm, forward_peephole_lstm_float16_32, 64, 6, (forward<PeepholeLstm, float16, 32>)) \
  X(peephole_lstm, backward_peephole_lstm_float16_32, 64, 6, (backward<PeepholeLstm, float16, 32>)) \
  X(peephole_lstm, forward_peephole_lstm_float16_64, 128, 2, (forward<PeepholeLstm, float16, 64>)) \
  X(peephole_lstm, backward_peephole_lstm_float16_64, 128, 2, (backward<PeepholeLstm, float16, 64>)) \
  X(peephole_lstm, forward_peephole_lstm_float16_128, 256, 1, (forward<PeepholeLstm, float16, 128>)) \
  X(peephole_lstm, backward_peephole_lstm_float16_128, 256, 1, (backward<PeepholeLstm, float16, 128>)) \
  X(peephole_lstm, forward_peephole_lstm_tf32_32, 64, 5, (forward<PeepholeLstm, tf32, 32>)) \
  X(peephole_lstm, backward_peephole_lstm_tf32_32, 64, 5, (backward<PeepholeLstm, tf32, 32>)) \
  X(peephole_lstm, forward_peephole_lstm_tf32_64, 128, 2, (forward<PeepholeLstm, tf32, 64>)) \
  X(peephole_lstm, backward_peephole_lstm_tf32_64, 128, 2, (backward<PeepholeLstm, tf32, 64>)) \
  X(peephole_lstm, forward_peephole_lstm_float32_32, 64, 4, (forward<PeepholeLstm, float32, 32>)) \
  X(peephole_lstm, backward_peephole_lstm_float32_32, 64, 4, (backward<PeepholeLstm, float32, 32>)) \
  X(peephole_lstm, forward_peephole_lstm_float32_64, 128, 2, (forward<PeepholeLstm, float32, 64>)) \
  X(peephole_lstm, backward_peephole_lstm_float32_64, 128, 2, (backward<PeepholeLstm, float32, 64>))

#define FASTSEQ_KERNELS_coupled_lstm(X) \
  X(coupled_lstm, forward_coupled_lstm_bfloat16_32, 64, 7, (forward<CoupledLstm, bfloat16, 32>)) \
  X(coupled_lstm, backward_coupled_lstm_bfloat16_32, 64, 7, (backward<CoupledLstm, bfloat16, 32>)) \
  X(coupled_lstm, forward_coupled_lstm_bfloat16_64, 128, 3, (forward<CoupledLstm, bfloat16, 64>)) \
  X(coupled_lstm, backward_coupled_lstm_bfloat16_64, 128, 3, (backward<CoupledLstm, bfloat16, 64>)) \
  X(coupled_lstm, forward_coupled_lstm_bfloat16_128, 256, 1, (forward<CoupledLstm, bfloat16, 128>)) \
  X(coupled_lstm, backward_coupled_lstm_bfloat16_128, 256, 1, (backward<CoupledLstm, bfloat16, 128>)) \
  X(coupled_lstm, forward_coupled_lstm_float16_32, 64, 7, (forward<CoupledLstm, float16, 32>)) \
  X(coupled_lstm, backward_coupled_lstm_float16_32, 64, 7, (backward<CoupledLstm, float16, 32>)) \
  X(coupled_lstm, forward_coupled_lstm_float16_64, 128, 3, (forward<CoupledLstm, float16, 64>)) \
  X(coupled_lstm, backward_coupled_lstm_float16_64, 128, 3, (backward<CoupledLstm, float16, 64>)) \
  X(coupled_lstm, forward_coupled_lstm_float16_128, 256, 1, (forward<CoupledLstm, float16, 128>)) \
  X(coupled_lstm, backward_coupled_lstm_float16_128, 256, 1, (backward<CoupledLstm, float16, 128>)) \
  X(coupled_lstm, forward_coupled_lstm_tf32_32, 64, 6, (forward<CoupledLstm, tf32, 32>)) \
  X(coupled_lstm, backward_coupled_lstm_tf32_32, 64, 6, (backward<CoupledLstm, tf32, 32>)) \
  X(coupled_lstm, forward_coupled_lstm_tf32_64, 128, 2, (forward<CoupledLstm, tf32, 64>)) \
  X(coupled_lstm, backward_coupled_lstm_tf32_64, 128, 2, (backward<CoupledLstm, tf32, 64>)) \
  X(coupled_lstm, forward_coupled_lstm_float32_32, 64, 4, (forward<CoupledLstm, float32, 32>)) \
  X(coupled_lstm, backward_coupled_lstm_float32_32, 64, 4, (backward<CoupledLstm, float32, 32>)) \
  X(coupled_lstm, forward_coupled_lstm_float32_64, 128, 2, (forward<CoupledLstm, float32, 64>)) \
  X(coupled_lstm, backward_coupled_lstm_float32_64, 128, 2, (backward<CoupledLstm, float32, 64>))

#define FASTSEQ_KERNELS_gru(X) \
  X(gru, forward_gru_bfloat16_32, 64, 7, (forward<Gru, bfloat16, 32>)) \
  X(gru, backward_gru_bfloat16_32, 64, 7, (backward<Gru, bfloat16, 32>)) \
  X(gru, forward_gru_bfloat16_64, 128, 3, (forward<Gru, bfloat16, 64>)) \
  X(gru, backward_gru_bfloat16_64, 128, 3, (backward<Gru, bfloat16, 64>)) \
  X(gru, forward_gru_bfloat16_128, 256, 1, (forward<Gru, bfloat16, 128>)) \
  X(gru, backward_gru_bfloat16_128, 256, 1, (backward<Gru, bfloat16, 128>)) \
  X(gru, forward_gru_bfloat16_192, 384, 1, (forward<Gru, bfloat16, 192>)) \
  X(gru, backward_gru_bfloat16_192, 384, 1, (backward<Gru, bfloat16, 192>)) \
  X(gru, forward_gru_float16_32, 64, 7, (forward<Gru, float16, 32>)) \
  X(gru, backward_gru_float16_32, 64, 7, (backward<Gru, float16, 32>)) \
  X(gru, forward_gru_float16_64, 128, 3, (forward<Gru, float16, 64>)) \
  X(gru, backward_gru_float16_64, 128, 3, (backward<Gru, float16, 64>)) \
  X(gru, forward_gru_float16_128, 256, 1, (forward<Gru, float16, 128>)) \
  X(gru, backward_gru_float16_128, 256, 1, (backward<Gru, float16, 128>)) \
  X(gru, forward_gru_float16_192, 384, 1, (forward<Gru, float16, 192>)) \
  X(gru, backward_gru_float16_192, 384, 1, (backward<Gru, float16, 192>)) \
  X(gru, forward_gru_tf32_32, 64, 6, (forward<Gru, tf32, 32>)) \
  X(gru, backward_gru_tf32_32, 64, 6, (backward<Gru, tf32, 32>)) \
  X(gru, forward_gru_tf32_64, 128, 2, (forward<Gru, tf32, 64>)) \
  X(gru, backward_gru_tf32_64, 128, 2, (backward<Gru, tf32, 64>)) \
  X(gru, forward_gru_tf32_128, 256, 1, (forward<Gru, tf32, 128>)) \
  X(gru, backward_gru_tf32_128, 256, 1, (backward<Gru, tf32, 128>)) \
  X(gru, forward_gru_float32_32, 64, 4, (forward<Gru, float32, 32>)) \
  X(gru, backward_gru_float32_32, 64, 4, (backward<Gru, float32, 32>)) \
  X(gru, forward_gru_float32_64, 128, 2, (forward<Gru, float32, 64>)) \
  X(gru, backward_gru_float32_64, 128, 2, (backward<Gru, float32, 64>))

#define FASTSEQ_KERNELS_indrnn(X) \
  X(indrnn, forward_indrnn_bfloat16_64, 128, 4, (forward<Indrnn, bfloat16, 64>)) \
  X(indrnn, backward_indrnn_bfloat16_64, 128, 4, (backward<Indrnn, bfloat16, 64>)) \
  X(indrnn, forward_indrnn_float16_64, 128, 4, (forward<Indrnn, float16, 64>)) \
  X(indrnn, backward_indrnn_float16_64, 128, 4, (backward<Indrnn, float16, 64>)) \
  X(indrnn, forward_indrnn_float32_64, 128, 4, (forward<Indrnn, float32, 64>)) \
  X(indrnn, backward_indrnn_float32_64, 128, 4, (backward<Indrnn, float32, 64>))

#define FASTSEQ_KERNELS_indrnn_tanh(X) \
  X(indrnn_tanh, forward_indrnn_tanh_bfloat16_64, 128, 4, (forward<IndrnnTanh, bfloat16, 64>)) \
  X(indrnn_tanh, backward_indrnn_tanh_bfloat16_64, 128, 4, (backward<IndrnnTanh, bfloat16, 64>)) \
  X(indrnn_tanh, forward_indrnn_tanh_float16_64, 128, 4, (forward<IndrnnTanh, float16, 64>)) \
  X(indrnn_tanh, backward_indrnn_tanh_float16_64, 128, 4, (backward<IndrnnTanh, float16, 64>)) \
  X(indrnn_tanh, forward_indrnn_tanh_float32_64, 128, 4, (forward<IndrnnTanh, float32, 64>)) \
  X(indrnn_tanh, backward_indrnn_tanh_float32_64, 128, 4, (backward<IndrnnTanh, float32, 64>))

#define FASTSEQ_KERNELS_leaky_integrator(X) \
  X(leaky_integrator, forward_leaky_integrator_bfloat16_64, 128, 4, (forward<LeakyIntegrator, bfloat16, 64>)) \
  X(leaky_integrator, backward_leaky_integrator_bfloat16_64, 128, 4, (backward<LeakyIntegrator, bfloat16, 64>)) \
  X(leaky_integrator, forward_leaky_integrator_float16_64, 128, 4, (forward<LeakyIntegrator, float16, 64>)) \
  X(leaky_integrator, backward_leaky_integrator_float16_64, 128, 4, (backward<LeakyIntegrator, float16, 64>)) \
  X(leaky_integrator, forward_leaky_integrator_float32_64, 128, 4, (forward<LeakyIntegrator, float32, 64>)) \
  X(leaky_integrator, backward_leaky_integrator_float32_64, 128, 4, (backward<LeakyIntegrator, float32, 64>))

#define FASTSEQ_KERNELS_previous(X) \
  X(previous, previous_bfloat16, PREVIOUS_THREADS, 1, (previous<Bf16>)) \
  X(previous, previous_float16, PREVIOUS_THREADS, 1, (previous<F16>)) \
  X(previous, previous_float32, PREVIOUS_THREADS, 1, (previous<float>))

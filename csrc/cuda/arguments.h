// What a kernel of csrc/cuda is given: one struct by value, of 64 bits a field, which
// fastseq/backends/cuda.py packs in this order.
//
//   T, B, R, H     steps, sequences, recurrences, hidden units
//   rows           N, of all sequences, and of padding behind them
//   tile           how many sequences a CTA has, 4 or 8; a team of CTAs: up to what it has room for
//   first, start   the first sequence of the launch, and its first recurrence; of teams alone
//   team           how many CTAs share a recurrence, each with a slice of the hidden units
//   layers         of a wave how many layers walk side by side, else 1: rows and states then have
//                  them in front, (layers, N, ...) and (layers, R, ...), but dy and dc_all, which
//                  are of the last, as are y and c_all where nothing is saved
//   reverse        bit r % 32: recurrence r runs backward in time
//   save           whether forward leaves what backward reads: gates, extras
//   lengths        (B,) of sequences sorted by decreasing length, or 0 where all have T steps
//   offsets        (T,) the first row of a step, or 0 where it is time * B
//   gates          (N, R, G, H) Number: the input products with their biases; forward writes the
//                  saved values over them, backward reads those
//   extra          (N, R, E, H) Number: further saved values
//   y              (N, R, H) Number: h at every step
//   c_all          (N, R, H) float32: the other state at every step, or 0
//   h_0, c_0       (R, B, H) Number: initial states, or 0 for zeros
//   h_n, c_n       (R, B, H) Number: final states
//   w_hh           forward  (R, G_hh, HC, HC) Number: rows of gates, inner units of h_{t-1}
//                  backward (R, HC, G_hh, HC) Number: rows of h_{t-1}, inner gates
//                  HC: H as the kernel has it, zeros beyond H
//                  of a team both (R, G_hh, H, H'), as torch has it; H': H in whole vectors of 16
//                  bytes, zeros beyond H
//   w_ih           of a wave (layers - 1, R, G, H, H') Number, of all layers but the first
//   b_ih           of a wave, or 0: (layers - 1, R, G, H) Number, what adds to their input products
//   b_hh           (R, G_hh, H) Number, or 0: of gates that take x and s apart
//   unit           (R, U, H) Number: parameters per hidden unit
//   reset          (R, N) bytes, or 0: where not 0, the states that enter the row are zeroed
//   h_mask         (R, B, H) Number, or 0: multiplies h_{t-1} before its product
//   dy             (N, R, H) Number, or 0: gradient of y;  dc_all likewise of c_all, float32
//   dh_n, dc_n     (R, B, H) Number, or 0: of the final states;  dh_0, dc_0: of the initial ones
//   dgates         (N, R, G, H) Number: gradients of the input products
//   dproduct       (N, R, G_hh, H) Number: of the recurrent ones, where these differ; else 0
//   dbias          (tiles, R, G + apart, H) float32, or 0: dgates summed over time and the
//                  sequences of a tile of the batch, and dproduct of the gates that take x and s apart
//   dunit          (tiles, R, U, H) float32: of unit parameters, likewise
//   packets        of a grid's teams: what they hand to each other, zeros at first; team.h has the
//                  sizes
//   fault, code    where in the host's memory a CTA that waited in vain writes, and what
//   patience       after how many looks it waits no more
#pragma once
#include <stdint.h>

#define FASTSEQ_ARGUMENTS(X) \
  X(int64_t, T) \
  X(int64_t, B) \
  X(int64_t, R) \
  X(int64_t, H) \
  X(int64_t, rows) \
  X(int64_t, tile) \
  X(int64_t, first) \
  X(int64_t, start) \
  X(int64_t, team) \
  X(int64_t, layers) \
  X(int64_t, reverse) \
  X(int64_t, save) \
  X(const int64_t*, lengths) \
  X(const int64_t*, offsets) \
  X(void*, gates) \
  X(void*, extra) \
  X(void*, y) \
  X(float*, c_all) \
  X(const void*, h_0) \
  X(const void*, c_0) \
  X(void*, h_n) \
  X(void*, c_n) \
  X(const void*, w_hh) \
  X(const void*, w_ih) \
  X(const void*, b_ih) \
  X(const void*, b_hh) \
  X(const void*, unit) \
  X(const uint8_t*, reset) \
  X(const void*, h_mask) \
  X(const void*, dy) \
  X(const float*, dc_all) \
  X(const void*, dh_n) \
  X(const void*, dc_n) \
  X(void*, dh_0) \
  X(void*, dc_0) \
  X(void*, dgates) \
  X(void*, dproduct) \
  X(float*, dbias) \
  X(float*, dunit) \
  X(void*, packets) \
  X(int32_t*, fault) \
  X(int64_t, code) \
  X(int64_t, patience)

namespace fastseq {

struct Arguments {
#define FASTSEQ_FIELD(type, name) type name;
  FASTSEQ_ARGUMENTS(FASTSEQ_FIELD)
#undef FASTSEQ_FIELD
};

static_assert(sizeof(void*) == 8, "pointers of 64 bits");

// Their names in this order, with a blank behind each.
#define FASTSEQ_NAME(type, name) #name " "
inline constexpr char ARGUMENT_NAMES[] = FASTSEQ_ARGUMENTS(FASTSEQ_NAME);
#undef FASTSEQ_NAME

}  // namespace fastseq

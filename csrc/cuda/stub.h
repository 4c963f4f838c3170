// Stands where the loops over time will: a product for each cell that has one, and nothing more.
#pragma once
#include "words.h"

namespace fastseq {
namespace FASTSEQ_ISA {

template <class Cell, class Type, int HC>
DEVICE void stub(const Arguments& a) {
  float* out = static_cast<float*>(a.y) + 4 * thread();
  float d[4] = {};
  const auto w = load<Words4>(static_cast<const Words4*>(a.w_hh) + thread());
  if constexpr (Cell::FIRST[Cell::PHASES] > 0) mma(d, w.w, w.w[0], w.w[1], Type());
  for (int k = 0; k < 4; ++k) out[k] = d[k];
}

template <class Cell, class Type, int HC>
constexpr int forward_threads() {
  return 128;
}
template <class Cell, class Type, int HC>
constexpr int forward_ctas() {
  return 1;
}
template <class Cell, class Type, int HC>
DEVICE void forward_walk(const Arguments& a) {
  stub<Cell, Type, HC>(a);
}

template <class Cell, class Type, int HC>
constexpr int backward_threads() {
  return 128;
}
template <class Cell, class Type, int HC>
constexpr int backward_ctas() {
  return 1;
}
template <class Cell, class Type, int HC>
DEVICE void backward_walk(const Arguments& a) {
  stub<Cell, Type, HC>(a);
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

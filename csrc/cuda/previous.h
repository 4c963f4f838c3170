// What w_hh multiplied at every row, for its gradient: h of the step before or h_0, zero behind a
// reset, times the mask. Grid: steps, recurrences, pieces of a step's numbers. Reads y once.
#pragma once
#include "numbers.h"

namespace fastseq {
namespace FASTSEQ_ISA {

struct Rows;  // in the place of a cell

template <class, class, int THREADS>
CONSTANT int previous_threads() {
  return THREADS;
}
template <class, class, int>
CONSTANT int previous_ctas() {
  return 1;
}

// a.dproduct: (N, R, H), what is written. Rows of padding are not.
template <class, class Type, int THREADS>
DEVICE void previous_walk(const Arguments& a) {
  using Number = typename Type::Number;
  const int time = tile_x(), r = tile_y(), H = int(a.H);
  const bool reverse = (a.reverse >> (r % 32)) & 1;
  const int before = reverse ? time + 1 : time - 1;
  const auto row_of = [&](int t) { return a.offsets ? a.offsets[t] : int64_t(t) * a.B; };
  const int64_t row = row_of(time), row_before = before < 0 || before >= a.T ? 0 : row_of(before);
  for (int64_t k = int64_t(tile_z()) * THREADS + thread(); k < a.B * H;
       k += int64_t(tiles_z()) * THREADS) {
    const int b = int(k / H), unit = int(k % H);
    const int length = a.lengths ? int(a.lengths[b]) : int(a.T);
    if (time >= length) return;  // those behind are no longer
    const int64_t state = (int64_t(r) * a.B + b) * H + unit;
    Number h = narrow<Number>(0.0f);
    if (!(a.reset && a.reset[int64_t(r) * a.rows + row + b])) {
      if (before >= 0 && before < length)
        h = static_cast<const Number*>(a.y)[((row_before + b) * a.R + r) * H + unit];
      else if (a.h_0)
        h = static_cast<const Number*>(a.h_0)[state];
    }
    if (a.h_mask)
      h = narrow<Number>(widen(h) * widen(static_cast<const Number*>(a.h_mask)[state]));
    static_cast<Number*>(a.dproduct)[((row + b) * a.R + r) * H + unit] = h;
  }
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

// What a cell declares in C++. tools/write_cells.py writes generated.h and list.h from the cells of
// fastseq/cells/.
//
// A text is templated on the number type, so that one writing serves scalars, SIMD vectors and
// CUDA. Its free names (sigmoid, tanh, dtanh, ...) come from whichever vocabulary was included
// before it: cpu/vocabulary.h for the CPU.
//
// A cell is a struct of constants and, for each phase, how its forward and backward text are fed.
// `At` is where a loop keeps the values of the hidden units at hand:
//
//   a(g)  pre-activation of gate g: input part plus recurrent part     x(g), s(g)  each alone
//   h_prev(), h()                           h before and after the step
//   c_prev(k), c(k), unit(k)                the k-th state beside h; the k-th unit parameter
//   saved(g), extra(k)                      what forward saved: as gate g, as the k-th extra
//   h(v), c(k, v), save(g, v), save_extra(k, v)    what forward leaves
//   dvalue(), dc(k)                         gradient of what the phase returned, and of c(k)
//   da(g, v), dx(g, v), ds(g, v)            gradient of a(g), x(g), s(g)
//   dz(g), dz(g, v)                         of a value that an earlier phase saved as gate g
//   dh_prev(v), dc_prev(k, v)                 add_dh_prev(v), add_dc_prev(k, v): to a later phase's
//   dunit(k, v)                             which is added to that of other rows
//
// Its constants: NAME, and the names of the Python declaration, by
// which a build is told from one of another declaration (GATES, STATES, EXTRAS, UNITS); G gates;
// how many states there are beside h, extras and unit parameters (C, E, U); PHASES. Phase k
// multiplies gates FIRST[k] to FIRST[k + 1] of w_hh, the first phase by h_{t-1}, the second by the
// first extra. The last APART gates take x and s apart. KEEPS_GATES: else backward needs no gates,
// but y. READS_H: whether a text adds h_prev, or its gradient.
// TAKEN_BACK: of each state, h first, whether a backward text takes its value after the step.
#pragma once

#ifndef FASTSEQ_INLINE
#define FASTSEQ_INLINE inline __attribute__((always_inline))
#endif

namespace fastseq {
namespace FASTSEQ_ISA {

template <class T, int N>
struct Values {
  T value[N];
  FASTSEQ_INLINE const T& operator[](int k) const { return value[k]; }
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

// What a cell declares in C++. Its equations are written twice in the project: in Python, in
// fastseq/cells/, and here; a test holds both bodies to the same text.
//
// A text is templated on the number type, so that one writing serves scalars, SIMD vectors and
// CUDA. Its free names (sigmoid, tanh, dtanh, ...) come from whichever vocabulary was included
// before it: cpu/vocabulary.h for the CPU.
//
// A cell is a struct of constants and, for each phase, how its forward and backward text are fed.
// `At` is where a loop keeps the values of the hidden units at hand:
//
//   a(g)  pre-activation of gate g: input part plus recurrent part     x(g), s(g)  each alone
//   h_prev(), c_prev(), h(), c(), unit()    states before and after the step; unit parameter
//   saved(g), extra()                       what forward saved
//   save(g, v), save_extra(v), h(v), c(v)   what forward leaves
//   dvalue(), dc()                          gradient of what the phase returned, and of c
//   da(g, v), dx(g, v), ds(g, v)            gradient of a(g), x(g), s(g)
//   dz(g), dz(g, v)                         of a value that an earlier phase saved as gate g
//   dh_prev(v), dc_prev(v), dunit(v)
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

// The types of a kernel, and the free names of the cells' texts on them.
#pragma once
#include "words.h"

namespace fastseq {
namespace FASTSEQ_ISA {

// What memory holds, in how many parts of TF32 an operand of a product goes (0: as it is), and
// whether the texts' functions may be quick, off by some 2^-22: where what they take was rounded to
// 16 bits, or to TF32, of which both are coarser.
struct bfloat16 {
  using Number = Bf16;
  static constexpr int PARTS = 0;
  static constexpr bool QUICK = true;
};
struct float16 {
  using Number = F16;
  static constexpr int PARTS = 0;
  static constexpr bool QUICK = true;
};
struct tf32 {
  using Number = float;
  static constexpr int PARTS = 1;
  static constexpr bool QUICK = true;
};
// Four products, of two parts each: right to 2^-22 of a product.
struct float32 {
  using Number = float;
  static constexpr int PARTS = 2;
  static constexpr bool QUICK = false;
};

template <bool QUICK>
struct Real {
  float v;
};

#define FASTSEQ_TEMPLATE template <bool Q>
FASTSEQ_TEMPLATE DEVICE Real<Q> operator+(Real<Q> a, Real<Q> b) { return {a.v + b.v}; }
FASTSEQ_TEMPLATE DEVICE Real<Q> operator-(Real<Q> a, Real<Q> b) { return {a.v - b.v}; }
FASTSEQ_TEMPLATE DEVICE Real<Q> operator*(Real<Q> a, Real<Q> b) { return {a.v * b.v}; }
FASTSEQ_TEMPLATE DEVICE Real<Q> operator-(Real<Q> a) { return {-a.v}; }

FASTSEQ_TEMPLATE DEVICE Real<Q> exp(Real<Q> x) { return {exact_exp(x.v)}; }
FASTSEQ_TEMPLATE DEVICE Real<Q> reciprocal(Real<Q> x) { return {exact_ratio(1.0f, x.v)}; }
FASTSEQ_TEMPLATE DEVICE Real<Q> sqrt(Real<Q> x) { return {exact_sqrt(x.v)}; }
FASTSEQ_TEMPLATE DEVICE Real<Q> relu(Real<Q> x) { return {x.v <= 0.0f ? 0.0f : x.v}; }

constexpr float LOG2_E = 1.4426950408889634f;

// 1 / (1 + exp(-x)): 0 where exp overflows.
FASTSEQ_TEMPLATE DEVICE Real<Q> sigmoid(Real<Q> x) {
  if constexpr (Q) return {quick_reciprocal(1.0f + quick_exp2(-LOG2_E * x.v))};
  return {exact_ratio(1.0f, 1.0f + exact_exp(-x.v))};
}

// Quick: 1 - 2 / (1 + exp(2 x)), and near 0, where that cancels, x - x^3 / 3 + 2 x^5 / 15, which is
// off by 2^-19 of tanh(x) at the seam.
FASTSEQ_TEMPLATE DEVICE Real<Q> tanh(Real<Q> x) {
  if constexpr (!Q) return {exact_tanh(x.v)};
  const float far = 1.0f - 2.0f * quick_reciprocal(1.0f + quick_exp2(2.0f * LOG2_E * x.v));
  const float square = x.v * x.v;
  const float near = x.v + x.v * (square * (2.0f / 15.0f * square - 1.0f / 3.0f));
  return {magnitude(x.v) < 0.175f ? near : far};
}

// NaN where either is.
FASTSEQ_TEMPLATE DEVICE Real<Q> maximum(Real<Q> a, Real<Q> b) {
  const float larger = a.v < b.v ? b.v : a.v;
  return {b.v == b.v ? larger : b.v};
}
// min(x, 0) - log1p(exp(-|x|))
FASTSEQ_TEMPLATE DEVICE Real<Q> logsigmoid(Real<Q> x) {
  const float least = x.v > 0.0f ? 0.0f : x.v;
  return {least - exact_log1p(exact_exp(-magnitude(x.v)))};
}

FASTSEQ_TEMPLATE DEVICE Real<Q> dsigmoid(Real<Q> y) { return {y.v * (1.0f - y.v)}; }
// 1 - y * y, without its cancellation near |y| = 1
FASTSEQ_TEMPLATE DEVICE Real<Q> dtanh(Real<Q> y) { return {(1.0f - y.v) * (1.0f + y.v)}; }
FASTSEQ_TEMPLATE DEVICE Real<Q> drelu(Real<Q> y) { return {y.v <= 0.0f ? 0.0f : 1.0f}; }
FASTSEQ_TEMPLATE DEVICE Real<Q> dmaximum(Real<Q> a, Real<Q> b) {
  return {a.v < b.v ? 0.0f : a.v == b.v ? 0.5f : 1.0f};
}
// 1 - exp(y)
FASTSEQ_TEMPLATE DEVICE Real<Q> dlogsigmoid(Real<Q> y) { return {-exact_expm1(y.v)}; }
FASTSEQ_TEMPLATE DEVICE Real<Q> dsqrt(Real<Q> y) { return {exact_ratio(0.5f, y.v)}; }
#undef FASTSEQ_TEMPLATE

// A sum of many, and what was lost in it (Knuth's two-sum): its error is that of one rounding.
struct Sum {
  float value = 0, lost = 0;

  DEVICE void add(float v) {
    const float s = sum(value, v), back = sum(s, -value);
    lost = sum(lost, sum(sum(value, -sum(s, -back)), sum(v, -back)));
    value = s;
  }
  DEVICE float total() const { return sum(value, lost); }
};

// A sum over steps. Of numbers of 16 bits one sum is right enough; EXACT ones are sums of 32 steps.
template <bool EXACT>
struct Total {
  float value = 0;

  DEVICE void add(float v, int) { value += v; }
  DEVICE float total() const { return value; }
};
template <>
struct Total<true> {
  float value = 0, before = 0;

  DEVICE void add(float v, int step) {
    value += v;
    if (step % 32 == 31) before += value, value = 0;
  }
  DEVICE float total() const { return before + value; }
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

#include "../cells/generated.h"

// The free names of the cells' texts, on SIMD vectors. Greatest errors stand, in ULP, in
// tests/test_native_vocabulary.py.
#pragma once
#include "simd.h"

namespace fastseq {
namespace FASTSEQ_ISA {

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2, exp(r) = 1 + r + r^2 q(r).
// q is the minimax polynomial; what it adds to the relative error of exp(r) is 7e-9 in float32 and
// 1.3e-17 in float64. n * LN2_HIGH is exact even without a fused multiply-add.
template <class T>
struct Exp;

template <>
struct Exp<float> {
  static constexpr int MANTISSA = 23, BIAS = 127;
  static constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  static constexpr float LOW = -104, HIGH = 89, SIGMOID_LIMIT = 88, TANH_LIMIT = 20;
  static constexpr float Q[] = {0.5f, 0.16666576266288757f, 0.04166637361049652f,
                                0.008363180793821812f, 0.0013941123615950346f};
};

template <>
struct Exp<double> {
  static constexpr int MANTISSA = 52, BIAS = 1023;
  static constexpr double LN2_HIGH = 6.93147180369123816490e-01,
                          LN2_LOW = 1.90821492927058770002e-10;
  static constexpr double LOW = -746, HIGH = 710, SIGMOID_LIMIT = 709, TANH_LIMIT = 40;
  static constexpr double Q[] = {0.5000000000000001,     0.16666666666666674,
                                 0.04166666666662412,    0.008333333333322208,
                                 0.0013888888917215384,  0.00019841269886586277,
                                 2.4801521293745646e-05, 2.755724234223733e-06,
                                 2.7620089361777497e-07, 2.5110047746466714e-08};
};

template <class T>
struct Bits {
  typedef typename Integer<T>::type type __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
};

// t: its low bits hold n + BIAS, because adding 1.5 * 2^MANTISSA + BIAS leaves the rounded n in the
// low bits of the sum, so that one shift of t makes 2^n. r and q as above.
template <class T>
struct SplitExp {
  typename Bits<T>::type t;
  Vec<T> r, q;

  FASTSEQ_INLINE explicit SplitExp(Vec<T> x) {
    using E = Exp<T>;
    constexpr T ROUNDER = T(1.5) * T(int64_t(1) << E::MANTISSA) + E::BIAS;
    const Vec<T> sum = fma(x, splat(T(1.4426950408889634)), splat(ROUNDER));
    const Vec<T> n = sum - splat(ROUNDER);
    r = fma(n, splat(-E::LN2_HIGH), x);
    r = fma(n, splat(-E::LN2_LOW), r);
    constexpr int TERMS = sizeof(E::Q) / sizeof(T);
    q = splat(E::Q[TERMS - 1]);
#pragma GCC unroll 16
    for (int k = TERMS - 2; k >= 0; --k) q = fma(q, r, splat(E::Q[k]));
    t = (typename Bits<T>::type)sum;
  }
};

template <class V>
struct Element {
  using type = std::remove_reference_t<decltype(V{}[0])>;
};

template <class V>
FASTSEQ_INLINE V exp(V given) {
  using T = typename Element<V>::type;
  using E = Exp<T>;
  const V x = at_most<T>(at_least<T>(given, E::LOW), E::HIGH);
  const SplitExp<T> e(x);
  V p = fma(fma(e.q, e.r, splat(T(1))), e.r, splat(T(1)));
  // 2^n in two factors, so that the result overflows to inf and underflows through denormals,
  // rounded once. n + BIAS is brought back from the low bits of t with its sign.
  constexpr int SPARE = int(8 * sizeof(T)) - E::MANTISSA + 1;
  const auto n = ((e.t << SPARE) >> SPARE) - E::BIAS;
  const auto half = n >> 1, rest = n - half;
  p *= (V)((half + E::BIAS) << E::MANTISSA);
  p *= (V)((rest + E::BIAS) << E::MANTISSA);
  return p;
}

// exp(x) of x <= 0, but 0 where that would be less than about the least normal number.
template <class V>
FASTSEQ_INLINE V exp_of_negative(V x) {
  using T = typename Element<V>::type;
  using E = Exp<T>;
  const SplitExp<T> e(larger(splat(-E::SIGMOID_LIMIT), x));  // NaN where x is
  const V p = fma(fma(e.q, e.r, splat(T(1))), e.r, splat(T(1)));
  return p * (V)(e.t << E::MANTISSA);
}

// exp(x) / (1 + exp(x)). At the lower limit 2^n comes out as 0, so that what would be denormal is
// 0; at the upper one exp(x) is finite.
template <class V>
FASTSEQ_INLINE V sigmoid(V given) {
  using T = typename Element<V>::type;
  using E = Exp<T>;
  const V x = at_most<T>(at_least<T>(given, -E::SIGMOID_LIMIT), E::SIGMOID_LIMIT);
  const SplitExp<T> e(x);
  const V p = fma(fma(e.q, e.r, splat(T(1))), e.r, splat(T(1)));
  const V exp_x = p * (V)(e.t << E::MANTISSA);
  return exp_x / (exp_x + splat(T(1)));
}

// With m = exp(2|x|) - 1, tanh|x| = m / (m + 2). m = 2^n (exp(r) - 1) + (2^n - 1) with n >= 0, so
// nothing cancels and near 0 the relative accuracy is kept.
template <class V>
FASTSEQ_INLINE V tanh(V x) {
  using T = typename Element<V>::type;
  using E = Exp<T>;
  using B = typename Bits<T>::type;
  const B sign = (B)splat(T(-0.0));
  const V size = (V)((B)x & ~sign);
  const SplitExp<T> e(at_most<T>(size + size, E::TANH_LIMIT));
  const V scale = (V)(e.t << E::MANTISSA);
  const V p = fma(e.r * e.r, e.q, e.r);
  const V m = fma(scale, p, scale - splat(T(1)));
  const V y = m / (m + splat(T(2)));
  return (V)((B)y | ((B)x & sign));
}

template <class V>
FASTSEQ_INLINE V relu(V x) {
  using T = typename Element<V>::type;
  return at_least<T>(x, 0);
}

template <class V>
FASTSEQ_INLINE V reciprocal(V x) {
  using T = typename Element<V>::type;
  return splat(T(1)) / x;
}

// NaN where either is.
template <class V>
FASTSEQ_INLINE V maximum(V a, V b) {
  const V larger = a < b ? b : a;
  return b == b ? larger : b;
}

// log1p(t) = s + s w g(w) with s = 2 t / (2 + t), w = s^2, for 0 <= t <= 1. g is the minimax
// polynomial; what it adds to the relative error is 5e-9 in float32 and 1.4e-18 in float64.
template <class T>
struct Log1p;
template <>
struct Log1p<float> {
  static constexpr float G[] = {0.08333301544189453f, 0.01250678114593029f, 0.0021874329540878534f,
                                0.0005473527126014233f};
};
template <>
struct Log1p<double> {
  static constexpr double G[] = {0.08333333333333288,    0.012500000000049144,
                                 0.0022321428553009983,  0.00043402781190950303,
                                 8.877804650658325e-05,  1.8782421773348337e-05,
                                 4.059135077360162e-06,  9.236208645175118e-07,
                                 1.590751205243499e-07,  8.115072007421204e-08};
};

// w g(w).
template <class T>
FASTSEQ_INLINE Vec<T> log1p_rest(Vec<T> w) {
  using L = Log1p<T>;
  constexpr int TERMS = sizeof(L::G) / sizeof(T);
  Vec<T> g = splat(L::G[TERMS - 1]);
#pragma GCC unroll 16
  for (int k = TERMS - 2; k >= 0; --k) g = fma(g, w, splat(L::G[k]));
  return w * g;
}

// min(x, 0) - log1p(exp(-|x|)). s is t where t is denormal.
template <class V>
FASTSEQ_INLINE V logsigmoid(V x) {
  using T = typename Element<V>::type;
  using B = typename Bits<T>::type;
  const V t = exp((V)((B)x | (B)splat(T(-0.0))));
  const V s = (t + t) / (t + splat(T(2))), w = s * s;
  return at_most<T>(x, 0) - fma(log1p_rest<T>(w), s, s);
}

// log(x) of normal, positive numbers, within 2 ULP; NaN of NaN. x = 2^n m with m from sqrt(1/2) to sqrt(2),
// so that n log 2 cancels nothing of log m.
template <class V>
FASTSEQ_INLINE V log(V x) {
  using T = typename Element<V>::type;
  using E = Exp<T>;
  using B = typename Bits<T>::type;
  const B bits = (B)x, n = (bits - (B)splat(T(0.70710678118654752))) >> E::MANTISSA;
  const V t = (V)(bits - (n << E::MANTISSA)) - splat(T(1));
  const V s = (t + t) / (t + splat(T(2)));
  const V times = __builtin_convertvector(n, V), rest = log1p_rest<T>(s * s) * s;
  const V low = fma(times, splat(T(E::LN2_LOW)), rest);
  return fma(times, splat(T(E::LN2_HIGH)), s + low) + (x - x);
}

template <class V>
FASTSEQ_INLINE V dsigmoid(V y) {
  using T = typename Element<V>::type;
  return y * (splat(T(1)) - y);
}

// 1 - y * y, without its cancellation near |y| = 1 where there is no fused multiply-add.
template <class V>
FASTSEQ_INLINE V dtanh(V y) {
  using T = typename Element<V>::type;
  return (splat(T(1)) - y) * (splat(T(1)) + y);
}

template <class V>
FASTSEQ_INLINE V drelu(V y) {
  using T = typename Element<V>::type;
  return y <= splat(T(0)) ? splat(T(0)) : splat(T(1));
}

// Of maximum(a, b) in a.
template <class V>
FASTSEQ_INLINE V dmaximum(V a, V b) {
  using T = typename Element<V>::type;
  const V slope = a == b ? splat(T(0.5)) : splat(T(1));
  return a < b ? splat(T(0)) : slope;
}

// 1 - exp(y) = (1 - 2^n) - 2^n (exp(r) - 1) with n <= 0, so that nothing cancels.
template <class V>
FASTSEQ_INLINE V dlogsigmoid(V y) {
  using T = typename Element<V>::type;
  using E = Exp<T>;
  const SplitExp<T> e(at_most<T>(at_least<T>(y, -E::SIGMOID_LIMIT), 0));
  const V scale = (V)(e.t << E::MANTISSA);
  const V p = fma(e.r * e.r, e.q, e.r);
  return (splat(T(1)) - scale) - scale * p;
}

template <class V>
FASTSEQ_INLINE V dsqrt(V y) {
  using T = typename Element<V>::type;
  return splat(T(0.5)) / y;
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

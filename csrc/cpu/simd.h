// Vectors of one instruction set, on the vector extension of GCC and Clang: `a * b + c` on a
// Vec<T> is lane by lane, in the widest registers that the file is compiled for.
//
// Each instruction set has its own namespace, FASTSEQ_ISA, for everything that is inline: two
// functions of one name, compiled for two sets, would be merged by the linker.
#pragma once
#include <cstdint>
#include <cstring>

#include "asan.h"
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FASTSEQ_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define FASTSEQ_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTSEQ_VECTOR_BYTES 32
#else
#define FASTSEQ_VECTOR_BYTES 16
#endif

namespace fastseq {
namespace FASTSEQ_ISA {

using index = int64_t;

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(FASTSEQ_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vec = typename Vector<T>::type;

template <class T>
constexpr int LANES = FASTSEQ_VECTOR_BYTES / static_cast<int>(sizeof(T));

// How many rows by how many vectors of accumulators stay in registers.
#if FASTSEQ_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

template <class T>
struct Integer;
template <>
struct Integer<float> {
  using type = int32_t;
};
template <>
struct Integer<double> {
  using type = int64_t;
};

template <class T>
FASTSEQ_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(p);
}

template <class T>
FASTSEQ_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(p) = v;
}

template <class T>
FASTSEQ_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}

// The first n lanes alone; the others are zero, and no memory behind them is touched.
// AddressSanitizer does not look at masked loads and stores.
#if defined(__AVX512F__) && !defined(FASTSEQ_ASAN)
FASTSEQ_INLINE Vec<float> load_part(const float* p, int n) {
  return (Vec<float>)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
FASTSEQ_INLINE Vec<double> load_part(const double* p, int n) {
  return (Vec<double>)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
}
FASTSEQ_INLINE void store_part(float* p, Vec<float> v, int n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}
FASTSEQ_INLINE void store_part(double* p, Vec<double> v, int n) {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
}
#else
template <class T>
FASTSEQ_INLINE Vec<T> load_part(const T* p, int n) {
  T lanes[LANES<T>] = {};
  std::memcpy(lanes, p, sizeof(T) * n);
  return load(lanes);
}
template <class T>
FASTSEQ_INLINE void store_part(T* p, Vec<T> v, int n) {
  T lanes[LANES<T>];
  store(lanes, v);
  std::memcpy(p, lanes, sizeof(T) * n);
}
#endif

// n flags of a byte each, 0 or 1, as lanes to choose by; the other lanes have none. By instructions
// where there are some: __builtin_convertvector of so few bytes goes through a register for each.
template <class T>
FASTSEQ_INLINE auto load_flags(const uint8_t* p, int n) {
  typedef typename Integer<T>::type Lanes __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  int8_t bytes[16] = {};
  const void* from = p;
  if (n < LANES<T>) from = std::memcpy(bytes, p, n);
#if defined(__AVX512F__)
  const __m128i* flags = static_cast<const __m128i*>(from);
  if (sizeof(T) == 8) return (Lanes)_mm512_maskz_cvtepi8_epi64(0xff, _mm_loadl_epi64(flags));
  return (Lanes)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(flags));
#elif defined(__AVX2__)
  if (sizeof(T) == 8) {
    int four;
    std::memcpy(&four, from, sizeof four);
    return (Lanes)_mm256_cvtepi8_epi64(_mm_cvtsi32_si128(four));
  }
  return (Lanes)_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
#else
  typedef int8_t Bytes __attribute__((vector_size(LANES<T>)));
  Bytes loaded;
  std::memcpy(&loaded, from, sizeof loaded);
  return __builtin_convertvector(loaded, Lanes);
#endif
}

// a * b + c, rounded once where the instruction set can.
#if defined(__AVX512F__)
FASTSEQ_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
FASTSEQ_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__AVX2__)
FASTSEQ_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
FASTSEQ_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
FASTSEQ_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
FASTSEQ_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
template <class V>
FASTSEQ_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
#endif

// Rounded once. (GCC 12 warns of its own _mm512_sqrt_ps, so all lanes are masked in.)
#if defined(__AVX512F__)
FASTSEQ_INLINE Vec<float> sqrt(Vec<float> x) {
  return (Vec<float>)_mm512_maskz_sqrt_ps((__mmask16)0xffff, (__m512)x);
}
FASTSEQ_INLINE Vec<double> sqrt(Vec<double> x) {
  return (Vec<double>)_mm512_maskz_sqrt_pd((__mmask8)0xff, (__m512d)x);
}
#elif defined(__AVX2__)
FASTSEQ_INLINE Vec<float> sqrt(Vec<float> x) { return (Vec<float>)_mm256_sqrt_ps((__m256)x); }
FASTSEQ_INLINE Vec<double> sqrt(Vec<double> x) { return (Vec<double>)_mm256_sqrt_pd((__m256d)x); }
#elif defined(__aarch64__)
FASTSEQ_INLINE Vec<float> sqrt(Vec<float> x) { return (Vec<float>)vsqrtq_f32((float32x4_t)x); }
FASTSEQ_INLINE Vec<double> sqrt(Vec<double> x) { return (Vec<double>)vsqrtq_f64((float64x2_t)x); }
#else
FASTSEQ_INLINE Vec<float> sqrt(Vec<float> x) {
  for (int l = 0; l < LANES<float>; ++l) x[l] = __builtin_sqrtf(x[l]);
  return x;
}
FASTSEQ_INLINE Vec<double> sqrt(Vec<double> x) {
  for (int l = 0; l < LANES<double>; ++l) x[l] = __builtin_sqrt(x[l]);
  return x;
}
#endif

// p[0] to p[left - 1], as many as there are lanes; the other lanes are zero.
template <class T>
FASTSEQ_INLINE Vec<T> load_upto(const T* p, index left) {
  return left >= LANES<T> ? load(p) : left > 0 ? load_part(p, static_cast<int>(left)) : Vec<T>{};
}

// A pair is two numbers rounded to bfloat16 in one 32-bit element, the first in its low half. The
// instruction that multiplies them takes denormals for zeros and rounds to nearest even.
template <class T>
constexpr bool HAS_PAIRS = false;
#if defined(__AVX512BF16__)
template <>
constexpr bool HAS_PAIRS<float> = true;

// c + a_first * b_first + a_second * b_second
FASTSEQ_INLINE Vec<float> dot(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
// Lane by lane.
FASTSEQ_INLINE Vec<float> pair(Vec<float> first, Vec<float> second) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  const auto bits = [](Vec<float> v) {
    return __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)v), Words);
  };
  return (Vec<float>)(bits(first) | bits(second) << 16);
}
// Pairs of neighbours, first those of `low`, then those of `high`.
FASTSEQ_INLINE Vec<float> pair_neighbours(Vec<float> low, Vec<float> high) {
  return (Vec<float>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
// The same as load_upto, of bfloat16.
FASTSEQ_INLINE Vec<float> load_upto(const uint16_t* p, index left) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef uint16_t Halves __attribute__((vector_size(32)));
#if defined(FASTSEQ_ASAN)
  Halves halves = {};
  if (left > 0) std::memcpy(&halves, p, sizeof(uint16_t) * (left < 16 ? left : 16));
#else
  const unsigned lanes = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
  const Halves halves = (Halves)_mm256_maskz_loadu_epi16((__mmask16)lanes, p);
#endif
  return (Vec<float>)(__builtin_convertvector(halves, Words) << 16);
}
// A number whose low half is empty is the bfloat16 in its high half.
FASTSEQ_INLINE Vec<float> rounded(Vec<float> v) { return pair(Vec<float>{}, v); }
#endif

// NaN stays NaN.
template <class T>
FASTSEQ_INLINE Vec<T> at_least(Vec<T> x, T low) {
  return x < splat(low) ? splat(low) : x;
}
template <class T>
FASTSEQ_INLINE Vec<T> at_most(Vec<T> x, T high) {
  return x > splat(high) ? splat(high) : x;
}

template <class T>
FASTSEQ_INLINE T sum(Vec<T> v) {
  T total[LANES<T>];
  store(total, v);
  for (int width = LANES<T> / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) total[k] += total[k + width];
  return total[0];
}
#if defined(__AVX512F__)
template <>
FASTSEQ_INLINE float sum<float>(Vec<float> v) {
  return _mm512_reduce_add_ps((__m512)v);
}
template <>
FASTSEQ_INLINE double sum<double>(Vec<double> v) {
  return _mm512_reduce_add_pd((__m512d)v);
}
#endif

// a > b ? a : b, lane by lane, and a < b ? a : b: b where either is NaN. One instruction, of which the
// compiler makes two.
template <class V>
FASTSEQ_INLINE V larger(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm512_maskz_max_ps((__mmask16)0xffff, (__m512)a, (__m512)b);
  else
    return (V)_mm512_maskz_max_pd((__mmask8)0xff, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm256_max_ps((__m256)a, (__m256)b);
  else return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}
template <class V>
FASTSEQ_INLINE V smaller(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm512_maskz_min_ps((__mmask16)0xffff, (__m512)a, (__m512)b);
  else
    return (V)_mm512_maskz_min_pd((__mmask8)0xff, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm256_min_ps((__m256)a, (__m256)b);
  else return (V)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}

// Which lanes of a and b are equal, a bit each.
template <class V>
FASTSEQ_INLINE uint64_t equal_lanes(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
  else return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ);
#elif defined(__AVX2__)
  if constexpr (sizeof(a[0]) == 4)
    return static_cast<unsigned>(_mm256_movemask_ps((__m256)(a == b)));
  else
    return static_cast<unsigned>(_mm256_movemask_pd((__m256d)(a == b)));
#else
  uint64_t bits = 0;
  const auto same = a == b;
  for (size_t l = 0; l < sizeof(V) / sizeof(a[0]); ++l) bits |= uint64_t(same[l] != 0) << l;
  return bits;
#endif
}

// v, whose lanes l and l ^ WIDTH are exchanged.
template <class T, int WIDTH>
FASTSEQ_INLINE Vec<T> swapped(Vec<T> v) {
#if defined(__clang__)
  Vec<T> out;
  for (int l = 0; l < LANES<T>; ++l) out[l] = v[l ^ WIDTH];
  return out;
#else
  typedef typename Integer<T>::type Index __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  Index from;
  for (int l = 0; l < LANES<T>; ++l) from[l] = l ^ WIDTH;
  return __builtin_shuffle(v, from);
#endif
}
// The sum and the largest of all lanes, in every lane.
template <class T, int WIDTH = LANES<T> / 2>
FASTSEQ_INLINE Vec<T> every_sum(Vec<T> v) {
  v = v + swapped<T, WIDTH>(v);
  if constexpr (WIDTH > 1) return every_sum<T, WIDTH / 2>(v);
  else return v;
}
template <class T, int WIDTH = LANES<T> / 2>
FASTSEQ_INLINE Vec<T> every_largest(Vec<T> v) {
  v = larger(v, swapped<T, WIDTH>(v));
  if constexpr (WIDTH > 1) return every_largest<T, WIDTH / 2>(v);
  else return v;
}

// As many of v as fit at p, of which `left` are left.
template <class T>
FASTSEQ_INLINE void store_upto(T* p, Vec<T> v, index left) {
  if (left >= LANES<T>) store(p, v);
  else if (left > 0) store_part(p, v, static_cast<int>(left));
}

// A square of LANES vectors, transposed in place: vector i, lane j becomes vector j, lane i.
template <class T, int WIDTH>
FASTSEQ_INLINE void exchange(Vec<T>* v) {
  using I = typename Integer<T>::type;
  typedef I Index __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  Index low, high;
  for (int l = 0; l < LANES<T>; ++l) {
    const bool second = (l & WIDTH) != 0;
    low[l] = second ? LANES<T> + l - WIDTH : l;
    high[l] = second ? LANES<T> + l : l + WIDTH;
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES<T>; ++i) {
    if (i & WIDTH) continue;
    const Vec<T> a = v[i], b = v[i + WIDTH];
#if defined(__clang__)
    Vec<T> x, y;
    for (int l = 0; l < LANES<T>; ++l) {
      x[l] = low[l] < LANES<T> ? a[low[l]] : b[low[l] - LANES<T>];
      y[l] = high[l] < LANES<T> ? a[high[l]] : b[high[l] - LANES<T>];
    }
    v[i] = x, v[i + WIDTH] = y;
#else
    v[i] = __builtin_shuffle(a, b, low);
    v[i + WIDTH] = __builtin_shuffle(a, b, high);
#endif
  }
  if constexpr (WIDTH > 1) exchange<T, WIDTH / 2>(v);
}
template <class T>
FASTSEQ_INLINE void transpose(Vec<T>* v) {
  exchange<T, LANES<T> / 2>(v);
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

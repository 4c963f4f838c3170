// Masks at random: words of Philox4x32-10 (Salmon et al. 2011), whose key is a seed and whose counter
// names a hidden unit, so that a mask is a pure function of the two.
//
// A lane of 64 bits holds 32 of a counter: a product of two of them is one instruction, and what is
// left in the upper half no instruction reads. 0.3 ns a unit with AVX-512, 0.8 with AVX2, 1.5 with SSE2 (Zen 5).
#pragma once
#include "call.h"
#include "simd.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastseq {
namespace FASTSEQ_ISA {

typedef uint64_t Words __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
typedef uint32_t Halves __attribute__((vector_size(FASTSEQ_VECTOR_BYTES / 2)));

// Lane by lane, of the lower halves.
FASTSEQ_INLINE Words multiply(Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_mul_epu32((__mmask8)0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The counters of COUNT vectors of blocks, from `block` on, and what is kept of the units of each: four
// bytes a block.
template <int COUNT>
FASTSEQ_INLINE void draw(const DrawCall& call, index block, uint32_t id, uint32_t site, uint32_t step,
                         uint8_t* out) {
  constexpr int L = FASTSEQ_VECTOR_BYTES / 8;
  const Words none{}, first = none + 0xD2511F53u, second = none + 0xCD9E8D57u;
  Words lane, c[COUNT][4];
  for (int l = 0; l < L; ++l) lane[l] = static_cast<uint64_t>(l);
  for (int v = 0; v < COUNT; ++v) {
    c[v][0] = lane + static_cast<uint64_t>(block + v * L);
    c[v][1] = none + id, c[v][2] = none + site, c[v][3] = none + step;
  }
  uint32_t k_0 = call.key[0], k_1 = call.key[1];
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round, k_0 += 0x9E3779B9u, k_1 += 0xBB67AE85u)
#pragma GCC unroll 4
    for (int v = 0; v < COUNT; ++v) {
      const Words p = multiply(c[v][0], first), q = multiply(c[v][2], second);
      c[v][0] = (q >> 32) ^ c[v][1] ^ (none + k_0), c[v][2] = (p >> 32) ^ c[v][3] ^ (none + k_1);
      c[v][1] = q, c[v][3] = p;
    }
  const Words threshold = none + call.threshold;
  for (int v = 0; v < COUNT; ++v) {
    Words kept{};  // a difference below zero has its highest bit
    for (int w = 0; w < 4; ++w) kept |= (((c[v][w] & 0xffffffffu) - threshold) >> 63 ^ 1) << 8 * w;
    const Halves bytes = __builtin_convertvector(kept, Halves);
    std::memcpy(out + v * sizeof bytes, &bytes, sizeof bytes);
  }
}

// The rows, of all sites one behind the other, that thread `id` of `count` draws.
inline void draw_masks(const DrawCall& call, int id, int count) {
  constexpr int TOGETHER = 4;
  constexpr index WIDTH = TOGETHER * FASTSEQ_VECTOR_BYTES / 2;  // units
  const index all = call.sites * call.rows;
  for (index n = all * id / count; n < all * (id + 1) / count; ++n) {
    const index row = n % call.rows;
    const uint64_t name = static_cast<uint64_t>(call.ids[row]);
    const uint32_t site =
        static_cast<uint32_t>(call.site[n / call.rows]) | static_cast<uint32_t>(name >> 32) << 16;
    const uint32_t step = call.steps ? static_cast<uint32_t>(call.steps[row]) : 0;
    uint8_t* out = call.out + n * call.units;
    index u = 0;
    for (; u + WIDTH <= call.units; u += WIDTH)
      draw<TOGETHER>(call, u / 4, static_cast<uint32_t>(name), site, step, out + u);
    constexpr index ONE = FASTSEQ_VECTOR_BYTES / 2;
    for (; u < call.units; u += ONE) {
      uint8_t part[ONE];
      draw<1>(call, u / 4, static_cast<uint32_t>(name), site, step, part);
      std::memcpy(out + u, part, call.units - u < ONE ? call.units - u : ONE);
    }
  }
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

// Masks at random: words of Philox4x32-10 (Salmon et al. 2011), whose key is a seed and whose counter
// names a hidden unit, so that a mask is a pure function of the two.
//
// A lane of 64 bits holds 32 of a counter: a product of two of them is one instruction, and what is
// left in the upper half no instruction reads. 0.3 to 0.4 ns a unit with AVX-512, 0.8 with AVX2, 1.5 with
// SSE2 (Zen 5).
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

FASTSEQ_INLINE Words xor_of(Words a, Words b, Words c) {
#if defined(__AVX512F__)
  return (Words)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// A vector's units: four for each of its counters, from `block` on, of one row of one site. Those of
// the first `count` are asked for.
struct Piece {
  uint32_t block, id, site, step;
  uint8_t* out;
  index count;
};

// So many at once hide what a product makes the next one wait, whatever rows they are of.
constexpr int TOGETHER = 4;
constexpr index WIDTH = FASTSEQ_VECTOR_BYTES / 2;

// What is kept of the units of TOGETHER pieces, a byte each.
inline void draw(const DrawCall& call, const Piece* pieces) {
  typedef int64_t Signed __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  const Words none{}, first = none + 0xD2511F53u, second = none + 0xCD9E8D57u;
  Words lane, c[TOGETHER][4];
  for (index l = 0; l < WIDTH / 4; ++l) lane[l] = static_cast<uint64_t>(l);
  for (int v = 0; v < TOGETHER; ++v) {
    c[v][0] = lane + pieces[v].block, c[v][1] = none + pieces[v].id;
    c[v][2] = none + pieces[v].site, c[v][3] = none + pieces[v].step;
  }
  uint32_t k_0 = call.key[0], k_1 = call.key[1];
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round, k_0 += 0x9E3779B9u, k_1 += 0xBB67AE85u)
#pragma GCC unroll 4
    for (int v = 0; v < TOGETHER; ++v) {
      const Words p = multiply(c[v][0], first), q = multiply(c[v][2], second);
      c[v][0] = xor_of(q >> 32, c[v][1], none + k_0), c[v][2] = xor_of(p >> 32, c[v][3], none + k_1);
      c[v][1] = q, c[v][3] = p;
    }
  const Signed least = (Signed)(none + call.threshold);
  for (int v = 0; v < TOGETHER; ++v) {
    Words kept{};
    for (int w = 0; w < 4; ++w) {
      const Words bit = none + (uint64_t(1) << 8 * w);
      kept |= (Words)((Signed)(c[v][w] & 0xffffffffu) >= least) & bit;
    }
    const Halves bytes = __builtin_convertvector(kept, Halves);
    std::memcpy(pieces[v].out, &bytes, pieces[v].count < WIDTH ? pieces[v].count : WIDTH);
  }
}

// The rows, of all sites one behind the other, that thread `id` of `count` draws.
inline void draw_masks(const DrawCall& call, int id, int count) {
  uint8_t nowhere[WIDTH];
  Piece pieces[TOGETHER];
  int waiting = 0;
  const index all = call.sites * call.rows;
  for (index n = all * id / count; n < all * (id + 1) / count; ++n) {
    const index row = n % call.rows;
    const uint64_t name = static_cast<uint64_t>(call.ids[row]);
    Piece piece{};
    piece.id = static_cast<uint32_t>(name);
    piece.site =
        static_cast<uint32_t>(call.site[n / call.rows]) | static_cast<uint32_t>(name >> 32) << 16;
    piece.step = call.steps ? static_cast<uint32_t>(call.steps[row]) : 0;
    for (index u = 0; u < call.units; u += WIDTH) {
      piece.block = static_cast<uint32_t>(u / 4);
      piece.out = call.out + n * call.units + u, piece.count = call.units - u;
      pieces[waiting++] = piece;
      if (waiting == TOGETHER) draw(call, pieces), waiting = 0;
    }
  }
  if (!waiting) return;
  for (int v = waiting; v < TOGETHER; ++v) pieces[v] = {0, 0, 0, 0, nowhere, WIDTH};
  draw(call, pieces);
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

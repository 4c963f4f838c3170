// Conditional random fields: log Z, and what backward wants of each step. chains.h has the equations.
#pragma once
#include "chains.h"

namespace fastseq {
namespace FASTSEQ_ISA {

template <class T>
struct ChainsForward {
  using V = Vec<T>;
  using Integers = typename Bits<T>::type;
  static constexpr int L = LANES<T>, MANTISSA = Exp<T>::MANTISSA, BIAS = Exp<T>::BIAS;
  Tags<T> tags;
  const Exact<T> exact;
  const ChainCall<T>& call;
  const index K, vectors, padded;
  T *start, *end, *x, *w, *a, *out, *least;  // w, a: (TILE, padded); least: (TILE, LANES)
  T end_most;
  double shifts[TILE];
  index powers[TILE];

  ChainsForward(const ChainCall<T>& call, Arena& arena)
      : tags(call, arena), exact(tags, arena), call(call), K(call.K), vectors(tags.vectors),
        padded(tags.padded) {
    take_each<T>(arena, padded, start, end, x);
    take_each<T>(arena, TILE * padded, w, a, out);
    least = arena.take<T>(TILE * L);
  }

  void pack() {
    tags.find_shift();
    T* to = tags.packed;
    for (index p = 0; p < tags.panels.count(); ++p)
      for (index i = 0; i < K; ++i)
        for (int v = 0; v < tags.panels.vectors_of(p); ++v, to += L)
          store(to, tags.weight(i, tags.panels.vector(p) + v));
    tags.bound(call.start, start);
    end_most = exponents_of_end(tags, end);
  }

  // exp(end - its largest score), which is returned
  static T exponents_of_end(const Tags<T>& tags, T* end) {
    T most = std::numeric_limits<T>::lowest();
    for (index j = 0; j < tags.K; ++j) most = tags.call.end[j] > most ? tags.call.end[j] : most;
    for (index v = 0; v < tags.vectors; ++v)
      store(end + v * L, exp_of_negative(tags.bounded(tags.call.end, v) - splat(most)));
    return most;
  }

  // w_t of sequence b, in row r of a tile. Apart from `step`, for shorter chains of what waits for what.
  template <int N>
  FASTSEQ_INLINE void weigh(index r, index t, index b) {
    T* const to = w + r * padded;
    Row<T, N> row(tags, to);
    const V c = row.sum(call.emission(t, b), t ? tags.shift : start);
    shifts[r] += static_cast<double>(c[0]);
    row.each([&](index v, V& x) {
      x = exp_of_negative(x - c);
      if (N) store(to + v * L, x);
    });
  }
  // Row r of a tile of R makes step t of sequence b.
  template <int N>
  FASTSEQ_INLINE void step(index R, index r, index t, index b) {
    Row<T, N> row(tags, x);
    V most{}, low = load(least + r * L);
    T *const sums = out, *const weights = w + r * padded;
    row.each([&](index v, V& x) {
      const V s = t ? load(row.product(sums, R, r, v)) : splat(T(1));
      x = load(weights + v * L) * s;
      low = smaller(s, low), most = larger(x, most);
    });
    store(least + r * L, low);
    const Integers exponent = (Integers)every_largest<T>(most) >> MANTISSA;
    powers[r] += exponent[0] - BIAS;
    const V scale = (V)((2 * BIAS - exponent) << MANTISSA);
    T *to = a + r * padded, *kept = call.u ? call.u + (t * call.batch + b) * K : nullptr;
    row.each([&](index v, V& x) {
      x = x * scale;
      store(to + v * L, x);
      if (kept) row.give(kept, v, x);
    });
  }

  double log_z(index r, index b) const {
    V total{};
    for (index at = 0; at < padded; at += L)
      total = fma(load(a + r * padded + at), load(end + at), total);
    const T z = every_sum<T>(total)[0], bound = FAR<T> * static_cast<T>(K);
    T low = z;
    for (int l = 0; l < L; ++l) low = least[r * L + l] < low ? least[r * L + l] : low;
    if (low < bound) return exact.forward(b);
    const double log_2 = 0.6931471805599453;
    return shifts[r] + static_cast<double>(powers[r]) * log_2 + end_most + Exact<T>::log(z);
  }

  double score(index b) const {
    const index n = call.length(b);
    index j = call.tag(0, b);
    double total = static_cast<double>(call.start[j]) + call.emission(0, b)[j];
    for (index t = 1; t < n; ++t) {
      const index i = j;
      j = call.tag(t, b);
      total += static_cast<double>(call.emission(t, b)[j]) + call.transitions[i * K + j];
    }
    return total + call.end[j];
  }

  // Sequences order[0] to order[R - 1].
  void walk(const index* order, index R) {
    const T* row[TILE];
    for (index r = 0; r < R; ++r) {
      shifts[r] = 0, powers[r] = 0;
      row[r] = a + r * padded;
      store(least + r * L, splat(T(1)));
    }
    for (index t = 0; R > 0; ++t) {
      for (; R > 0 && call.length(order[R - 1]) == t; --R) {
        const index b = order[R - 1];
        const double z = t ? log_z(R - 1, b) : 0;
        call.value[b] = static_cast<T>(t && call.tags ? score(b) - z : z);
      }
      if (R == 0) break;
      each_row(vectors, R, [&](auto n, index r) { weigh<decltype(n)::VALUE>(r, t, order[r]); });
      if (t) tags.template product<Single<T>>(row, R, out);
      each_row(vectors, R, [&](auto n, index r) { step<decltype(n)::VALUE>(R, r, t, order[r]); });
    }
  }

  void run() {
    pack();
    const index B = call.batch, tiles = tiles_of(call, TILE);
    for (index k; (k = call.next->fetch_add(1)) < tiles;)
      walk(call.order + B * k / tiles, B * (k + 1) / tiles - B * k / tiles);
  }
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

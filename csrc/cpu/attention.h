// Attention of a few queries over the keys of their sequence: scores, softmax, context, and backward.
//
// A row is a query; U rows share a sequence, whose S keys and values stand side by side. The scores are
// sum_a v[a] tanh(q[a] + k[a]), or where there is no v scale * sum_a q[a] k[a]. Keys whose flag is 0 are
// never read, nor are their values.
//
// Backward makes the tanh again, which takes less time than to read it: of S30 B32 A256 it is 1 MB a
// step. A thread owns sequences, so that nothing is added up across threads.
#pragma once
#include <cmath>

#include "step.h"
#include "vocabulary.h"

namespace fastseq {
namespace FASTSEQ_ISA {

// (GCC 12 warns of its own _mm512_reduce_add_ps in a loop.)
template <class T>
FASTSEQ_INLINE T added(Vec<T> v) {
  T lanes[LANES<T>];
  store(lanes, v);
  for (int width = LANES<T> / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  return lanes[0];
}

template <class T>
FASTSEQ_INLINE T score(const T* q, const T* k, const T* v, index A) {
  Vec<T> total{};
  each_vector<T>(0, A, [&](index a, int n) {
    const Vec<T> x = load_units(q + a, n), y = load_units(k + a, n);
    total = v ? fma(load_units(v + a, n), tanh(x + y), total) : fma(x, y, total);
  });
  return added<T>(total);
}

template <class T>
FASTSEQ_INLINE T inner(const T* a, const T* b, index size) {
  Vec<T> total{};
  each_vector<T>(0, size, [&](index k, int n) {
    total = fma(load_units(a + k, n), load_units(b + k, n), total);
  });
  return added<T>(total);
}

// p[s] of the keys that are seen becomes their softmax, and 0 elsewhere.
template <class T>
FASTSEQ_INLINE void softmax(T* p, const uint8_t* seen, index S) {
  T most = -INFINITY, total = 0;
  for (index s = 0; s < S; ++s)
    if ((!seen || seen[s]) && !(p[s] <= most)) most = p[s];
  for (index s = 0; s < S; ++s) {
    const bool there = !seen || seen[s];
    p[s] = there ? exp(splat(p[s] - most))[0] : T(0);
    total += p[s];
  }
  if (total == 0) return;  // there is no key
  for (index s = 0; s < S; ++s) p[s] /= total;
}

template <class T>
void attend(const AttentionCall<T>& call, int id, int count) {
  const index U = call.U, S = call.S, A = call.A, V = call.V;
  for (index b = call.B * id / count; b < call.B * (id + 1) / count; ++b) {
    const T *keys = call.keys + b * S * A, *values = call.values + b * S * V;
    const uint8_t* seen = call.mask ? call.mask + b * S : nullptr;
    for (index row = b * U; row < (b + 1) * U; ++row) {
      const T* q = call.queries + row * A;
      T *p = call.weights + row * S, *context = call.context + row * call.context_row;
      for (index s = 0; s < S; ++s)
        if (!seen || seen[s]) p[s] = call.scale * score(q, keys + s * A, call.v, A);
      softmax(p, seen, S);
      each_vector<T>(0, V, [&](index k, int n) {
        Vec<T> total{};
        for (index s = 0; s < S; ++s)
          if (!seen || seen[s]) total = fma(splat(p[s]), load_units(values + s * V + k, n), total);
        store_units(context + k, total, n);
      });
    }
  }
}

// Of one query: what the scores' gradients ds give to q, and what they add to that of keys and v.
template <class T, bool ADDITIVE>
FASTSEQ_INLINE void score_backward(const AttentionCall<T>& call, const T* q, const T* keys,
                                   const T* ds, const uint8_t* seen, T* dq, T* dkeys, T* dv) {
  const index S = call.S, A = call.A;
  each_vector<T>(0, A, [&](index a, int n) {
    const Vec<T> x = load_units(q + a, n);
    Vec<T> dx{}, along{}, weight{};
    if constexpr (ADDITIVE) weight = load_units(call.v + a, n);
    for (index s = 0; s < S; ++s) {
      if (seen && !seen[s]) continue;
      const Vec<T> k = load_units(keys + s * A + a, n);
      const Vec<T> d = splat(ds[s]);
      Vec<T> dk;
      if constexpr (ADDITIVE) {
        const Vec<T> e = tanh(x + k);
        along = fma(d, e, along);
        dk = d * weight * dtanh(e);
        dx = dx + dk;
      } else {
        dx = fma(d, k, dx);
        dk = d * x;
      }
      T* at = dkeys + s * A + a;
      store_units(at, load_units(at, n) + dk, n);
    }
    store_units(dq + a, dx, n);
    if constexpr (ADDITIVE) store_units(dv + a, load_units(dv + a, n) + along, n);
  });
}

template <class T>
void attend_backward(const AttentionCall<T>& call, int id, int count) {
  const index U = call.U, S = call.S, A = call.A, V = call.V;
  for (index b = call.B * id / count; b < call.B * (id + 1) / count; ++b) {
    const T *keys = call.keys + b * S * A, *values = call.values + b * S * V;
    const uint8_t* seen = call.mask ? call.mask + b * S : nullptr;
    T *dkeys = call.dkeys + b * S * A, *dv = call.dv ? call.dv + b * A : nullptr;
    for (index row = b * U; row < (b + 1) * U; ++row) {
      const T *p = call.weights + row * S, *dcontext = call.context + row * call.context_row;
      const T* dp = call.dweights ? call.dweights + row * S : nullptr;
      T *ds = call.dscores + row * S, total = 0;
      for (index s = 0; s < S; ++s) {
        const bool there = !seen || seen[s];
        ds[s] = there ? inner(dcontext, values + s * V, V) + (dp ? dp[s] : T(0)) : T(0);
        total += p[s] * ds[s];
      }
      for (index s = 0; s < S; ++s) ds[s] = call.scale * p[s] * (ds[s] - total);
      const T* q = call.queries + row * A;
      T* dq = call.dqueries + row * A;
      if (call.v)
        score_backward<T, true>(call, q, keys, ds, seen, dq, dkeys, dv);
      else
        score_backward<T, false>(call, q, keys, ds, seen, dq, dkeys, dv);
    }
  }
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

// Linear-chain conditional random fields: log Z, and its gradients. fastseq/backends/crf has the
// equations.
//
// Letters: K tags, of which i comes before j; a tile is up to TILE sequences, the longest first, which
// walk side by side; those that are over leave it. Lanes are tags.
//
// With E(i, j) = exp(transitions(i, j) - shift(j)), where shift(j) is the largest score of column j,
// and w_t(j) = exp(emissions(t, j) + shift(j) - c_t), where c_t makes the largest of them 1,
//
//   a_t(j) = 2^-k_t w_t(j) s_t(j),  s_t(j) = sum_i a_{t-1}(i) E(i, j),
//
// k_t such that the largest of a_t is in [1, 2). So a step takes one exp a tag and no logarithm, which
// comes once, behind log Z = sum_t (c_t + k_t log 2) + log sum_j a_last(j) exp(end(j)). Back, with b_t(j)
// = p_t(j) / a_t(j), which is found without a quotient,
//
//   r_t(j) = w_t(j) b_t(j),  b_{t-1}(i) = f sum_j E(i, j) r_t(j),
//
// f such that the p_{t-1} sum up to 1, and f r_t is the equations' r_t: nothing drifts in a long walk.
// The sums over t of a_{t-1}(i) f r_t(j) are a matrix product over tiles of steps.
//
// What numbers cannot hold: terms below the least normal number are lost. Where some s_t(j) is not far
// above that (FAR), the sequence is walked once more by `Exact`, which takes K^2 exps a step, and leaves
// u_t - m_t in place of a_t. Of the two at step 0 the first has no positive number.
#pragma once
#include "product.h"
#include "vocabulary.h"

namespace fastseq {
namespace FASTSEQ_ISA {

constexpr int TILE = TALLEST;

// What a term below the least normal number (2^-126, 2^-1022) is lost beside, for each tag.
template <class T>
constexpr T FAR = sizeof(T) == 4 ? T(0x1p-88) : T(0x1p-960);
template <class T>
constexpr T INFINITE = std::numeric_limits<T>::infinity();

// So many numbers for each pointer.
template <class T, class... Pointers>
FASTSEQ_INLINE void take_each(Arena& arena, index count, Pointers&... p) {
  ((p = arena.take<T>(count)), ...);
}

// to[l] += from[l], a vector of T.
template <class T>
FASTSEQ_INLINE void add_wide(const T* from, double* to) {
  if constexpr (sizeof(T) == 8) {
    store(to, load(to) + load(from));
  } else {
    constexpr int HALF = LANES<T> / 2;
    typedef T Half __attribute__((vector_size(HALF * sizeof(T)), aligned(sizeof(T)), may_alias));
    for (int at = 0; at < LANES<T>; at += HALF)
      store(to + at, load(to + at) + __builtin_convertvector(
                                         *reinterpret_cast<const Half*>(from + at), Vec<double>));
  }
}

template <int N>
struct Count {
  static constexpr int VALUE = N;
};

// What all walks have in common: the scores in vectors and panels, and a tile's product.
template <class T>
struct Tags {
  using V = Vec<T>;
  static constexpr int L = LANES<T>;
  const ChainCall<T>& call;
  const index K;
  const Panels<T> panels;
  const index vectors, padded;
  T *shift, *packed;

  Tags(const ChainCall<T>& call, Arena& arena)
      : call(call), K(call.K), panels(1, K, K), vectors(panels.total_blocks()), padded(vectors * L) {
    shift = arena.take<T>(padded), packed = arena.take<T>(panels.size());
  }

  FASTSEQ_INLINE V of_row(const T* row, index v) const { return load_upto(row + v * L, K - v * L); }
  // The same, with -inf behind the last tag.
  V bounded(const T* row, index v) const {
    V x = of_row(row, v);
    for (int l = 0; l < L; ++l)
      if (v * L + l >= K) x[l] = -INFINITE<T>;
    return x;
  }
  void bound(const T* row, T* to) const {
    for (index v = 0; v < vectors; ++v) store(to + v * L, bounded(row, v));
  }

  void find_shift() const {
    bound(call.transitions, shift);
    for (index i = 1; i < K; ++i)
      for (index v = 0; v < vectors; ++v)
        store(shift + v * L, larger(load(shift + v * L), bounded(call.transitions + i * K, v)));
  }
  // E(i, j); 1 where nothing comes before j, whose w is 0.
  V weight(index i, index v) const {
    const V most = load(shift + v * L), x = of_row(call.transitions + i * K, v) - most;
    return exp_of_negative(most == splat(-INFINITE<T>) ? splat(T(0)) : x);
  }

  // out, (R, W, LANES) of each panel: R rows of K numbers times what is packed.
  template <class Operation>
  void product(const T* const* row, index R, T* out) const {
    for (index p = 0; p < panels.count(); ++p) {
      const int W = panels.vectors_of(p);
      T* to = out + panels.vector(p) * L * R;
      for (index r = 0, m; r < R; r += m) {
        m = rows_of_tile(R - r, tallest(W));
        run_tile<Operation>(static_cast<int>(m), W, row + r, packed + panels.offset(p), K,
                            static_cast<const T*>(nullptr), to + r * W * L);
      }
    }
  }
};

// A row of K numbers while it is computed: N vectors, in registers; or any number of them, at `memory`.
template <class T, int N>
struct Row {
  using V = Vec<T>;
  static constexpr int L = LANES<T>;
  const index K, vectors;  // a copy: what is stored might be these numbers, for all the compiler knows
  T* const memory;
  V held[N ? N : 1];

  FASTSEQ_INLINE Row(const Tags<T>& tags, T* memory)
      : K(tags.K), vectors(tags.vectors), memory(memory) {}
  // f(v, vector v)
  template <class Function>
  FASTSEQ_INLINE void each(Function f) {
    if constexpr (N > 0) {
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) f(index(v), held[v]);
    } else {
      for (index v = 0; v < vectors; ++v) {
        V x = load(memory + v * L);
        f(v, x);
        store(memory + v * L, x);
      }
    }
  }
  // Vector v of K numbers anywhere; zeros behind them.
  FASTSEQ_INLINE V of(const T* row, index v) const {
    if (N > 0 && v < N - 1) return load(row + v * L);
    return load_upto(row + v * L, K - v * L);
  }
  FASTSEQ_INLINE void give(T* row, index v, V x) const {
    if (N > 0 && v < N - 1) return store(row + v * L, x);
    store_upto(row + v * L, x, K - v * L);
  }
  // Where vector v of row r of a product of R rows stands.
  FASTSEQ_INLINE T* product(T* out, index R, index r, index v) const {
    if constexpr (N > 0) return out + (r * N + v) * L;
    const index first = v / WIDEST * WIDEST, left = vectors - first;
    return out + (first * R + r * (left < WIDEST ? left : WIDEST) + v - first) * L;
  }

  // The row becomes emissions + `scores`; c, in every lane.
  FASTSEQ_INLINE V sum(const T* emissions, const T* scores) {
    V most = splat(std::numeric_limits<T>::lowest());
    each([&](index v, V& x) {
      x = of(emissions, v) + load(scores + v * L);
      most = larger(x, most);
    });
    return every_largest<T>(most);
  }
};

// f(N) for each r of R rows: a number of vectors that the compiler knows where there are few.
template <int N, class Function>
FASTSEQ_INLINE void each_row_of(index R, Function f) {
  for (index r = 0; r < R; ++r) f(Count<N>{}, r);
}
template <class Function>
FASTSEQ_INLINE void each_row(index vectors, index R, Function f) {
  switch (vectors) {
    case 1: return each_row_of<1>(R, f);
    case 2: return each_row_of<2>(R, f);
    case 3: return each_row_of<3>(R, f);
    case 4: return each_row_of<4>(R, f);
    default: return each_row_of<0>(R, f);
  }
}

// Walks of one sequence in logarithms, whatever lies between its scores: u_t - m_t.
template <class T>
struct Exact {
  using V = Vec<T>;
  static constexpr int L = LANES<T>;
  const Tags<T>& tags;
  const ChainCall<T>& call;
  const index K, padded;
  T *most, *sum, *p, *q;

  Exact(const Tags<T>& tags, Arena& arena)
      : tags(tags), call(tags.call), K(tags.K), padded(tags.padded) {
    take_each<T>(arena, padded, most, sum, p, q);
  }

  // log sum_i exp(u(i) + transitions(i, j)) = most(j) + log sum(j)
  void sum_before(const T* u) const {
    for (index at = 0; at < padded; at += L)
      store(most + at, splat(-INFINITE<T>)), store(sum + at, V{});
    for (index i = 0; i < K; ++i)
      for (index v = 0; v < tags.vectors; ++v)
        store(most + v * L, larger(term(u, i, v), load(most + v * L)));
    for (index at = 0; at < padded; at += L) {
      const V m = load(most + at);
      store(most + at, m == splat(-INFINITE<T>) ? splat(T(0)) : m);
    }
    for (index i = 0; i < K; ++i)
      for (index v = 0; v < tags.vectors; ++v)
        store(sum + v * L, load(sum + v * L) + exp_of_negative(term(u, i, v) - load(most + v * L)));
  }
  FASTSEQ_INLINE V term(const T* u, index i, index v) const {
    return tags.of_row(call.transitions + i * K, v) + splat(u[i]);
  }
  // Subtracts the largest, where there is one above -inf, and returns it.
  static double normalise(T* u, index K) {
    T m = -INFINITE<T>;
    for (index j = 0; j < K; ++j) m = u[j] > m ? u[j] : m;
    for (index j = 0; m > -INFINITE<T> && j < K; ++j) u[j] -= m;
    return m;
  }
  static double log(double x) { return FASTSEQ_ISA::log(splat(x))[0]; }
  static double exp(double x) { return FASTSEQ_ISA::exp_of_negative(splat(x))[0]; }

  double forward(index b) const {  // log Z
    const index n = call.length(b);
    double total = 0;
    T *u = p, *next = q;
    for (index t = 0; t < n; ++t) {
      const T* e = call.emission(t, b);
      if (t) sum_before(u);
      for (index j = 0; j < K; ++j)
        next[j] = e[j] + (t == 0 ? call.start[j]
                          : sum[j] > 0 ? static_cast<T>(most[j] + log(sum[j])) : -INFINITE<T>);
      total += normalise(next, K);
      T* before = u;
      u = next, next = before;
      if (call.u) std::memcpy(call.u + (t * call.batch + b) * K, u, sizeof(T) * K);
    }
    for (index j = 0; j < K; ++j) next[j] = u[j] + call.end[j];
    total += normalise(next, K);
    double z = 0;
    for (index j = 0; j < K; ++j) z += exp(next[j]);
    return total == -INFINITE<double> ? total : total + log(z);
  }

  // Writes the sequence's gradients of emissions, times d, and adds those of transitions to `direct`.
  void backward(index b, T d, double* direct) const {
    const index n = call.length(b);
    const auto row = [&](T* of, index t) { return of + (t * call.batch + b) * K; };
    const T* u = row(call.u, n - 1);
    for (index j = 0; j < padded; ++j) p[j] = j < K ? u[j] + call.end[j] : 0;
    const bool possible = normalise(p, K) > -INFINITE<double>;
    T z = 0;
    for (index j = 0; j < K; ++j) z += p[j] = static_cast<T>(possible ? exp(p[j]) : 0);
    for (index t = n - 1;; --t) {
      const T f = z > 0 ? 1 / z : 0;
      for (index j = 0; j < K; ++j) row(call.demissions, t)[j] = d * (p[j] *= f);
      if (t == 0) break;
      u = row(call.u, t - 1);
      sum_before(u);
      for (index at = 0; at < padded; at += L) {
        const V s = load(sum + at);
        store(q + at, s > splat(T(0)) ? load(p + at) / s : V{});
      }
      z = 0;
      for (index i = 0; i < K; ++i) {
        V total{};
        for (index v = 0; v < tags.vectors; ++v) {
          const V w = exp_of_negative(term(u, i, v) - load(most + v * L)) * load(q + v * L);
          total = total + w;
          T scaled[L];
          store(scaled, w * splat(d));
          if (direct) add_wide(scaled, direct + i * padded + v * L);
        }
        z += p[i] = every_sum<T>(total)[0];
      }
    }
  }
};

// How many tiles of at most so many sequences there are, as even as can be, one for each thread at least.
template <class T>
index tiles_of(const ChainCall<T>& call, index most) {
  const index B = call.batch, tiles = (B + most - 1) / most;
  return tiles >= call.threads ? tiles : B < call.threads ? B : call.threads;
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

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
  // f(v, where it stands) for each vector of row r of such a product.
  template <class Function>
  FASTSEQ_INLINE void each(T* out, index R, index r, Function f) const {
    for (index p = 0; p < panels.count(); ++p) {
      const int W = panels.vectors_of(p);
      T* at = out + (panels.vector(p) * R + r * W) * L;
      for (int v = 0; v < W; ++v) f(panels.vector(p) + v, at + v * L);
    }
  }

  // x = emissions + `scores`; c, in every lane.
  FASTSEQ_INLINE V sum_scores(const T* emissions, const T* scores, T* x) const {
    V most = splat(std::numeric_limits<T>::lowest());
    for (index v = 0; v < vectors; ++v) {
      const V sum = of_row(emissions, v) + load(scores + v * L);
      store(x + v * L, sum);
      most = larger(sum, most);
    }
    return every_largest<T>(most);
  }
};

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
  static double log(double x) { return __builtin_log(x); }

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
    for (index j = 0; j < K; ++j) z += __builtin_exp(next[j]);
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
    for (index j = 0; j < K; ++j) z += p[j] = static_cast<T>(possible ? __builtin_exp(p[j]) : 0);
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

template <class T>
struct ChainsForward {
  using V = Vec<T>;
  using Integers = typename Bits<T>::type;
  static constexpr int L = LANES<T>, MANTISSA = Exp<T>::MANTISSA, BIAS = Exp<T>::BIAS;
  Tags<T> tags;
  const Exact<T> exact;
  const ChainCall<T>& call;
  const index K, vectors, padded;
  T *start, *end, *ones, *x, *a, *out, *least;  // a: (TILE, padded); least: (TILE, LANES)
  T end_most;
  double shifts[TILE];
  index powers[TILE];

  ChainsForward(const ChainCall<T>& call, Arena& arena)
      : tags(call, arena), exact(tags, arena), call(call), K(call.K), vectors(tags.vectors),
        padded(tags.padded) {
    take_each<T>(arena, padded, start, end, ones, x);
    take_each<T>(arena, TILE * padded, a, out);
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
    for (index at = 0; at < padded; at += L) store(ones + at, splat(T(1)));
  }

  // exp(end - its largest score), which is returned
  static T exponents_of_end(const Tags<T>& tags, T* end) {
    T most = std::numeric_limits<T>::lowest();
    for (index j = 0; j < tags.K; ++j) most = tags.call.end[j] > most ? tags.call.end[j] : most;
    for (index v = 0; v < tags.vectors; ++v)
      store(end + v * L, exp_of_negative(tags.bounded(tags.call.end, v) - splat(most)));
    return most;
  }

  // Row r of a tile of R makes step t of sequence b.
  FASTSEQ_INLINE void step(index R, index r, index t, index b) {
    const V c = tags.sum_scores(call.emission(t, b), t ? tags.shift : start, x);
    V most{}, low = load(least + r * L);
    const auto grow = [&](index v, const T* s_j) {
      const V s = load(s_j), grown = exp_of_negative(load(x + v * L) - c) * s;
      low = smaller(s, low), most = larger(grown, most);
      store(x + v * L, grown);
    };
    if (t) tags.each(out, R, r, grow);
    else
      for (index v = 0; v < vectors; ++v) grow(v, ones + v * L);
    store(least + r * L, low);
    const Integers exponent = (Integers)every_largest<T>(most) >> MANTISSA;
    shifts[r] += static_cast<double>(c[0]);
    powers[r] += exponent[0] - BIAS;
    const V scale = (V)((2 * BIAS - exponent) << MANTISSA);
    T *to = a + r * padded, *kept = call.u ? call.u + (t * call.batch + b) * K : nullptr;
    for (index v = 0; v < vectors; ++v) {
      const V scaled = load(x + v * L) * scale;
      store(to + v * L, scaled);
      if (kept) store_upto(kept + v * L, scaled, K - v * L);
    }
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
    return shifts[r] + static_cast<double>(powers[r]) * log_2 + end_most + __builtin_log(z);
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
      if (t) tags.template product<Single<T>>(row, R, out);
      for (index r = 0; r < R; ++r) step(R, r, t, order[r]);
    }
  }

  void run() {
    pack();
    const index B = call.batch, tiles = tiles_of(call, TILE);
    for (index k; (k = call.next->fetch_add(1)) < tiles;)
      walk(call.order + B * k / tiles, B * (k + 1) / tiles - B * k / tiles);
  }
};

// The element (row, k) of a left-hand side whose rows are columns of a matrix.
template <class T>
struct ColumnsOf {
  const T* data;
  index stride;
  FASTSEQ_INLINE T operator()(int r, index k) const { return data[k * stride + r]; }
};

template <class T>
struct ChainsBackward {
  using V = Vec<T>;
  static constexpr int L = LANES<T>;
  Tags<T> tags;
  const Exact<T> exact;
  const ChainCall<T>& call;
  const index K, vectors, padded;
  const bool parameters;
  const index most;    // rows that are multiplied at once
  T *weights;          // (K, padded): E
  T *end, *x, *b, *r_, *out;  // b, r_, out: (TILE, padded)
  T *before, *after;   // (most, padded): a_{t-1}; f r_t in panels
  T *piece;            // of a product
  double* total;       // (2, padded)
  index waiting = 0;

  // Whose sums are made apart from those of others, and added to them in order, so that no bit depends
  // on the number of threads.
  struct Group {
    double *counts, *direct, *start, *end;  // (K, padded) twice, (K) twice
    bool* is_direct;                        // else `direct` holds anything
  };

  static index tiles(const ChainCall<T>& call) {
    const index B = call.batch, each = B >= 64 ? 8 : B >= 8 ? 4 : (B + 1) / 2;
    return B ? (B + each - 1) / each : 0;
  }
  static index groups(const ChainCall<T>& call) {
    const index size = 16 * call.K * call.K, room = (index(1) << 20) / size, all = tiles(call);
    const index some = room > 16 ? 16 : room < 2 ? (size > (index(1) << 26) ? 1 : 2) : room;
    return some < all ? some : all;
  }
  static Group group(const ChainCall<T>& call, Arena& arena) {
    const index K = call.K, size = (K + L - 1) / L * L * K;
    Group g{};
    take_each<double>(arena, size, g.counts, g.direct);
    take_each<double>(arena, K, g.start, g.end);
    g.is_direct = arena.take<bool>(1);
    return g;
  }

  ChainsBackward(const ChainCall<T>& call, Arena& arena)
      : tags(call, arena), exact(tags, arena), call(call), K(call.K), vectors(tags.vectors),
        padded(tags.padded), parameters(call.dtransitions), most(rows_at_once(padded)) {
    weights = arena.take<T>(K * padded);
    take_each<T>(arena, padded, end, x);
    take_each<T>(arena, TILE * padded, b, r_, out);
    take_each<T>(arena, parameters ? most * padded : 0, before, after);
    piece = arena.take<T>(tile_size<T>());
    total = arena.take<double>(2 * padded);
  }
  static index rows_at_once(index padded) {
    const index rows = 4096 / padded;
    return rows > PIECE ? PIECE : rows < 4 * TILE ? 4 * TILE : rows;
  }

  void pack() {
    tags.find_shift();
    for (index i = 0; i < K; ++i)
      for (index v = 0; v < vectors; ++v) store(weights + i * padded + v * L, tags.weight(i, v));
    pack_transposed<Single<T>>(tags.panels, weights, padded, 0, tags.panels.count(), tags.packed);
    ChainsForward<T>::exponents_of_end(tags, end);
  }

  // Scales row r of b such that b a_t sums up to 1, and leaves the gradient of step t; returns f.
  FASTSEQ_INLINE V settle(index r, index t, index sequence) {
    const T* a = call.u + (t * call.batch + sequence) * K;
    T *own = b + r * padded, *de = call.demissions + (t * call.batch + sequence) * K;
    V total{};
    for (index v = 0; v < vectors; ++v)
      total = fma(load(own + v * L), tags.of_row(a, v), total);
    const V f = splat(T(1)) / every_sum<T>(total), d = splat(slope(sequence));
    for (index v = 0; v < vectors; ++v) {
      const V scaled = load(own + v * L) * f;
      store(own + v * L, scaled);
      store_upto(de + v * L, scaled * tags.of_row(a, v) * d, K - v * L);
    }
    return f;
  }
  // What log Z is multiplied by in the sum whose gradient is wanted.
  T slope(index sequence) const {
    return call.tags ? -call.dvalue[sequence] : call.dvalue[sequence];
  }

  // From step t to the one before it, in row r of a tile of R.
  FASTSEQ_INLINE void leave(index r, index t, index sequence) {
    const V c = tags.sum_scores(call.emission(t, sequence), tags.shift, x);
    for (index v = 0; v < vectors; ++v)
      store(r_ + r * padded + v * L,
            load(b + r * padded + v * L) * exp_of_negative(load(x + v * L) - c));
  }
  FASTSEQ_INLINE void arrive(index R, index r, index t, index sequence) {
    T* own = b + r * padded;
    tags.each(out, R, r, [&](index v, const T* y) { store(own + v * L, load(y)); });
    const V f = settle(r, t, sequence) * splat(slope(sequence));
    if (!parameters) return;
    const T* a = call.u + (t * call.batch + sequence) * K;
    const index n = waiting++;
    for (index v = 0; v < vectors; ++v) store(before + n * padded + v * L, tags.of_row(a, v));
    for (index p = 0; p < tags.panels.count(); ++p) {
      const int W = tags.panels.vectors_of(p);
      const index first = tags.panels.vector(p) * L;
      for (int v = 0; v < W; ++v)
        store(after + first * most + (n * W + v) * L, load(r_ + r * padded + first + v * L) * f);
    }
  }

  template <int M, int W>
  void multiply(index i, index p, double* counts) {
    const index first = tags.panels.vector(p) * L;
    tile_function<Single<T>, M, W>(ColumnsOf<T>{before + i, padded}, after + first * most, waiting,
                                   static_cast<const T*>(nullptr), false, piece);
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < W; ++v)
        add_wide(piece + (m * W + v) * L, counts + (i + m) * padded + first + v * L);
  }
  template <int W>
  void multiply_panel(index p, double* counts) {
    index i = 0;
    if constexpr (tallest(W) >= 8)
      for (; i + 8 <= K; i += 8) multiply<8, W>(i, p, counts);
    if constexpr (tallest(W) >= 4)
      for (; i + 4 <= K; i += 4) multiply<4, W>(i, p, counts);
    for (; i + 2 <= K; i += 2) multiply<2, W>(i, p, counts);
    for (; i < K; ++i) multiply<1, W>(i, p, counts);
  }
  void flush(double* counts) {
    for (index p = 0; waiting && p < tags.panels.count(); ++p)
      switch (tags.panels.vectors_of(p)) {
        case 1: multiply_panel<1>(p, counts); break;
        case 2: multiply_panel<2>(p, counts); break;
        case 3: multiply_panel<3>(p, counts); break;
        case 4: multiply_panel<4>(p, counts); break;
      }
    waiting = 0;
  }

  double* direct(const Group& g) const {
    if (!parameters) return nullptr;
    if (!*g.is_direct) std::memset(g.direct, 0, sizeof(double) * K * padded);
    *g.is_direct = true;
    return g.direct;
  }

  // Sequences order[0] to order[count - 1].
  void walk(const index* order, index count, const Group& g) {
    index sequence[TILE], R = 0;
    const T* row[TILE];
    for (index k = 0; k < count; ++k) {
      const index n = call.length(order[k]);
      for (index t = n; t < call.steps; ++t)
        std::memset(call.demissions + (t * call.batch + order[k]) * K, 0, sizeof(T) * K);
      if (n == 0) continue;
      if (is_exact(order[k])) exact.backward(order[k], slope(order[k]), direct(g));
      else row[R] = r_ + R * padded, sequence[R++] = order[k];
    }
    index alive = 0;
    for (index t = R ? call.length(sequence[0]) - 1 : -1; t >= 0; --t) {
      if (alive) {
        for (index r = 0; r < alive; ++r) leave(r, t + 1, sequence[r]);
        tags.template product<Single<T>>(row, alive, out);
        if (waiting + alive > most) flush(g.counts);
        for (index r = 0; r < alive; ++r) arrive(alive, r, t, sequence[r]);
      }
      for (; alive < R && call.length(sequence[alive]) - 1 == t; ++alive) {
        for (index at = 0; at < padded; at += L) store(b + alive * padded + at, load(end + at));
        settle(alive, t, sequence[alive]);
      }
    }
    if (parameters) flush(g.counts);
    for (index k = 0; k < count; ++k)
      if (call.length(order[k])) add_path(order[k], g);
  }
  bool is_exact(index sequence) const {
    V positive{};
    for (index v = 0; v < vectors; ++v)
      positive = larger(tags.of_row(call.u + sequence * K, v), positive);
    return !(every_largest<T>(positive)[0] > 0);
  }
  // What `tags` adds, and the gradients of start and end, which are those of emissions at the ends.
  void add_path(index sequence, const Group& g) const {
    const index n = call.length(sequence), B = call.batch;
    T* de = call.demissions + sequence * K;
    if (call.tags) {
      const T d = call.dvalue[sequence];
      double* moves = n > 1 ? direct(g) : nullptr;
      for (index t = 0, i = 0; t < n; ++t) {
        const index j = call.tag(t, sequence);
        de[t * B * K + j] += d;
        if (t && moves) moves[i * padded + j] += d;
        i = j;
      }
    }
    for (index j = 0; parameters && j < K; ++j)
      g.start[j] += de[j], g.end[j] += de[(n - 1) * B * K + j];
  }

  void run(int id, int count) {
    pack();
    const index G = groups(call), all = tiles(call), B = call.batch;
    char* shared = call.scratch + call.threads * call.scratch_each;
    for (index k; (k = call.next->fetch_add(1)) < G;) {
      Group g{};
      if (parameters) {
        Arena arena(shared);
        for (index other = 0; other <= k; ++other) g = group(call, arena);
        std::memset(g.counts, 0, sizeof(double) * K * padded);
        std::memset(g.start, 0, sizeof(double) * K), std::memset(g.end, 0, sizeof(double) * K);
        *g.is_direct = false;
      }
      for (index tile = all * k / G; tile < all * (k + 1) / G; ++tile)
        walk(call.order + B * tile / all, B * (tile + 1) / all - B * tile / all, g);
    }
    if (!parameters) return;
    if (count > 1) meet(call.slots, id, count);
    add_groups(shared, G, K * id / count, K * (id + 1) / count, id == 0);
  }

  // Rows [first, last) of the gradient of transitions, and the others.
  void add_groups(char* shared, index G, index first, index last, bool others) {
    for (index i = first; i < last; ++i) {
      Arena arena(shared);
      for (index at = 0; at < 2 * padded; ++at) total[at] = 0;
      for (index k = 0; k < G; ++k) {
        const Group g = group(call, arena);
        for (index at = 0; at < padded; at += LANES<double>) {
          store(total + at, load(total + at) + load(g.counts + i * padded + at));
          if (*g.is_direct)
            store(total + padded + at, load(total + padded + at) + load(g.direct + i * padded + at));
        }
      }
      for (index j = 0; j < K; ++j)
        call.dtransitions[i * K + j] =
            static_cast<T>(total[j] * weights[i * padded + j] + total[padded + j]);
    }
    for (index j = 0; others && j < K; ++j) {
      Arena arena(shared);
      double start = 0, end = 0;
      for (index k = 0; k < G; ++k) {
        const Group g = group(call, arena);
        start += g.start[j], end += g.end[j];
      }
      call.dstart[j] = static_cast<T>(start), call.dend[j] = static_cast<T>(end);
    }
  }
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

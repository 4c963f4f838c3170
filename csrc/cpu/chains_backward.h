// Conditional random fields: the gradients of log Z. chains.h has the equations.
//
// What is added up over sequences, the gradient of transitions above all, is added up in groups of them
// first, each of which one thread walks, and these in their order: no bit depends on how many threads
// there are.
#pragma once
#include "chains_forward.h"

namespace fastseq {
namespace FASTSEQ_ISA {

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

  struct Group {
    double *counts, *direct, *start, *end;  // (K, padded) twice, (K) twice
    bool* is_direct;                        // else `direct` holds anything
  };

  // Tiles do not depend on the threads either: they are as many as some threads want.
  static index tiles(const ChainCall<T>& call) {
    const index B = call.batch, each = B >= 32 ? 8 : B >= 8 ? 4 : (B + 1) / 2;
    return B ? (B + each - 1) / each : 0;
  }
  // As many as a cache holds the sums of, 16 K^2 bytes each; up to K = 2048 two at least.
  static index groups(const ChainCall<T>& call) {
    const index held = (index(1) << 20) / (16 * call.K * call.K), least = call.K > 2048 ? 1 : 2;
    const index some = held > 16 ? 16 : held < least ? least : held, all = tiles(call);
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
  // Their sums are chains in float32: of many equal terms chains of 64 lose 5e-7, and of 256 3e-6.
  static index rows_at_once(index padded) {
    const index rows = 4096 / padded;
    return rows > 64 ? 64 : rows < 4 * TILE ? 4 * TILE : rows;
  }

  void pack() {
    tags.find_shift();
    for (index i = 0; i < K; ++i)
      for (index v = 0; v < vectors; ++v) store(weights + i * padded + v * L, tags.weight(i, v));
    pack_transposed<Single<T>>(tags.panels, weights, padded, 0, tags.panels.count(), tags.packed);
    ChainsForward<T>::exponents_of_end(tags, end);
  }

  // What log Z is multiplied by in the sum whose gradient is wanted.
  T slope(index sequence) const {
    const T d = call.dvalue[sequence * call.dvalue_row];
    return call.tags ? -d : d;
  }
  // b_t of a sequence, scaled such that b_t a_t sums up to 1, becomes row r. Leaves the gradient of
  // step t, and returns f times what the gradients are multiplied by.
  template <int N>
  FASTSEQ_INLINE V settle(Row<T, N>& row, index r, index t, index sequence) {
    const index at = (t * call.batch + sequence) * K;
    const T *a = call.u + at, d = slope(sequence);
    T *de = call.demissions + at, *own = b + r * padded;
    V total{};
    row.each([&](index v, V& x) { total = fma(x, row.of(a, v), total); });
    const T f = T(1) / every_sum<T>(total)[0];  // of vectors a quotient takes twice as long
    const V scale = splat(f), slopes = splat(d);
    row.each([&](index v, V& x) {
      x = x * scale;
      store(own + v * L, x);
      row.give(de, v, x * row.of(a, v) * slopes);
    });
    return splat(f * d);
  }
  template <int N>
  FASTSEQ_INLINE void begin(index r, index t, index sequence) {
    Row<T, N> row(tags, x);
    row.each([&](index v, V& x) { x = load(end + v * L); });
    settle(row, r, t, sequence);
  }
  // From step t to the one before it, in row r of a tile of R.
  template <int N>
  FASTSEQ_INLINE void leave(index r, index t, index sequence) {
    Row<T, N> row(tags, x);
    const V c = row.sum(call.emission(t, sequence), tags.shift);
    const T* own = b + r * padded;
    T* to = r_ + r * padded;
    row.each([&](index v, V& x) { store(to + v * L, load(own + v * L) * exp_of_negative(x - c)); });
  }
  template <int N>
  FASTSEQ_INLINE void arrive(index R, index r, index t, index sequence) {
    Row<T, N> row(tags, x);
    T* const y = out;
    row.each([&](index v, V& x) { x = load(row.product(y, R, r, v)); });
    const V f = settle(row, r, t, sequence);
    if (!parameters) return;
    const index n = waiting++, rows = most;
    const T *a = call.u + (t * call.batch + sequence) * K, *own = r_ + r * padded;
    T *left = before + n * padded, *right = after;
    row.each([&](index v, V&) {
      store(left + v * L, row.of(a, v));
      store(row.product(right, rows, n, v), load(own + v * L) * f);
    });
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
        each_row(vectors, alive, [&](auto n, index r) {
          leave<decltype(n)::VALUE>(r, t + 1, sequence[r]);
        });
        tags.template product<Single<T>>(row, alive, out);
        if (waiting + alive > most) flush(g.counts);
        each_row(vectors, alive, [&](auto n, index r) {
          arrive<decltype(n)::VALUE>(alive, r, t, sequence[r]);
        });
      }
      for (; alive < R && call.length(sequence[alive]) - 1 == t; ++alive)
        each_row(vectors, 1, [&](auto n, index) {
          begin<decltype(n)::VALUE>(alive, t, sequence[alive]);
        });
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
      const T d = -slope(sequence);
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
    const index all = tiles(call), G = parameters ? groups(call) : all, B = call.batch;
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

// Linear-chain conditional random fields: the best paths (Viterbi 1967), and the n best (Seshadri and
// Sundberg 1994).
//
//   v_t(j) = max_i (v_{t-1}(i) + transitions(i, j)) + emissions(t, j)
//
// is all that the walk keeps. Where a path came from is found again while it is traced back, for its one
// tag a step, from the same sums, so that they compare as they did. The largest of transitions(., j) is
// added to emissions(t, j) instead, and the largest of these taken off, so that all numbers are 0 or less;
// now and then the largest v_t is taken off, for the sake of long sequences. The path's score is its own
// sum, in double.
//
// Of n best paths v_t(j) holds n numbers, the greatest first. The m-th of tag j came from the m-th of the
// candidates in one strict order, by value and then by number, so that no two paths are the same.
//
// No order has a place for NaN, which the walk passes by. A sequence that reads one is told apart, and has
// one path, of score NaN and tags 0.
#pragma once
#include "chains.h"

namespace fastseq {
namespace FASTSEQ_ISA {

template <class T>
struct Viterbi {
  using V = Vec<T>;
  using Integers = typename Bits<T>::type;
  static constexpr int L = LANES<T>;
  Tags<T> tags;
  const ChainCall<T>& call;
  const index K, vectors, padded, n, size;  // size: of v_t of one sequence, (n, padded)
  const index tile;     // sequences of a tile, at most
  T *rows, *columns;    // (K, padded): transitions and, from each tag back, their transpose; -inf behind
  T *start, *end, *out, *x, *v;  // v: (T, tile, n, padded)
  T* values;            // (n) and their numbers: candidates in their order
  index *numbers, *slots;
  T* odd;               // (TILE, LANES): magnitudes, of NaN where one was met
  bool odd_end = false, odd_moves = false;

  Viterbi(const ChainCall<T>& call, Arena& arena)
      : tags(call, arena), call(call), K(call.K), vectors(tags.vectors), padded(tags.padded),
        n(call.n), size(n * padded), tile(n > 1 ? 1 : tile_of(call.steps * padded)) {
    take_each<T>(arena, K * padded, rows, columns);
    take_each<T>(arena, padded, start, end, x);
    out = arena.take<T>(TILE * padded);
    v = arena.take<T>(call.steps * tile * size);
    values = arena.take<T>(n), numbers = arena.take<index>(n), slots = arena.take<index>(n);
    odd = arena.take<T>(TILE * L);
  }
  // As many as fill 32 MB.
  static constexpr index OFTEN = 16;  // steps after which the largest v_t is taken off
  static index tile_of(index each) {
    const index most = (index(1) << 25) / (each * index(sizeof(T)) + 1);
    return most > TILE ? TILE : most < 1 ? 1 : most;
  }

  void pack() {
    tags.find_shift();
    Integers of_moves{}, of_end{};
    for (index i = 0; i < K; ++i)
      for (index v = 0; v < vectors; ++v) {
        const V shift = load(tags.shift + v * L), moves = tags.bounded(call.transitions + i * K, v);
        of_moves = larger_magnitude(of_moves, moves);
        store(rows + i * padded + v * L, shift == splat(-INFINITE<T>) ? shift : moves - shift);
      }
    for (index j = 0; j < K; ++j)
      for (index i = 0; i < padded; ++i)
        columns[j * padded + i] = i < K ? rows[i * padded + j] : -INFINITE<T>;
    T* to = tags.packed;
    for (index p = 0; p < tags.panels.count(); ++p)
      for (index i = 0; i < K; ++i)
        for (int v = 0; v < tags.panels.vectors_of(p); ++v, to += L)
          store(to, load(rows + i * padded + (tags.panels.vector(p) + v) * L));
    tags.bound(call.start, start), tags.bound(call.end, end);
    for (index v = 0; v < vectors; ++v) of_end = larger_magnitude(of_end, load(end + v * L));
    odd_moves = has_nan(of_moves), odd_end = has_nan(of_end);
  }

  // As whole numbers magnitudes are in their order, and NaN is above infinity. Every lane keeps the largest.
  static FASTSEQ_INLINE Integers larger_magnitude(Integers most, V x) {
    const Integers bits = (Integers)x & ~(Integers)splat(T(-0.0));
    return bits > most ? bits : most;
  }
  static bool has_nan(Integers magnitudes) {
    const Integers infinity = (Integers)splat(INFINITE<T>);
    for (int l = 0; l < L; ++l)
      if (magnitudes[l] > infinity[l]) return true;
    return false;
  }
  bool is_odd(index r, index length) const {
    return (length > 0 && odd_end) || (length > 1 && odd_moves) || has_nan((Integers)load(odd + r * L));
  }

  // The first i whose a(i) + b(i) is the largest, and 0 where all are NaN.
  index argmax(const T* a, const T* b, T* largest) const {
    V most = splat(-INFINITE<T>);
    for (index at = 0; at < padded; at += L) most = larger(load(a + at) + load(b + at), most);
    most = every_largest<T>(most);
    *largest = most[0];
    for (index first = 0; first < padded; first += 64) {  // as many lanes as there are bits
      uint64_t bits = 0;
      for (index at = first; at < padded && at < first + 64; at += L)
        bits |= equal_lanes<V>(load(a + at) + load(b + at), most) << (at - first);
      if (bits) {
        const index found = first + __builtin_ctzll(bits);
        return found < K ? found : 0;
      }
    }
    return 0;
  }

  void give(index b, index k, double score) {
    const bool none = score == -INFINITE<double>;
    int64_t* path = call.paths + (b * n + k) * call.steps;
    for (index t = none ? 0 : call.length(b); t < call.steps; ++t) path[t] = -1;
    call.scores[b * n + k] = static_cast<T>(score);
  }
  void give_odd(index b) {
    give(b, 0, std::numeric_limits<double>::quiet_NaN());
    std::memset(call.paths + b * n * call.steps, 0, sizeof(int64_t) * call.length(b));
    for (index k = 1; k < n; ++k) give(b, k, -INFINITE<double>);
  }
  // The score of tag j at step t, with that of the step to `after`, or of the end.
  double score_at(index t, index b, index j, index after) const {
    const double e = call.emission(t, b)[j], s = t ? 0 : call.start[j];
    return e + s + (after < 0 ? call.end[j] : call.transitions[j * K + after]);
  }

  T* at(index t, index r) const { return v + (t * tile + r) * size; }

  // Row r of a tile of R makes step t of sequence b.
  template <int N>
  FASTSEQ_INLINE void step(index R, index r, index t, index b) {
    T* to = at(t, r);
    Row<T, N> row(tags, to);
    const V c = row.sum(call.emission(t, b), t ? tags.shift : start);
    T* const bests = out;
    Integers magnitude = (Integers)load(odd + r * L);
    row.each([&](index v, V& x) {
      const V best = t ? load(row.product(bests, R, r, v)) : V{};
      x = best + (x - c);
      magnitude = larger_magnitude(magnitude, x);
      if (N) store(to + v * L, x);
    });
    store(odd + r * L, (V)magnitude);
    if (t % OFTEN < OFTEN - 1) return;
    V most = splat(std::numeric_limits<T>::lowest());
    row.each([&](index, V& x) { most = larger(x, most); });
    most = every_largest<T>(most);
    row.each([&](index v, V& x) {
      x = x - most;
      if (N) store(to + v * L, x);
    });
  }

  // Sequences order[0] to order[R - 1].
  void walk(const index* order, index R) {
    const T* row[TILE];
    index alive = R;
    std::memset(odd, 0, sizeof(T) * R * L);
    for (index t = 0;; ++t) {
      while (alive > 0 && call.length(order[alive - 1]) == t) --alive;
      if (alive == 0) break;
      for (index r = 0; t && r < alive; ++r) row[r] = at(t - 1, r);
      if (t) tags.template product<MaxPlus<T>>(row, alive, out);
      each_row(vectors, alive, [&](auto n, index r) {
        step<decltype(n)::VALUE>(alive, r, t, order[r]);
      });
    }
    index tag[TILE];
    double score[TILE];
    T largest;
    for (index t = R ? call.length(order[0]) - 1 : -1; t >= 0; --t) {
      for (index r = 0; r < alive; ++r) {
        const index after = tag[r];
        tag[r] = argmax(at(t, r), columns + after * padded, &largest);
        score[r] += score_at(t, order[r], tag[r], after);
      }
      for (; alive < R && call.length(order[alive]) - 1 == t; ++alive) {
        tag[alive] = argmax(at(t, alive), end, &largest);
        score[alive] = largest == -INFINITE<T> ? largest : score_at(t, order[alive], tag[alive], -1);
      }
      for (index r = 0; r < alive; ++r) call.paths[order[r] * call.steps + t] = tag[r];
    }
    for (index r = 0; r < alive; ++r) {
      if (score[r] == -INFINITE<double>)
        for (index t = 0; t < call.steps; ++t) call.paths[order[r] * call.steps + t] = -1;
      give(order[r], 0, score[r]);
    }
    for (index r = alive; r < R; ++r) give(order[r], 0, 0);
    for (index r = 0; r < alive; ++r)
      if (is_odd(r, call.length(order[r]))) give_odd(order[r]);
  }

  // The n best, one sequence at a time.

  void walk_best(index b) {
    const index length = call.length(b);
    T before = 0;
    std::memset(odd, 0, sizeof(T) * L);
    for (index t = 0; t < length; ++t) {
      T* own = at(t, 0);
      for (index v = 0; v < vectors; ++v) {
        if (t == 0) {
          store(own + v * L, load(start + v * L));
          for (index m = 1; m < n; ++m) store(own + m * padded + v * L, splat(-INFINITE<T>));
        } else {
          choose(at(t - 1, 0), v, own);
        }
        const V e = tags.of_row(call.emission(t, b), v);
        const V scores = (t ? e + load(tags.shift + v * L) : e) - splat(before);
        const V first = load(own + v * L) + scores;
        store(odd, (V)larger_magnitude((Integers)load(odd), first));
        for (index m = 0; m < n; ++m)
          store(own + m * padded + v * L, load(own + m * padded + v * L) + scores);
      }
      before = -INFINITE<T>;
      for (index j = 0; j < K; ++j) before = own[j] > before ? own[j] : before;
      if (before == -INFINITE<T>) before = 0;
    }
    if (is_odd(0, length)) give_odd(b);
    else trace_best(b, length);
  }
  // The n greatest of last(m, i) + rows(i, j) for the tags j of vector v.
  void choose(const T* last, index v, T* own) const {
    switch (n) {
      case 2: return choose<2>(last, v, own);
      case 3: return choose<3>(last, v, own);
      case 4: return choose<4>(last, v, own);
    }
    for (index m = 0; m < n; ++m) store(own + m * padded + v * L, splat(-INFINITE<T>));
    for (index i = 0; i < K; ++i)
      for (index m = 0; m < n; ++m) {
        V value = splat(last[m * padded + i]) + load(rows + i * padded + v * L);
        const V least = load(own + (n - 1) * padded + v * L);
        if (equal_lanes<V>(larger(value, least), least) == ALL) break;  // nor does the next, smaller one
        for (index k = m; k < n; ++k) put(own + k * padded + v * L, value);
      }
  }
  // The same, in registers. The m-th of a tag's numbers has m before it that are no smaller.
  template <int M>
  FASTSEQ_INLINE void choose(const T* last, index v, T* own) const {
    V best[M];
    for (int m = 0; m < M; ++m) best[m] = splat(-INFINITE<T>);
    for (index i = 0; i < K; ++i) {
      const V moves = load(rows + i * padded + v * L);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        V value = splat(last[m * padded + i]) + moves;
#pragma GCC unroll 4
        for (int k = m; k < M; ++k) {
          const V kept = best[k];
          best[k] = larger(value, kept), value = smaller(value, kept);
        }
      }
    }
    for (int m = 0; m < M; ++m) store(own + m * padded + v * L, best[m]);
  }
  static FASTSEQ_INLINE void put(T* to, V& value) {
    const V kept = load(to);
    store(to, larger(value, kept)), value = smaller(value, kept);
  }
  static constexpr uint64_t ALL = L == 64 ? ~uint64_t(0) : (uint64_t(1) << L) - 1;

  // The `count` first of the candidates v(m, i) + scores(i), numbered i * n + m, in their order.
  void rank(const T* v, const T* scores, index count) const {
    index found = 0;
    for (index i = 0; i < K; ++i)
      for (index m = 0; m < n; ++m) {
        const T value = v[m * padded + i] + scores[i];
        if (!(value > -INFINITE<T>) || (found == count && !(value > values[count - 1]))) break;
        index k = found < count ? found++ : count - 1;
        for (; k > 0 && value > values[k - 1]; --k)
          values[k] = values[k - 1], numbers[k] = numbers[k - 1];
        values[k] = value, numbers[k] = i * n + m;
      }
    for (; found < count; ++found) values[found] = -INFINITE<T>, numbers[found] = 0;
  }

  void trace_best(index b, index length) {
    if (length == 0) {
      for (index k = 0; k < n; ++k) give(b, k, k ? -INFINITE<double> : 0);
      return;
    }
    rank(at(length - 1, 0), end, n);
    index paths = 0;
    for (; paths < n && values[paths] > -INFINITE<T>; ++paths) slots[paths] = numbers[paths];
    for (index k = 0; k < paths; ++k) {
      int64_t* path = call.paths + (b * n + k) * call.steps;
      index slot = slots[k];
      double score = 0;
      for (index t = length - 1; t >= 0; --t) {
        const index j = slot / n, m = slot % n;
        path[t] = j;
        score += score_at(t, b, j, t == length - 1 ? -1 : path[t + 1]);
        if (t == 0) break;
        if (m == 0) {
          slot = argmax(at(t - 1, 0), columns + j * padded, values) * n;
        } else {
          rank(at(t - 1, 0), columns + j * padded, m + 1);
          slot = numbers[m];
        }
      }
      give(b, k, score);
    }
    for (index k = paths; k < n; ++k) give(b, k, -INFINITE<double>);
  }

  void run() {
    pack();
    const index B = call.batch, tiles = tiles_of(call, tile);
    for (index k; (k = call.next->fetch_add(1)) < tiles;) {
      const index first = B * k / tiles, last = B * (k + 1) / tiles;
      if (n == 1) walk(call.order + first, last - first);
      else
        for (index r = first; r < last; ++r) walk_best(call.order[r]);
    }
  }
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

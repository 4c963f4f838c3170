// Linear-chain conditional random fields: the best paths (Viterbi 1967), and the n best (Seshadri and
// Sundberg 1994).
//
//   v_t(j) = max_i (v_{t-1}(i) + transitions(i, j)) + emissions(t, j)
//
// is all that the walk keeps. Where a path came from is found again while it is traced back, for its one
// tag a step, from the same sums, so that they compare as they did. What is common to all tags of a step
// is taken off, for the sake of long sequences; the path's score is its own sum, in double.
//
// Of n best paths v_t(j) holds n numbers, the greatest first. The m-th of tag j came from the m-th of the
// candidates in one strict order, by value and then by number, so that no two paths are the same.
#pragma once
#include "chains.h"

namespace fastseq {
namespace FASTSEQ_ISA {

template <class T>
struct Viterbi {
  using V = Vec<T>;
  static constexpr int L = LANES<T>;
  Tags<T> tags;
  const ChainCall<T>& call;
  const index K, vectors, padded, n, size;  // size: of v_t of one sequence, (n, padded)
  const index tile;     // sequences of a tile, at most
  T *rows, *columns;    // (K, padded): transitions and, from each tag back, their transpose; -inf behind
  T *start, *end, *out, *x, *v;  // v: (T, tile, n, padded)
  T* values;            // (n) and their numbers: candidates in their order
  index *numbers, *slots;

  Viterbi(const ChainCall<T>& call, Arena& arena)
      : tags(call, arena), call(call), K(call.K), vectors(tags.vectors), padded(tags.padded),
        n(call.n), size(n * padded), tile(n > 1 ? 1 : tile_of(call.steps * padded)) {
    take_each<T>(arena, K * padded, rows, columns);
    take_each<T>(arena, padded, start, end, x);
    out = arena.take<T>(TILE * padded);
    v = arena.take<T>(call.steps * tile * size);
    values = arena.take<T>(n), numbers = arena.take<index>(n), slots = arena.take<index>(n);
  }
  // As many as fill 32 MB.
  static index tile_of(index each) {
    const index most = (index(1) << 25) / (each * index(sizeof(T)) + 1);
    return most > TILE ? TILE : most < 1 ? 1 : most;
  }

  void pack() {
    for (index i = 0; i < K; ++i) tags.bound(call.transitions + i * K, rows + i * padded);
    for (index j = 0; j < K; ++j) {
      for (index i = K; i < padded; ++i) columns[j * padded + i] = -INFINITE<T>;
      for (index i = 0; i < K; ++i) columns[j * padded + i] = call.transitions[i * K + j];
    }
    T* to = tags.packed;
    for (index p = 0; p < tags.panels.count(); ++p)
      for (index i = 0; i < K; ++i)
        for (int v = 0; v < tags.panels.vectors_of(p); ++v, to += L)
          store(to, load(rows + i * padded + (tags.panels.vector(p) + v) * L));
    tags.bound(call.start, start), tags.bound(call.end, end);
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
  // The score of tag j at step t, with that of the step to `after`, or of the end.
  double score_at(index t, index b, index j, index after) const {
    const double e = call.emission(t, b)[j], s = t ? 0 : call.start[j];
    return e + s + (after < 0 ? call.end[j] : call.transitions[j * K + after]);
  }

  T* at(index t, index r) const { return v + (t * tile + r) * size; }

  // Sequences order[0] to order[R - 1].
  void walk(const index* order, index R) {
    const T* row[TILE];
    T most[TILE];
    index alive = R;
    for (index t = 0;; ++t) {
      while (alive > 0 && call.length(order[alive - 1]) == t) --alive;
      if (alive == 0) break;
      for (index r = 0; t && r < alive; ++r) row[r] = at(t - 1, r);
      if (t) tags.template product<MaxPlus<T>>(row, alive, out);
      for (index r = 0; r < alive; ++r) {
        const T* e = call.emission(t, order[r]);
        V top = splat(std::numeric_limits<T>::lowest());
        const V before = splat(t ? most[r] : T(0));
        const auto grow = [&](index k, const T* best) {
          const V grown = load(best) + (tags.of_row(e, k) - before);
          store(at(t, r) + k * L, grown);
          top = larger(grown, top);
        };
        if (t) tags.each(out, alive, r, grow);
        else
          for (index k = 0; k < vectors; ++k) grow(k, start + k * L);
        most[r] = every_largest<T>(top)[0];
        if (most[r] == std::numeric_limits<T>::lowest()) most[r] = 0;
      }
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
  }

  // The n best, one sequence at a time.

  void walk_best(index b) {
    const index T_ = call.length(b);
    T before = 0;
    for (index t = 0; t < T_; ++t) {
      T* own = at(t, 0);
      const T *last = t ? at(t - 1, 0) : nullptr, *e = call.emission(t, b);
      for (index k = 0; k < vectors; ++k) {
        for (index m = 0; m < n; ++m) store(own + m * padded + k * L, splat(-INFINITE<T>));
        if (t == 0) store(own + k * L, load(start + k * L));
        for (index i = 0; t && i < K; ++i)
          for (index m = 0; m < n; ++m)  // the greatest first: the others go where it does not
            if (!insert(own + k * L, splat(last[m * padded + i]) + load(rows + i * padded + k * L)))
              break;
        for (index m = 0; m < n; ++m) {
          T* to = own + m * padded + k * L;
          store(to, load(to) + (tags.of_row(e, k) - splat(before)));
        }
      }
      before = -INFINITE<T>;
      for (index j = 0; j < K; ++j) before = own[j] > before ? own[j] : before;
      if (before == -INFINITE<T>) before = 0;
    }
    trace_best(b, T_);
  }
  // Into a column of n vectors, the greatest first; whether any lane went in.
  FASTSEQ_INLINE bool insert(T* column, V value) const {
    T* least = column + (n - 1) * padded;
    if (equal_lanes<V>(larger(value, load(least)), load(least)) == ALL) return false;
    for (index m = 0; m < n; ++m) {
      T* to = column + m * padded;
      const V kept = load(to);
      store(to, larger(value, kept));
      value = smaller(value, kept);
    }
    return true;
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
        rank(at(t - 1, 0), columns + j * padded, m + 1);
        slot = numbers[m];
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

template <class T>
void chains_scratch(const ChainCall<T>& call, int, size_t* each, size_t* shared) {
  Arena arena(nullptr), common(nullptr);
  switch (call.what) {
    case Chains::FORWARD: ChainsForward<T>(call, arena); break;
    case Chains::VITERBI: Viterbi<T>(call, arena); break;
    case Chains::BACKWARD:
      ChainsBackward<T>(call, arena);
      for (index k = 0; call.dtransitions && k < ChainsBackward<T>::groups(call); ++k)
        ChainsBackward<T>::group(call, common);
  }
  *each = arena.used(), *shared = common.used();
}

template <class T>
void chains(const ChainCall<T>& call, int id, int count) {
  Arena arena(call.scratch + id * call.scratch_each);
  switch (call.what) {
    case Chains::FORWARD: return ChainsForward<T>(call, arena).run();
    case Chains::VITERBI: return Viterbi<T>(call, arena).run();
    case Chains::BACKWARD: return ChainsBackward<T>(call, arena).run(id, count);
  }
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

// The large products of backward: what the windows of steps that the walk has left (backward.h) give
// dx and the gradients of the weights.
//
// The windows and the sums of the biases' gradients are shared by all threads of a call (`Shared`);
// of each product a thread owns a range of rows of dx, or of rows of a weight's gradient.
#pragma once
#include "backward.h"

namespace fastseq {
namespace FASTSEQ_ISA {

struct Range {
  index first, last;
};
// What thread `id` of `count` does of `total`, in whole tiles.
FASTSEQ_INLINE Range range_of(index total, int id, int count, int tile) {
  const index tiles = (total + tile - 1) / tile;
  const index first = tiles * id / count * tile, last = tiles * (id + 1) / count * tile;
  return {first < total ? first : total, last < total ? last : total};
}

// The left-hand side of these products is the gate gradients of a window of steps, which the walk has
// just left in cache; so no more than two windows of them are ever kept.
template <class Cell, class T>
struct Gradients {
  static constexpr int TOGETHER = Cell::G - Cell::APART;
  static constexpr int Q = Cell::G + Cell::APART;
  const BackwardCall<T>& call;
  const Input<T>& in;
  const index H, P;
  const bool pairs;
  T* scratch;

  Gradients(const BackwardCall<T>& call, Arena& arena)
      : call(call), in(call.input), H(in.H), P(in.P), pairs(call.bf16 && in_pairs(in)) {
    const index wide = P > H ? P : H;
    const index products = products_scratch<T>(in.I, wide), rows = rows_scratch<T>();
    scratch = arena.take<T>(products > rows ? products : rows);
  }

  // The row of w_ih whose gradient is column m of dgates.
  FASTSEQ_INLINE index input_row(index m) const {
    if constexpr (Cell::APART == 0) return m;
    const index c = m / H;
    return (c < Cell::APART ? TOGETHER + c : c - Cell::APART) * H + m % H;
  }

  template <class RowAt>
  struct RowsOfInput {
    const Gradients& of;
    RowAt row;
    FASTSEQ_INLINE auto operator()(index k) const { return row(of.input_row(k)); }
  };

  // dx of the window's rows. Several recurrences add to it, so it was cleared before.
  void dx(int r, const Window<T>& window, int id, int count) {
    const Range rows = range_of(window.rows, id, count, SIX);
    const T* w_ih = call.recurrence[r].weights.w_ih;
    with_rows(pairs, call.halves, w_ih, in.I, [&](auto operation, auto row) {
      using Operation = decltype(operation);
      product_of_rows<Operation>(
          pairs ? window.pairs : window.dgates, Q * H / Operation::EACH, rows.first, rows.last,
          Cell::G * H / Operation::EACH, RowsOfInput<decltype(row)>{*this, row}, in.I,
          call.dx + window.base * in.I, in.I, call.R > 1, scratch);
    });
  }

  static T* writable(const T* p) { return const_cast<T*>(p); }

  // What thread `id` does of columns [first, last).
  static Columns part(index first, index last, bool a, bool b, int id, int count) {
    const Range range = range_of(last - first, id, count, SIX);
    return {first + range.first, first + range.last, a, b};
  }

  template <class A, class B>
  void products(const T* d, index stride, index N, const Columns* columns, int count, const A& a,
                const B& b, T* sums, bool add) {
    with_operation<T>(pairs, [&](auto operation) {
      products_over_rows<decltype(operation)>(d, stride, N, columns, count, a, b, sums, add, scratch);
    });
  }

  // sums: (Q*H), where the biases' gradients gather; end: whether this window is the last.
  void weights(int r, const Window<T>& window, T* sums, bool begin, bool end, int id, int count) {
    constexpr int G_HH = Cell::FIRST[Cell::PHASES], FIRST_HH = Cell::FIRST[1];
    const Weights<T>& out = call.gradients[r].out;
    const Recurrence<T>& from = call.recurrence[r];
    const index base = window.base, N = window.rows;
    const bool flat = in.offsets || in.x_step == in.batch * in.x_row;
    const auto input = side<T>(
        [&](index k) {
          const index n = base + k;
          return flat ? in.x + n * in.x_row : in.at(n / in.batch, n % in.batch);
        },
        in.I, [&](index m) { return writable(out.w_ih) + input_row(m) * in.I; });
    const auto recurrent = side<T>(
        [&](index k) { return window.h_prev[k]; }, P,
        [&](index m) { return writable(out.w_hh) + (m - Cell::APART * H) * P; });
    // columns of dgates: x of the gates apart | what the first phase takes | the rest of x | s of
    // the gates apart. What a cell does not have is empty.
    const index apart = Cell::APART * H, both = apart + (FIRST_HH - Cell::APART) * H;
    const Columns parts[] = {
        part(0, apart, true, false, id, count),
        part(apart, both, true, true, id, count),
        part(both, Cell::G * H, true, false, id, count),
        part(Cell::G * H, Q * H, false, true, id, count),
    };
    products(window.dgates, Q * H, N, parts, 4, input, recurrent, sums, !begin);
    if (end)
      for (const Columns& c : parts)
        for (index m = c.first; m < c.last; ++m) {
          if (out.b_ih && m < Cell::G * H) writable(out.b_ih)[input_row(m)] = sums[m];
          if (out.b_hh && m >= apart && m - apart < G_HH * H)
            writable(out.b_hh)[m - apart] = sums[m];
        }
    const auto none = side<T>([](index) { return static_cast<const T*>(nullptr); }, 0,
                              [](index) { return static_cast<T*>(nullptr); });
    T* unused = sums + Q * H;
    if constexpr (Cell::PHASES > 1) {
      const Columns second[] = {part(FIRST_HH * H, G_HH * H, true, false, id, count)};
      const auto value = side<T>([&](index k) { return from.extra[0] + (base + k) * H; }, H,
                                 [&](index m) { return writable(out.w_hh) + m * P; });
      products(window.dgates, Q * H, N, second, 1, value, none, unused, !begin);
    }
    if (out.w_hr) {
      const Columns all[] = {part(0, P, true, false, id, count)};
      const auto m = side<T>([&](index k) { return from.m + (base + k) * H; }, H,
                             [&](index row) { return writable(out.w_hr) + row * H; });
      products(window.dh_all, P, N, all, 1, m, none, unused, !begin);
    }
  }
};

// What all threads share in backward: two windows of each recurrence, and sums.
template <class Cell, class T>
struct Shared {
  static constexpr int Q = Cell::G + Cell::APART;
  static constexpr index LEAST_ROWS = 768, LEAST_BYTES = index(1) << 20;
  const BackwardCall<T>& call;
  const Input<T>& in;
  index rows;  // of a window, at most, but for a single step
  Arena& arena;
  index most;

  struct OfRecurrence {
    Window<T> window[2];
    T *sums, *dunit;
  };

  static index row_bytes(const Input<T>& in) { return Q * in.H * index(sizeof(T)); }

  Shared(const BackwardCall<T>& call, Arena& arena) : call(call), in(call.input), arena(arena) {
    rows = LEAST_BYTES / row_bytes(in);
    if (rows < LEAST_ROWS) rows = LEAST_ROWS;
    most = rows > in.batch ? rows : in.batch;
    if (most > in.rows) most = in.rows;
  }

  OfRecurrence take(int r) {
    OfRecurrence of;
    const bool masked = call.recurrence[r].h_mask, projected = call.recurrence[r].weights.w_hr;
    for (Window<T>& w : of.window) {
      w = {};
      w.dgates = arena.take<T>(most * Q * in.H);
      w.pairs = arena.take<T>(call.bf16 && in_pairs(in) ? most * Q * in.H / 2 : 0);
      w.h_prev = arena.take<const T*>(most);
      w.dh_all = arena.take<T>(projected ? most * in.P : 0);
      w.masked = arena.take<T>(masked ? most * in.P : 0);
    }
    const index wide = Q * in.H > in.P ? Q * in.H : in.P;
    of.sums = arena.take<T>(Q * in.H + wide);
    of.dunit = arena.take<T>(LEVELS * Cell::U * call.threads * in.H);
    return of;
  }

  // Where the window that begins at the k-th step walked ends.
  index window_end(bool reverse, index k) const {
    index end = k, n = 0;
    while (end < in.steps) {
      const index more = in.alive(reverse ? end : in.steps - 1 - end);
      if (end > k && n + more > rows) break;
      n += more;
      ++end;
    }
    return end;
  }

  // The window of the steps from the k-th walked up to the one before `end`.
  void set(bool reverse, index k, index end, Window<T>* w) const {
    w->t0 = reverse ? k : in.steps - end;
    w->t1 = reverse ? end : in.steps - k;
    w->base = w->t0 < in.steps ? in.base(w->t0) : 0;
    w->rows = 0;
    for (index t = w->t0; t < w->t1; ++t) w->rows += in.alive(t);
  }
};

// A thread's own tables, in its scratch: the windows and sums of all recurrences, and its shares.
template <class Cell, class T>
struct Tables {
  typename Shared<Cell, T>::OfRecurrence* of;
  Window<T>** now;
  BackwardShare<Cell, T>* shares;

  Tables(int R, int threads, Arena& arena)
      : of(arena.take<typename Shared<Cell, T>::OfRecurrence>(R)),
        now(arena.take<Window<T>*>(R)),
        shares(arena.take<BackwardShare<Cell, T>>(R / threads + 1)) {}
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

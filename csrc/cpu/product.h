// Matrix products on packed weights, a tile of accumulators at a time.
//
// What multiplies is an operation: of numbers, or of pairs of bfloat16, or sum and maximum in the
// places of product and sum. A product in pairs has half as
// many elements along k, and both sides of it are rounded when they are packed or copied for it.
//
// Letters: K the inner size, in elements; a panel is up to 4 vectors of columns, packed (K, W, LANES)
// with W <= 4, so that one step of k reads it in one go. A tile is R rows by one panel; its
// accumulators stay in registers over k.
//
// Numerics: every output is chains of the operation over k in increasing order, PIECE long,
// added up in that order, and the bias last. So its bits do not depend on the rows beside it, on
// the tile's shape or on the panel it sits in.
#pragma once
#include <limits>

#include "call.h"
#include "simd.h"

namespace fastseq {
namespace FASTSEQ_ISA {

constexpr int WIDEST = 4;       // vectors of a panel
constexpr int PIECE = 256;      // k of a chain
constexpr int TALLEST = 8;      // rows of a tile, at most
constexpr index PREFETCH = 8;   // steps of k ahead of a single row

// Rows of a tile, by its vectors: as many as the registers hold beside the weights.
constexpr int tallest(int W) {
  return REGISTERS == 32 ? (W == 4 ? 6 : 8) : (W == 4 ? 3 : W == 3 ? 4 : W == 2 ? 6 : 8);
}

// Rows of the next tile where `left` remain: even tiles, not a full one and a rest of one row.
FASTSEQ_INLINE int rows_of_tile(index left, int most) {
  const index tiles = (left + most - 1) / most;
  return tiles ? static_cast<int>((left + tiles - 1) / tiles) : 0;
}

// a * b + c on elements of k, EACH numbers in one. Chains begin at `none` and are joined.
template <class T>
struct Single {
  using Number = T;
  static constexpr int EACH = 1;
  static FASTSEQ_INLINE Vec<T> every(T a) { return splat(a); }
  static FASTSEQ_INLINE Vec<T> none() { return Vec<T>{}; }
  static FASTSEQ_INLINE Vec<T> apply(Vec<T> a, Vec<T> b, Vec<T> c) { return fma(a, b, c); }
  static FASTSEQ_INLINE Vec<T> join(Vec<T> a, Vec<T> b) { return a + b; }
  // The elements of one row from p on, n at most; and those of two rows, lane by lane.
  static FASTSEQ_INLINE Vec<T> along(const T* p, index n) { return load_upto(p, n); }
  static FASTSEQ_INLINE Vec<T> across(Vec<T> first, Vec<T>) { return first; }
};
#if defined(__AVX512BF16__)
struct Pair {
  using Number = float;
  using V = Vec<float>;
  static constexpr int EACH = 2;
  static FASTSEQ_INLINE V every(float a) { return (V)_mm512_set1_ps(a); }  // whatever its bits
  static FASTSEQ_INLINE V none() { return V{}; }
  static FASTSEQ_INLINE V apply(V a, V b, V c) { return dot(a, b, c); }
  static FASTSEQ_INLINE V join(V a, V b) { return a + b; }
  static FASTSEQ_INLINE V along(const float* p, index n) {
    constexpr int L = LANES<float>;
    return pair_neighbours(load_upto(p, 2 * n), load_upto(p + L, 2 * n - L));
  }
  static FASTSEQ_INLINE V across(V first, V second) { return pair(first, second); }
};
#endif

// max(a + b, c): the semiring of best paths.
template <class T>
struct MaxPlus {
  using Number = T;
  static FASTSEQ_INLINE Vec<T> every(T a) { return splat(a); }
  static FASTSEQ_INLINE Vec<T> none() { return splat(-std::numeric_limits<T>::infinity()); }
  static FASTSEQ_INLINE Vec<T> apply(Vec<T> a, Vec<T> b, Vec<T> c) { return larger(a + b, c); }
  static FASTSEQ_INLINE Vec<T> join(Vec<T> a, Vec<T> b) { return larger(a, b); }
};

template <class T, class Function>
FASTSEQ_INLINE auto with_operation([[maybe_unused]] bool pairs, Function function) {
#if defined(__AVX512BF16__)
  if constexpr (HAS_PAIRS<T>)
    if (pairs) return function(Pair{});
#endif
  return function(Single<T>{});
}

// Copies `size` numbers, an even number of them, to `to` in pairs.
template <class Operation, class T = typename Operation::Number>
FASTSEQ_INLINE void pair_row(const T* from, index size, T* to) {
  for (index left = size / 2; left > 0; left -= LANES<T>, from += 2 * LANES<T>, to += LANES<T>) {
    const Vec<T> pairs = Operation::along(from, left);
    left >= LANES<T> ? store(to, pairs) : store_part(to, pairs, static_cast<int>(left));
  }
}

// Rows as a product takes them: where it is in pairs, copies of them at `to`.
template <class T>
void pair_rows(bool pairs, const T** row, index n, index size, T* to) {
  with_operation<T>(pairs, [&](auto operation) {
    using Operation = decltype(operation);
    if constexpr (Operation::EACH > 1)
      for (index i = 0; i < n; ++i, to += size / 2) {
        pair_row<Operation>(row[i], size, to);
        row[i] = to;
      }
  });
}

// The element (row, k) of the left-hand side.
template <class T>
struct Rows {  // rows anywhere, k side by side
  const T* const* row;
  FASTSEQ_INLINE T operator()(int r, index k) const { return row[r][k]; }
};
template <class T, int R>
struct Packed {  // (K, R)
  const T* data;
  FASTSEQ_INLINE T operator()(int r, index k) const { return data[k * R + r]; }
};

// out[r][v] = sum_k a(r, k) w[k][v], + out if add, + bias[v] if there is one. out: (R, W, LANES).
template <class Operation, int R, int W, class A, class T = typename Operation::Number>
FASTSEQ_INLINE void tile(A a, const T* w, index K, const T* bias, bool add, T* out) {
  constexpr int L = LANES<T>;
  for (index first = 0; first < K || first == 0; first += PIECE) {
    const index last = K - first < PIECE ? K : first + PIECE;
    Vec<T> total[R][W];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < W; ++v) total[r][v] = Operation::none();
    for (index k = first; k < last; ++k) {
      const T* column = w + k * (W * L);
      if constexpr (R == 1) __builtin_prefetch(column + PREFETCH * W * L);
      if constexpr (R < W) {
        Vec<T> held[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) held[r] = Operation::every(a(r, k));
#pragma GCC unroll 8
        for (int v = 0; v < W; ++v) {
          const Vec<T> value = load(column + v * L);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) total[r][v] = Operation::apply(held[r], value, total[r][v]);
        }
      } else {
        Vec<T> held[W];
#pragma GCC unroll 8
        for (int v = 0; v < W; ++v) held[v] = load(column + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec<T> value = Operation::every(a(r, k));
#pragma GCC unroll 8
          for (int v = 0; v < W; ++v) total[r][v] = Operation::apply(value, held[v], total[r][v]);
        }
      }
    }
    const bool end = last >= K;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < W; ++v) {
        T* at = out + (r * W + v) * L;
        Vec<T> value = total[r][v];
        if (first > 0 || add) value = Operation::join(load(at), value);
        if (end && bias) value = value + load(bias + v * L);
        store(at, value);
      }
    if (end) break;
  }
}

// One row by N panels of W vectors, which stand `step` elements apart: one panel alone has too few
// accumulators to hide the latency of a multiply-add. The same numbers as N tiles. The panels of
// bias and out follow one another.
template <class Operation, int W, int N, class T = typename Operation::Number>
FASTSEQ_INLINE void panels_of_row(const T* a, const T* w, index step, index K, const T* bias,
                                  T* out) {
  constexpr int L = LANES<T>;
  for (index first = 0; first < K || first == 0; first += PIECE) {
    const index last = K - first < PIECE ? K : first + PIECE;
    Vec<T> total[N][W] = {};
    for (index k = first; k < last; ++k) {
      const Vec<T> value = Operation::every(a[k]);
      const T* column = w + k * (W * L);
#pragma GCC unroll 8
      for (int p = 0; p < N; ++p)
#pragma GCC unroll 8
        for (int v = 0; v < W; ++v)
          total[p][v] = Operation::apply(value, load(column + p * step + v * L), total[p][v]);
    }
    const bool end = last >= K;
#pragma GCC unroll 8
    for (int p = 0; p < N; ++p)
#pragma GCC unroll 8
      for (int v = 0; v < W; ++v) {
        T* at = out + (p * W + v) * L;
        Vec<T> x = total[p][v];
        if (first > 0) x = load(at) + x;
        if (end && bias) x = x + load(bias + (p * W + v) * L);
        store(at, x);
      }
    if (end) break;
  }
}

// A tile's function is not inlined, so that its registers are allocated apart.
template <class Operation, int R, int W, class A, class T = typename Operation::Number>
__attribute__((noinline)) void tile_function(A a, const T* w, index K, const T* bias, bool add,
                                             T* out) {
  tile<Operation, R, W, A>(a, w, K, bias, add, out);
}

template <class Operation, int W, int N, class T = typename Operation::Number>
__attribute__((noinline)) void row_function(const T* a, const T* w, index step, index K,
                                            const T* bias, T* out) {
  panels_of_row<Operation, W, N>(a, w, step, K, bias, out);
}

constexpr int TOGETHER_MOST = REGISTERS == 32 ? 4 : 2;  // panels of one row at once

// One row by as many whole panels of W vectors, of the `left` next ones, as go at once; returns how many.
template <class T, int W>
FASTSEQ_INLINE int run_row(bool pairs, index left, const T* a, const T* w, index K, const T* bias,
                           T* out) {
  const index step = K * W * LANES<T>;
  return with_operation<T>(pairs, [&](auto operation) {
    using Operation = decltype(operation);
    if (TOGETHER_MOST >= 4 && left >= 4) {
      row_function<Operation, W, 4>(a, w, step, K, bias, out);
      return 4;
    }
    if (left >= 2) {
      row_function<Operation, W, 2>(a, w, step, K, bias, out);
      return 2;
    }
    row_function<Operation, W, 1>(a, w, step, K, bias, out);
    return 1;
  });
}

template <class Operation, int W, class T = typename Operation::Number>
void tile_of_rows(int R, const T* const* row, const T* w, index K, const T* bias, T* out) {
  const Rows<T> a{row};
  switch (R) {
    case 1: return tile_function<Operation, 1, W>(a, w, K, bias, false, out);
    case 2: return tile_function<Operation, 2, W>(a, w, K, bias, false, out);
    case 3: return tile_function<Operation, 3, W>(a, w, K, bias, false, out);
    case 4: return tile_function<Operation, 4, W>(a, w, K, bias, false, out);
    case 5: return tile_function<Operation, 5, W>(a, w, K, bias, false, out);
    case 6: return tile_function<Operation, 6, W>(a, w, K, bias, false, out);
    case 7: return tile_function<Operation, 7, W>(a, w, K, bias, false, out);
    case 8: return tile_function<Operation, 8, W>(a, w, K, bias, false, out);
  }
}

// out (R, W, LANES) = rows times a panel of W vectors, + bias.
template <class Operation, class T = typename Operation::Number>
void run_tile(int R, int W, const T* const* row, const T* w, index K, const T* bias, T* out) {
  switch (W) {
    case 1: return tile_of_rows<Operation, 1>(R, row, w, K, bias, out);
    case 2: return tile_of_rows<Operation, 2>(R, row, w, K, bias, out);
    case 3: return tile_of_rows<Operation, 3>(R, row, w, K, bias, out);
    case 4: return tile_of_rows<Operation, 4>(R, row, w, K, bias, out);
  }
}
template <class T>
FASTSEQ_INLINE void run_tile(bool pairs, int R, int W, const T* const* row, const T* w, index K,
                             const T* bias, T* out) {
  with_operation<T>(pairs, [&](auto operation) {
    run_tile<decltype(operation)>(R, W, row, w, K, bias, out);
  });
}

// The same numbers up to rounding, from weights as they are: column j is row j of w, `stride` apart.
// Each output is lanes of chains over k, added up as a tree. For so few rows that packing the weights
// would cost more than the product: every weight is read once for up to DOT_ROWS rows.
constexpr int DOT_ROWS = 4;

template <class T, int R>
__attribute__((noinline)) void dot_block(const T* const* row, const T* w, index stride, index K,
                                         int columns, const T* bias, T* out, index out_step) {
  constexpr int L = LANES<T>;
  constexpr int MOST = R == 1 ? 8 : REGISTERS == 32 ? 4 : 2;
  constexpr int C = MOST < L ? MOST : L;  // columns at once
  Vec<T> square[R][L];
  for (int first = 0; first < L; first += C) {
    Vec<T> total[R][C] = {};
    if (first < columns) {
      const T* column[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c)  // behind the last column it is read again, and not used
        column[c] = w + (first + c < columns ? first + c : columns - 1) * stride;
      index k = 0;
      for (; k + L <= K; k += L) {
        Vec<T> a[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) a[r] = load(row[r] + k);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
          const Vec<T> value = load(column[c] + k);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) total[r][c] = fma(a[r], value, total[r][c]);
        }
      }
      if (k < K) {
        const int n = static_cast<int>(K - k);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
          const Vec<T> value = load_part(column[c] + k, n);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
            total[r][c] = fma(load_part(row[r] + k, n), value, total[r][c]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) square[r][first + c] = total[r][c];
  }
  for (int r = 0; r < R; ++r) {
    transpose<T>(square[r]);
#pragma GCC unroll 16
    for (int width = L / 2; width > 0; width /= 2)
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) square[r][i] = square[r][i] + square[r][i + width];
    store(out + r * out_step, bias ? square[r][0] + load(bias) : square[r][0]);
  }
}

template <class T>
void dot_rows(int R, const T* const* row, const T* w, index stride, index K, int columns,
              const T* bias, T* out, index out_step) {
  switch (R) {
    case 1: return dot_block<T, 1>(row, w, stride, K, columns, bias, out, out_step);
    case 2: return dot_block<T, 2>(row, w, stride, K, columns, bias, out, out_step);
    case 3: return dot_block<T, 3>(row, w, stride, K, columns, bias, out, out_step);
    case 4: return dot_block<T, 4>(row, w, stride, K, columns, bias, out, out_step);
  }
}

// How the columns of a product are packed into panels. A column is a hidden unit of one of `gates`
// gates; a panel holds `blocks` blocks of LANES units of all gates, in the order (block, gate).
template <class T>
struct Panels {
  int gates;
  int blocks;   // of a whole panel; gates * blocks <= WIDEST
  index units;  // columns of one gate
  index K;
  index kept = 0;  // the first panel that there is room for

  Panels(int gates, index units, index K)
      : gates(gates), blocks(gates ? WIDEST / gates : WIDEST), units(units), K(K) {}

  index total_blocks() const { return (units + LANES<T> - 1) / LANES<T>; }
  index count() const { return (total_blocks() + blocks - 1) / blocks; }
  int blocks_of(index p) const {
    const index left = total_blocks() - p * blocks;
    return left < blocks ? static_cast<int>(left) : blocks;
  }
  int vectors_of(index p) const { return gates * blocks_of(p); }
  index vector(index p) const { return p * blocks * gates; }  // its first, counted from panel 0
  index offset(index p) const { return (vector(p) - vector(kept)) * K * LANES<T>; }
  index size() const { return size(count()); }
  index size(index end) const {  // of the panels kept, up to `end`
    const index blocks_of_all = end < count() ? end * blocks : total_blocks();
    return (blocks_of_all * gates - vector(kept)) * K * LANES<T>;
  }
};

// A tile of R rows by panel p, of weights that are not packed: gate g's unit u is row
// (g * units + u) of w.
template <class T>
void dot_panel(const Panels<T>& panels, index p, int R, const T* const* row, const T* w,
               const T* bias, T* out) {
  constexpr int L = LANES<T>;
  const int W = panels.vectors_of(p);
  for (int v = 0; v < W; ++v) {
    const index unit = (p * panels.blocks + v / panels.gates) * L;
    const T* first = w + ((v % panels.gates) * panels.units + unit) * panels.K;
    const int columns = panels.units - unit < L ? static_cast<int>(panels.units - unit) : L;
    for (int r = 0; r < R; r += DOT_ROWS)
      dot_rows(R - r < DOT_ROWS ? R - r : DOT_ROWS, row + r, first, panels.K, panels.K, columns,
               bias ? bias + v * L : nullptr, out + (r * W + v) * L, index(W) * L);
  }
}

// Packs columns that are rows of `w`: gate g's unit u is row (g * units + u), k runs along it.
template <class Operation, class T = typename Operation::Number>
void pack_transposed(const Panels<T>& panels, const T* w, index stride, index p0, index p1,
                     T* out) {
  constexpr int L = LANES<T>;
  for (index p = p0; p < p1; ++p) {
    const int W = panels.vectors_of(p);
    T* panel = out + panels.offset(p);
    for (int v = 0; v < W; ++v) {
      const index unit = (p * panels.blocks + v / panels.gates) * L;
      const T* rows = w + ((v % panels.gates) * panels.units + unit) * stride;
      const int n = panels.units - unit < L ? static_cast<int>(panels.units - unit) : L;
      for (index k = 0; k < panels.K; k += L) {
        const int m = panels.K - k < L ? static_cast<int>(panels.K - k) : L;
        Vec<T> square[L];
        if (n == L && m == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i)
            square[i] = Operation::along(rows + i * stride + k * Operation::EACH, L);
        } else {
          for (int i = 0; i < L; ++i)
            square[i] = i < n ? Operation::along(rows + i * stride + k * Operation::EACH, m)
                              : Vec<T>{};
        }
        transpose<T>(square);
        T* to = panel + (k * W + v) * L;
        if (m == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) store(to + index(i) * W * L, square[i]);
        } else {
          for (int i = 0; i < m; ++i) store(to + index(i) * W * L, square[i]);
        }
      }
    }
  }
}

// first + second for gates [from, to), in the order of the panels' columns; a null counts as zeros.
// Zeros stand for the other gates and behind the last unit.
template <class T>
void pack_bias(const Panels<T>& panels, const T* first, const T* second, int from, int to, T* out) {
  constexpr int L = LANES<T>;
  for (index p = 0; p < panels.count(); ++p)
    for (int v = 0; v < panels.vectors_of(p); ++v) {
      const int g = v % panels.gates;
      const index unit = (p * panels.blocks + v / panels.gates) * L;
      const index at = g * panels.units + unit;
      const int n = panels.units - unit < L ? static_cast<int>(panels.units - unit) : L;
      Vec<T> value{};
      if (g >= from && g < to) {
        if (first) value = n == L ? load(first + at) : load_part(first + at, n);
        if (second) value = value + (n == L ? load(second + at) : load_part(second + at, n));
      }
      store(out + (panels.vector(p) + v) * L, value);
    }
}

template <class T>
void pack_transposed(bool pairs, bool halves, const Panels<T>& panels, const T* w, index stride,
                     index p0, index p1, T* out) {
  // rows of bfloat16 are elements as they stand
  if (halves) return pack_transposed<Single<T>>(panels, w, stride / 2, p0, p1, out);
  with_operation<T>(pairs, [&](auto operation) {
    pack_transposed<decltype(operation)>(panels, w, stride, p0, p1, out);
  });
}

// Room for the result of one tile.
template <class T>
constexpr index tile_size() {
  return TALLEST * WIDEST * LANES<T>;
}

template <class T>
void add_tile(const T* from, int R, int W, index columns, T* const* to, bool add) {
  constexpr int L = LANES<T>;
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < W; ++v) {
      const index left = columns - v * L;
      T* at = to[r] + v * L;
      Vec<T> value = load(from + (r * W + v) * L);
      if (left >= L) {
        if (add) value = load(at) + value;
        store(at, value);
      } else if (left > 0) {
        if (add) value = load_part(at, int(left)) + value;
        store_part(at, value, int(left));
      }
    }
}

constexpr int SIX = tallest(WIDEST);  // rows of the left-hand side that are packed together
constexpr int BAND = 8 * SIX;         // and those that are packed at once: their lines are read once
constexpr int CHUNK = 2 * PIECE;      // k of a left-hand side that is packed, of a sum over all rows
constexpr int DEPTH = 8 * PIECE;      // k of a panel that is packed, of a product of rows

// Copies a panel of `columns` columns, from column `at` on, of rows [k0, k0 + n), which may be bfloat16.
// In pairs, a row behind the last counts as zeros.
template <class Operation, class RowAt, class T = typename Operation::Number>
FASTSEQ_INLINE void pack_panel(RowAt row, index k0, index n, index at, index columns, int W,
                               T* panel) {
  constexpr int L = LANES<T>;
  for (index k = 0; k < n; k += Operation::EACH) {
    const bool alone = Operation::EACH == 1 || k + 1 >= n;
    const auto *first = row(k0 + k) + at, *second = alone ? first : row(k0 + k + 1) + at;
    for (int v = 0; v < W; ++v, panel += L) {
      const index rest = columns - at - v * L;
      store(panel, Operation::across(load_upto(first + v * L, rest),
                                     alone ? Vec<T>{} : load_upto(second + v * L, rest)));
    }
  }
}

// The rows of a matrix. It is no lambda: nm cannot read the name of a template over nested lambdas.
template <class Number>
struct MatrixRows {
  const Number* w;
  index stride;
  FASTSEQ_INLINE const Number* operator()(index k) const { return w + k * stride; }
};

// Calls function with the operation and the rows of a matrix, bfloat16 where `halves` says so.
template <class T, class Function>
FASTSEQ_INLINE void with_rows(bool pairs, [[maybe_unused]] bool halves, const T* w, index stride,
                              Function function) {
  with_operation<T>(pairs, [&](auto operation) {
    if constexpr (decltype(operation)::EACH > 1)
      if (halves)
        return function(operation,
                        MatrixRows<uint16_t>{reinterpret_cast<const uint16_t*>(w), stride});
    function(operation, MatrixRows<T>{w, stride});
  });
}

// Packs columns that are columns of `w`, K rows of it.
template <class T>
void pack_columns(bool pairs, bool halves, const Panels<T>& panels, const T* w, index stride,
                  index K, index p0, index p1, T* out) {
  with_rows(pairs, halves, w, stride, [&](auto operation, auto row) {
    for (index p = p0; p < p1; ++p)
      pack_panel<decltype(operation)>(row, 0, K, p * WIDEST * LANES<T>, panels.units,
                                      panels.vectors_of(p), out + panels.offset(p));
  });
}

// How many elements of k so many numbers make.
template <class Operation>
constexpr index elements(index n) {
  return (n + Operation::EACH - 1) / Operation::EACH;
}

// A right-hand side of `products_over_rows`: row(k) has `columns` numbers; to(m) is where row m of
// the product with it goes.
template <class T, class RowAt, class To>
struct Side {
  RowAt row;
  index columns;
  To to;

  Panels<T> panels(index n) const { return Panels<T>(1, columns, n); }

  template <class Operation>
  void pack(index k0, index n, T* right) const {
    const Panels<T> p = panels(elements<Operation>(n));
    for (index k = 0; k < p.count(); ++k)
      pack_panel<Operation>(row, k0, n, k * WIDEST * LANES<T>, columns, p.vectors_of(k),
                            right + p.offset(k));
  }

  // Rows [m, m + band) of the product with the packed left-hand side, added to what is there.
  template <class Operation>
  void multiply(const T* left, index n, index m, int band, const T* right, bool add,
                T* result) const {
    const Panels<T> panels = this->panels(n);
    for (index p = 0; p < panels.count(); ++p) {
      const int W = panels.vectors_of(p);
      const T* w = right + panels.offset(p);
      for (int j = 0; j < band; j += SIX) {
        const Packed<T, SIX> a{left + j * n};
        const T* no_bias = nullptr;
        switch (W) {
          case 1: tile_function<Operation, SIX, 1>(a, w, n, no_bias, false, result); break;
          case 2: tile_function<Operation, SIX, 2>(a, w, n, no_bias, false, result); break;
          case 3: tile_function<Operation, SIX, 3>(a, w, n, no_bias, false, result); break;
          case 4: tile_function<Operation, SIX, 4>(a, w, n, no_bias, false, result); break;
        }
        T* place[SIX];
        const int rows = band - j < SIX ? band - j : SIX;
        for (int i = 0; i < rows; ++i) place[i] = to(m + j + i) + p * WIDEST * LANES<T>;
        add_tile(result, rows, W, columns - p * WIDEST * LANES<T>, place, add);
      }
    }
  }
};
template <class T, class RowAt, class To>
Side<T, RowAt, To> side(RowAt row, index columns, To to) {
  return {row, columns, to};
}

// Columns [first, last) of d, and with which of the two sides they are multiplied.
struct Columns {
  index first, last;
  bool a, b;
};

template <class T>
index products_scratch(index columns_a, index columns_b) {
  return Panels<T>(1, columns_a, CHUNK).size() + Panels<T>(1, columns_b, CHUNK).size() +
         BAND * CHUNK + tile_size<T>() + 4 * Arena::BETWEEN / index(sizeof(T));
}

// to(m)[n] = sum_k d[k][m] row(k)[n] for two right-hand sides, and sums[m] = sum_k d[k][m]; added to
// what is there where `add`. d and the columns that both sides want are read once.
template <class Operation, class SideA, class SideB, class T = typename Operation::Number>
void products_over_rows(const T* d, index d_stride, index K, const Columns* columns, int count,
                        const SideA& a, const SideB& b, T* sums, bool add, T* scratch) {
  Arena pieces(scratch);
  T* right_a = pieces.take<T>(a.panels(CHUNK).size());
  T* right_b = pieces.take<T>(b.panels(CHUNK).size());
  T* left = pieces.take<T>(BAND * CHUNK);
  T* result = pieces.take<T>(tile_size<T>());
  if (!add)
    for (int c = 0; c < count; ++c)
      for (index m = columns[c].first; m < columns[c].last; ++m) sums[m] = 0;
  constexpr index MOST = CHUNK * Operation::EACH;
  for (index k0 = 0; k0 < K || k0 == 0; k0 += MOST) {
    const index rows = K - k0 < MOST ? K - k0 : MOST, n = elements<Operation>(rows);
    a.template pack<Operation>(k0, rows, right_a);
    b.template pack<Operation>(k0, rows, right_b);
    for (int c = 0; c < count; ++c)
      for (index m = columns[c].first; m < columns[c].last; m += BAND) {
        const int band = columns[c].last - m < BAND ? int(columns[c].last - m) : BAND;
        T few[BAND] = {}, chunk[BAND] = {};  // sums of sums: in one long chain the rounding adds up
        for (index k = 0; k < n; ++k) {
          const index each = k * Operation::EACH;
          const T* from = d + (k0 + each) * d_stride + m;
          T* at = left + k * SIX;
          for (int e = 0; e < Operation::EACH && each + e < rows; ++e)
            for (int j = 0; j < band; ++j) few[j] += from[e * d_stride + j];
          [[maybe_unused]] T paired[BAND];
          if constexpr (Operation::EACH > 1) {
            const T* second = each + 1 < rows ? from + d_stride : nullptr;
            for (int j = 0; j < BAND; j += LANES<T>)
              store(paired + j,
                    Operation::across(load_upto(from + j, band - j),
                                      second ? load_upto(second + j, band - j) : Vec<T>{}));
            from = paired;
          }
          if (band == BAND) {
            for (int j = 0; j < BAND; j += SIX) std::memcpy(at + j * n, from + j, SIX * sizeof(T));
          } else {
            for (int j = 0; j < band; j += SIX)
              for (int i = 0; i < SIX; ++i) at[j * n + i] = j + i < band ? from[j + i] : T(0);
          }
          if (k % 32 == 31 || k + 1 == n)
            for (int j = 0; j < band; ++j) chunk[j] += few[j], few[j] = 0;
        }
        for (int j = 0; j < band; ++j) sums[m + j] += chunk[j];
        const bool adds = add || k0 > 0;
        if (columns[c].a) a.template multiply<Operation>(left, n, m, band, right_a, adds, result);
        if (columns[c].b) b.template multiply<Operation>(left, n, m, band, right_b, adds, result);
      }
  }
}

// out[m][n] = sum_k a[m][k] w(k)[n] for m in [m0, m1), added to what is there where `add`. Of pairs a
// holds them already, and there are K of them.
template <class T>
constexpr index rows_scratch() {
  return DEPTH * WIDEST * LANES<T> + tile_size<T>() + 2 * Arena::BETWEEN / index(sizeof(T));
}

template <class Operation, class RowAt, class T = typename Operation::Number>
void product_of_rows(const T* a, index a_stride, index m0, index m1, index K, RowAt w,
                     index columns, T* out, index out_stride, bool add, T* scratch) {
  constexpr int L = LANES<T>;
  Arena pieces(scratch);
  T* panel = pieces.take<T>(DEPTH * WIDEST * L);
  T* result = pieces.take<T>(tile_size<T>());
  for (index k0 = 0; k0 < K || k0 == 0; k0 += DEPTH) {
    const index n = K - k0 < DEPTH ? K - k0 : DEPTH;
    const Panels<T> panels(1, columns, n);
    for (index p = 0; p < panels.count(); ++p) {
      const int W = panels.vectors_of(p);
      pack_panel<Operation>(w, k0 * Operation::EACH, n * Operation::EACH, p * WIDEST * L, columns, W,
                            panel);
      for (index m = m0; m < m1;) {
        const int rows = rows_of_tile(m1 - m, tallest(W));
        const T* row[TALLEST];
        T* place[TALLEST];
        for (int i = 0; i < rows; ++i) {
          row[i] = a + (m + i) * a_stride + k0;
          place[i] = out + (m + i) * out_stride + p * WIDEST * L;
        }
        run_tile<Operation>(rows, W, row, panel, n, static_cast<const T*>(nullptr), result);
        add_tile(result, rows, W, columns - p * WIDEST * L, place, add || k0 > 0);
        m += rows;
      }
    }
  }
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

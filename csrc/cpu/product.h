// Matrix products on packed weights, a tile of accumulators at a time.
//
// Letters: K the inner size; a panel is up to 4 vectors of columns, packed (K, W, LANES) with
// W <= 4, so that one step of k reads it in one go. A tile is R rows by one panel; its accumulators
// stay in registers over k.
//
// Numerics: every output is chains of fused multiply-adds over k in increasing order, PIECE long,
// added up in that order, and the bias last. So its bits do not depend on the rows beside it, on
// the tile's shape or on the panel it sits in.
#pragma once
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
template <class T, int R, int W, class A>
FASTSEQ_INLINE void tile(A a, const T* w, index K, const T* bias, bool add, T* out) {
  constexpr int L = LANES<T>;
  for (index first = 0; first < K || first == 0; first += PIECE) {
    const index last = K - first < PIECE ? K : first + PIECE;
    Vec<T> total[R][W] = {};
    for (index k = first; k < last; ++k) {
      const T* column = w + k * (W * L);
      if constexpr (R == 1) __builtin_prefetch(column + PREFETCH * W * L);
      if constexpr (R < W) {
        Vec<T> held[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) held[r] = splat(a(r, k));
#pragma GCC unroll 8
        for (int v = 0; v < W; ++v) {
          const Vec<T> value = load(column + v * L);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) total[r][v] = fma(held[r], value, total[r][v]);
        }
      } else {
        Vec<T> held[W];
#pragma GCC unroll 8
        for (int v = 0; v < W; ++v) held[v] = load(column + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec<T> value = splat(a(r, k));
#pragma GCC unroll 8
          for (int v = 0; v < W; ++v) total[r][v] = fma(value, held[v], total[r][v]);
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
        if (first > 0 || add) value = load(at) + value;
        if (end && bias) value = value + load(bias + v * L);
        store(at, value);
      }
    if (end) break;
  }
}

// One row by N panels of W vectors, which stand `step` elements apart: one panel alone has too few
// accumulators to hide the latency of a multiply-add. The same numbers as N tiles. The panels of
// bias and out follow one another.
template <class T, int W, int N>
FASTSEQ_INLINE void panels_of_row(const T* a, const T* w, index step, index K, const T* bias,
                                  T* out) {
  constexpr int L = LANES<T>;
  for (index first = 0; first < K || first == 0; first += PIECE) {
    const index last = K - first < PIECE ? K : first + PIECE;
    Vec<T> total[N][W] = {};
    for (index k = first; k < last; ++k) {
      const Vec<T> value = splat(a[k]);
      const T* column = w + k * (W * L);
#pragma GCC unroll 8
      for (int p = 0; p < N; ++p)
#pragma GCC unroll 8
        for (int v = 0; v < W; ++v)
          total[p][v] = fma(value, load(column + p * step + v * L), total[p][v]);
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
template <class T, int R, int W, class A>
__attribute__((noinline)) void tile_function(A a, const T* w, index K, const T* bias, bool add,
                                             T* out) {
  tile<T, R, W, A>(a, w, K, bias, add, out);
}

template <class T, int W, int N>
__attribute__((noinline)) void row_function(const T* a, const T* w, index step, index K,
                                            const T* bias, T* out) {
  panels_of_row<T, W, N>(a, w, step, K, bias, out);
}

constexpr int TOGETHER_MOST = REGISTERS == 32 ? 4 : 2;  // panels of one row at once

// As many whole panels of W vectors as can be done at once for one row, of `left`; how many.
template <class T, int W>
FASTSEQ_INLINE int run_row(index left, const T* a, const T* w, index K, const T* bias, T* out) {
  const index step = K * W * LANES<T>;
  if (TOGETHER_MOST >= 4 && left >= 4) {
    row_function<T, W, 4>(a, w, step, K, bias, out);
    return 4;
  }
  if (left >= 2) {
    row_function<T, W, 2>(a, w, step, K, bias, out);
    return 2;
  }
  row_function<T, W, 1>(a, w, step, K, bias, out);
  return 1;
}

template <class T, int W>
void tile_of_rows(int R, const T* const* row, const T* w, index K, const T* bias, T* out) {
  const Rows<T> a{row};
  switch (R) {
    case 1: return tile_function<T, 1, W>(a, w, K, bias, false, out);
    case 2: return tile_function<T, 2, W>(a, w, K, bias, false, out);
    case 3: return tile_function<T, 3, W>(a, w, K, bias, false, out);
    case 4: return tile_function<T, 4, W>(a, w, K, bias, false, out);
    case 5: return tile_function<T, 5, W>(a, w, K, bias, false, out);
    case 6: return tile_function<T, 6, W>(a, w, K, bias, false, out);
    case 7: return tile_function<T, 7, W>(a, w, K, bias, false, out);
    case 8: return tile_function<T, 8, W>(a, w, K, bias, false, out);
  }
}

// out (R, W, LANES) = rows times a panel of W vectors, + bias.
template <class T>
void run_tile(int R, int W, const T* const* row, const T* w, index K, const T* bias, T* out) {
  switch (W) {
    case 1: return tile_of_rows<T, 1>(R, row, w, K, bias, out);
    case 2: return tile_of_rows<T, 2>(R, row, w, K, bias, out);
    case 3: return tile_of_rows<T, 3>(R, row, w, K, bias, out);
    case 4: return tile_of_rows<T, 4>(R, row, w, K, bias, out);
  }
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
  index offset(index p) const { return vector(p) * K * LANES<T>; }
  index size() const { return total_blocks() * gates * K * LANES<T>; }
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
template <class T>
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
          for (int i = 0; i < L; ++i) square[i] = load(rows + i * stride + k);
        } else {
          for (int i = 0; i < L; ++i)
            square[i] = i < n ? load_part(rows + i * stride + k, m) : Vec<T>{};
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

// Packs columns that are columns of `w`: rows k0 to k1 of the panels are rows of `w`.
template <class T>
void pack_columns(const Panels<T>& panels, const T* w, index stride, index k0, index k1, index p0,
                  index p1, T* out) {
  constexpr int L = LANES<T>;
  for (index p = p0; p < p1; ++p) {
    const int W = panels.vectors_of(p);
    const index unit = p * panels.blocks * L;
    T* panel = out + panels.offset(p);
    for (index k = k0; k < k1; ++k) {
      const T* row = w + (k - k0) * stride;
      for (int v = 0; v < W; ++v) {
        const index left = panels.units - unit - v * L;
        store(panel + (k * W + v) * L,
              left >= L ? load(row + unit + v * L) : load_part(row + unit + v * L, int(left)));
      }
    }
  }
}

// first + second, a vector per unit of each gate in the order of the panels' columns; a null counts
// as zeros, and so does what is behind the end. Of `gates` from `from` on only; zeros elsewhere.
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

// Copies a panel of `columns` columns, from column `at` on, of rows [k0, k0 + n).
template <class T, class RowAt>
FASTSEQ_INLINE void pack_panel(RowAt row, index k0, index n, index at, index columns, int W,
                               T* panel) {
  constexpr int L = LANES<T>;
  for (index k = 0; k < n; ++k) {
    const T* from = row(k0 + k) + at;
    for (int v = 0; v < W; ++v) {
      const index rest = columns - at - v * L;
      store(panel + (k * W + v) * L,
            rest >= L ? load(from + v * L) : load_part(from + v * L, int(rest)));
    }
  }
}

// A right-hand side of `products_over_rows`: row(k) has `columns` numbers; to(m) is where row m of
// the product with it goes.
template <class T, class RowAt, class To>
struct Side {
  RowAt row;
  index columns;
  To to;

  Panels<T> panels(index n) const { return Panels<T>(1, columns, n); }

  void pack(index k0, index n, T* right) const {
    const Panels<T> p = panels(n);
    for (index k = 0; k < p.count(); ++k)
      pack_panel(row, k0, n, k * WIDEST * LANES<T>, columns, p.vectors_of(k), right + p.offset(k));
  }

  // Rows [m, m + band) of the product with the packed left-hand side, added to what is there.
  void multiply(const T* left, index n, index m, int band, const T* right, bool add,
                T* result) const {
    const Panels<T> panels = this->panels(n);
    for (index p = 0; p < panels.count(); ++p) {
      const int W = panels.vectors_of(p);
      const T* w = right + panels.offset(p);
      for (int j = 0; j < band; j += SIX) {
        const Packed<T, SIX> a{left + j * n};
        switch (W) {
          case 1: tile_function<T, SIX, 1>(a, w, n, nullptr, false, result); break;
          case 2: tile_function<T, SIX, 2>(a, w, n, nullptr, false, result); break;
          case 3: tile_function<T, SIX, 3>(a, w, n, nullptr, false, result); break;
          case 4: tile_function<T, SIX, 4>(a, w, n, nullptr, false, result); break;
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
         BAND * CHUNK + tile_size<T>();
}

// to(m)[n] = sum_k d[k][m] row(k)[n] for two right-hand sides, and sums[m] = sum_k d[k][m]; added to
// what is there where `add`. d and the columns that both sides want are read once.
template <class T, class SideA, class SideB>
void products_over_rows(const T* d, index d_stride, index K, const Columns* columns, int count,
                        const SideA& a, const SideB& b, T* sums, bool add, T* scratch) {
  T* right_a = scratch;
  T* right_b = right_a + a.panels(CHUNK).size();
  T* left = right_b + b.panels(CHUNK).size();
  T* result = left + BAND * CHUNK;
  if (!add)
    for (int c = 0; c < count; ++c)
      for (index m = columns[c].first; m < columns[c].last; ++m) sums[m] = 0;
  for (index k0 = 0; k0 < K || k0 == 0; k0 += CHUNK) {
    const index n = K - k0 < CHUNK ? K - k0 : CHUNK;
    a.pack(k0, n, right_a);
    b.pack(k0, n, right_b);
    for (int c = 0; c < count; ++c)
      for (index m = columns[c].first; m < columns[c].last; m += BAND) {
        const int band = columns[c].last - m < BAND ? int(columns[c].last - m) : BAND;
        for (index k = 0; k < n; ++k) {
          const T* from = d + (k0 + k) * d_stride + m;
          T* at = left + k * SIX;
          if (band == BAND) {
            for (int j = 0; j < BAND; j += SIX) std::memcpy(at + j * n, from + j, SIX * sizeof(T));
            for (int j = 0; j < BAND; ++j) sums[m + j] += from[j];
          } else {
            for (int j = 0; j < band; j += SIX)
              for (int i = 0; i < SIX; ++i) at[j * n + i] = j + i < band ? from[j + i] : T(0);
            for (int j = 0; j < band; ++j) sums[m + j] += from[j];
          }
        }
        if (columns[c].a) a.multiply(left, n, m, band, right_a, add || k0 > 0, result);
        if (columns[c].b) b.multiply(left, n, m, band, right_b, add || k0 > 0, result);
      }
  }
}

// out[m][n] = sum_k a[m][k] w(k)[n] for m in [m0, m1), added to what is there where `add`.
template <class T>
constexpr index rows_scratch() {
  return DEPTH * WIDEST * LANES<T> + tile_size<T>();
}

template <class T, class RowAt>
void product_of_rows(const T* a, index a_stride, index m0, index m1, index K, RowAt w,
                     index columns, T* out, index out_stride, bool add, T* scratch) {
  constexpr int L = LANES<T>;
  T* panel = scratch;
  T* result = panel + DEPTH * WIDEST * L;
  for (index k0 = 0; k0 < K || k0 == 0; k0 += DEPTH) {
    const index n = K - k0 < DEPTH ? K - k0 : DEPTH;
    const Panels<T> panels(1, columns, n);
    for (index p = 0; p < panels.count(); ++p) {
      const int W = panels.vectors_of(p);
      pack_panel(w, k0, n, p * WIDEST * L, columns, W, panel);
      for (index m = m0; m < m1;) {
        const int rows = rows_of_tile(m1 - m, tallest(W));
        const T* row[TALLEST];
        T* place[TALLEST];
        for (int i = 0; i < rows; ++i) {
          row[i] = a + (m + i) * a_stride + k0;
          place[i] = out + (m + i) * out_stride + p * WIDEST * L;
        }
        run_tile(rows, W, row, panel, n, static_cast<const T*>(nullptr), result);
        add_tile(result, rows, W, columns - p * WIDEST * L, place, add || k0 > 0);
        m += rows;
      }
    }
  }
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

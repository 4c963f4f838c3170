// The loops over time, forward and backward, generic over the cell.
//
// A share is what one thread owns of a recurrence: a range of the batch's rows and one of the hidden
// units, from the first step to the last. Threads that share rows but not units meet at every step;
// all others have nobody to wait for.
//
// A step is, for each phase of the cell, and for each panel of its packed weights, a tile of the
// product h_{t-1} W_hh^T into a buffer of a few KB, and the cell's text on it, a vector of units at
// a time. The input product of a chunk of steps is made on the same panels just before them, so that
// it is read while it is in cache; the gates go to memory only where backward wants them.
//
// Where a call is in bfloat16 and the processor multiplies pairs of it, all is float32 but what goes
// into a product: copies of its rows in pairs, and packed weights. h is rounded as it is left.
#pragma once
#include "call.h"
#include "product.h"

namespace fastseq {
namespace FASTSEQ_ISA {

// Where a share stands in its call.
struct Place {
  int recurrence;
  index first, last;  // rows
  index p0, p1;       // panels of units
  int id, count;      // among those who meet at every step; count 1: nobody
  Slot* slots;
  int part;           // which of the shares of rows
  int parts;
};

// Where the part-th of `parts` shares of the batch begins: all get about as many rows of the input.
template <class T>
index share_of_rows(const Input<T>& in, int part, int parts) {
  if (!in.sizes || part == 0 || part == parts) return in.batch * part / parts;
  index low = 0, high = in.batch;
  while (low < high) {  // the first sequence before which there are rows enough
    const index b = (low + high) / 2;
    index before = 0;
    for (index t = 0; t < in.steps; ++t) before += in.sizes[t] < b ? in.sizes[t] : b;
    if (before * parts < in.rows * part)
      low = b + 1;
    else
      high = b;
  }
  return low;
}

// The share of thread `id`, or the next one of a thread that has several; false when there is none.
template <class CallT>
FASTSEQ_INLINE bool place_of(const CallT& call, int id, int count, int turn, index panels,
                             bool units_apart, double flops, double bytes, Place* place) {
  const int R = call.R;
  const int each = count / R > 1 ? count / R : 1;  // threads of one recurrence
  const Input<typename CallT::Element>& in = call.input;
  if (each == 1) {
    const int r = id + turn * count;
    if (r >= R) return false;
    *place = {r, 0, in.batch, 0, panels, 0, 1, nullptr, 0, 1};
    return true;
  }
  const int r = id / each, k = id % each;
  if (turn > 0 || r >= R) return false;
  const Plan plan = make_plan(each, in.batch, units_apart ? panels : 1, flops, bytes);
  if (k >= plan.rows * plan.units) return false;
  const int part = k / plan.units, unit = k % plan.units;
  *place = {r,
            share_of_rows(in, part, plan.rows),
            share_of_rows(in, part + 1, plan.rows),
            panels * unit / plan.units,
            panels * (unit + 1) / plan.units,
            unit,
            plan.units,
            call.slots + static_cast<index>(r * call.threads + part) * call.threads,
            part,
            plan.rows};
  return true;
}

// f(first, end) for all panels of a share, `together` at a time; from the end in every other step, which
// so begins with the weights that the step before read last, and may still be in cache.
template <class Function>
FASTSEQ_INLINE void to_and_fro(const Place& place, index step, index together, Function f) {
  const index groups = (place.p1 - place.p0 + together - 1) / together;
  for (index g = 0; g < groups; ++g) {
    const index first = place.p0 + (step % 2 ? groups - 1 - g : g) * together;
    f(first, first + together < place.p1 ? first + together : place.p1);
  }
}

template <class T>
FASTSEQ_INLINE void copy(const T* from, index n, T* to) {
  if (from)
    std::memcpy(to, from, n * sizeof(T));
  else
    std::memset(to, 0, n * sizeof(T));
}

// Panels of the columns of the input product: all gates of a unit in one panel.
template <class Cell, class T>
Panels<T> input_panels(index H, index I) {
  return Panels<T>(Cell::G, H, I);
}

// Those of phase k's product: the same units in the same panels.
template <class Cell, class T>
Panels<T> phase_panels(int k, index H, index K) {
  Panels<T> panels(Cell::FIRST[k + 1] - Cell::FIRST[k], H, K);
  panels.blocks = WIDEST / Cell::G;
  return panels;
}

template <class Cell>
constexpr bool units_apart(bool projected, bool masked) {
  return Cell::PHASES == 1 && Cell::FIRST[1] > 0 && !projected && !masked;
}

// Whether the products of a call are in pairs: none of them may split one.
template <class T>
bool in_pairs(const Input<T>& in) {
  return HAS_PAIRS<T> && (in.I | in.H | in.P) % 2 == 0;
}

// Number `at` of a matrix of weights; of bfloat16 two stand in the room of one.
template <class T>
FASTSEQ_INLINE const T* at_number(const T* w, index at, bool halves) {
  return w + (halves ? at / 2 : at);
}

// ------------------------------------------------------------------------------------- forward

template <class T>
struct ForwardRow {
  const T *h_prev, *c_prev, *unit;
  T *h, *c, *c_all, *gates, *extra;
};

// The values of n units from unit u on of one row, for a cell's forward text.
template <class Cell, class T, int PHASE, bool WHOLE>
struct ForwardAt {
  static constexpr int L = LANES<T>;
  using V = Vec<T>;
  const ForwardRow<T>& row;
  const T *x_, *s_;
  index u, H;
  int n;

  FASTSEQ_INLINE V get(const T* p) const { return WHOLE ? load(p + u) : load_part(p + u, n); }
  FASTSEQ_INLINE void put(T* p, V v) const { WHOLE ? store(p + u, v) : store_part(p + u, v, n); }

  FASTSEQ_INLINE V x(int g) const { return load(x_ + g * L); }
  FASTSEQ_INLINE V s(int g) const { return load(s_ + (g - Cell::FIRST[PHASE]) * L); }
  FASTSEQ_INLINE V a(int g) const { return x(g) + s(g); }
  FASTSEQ_INLINE V h_prev() const { return get(row.h_prev); }
  FASTSEQ_INLINE V c_prev() const { return get(row.c_prev); }
  FASTSEQ_INLINE V unit() const { return get(row.unit); }
  FASTSEQ_INLINE V saved(int g) const { return get(row.gates + g * H); }
  FASTSEQ_INLINE void save(int g, V v) const {
    if (row.gates) put(row.gates + g * H, v);
  }
  FASTSEQ_INLINE void save_extra(V v) const {
    if (row.extra) put(row.extra, v);
  }
  FASTSEQ_INLINE void h(V v) const { put(row.h, v); }
  FASTSEQ_INLINE void c(V v) const {
    put(row.c, v);
    if (row.c_all) put(row.c_all, v);
  }
};

template <class Cell, class T>
struct ForwardShare {
  static constexpr int L = LANES<T>;
  const ForwardCall<T>& call;
  const Input<T>& in;
  const Place place;
  const Recurrence<T>& r;
  const index H, P, rows;
  const bool pairs;
  const Panels<T> wx;
  const bool projected, two_phases = Cell::PHASES > 1;
  index chunk_rows;  // rows of the input product that are made at once

  T *w_in, *w_hh[2], *w_hr, *bias_x, *bias_s, *zeros;  // the packed weights
  T *x, *s, *tiles, *gates, *extra, *m, *masked;  // x, s: the products of a chunk
  T *x_pairs, *h_pairs, *m_pairs;
  const T** x_row;
  const T** h_row;  // what the product multiplies
  const T** h_prev;

  index elements(index n) const { return pairs ? n / 2 : n; }  // of k, that so many numbers make
  Panels<T> projection_panels() const { return Panels<T>(1, P, elements(H)); }
  Panels<T> recurrent_panels(int k) const {
    return own(phase_panels<Cell, T>(k, H, elements(k == 0 ? P : H)));
  }
  // Room for the panels of this share alone, but where all were packed before the call.
  Panels<T> own(Panels<T> panels) const {
    if (!r.packed) panels.kept = place.p0;
    return panels;
  }
  index packed_panels() const { return r.packed ? wx.count() : place.p1; }

  ForwardShare(const ForwardCall<T>& call, const Place& place, Arena& arena)
      : call(call),
        in(call.input),
        place(place),
        r(call.recurrence[place.recurrence]),
        H(in.H),
        P(in.P),
        rows(place.last - place.first),
        pairs(call.pack && call.bf16 && in_pairs(in)),
        wx(own(input_panels<Cell, T>(H, elements(in.I)))),
        projected(r.weights.w_hr != nullptr) {
    chunk_rows = rows;
    const index least = call.known ? 96 : 24;
    if (chunk_rows < least) chunk_rows = least / (rows > 0 ? rows : 1) * rows;
    if (chunk_rows > rows * in.steps) chunk_rows = rows * in.steps;
    if (r.packed) {
      Arena kept(const_cast<T*>(r.packed));
      take_packed(kept);
    } else {
      take_packed(arena);
    }
    const index own_width = (wx.vector(place.p1) - wx.vector(place.p0)) * L;
    x = arena.take<T>(chunk_rows * own_width);
    s = arena.take<T>(call.known ? chunk_rows * own_width : 0);
    tiles = arena.take<T>(tile_size<T>());
    gates = arena.take<T>(two_phases ? rows * Cell::G * H : 0);
    extra = arena.take<T>(two_phases ? rows * H : 0);
    m = arena.take<T>(projected || call.known ? rows * H : 0);
    masked = arena.take<T>(r.h_mask ? (call.known ? chunk_rows : rows) * P : 0);
    x_pairs = arena.take<T>(pairs ? chunk_rows * in.I / 2 : 0);
    h_pairs = arena.take<T>(pairs ? (call.known ? chunk_rows : rows) * P / 2 : 0);
    m_pairs = arena.take<T>(pairs && (two_phases || projected) ? rows * H / 2 : 0);
    x_row = arena.take<const T*>(chunk_rows);
    h_row = arena.take<const T*>(call.known ? chunk_rows : rows);
    h_prev = arena.take<const T*>(rows);
  }

  void take_packed(Arena& arena) {
    const index width = wx.total_blocks() * Cell::G * L;
    w_in = arena.take<T>(call.pack ? wx.size(packed_panels()) : 0);
    for (int k = 0; k < Cell::PHASES; ++k)
      w_hh[k] = arena.take<T>(call.pack ? recurrent_panels(k).size(packed_panels()) : 0);
    w_hr = arena.take<T>(projected && call.pack ? projection_panels().size() : 0);
    bias_x = arena.take<T>(width);
    bias_s = arena.take<T>(width);
    zeros = arena.take<T>(H > P ? H : P);
  }

  void pack() {
    const Weights<T>& w = r.weights;
    if (call.pack) {
      const bool halves = call.halves;
      pack_transposed(pairs, halves, wx, w.w_ih, in.I, place.p0, place.p1, w_in);
      for (int k = 0; k < Cell::PHASES; ++k)
        if (Cell::FIRST[k + 1] > Cell::FIRST[k])
          pack_transposed(pairs, halves, recurrent_panels(k),
                          at_number(w.w_hh, Cell::FIRST[k] * H * P, halves), P, place.p0, place.p1,
                          w_hh[k]);
      if (projected) {
        const Panels<T> panels = projection_panels();
        pack_transposed(pairs, halves, panels, w.w_hr, H, 0, panels.count(), w_hr);
      }
    }
    // b_hh of the gates that take x and s apart belongs to s, all other biases to x
    constexpr int TOGETHER = Cell::G - Cell::APART;
    const T *none = nullptr, *b_hh = Cell::FIRST[Cell::PHASES] ? w.b_hh : nullptr;
    if (Cell::APART && b_hh) {
      pack_bias(wx, none, b_hh, TOGETHER, Cell::G, bias_s);
      pack_bias(wx, w.b_ih, b_hh, 0, TOGETHER, bias_x);
      if (w.b_ih) {
        const index vectors = wx.total_blocks() * Cell::G;
        for (index v = 0; v < vectors; ++v) {
          const int g = static_cast<int>(v % Cell::G);
          const index unit = v / Cell::G * L, rest = H - unit;
          const T* from = w.b_ih + g * H + unit;
          if (g >= TOGETHER)
            store(bias_x + v * L, rest >= L ? load(from) : load_part(from, int(rest)));
        }
      }
    } else {
      pack_bias(wx, w.b_ih, b_hh, 0, Cell::G, bias_x);
    }
    std::memset(zeros, 0, (H > P ? H : P) * sizeof(T));
  }

  const T* x_panel(index p, index n) const {
    return x + (wx.vector(p) - wx.vector(place.p0)) * n * L;
  }
  const T* s_panel(const Panels<T>& ws, index p, index n) const {
    return s + (ws.vector(p) - ws.vector(place.p0)) * n * L;
  }

  // Where h is known, the product with it is made as that with the input is: for a chunk of steps.
  void recurrent_product(index step, index end, index n) {
    const Panels<T> ws = recurrent_panels(0);
    index at = 0;
    for (index k = step; k < end; ++k) at += previous(k, h_row + at, masked + at * P);
    pair_rows(pairs, h_row, n, P, h_pairs);
    const bool apart = Cell::APART && r.weights.b_hh;
    for (index p = place.p0; p < place.p1; ++p) {
      const int W = ws.vectors_of(p);
      T* out = const_cast<T*>(s_panel(ws, p, n));
      for (index i = 0; i < n;) {
        const int R = rows_of_tile(n - i, tallest(W));
        run_tile(pairs, R, W, h_row + i, w_hh[0] + ws.offset(p), ws.K,
                 apart ? bias_s + wx.vector(p) * L : nullptr, out + i * W * L);
        i += R;
      }
    }
  }
  bool product_is_known() const { return call.known && Cell::PHASES == 1 && Cell::FIRST[1] > 0; }

  // Where the h_{t-1} of the rows of the s-th step stand, and what of them is multiplied: `masked`
  // takes it where there is a mask. How many rows there are.
  index previous(index s, const T** operand, T* masked) {
    const index t = r.reverse ? in.steps - 1 - s : s;
    const index before = r.reverse ? t + 1 : t - 1;
    const index alive_all = in.alive(t), base = in.base(t);
    const index alive = (alive_all < place.last ? alive_all : place.last) - place.first;
    const index known = s > 0 ? in.alive(before) : 0, base_before = s > 0 ? in.base(before) : 0;
    const T* y = call.known ? call.known : call.y;
    for (index b = 0; b < alive; ++b) {
      const index own = place.first + b;
      const T* h = own < known ? y + ((base_before + own) * call.R + place.recurrence) * P
                   : r.h_0     ? r.h_0 + own * P
                               : zeros;
      if (r.reset && r.reset[base + own]) h = zeros;
      h_prev[b] = h;
      operand[b] = h;
      if (r.h_mask) {
        T* product = masked + b * P;
        for (index i = 0; i < P; ++i) product[i] = h[i] * r.h_mask[own * P + i];
        operand[b] = product;
      }
    }
    return alive > 0 ? alive : 0;
  }

  // The input product of steps [step, end): x (panel, row, W, LANES), rows in the order walked.
  index input_product(index step, index end) {
    index n = 0;
    for (index s = step; s < end; ++s) {
      const index t = r.reverse ? in.steps - 1 - s : s;
      const index last = in.alive(t) < place.last ? in.alive(t) : place.last;
      for (index b = place.first; b < last; ++b) x_row[n++] = in.at(t, b);
    }
    pair_rows(pairs, x_row, n, in.I, x_pairs);
    for (index p = place.p0; p < place.p1; ++p) {
      const int W = wx.vectors_of(p);
      T* out = const_cast<T*>(x_panel(p, n));
      for (index i = 0; i < n;) {
        const int R = rows_of_tile(n - i, tallest(W));
        const T* bias = bias_x + wx.vector(p) * L;
        if (call.pack)
          run_tile(pairs, R, W, x_row + i, w_in + wx.offset(p), wx.K, bias, out + i * W * L);
        else
          dot_panel(wx, p, R, x_row + i, r.weights.w_ih, bias, out + i * W * L);
        i += R;
      }
    }
    return n;
  }

  template <int PHASE, bool WHOLE>
  FASTSEQ_INLINE void text(const ForwardRow<T>& row, const T* x, const T* s, index u, int n) {
    ForwardAt<Cell, T, PHASE, WHOLE> at{row, x, s, u, H, n};
    Cell::template forward<PHASE>(at);
  }

  // The cell's text on `R` rows from row b of the step on, and on the units of panel p.
  template <int PHASE>
  FASTSEQ_INLINE void panel(index t, index b, int R, index p, const T* x_tile, const T* s_tile) {
    constexpr int GATES = Cell::FIRST[PHASE + 1] - Cell::FIRST[PHASE];
    const int blocks = wx.blocks_of(p);
    const index base = in.base(t);
    for (int i = 0; i < R; ++i) {
      const index n = base + place.first + b + i, own = place.first + b + i;
      ForwardRow<T> row;
      row.h_prev = h_prev[b + i];
      T* c = Cell::HAS_C ? r.c_n + own * H : nullptr;
      row.c_prev = r.reset && r.reset[n] ? zeros : c;
      row.c = c;
      row.c_all = Cell::HAS_C && call.c_all
                      ? call.c_all + (n * call.R + place.recurrence) * H : nullptr;
      row.unit = r.weights.unit;
      row.gates = r.gates ? r.gates + n * Cell::G * H : two_phases ? gates + (b + i) * Cell::G * H : nullptr;
      row.extra = r.extra ? r.extra + n * H : two_phases ? extra + (b + i) * H : nullptr;
      row.h = projected ? (r.m ? r.m + n * H : m + (b + i) * H)
              : call.known ? m + (b + i) * H
                           : call.y + (n * call.R + place.recurrence) * P;
      for (int j = 0; j < blocks; ++j) {
        const index u = (p * wx.blocks + j) * L;
        const T* x = x_tile + (i * blocks + j) * Cell::G * L;
        const T* s = s_tile + (i * blocks + j) * GATES * L;
        if (H - u >= L)
          text<PHASE, true>(row, x, s, u, L);
        else
          text<PHASE, false>(row, x, s, u, static_cast<int>(H - u));
      }
    }
  }

  template <int PHASE>
  FASTSEQ_INLINE void panel_rows(index t, index alive, index p, const T* x_tile, const T* s_tile) {
    constexpr int GATES = Cell::FIRST[PHASE + 1] - Cell::FIRST[PHASE];
    const int blocks = wx.blocks_of(p);
    for (index b = 0; b < alive; ++b)
      panel<PHASE>(t, b, 1, p, x_tile + b * blocks * Cell::G * L, s_tile + b * blocks * GATES * L);
  }

  // x_at: the row of the chunk at which this step begins, of n.
  template <int PHASE>
  FASTSEQ_INLINE void phase(index t, index alive, index x_at, index n) {
    constexpr int GATES = Cell::FIRST[PHASE + 1] - Cell::FIRST[PHASE];
    const Panels<T> ws = recurrent_panels(PHASE);
    const index K = ws.K;
    const bool apart = Cell::APART && r.weights.b_hh;
    const T* const* operand = h_row;
    if (PHASE > 0) {  // what the phase before left in extra
      for (index b = 0; b < alive; ++b)
        x_row[b] = r.extra ? r.extra + (in.base(t) + place.first + b) * H : extra + b * H;
      pair_rows(pairs, x_row, alive, H, m_pairs);
      operand = x_row;
    }
    T* tile = tiles;
    to_and_fro(place, t, alive == 1 ? TOGETHER_MOST : 1, [&](index first, index end) {
      for (index p = first; p < end; ++p) {
        const int W = ws.vectors_of(p), WX = wx.vectors_of(p);
        const T* x_tile = x_panel(p, n) + x_at * WX * L;
        const T* bias = apart ? bias_s + wx.vector(p) * L : nullptr;
        const T* w = w_hh[PHASE] + ws.offset(p);
        if (product_is_known()) {
          panel_rows<PHASE>(t, alive, p, x_tile, s_panel(ws, p, n) + x_at * W * L);
          continue;
        }
        if constexpr (GATES > 0) {
          constexpr int FULL = GATES * (WIDEST / Cell::G);
          if (alive == 1 && W == FULL && call.pack) {
            const index whole = wx.total_blocks() / wx.blocks;  // panels with all their blocks
            const index last = end < whole ? end : whole;
            const int done = run_row<T, FULL>(pairs, last - p, operand[0], w, K, bias, tile);
            for (int i = 0; i < done; ++i)
              panel<PHASE>(t, 0, 1, p + i, x_panel(p + i, n) + x_at * WX * L, tile + i * FULL * L);
            p += done - 1;
            continue;
          }
        }
        const int most = GATES ? tallest(W) : TALLEST;
        for (index b = 0; b < alive;) {
          const int R = rows_of_tile(alive - b, most);
          if (GATES && call.pack)
            run_tile(pairs, R, W, operand + b, w, K, bias, tile);
          else if (GATES)
            dot_panel(ws, p, R, operand + b, r.weights.w_hh + Cell::FIRST[PHASE] * H * K, bias, tile);
          panel<PHASE>(t, b, R, p, x_tile + b * WX * L, tile);
          b += R;
        }
      }
    });
  }

  void step(index s, index x_at, index n) {
    const index t = r.reverse ? in.steps - 1 - s : s;
    const index alive = previous(s, h_row, masked);
    if (alive > 0) {
      if (!product_is_known()) pair_rows(pairs, h_row, alive, P, h_pairs);
      phase<0>(t, alive, x_at, n);
      if constexpr (Cell::PHASES > 1) phase<1>(t, alive, x_at, n);
      if (projected && !call.known) project(t, alive);
      if (!call.known) round(t, alive);
    }
    if (place.count > 1) meet(place.slots, place.id, place.count);
  }

  // h as y will be in bfloat16: what the steps to come and backward read is what the caller sees.
  void round([[maybe_unused]] index t, [[maybe_unused]] index alive) {
    if constexpr (HAS_PAIRS<T>) {
      if (!pairs) return;
      const index u0 = projected ? 0 : first_unit(), u1 = projected ? P : last_unit();
      for (index b = 0; b < alive; ++b) {
        const index n = in.base(t) + place.first + b;
        T* h = call.y + (n * call.R + place.recurrence) * P;
        index u = u0;
        for (; u + L <= u1; u += L) store(h + u, rounded(load(h + u)));
        const int rest = static_cast<int>(u1 - u);
        store_part(h + u, rounded(load_part(h + u, rest)), rest);
      }
    }
  }

  void project(index t, index alive) {
    const Panels<T> panels = projection_panels();
    const index base = in.base(t) + place.first;
    for (index b = 0; b < alive; ++b) h_row[b] = r.m ? r.m + (base + b) * H : m + b * H;
    pair_rows(pairs, h_row, alive, H, m_pairs);
    for (index p = 0; p < panels.count(); ++p) {
      const int W = panels.vectors_of(p);
      for (index b = 0; b < alive;) {
        const int R = rows_of_tile(alive - b, tallest(W));
        const T* no_bias = nullptr;
        if (call.pack)
          run_tile(pairs, R, W, h_row + b, w_hr + panels.offset(p), panels.K, no_bias, tiles);
        else
          dot_panel(panels, p, R, h_row + b, r.weights.w_hr, no_bias, tiles);
        T* to[TALLEST];
        for (int i = 0; i < R; ++i)
          to[i] = call.y + ((base + b + i) * call.R + place.recurrence) * P + p * WIDEST * L;
        add_tile(tiles, R, W, P - p * WIDEST * L, to, false);
        b += R;
      }
    }
  }

  // The units that this share owns.
  index first_unit() const { return place.p0 * wx.blocks * L; }
  index last_unit() const {
    const index end = place.p1 * wx.blocks * L;
    return end < H ? end : H;
  }

  void run() {
    if (!r.packed) pack();
    const index u0 = first_unit(), units = last_unit() - u0;
    if (Cell::HAS_C && r.c_0 != r.c_n)
      for (index b = place.first; b < place.last; ++b)
        copy(r.c_0 ? r.c_0 + b * H + u0 : nullptr, units, r.c_n + b * H + u0);
    for (index s = 0; s < in.steps;) {
      index end = s, rows_of_chunk = 0;
      while (end < in.steps) {
        const index t = r.reverse ? in.steps - 1 - end : end;
        const index alive = (in.alive(t) < place.last ? in.alive(t) : place.last) - place.first;
        const index more = alive > 0 ? alive : 0;
        if (end > s && rows_of_chunk + more > chunk_rows) break;
        rows_of_chunk += more;
        ++end;
      }
      const index n = input_product(s, end);
      if (product_is_known()) recurrent_product(s, end, n);
      index at = 0;
      for (; s < end; ++s) {
        const index t = r.reverse ? in.steps - 1 - s : s;
        const index alive = (in.alive(t) < place.last ? in.alive(t) : place.last) - place.first;
        step(s, at, n);
        if (alive > 0) at += alive;
      }
    }
    if (!call.known) finals(u0, units);
  }

  // h_n: the last step of each sequence, in the direction walked.
  void finals(index u0, index units) {
    index length = in.steps;
    const index from = projected ? 0 : u0, size = projected ? P : units;
    for (index b = place.first; b < place.last; ++b) {
      while (length > 0 && in.alive(length - 1) <= b) --length;
      const index t = r.reverse ? 0 : length - 1;
      const T* h = length > 0 ? call.y + ((in.base(t) + b) * call.R + place.recurrence) * P
                   : r.h_0    ? r.h_0 + b * P
                              : nullptr;
      if (h != r.h_n + b * P) copy(h ? h + from : nullptr, size, r.h_n + b * P + from);
    }
  }
};

// ------------------------------------------------------------------------------------ backward

template <class T>
struct BackwardRow {
  const T *dy, *carry, *dc, *dc_all, *gates, *extra, *h, *c, *h_prev, *c_prev, *unit;
  T *dh_out, *dc_out, *dgates, *dunit;
};

template <class Cell, class T, int PHASE, bool WHOLE>
struct BackwardAt {
  static constexpr int L = LANES<T>;
  static constexpr int TOGETHER = Cell::G - Cell::APART;
  using V = Vec<T>;
  const BackwardRow<T>& row;
  const T* tile_;
  index u, H;
  int n;

  FASTSEQ_INLINE V get(const T* p) const { return WHOLE ? load(p + u) : load_part(p + u, n); }
  FASTSEQ_INLINE void put(T* p, V v) const { WHOLE ? store(p + u, v) : store_part(p + u, v, n); }

  // Where the gradient of a gate stands: those apart first, then the others; s of those apart last.
  static constexpr int place(int g) { return g < TOGETHER ? Cell::APART + g : g - TOGETHER; }
  static constexpr int place_s(int g) { return Cell::G + g - TOGETHER; }

  FASTSEQ_INLINE V dvalue() const {
    V v = load(tile_);
    if constexpr (PHASE == Cell::PHASES - 1) {
      if (row.dy) v = v + get(row.dy);
      if (row.carry) v = v + get(row.carry);
    }
    return v;
  }
  FASTSEQ_INLINE V dc() const {
    const V v = get(row.dc);
    return row.dc_all ? v + get(row.dc_all) : v;
  }
  FASTSEQ_INLINE V saved(int g) const { return get(row.gates + g * H); }
  FASTSEQ_INLINE V extra() const { return get(row.extra); }
  FASTSEQ_INLINE V h() const { return get(row.h); }
  FASTSEQ_INLINE V c() const { return get(row.c); }
  FASTSEQ_INLINE V h_prev() const { return get(row.h_prev); }
  FASTSEQ_INLINE V c_prev() const { return get(row.c_prev); }
  FASTSEQ_INLINE V unit() const { return get(row.unit); }
  FASTSEQ_INLINE void da(int g, V v) const { put(row.dgates + place(g) * H, v); }
  FASTSEQ_INLINE void dx(int g, V v) const { put(row.dgates + place(g) * H, v); }
  FASTSEQ_INLINE void ds(int g, V v) const { put(row.dgates + place_s(g) * H, v); }
  FASTSEQ_INLINE V dz(int g) const { return get(row.dgates + place(g) * H); }
  FASTSEQ_INLINE void dz(int g, V v) const { put(row.dgates + place(g) * H, v); }
  FASTSEQ_INLINE void dh_prev(V v) const {
    put(row.dh_out, PHASE == Cell::PHASES - 1 ? v : get(row.dh_out) + v);
  }
  FASTSEQ_INLINE void dc_prev(V v) const { put(row.dc_out, v); }
  FASTSEQ_INLINE void dunit(V v) const { put(row.dunit, get(row.dunit) + v); }
};

// The rows of some steps, whose gate gradients are at hand together: they are walked, multiplied
// while they are in cache, and forgotten.
template <class T>
struct Window {
  index t0, t1;        // steps [t0, t1)
  index base, rows;    // their rows
  T* dgates;           // (rows, (G + APART)*H): of x(g) of the gates apart, of a(g), of s(g)
  T* pairs;            // the same in pairs, half as many, where products are
  const T** h_prev;    // (rows): what W_hh multiplied
  T* dh_all;           // (rows, P), where h is projected
  T* masked;           // (rows, P), where there is an h_mask: h_prev times it
};

template <class Cell, class T>
struct BackwardShare {
  static constexpr int L = LANES<T>;
  static constexpr int Q = Cell::G + Cell::APART;  // columns of dgates, in units of H
  static constexpr int G_HH = Cell::FIRST[Cell::PHASES];
  const BackwardCall<T>& call;
  const Input<T>& in;
  const Place place;
  const Recurrence<T>& r;
  const RecurrenceGradients<T>& d;
  const index H, P, rows;
  const bool projected, pairs;

  T *w_hh[2], *w_hr, *tiles, *zeros, *dh_pairs, *dunit;  // dunit: a chain, and the sum of chains
  index walked = 0;  // rows of the steps before this one
  const T** operand;  // what makes dh
  const T** second;   // what makes the gradient of a value within the step
  const T** h_prev;
  Window<T> now, last;  // the window walked, and the one before it

  // Panels of the units whose dh a share makes: of P where h is projected, else of H.
  static Panels<T> unit_panels(index units) { return Panels<T>(1, units, 0); }
  index elements(index n) const { return pairs ? n / 2 : n; }  // of k, that so many numbers make
  Panels<T> recurrent_panels(int k) const {
    return Panels<T>(1, k == 0 ? P : H, elements((Cell::FIRST[k + 1] - Cell::FIRST[k]) * H));
  }
  Panels<T> projection_panels() const { return Panels<T>(1, H, elements(P)); }

  BackwardShare(const BackwardCall<T>& call, const Place& place, Arena& arena)
      : call(call),
        in(call.input),
        place(place),
        r(call.recurrence[place.recurrence]),
        d(call.gradients[place.recurrence]),
        H(in.H),
        P(in.P),
        rows(place.last - place.first),
        projected(r.weights.w_hr != nullptr),
        pairs(call.bf16 && in_pairs(in)),
        now(),
        last() {
    for (int k = 0; k < Cell::PHASES; ++k) w_hh[k] = arena.take<T>(recurrent_panels(k).size());
    w_hr = arena.take<T>(projected ? projection_panels().size() : 0);
    tiles = arena.take<T>(tile_size<T>());
    zeros = arena.take<T>(Q * H > P ? Q * H : P);
    dh_pairs = arena.take<T>(projected && pairs ? rows * P / 2 : 0);
    operand = arena.take<const T*>(rows);
    second = arena.take<const T*>(rows);
    h_prev = arena.take<const T*>(rows);
    dunit = nullptr;
  }

  void pack(T* units) {
    const Weights<T>& w = r.weights;
    for (int k = 0; k < Cell::PHASES; ++k) {
      const Panels<T> panels = recurrent_panels(k);
      const index K = (Cell::FIRST[k + 1] - Cell::FIRST[k]) * H;
      const bool needed = k > 0 || in.steps > 1 || call.states;
      if (K && needed)
        pack_columns(pairs, call.halves, panels,
                     at_number(w.w_hh, Cell::FIRST[k] * H * P, call.halves), P, K, place.p0,
                     projected || Cell::PHASES > 1 ? panels.count() : place.p1, w_hh[k]);
    }
    if (projected) {
      const Panels<T> panels = projection_panels();
      pack_columns(pairs, call.halves, panels, w.w_hr, H, P, 0, panels.count(), w_hr);
    }
    std::memset(zeros, 0, (Q * H > P ? Q * H : P) * sizeof(T));
    if (Cell::HAS_UNIT) {
      dunit = units + 2 * place.part * H;
      for (index u = 0; u < 2 * H; ++u) dunit[u] = 0;
    }
  }

  // The gate gradients of a row, from the `from`-th gate on, as a product takes them; the row is in
  // the window walked, or in the one before.
  const T* dgates(index t, index n, int from) const {
    const Window<T>& w = t >= now.t0 && t < now.t1 ? now : last;
    return (pairs ? w.pairs : w.dgates) + elements(((n - w.base) * Q + from) * H);
  }

  // What this share has just left of the gate gradients of a step, in pairs.
  void pair_dgates([[maybe_unused]] index first, [[maybe_unused]] index alive) {
    with_operation<T>(pairs, [&](auto operation) {
      using Operation = decltype(operation);
      if constexpr (Operation::EACH > 1) {
        const index u0 = place.p0 * WIDEST * L;
        const index u1 = place.p1 * WIDEST * L < H ? place.p1 * WIDEST * L : H;
        for (index n = first - now.base; n < first - now.base + alive; ++n)
          for (index at = n * Q * H + u0; at < (n + 1) * Q * H; at += H)
            pair_row<Operation>(now.dgates + at, u1 - u0, now.pairs + at / 2);
      }
    });
  }

  // What the rows of a step know of the steps beside it.
  struct Step {
    index t, base, alive, all;       // `all`: of the batch; `alive`: of this share
    index known, base_before;        // the step before, as the recurrence runs
    index done, base_after, after;   // the step after, which was walked just now
  };

  Step step_of(index k) const {  // the k-th that is walked
    Step s;
    s.t = r.reverse ? k : in.steps - 1 - k;
    s.after = r.reverse ? s.t - 1 : s.t + 1;
    const index before = r.reverse ? s.t + 1 : s.t - 1;
    const bool is_first = k == in.steps - 1;
    s.all = in.alive(s.t);
    s.alive = (s.all < place.last ? s.all : place.last) - place.first;
    s.base = in.base(s.t);
    s.known = is_first ? 0 : in.alive(before);
    s.base_before = is_first ? 0 : in.base(before);
    s.done = k == 0 ? 0 : in.alive(s.after);
    s.base_after = k == 0 ? 0 : in.base(s.after);
    return s;
  }

  FASTSEQ_INLINE bool after(const Step& s, index own) const { return own < s.done; }
  FASTSEQ_INLINE bool cut(const Step& s, index own) const {  // no gradient crosses from there
    return after(s, own) && r.reset && r.reset[s.base_after + own];
  }

  template <int PHASE>
  FASTSEQ_INLINE void panel(const Step& s, index b, int R, index p, int blocks, const T* tiles) {
    for (int i = 0; i < R; ++i) {
      const index own = place.first + b + i, n = s.base + own;
      const index column = n * call.R + place.recurrence;
      const bool has_after = after(s, own), is_cut = cut(s, own);
      const bool is_reset = r.reset && r.reset[n], inside = own < s.known;
      const index before = (s.base_before + own) * call.R + place.recurrence;
      BackwardRow<T> row;
      row.dy = call.dy && !projected ? call.dy + column * P : nullptr;
      row.carry = projected || is_cut || (has_after && !Cell::READS_H) ? nullptr : d.dh + own * P;
      row.dh_out = d.dh + own * P;
      row.gates = r.gates ? r.gates + n * Cell::G * H : nullptr;
      row.extra = r.extra ? r.extra + n * H : nullptr;
      row.h = projected ? row.gates : call.y + column * P;
      row.h_prev = projected ? nullptr : h_prev[b + i];
      row.unit = r.weights.unit;
      row.dgates = now.dgates + (n - now.base) * Q * H;
      row.dunit = dunit;
      if (Cell::HAS_C) {
        row.dc = is_cut ? zeros : d.dc + own * H;
        row.dc_out = d.dc + own * H;
        row.dc_all = call.dc_all ? call.dc_all + column * H : nullptr;
        row.c = call.c_all + column * H;
        row.c_prev = is_reset   ? zeros
                     : inside   ? call.c_all + before * H
                     : r.c_0    ? r.c_0 + own * H
                                : zeros;
      }
      for (int j = 0; j < blocks; ++j) {
        const index u = (p * WIDEST + j) * L;
        const T* tile = tiles + (i * blocks + j) * L;
        if (H - u >= L) {
          BackwardAt<Cell, T, PHASE, true> at{row, tile, u, H, L};
          Cell::template backward<PHASE>(at);
        } else {
          BackwardAt<Cell, T, PHASE, false> at{row, tile, u, H, static_cast<int>(H - u)};
          Cell::template backward<PHASE>(at);
        }
      }
    }
    if (Cell::HAS_UNIT && (walked + b) / PIECE < (walked + b + R) / PIECE)
      end_chain(p * WIDEST * L, (p * WIDEST + blocks) * L);
  }

  // A sum of sums: one chain over all rows rounds too often.
  void end_chain(index u0, index u1) {
    for (index u = u0; u < u1 && u < H; ++u) dunit[H + u] += dunit[u], dunit[u] = 0;
  }

  FASTSEQ_INLINE void mask_tile(index b, int R, index p, int W) {
    if (!r.h_mask) return;
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < W; ++v) {
        const index u = (p * WIDEST + v) * L;
        const T* mask = r.h_mask + (place.first + b + i) * P + u;
        T* at = tiles + (i * W + v) * L;
        store(at, load(at) * (P - u >= L ? load(mask) : load_part(mask, int(P - u))));
      }
  }

  // A product into a tile, and the text of a phase on it. nothing: the product is of zeros.
  template <int PHASE>
  FASTSEQ_INLINE void walk(const Step& s, const T* const* row, const Panels<T>& panels, const T* w,
                           bool nothing, bool masks) {
    to_and_fro(place, s.t, s.alive == 1 ? TOGETHER_MOST : 1, [&](index first, index end) {
      for (index p = first; p < end; ++p) {
        const int W = unit_panels(H).blocks_of(p);
        if (s.alive == 1 && panels.K && !nothing && !masks && W == WIDEST) {
          const index whole = unit_panels(H).total_blocks() / WIDEST;
          const index last = end < whole ? end : whole;
          const int done = run_row<T, WIDEST>(pairs, last - p, row[0], w + panels.offset(p), panels.K,
                                              static_cast<const T*>(nullptr), tiles);
          for (int i = 0; i < done; ++i) panel<PHASE>(s, 0, 1, p + i, W, tiles + i * WIDEST * L);
          p += done - 1;
          continue;
        }
        for (index b = 0; b < s.alive;) {
          const int R = rows_of_tile(s.alive - b, tallest(W));
          if (panels.K && !nothing) {
            run_tile(pairs, R, W, row + b, w + panels.offset(p), panels.K,
                     static_cast<const T*>(nullptr), tiles);
            if (masks) mask_tile(b, R, p, W);
          } else {
            std::memset(tiles, 0, sizeof(T) * R * W * L);
          }
          panel<PHASE>(s, b, R, p, W, tiles);
          b += R;
        }
      }
    });
  }

  void step(const Step& s) {
    constexpr int LAST = Cell::PHASES - 1;
    for (index b = 0; b < s.alive; ++b) {
      const index own = place.first + b, n = s.base + own;
      operand[b] = after(s, own) && !cut(s, own)
                       ? dgates(s.after, s.base_after + own, Cell::APART)
                       : zeros;
      const T* h = own < s.known ? call.y + ((s.base_before + own) * call.R + place.recurrence) * P
                   : r.h_0       ? r.h_0 + own * P
                                 : zeros;
      if (r.reset && r.reset[n]) h = zeros;
      h_prev[b] = h;
      if (place.p0 > 0) continue;  // one of those who share the rows tells it to all
      const index at = n - now.base;
      now.h_prev[at] = h;
      if (r.h_mask) {
        T* product = now.masked + at * P;
        for (index i = 0; i < P; ++i) product[i] = h[i] * r.h_mask[own * P + i];
        now.h_prev[at] = product;
      }
    }
    if (projected) {
      project(s);
      walk<LAST>(s, second, projection_panels(), w_hr, false, false);
    } else {
      walk<LAST>(s, operand, recurrent_panels(0), w_hh[0], s.done == 0, r.h_mask != nullptr);
    }
    pair_dgates(s.base + place.first, s.alive);
    if constexpr (Cell::PHASES > 1) {
      for (index b = 0; b < s.alive; ++b)
        operand[b] = dgates(s.t, s.base + place.first + b, Cell::APART + Cell::FIRST[1]);
      walk<0>(s, operand, recurrent_panels(1), w_hh[1], false, false);
      pair_dgates(s.base + place.first, s.alive);
    }
  }

  // dh of the projected h, from which that of the units is made.
  void project(const Step& s) {
    const Panels<T> panels = recurrent_panels(0);
    for (index b = 0; b < s.alive; ++b)
      second[b] = now.dh_all + (s.base + place.first + b - now.base) * P;
    for (index p = 0; p < panels.count(); ++p) {
      const int W = panels.vectors_of(p);
      for (index b = 0; b < s.alive;) {
        const int R = rows_of_tile(s.alive - b, tallest(W));
        if (s.done)
          run_tile(pairs, R, W, operand + b, w_hh[0] + panels.offset(p), panels.K,
                   static_cast<const T*>(nullptr), tiles);
        else
          std::memset(tiles, 0, sizeof(T) * R * W * L);
        mask_tile(b, R, p, W);
        for (int i = 0; i < R; ++i) {
          const index own = place.first + b + i, n = s.base + own;
          T* out = const_cast<T*>(second[b + i]);
          const index u0 = p * WIDEST * L, u1 = u0 + W * L < P ? u0 + W * L : P;
          for (index u = u0; u < u1; ++u) {
            T value = tiles[i * W * L + u - u0];
            if (call.dy) value += call.dy[(n * call.R + place.recurrence) * P + u];
            if (!after(s, own)) value += d.dh[own * P + u];
            out[u] = value;
          }
        }
        b += R;
      }
    }
    pair_rows(pairs, second, s.alive, P, dh_pairs);
  }

  // dh of h_0 of the sequences that began at step t: rows [b0, b1).
  void initial(index t, index b0, index b1) {
    const Panels<T> panels = recurrent_panels(0);
    const index u0 = place.p0 * WIDEST * L;
    const index u1 = place.p1 * WIDEST * L < H ? place.p1 * WIDEST * L : H;
    if (b0 < place.first) b0 = place.first;
    if (b1 > place.last) b1 = place.last;
    for (index b = b0; b < b1; ++b) {
      const index n = in.base(t) + b;
      T *dh = d.dh + b * P, *dc = Cell::HAS_C ? d.dc + b * H : nullptr;
      const bool is_reset = r.reset && r.reset[n];
      const index from = projected ? 0 : u0, size = projected ? P : u1 - u0;
      if (is_reset || !Cell::READS_H) std::memset(dh + from, 0, size * sizeof(T));
      if (is_reset) {
        if (dc) std::memset(dc + u0, 0, (u1 - u0) * sizeof(T));
        continue;
      }
      if (!panels.K) continue;
      const T* row = dgates(t, n, Cell::APART);
      const index p1 = projected ? panels.count() : place.p1;
      for (index p = projected ? 0 : place.p0; p < p1; ++p) {
        const int W = panels.vectors_of(p);
        run_tile(pairs, 1, W, &row, w_hh[0] + panels.offset(p), panels.K,
                 static_cast<const T*>(nullptr), tiles);
        mask_tile(b - place.first, 1, p, W);
        T* to = dh + p * WIDEST * L;
        add_tile(tiles, 1, W, P - p * WIDEST * L, &to, true);
      }
    }
  }

  // Steps [k0, k1) of the walk, whose rows are those of `window`.
  void run(index k0, index k1, const Window<T>& window) {
    last = now;
    now = window;
    for (index k = k0; k < k1; ++k) {
      const Step s = step_of(k);
      if (call.states && s.done > s.all) initial(s.after, s.all, s.done);
      if (s.alive > 0) step(s);
      walked += s.alive;
      if (place.count > 1) meet(place.slots, place.id, place.count);
    }
    if (Cell::HAS_UNIT) end_chain(0, H);
    if (call.states && k1 == in.steps && in.steps > 0) {
      const index t = r.reverse ? in.steps - 1 : 0;
      initial(t, 0, in.alive(t));
    }
  }
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

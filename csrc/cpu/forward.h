// The loop over time, forward, generic over the cell.
//
// A step is, for each phase of the cell, and for each panel of its packed weights, a tile of the
// product h_{t-1} W_hh^T into a buffer of a few KB, and the cell's text on it, a vector of units at
// a time. The input product of a chunk of steps is made on the same panels just before them, so that
// it is read while it is in cache; the gates go to memory only where backward wants them.
//
// Where a call is in bfloat16 and the processor multiplies pairs of it, all is float32 but what goes
// into a product: copies of its rows in pairs, and packed weights. h is rounded as it is left.
//
// With zoneout the text leaves the new states where backward wants them, and a pass over the step's rows,
// `zone`, blends them with those before the step.
//
// A share owns its packed weights, the products of a chunk and c_n, which carries c; it writes its
// rows and units of y, of every output named in call.h, and nothing else.
#pragma once
#include "step.h"

namespace fastseq {
namespace FASTSEQ_ISA {

template <class T>
struct ForwardRow {
  const T *h_prev, *c_prev[MOST_EACH];
  const T* const* unit;
  T *h, *c[MOST_EACH], *c_all[MOST_EACH], *gates, *extra[MOST_EACH];
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
  FASTSEQ_INLINE V c_prev(int k) const { return get(row.c_prev[k]); }
  FASTSEQ_INLINE V unit(int k) const { return get(row.unit[k]); }
  FASTSEQ_INLINE V saved(int g) const { return get(row.gates + g * H); }
  FASTSEQ_INLINE void save(int g, V v) const {
    if (row.gates) put(row.gates + g * H, v);
  }
  FASTSEQ_INLINE void save_extra(int k, V v) const {
    if (row.extra[k]) put(row.extra[k], v);
  }
  FASTSEQ_INLINE void h(V v) const { put(row.h, v); }
  FASTSEQ_INLINE void c(int k, V v) const {
    put(row.c[k], v);
    if (row.c_all[k]) put(row.c_all[k], v);
  }
};

template <class Cell, class T>
struct ForwardShare : Walk<T> {
  static_assert(Cell::PHASES <= 2 && Cell::C <= MOST_EACH && Cell::E <= MOST_EACH && Cell::U <= MOST_EACH);
  static constexpr int L = LANES<T>;
  static constexpr bool two_phases = Cell::PHASES > 1;
  using Way = Walk<T>;
  using Way::H, Way::P, Way::in, Way::place, Way::projected, Way::r, Way::rows, Way::zeros, Way::zones;
  using Way::alive_at, Way::column, Way::h_before, Way::multiplied, Way::stay, Way::step_at, Way::time;
  const ForwardCall<T>& call;
  const bool pairs;
  const Panels<T> wx;
  index chunk_rows;  // rows of the input product that are made at once

  T *w_in, *w_hh[2], *w_hr, *bias_x, *bias_s;  // the packed weights
  T *x, *s, *tiles, *gates, *extra, *m, *masked;  // x, s: the products of a chunk
  T* made[MOST_EACH];  // c before zoneout, of the rows of a step
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
      : Way(call, place),
        call(call),
        pairs(call.pack && call.bf16 && in_pairs(in)),
        wx(own(input_panels<Cell, T>(H, elements(in.I)))) {
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
    extra = arena.take<T>(two_phases ? Cell::E * rows * H : 0);
    m = arena.take<T>(projected || call.known ? rows * H : 0);
    for (int k = 0; k < Cell::C; ++k) made[k] = arena.take<T>(r.zones(1 + k) ? rows * H : 0);
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
    for (index k = step; k < end; ++k) {
      const Step s = step_at(k);
      previous(s, h_row + at, masked + at * P);
      at += s.alive;
    }
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

  // Where the h_{t-1} of a step's rows stand, and what of them is multiplied, which `masked` takes
  // where there is a mask.
  void previous(const Step& s, const T** operand, T* masked) {
    const T* y = call.known ? call.known : call.y;
    for (index b = 0; b < s.alive; ++b) {
      const index own = place.first + b;
      h_prev[b] = h_before(s, own, y);
      operand[b] = multiplied(h_prev[b], own, masked + b * P);
    }
  }

  // The input product of steps [step, end): x (panel, row, W, LANES), rows in the order walked.
  index input_product(index step, index end) {
    index n = 0;
    for (index s = step; s < end; ++s) {
      const index t = time(s), alive = alive_at(s);
      for (index b = 0; b < alive; ++b) x_row[n++] = in.at(t, place.first + b);
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

  // The k-th extra of row n, the b-th of its step: kept, or at hand for the second phase.
  FASTSEQ_INLINE T* extra_row(int k, index n, index b) const {
    if (r.extra[k]) return r.extra[k] + n * H;
    return two_phases ? extra + (k * rows + b) * H : nullptr;
  }

  // The cell's text on `R` rows from row b of the step on, and on the units of panel p.
  template <int PHASE>
  FASTSEQ_INLINE void panel(const Step& s, index b, int R, index p, const T* x_tile,
                            const T* s_tile) {
    constexpr int GATES = Cell::FIRST[PHASE + 1] - Cell::FIRST[PHASE];
    const int blocks = wx.blocks_of(p);
    for (int i = 0; i < R; ++i) {
      const index own = place.first + b + i, n = s.now.base + own;
      ForwardRow<T> row;
      row.h_prev = h_prev[b + i];
      for (int k = 0; k < Cell::C; ++k) {
        row.c[k] = r.c_n[k] + own * H;
        row.c_prev[k] = Way::resets(n) ? zeros : row.c[k];
        row.c_all[k] = call.c_all[k] ? call.c_all[k] + column(n) * H : nullptr;
        if (zones && r.zones(1 + k)) {
          row.c[k] = made_c(k, n, b + i);
          row.c_all[k] = nullptr;
        }
      }
      row.unit = r.weights.unit;
      row.gates = r.gates      ? r.gates + n * Cell::G * H
                  : two_phases ? gates + (b + i) * Cell::G * H
                               : nullptr;
      for (int k = 0; k < Cell::E; ++k) row.extra[k] = extra_row(k, n, b + i);
      row.h = made_h(n, b + i);
      for (int j = 0; j < blocks; ++j) {
        const index u = (p * wx.blocks + j) * L;
        const T* x_part = x_tile + (i * blocks + j) * Cell::G * L;
        const T* s_part = s_tile + (i * blocks + j) * GATES * L;
        if (H - u >= L)
          text<PHASE, true>(row, x_part, s_part, u, L);
        else
          text<PHASE, false>(row, x_part, s_part, u, static_cast<int>(H - u));
      }
    }
  }

  // Where the text puts h, and the k-th state beside it where that is zoned, of row n, the b-th of its
  // step.
  FASTSEQ_INLINE T* made_h(index n, index b) const {
    if (r.m) return r.m + n * H;
    return projected || call.known ? m + b * H : call.y + column(n) * P;
  }
  FASTSEQ_INLINE T* made_c(int k, index n, index b) const {
    return r.made[k] ? r.made[k] + n * H : made[k] + b * H;
  }

  // The states of a step as they are handed on, of this share's units. h waits for its projection.
  void zone(const Step& s) {
    const index u0 = first_unit(), u1 = last_unit();
    for (index b = 0; b < s.alive; ++b) {
      const index own = place.first + b, n = s.now.base + own;
      if (r.zones(0) && !projected && !call.known)
        blend(stay(0, n), made_h(n, b), h_prev[b], call.y + column(n) * P, u0, u1);
      for (int k = 0; k < Cell::C; ++k) {
        if (!r.zones(1 + k)) continue;
        T* carried = r.c_n[k] + own * H;
        const T* before = Way::resets(n) ? zeros : carried;
        blend(stay(1 + k, n), made_c(k, n, b), before, carried, u0, u1);
        if (call.c_all[k]) copy(carried + u0, u1 - u0, call.c_all[k] + column(n) * H + u0);
      }
    }
  }

  static void blend(Stay<T> stay, const T* made, const T* before, T* now, index u0, index u1) {
    each_vector<T>(u0, u1, [&](index u, int n) {
      store_units(now + u, stay.blend(load_units(made + u, n), load_units(before + u, n), u, n), n);
    });
  }

  template <int PHASE>
  FASTSEQ_INLINE void panel_rows(const Step& s, index p, const T* x_tile, const T* s_tile) {
    constexpr int GATES = Cell::FIRST[PHASE + 1] - Cell::FIRST[PHASE];
    const int blocks = wx.blocks_of(p);
    for (index b = 0; b < s.alive; ++b)
      panel<PHASE>(s, b, 1, p, x_tile + b * blocks * Cell::G * L, s_tile + b * blocks * GATES * L);
  }

  // x_at: the row of the chunk at which this step begins, of n.
  template <int PHASE>
  FASTSEQ_INLINE void phase(const Step& s, index x_at, index n) {
    const index alive = s.alive;
    constexpr int GATES = Cell::FIRST[PHASE + 1] - Cell::FIRST[PHASE];
    const Panels<T> ws = recurrent_panels(PHASE);
    const index K = ws.K;
    const bool apart = Cell::APART && r.weights.b_hh;
    const T* const* operand = h_row;
    if (PHASE > 0) {  // what the phase before left in the first extra
      for (index b = 0; b < alive; ++b) x_row[b] = extra_row(0, s.now.base + place.first + b, b);
      pair_rows(pairs, x_row, alive, H, m_pairs);
      operand = x_row;
    }
    T* tile = tiles;
    to_and_fro(place, s.t, alive == 1 ? TOGETHER_MOST : 1, [&](index first, index end) {
      for (index p = first; p < end; ++p) {
        const int W = ws.vectors_of(p), WX = wx.vectors_of(p);
        const T* x_tile = x_panel(p, n) + x_at * WX * L;
        const T* bias = apart ? bias_s + wx.vector(p) * L : nullptr;
        const T* w = w_hh[PHASE] + ws.offset(p);
        if (product_is_known()) {
          panel_rows<PHASE>(s, p, x_tile, s_panel(ws, p, n) + x_at * W * L);
          continue;
        }
        if constexpr (GATES > 0) {
          constexpr int FULL = GATES * (WIDEST / Cell::G);
          if (alive == 1 && W == FULL && call.pack) {
            const index whole = wx.total_blocks() / wx.blocks;  // panels with all their blocks
            const index last = end < whole ? end : whole;
            const int done = run_row<T, FULL>(pairs, last - p, operand[0], w, K, bias, tile);
            for (int i = 0; i < done; ++i)
              panel<PHASE>(s, 0, 1, p + i, x_panel(p + i, n) + x_at * WX * L, tile + i * FULL * L);
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
          panel<PHASE>(s, b, R, p, x_tile + b * WX * L, tile);
          b += R;
        }
      }
    });
  }

  void step(const Step& s, index x_at, index n) {
    previous(s, h_row, masked);
    if (s.alive > 0) {
      if (!product_is_known()) pair_rows(pairs, h_row, s.alive, P, h_pairs);
      phase<0>(s, x_at, n);
      if constexpr (Cell::PHASES > 1) phase<1>(s, x_at, n);
      if (zones) zone(s);
      if (projected && !call.known) project(s);
      if (!call.known) round(s);
    }
    if (place.count > 1) meet(place.slots, place.id, place.count);
  }

  // h as y will be in bfloat16: what the steps to come and backward read is what the caller sees.
  void round([[maybe_unused]] const Step& s) {
    if constexpr (HAS_PAIRS<T>) {
      if (!pairs) return;
      const index u0 = projected ? 0 : first_unit(), u1 = projected ? P : last_unit();
      for (index b = 0; b < s.alive; ++b) {
        T* h = call.y + column(s.now.base + place.first + b) * P;
        index u = u0;
        for (; u + L <= u1; u += L) store(h + u, rounded(load(h + u)));
        const int rest = static_cast<int>(u1 - u);
        store_part(h + u, rounded(load_part(h + u, rest)), rest);
      }
    }
  }

  void project(const Step& s) {
    const Panels<T> panels = projection_panels();
    const index base = s.now.base + place.first, alive = s.alive;
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
          to[i] = call.y + column(base + b + i) * P + p * WIDEST * L;
        add_tile(tiles, R, W, P - p * WIDEST * L, to, false);
        b += R;
      }
    }
    for (index b = 0; r.zones(0) && b < alive; ++b) {
      T* h = call.y + column(base + b) * P;
      blend(stay(0, base + b), h, h_prev[b], h, 0, P);
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
    for (int k = 0; k < Cell::C; ++k)
      if (r.c_0[k] != r.c_n[k])
        for (index b = place.first; b < place.last; ++b)
          copy(r.c_0[k] ? r.c_0[k] + b * H + u0 : nullptr, units, r.c_n[k] + b * H + u0);
    for (index s = 0; s < in.steps;) {
      index end = s, rows_of_chunk = 0;
      while (end < in.steps) {
        const index more = alive_at(end);
        if (end > s && rows_of_chunk + more > chunk_rows) break;
        rows_of_chunk += more;
        ++end;
      }
      const index n = input_product(s, end);
      if (product_is_known()) recurrent_product(s, end, n);
      index at = 0;
      for (; s < end; ++s) {
        const Step now = step_at(s);
        step(now, at, n);
        at += now.alive;
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
      const T* h = length > 0 ? call.y + column(in.base(t) + b) * P
                   : r.h_0    ? r.h_0 + b * P
                              : nullptr;
      if (h != r.h_n + b * P) copy(h ? h + from : nullptr, size, r.h_n + b * P + from);
    }
  }
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

// The loop over time, backward, generic over the cell: the gate gradients of a window of steps, and
// the gradients of the states. gradients.h multiplies the windows.
//
// Of a call with zoneout the gradient of a state is split before the text: what goes to the state before
// the step is held until the text has left its own, and added to it.
//
// A share owns its packed weights and its rows and units of dh and dc, which carry the gradients of
// the states from step to step. Windows belong to all shares of a recurrence: each writes its rows and
// units of them, and those that share rows meet at every step, since the product of the step before
// reads all units.
#pragma once
#include "step.h"

namespace fastseq {
namespace FASTSEQ_ISA {

// The gradient of a unit parameter is a sum over rows, in chains: CHAIN numbers of a level are one of
// the next.
constexpr int CHAIN = 32, LEVELS = 3;

template <class T>
struct BackwardRow {
  const T *dy, *carry, *gates, *h, *h_prev;
  const T *dc[MOST_EACH], *dc_all[MOST_EACH], *c[MOST_EACH], *c_prev[MOST_EACH], *extra[MOST_EACH];
  const T* const* unit;
  T *dh_out, *dc_out[MOST_EACH], *dgates, *dunit[MOST_EACH];
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
  FASTSEQ_INLINE V dc(int k) const {
    const V v = get(row.dc[k]);
    return row.dc_all[k] ? v + get(row.dc_all[k]) : v;
  }
  FASTSEQ_INLINE V saved(int g) const { return get(row.gates + g * H); }
  FASTSEQ_INLINE V extra(int k) const { return get(row.extra[k]); }
  FASTSEQ_INLINE V h() const { return get(row.h); }
  FASTSEQ_INLINE V c(int k) const { return get(row.c[k]); }
  FASTSEQ_INLINE V h_prev() const { return get(row.h_prev); }
  FASTSEQ_INLINE V c_prev(int k) const { return get(row.c_prev[k]); }
  FASTSEQ_INLINE V unit(int k) const { return get(row.unit[k]); }
  FASTSEQ_INLINE void da(int g, V v) const { put(row.dgates + place(g) * H, v); }
  FASTSEQ_INLINE void dx(int g, V v) const { put(row.dgates + place(g) * H, v); }
  FASTSEQ_INLINE void ds(int g, V v) const { put(row.dgates + place_s(g) * H, v); }
  FASTSEQ_INLINE V dz(int g) const { return get(row.dgates + place(g) * H); }
  FASTSEQ_INLINE void dz(int g, V v) const { put(row.dgates + place(g) * H, v); }
  FASTSEQ_INLINE void dh_prev(V v) const { put(row.dh_out, v); }
  FASTSEQ_INLINE void add_dh_prev(V v) const { put(row.dh_out, get(row.dh_out) + v); }
  FASTSEQ_INLINE void dc_prev(int k, V v) const { put(row.dc_out[k], v); }
  FASTSEQ_INLINE void add_dc_prev(int k, V v) const { put(row.dc_out[k], get(row.dc_out[k]) + v); }
  FASTSEQ_INLINE void dunit(int k, V v) const { put(row.dunit[k], get(row.dunit[k]) + v); }
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
struct BackwardShare : Walk<T> {
  static constexpr int L = LANES<T>;
  static constexpr int Q = Cell::G + Cell::APART;  // columns of dgates, in units of H
  static constexpr int G_HH = Cell::FIRST[Cell::PHASES];
  using Way = Walk<T>;
  using Way::H, Way::P, Way::in, Way::place, Way::projected, Way::r, Way::rows, Way::zeros, Way::zones;
  using Way::column, Way::h_before, Way::multiplied, Way::resets, Way::stay, Way::step_at;
  const BackwardCall<T>& call;
  const RecurrenceGradients<T>& d;
  const bool pairs;
  // Whether d.dh goes from step to step. Else the product makes all of it.
  const bool carries_h;
  T *held_h, *held_c[MOST_EACH];  // what a zoned state's gradient leaves to the state before the step

  // dunit: of each unit parameter the sum at hand of each level
  T *w_hh[2], *w_hr, *tiles, *dh_pairs, *dunit;
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
      : Way(call, place),
        call(call),
        d(call.gradients[place.recurrence]),
        pairs(call.bf16 && in_pairs(in)),
        carries_h(Cell::READS_H || r.zones(0)),
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
    held_h = arena.take<T>(Cell::READS_H && r.zones(0) ? rows * P : 0);
    for (int k = 0; k < Cell::C; ++k) held_c[k] = arena.take<T>(r.zones(1 + k) ? rows * H : 0);
    dunit = nullptr;
  }

  // The units that this share owns.
  index first_unit() const { return place.p0 * WIDEST * L; }
  index last_unit() const {
    const index end = place.p1 * WIDEST * L;
    return end < H ? end : H;
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
    if (Cell::U) {
      dunit = units + LEVELS * Cell::U * place.part * H;
      for (T* of = dunit; of < dunit + LEVELS * Cell::U * H; of += H)
        for (index u = first_unit(); u < last_unit(); ++u) of[u] = 0;
    }
  }

  // The gate gradients of a row, from the `from`-th gate on, as a product takes them; the row is in
  // the window walked, or in the one before.
  const T* dgates(index t, index n, int from) const {
    const Window<T>& w = t >= now.t0 && t < now.t1 ? now : last;
    return (pairs ? w.pairs : w.dgates) + elements(((n - w.base) * Q + from) * H);
  }

  // What this share has just left of the gate gradients of a step, in pairs.
  void pair_dgates(const Step& s) {
    const index width = H, u0 = first_unit(), u1 = last_unit();
    const index first = s.now.base + place.first - now.base, end = first + s.alive;
    with_operation<T>(pairs, [&](auto operation) {
      using Operation = decltype(operation);
      if constexpr (Operation::EACH > 1)
        for (index n = first; n < end; ++n)
          for (index at = n * Q * width + u0; at < (n + 1) * Q * width; at += width)
            pair_row<Operation>(now.dgates + at, u1 - u0, now.pairs + at / 2);
    });
  }

  // Whether the step after, which was walked just now, has the sequence; and whether it was reset
  // there, so that no gradient crosses.
  FASTSEQ_INLINE bool after(const Step& s, index own) const { return own < s.after.alive; }
  FASTSEQ_INLINE bool cut(const Step& s, index own) const {
    return after(s, own) && resets(s.after.base + own);
  }
  index time_after(const Step& s) const { return r.reverse ? s.t - 1 : s.t + 1; }

  template <int PHASE>
  FASTSEQ_INLINE void panel(const Step& s, index b, int R, index p, int blocks, T* tiles) {
    const index u0 = p * WIDEST * L, u1 = u0 + blocks * L < H ? u0 + blocks * L : H;
    for (int i = 0; i < R; ++i) {
      const index own = place.first + b + i, n = s.now.base + own, across = column(n);
      const bool has_after = after(s, own), is_cut = cut(s, own);
      BackwardRow<T> row;
      row.dy = call.dy && !projected ? call.dy + across * P : nullptr;
      row.carry = projected || is_cut || (has_after && !carries_h) ? nullptr : d.dh + own * P;
      row.dh_out = d.dh + own * P;
      row.gates = r.gates ? r.gates + n * Cell::G * H : nullptr;
      for (int k = 0; k < Cell::E; ++k) row.extra[k] = r.extra[k] ? r.extra[k] + n * H : nullptr;
      row.h = r.m ? r.m + n * H : call.y + across * P;
      row.h_prev = projected ? nullptr : h_prev[b + i];
      row.unit = r.weights.unit;
      row.dgates = now.dgates + (n - now.base) * Q * H;
      for (int k = 0; k < Cell::U; ++k) row.dunit[k] = dunit + LEVELS * k * H;
      for (int k = 0; k < Cell::C; ++k) {
        row.dc_out[k] = d.dc[k] + own * H;
        row.dc[k] = is_cut ? zeros : row.dc_out[k];
        row.dc_all[k] = call.dc_all[k] ? call.dc_all[k] + across * H : nullptr;
        row.c[k] = r.made[k] ? r.made[k] + n * H : call.c_all[k] + across * H;
        row.c_prev[k] = resets(n)              ? zeros
                        : own < s.before.alive ? call.c_all[k] + column(s.before.base + own) * H
                        : r.c_0[k]             ? r.c_0[k] + own * H
                                               : zeros;
      }
      if (PHASE + 1 == Cell::PHASES && zones) split(row, b + i, n, tiles + i * blocks * L, u0, u1);
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
      if (PHASE == 0 && zones) join(row, b + i, u0, u1);
    }
    index rows = CHAIN;
    for (int level = 0; Cell::U && level < LEVELS - 1; ++level, rows *= CHAIN)
      if ((walked + b) / rows < (walked + b + R) / rows)
        end_chain(level, p * WIDEST * L, (p * WIDEST + blocks) * L);
  }

  // Of the units [u0, u1) of the b-th row of a step: the gradients of its zoned states, all that there is
  // of them, in two. The text finds its part of dh in the tile, that of dc where it leaves dc_prev.
  __attribute__((noinline)) void split(BackwardRow<T>& row, index b, index n, T* tile, index u0,
                                       index u1) {
    if (r.zones(0) && !projected) {
      const Stay<T> stays = stay(0, n);
      T* held = Cell::READS_H ? held_h + b * P : row.dh_out;
      each_vector<T>(u0, u1, [&](index u, int n) {
        Vec<T> dh = load(tile + u - u0);
        if (row.dy) dh = dh + load_units(row.dy + u, n);
        if (row.carry) dh = dh + load_units(row.carry + u, n);
        Vec<T> before, left;
        stays.split(dh, u, n, &before, &left);
        store_units(held + u, before, n), store(tile + u - u0, left);
      });
      row.dy = row.carry = nullptr;
    }
    for (int k = 0; k < Cell::C; ++k) {
      if (!r.zones(1 + k)) continue;
      const Stay<T> stays = stay(1 + k, n);
      each_vector<T>(u0, u1, [&](index u, int n) {
        Vec<T> dc = load_units(row.dc[k] + u, n);
        if (row.dc_all[k]) dc = dc + load_units(row.dc_all[k] + u, n);
        Vec<T> before, left;
        stays.split(dc, u, n, &before, &left);
        store_units(held_c[k] + b * H + u, before, n), store_units(row.dc_out[k] + u, left, n);
      });
      row.dc[k] = row.dc_out[k], row.dc_all[k] = nullptr;
    }
  }

  // What was held is added to what the text left.
  __attribute__((noinline)) void join(const BackwardRow<T>& row, index b, index u0, index u1) {
    if (Cell::READS_H && r.zones(0)) add(held_h + b * P, row.dh_out, u0, u1);
    for (int k = 0; k < Cell::C; ++k)
      if (r.zones(1 + k)) add(held_c[k] + b * H, row.dc_out[k], u0, u1);
  }
  static void add(const T* from, T* to, index u0, index u1) {
    each_vector<T>(u0, u1, [&](index u, int n) {
      store_units(to + u, load_units(to + u, n) + load_units(from + u, n), n);
    });
  }

  // A sum of sums of sums: one chain over all rows rounds too often.
  void end_chain(int level, index u0, index u1) {
    T* of = dunit + level * H;
    for (int k = 0; k < Cell::U; ++k, of += LEVELS * H)
      for (index u = u0; u < u1 && u < H; ++u) of[H + u] += of[u], of[u] = 0;
  }

  FASTSEQ_INLINE void mask_tile(index b, int R, index p, int W, T* tile) {
    if (!r.h_mask) return;
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < W; ++v) {
        const index u = (p * WIDEST + v) * L;
        const T* mask = r.h_mask + (place.first + b + i) * P + u;
        T* at = tile + (i * W + v) * L;
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
        if (s.alive == 1 && panels.K && !nothing && W == WIDEST) {
          const index whole = unit_panels(H).total_blocks() / WIDEST;
          const index last = end < whole ? end : whole;
          const int done = run_row<T, WIDEST>(pairs, last - p, row[0], w + panels.offset(p), panels.K,
                                              static_cast<const T*>(nullptr), tiles);
          for (int i = 0; i < done; ++i) {
            T* tile = tiles + i * WIDEST * L;
            if (masks) mask_tile(0, 1, p + i, W, tile);
            panel<PHASE>(s, 0, 1, p + i, W, tile);
          }
          p += done - 1;
          continue;
        }
        for (index b = 0; b < s.alive;) {
          const int R = rows_of_tile(s.alive - b, tallest(W));
          if (panels.K && !nothing) {
            run_tile(pairs, R, W, row + b, w + panels.offset(p), panels.K,
                     static_cast<const T*>(nullptr), tiles);
            if (masks) mask_tile(b, R, p, W, tiles);
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
      const index own = place.first + b, at = s.now.base + own - now.base;
      operand[b] = after(s, own) && !cut(s, own)
                       ? dgates(time_after(s), s.after.base + own, Cell::APART)
                       : zeros;
      h_prev[b] = h_before(s, own, call.y);
      if (place.p0 > 0) continue;  // one of those who share the rows tells it to all
      now.h_prev[at] = multiplied(h_prev[b], own, now.masked + at * P);
    }
    if (projected) {
      project(s);
      walk<LAST>(s, second, projection_panels(), w_hr, false, false);
    } else {
      walk<LAST>(s, operand, recurrent_panels(0), w_hh[0], s.after.alive == 0, r.h_mask != nullptr);
    }
    pair_dgates(s);
    if constexpr (Cell::PHASES > 1) {
      for (index b = 0; b < s.alive; ++b)
        operand[b] = dgates(s.t, s.now.base + place.first + b, Cell::APART + Cell::FIRST[1]);
      walk<0>(s, operand, recurrent_panels(1), w_hh[1], false, false);
      pair_dgates(s);
    }
  }

  // dh of the projected h, from which that of the units is made.
  void project(const Step& s) {
    const Panels<T> panels = recurrent_panels(0);
    for (index b = 0; b < s.alive; ++b)
      second[b] = now.dh_all + (s.now.base + place.first + b - now.base) * P;
    for (index p = 0; p < panels.count(); ++p) {
      const int W = panels.vectors_of(p);
      for (index b = 0; b < s.alive;) {
        const int R = rows_of_tile(s.alive - b, tallest(W));
        if (s.after.alive)
          run_tile(pairs, R, W, operand + b, w_hh[0] + panels.offset(p), panels.K,
                   static_cast<const T*>(nullptr), tiles);
        else
          std::memset(tiles, 0, sizeof(T) * R * W * L);
        mask_tile(b, R, p, W, tiles);
        for (int i = 0; i < R; ++i) {
          const index own = place.first + b + i, n = s.now.base + own;
          T* out = const_cast<T*>(second[b + i]);
          const index u0 = p * WIDEST * L, u1 = u0 + W * L < P ? u0 + W * L : P;
          for (index u = u0; u < u1; ++u) {
            T value = tiles[i * W * L + u - u0];
            if (call.dy) value += call.dy[column(n) * P + u];
            T& dh = d.dh[own * P + u];
            if (carries_h ? !cut(s, own) : !after(s, own)) value += dh;
            if (r.zones(0)) {
              const bool stays = r.stay[0] && r.stay[0][n * P + u];
              dh = stays ? value : value * r.part[0];
              value = stays ? T(0) : value - dh;
            }
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
    if (b0 < place.first) b0 = place.first;
    if (b1 > place.last) b1 = place.last;
    const index u0 = first_unit(), u1 = last_unit();
    const index from = projected ? 0 : u0, size = projected ? P : u1 - u0;
    for (index b = b0; b < b1;) {
      const bool is_reset = resets(in.base(t) + b);
      index end = b + 1;
      while (end < b1 && resets(in.base(t) + end) == is_reset) ++end;
      for (index own = b; own < end; ++own) {
        if (is_reset || !carries_h) std::memset(d.dh + own * P + from, 0, size * sizeof(T));
        for (int k = 0; is_reset && k < Cell::C; ++k)
          std::memset(d.dc[k] + own * H + u0, 0, (u1 - u0) * sizeof(T));
      }
      if (!is_reset && recurrent_panels(0).K) initial_product(t, b, end);
      b = end;
    }
  }

  // Adds what the product leaves of rows [b0, b1). A step of a cell is all of this: its rows go
  // through a panel of the weights together (LSTM H512, B = 32: 32 times less is read).
  void initial_product(index t, index b0, index b1) {
    const Panels<T> panels = recurrent_panels(0);
    for (index b = b0; b < b1; ++b) operand[b - b0] = dgates(t, in.base(t) + b, Cell::APART);
    const index p1 = projected ? panels.count() : place.p1;
    for (index p = projected ? 0 : place.p0; p < p1; ++p) {
      const int W = panels.vectors_of(p);
      for (index b = b0; b < b1;) {
        const int R = rows_of_tile(b1 - b, tallest(W));
        run_tile(pairs, R, W, operand + (b - b0), w_hh[0] + panels.offset(p), panels.K,
                 static_cast<const T*>(nullptr), tiles);
        mask_tile(b - place.first, R, p, W, tiles);
        T* to[TALLEST];
        for (int i = 0; i < R; ++i) to[i] = d.dh + (b + i) * P + p * WIDEST * L;
        add_tile(tiles, R, W, P - p * WIDEST * L, to, true);
        b += R;
      }
    }
  }

  // Steps [k0, k1) of the walk, whose rows are those of `window`.
  void run(index k0, index k1, const Window<T>& window) {
    last = now;
    now = window;
    for (index k = k0; k < k1; ++k) {
      const Step s = step_at(in.steps - 1 - k);
      if (call.states && s.after.alive > s.now.alive)
        initial(time_after(s), s.now.alive, s.after.alive);
      if (s.alive > 0) step(s);
      walked += s.alive;
      if (place.count > 1) meet(place.slots, place.id, place.count);
    }
    for (int level = 0; Cell::U && level < LEVELS - 1; ++level)
      end_chain(level, first_unit(), last_unit());
    if (call.states && k1 == in.steps && in.steps > 0) {
      const index t = r.reverse ? in.steps - 1 : 0;
      initial(t, 0, in.alive(t));
    }
  }
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

// What both loops over time know of their work.
//
// A *share* is what one thread owns of a recurrence: a range of the batch's rows and one of the hidden
// units, from the first step to the last (`Place`). Threads that share rows but not units meet at
// every step; all others have nobody to wait for.
//
// A *step* is one time of a share (`Step`): which of its rows are alive, and where they and those of
// the steps beside it stand in memory, dense or packed. `Walk` tells it of any step, in the order in
// which the recurrence runs, and with it where a row's h_{t-1} is to be read.
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

// The rows of a step: those of the first `alive` sequences of the batch, side by side from `base` on.
struct Standing {
  index alive, base;
};

struct Step {
  index t;                      // its time
  Standing now, before, after;  // as the recurrence runs; none before the first, after the last
  index alive;                  // rows of this share
};

// Where a state of one row stays as it was before the step: a byte a unit, or the part that stays.
template <class T>
struct Stay {
  const uint8_t* flags;  // null: `part`
  T part;

  // Of a gradient, n units from unit u on: what goes to the state before the step, and what is left.
  FASTSEQ_INLINE void split(Vec<T> of, index u, int n, Vec<T>* before, Vec<T>* left) const {
    if (flags) {
      const auto stays = load_flags<T>(flags + u, n);
      *before = stays ? of : Vec<T>{}, *left = stays ? Vec<T>{} : of;
    } else {
      *before = of * splat(part), *left = of - *before;
    }
  }
  // The state after the step.
  FASTSEQ_INLINE Vec<T> blend(Vec<T> made, Vec<T> before, index u, int n) const {
    return flags ? (load_flags<T>(flags + u, n) ? before : made) : made + splat(part) * (before - made);
  }
};

// f(u, n) for the units [u0, u1), a vector at a time.
template <class T, class Function>
FASTSEQ_INLINE void each_vector(index u0, index u1, Function f) {
  index u = u0;
  for (; u + LANES<T> <= u1; u += LANES<T>) f(u, LANES<T>);
  if (u < u1) f(u, static_cast<int>(u1 - u));
}

template <class T>
FASTSEQ_INLINE Vec<T> load_units(const T* p, int n) {
  return n == LANES<T> ? load(p) : load_part(p, n);
}
template <class T>
FASTSEQ_INLINE void store_units(T* p, Vec<T> v, int n) {
  n == LANES<T> ? store(p, v) : store_part(p, v, n);
}

// A share's way through time.
template <class T>
struct Walk {
  const Input<T>& in;
  const Place place;
  const Recurrence<T>& r;
  const int R;
  const index H, P, rows;  // rows: of the share
  const bool projected;
  const bool zones;  // whether any state does
  T* zeros;  // as many as a row of any kind needs; the loops set it

  template <class CallT>
  Walk(const CallT& call, const Place& place)
      : in(call.input),
        place(place),
        r(call.recurrence[place.recurrence]),
        R(call.R),
        H(in.H),
        P(in.P),
        rows(place.last - place.first),
        projected(r.weights.w_hr != nullptr),
        zones(any_zones(r)) {}

  static bool any_zones(const Recurrence<T>& r) {
    for (int k = 0; k < 1 + MOST_EACH; ++k)
      if (r.zones(k)) return true;
    return false;
  }

  FASTSEQ_INLINE index time(index s) const { return r.reverse ? in.steps - 1 - s : s; }

  FASTSEQ_INLINE Standing rows_at(index s) const {
    if (s < 0 || s >= in.steps) return {0, 0};
    return {in.alive(time(s)), in.base(time(s))};
  }

  // Of the s-th step, how many of the share's rows are alive.
  FASTSEQ_INLINE index alive_at(index s) const {
    const index all = in.alive(time(s));
    const index alive = (all < place.last ? all : place.last) - place.first;
    return alive > 0 ? alive : 0;
  }

  FASTSEQ_INLINE Step step_at(index s) const {
    return {time(s), rows_at(s), rows_at(s - 1), rows_at(s + 1), alive_at(s)};
  }

  // Where row n stands among those of all recurrences, side by side.
  FASTSEQ_INLINE index column(index n) const { return n * R + place.recurrence; }

  // How the k-th state of row n stays.
  FASTSEQ_INLINE Stay<T> stay(int k, index n) const {
    return {r.stay[k] ? r.stay[k] + n * (k ? H : P) : nullptr, r.part[k]};
  }

  FASTSEQ_INLINE bool resets(index n) const { return r.reset && r.reset[n]; }

  // h_{t-1} of sequence `own`; y holds it where the step before had the sequence.
  FASTSEQ_INLINE const T* h_before(const Step& s, index own, const T* y) const {
    if (resets(s.now.base + own)) return zeros;
    if (own < s.before.alive) return y + column(s.before.base + own) * P;
    return r.h_0 ? r.h_0 + own * P : zeros;
  }

  // What of it W_hh multiplies: all, or what the mask leaves, which `masked` takes.
  FASTSEQ_INLINE const T* multiplied(const T* h, index own, T* masked) const {
    if (!r.h_mask) return h;
    const T* mask = r.h_mask + own * P;
    each_vector<T>(0, P, [&](index u, int n) {
      store_units(masked + u, load_units(h + u, n) * load_units(mask + u, n), n);
    });
    return masked;
  }
};

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

// Panels of the columns of phase k's product, each of the same units as that of the input product.
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

// Whether the products of a call can be in pairs: no row may have an odd number of numbers.
template <class T>
bool in_pairs(const Input<T>& in) {
  return HAS_PAIRS<T> && (in.I | in.H | in.P) % 2 == 0;
}

// Number `at` of a matrix of weights; two of bfloat16 take the room of one.
template <class T>
FASTSEQ_INLINE const T* at_number(const T* w, index at, bool halves) {
  return w + (halves ? at / 2 : at);
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

// Backward: a CTA walks its sequences from their last step to their first.
//
// On the chip over time: the weights, transposed; the gates' gradients as the operand of the product
// that gives the recurrent part of dh_{t-1} (two of them, for even and odd steps); dh and dc in
// registers. A step reads what forward left of a sequence, G*H gates, E*H extras, y and the other
// state of the step before, and dy, and writes the gradients of the input products, from which large
// products make those of weights and input when the walk is done. Nothing that forward left is
// written to. Sums have one order: two calls agree bit for bit.
#pragma once
#include "tile.h"

namespace fastseq {
namespace FASTSEQ_ISA {

// What the text of one element takes and leaves.
template <class T>
struct BackwardAt {
  using Value = typename T::Value;
  float dh_now, dc_now[T::C ? T::C : 1], saves[T::G], extras[T::E ? T::E : 1];
  float h_before, h_after, c_before[T::C ? T::C : 1], c_after[T::C ? T::C : 1];
  float units[T::U ? T::U : 1];
  float din[T::G], dproduct[T::G], dh_before, dc_before[T::C ? T::C : 1];
  float dunits[T::U ? T::U : 1];

  DEVICE Value dvalue() const { return {dh_now}; }
  DEVICE Value dc(int k) const { return {dc_now[k]}; }
  DEVICE Value saved(int g) const { return {saves[g]}; }
  DEVICE Value extra(int k) const { return {extras[k]}; }
  DEVICE Value h() const { return {h_after}; }
  DEVICE Value h_prev() const { return {h_before}; }
  DEVICE Value c(int k) const { return {c_after[k]}; }
  DEVICE Value c_prev(int k) const { return {c_before[k]}; }
  DEVICE Value unit(int k) const { return {units[k]}; }
  DEVICE void da(int g, Value v) { din[g] = dproduct[g] = v.v; }
  DEVICE void dx(int g, Value v) { din[g] = v.v; }
  DEVICE void ds(int g, Value v) { dproduct[g] = v.v; }
  DEVICE void dh_prev(Value v) { dh_before = v.v; }
  DEVICE void dc_prev(int k, Value v) { dc_before[k] = v.v; }
  DEVICE void dunit(int k, Value v) { dunits[k] = v.v; }
};

template <class Cell, class Type, int HC>
CONSTANT int backward_threads() {
  return Tile<Cell, Type, HC, true>::THREADS;
}
template <class Cell, class Type, int HC>
CONSTANT int backward_ctas() {
  return Tile<Cell, Type, HC, true>::CTAS;
}

template <class Cell, class Type, int HC>
DEVICE void backward_walk(const Arguments& a) {
  using T = Tile<Cell, Type, HC, true>;
  using Number = typename T::Number;
  constexpr int STAGES = T::STAGES;
  const Seat<T> seat(a);
  unsigned char* const memory = shared();
  unsigned char* const operands = memory + T::WEIGHTS;
  unsigned char* const stages = memory + T::AT_STAGES;
  const int H = int(a.H), R = int(a.R);

  Weights<T> weights;
  if constexpr (T::MULTIPLIES) {
    const auto* w_hh = static_cast<const unsigned char*>(a.w_hh) +
                       (int64_t(seat.recurrence) * HC + seat.warp * UNITS) * T::INNER;
    weights.fill(memory, [&](int) { return w_hh; }, T::INNER, seat.warp, seat.lane);
  }

  // this thread's elements
  float dh[4], dc[4], mask[4], unit[T::U ? T::U : 1][2];
  float h[4], c[4];  // after the step
  Sum dunit[T::U ? T::U : 1][2];
  bool is_unit[2];
  int lengths[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    is_unit[k] = seat.is_unit(2 * k);
    lengths[k] = seat.length(seat.column_of(k));
#pragma unroll
    for (int u = 0; u < T::U; ++u)
      unit[u][k] = is_unit[k] ? number_at<Number>(a.unit, (int64_t(seat.recurrence) * T::U + u) * H +
                                                              seat.unit_of(2 * k))
                              : 0.0f;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const bool there = is_unit[e / 2] && seat.sequence(seat.column_of(e)) < a.B;
    dh[e] = there ? a.dh[seat.state(e)] : 0.0f;
    dc[e] = T::C && there ? a.dc[seat.state(e)] : 0.0f;
    mask[e] = there && a.h_mask ? number_at<Number>(a.h_mask, seat.state(e)) : 1.0f;
    h[e] = c[e] = 0.0f;
  }

  // this thread's part of the rows that are fetched
  constexpr int ROW_LANES = T::THREADS / EIGHT;
  const int my_row = thread() / ROW_LANES, my_part = thread() % ROW_LANES;
  const int my_length = seat.length(my_row);
  const int narrow_bytes = seat.width * T::SIZE;
  const int steps = seat.length(0);
  // Time goes against forward's; `before` is forward's step before.
  const auto time_of = [&](int step) { return seat.reverse ? step : steps - 1 - step; };
  const auto before = [&](int time) { return seat.reverse ? time + 1 : time - 1; };
  const auto has_before = [&](int time, int length) {
    return seat.reverse ? time + 1 < length : time > 0;
  };
  const auto row_of = [&](int step) {
    return step < steps ? seat.row(time_of(step)) : int64_t(0);
  };
  const auto piece = [&](const void* base, int64_t row, int numbers, int size) {
    return static_cast<const unsigned char*>(base) +
           ((row + my_row) * R + seat.recurrence) * numbers * H * size + seat.origin * size;
  };
  // row: of the step; row_before: of the step after it in this walk, forward's before
  const auto on_its_way = [&](int step, int slot, int64_t row, int64_t row_before) {
    const int time = time_of(step);
    if (step < steps && time < my_length) {
      unsigned char* const to = stages + slot * T::STAGE + my_row * T::ROW;
      if constexpr (Cell::KEEPS_GATES)
        fetch<T::SIZE>(to, piece(a.gates, row, T::G, T::SIZE), T::G * narrow_bytes, my_part,
                       ROW_LANES);
      if constexpr (T::E > 0)
        fetch<T::SIZE>(to + T::AT_EXTRA, piece(a.extra, row, T::E, T::SIZE), T::E * narrow_bytes,
                       my_part, ROW_LANES);
      if (a.dy)
        fetch<T::SIZE>(to + T::AT_DY, piece(a.dy, row, 1, T::SIZE), narrow_bytes, my_part,
                       ROW_LANES);
      if (has_before(time, my_length)) {
        if constexpr (T::WALKS_BY_H)
          fetch<T::SIZE>(to + T::AT_H, piece(a.y, row_before, 1, T::SIZE), narrow_bytes, my_part,
                         ROW_LANES);
        if constexpr (T::C > 0)
          fetch<4>(to + T::AT_C, piece(a.c_all, row_before, 1, 4), seat.width * 4, my_part,
                   ROW_LANES);
      }
      if (T::C > 0 && a.dc_all)
        fetch<4>(to + T::AT_DC, piece(a.dc_all, row, 1, 4), seat.width * 4, my_part, ROW_LANES);
    }
    close();
  };
  const uint8_t* const reset = a.reset ? a.reset + int64_t(seat.recurrence) * a.rows : nullptr;
  const auto is_reset = [&](int64_t row, int time, int k) {
    return reset && time < lengths[k] && reset[row + seat.column_of(k)] != 0;
  };

  int64_t row = row_of(0), next_row = row_of(1);
  {
    int64_t at = row, then = next_row;
#pragma unroll 1
    for (int step = 0; step < STAGES - 1; ++step) {
      on_its_way(step, step, at, then);
      at = then;
      then = row_of(step + 2);
    }
  }
  int64_t row_ahead = row_of(STAGES - 1), next_ahead = row_of(STAGES);
  bool resets[2] = {};
  if (steps > 0) {
    resets[0] = is_reset(row, time_of(0), 0);
    resets[1] = is_reset(row, time_of(0), 1);
  }
  arrived<STAGES - 2>();
  meet();

  int slot = 0, last_slot = STAGES - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int time = time_of(step);
    const int64_t row_after = row_of(step + 2), ahead_after = row_of(step + STAGES + 1);
    bool next_resets[2] = {};
    if (reset && step + 1 < steps) {
      next_resets[0] = is_reset(next_row, time_of(step + 1), 0);
      next_resets[1] = is_reset(next_row, time_of(step + 1), 1);
    }
    unsigned char* const stage = stages + slot * T::STAGE;
    unsigned char* const operand = operands + (step & 1) * T::OPERAND;
    float direct[4];  // what of dh_{t-1} comes past the product
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = seat.column_of(e), local = seat.local_unit(e);
      const bool live = time < lengths[e % 2] && is_unit[e / 2];
      unsigned char* const mine = stage + column * T::ROW;
      const int gate = seat.width * T::SIZE;
      BackwardAt<T> at;
#pragma unroll
      for (int g = 0; g < T::G; ++g) at.din[g] = at.dproduct[g] = 0.0f;
      direct[e] = 0.0f;
      if (live) {
        if (step == 0 || (seat.reverse ? false : time == lengths[e % 2] - 1)) {
          // its last step: what forward left there
          const int64_t last = ((row + column) * R + seat.recurrence) * H + seat.unit_of(e);
          if constexpr (T::WALKS_BY_H) h[e] = number_at<Number>(a.y, last);
          if constexpr (T::C > 0) c[e] = a.c_all[last];
        }
        const bool kept = !resets[e % 2];
        float h_before = 0.0f, c_before = 0.0f;
        if (has_before(time, lengths[e % 2])) {
          if constexpr (T::WALKS_BY_H)
            h_before = widen(load<Number>(mine + T::AT_H + local * T::SIZE));
          if constexpr (T::C > 0) c_before = load<float>(mine + T::AT_C + local * 4);
        } else {
          if (T::WALKS_BY_H && a.h_0) h_before = number_at<Number>(a.h_0, seat.state(e));
          if (T::C > 0 && a.c_0) c_before = number_at<Number>(a.c_0, seat.state(e));
        }
        at.dh_now = dh[e];
        if (a.dy) at.dh_now += widen(load<Number>(mine + T::AT_DY + local * T::SIZE));
        at.dc_now[0] = dc[e];
        if (T::C > 0 && a.dc_all) at.dc_now[0] += load<float>(mine + T::AT_DC + local * 4);
#pragma unroll
        for (int g = 0; g < T::G; ++g)
          at.saves[g] =
              Cell::KEEPS_GATES ? widen(load<Number>(mine + g * gate + local * T::SIZE)) : 0.0f;
#pragma unroll
        for (int k = 0; k < T::E; ++k)
          at.extras[k] = widen(load<Number>(mine + T::AT_EXTRA + k * gate + local * T::SIZE));
        at.h_after = h[e];
        at.c_after[0] = c[e];
        at.h_before = kept ? h_before : 0.0f;
        at.c_before[0] = kept ? c_before : 0.0f;
#pragma unroll
        for (int u = 0; u < T::U; ++u) at.units[u] = unit[u][e / 2];
        at.dh_before = 0.0f;
        at.dc_before[0] = 0.0f;
        Cell::template backward<0>(at);
        h[e] = h_before;
        c[e] = c_before;
        direct[e] = at.dh_before;
        dc[e] = kept ? at.dc_before[0] : 0.0f;
#pragma unroll
        for (int u = 0; u < T::U; ++u) dunit[u][e / 2].add(at.dunits[u]);
#pragma unroll
        for (int g = 0; g < T::G; ++g)
          store(mine + g * gate + local * T::SIZE, narrow<Number>(at.din[g]));
        if (a.dproduct) {
#pragma unroll
          for (int g = 0; g < T::G_HH; ++g)
            put_at<Number>(a.dproduct,
                           (((row + column) * R + seat.recurrence) * T::G_HH + g) * H +
                               seat.unit_of(e),
                           at.dproduct[g]);
        }
      }
#pragma unroll
      for (int g = 0; g < T::G_HH; ++g)
        put_operand<T>(operand + T::place(column) + (g * HC + local) * T::SIZE,
                       at.dproduct[g]);
    }
    arrived<STAGES - 3>();
    meet();
    if (time < my_length)
      put<T::SIZE>(static_cast<unsigned char*>(a.dgates) +
                       (((row + my_row) * R + seat.recurrence) * T::G * H + seat.origin) * T::SIZE,
                   stage + my_row * T::ROW, T::G * narrow_bytes, my_part, ROW_LANES);
    on_its_way(step + STAGES - 1, last_slot, row_ahead, next_ahead);
    float products[1][4] = {};
    if constexpr (T::MULTIPLIES)
      weights.multiply(products, operand + T::place(seat.g) + 16 * seat.q);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (time >= lengths[e % 2]) continue;
      dh[e] = resets[e % 2] ? 0.0f : products[0][e] * mask[e] + direct[e];
    }
    last_slot = slot;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    row = next_row;
    next_row = row_after;
    row_ahead = next_ahead;
    next_ahead = ahead_after;
    resets[0] = next_resets[0];
    resets[1] = next_resets[1];
  }

#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (!is_unit[e / 2] || seat.sequence(seat.column_of(e)) >= a.B) continue;
    a.dh[seat.state(e)] = dh[e];
    if constexpr (T::C > 0) a.dc[seat.state(e)] = dc[e];
  }
#pragma unroll
  for (int u = 0; u < T::U; ++u)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float total = dunit[u][k].total();  // over the sequences of four neighbours
      total += neighbour(total, 1);
      total += neighbour(total, 2);
      if (seat.q == 0 && is_unit[k])
        a.dunit[((int64_t(tile_x()) * R + seat.recurrence) * T::U + u) * H + seat.unit_of(2 * k)] =
            total;
    }
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

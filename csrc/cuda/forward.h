// Forward: a CTA walks its sequences from their first step to their last.
//
// On the chip over time: the weights, h_{t-1} as the operand of the product (two of them, for even
// and odd steps), the states in registers. A step reads G*H input products of a sequence and writes
// y, and where backward will run G*H saved values, E*H extras and the other state. One barrier: what
// a step leaves in shared memory, the next one reads behind it.
#pragma once
#include "tile.h"

namespace fastseq {
namespace FASTSEQ_ISA {

// What the text of one element takes and leaves.
template <class T>
struct ForwardAt {
  using Value = typename T::Value;
  float in[T::G], product[T::MULTIPLIES ? T::G_HH : 1];
  float h_before, c_before[T::C ? T::C : 1], units[T::U ? T::U : 1];
  float h_after, c_after[T::C ? T::C : 1], saves[T::G], extras[T::E ? T::E : 1];

  DEVICE Value a(int g) const { return {g < T::G_HH ? in[g] + product[g] : in[g]}; }
  DEVICE Value x(int g) const { return {in[g]}; }
  DEVICE Value s(int g) const { return {product[g]}; }
  DEVICE Value h_prev() const { return {h_before}; }
  DEVICE Value c_prev(int k) const { return {c_before[k]}; }
  DEVICE Value unit(int k) const { return {units[k]}; }
  DEVICE void h(Value v) { h_after = v.v; }
  DEVICE void c(int k, Value v) { c_after[k] = v.v; }
  DEVICE void save(int g, Value v) { saves[g] = v.v; }
  DEVICE void save_extra(int k, Value v) { extras[k] = v.v; }
};

template <class Cell, class Type, int HC>
CONSTANT int forward_threads() {
  return Tile<Cell, Type, HC, false>::THREADS;
}
template <class Cell, class Type, int HC>
CONSTANT int forward_ctas() {
  return Tile<Cell, Type, HC, false>::CTAS;
}

template <class Cell, class Type, int HC>
DEVICE void forward_walk(const Arguments& a) {
  using T = Tile<Cell, Type, HC, false>;
  using Number = typename T::Number;
  constexpr int STAGES = T::STAGES;
  const Seat<T> seat(a);
  unsigned char* const memory = shared();
  unsigned char* const operands = memory + T::WEIGHTS;
  unsigned char* const stages = memory + T::AT_STAGES;
  const int H = int(a.H);

  Weights<T> weights;
  if constexpr (T::MULTIPLIES) {
    const auto* w_hh = static_cast<const unsigned char*>(a.w_hh) +
                       int64_t(seat.recurrence) * T::G_HH * HC * HC * T::SIZE;
    weights.fill(
        memory, [&](int m) { return w_hh + int64_t(m * HC + seat.warp * UNITS) * HC * T::SIZE; },
        HC * T::SIZE, seat.warp, seat.lane);
  }

  // this thread's elements
  float h[4], c[4], mask[4], unit[T::U ? T::U : 1][2], bias[T::G_HH ? T::G_HH : 1][2];
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
#pragma unroll
    for (int g = T::G_HH - Cell::APART; g < T::G_HH; ++g)
      bias[g][k] = is_unit[k] && a.b_hh
                       ? number_at<Number>(a.b_hh, (int64_t(seat.recurrence) * T::G_HH + g) * H +
                                                       seat.unit_of(2 * k))
                       : 0.0f;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const bool there = is_unit[e / 2] && seat.sequence(seat.column_of(e)) < a.B;
    h[e] = there && a.h_0 ? number_at<Number>(a.h_0, seat.state(e)) : 0.0f;
    c[e] = T::C && there && a.c_0 ? number_at<Number>(a.c_0, seat.state(e)) : 0.0f;
    mask[e] = there && a.h_mask ? number_at<Number>(a.h_mask, seat.state(e)) : 1.0f;
  }
  const auto hand_on = [&](unsigned char* operand) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      put_operand<T>(operand + T::place(seat.column_of(e)) + seat.local_unit(e) * T::SIZE,
                     is_unit[e / 2] ? h[e] * mask[e] : 0.0f);
  };
  if constexpr (T::MULTIPLIES) hand_on(operands);

  // this thread's part of a row that is fetched
  constexpr int ROW_LANES = T::THREADS / EIGHT;
  const int my_row = thread() / ROW_LANES, my_part = thread() % ROW_LANES;
  const int my_length = seat.length(my_row);
  const int row_bytes = T::G * seat.width * T::SIZE;
  const int64_t pitch = a.R * T::G * H * T::SIZE;
  auto* const gates = static_cast<unsigned char*>(a.gates) +
                      (int64_t(seat.recurrence) * T::G * H + seat.origin) * T::SIZE;
  const int steps = seat.length(0);
  const auto time_of = [&](int step) { return seat.reverse ? steps - 1 - step : step; };
  const auto on_its_way = [&](int step, int slot, int64_t row) {
    if (step < steps && time_of(step) < my_length)
      fetch<T::SIZE>(stages + slot * T::STAGE + my_row * T::ROW,
                     gates + (row + my_row) * pitch, row_bytes, my_part, ROW_LANES);
    close();
  };
  const auto row_of = [&](int step) {
    return step < steps ? seat.row(time_of(step)) : int64_t(0);
  };
  const uint8_t* const reset = a.reset ? a.reset + int64_t(seat.recurrence) * a.rows : nullptr;
  const auto is_reset = [&](int64_t row, int time, int k) {
    return reset && time < lengths[k] && reset[row + seat.column_of(k)] != 0;
  };

#pragma unroll 1
  for (int step = 0; step < STAGES - 1; ++step) on_its_way(step, step, row_of(step));
  int64_t row = row_of(0), row_ahead = row_of(STAGES - 1);
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
    const int64_t next_row = row_of(step + 1), next_ahead = row_of(step + STAGES);
    bool next_resets[2] = {};
    if (reset && step + 1 < steps) {
      next_resets[0] = is_reset(next_row, time_of(step + 1), 0);
      next_resets[1] = is_reset(next_row, time_of(step + 1), 1);
    }
    float products[T::MULTIPLIES ? T::G_HH : 1][4];
    if constexpr (T::MULTIPLIES)
      weights.multiply(products, operands + (step & 1) * T::OPERAND +
                                     T::place(seat.g) + 16 * seat.q);

    unsigned char* const stage = stages + slot * T::STAGE;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool live = time < lengths[e % 2] && is_unit[e / 2];
      unsigned char* const mine =
          stage + seat.column_of(e) * T::ROW + seat.local_unit(e) * T::SIZE;
      const int gate = seat.width * T::SIZE;  // from a gate to the next
      ForwardAt<T> at;
#pragma unroll
      for (int g = 0; g < T::G; ++g)
        at.in[g] = live ? widen(load<Number>(mine + g * gate)) : 0.0f;
      const bool kept = !resets[e % 2];
#pragma unroll
      for (int g = 0; g < T::G_HH; ++g) {
        at.product[g] = kept ? products[g][e] : 0.0f;
        if (g >= T::G_HH - Cell::APART) at.product[g] += bias[g][e / 2];
      }
      at.h_before = kept ? h[e] : 0.0f;
      at.c_before[0] = kept ? c[e] : 0.0f;
#pragma unroll
      for (int u = 0; u < T::U; ++u) at.units[u] = unit[u][e / 2];
      Cell::template forward<0>(at);
      if (!live) continue;
      const Number rounded = narrow<Number>(at.h_after);
      h[e] = widen(rounded);
      const int64_t out = ((row + seat.column_of(e)) * a.R + seat.recurrence) * H + seat.unit_of(e);
      static_cast<Number*>(a.y)[out] = rounded;
      if constexpr (T::C > 0) {
        c[e] = at.c_after[0];
        if (a.c_all) a.c_all[out] = c[e];
      }
      if (a.save) {
        if constexpr (Cell::KEEPS_GATES) {
#pragma unroll
          for (int g = 0; g < T::G; ++g) store(mine + g * gate, narrow<Number>(at.saves[g]));
        }
#pragma unroll
        for (int k = 0; k < T::E; ++k)
          put_at<Number>(a.extra,
                         (((row + seat.column_of(e)) * a.R + seat.recurrence) * T::E + k) * H +
                             seat.unit_of(e),
                         at.extras[k]);
      }
    }
    if constexpr (T::MULTIPLIES) hand_on(operands + ((step + 1) & 1) * T::OPERAND);
    arrived<STAGES - 3>();
    meet();
    if (Cell::KEEPS_GATES && a.save && time < my_length)
      put<T::SIZE>(gates + (row + my_row) * pitch, stage + my_row * T::ROW, row_bytes,
                   my_part, ROW_LANES);
    on_its_way(step + STAGES - 1, last_slot, row_ahead);
    last_slot = slot;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    row = next_row;
    row_ahead = next_ahead;
    resets[0] = next_resets[0];
    resets[1] = next_resets[1];
  }

#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (!is_unit[e / 2] || seat.sequence(seat.column_of(e)) >= a.B) continue;
    put_at<Number>(a.h_n, seat.state(e), h[e]);
    if constexpr (T::C > 0) a.c_n[seat.state(e)] = c[e];
  }
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

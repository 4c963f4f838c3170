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
  constexpr int STAGES = T::STAGES, EACH = T::EACH, SIZE = T::SIZE;
  const Seat<T> seat(a);
  unsigned char* const memory = shared();
  unsigned char* const operands = memory + T::WEIGHTS;
  unsigned char* const stages = memory + T::AT_STAGES;
  const int H = int(a.H);

  Weights<T> weights;
  if constexpr (T::MULTIPLIES) {
    const auto* w_hh = static_cast<const unsigned char*>(a.w_hh) +
                       int64_t(seat.recurrence) * T::G_HH * HC * HC * SIZE;
    weights.fill(
        memory,
        [&](int m, bool lower) -> const unsigned char* {
          const int gate = EACH == 2 ? m : 2 * m + lower;
          const int unit = EACH == 2 ? seat.local + lower : seat.local;
          return gate < T::G_HH ? w_hh + int64_t(gate * HC + unit) * HC * SIZE : nullptr;
        },
        0, seat.q);
  }

  // this thread's elements: columns by units
  float h[2][EACH], c[2][EACH], unit[T::U ? T::U : 1][EACH], bias[T::G_HH ? T::G_HH : 1][EACH];
  int lengths[2];
  const int64_t beside = seat.beside(0);
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    const int64_t place = seat.origin + seat.local + j;
#pragma unroll
    for (int u = 0; u < T::U; ++u)
      unit[u][j] = seat.is_unit(j) ? number_at<Number>(
                                         a.unit, (int64_t(seat.recurrence) * T::U + u) * H + place)
                                   : 0.0f;
#pragma unroll
    for (int g = T::G_HH - Cell::APART; g < T::G_HH; ++g)
      bias[g][j] = seat.is_unit(j) && a.b_hh
                       ? number_at<Number>(
                             a.b_hh, (int64_t(seat.recurrence) * T::G_HH + g) * H + place)
                       : 0.0f;
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    lengths[k] = seat.length(seat.one(k));
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const bool there = seat.is_unit(j) && seat.is_sequence(k);
      h[k][j] = there && a.h_0 ? number_at<Number>(a.h_0, seat.state(k) + j) : 0.0f;
      c[k][j] = T::C && there && a.c_0 ? number_at<Number>(a.c_0, seat.state(k) + j) : 0.0f;
    }
  }
  if constexpr (T::MULTIPLIES) {  // both operands: columns that have no sequence stay as they are
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      Number v[EACH];
#pragma unroll
      for (int j = 0; j < EACH; ++j) {
        float masked = h[k][j];
        if (a.h_mask && seat.is_unit(j) && seat.is_sequence(k))
          masked *= number_at<Number>(a.h_mask, seat.state(k) + j);
        v[j] = narrow<Number>(masked);
      }
      unsigned char* const to = operands + T::place(2 * seat.q + k) + seat.local * SIZE;
      put_operand<T>(to, v);
      put_operand<T>(to + T::OPERAND, v);
    }
  }

  // this thread's part of the rows that are fetched
  const int my_row = thread() / T::ROW_LANES, my_part = thread() % T::ROW_LANES;
  const int my_length = seat.length(my_row);
  const int64_t pitch = int64_t(seat.stride) * (T::G * SIZE);
  auto* const gates = static_cast<unsigned char*>(a.gates) + my_row * pitch +
                      (int64_t(seat.recurrence) * T::G * H + seat.origin) * SIZE;
  unsigned char* const my_stages = stages + my_row * T::ROW;
  const int steps = seat.length(0);

  const auto walk = [&](auto is_plain) {
    constexpr bool PLAIN = is_plain.value != 0;
    const auto is_unit = [&](int j) { return PLAIN || seat.is_unit(j); };
    const auto time_of = [&](int step) { return seat.reverse ? steps - 1 - step : step; };
    const auto row_of = [&](int step) { return step < steps ? seat.row(time_of(step)) : 0; };
    const auto on_its_way = [&](int step, int slot, int row) {
      if (step < steps && (PLAIN ? my_length > 0 : time_of(step) < my_length)) {
        unsigned char* const to = my_stages + slot * T::STAGE;
        const unsigned char* const from = gates + row * pitch;
        if constexpr (PLAIN)
          fetch_whole<T::G * HC * SIZE, T::ROW_LANES>(to, from, my_part);
        else
          fetch<T::G, T::UNIT, SIZE>(to, from, seat.width * SIZE, H * SIZE, my_part, T::ROW_LANES);
      }
      close();
    };
    const auto is_reset = [&](int row, int time, int k) {
      return time < lengths[k] && a.reset[seat.recurrence * a.rows + row + seat.one(k)] != 0;
    };

#pragma unroll 1
    for (int step = 0; step < STAGES - 1; ++step) on_its_way(step, step, row_of(step));
    int row = row_of(0), row_ahead = row_of(STAGES - 1);
    const int by = seat.reverse ? -int(a.B) : int(a.B);  // where sequences have one length
    bool resets[2] = {};
    if (!PLAIN && a.reset && steps > 0) {
      resets[0] = is_reset(row, time_of(0), 0);
      resets[1] = is_reset(row, time_of(0), 1);
    }
    arrived<STAGES - 2>();
    meet();

    int slot = 0, last_slot = STAGES - 1;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int time = PLAIN ? 0 : time_of(step);
      const int next_row = PLAIN ? row + by : row_of(step + 1);
      const int next_ahead = PLAIN ? row_ahead + by : row_of(step + STAGES);
      bool next_resets[2] = {};
      if (!PLAIN && a.reset && step + 1 < steps) {
        next_resets[0] = is_reset(next_row, time_of(step + 1), 0);
        next_resets[1] = is_reset(next_row, time_of(step + 1), 1);
      }
      float products[T::TILES][4];
      if constexpr (T::MULTIPLIES)
        weights.multiply(products,
                         operands + (step & 1) * T::OPERAND + T::place(seat.g) + 16 * seat.q, 0);

      unsigned char* const stage = stages + slot * T::STAGE;
      unsigned char* const next = operands + ((step + 1) & 1) * T::OPERAND;
      const int64_t out = int64_t(row) * seat.stride + beside;
      const auto text = [&](auto columns) {
        constexpr int COLUMNS = columns.value;
        float in[COLUMNS][T::G][EACH];
        unsigned char* mine[COLUMNS];
#pragma unroll
        for (int k = 0; k < COLUMNS; ++k) {
          mine[k] = stage + (seat.one(k) % EIGHT) * T::ROW + seat.local * SIZE;
#pragma unroll
          for (int g = 0; g < T::G; ++g) load_each<Number>(in[k][g], mine[k] + g * T::UNIT);
        }
        ForwardAt<T> at[COLUMNS][EACH];
        Number rounded[COLUMNS][EACH], handed[COLUMNS][EACH];
#pragma unroll
        for (int k = 0; k < COLUMNS; ++k)
#pragma unroll
          for (int j = 0; j < EACH; ++j) {
            ForwardAt<T>& here = at[k][j];
#pragma unroll
            for (int g = 0; g < T::G; ++g) here.in[g] = in[k][g][j];
#pragma unroll
            for (int g = 0; g < T::G_HH; ++g) {
              const float s = EACH == 2 ? products[EACH == 2 ? g : 0][2 * j + k]
                                        : products[EACH == 2 ? 0 : g / 2][2 * (g % 2) + k];
              here.product[g] = resets[k] ? 0.0f : s;
              if (g >= T::G_HH - Cell::APART) here.product[g] += bias[g][j];
            }
            here.h_before = resets[k] ? 0.0f : h[k][j];
            here.c_before[0] = resets[k] ? 0.0f : c[k][j];
#pragma unroll
            for (int u = 0; u < T::U; ++u) here.units[u] = unit[u][j];
            Cell::template forward<0>(here);
            // where there is no sequence, anything may stand: it is never stored
            const bool lives = PLAIN || (time < lengths[k] && is_unit(j));
            rounded[k][j] = narrow<Number>(here.h_after);
            h[k][j] = lives ? widen(rounded[k][j]) : h[k][j];
            if constexpr (T::C > 0) c[k][j] = lives ? here.c_after[0] : c[k][j];
            if constexpr (PLAIN) {
              handed[k][j] = rounded[k][j];
            } else {
              float v = is_unit(j) ? h[k][j] : 0.0f;
              if (a.h_mask && is_unit(j) && seat.is_sequence(k))
                v *= number_at<Number>(a.h_mask, seat.state(k) + j);
              handed[k][j] = narrow<Number>(v);
            }
          }
        if constexpr (T::MULTIPLIES) {
#pragma unroll
          for (int k = 0; k < COLUMNS; ++k)
            put_operand<T>(next + T::place(2 * seat.q + k) + seat.local * SIZE, handed[k]);
        }
#pragma unroll
        for (int k = 0; k < COLUMNS; ++k) {
          if (!(PLAIN ? lengths[k] > 0 : time < lengths[k] && is_unit(0))) continue;
          const int64_t place = out + k * seat.stride;
          const bool second = is_unit(EACH - 1), paired = PLAIN || H % 2 == 0;
          put_each(a.y, place, rounded[k], second, paired);
          if constexpr (T::C > 0)
            if (a.c_all) put_each(a.c_all, place, c[k], second, paired);
          if (!a.save) continue;
          if constexpr (Cell::KEEPS_GATES) {
#pragma unroll
            for (int g = 0; g < T::G; ++g) {
              Number v[EACH];
#pragma unroll
              for (int j = 0; j < EACH; ++j) v[j] = narrow<Number>(at[k][j].saves[g]);
              store_each(mine[k] + g * T::UNIT, v);
            }
          }
          if constexpr (T::E > 0) {
            // of a row's E H numbers each recurrence
            const int64_t first =
                (place - seat.origin - seat.local) * T::E + seat.origin + seat.local;
#pragma unroll
            for (int e = 0; e < T::E; ++e) {
              Number v[EACH];
#pragma unroll
              for (int j = 0; j < EACH; ++j) v[j] = narrow<Number>(at[k][j].extras[e]);
              put_each(a.extra, first + e * H, v, second, paired);
            }
          }
        }
      };
      if (seat.few)
        text(Count<1>());
      else
        text(Count<2>());
      arrived<STAGES - 3>();
      meet();
      if (Cell::KEEPS_GATES && a.save && (PLAIN ? my_length > 0 : time < my_length)) {
        unsigned char* const to = gates + row * pitch;
        const unsigned char* const from = my_stages + slot * T::STAGE;
        if constexpr (PLAIN)
          put_whole<T::G * HC * SIZE, T::ROW_LANES>(to, from, my_part);
        else
          put<T::G, T::UNIT, SIZE>(to, from, seat.width * SIZE, H * SIZE, my_part, T::ROW_LANES);
      }
      on_its_way(step + STAGES - 1, last_slot, row_ahead);
      last_slot = slot;
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      row = next_row;
      row_ahead = next_ahead;
      resets[0] = next_resets[0];
      resets[1] = next_resets[1];
    }
  };
  if (seat.is_plain() && is_aligned(a.gates))
    walk(Count<1>());
  else
    walk(Count<0>());

#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      if (!seat.is_unit(j) || !seat.is_sequence(k)) continue;
      put_at<Number>(a.h_n, seat.state(k) + j, h[k][j]);
      if constexpr (T::C > 0) a.c_n[seat.state(k) + j] = c[k][j];
    }
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

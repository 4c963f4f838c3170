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
  float din[T::G], dproduct[T::G], dh_before = 0, dc_before[T::C ? T::C : 1] = {};
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
  constexpr int STAGES = T::STAGES, EACH = T::EACH, SIZE = T::SIZE;
  const Seat<T> seat(a);
  unsigned char* const memory = shared();
  unsigned char* const operands = memory + T::WEIGHTS;
  unsigned char* const stages = memory + T::AT_STAGES;
  const int H = int(a.H);
  const int part = T::SPLIT == 2 ? seat.warp % 2 : 0;  // of the inner length

  Weights<T> weights;
  if constexpr (T::MULTIPLIES) {
    const auto* w_hh = static_cast<const unsigned char*>(a.w_hh) +
                       int64_t(seat.recurrence) * HC * T::INNER;
    const int tile = seat.warp / T::SPLIT * 16;
    weights.fill(
        memory,
        [&](int, bool lower) {
          const int unit = EACH == 2 ? 2 * seat.g + lower : seat.g + 8 * lower;
          return w_hh + int64_t(tile + unit) * T::INNER;
        },
        part, seat.q);
  }

  // this thread's elements: columns by units
  float dh[2][EACH], dc[2][EACH], unit[T::U ? T::U : 1][EACH];
  float h[2][EACH] = {}, c[2][EACH] = {};  // after the step
  Sum dunit[T::U ? T::U : 1][EACH];
  constexpr int BIASES = T::G + Cell::APART;
  Total<T::PARTS != 0> dbias[BIASES][EACH];
  int lengths[2];
  const int64_t beside = seat.beside(0);
#pragma unroll
  for (int j = 0; j < EACH; ++j)
#pragma unroll
    for (int u = 0; u < T::U; ++u)
      unit[u][j] =
          seat.is_unit(j)
              ? number_at<Number>(a.unit, (int64_t(seat.recurrence) * T::U + u) * H +
                                              seat.origin + seat.local + j)
              : 0.0f;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    lengths[k] = seat.length(seat.one(k));
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const bool there = seat.is_unit(j) && seat.is_sequence(k);
      dh[k][j] = there && a.dh_n ? number_at<Number>(a.dh_n, seat.state(k) + j) : 0.0f;
      dc[k][j] = T::C && there && a.dc_n ? number_at<Number>(a.dc_n, seat.state(k) + j) : 0.0f;
    }
    if constexpr (T::MULTIPLIES)  // the columns that have no sequence stay so
#pragma unroll
      for (int g = 0; g < T::G_HH; ++g) {
        const Number zeros[EACH] = {};
        const int at = T::place(2 * seat.q + k) + (g * HC + seat.local) * SIZE;
        store_each(operands + at, zeros);
        store_each(operands + T::OPERAND + at, zeros);
      }
  }

  // this thread's part of the rows that are fetched
  const int my_row = thread() / T::ROW_LANES, my_part = thread() % T::ROW_LANES;
  const int my_length = seat.length(my_row);
  const int bytes = seat.width * SIZE, from_unit = H * SIZE;
  unsigned char* const my_stages = stages + my_row * T::ROW;
  const bool together = is_aligned(a.gates) && is_aligned(a.extra) && is_aligned(a.dy) &&
                        is_aligned(a.y) && is_aligned(a.c_all) && is_aligned(a.dc_all) &&
                        is_aligned(a.dgates);
  const int steps = seat.length(0);
  const int64_t mine_of_rows = int64_t(my_row) * seat.stride + seat.recurrence * H;

  const auto walk = [&](auto is_plain) {
    constexpr bool PLAIN = is_plain.value != 0;
    const auto is_unit = [&](int j) { return PLAIN || seat.is_unit(j); };
    // Time goes against forward's; `before` is forward's step before.
    const auto time_of = [&](int step) { return seat.reverse ? step : steps - 1 - step; };
    const auto has_before = [&](int step, int length) {
      if (PLAIN) return step + 1 < steps;
      return seat.reverse ? step + 1 < length : time_of(step) > 0;
    };
    const auto row_of = [&](int step) { return step < steps ? seat.row(time_of(step)) : 0; };
    // Where this thread's row of H numbers is.
    const auto place_of = [&](int row) { return int64_t(row) * seat.stride + mine_of_rows; };
    const auto piece = [&](const void* base, int64_t place, int numbers, int size) {
      return static_cast<const unsigned char*>(base) + (place * numbers + seat.origin) * size;
    };
    // place: of the step; before: of the step after it in this walk, forward's before
    const auto on_its_way = [&](int step, int slot, int64_t place, int64_t before) {
      if (step < steps && (PLAIN ? my_length > 0 : time_of(step) < my_length)) {
        unsigned char* const to = my_stages + slot * T::STAGE;
        const bool has = has_before(step, my_length);
        const auto pieces = [&](auto count, int at, const void* base, int64_t place) {
          const unsigned char* const from = piece(base, place, count.value, SIZE);
          if constexpr (PLAIN)
            fetch_whole<count.value * T::UNIT, T::ROW_LANES>(to + at, from, my_part);
          else
            fetch<count.value, T::UNIT, SIZE>(to + at, from, bytes, from_unit, my_part,
                                              T::ROW_LANES);
        };
        const auto wide_piece = [&](int at, const void* base, int64_t place) {
          const unsigned char* const from = piece(base, place, 1, 4);
          if constexpr (PLAIN)
            fetch_whole<HC * 4, T::ROW_LANES>(to + at, from, my_part);
          else
            fetch<1, 0, 4>(to + at, from, seat.width * 4, 0, my_part, T::ROW_LANES);
        };
        if constexpr (Cell::KEEPS_GATES) pieces(Count<T::G>(), 0, a.gates, place);
        if constexpr (T::E > 0) pieces(Count<T::E>(), T::AT_EXTRA, a.extra, place);
        if (a.dy) pieces(Count<1>(), T::AT_DY, a.dy, place);
        if constexpr (T::READS_Y)
          if (has) pieces(Count<1>(), T::AT_H, a.y, before);
        if constexpr (T::C > 0) {
          if (has) wide_piece(T::AT_C, a.c_all, before);
          if (a.dc_all) wide_piece(T::AT_DC, a.dc_all, place);
        }
      }
      close();
    };
    const auto is_reset = [&](int row, int time, int k) {
      return time < lengths[k] && a.reset[seat.recurrence * a.rows + row + seat.one(k)] != 0;
    };

    int row = row_of(0), next_row = row_of(1);
    {
      int at = row, then = next_row;
#pragma unroll 1
      for (int step = 0; step < STAGES - 1; ++step) {
        on_its_way(step, step, place_of(at), place_of(then));
        at = then;
        then = row_of(step + 2);
      }
    }
    int row_ahead = row_of(STAGES - 1), next_ahead = row_of(STAGES);
    bool resets[2] = {};
    if (!PLAIN && a.reset && steps > 0) {
      resets[0] = is_reset(row, time_of(0), 0);
      resets[1] = is_reset(row, time_of(0), 1);
    }
    // where sequences have one length: from a step's place to the next one's
    const int64_t by = int64_t(seat.reverse ? int(a.B) : -int(a.B)) * seat.stride;
    int64_t now = place_of(row);
    // A sequence's last step: what forward left there.
    const auto enter = [&](int k, int64_t place) {
#pragma unroll
      for (int j = 0; j < EACH; ++j) {
        if (!is_unit(j)) continue;
        if constexpr (T::READS_Y) h[k][j] = number_at<Number>(a.y, place + j);
        if constexpr (T::C > 0) c[k][j] = a.c_all[place + j];
      }
    };
    if (PLAIN && steps > 0) {
#pragma unroll
      for (int k = 0; k < 2; ++k)
        if (lengths[k] > 0) enter(k, int64_t(row) * seat.stride + beside + k * seat.stride);
    }
    arrived<STAGES - 2>();
    meet();

    int slot = 0, last_slot = STAGES - 1;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int time = PLAIN ? 0 : time_of(step);
      const int row_after = PLAIN ? 0 : row_of(step + 2);
      const int ahead_after = PLAIN ? 0 : row_of(step + STAGES + 1);
      bool next_resets[2] = {};
      if (!PLAIN && a.reset && step + 1 < steps) {
        next_resets[0] = is_reset(next_row, time_of(step + 1), 0);
        next_resets[1] = is_reset(next_row, time_of(step + 1), 1);
      }
      unsigned char* const stage = stages + slot * T::STAGE;
      unsigned char* const operand = operands + (step & 1) * T::OPERAND;
      const int64_t out = now - mine_of_rows;  // of the step's first row
      float direct[2][EACH] = {};  // what of dh_{t-1} comes past the product
      const auto text = [&](auto columns) {
        constexpr int COLUMNS = columns.value;
        unsigned char* mine[COLUMNS];
        BackwardAt<T> at[COLUMNS][EACH];
        float biases[BIASES][EACH] = {};
        float h_before[COLUMNS][EACH], c_before[COLUMNS][EACH];
#pragma unroll
        for (int k = 0; k < COLUMNS; ++k) {
          mine[k] = stage + (seat.one(k) % EIGHT) * T::ROW + seat.local * SIZE;
          const unsigned char* const wide = mine[k] + seat.local * (4 - SIZE);  // of float32
          const bool live = PLAIN || (time < lengths[k] && is_unit(0));
          if (!PLAIN && live && time == (seat.reverse ? 0 : lengths[k] - 1))
            enter(k, out + beside + k * seat.stride);
          const bool has = has_before(step, lengths[k]);
          float v[EACH];
          load_where<Number>(live && T::READS_Y && has, h_before[k], mine[k] + T::AT_H);
          load_where<float>(live && T::C > 0 && has, c_before[k], wide + T::AT_C);
          if (!has && seat.is_sequence(k)) {
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
              if (!is_unit(j)) continue;
              if (T::READS_Y && a.h_0)
                h_before[k][j] = number_at<Number>(a.h_0, seat.state(k) + j);
              if (T::C > 0 && a.c_0)
                c_before[k][j] = number_at<Number>(a.c_0, seat.state(k) + j);
            }
          }
          load_where<Number>(live && a.dy, v, mine[k] + T::AT_DY);
#pragma unroll
          for (int j = 0; j < EACH; ++j) at[k][j].dh_now = dh[k][j] + v[j];
          load_where<float>(live && T::C > 0 && a.dc_all, v, wide + T::AT_DC);
#pragma unroll
          for (int j = 0; j < EACH; ++j) at[k][j].dc_now[0] = dc[k][j] + v[j];
#pragma unroll
          for (int g = 0; g < T::G; ++g) {
            load_where<Number>(live && Cell::KEEPS_GATES, v, mine[k] + g * T::UNIT);
#pragma unroll
            for (int j = 0; j < EACH; ++j) at[k][j].saves[g] = v[j];
          }
#pragma unroll
          for (int e = 0; e < T::E; ++e) {
            load_where<Number>(live, v, mine[k] + T::AT_EXTRA + e * T::UNIT);
#pragma unroll
            for (int j = 0; j < EACH; ++j) at[k][j].extras[e] = v[j];
          }
        }
#pragma unroll
        for (int k = 0; k < COLUMNS; ++k)
#pragma unroll
          for (int j = 0; j < EACH; ++j) {
            BackwardAt<T>& here = at[k][j];
            here.h_after = h[k][j];
            here.c_after[0] = c[k][j];
            here.h_before = resets[k] ? 0.0f : h_before[k][j];
            here.c_before[0] = resets[k] ? 0.0f : c_before[k][j];
#pragma unroll
            for (int u = 0; u < T::U; ++u) here.units[u] = unit[u][j];
            here.dh_before = here.dc_before[0] = 0.0f;
            Cell::template backward<0>(here);
            const bool lives = PLAIN || (time < lengths[k] && is_unit(j));
            h[k][j] = h_before[k][j];
            c[k][j] = c_before[k][j];
            direct[k][j] = here.dh_before;
            dc[k][j] = !lives ? dc[k][j] : resets[k] ? 0.0f : here.dc_before[0];
            if (lives && seat.is_sequence(k)) {
#pragma unroll
              for (int u = 0; u < T::U; ++u) dunit[u][j].add(here.dunits[u]);
            }
          }
#pragma unroll
        for (int k = 0; k < COLUMNS; ++k) {
          const bool live = PLAIN ? lengths[k] > 0 : time < lengths[k] && is_unit(0);
          const int64_t place = (out + int64_t(seat.one(k)) * seat.stride + seat.recurrence * H) *
                                    T::G_HH + seat.origin + seat.local;
#pragma unroll
          for (int g = 0; g < T::G; ++g) {
            Number din[EACH], dproduct[EACH];
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
              const bool lives = PLAIN || (time < lengths[k] && is_unit(j));
              din[j] = narrow<Number>(at[k][j].din[g]);
              dproduct[j] = narrow<Number>(lives ? at[k][j].dproduct[g] : 0.0f);
            }
            if (live) {
#pragma unroll
              for (int j = 0; j < EACH; ++j) {
                biases[g][j] += widen(din[j]);
                if (g >= T::G - Cell::APART) biases[g + Cell::APART][j] += widen(dproduct[j]);
              }
            }
            if (PLAIN || live) store_each(mine[k] + g * T::UNIT, din);
            if (g >= T::G_HH) continue;
            put_operand<T>(operand + T::place(2 * seat.q + k) + (g * HC + seat.local) * SIZE,
                           dproduct);
            if (T::DIFFERS && a.dproduct && live)
              put_each(a.dproduct, place + int64_t(g) * H, dproduct, is_unit(EACH - 1),
                       PLAIN || H % 2 == 0);
          }
        }
#pragma unroll
        for (int g = 0; g < BIASES; ++g)
#pragma unroll
          for (int j = 0; j < EACH; ++j) dbias[g][j].add(biases[g][j], step);
      };
      if (seat.few)
        text(Count<1>());
      else
        text(Count<2>());
      arrived<STAGES - 3>();
      meet();
      float products[1][4] = {};
      if constexpr (T::MULTIPLIES)
        weights.multiply(products, operand + T::place(seat.g) + 16 * seat.q, part);
      // while the products are made
      if (PLAIN ? my_length > 0 : time < my_length) {
        auto* const to = static_cast<unsigned char*>(a.dgates) + (now * T::G + seat.origin) * SIZE;
        const unsigned char* const from = my_stages + slot * T::STAGE;
        if constexpr (PLAIN)
          put_whole<T::G * HC * SIZE, T::ROW_LANES>(to, from, my_part);
        else
          put<T::G, T::UNIT, SIZE>(to, from, bytes, from_unit, my_part, T::ROW_LANES);
      }
      const int64_t ahead = PLAIN ? now + (STAGES - 1) * by : place_of(row_ahead);
      on_its_way(step + STAGES - 1, last_slot, ahead, PLAIN ? ahead + by : place_of(next_ahead));
      float sums[2][EACH] = {};  // columns by units
      if constexpr (T::MULTIPLIES) {
        if constexpr (T::SPLIT == 2) {
          auto* const exchange = reinterpret_cast<Two<float>*>(memory + T::AT_SUMS);
          const int other = thread() ^ LANES;
          store(exchange + thread(), part ? Two<float>{products[0][0], products[0][1]}
                                          : Two<float>{products[0][2], products[0][3]});
          meet_pair(seat.warp / 2);
          const auto given = load<Two<float>>(exchange + other);
          sums[0][0] = (part ? products[0][2] : products[0][0]) + given.first;
          sums[1][0] = (part ? products[0][3] : products[0][1]) + given.second;
        } else {
#pragma unroll
          for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int j = 0; j < EACH; ++j) sums[k][j] = products[0][2 * j + k];
        }
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (!PLAIN && time >= lengths[k]) continue;
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
          float s = sums[k][j];
          if (!PLAIN && a.h_mask && is_unit(j)) s *= number_at<Number>(a.h_mask, seat.state(k) + j);
          dh[k][j] = resets[k] ? 0.0f : s + direct[k][j];
        }
      }
      last_slot = slot;
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      row = next_row;
      next_row = row_after;
      row_ahead = next_ahead;
      next_ahead = ahead_after;
      now = PLAIN ? now + by : place_of(row);
      resets[0] = next_resets[0];
      resets[1] = next_resets[1];
    }
  };
  if (seat.is_plain() && together)
    walk(Count<1>());
  else
    walk(Count<0>());

#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      if (!seat.is_unit(j) || !seat.is_sequence(k)) continue;
      if (a.dh_0) put_at<Number>(a.dh_0, seat.state(k) + j, dh[k][j]);
      if (T::C > 0 && a.dc_0) put_at<Number>(a.dc_0, seat.state(k) + j, dc[k][j]);
    }
  // over the sequences of four neighbours
  const auto leave = [&](float* to, int count, int which, int j, float total) {
    total += neighbour(total, 1);
    total += neighbour(total, 2);
    if (seat.q == 0 && seat.is_unit(j) && to)
      to[((int64_t(tile_x()) * a.R + seat.recurrence) * count + which) * H + seat.origin +
         seat.local + j] = total;
  };
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
#pragma unroll
    for (int g = 0; g < BIASES; ++g) leave(a.dbias, BIASES, g, j, dbias[g][j].total());
#pragma unroll
    for (int u = 0; u < T::U; ++u) leave(a.dunit, T::U, u, j, dunit[u][j].total());
  }
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

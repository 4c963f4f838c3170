// Backward by a team: its CTAs walk their sequences from the last step to the first, side by side.
//
// On the chip over time: the weights of a slice, the gates' gradients of its units as the operand of
// the product, what of dh and dc is carried past it. A step reads what backward.h's does, of a slice;
// what goes round is the product, to each CTA its units' part from everyone, H float32 a sequence, which
// it adds up in the order of the CTAs: the same bits every run. Three barriers of the CTA a step.
//
// A thread's elements are where a product's sums stand: number k of lane (g, q) is of row g + k / 2 * 8
// and of column 2 q + k % 2.
#pragma once
#include "exchange.h"

namespace fastseq {
namespace FASTSEQ_ISA {

template <class S, class Cell>
DEVICE void team_backward(const Arguments& a) {
  using Number = typename S::Number;
  constexpr int SIZE = S::SIZE, UNITS = S::UNITS, BIASES = S::G + Cell::APART;
  const Member<S> me(a);
  unsigned char* const memory = shared();
  const Room room = backward_room<S>(me.team, int(a.tile));
  const int H = me.H, steps = me.length(0);
  const int columns = up_to(me.count, EIGHT), elements = columns * UNITS;
  // states of elements, each as many behind the other
  const int apart = room.columns * UNITS;
  auto* const direct = reinterpret_cast<float*>(memory + room.at_states);
  float *const gain = direct + apart, *const dc = gain + apart;
  float *const h_at = dc + apart, *const c_at = h_at + apart;
  auto* const lengths = reinterpret_cast<int32_t*>(memory + room.at_lengths);
  unsigned char* const stages = memory + room.at_stages;
  unsigned char* const operand = memory + room.at_operands;
  // the last product is that of dh_0
  const int products = a.dh_0 ? steps : steps - 1;
  const Exchange<S> exchange(me, room, memory, products, me.team * elements * 4);
  Resets<S> resets(me, reinterpret_cast<unsigned char*>(lengths + room.columns), room.columns);

  // Row tile m of this warp is number warp + WARPS m of all units; the inner length are its slice's
  // gates, one after another.
  Held<S, S::HELD_TILES, S::PAIRS> weights;
  weights.rest = memory + room.at_weights + thread() * 16;
  const auto words = [&](int m, bool lower, int pair) -> Words4 {
    const int unit = (me.warp + m * S::WARPS) * 16 + me.g + 8 * lower;
    const int at = (pair * 64 + 16 * me.q) / SIZE;
    if (unit >= H) return {};
    return operand_words<Number>([&](int k) {
      const Number* const row = me.weights(at + k);
      return row ? row[unit] : narrow<Number>(0.0f);
    });
  };
  weights.hold(words);
#pragma unroll 1
  for (int m = S::HELD_TILES; m < room.tiles; ++m)
#pragma unroll 1
    for (int pair = 0; pair < S::PAIRS; ++pair)
      weights.rest_of(words, (m - S::HELD_TILES) * S::PAIRS + pair, m, pair);

  for (int k = thread() * 16; k < room.operand; k += S::THREADS * 16)
    store(operand + k, Words4{});
  if (thread() == 0) *reinterpret_cast<int32_t*>(memory + AT_LOST) = 0;
  for (int column = thread(); column < room.columns; column += S::THREADS)
    lengths[column] = me.length(column);

  const auto unit_of = [](int e) {
    return (e / 128 % S::SUBS) * 16 + e / 16 % 8 + e / 2 % 2 * 8;
  };
  const auto column_of = [](int e) { return e / (128 * S::SUBS) * 8 + e / 4 % 4 * 2 + e % 2; };
  const int unit = unit_of(thread());  // of all elements of this thread
  const bool is_unit = unit < me.width;
  for (int e = thread(); e < elements; e += S::THREADS) {
    const int column = column_of(e);
    const bool there = is_unit && column < me.count;
    const int64_t place = me.state(column, unit);
    direct[e] = there && a.dh_n ? number_at<Number>(a.dh_n, place) : 0.0f;
    gain[e] = h_at[e] = c_at[e] = 0.0f;
    dc[e] = S::C && there && a.dc_n ? number_at<Number>(a.dc_n, place) : 0.0f;
  }
  float units[S::U ? S::U : 1];
#pragma unroll
  for (int u = 0; u < S::U; ++u)
    units[u] = is_unit ? number_at<Number>(a.unit, (int64_t(me.recurrence) * S::U + u) * H +
                                                       me.origin + unit)
                       : 0.0f;
  Sum dunit[S::U ? S::U : 1];
  Total<S::PARTS != 0> dbias[BIASES];

  // Time goes against forward's; `before` is forward's step before.
  const auto time_of = [&](int step) { return me.reverse ? step : steps - 1 - step; };
  const auto has_before = [&](int step, int length) {
    return me.reverse ? step + 1 < length : time_of(step) > 0;
  };
  const int64_t line = int64_t(me.recurrence) * H;  // of a row of H numbers each recurrence
  const int alignment = alignment_of(a.gates, int64_t(H) * SIZE) |
                        alignment_of(a.extra, 0) | alignment_of(a.dy, 0) | alignment_of(a.y, 0) |
                        alignment_of(a.c_all, 0) | alignment_of(a.dc_all, 0) |
                        alignment_of(a.dgates, me.origin * SIZE);
  const auto on_its_way = [&](int step) {
    if (step < steps) {
      const int time = time_of(step);
      const int64_t now = int64_t(me.row(time)) * me.stride + line;
      const int64_t before =
          step + 1 < steps ? int64_t(me.row(time_of(step + 1))) * me.stride + line : 0;
      unsigned char* const to = stages + step % S::STAGES * room.columns * S::ROW_BACK;
      const auto pieces = [&](auto count, auto size, int place, const void* base, int64_t first,
                              bool of_before) {
        constexpr int COUNT = count.value, NUMBER = size.value, BYTES = UNITS * NUMBER;
        const auto* const from = static_cast<const unsigned char*>(base);
        each_piece<S, COUNT, BYTES>(
            me.count, me.width * NUMBER, alignment, [&](int row, int piece, int at, int grain) {
              const int length = lengths[row];
              if (time >= length || (of_before && !has_before(step, length))) return;
              const int64_t number =
                  (first + int64_t(row) * me.stride) * COUNT + int64_t(piece) * H + me.origin;
              fetch_bytes(to + row * S::ROW_BACK + place + piece * BYTES + at,
                          from + number * NUMBER + at, grain);
            });
      };
      if constexpr (Cell::KEEPS_GATES)
        pieces(Count<S::G>(), Count<SIZE>(), 0, a.gates, now, false);
      if constexpr (S::E > 0)
        pieces(Count<S::E>(), Count<SIZE>(), S::AT_EXTRA, a.extra, now, false);
      if (a.dy) pieces(Count<1>(), Count<SIZE>(), S::AT_DY, a.dy, now, false);
      if constexpr (S::READS_Y) pieces(Count<1>(), Count<SIZE>(), S::AT_H, a.y, before, true);
      if constexpr (S::C > 0) {
        pieces(Count<1>(), Count<4>(), S::AT_C, a.c_all, before, true);
        if (a.dc_all) pieces(Count<1>(), Count<4>(), S::AT_DC, a.dc_all, now, false);
      }
    }
    close();
  };
  const auto reset_of = [&](int step) { return step < steps && resets.look(time_of(step)); };

  meet();
#pragma unroll 1
  for (int step = 0; step < S::STAGES - 1; ++step) on_its_way(step);
  resets.put(0, reset_of(0));
  bool next_reset = reset_of(1);
  arrived<S::STAGES - 2>();
  exchange.begin();

  // Of all that dh of an element is: what was carried, and the product of the step behind.
  const auto dh_of = [&](int step, int e) {
    if (step == 0 || gain[e] == 0.0f) return direct[e];
    const auto* const from = reinterpret_cast<const float*>(exchange.sums(step - 1)) + e;
    float s = from[0];
#pragma unroll 4
    for (int p = 1; p < exchange.parts(); ++p) s += from[p * elements];
    return direct[e] + gain[e] * s;
  };

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (step > 0) exchange.take_sums(step - 1, elements);
    const int time = time_of(step);
    const int64_t now = int64_t(me.row(time)) * me.stride + line;
    unsigned char* const stage = stages + step % S::STAGES * room.columns * S::ROW_BACK;
    const bool lost = is_marked(exchange.lost);
    float biases[BIASES] = {};
#pragma unroll 1
    for (int e = thread(); e < elements; e += S::THREADS) {
      const int column = column_of(e), length = lengths[column];
      const bool there = is_unit && column < me.count, lives = there && time < length;
      const bool is_reset = there && resets.of(step, column), has = has_before(step, length);
      unsigned char* const row = stage + column * S::ROW_BACK;
      unsigned char* const mine = row + unit * SIZE;
      const float* const wide = reinterpret_cast<const float*>(row) + unit;
      const auto number = [&](bool is, int at) { return is ? widen(load<Number>(mine + at)) : 0.0f; };
      BackwardAt<S> at;
      float h_before = number(lives && S::READS_Y && has, S::AT_H);
      float c_before = lives && S::C > 0 && has ? wide[S::AT_C / 4] : 0.0f;
      if (lives && !has) {
        const int64_t place = me.state(column, unit);
        if (S::READS_Y && a.h_0) h_before = number_at<Number>(a.h_0, place);
        if (S::C > 0 && a.c_0) c_before = number_at<Number>(a.c_0, place);
      }
      // a sequence's last step: what forward left there
      const bool enters = lives && time == (me.reverse ? 0 : length - 1);
      const int64_t place = now + int64_t(column) * me.stride + me.origin + unit;
      at.h_after = !S::READS_Y ? 0.0f : enters ? number_at<Number>(a.y, place) : h_at[e];
      at.c_after[0] = S::C == 0 ? 0.0f : enters ? a.c_all[place] : c_at[e];
      const float dh = dh_of(step, e);
      at.dh_now = dh + number(lives && a.dy, S::AT_DY);
      at.dc_now[0] = dc[e] + (lives && S::C > 0 && a.dc_all ? wide[S::AT_DC / 4] : 0.0f);
#pragma unroll
      for (int g = 0; g < S::G; ++g)
        at.saves[g] = number(lives && Cell::KEEPS_GATES, g * S::UNIT);
#pragma unroll
      for (int k = 0; k < S::E; ++k) at.extras[k] = number(lives, S::AT_EXTRA + k * S::UNIT);
      at.h_before = is_reset ? 0.0f : h_before;
      at.c_before[0] = is_reset ? 0.0f : c_before;
#pragma unroll
      for (int u = 0; u < S::U; ++u) at.units[u] = units[u];
      if (lost) at.dh_now = bits_to_float(0x7fffffff);
      Cell::template backward<0>(at);
      float mask = 1.0f;
      if (a.h_mask && there) mask = number_at<Number>(a.h_mask, me.state(column, unit));
      if (lives) {
        h_at[e] = h_before, c_at[e] = c_before;
        direct[e] = is_reset ? 0.0f : at.dh_before;
        gain[e] = is_reset ? 0.0f : mask;
        dc[e] = is_reset ? 0.0f : at.dc_before[0];
#pragma unroll
        for (int u = 0; u < S::U; ++u) dunit[u].add(at.dunits[u]);
      } else {
        direct[e] = dh, gain[e] = 0.0f;
      }
#pragma unroll
      for (int g = 0; g < S::G; ++g) {
        const Number din = narrow<Number>(at.din[g]);
        const Number dproduct = narrow<Number>(lives ? at.dproduct[g] : 0.0f);
        if (lives) {
          biases[g] += widen(din);
          if (g >= S::G - Cell::APART) biases[g + Cell::APART] += widen(dproduct);
          store(mine + g * S::UNIT, din);
        }
        if (g >= S::G_HH) continue;
        if (there) {
          Number taken = dproduct;
          if constexpr (S::PARTS == 1) taken = round_tf32(taken);
          store(operand + column * S::PITCH + (g * UNITS + unit) * SIZE, taken);
        }
        if (S::DIFFERS && a.dproduct && lives)
          static_cast<Number*>(
              a.dproduct)[(place - me.origin - unit) * S::G_HH + g * H + me.origin + unit] = dproduct;
      }
    }
#pragma unroll
    for (int g = 0; g < BIASES; ++g) dbias[g].add(biases[g], step);
    meet();

    if (step < products) {
#pragma unroll 1
      for (int n = 0; n < columns / EIGHT; ++n) {
        const unsigned char* const from = operand + (n * EIGHT + me.g) * S::PITCH + 16 * me.q;
        Words4 b[S::PAIRS];
#pragma unroll
        for (int pair = 0; pair < S::PAIRS; ++pair) b[pair] = load<Words4>(from + pair * 64);
        const auto tiles = [&](int first, auto pair_of) {
          float d[S::TOGETHER][2][4] = {};
#pragma unroll
          for (int pair = 0; pair < S::PAIRS; ++pair)
#pragma unroll
            for (int m = 0; m < S::TOGETHER; ++m)
              weights.add(d[m][0], d[m][1], pair_of(m, pair), b[pair]);
#pragma unroll
          for (int m = 0; m < S::TOGETHER; ++m) {
            const int tile = me.warp + (first + m) * S::WARPS;
#pragma unroll
            for (int k = 0; k < 4; ++k) d[m][0][k] += d[m][1][k];
            if (tile < me.team * S::SUBS && !lost)
              exchange.hand_sums(step, tile, n, elements, d[m][0]);
          }
        };
#pragma unroll
        for (int first = 0; first < S::HELD_TILES; first += S::TOGETHER) {
          if (first >= room.tiles) break;
          tiles(first, [&](int m, int pair) { return weights.held[first + m][pair]; });
        }
#pragma unroll 1
        for (int first = S::HELD_TILES; first < room.tiles; first += S::TOGETHER)
          tiles(first, [&](int m, int pair) {
            return weights.load_rest((first - S::HELD_TILES + m) * S::PAIRS + pair);
          });
      }
    }
    // while the sums go round
    each_piece<S, S::G, S::UNIT>(
        me.count, me.width * SIZE, alignment, [&](int row, int piece, int at, int grain) {
          if (time >= lengths[row]) return;
          const int64_t number = (now + int64_t(row) * me.stride) * S::G + int64_t(piece) * H +
                                 me.origin;
          put_bytes(static_cast<unsigned char*>(a.dgates) + number * SIZE + at,
                    stage + row * S::ROW_BACK + piece * S::UNIT + at, grain);
        });
    on_its_way(step + S::STAGES - 1);
    resets.put(step + 1, next_reset);
    next_reset = reset_of(step + 2);
    arrived<S::STAGES - 2>();
    meet();
  }

  if (a.dh_0 && steps > 0) exchange.take_sums(steps - 1, elements);
  const bool lost = is_marked(exchange.lost);
  for (int e = thread(); e < elements; e += S::THREADS) {
    const int column = column_of(e);
    if (!is_unit || column >= me.count) continue;
    const float dh = lost ? bits_to_float(0x7fffffff) : dh_of(a.dh_0 ? steps : 0, e);
    if (a.dh_0) put_at<Number>(a.dh_0, me.state(column, unit), dh);
    if (S::C > 0 && a.dc_0) put_at<Number>(a.dc_0, me.state(column, unit), dc[e]);
  }
  exchange.end();

  // Over the sequences: threads of the same unit, in their order. Nobody needs the ring any more.
  auto* const totals = reinterpret_cast<float*>(stages);
  const auto leave = [&](float* to, int count, int which, float total) {
    if (!to) return;
    meet();
    totals[thread()] = total;
    meet();
    if (thread() >= me.width) return;
    float s = 0.0f;
#pragma unroll 1
    for (int k = 0; k < S::THREADS; ++k)
      if (unit_of(k) == thread()) s += totals[k];
    to[((int64_t(me.a.first / me.a.tile + me.tile) * a.R + me.recurrence) * count + which) * H +
       me.origin + thread()] = s;
  };
#pragma unroll
  for (int g = 0; g < BIASES; ++g) leave(a.dbias, BIASES, g, dbias[g].total());
#pragma unroll
  for (int u = 0; u < S::U; ++u) leave(a.dunit, S::U, u, dunit[u].total());
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

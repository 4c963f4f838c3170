// Backward by a team: its CTAs walk their sequences from the last step to the first, side by side.
//
// On the chip over time: the weights of a slice, the gates' gradients of its units as the operand of
// the product, what of dh and dc is carried past it. A step reads what backward.h's does, of a slice;
// what goes round is the product, to each CTA its units' part from everyone, H float32 a sequence,
// which it adds up in the order of the CTAs: the same bits every run. Two barriers of the CTA a step,
// in a grid three.
//
// A thread's elements are where a product's sums stand: number k of lane (g, q) is of unit 2 g + k / 2
// of a tile and of column 2 q + k % 2.
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
  // In a wave a layer takes its steps that many turns after the last one; what it is given in a turn
  // are sums of its own and of the layer above. The last product is that of dh_0.
  const int later = me.layers - 1 - me.layer;
  const bool has_upper = S::WAVE && later > 0, has_lower = S::WAVE && me.layer > 0;
  const int turns = steps > 0 ? steps + me.layers - 1 : 0, products = a.dh_0 ? turns : turns - 1;
  // two columns of a tile are a vector of each of eight lanes
  const int given = me.team * S::SUBS * ((me.count + 1) / 2) * EIGHT * 16;
  const int word = has_lower ? me.team * Exchange<S, ByCluster>::WORD : 0;
  const Exchange<S> exchange(me, room, memory, products, (has_upper ? 2 * given : given) + word);
  Resets<S> resets(me, reinterpret_cast<unsigned char*>(lengths + room.columns), room.columns);

  // Row tile m of this warp is number warp + WARPS m of all units: its row g is unit 2 g, and row g + 8
  // unit 2 g + 1, so that a load has both. The inner length are the slice's gates, one after another.
  Held<S, S::HELD_TILES, S::PAIRS> weights;
  weights.rest = memory + room.at_weights + thread() * 16;
  const auto fill = [&](auto& held, const auto& rows) {
    const auto words = [&](Words4& upper, Words4& lower, int m, int pair) {
      constexpr int NUMBERS = 16 / SIZE;
      const int lane = thread_again() & 31;
      const int unit = (me.warp + m * S::WARPS) * 16 + (lane >> 2) * 2;
      const int at = (pair * 64 + 16 * (lane & 3)) / SIZE;
      uint32_t first[NUMBERS], second[NUMBERS];
#pragma unroll
      for (int k = 0; k < NUMBERS; ++k) {
        const bool is = me.is_row(at + k) && unit < me.pitch;
        const auto both = load<Columns<Number>>(is ? rows(at + k) + unit : rows(0));
        if constexpr (SIZE == 2) {
          first[k] = is ? both.w[0] & 0xffff : 0, second[k] = is ? both.w[0] >> 16 : 0;
        } else {
          first[k] = is ? high(both.w[0]) : 0, second[k] = is ? high(both.w[1]) : 0;
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (SIZE == 2) {
          upper.w[j] = first[2 * j] | first[2 * j + 1] << 16;
          lower.w[j] = second[2 * j] | second[2 * j + 1] << 16;
        } else {
          upper.w[j] = first[j], lower.w[j] = second[j];
        }
      }
    };
    held.hold(words, room.tiles);
#pragma unroll 1
    for (int m = S::HELD_TILES; m < room.tiles; ++m)
#pragma unroll 1
      for (int pair = 0; pair < S::PAIRS; ++pair)
        held.rest_of(words, (m - S::HELD_TILES) * S::PAIRS + pair, m, pair);
  };
  fill(weights, [&](int row) { return me.weights(row); });
  Held<S, S::WAVE ? S::HELD_TILES : 1, S::WAVE ? S::PAIRS : 1> input_weights;
  if constexpr (S::WAVE) {
    input_weights.rest = weights.rest + room.weights;
    if (has_lower) fill(input_weights, [&](int row) { return me.input_weights(row); });
  }

  for (int k = thread() * 16; k < room.operand * (S::WAVE ? 2 : 1); k += S::THREADS * 16)
    store(operand + k, Words4{});
  if (thread() == 0) *reinterpret_cast<int32_t*>(memory + AT_LOST) = 0;
  for (int column = thread(); column < room.columns; column += S::THREADS)
    lengths[column] = me.length(column);

  const auto unit_of = [](int e) {
    return (e >> 7) % S::SUBS * 16 + (e >> 4 & 7) * 2 + (e >> 1 & 1);
  };
  const auto column_of = [](int e) {
    return int(unsigned(e) / (128 * S::SUBS)) * 8 + (e >> 2 & 3) * 2 + (e & 1);
  };
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
    units[u] = is_unit ? number_at<Number>(a.unit, me.unit_of(me.place, S::U, u, unit)) : 0.0f;
  Sum dunit[S::U ? S::U : 1];
  Total<S::PARTS != 0> dbias[BIASES];

  // Time goes against forward's; `before` is forward's step before.
  const auto time_of = [&](int step) { return me.reverse ? step : steps - 1 - step; };
  const auto has_before = [&](int step, int length) {
    return me.reverse ? step + 1 < length : time_of(step) > 0;
  };
  const int64_t line = int64_t(me.recurrence) * H;  // of a row of H numbers each recurrence
  // of the last layer of a wave alone, where its rows stand as in a single layer
  const void* const dy = has_upper ? nullptr : a.dy;
  const float* const dc_all = has_upper ? nullptr : a.dc_all;
  const int64_t below = int64_t(me.layer) * a.rows * me.stride;
  const int alignment = alignment_of(a.gates, int64_t(H) * SIZE) |
                        alignment_of(a.extra, 0) | alignment_of(a.dy, 0) | alignment_of(a.y, 0) |
                        alignment_of(a.c_all, 0) | alignment_of(a.dc_all, 0) |
                        alignment_of(a.dgates, me.origin * SIZE);
  const auto on_its_way = [&](int step) {
    if (step >= 0 && step < steps) {
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
      if (dy) pieces(Count<1>(), Count<SIZE>(), S::AT_DY, dy, now - below, false);
      if constexpr (S::READS_Y) pieces(Count<1>(), Count<SIZE>(), S::AT_H, a.y, before, true);
      if constexpr (S::C > 0) {
        pieces(Count<1>(), Count<4>(), S::AT_C, a.c_all, before, true);
        if (dc_all) pieces(Count<1>(), Count<4>(), S::AT_DC, dc_all, now - below, false);
      }
    }
    close();
  };
  const auto reset_of = [&](int step) {
    return step >= 0 && step < steps && resets.look(time_of(step));
  };

  meet();
#pragma unroll 1
  for (int turn = 0; turn < S::STAGES - 1; ++turn) on_its_way(turn - later);
  resets.put(-later, reset_of(-later));
  bool next_reset = reset_of(1 - later);
  arrived<S::STAGES - 2>();
  exchange.begin();

  // Of all that dh of an element is: what was carried, and the product of the step behind.
  const auto sum_of = [&](const unsigned char* sums, int e) {
    const auto* const from = reinterpret_cast<const float*>(sums) + e;
    float s = from[0];
#pragma unroll 4
    for (int p = 1; p < exchange.parts(); ++p) s += from[p * elements];
    return s;
  };
  const auto dh_of = [&](int turn, int e) {
    if (turn == 0 || gain[e] == 0.0f) return direct[e];
    return direct[e] + gain[e] * sum_of(exchange.sums(turn - 1), e);
  };

#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    const int step = turn - later;
    const bool walks = !S::WAVE || (step >= 0 && step < steps);
    if (turn > 0) exchange.take_sums(turn - 1, elements);
    const int time = time_of(walks ? step : 0);
    const int64_t now = int64_t(me.row(time)) * me.stride + line;
    unsigned char* const stage =
        stages + unsigned(step) % S::STAGES * room.columns * S::ROW_BACK;
    const bool lost = is_marked(exchange.lost);
    float biases[BIASES] = {};
#pragma unroll 1
    for (int e = thread(); e < elements; e += S::THREADS) {
      const int column = column_of(e);
      unsigned char* const row = stage + column * S::ROW_BACK;
      unsigned char* const mine = row + unit * SIZE;
      const float* const wide = reinterpret_cast<const float*>(row) + unit;
      // All loads come first, so that they are on their way together; of what is not there anything.
      Number saved[S::G], extras[S::E ? S::E : 1], of_h, of_y;
      float of_c, of_dc;
      if constexpr (Cell::KEEPS_GATES) {
#pragma unroll
        for (int g = 0; g < S::G; ++g) saved[g] = load<Number>(mine + g * S::UNIT);
      }
#pragma unroll
      for (int k = 0; k < S::E; ++k) extras[k] = load<Number>(mine + S::AT_EXTRA + k * S::UNIT);
      of_y = load<Number>(mine + S::AT_DY);
      if constexpr (S::READS_Y) of_h = load<Number>(mine + S::AT_H);
      if constexpr (S::C > 0) of_c = wide[S::AT_C / 4], of_dc = wide[S::AT_DC / 4];
      const float h_kept = S::READS_Y ? h_at[e] : 0.0f, c_kept = S::C ? c_at[e] : 0.0f;
      const float dc_kept = S::C ? dc[e] : 0.0f, dh = dh_of(turn, e);
      const int length = lengths[column];
      const bool there = is_unit && column < me.count, lives = there && walks && time < length;
      const bool is_reset = there && resets.of(step, column), has = has_before(step, length);
      const int64_t place = now + int64_t(column) * me.stride + me.origin + unit;
      BackwardAt<S> at;
      float h_before = 0.0f, c_before = 0.0f;
      if constexpr (S::READS_Y) h_before = has ? widen(of_h) : 0.0f;
      if constexpr (S::C > 0) c_before = has ? of_c : 0.0f;
      if (lives && !has) {
        const int64_t state = me.state(column, unit);
        if (S::READS_Y && a.h_0) h_before = number_at<Number>(a.h_0, state);
        if (S::C > 0 && a.c_0) c_before = number_at<Number>(a.c_0, state);
      }
      at.h_after = h_kept, at.c_after[0] = c_kept;
      if (lives && time == (me.reverse ? 0 : length - 1)) {  // the last: what forward left there
        if constexpr (S::READS_Y) at.h_after = number_at<Number>(a.y, place);
        if constexpr (S::C > 0) at.c_after[0] = a.c_all[place];
      }
      at.dh_now = dy ? dh + widen(of_y) : dh;
      if constexpr (S::WAVE)
        if (has_upper && lives) at.dh_now += sum_of(exchange.sums(turn - 1, true), e);
      at.dc_now[0] = dc_kept;
      if constexpr (S::C > 0)
        if (dc_all) at.dc_now[0] += of_dc;
#pragma unroll
      for (int g = 0; g < S::G; ++g) at.saves[g] = Cell::KEEPS_GATES ? widen(saved[g]) : 0.0f;
#pragma unroll
      for (int k = 0; k < S::E; ++k) at.extras[k] = widen(extras[k]);
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
        const auto take = [&](unsigned char* to, Number taken) {
          if constexpr (S::PARTS == 1) taken = round_tf32(taken);
          store(to + column * S::PITCH + (g * UNITS + unit) * SIZE, taken);
        };
        if (there) take(operand, dproduct);
        if constexpr (S::WAVE)
          if (there && has_lower)
            take(operand + room.operand, narrow<Number>(lives ? at.din[g] : 0.0f));
        if (S::DIFFERS && a.dproduct && lives)
          static_cast<Number*>(
              a.dproduct)[(place - me.origin - unit) * S::G_HH + g * H + me.origin + unit] = dproduct;
      }
    }
#pragma unroll
    for (int g = 0; g < BIASES; ++g) dbias[g].add(biases[g], step);
    meet();
    if constexpr (S::WAVE)
      if (has_upper && turn < products && !lost) exchange.hand_word(turn, me.layer + 1);

    const auto multiply = [&](const auto& held, const unsigned char* operand, bool below) {
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
              held.add(d[m][0], d[m][1], pair_of(m, pair), b[pair]);
#pragma unroll
          for (int m = 0; m < S::TOGETHER; ++m) {
            const int tile = me.warp + (first + m) * S::WARPS;
#pragma unroll
            for (int k = 0; k < 4; ++k) d[m][0][k] += d[m][1][k];
            if (tile >= me.team * S::SUBS || lost) continue;
            exchange.hand_sums(turn, tile, n, elements, d[m][0], below);
          }
        };
#pragma unroll
        for (int first = 0; first < S::HELD_TILES; first += S::TOGETHER) {
          if (first >= room.tiles) break;
          tiles(first, [&](int m, int pair) { return held.held[first + m][pair]; });
        }
#pragma unroll 1
        for (int first = S::HELD_TILES; first < room.tiles; first += S::TOGETHER)
          tiles(first, [&](int m, int pair) {
            return held.load_rest((first - S::HELD_TILES + m) * S::PAIRS + pair);
          });
      }
    };
    if (turn < products) {
      multiply(weights, operand, false);
      if constexpr (S::WAVE)
        if (has_lower) multiply(input_weights, operand + room.operand, true);
    }
    // while the sums go round
    each_piece<S, S::G, S::UNIT>(
        me.count, me.width * SIZE, alignment, [&](int row, int piece, int at, int grain) {
          if (!walks || time >= lengths[row]) return;
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

  if (a.dh_0 && turns > 0) exchange.take_sums(turns - 1, elements);
  const bool lost = is_marked(exchange.lost);
  for (int e = thread(); e < elements; e += S::THREADS) {
    const int column = column_of(e);
    if (!is_unit || column >= me.count) continue;
    const float dh = lost ? bits_to_float(0x7fffffff) : dh_of(a.dh_0 ? turns : 0, e);
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
    const int tile = int(a.first / a.tile) + me.tile;
    to[me.unit_of(tile * int(a.R) * me.layers + me.place, count, which, thread())] = s;
  };
#pragma unroll
  for (int g = 0; g < BIASES; ++g) leave(a.dbias, BIASES, g, dbias[g].total());
#pragma unroll
  for (int u = 0; u < S::U; ++u) leave(a.dunit, S::U, u, dunit[u].total());
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

// Forward by a team: its CTAs walk their sequences from the first step to the last, side by side.
//
// On the chip over time: the weights of a slice, h_{t-1} of all units as the operand of the product,
// the states of the slice. A step reads G*UNITS input products of a sequence and writes what forward.h's
// does; what goes round is h, H numbers of a sequence to each CTA. Two barriers of the CTA a step, in a
// grid three.
#pragma once
#include "exchange.h"

namespace fastseq {
namespace FASTSEQ_ISA {

template <class S, class Cell>
DEVICE void team_forward(const Arguments& a) {
  using Number = typename S::Number;
  constexpr int SIZE = S::SIZE, UNITS = S::UNITS, SPLIT = S::SPLIT, TILES = S::TILES;
  const Member<S> me(a);
  unsigned char* const memory = shared();
  const Room room = forward_room<S>(me.team, int(a.tile));
  auto* const sums = reinterpret_cast<float*>(memory + room.at_sums);
  auto* const states = reinterpret_cast<float*>(memory + room.at_states);
  auto* const others = states + room.columns * UNITS;
  auto* const lengths = reinterpret_cast<int32_t*>(memory + room.at_lengths);
  unsigned char* const stages = memory + room.at_stages;
  const int H = me.H, steps = me.length(0), part = me.warp % SPLIT, tile = me.warp / SPLIT * TILES;
  const int elements = me.count * UNITS, columns = up_to(me.count, EIGHT);
  // In a wave a layer takes its steps that many turns after the first; what it is given in a turn is
  // h of its own and of the layer below.
  const int turns = steps > 0 ? steps + me.layers - 1 : 0;
  const bool is_upper = S::WAVE && me.layer > 0, has_upper = S::WAVE && me.layer + 1 < me.layers;
  const int given = (is_upper ? 2 : 1) * me.team * me.count * S::UNIT;
  const int word = has_upper ? me.team * Exchange<S, ByCluster>::WORD : 0;
  const Exchange<S> exchange(me, room, memory, turns - 1, given + word);

  Held<S, TILES, S::HELD> weights;
  weights.rest = memory + room.at_weights + thread() * 16;
  const auto fill = [&](auto& held, const auto& rows) {
    const auto words = [&](Words4& upper, Words4& lower, int m, int pair) {
      const int row = (tile + m) * 16 + me.g, at = ((pair * SPLIT + part) * 64 + 16 * me.q) / SIZE;
      const auto of = [&](int row) {
        const bool is = me.is_row(row) && at < me.pitch;
        return weight_words<S>(is, load<Words4>(is ? rows(row) + at : rows(0)));
      };
      upper = of(row), lower = of(row + 8);
    };
    held.hold(words, TILES);
#pragma unroll 1
    for (int pair = S::HELD; pair < room.pairs; ++pair)
#pragma unroll 1
      for (int m = 0; m < TILES; ++m)
        held.rest_of(words, (pair - S::HELD) * TILES + m, m, pair);
  };
  fill(weights, [&](int row) { return me.weights(row); });
  Held<S, S::WAVE ? TILES : 1, S::WAVE ? S::HELD : 1> input_weights;
  if constexpr (S::WAVE) {
    input_weights.rest = weights.rest + room.weights;
    if (is_upper) fill(input_weights, [&](int row) { return me.input_weights(row); });
  }

  // all of h_0 as the first operand; where nothing is written, zeros
  constexpr int OPERANDS = S::By::OPERANDS * (S::WAVE ? 2 : 1);
  for (int k = thread() * 16; k < OPERANDS * room.operand; k += S::THREADS * 16)
    store(memory + room.at_operands + k, Words4{});
  if (thread() == 0) *reinterpret_cast<int32_t*>(memory + AT_LOST) = 0;
  for (int column = thread(); column < room.columns; column += S::THREADS)
    lengths[column] = me.length(column);
  meet();
  const auto put_number = [&](unsigned char* to, float v) {
    if constexpr (S::PARTS == 1) v = round_tf32(v);
    store(to, narrow<Number>(v));
  };
  for (int k = thread(); a.h_0 && k < me.count * H; k += S::THREADS) {
    const int column = k / H, unit = k % H;
    const int64_t place = me.state(column, unit - me.origin);
    float v = number_at<Number>(a.h_0, place);
    if (a.h_mask) v = widen(narrow<Number>(v * number_at<Number>(a.h_mask, place)));
    put_number(exchange.operand(-1) + column * room.pitch + unit * SIZE, v);
  }
  for (int e = thread(); e < elements; e += S::THREADS) {
    const int column = int(unsigned(e) / UNITS), unit = e % UNITS;
    const bool there = unit < me.width;
    const int64_t place = me.state(column, unit);
    states[e] = there && a.h_0 ? number_at<Number>(a.h_0, place) : 0.0f;
    if (S::C > 0) others[e] = there && a.c_0 ? number_at<Number>(a.c_0, place) : 0.0f;
  }
  // a thread's elements are all of one unit
  const int unit = thread() % UNITS;
  const bool is_unit = unit < me.width;
  float units[S::U ? S::U : 1], bias[S::G_HH];
#pragma unroll
  for (int u = 0; u < S::U; ++u)
    units[u] = is_unit ? number_at<Number>(a.unit, me.unit_of(me.place, S::U, u, unit)) : 0.0f;
#pragma unroll
  for (int g = S::G_HH - Cell::APART; g < S::G_HH; ++g)
    bias[g] = is_unit && a.b_hh
                  ? number_at<Number>(a.b_hh, me.unit_of(me.place, S::G_HH, g, unit))
                  : 0.0f;
  float input_bias[S::WAVE ? S::G : 1];
  if constexpr (S::WAVE) {
#pragma unroll
    for (int g = 0; g < S::G; ++g)
      input_bias[g] =
          is_upper && is_unit && a.b_ih
              ? number_at<Number>(a.b_ih, me.unit_of(me.place - int(a.R), S::G, g, unit))
              : 0.0f;
  }

  const auto time_of = [&](int step) { return me.reverse ? steps - 1 - step : step; };
  const int64_t pitch = int64_t(me.stride) * (S::G * SIZE);  // of a row of gates
  auto* const gates = static_cast<unsigned char*>(a.gates) +
                      (int64_t(me.recurrence) * S::G * H + me.origin) * SIZE;
  const int alignment = alignment_of(gates, int64_t(H) * SIZE);
  const auto on_its_way = [&](int step) {
    if (step >= 0 && step < steps && !is_upper) {
      const int time = time_of(step);
      const unsigned char* const from = gates + me.row(time) * pitch;
      unsigned char* const to = stages + step % S::STAGES * room.columns * S::ROW;
      each_piece<S, S::G, S::UNIT>(
          me.count, me.width * SIZE, alignment, [&](int row, int piece, int at, int grain) {
            if (time < lengths[row])
              fetch_bytes(to + row * S::ROW + piece * S::UNIT + at,
                          from + row * pitch + piece * H * SIZE + at, grain);
          });
    }
    close();
  };
  Resets<S> resets(me, reinterpret_cast<unsigned char*>(lengths + room.columns), room.columns);
  const auto reset_of = [&](int step) {
    return step >= 0 && step < steps && resets.look(time_of(step));
  };

#pragma unroll 1
  for (int step = 0; step < S::STAGES - 1; ++step) on_its_way(step);
  resets.put(-me.layer, reset_of(-me.layer));
  bool next_reset = reset_of(1 - me.layer);
  exchange.begin();

  // Columns of an operand times a matrix, into sums: of the columns 2 q and 2 q + 1, rows g and g + 8
  // of each tile.
  const auto multiply = [&](const auto& held, const unsigned char* operand, float* sums) {
    operand += me.g * room.pitch + part * 64 + 16 * me.q;
#pragma unroll 1
    for (int n = 0; n < columns; n += EIGHT) {
      constexpr int CHAINS = TILES >= 3 ? 1 : 2;
      float chain[TILES][2 * CHAINS][4] = {};
      const unsigned char* const from = operand + n * room.pitch;
#pragma unroll
      for (int first = 0; first < S::HELD; first += S::BLOCK) {
        if (first >= room.pairs) break;
        Words4 b[S::BLOCK];
#pragma unroll
        for (int k = 0; k < S::BLOCK; ++k) b[k] = load<Words4>(from + (first + k) * SPLIT * 64);
#pragma unroll
        for (int k = 0; k < S::BLOCK; ++k)
#pragma unroll
          for (int m = 0; m < TILES; ++m)
            held.add(chain[m][k % CHAINS * 2], chain[m][k % CHAINS * 2 + 1],
                     held.held[m][first + k], b[k]);
      }
#pragma unroll 2
      for (int pair = S::HELD; pair < room.pairs; ++pair) {
        const Words4 b = load<Words4>(from + pair * SPLIT * 64);
#pragma unroll
        for (int m = 0; m < TILES; ++m)
          held.add(chain[m][0], chain[m][1], held.load_rest((pair - S::HELD) * TILES + m), b);
      }
      float* const to = sums + (part * room.columns + n + 2 * me.q) * S::SUMS + tile * 16 + me.g;
#pragma unroll
      for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float s = chain[m][0][j];
#pragma unroll
          for (int c = 1; c < 2 * CHAINS; ++c) s += chain[m][c][j];
          to[(j & 1) * S::SUMS + m * 16 + (j >> 1) * 8] = s;
        }
    }
  };

#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    const int step = turn - me.layer;
    const bool walks = !S::WAVE || (step >= 0 && step < steps);
    if (turn > 0) exchange.take_h(turn - 1);
    multiply(weights, exchange.operand(turn - 1), sums);
    if constexpr (S::WAVE)
      if (is_upper)
        multiply(input_weights, exchange.operand(turn - 1, true), sums + room.sums / 4);
    arrived<S::STAGES - 2>();
    meet();

    const int time = time_of(walks ? step : 0), first_row = me.row(time);
    const unsigned char* const stage =
        stages + unsigned(step) % S::STAGES * room.columns * S::ROW;
    unsigned char* const page_of_h = memory + room.at_pages + me.warp * (S::PAGE * 4);
    const bool lost = is_marked(exchange.lost);
    if constexpr (S::WAVE)
      if (is_upper && turn + 1 < turns && !lost) exchange.hand_word(turn, me.layer - 1);
#pragma unroll 1
    for (int page = me.warp; page * S::PAGE < elements; page += S::WARPS) {
      const int e = page * S::PAGE + me.lane, column = int(unsigned(e) / UNITS);
      // All loads come first, so that they are on their way together; of what is not there anything.
      const unsigned char* const mine = stage + column * S::ROW + unit * SIZE;
      const float* const sum = sums + column * S::SUMS + unit;
      Number in[S::G];
      float parts[S::G_HH][SPLIT];
#pragma unroll
      for (int g = 0; g < S::G; ++g) in[g] = load<Number>(mine + g * S::UNIT);
#pragma unroll
      for (int g = 0; g < S::G_HH; ++g)
#pragma unroll
        for (int p = 0; p < SPLIT; ++p) parts[g][p] = sum[p * room.columns * S::SUMS + g * UNITS];
      const float h_before = states[e], c_before = S::C ? others[e] : 0.0f;
      const bool there = is_unit && column < me.count;
      const bool lives = there && walks && time < lengths[column];
      const bool is_reset = there && resets.of(step, column);
      ForwardAt<S> at;
#pragma unroll
      for (int g = 0; g < S::G; ++g) at.in[g] = widen(in[g]);
      if constexpr (S::WAVE)
        if (is_upper) {
#pragma unroll
          for (int g = 0; g < S::G; ++g) {
            float s = input_bias[g];
#pragma unroll
            for (int p = 0; p < SPLIT; ++p)
              s += sum[room.sums / 4 + p * room.columns * S::SUMS + g * UNITS];
            at.in[g] = s;
          }
        }
#pragma unroll
      for (int g = 0; g < S::G_HH; ++g) {
        float s = parts[g][0];
#pragma unroll
        for (int p = 1; p < SPLIT; ++p) s += parts[g][p];
        s = is_reset ? 0.0f : s;
        at.product[g] = g >= S::G_HH - Cell::APART ? s + bias[g] : s;
      }
      at.h_before = is_reset ? 0.0f : h_before;
      at.c_before[0] = is_reset ? 0.0f : c_before;
#pragma unroll
      for (int u = 0; u < S::U; ++u) at.units[u] = units[u];
      Cell::template forward<0>(at);
      if (lost) at.h_after = bits_to_float(0x7fffffff);
      const Number rounded_h = narrow<Number>(at.h_after);
      const float h = lives ? widen(rounded_h) : there ? h_before : 0.0f;
      if (turn + 1 < turns) {
        const auto put = [&](float handed) {
          put_number(page_of_h + me.lane * SIZE, handed);
          meet_warp();
        };
        float handed = h;
        if (a.h_mask && there) handed *= number_at<Number>(a.h_mask, me.state(column, unit));
        put(handed);
        if (!lost) exchange.hand_h(turn, page, page_of_h);
        meet_warp();
        if constexpr (S::WAVE)
          if (has_upper) {
            if (a.h_mask) put(h);
            if (!lost) exchange.hand_h(turn, page, page_of_h, true);
            meet_warp();
          }
      }
      if (!lives) continue;
      states[e] = h;
      if constexpr (S::C > 0) others[e] = at.c_after[0];
      // of a wave that saves nothing the last layer's y is all that is asked for
      if (has_upper && !a.save) continue;
      const int row = S::WAVE && !a.save ? me.row_of_layer(time) : first_row;
      const int64_t place = int64_t(row) * me.stride + me.beside(column, unit);
      static_cast<Number*>(a.y)[place] = rounded_h;
      if constexpr (S::C > 0)
        if (a.c_all) a.c_all[place] = at.c_after[0];
      if (!a.save) continue;
      // of a row's numbers each recurrence there are G H, and E H
      const int64_t before = place - me.origin - unit;
      if constexpr (Cell::KEEPS_GATES) {
#pragma unroll
        for (int g = 0; g < S::G; ++g)
          put_at<Number>(a.gates, before * S::G + g * H + me.origin + unit, at.saves[g]);
      }
#pragma unroll
      for (int k = 0; k < S::E; ++k)
        put_at<Number>(a.extra, before * S::E + k * H + me.origin + unit, at.extras[k]);
    }
    // while h goes round: into the place that was read in the step before this
    on_its_way(step + S::STAGES - 1);
    resets.put(step + 1, next_reset);
    next_reset = reset_of(step + 2);
  }

  for (int e = thread(); e < elements; e += S::THREADS) {
    const int column = int(unsigned(e) / UNITS);
    if (!is_unit) continue;
    put_at<Number>(a.h_n, me.state(column, unit), states[e]);
    if constexpr (S::C > 0) put_at<Number>(a.c_n, me.state(column, unit), others[e]);
  }
  exchange.end();
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

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

template <int COUNT>
struct alignas(4 * COUNT) States {  // of an element, loaded and stored as one
  float of[COUNT];
};

template <class S, class Cell>
DEVICE void team_forward(const Arguments& a) {
  using Number = typename S::Number;
  constexpr int SIZE = S::SIZE, UNITS = S::UNITS, SPLIT = S::SPLIT, TILES = S::TILES;
  const Member<S> me(a);
  unsigned char* const memory = shared();
  const Room room = forward_room<S>(me.team, int(a.tile));
  auto* const sums = reinterpret_cast<float*>(memory + room.at_sums);
  auto* const states = reinterpret_cast<float*>(memory + room.at_states);
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
  const Exchange<S> exchange(me, room, memory, turns - 1, given + word, false);

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
    states[e * S::STATES] = there && a.h_0 ? number_at<Number>(a.h_0, place) : 0.0f;
    if (S::C > 0)
      states[e * S::STATES + 1] = there && a.c_0 ? number_at<Number>(a.c_0, place) : 0.0f;
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

  const Steps<S> in_time(me, steps, me.reverse, S::WAVE && !a.save ? 0 : me.layer);
  const auto time_of = [&](int step) { return in_time.time(step); };
  const int pitch = me.stride * (S::G * SIZE);  // of a row of gates
  auto* const gates = static_cast<unsigned char*>(a.gates) +
                      (int64_t(me.recurrence) * S::G * H + me.origin) * SIZE;
  const int alignment = alignment_of(gates, int64_t(H) * SIZE), bytes = me.width * SIZE;
  const bool in_vectors = (alignment | bytes) % 16 == 0;
  Vectors<S, S::G * S::UNIT / 16> vectors(stages, S::ROW);
  if (in_vectors && !is_upper)
    vectors.template of<S::G, S::UNIT>(gates, pitch, int64_t(H) * SIZE, bytes, 0);
  vectors.keep();
  const int ring = spared<S>(room.columns * S::ROW);
  const auto on_its_way = [&](int step) {
    if (step >= 0 && step < steps && !is_upper) {
      const int time = time_of(step), first = in_time.row(step);
      const int stage = step % S::STAGES * ring;
      if (in_vectors)
        vectors.each(me.count, first, stage, [&](int row, unsigned char* to, const void* from) {
          if (time < lengths[row]) copy<16>(to, from);
        });
      else
        each_piece<S, S::G>(
            me.count, bytes, alignment, [&](int row, int piece, int at, int grain) {
              if (time < lengths[row])
                fetch_bytes(stages + stage + row * S::ROW + piece * S::UNIT + at,
                            gates + int64_t(first + row) * pitch + piece * H * SIZE + at, grain);
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
  // of each tile. So many tiles of columns at once.
  const auto multiply_some = [&](auto count, const auto& held, const unsigned char* from,
                                 float* to) {
    constexpr int COUNT = count.value;
    constexpr int CHAINS = TILES * COUNT > 1 ? 1 : 2;  // enough for the two warps of a scheduler
    float chain[COUNT][TILES][2 * CHAINS][4] = {};
#pragma unroll
    for (int first = 0; first < S::HELD; first += S::BLOCK) {
      if (first > 0 && first >= room.pairs) break;  // the first there always is
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
        Words4 b[S::BLOCK];
#pragma unroll
        for (int k = 0; k < S::BLOCK; ++k)
          b[k] = load<Words4>(from + n * EIGHT * room.pitch + (first + k) * SPLIT * 64);
#pragma unroll
        for (int k = 0; k < S::BLOCK; ++k)
#pragma unroll
          for (int m = 0; m < TILES; ++m)
            held.add(chain[n][m][k % CHAINS * 2], chain[n][m][k % CHAINS * 2 + 1],
                     held.held[m][first + k], b[k]);
      }
    }
#pragma unroll(COUNT > 1 ? 1 : 2)
    for (int pair = S::HELD; pair < room.pairs; ++pair) {
      Words4 b[COUNT];
#pragma unroll
      for (int n = 0; n < COUNT; ++n)
        b[n] = load<Words4>(from + n * EIGHT * room.pitch + pair * SPLIT * 64);
#pragma unroll
      for (int m = 0; m < TILES; ++m) {
        const auto w = held.load_rest((pair - S::HELD) * TILES + m);
#pragma unroll
        for (int n = 0; n < COUNT; ++n) held.add(chain[n][m][0], chain[n][m][1], w, b[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
#pragma unroll
      for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float s = chain[n][m][0][j];
#pragma unroll
          for (int c = 1; c < 2 * CHAINS; ++c) s += chain[n][m][c][j];
          to[(n * EIGHT + (j & 1)) * S::SUMS + m * 16 + (j >> 1) * 8] = s;
        }
  };
  const auto multiply = [&](const auto& held, const unsigned char* operand, float* sums) {
    operand += me.g * room.pitch + part * 64 + 16 * me.q;
    sums += 2 * me.q * S::SUMS + part * S::ROWS + tile * 16 + me.g;
    int n = 0;
    if constexpr (S::COLUMNS > 1) {
#pragma unroll 1
      for (; n + EIGHT < columns; n += 2 * EIGHT)
        multiply_some(Count<2>(), held, operand + n * room.pitch, sums + n * S::SUMS);
    }
#pragma unroll 1
    for (; n < columns; n += EIGHT)
      multiply_some(Count<1>(), held, operand + n * room.pitch, sums + n * S::SUMS);
  };

  // A thread's elements are of every AT_ONCE-th column from its first on. Where they stand is the same
  // at every step.
  constexpr int AT_ONCE = S::THREADS / UNITS;
  const int first_column = thread() / UNITS;
  float* const my_sums = kept(sums + first_column * S::SUMS + unit);
  float* const my_states = spared<S>(states + thread() * S::STATES);
  const unsigned char* const my_stage = kept(stages + first_column * S::ROW + unit * SIZE);
  unsigned char* const page_of_h = memory + room.at_pages + me.warp * (S::PAGE * SIZE);
  unsigned char* const my_h = kept(page_of_h + me.lane * SIZE);
  const int my_place = spared<S>(int(me.beside(first_column, unit)));
  enum { RESET = 1, MASK = 2, SAVE = 4, C_ALL = 8 };
  const int asked = spared<S>((a.reset ? RESET : 0) | (a.h_mask ? MASK : 0) |
                              (a.save ? SAVE : 0) | (a.c_all ? C_ALL : 0));

  // The step's time and first row, found in the step before.
  const auto in_range = [&](int step) { return !S::WAVE || (step >= 0 && step < steps) ? step : 0; };
  int time = time_of(in_range(-me.layer)), row = turns > 0 ? in_time.row(in_range(-me.layer)) : 0;

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

    const unsigned char* mine = my_stage + unsigned(step) % S::STAGES * ring;
    const float* sum = my_sums;
    float* state = my_states;
    int64_t place = int64_t(row) * me.stride + my_place;
    const bool lost = is_marked(exchange.lost);
    if constexpr (S::WAVE)
      if (is_upper && turn + 1 < turns && !lost) exchange.hand_word(turn, me.layer - 1);
    int column = first_column;
#pragma unroll 1
    for (int page = me.warp; page * S::PAGE < elements; page += S::WARPS) {
      // All loads come first, so that they are on their way together; of what is not there anything.
      Number in[S::G];
      float parts[S::G_HH][SPLIT];
#pragma unroll
      for (int g = 0; g < S::G_HH; ++g)
#pragma unroll
        for (int p = 0; p < SPLIT; ++p) parts[g][p] = sum[p * S::ROWS + g * UNITS];
#pragma unroll
      for (int g = 0; g < S::G; ++g) in[g] = load<Number>(mine + g * S::UNIT);
      const auto before = load<States<S::STATES>>(state);
      const float h_before = before.of[0], c_before = S::C ? before.of[S::C] : 0.0f;
      const int length = lengths[column];
      const bool there = is_unit && column < me.count, lives = there && walks && time < length;
      bool is_reset = false;
      if (asked & RESET) is_reset = there && resets.of(step, column);
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
              s += sum[room.sums / 4 + p * S::ROWS + g * UNITS];
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
          put_number(my_h, handed);
          meet_warp();
        };
        float handed = h;
        if ((asked & MASK) && there)
          handed *= number_at<Number>(a.h_mask, me.state(column, unit));
        put(handed);
        if (!lost) exchange.hand_h(turn, page, page_of_h);
        meet_warp();
        if constexpr (S::WAVE)
          if (has_upper) {
            if (asked & MASK) put(h);
            if (!lost) exchange.hand_h(turn, page, page_of_h, true);
            meet_warp();
          }
      }
      // of a wave that saves nothing the last layer's y is all that is asked for
      if (lives) {
        States<S::STATES> after{{h}};
        if constexpr (S::C > 0) after.of[1] = at.c_after[0];
        store(state, after);
        if (!has_upper || (asked & SAVE)) {
          static_cast<Number*>(a.y)[place] = rounded_h;
          if constexpr (S::C > 0)
            if (asked & C_ALL) a.c_all[place] = at.c_after[0];
        }
        if (asked & SAVE) {
          // of a row's numbers each recurrence there are G H, and E H
          const int64_t line = place - me.origin - unit;
          if constexpr (Cell::KEEPS_GATES) {
#pragma unroll
            for (int g = 0; g < S::G; ++g)
              put_at<Number>(a.gates, line * S::G + g * H + me.origin + unit, at.saves[g]);
          }
#pragma unroll
          for (int k = 0; k < S::E; ++k)
            put_at<Number>(a.extra, line * S::E + k * H + me.origin + unit, at.extras[k]);
        }
      }
      column += AT_ONCE, mine += AT_ONCE * S::ROW, sum += AT_ONCE * S::SUMS;
      state += S::THREADS * S::STATES, place += AT_ONCE * me.stride;
    }
    // while h goes round: into the place that was read in the step before this
    if (turn > 0) exchange.again(turn - 1);
    on_its_way(step + S::STAGES - 1);
    if (turn + 1 < turns) time = time_of(in_range(step + 1)), row = in_time.row(in_range(step + 1));
    if (asked & RESET) {
      resets.put(step + 1, next_reset);
      next_reset = reset_of(step + 2);
    }
  }

  const Member<S> you = Member<S>::again(a);
  const int last_unit = thread_again() % UNITS;
  for (int e = thread_again(); e < you.count * UNITS; e += S::THREADS) {
    const int column = int(unsigned(e) / UNITS);
    if (last_unit >= you.width) continue;
    put_at<Number>(a.h_n, you.state(column, last_unit), states[e * S::STATES]);
    if constexpr (S::C > 0)
      put_at<Number>(a.c_n, you.state(column, last_unit), states[e * S::STATES + 1]);
  }
  exchange.end();
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

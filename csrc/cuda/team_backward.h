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

// What an element carries to the next step: of dh what goes past the product and what the product is
// multiplied by, of the other state dc, and what the state was that the step's words read: c, or h.
struct alignas(16) Carried {
  float direct, gain, dc, at;
};

template <class S, class Cell>
DEVICE void team_backward(const Arguments& a) {
  using Number = typename S::Number;
  constexpr int SIZE = S::SIZE, UNITS = S::UNITS, BIASES = S::G + Cell::APART;
  const Member<S> me(a);
  unsigned char* const memory = shared();
  const Room room = backward_room<S>(me.team, int(a.tile));
  const int H = me.H, steps = me.length(0);
  const int columns = up_to(me.count, EIGHT), elements = columns * UNITS;
  // of each element; of a cell with c whose words read h as well, that h behind all of them
  constexpr bool BOTH = S::C > 0 && S::READS_Y;
  auto* const states = reinterpret_cast<Carried*>(memory + room.at_states);
  auto* const h_at = reinterpret_cast<float*>(states + room.columns * UNITS);
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
  const Exchange<S> exchange(me, room, memory, products, (has_upper ? 2 * given : given) + word,
                             true);
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
    states[e] = {there && a.dh_n ? number_at<Number>(a.dh_n, place) : 0.0f, 0.0f,
                 S::C && there && a.dc_n ? number_at<Number>(a.dc_n, place) : 0.0f, 0.0f};
    if (BOTH) h_at[e] = 0.0f;
  }
  float units[S::U ? S::U : 1];
#pragma unroll
  for (int u = 0; u < S::U; ++u)
    units[u] = is_unit ? number_at<Number>(a.unit, me.unit_of(me.place, S::U, u, unit)) : 0.0f;
  Sum dunit[S::U ? S::U : 1];
  Total<S::PARTS != 0> dbias[BIASES];

  // Time goes against forward's; `before` is forward's step before.
  const Steps<S> in_time(me, steps, !me.reverse, me.layer);
  const auto time_of = [&](int step) { return in_time.time(step); };
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
  const bool in_vectors = (alignment | me.width * SIZE) % 16 == 0;
  // The arrays that come in, one after another: with(how many numbers of each unit, their bytes, place
  // in the ring, base, first number, whether it is of the step before)
  const auto each_array = [&](const auto& with) {
    if constexpr (Cell::KEEPS_GATES) with(Count<S::G>(), Count<SIZE>(), 0, a.gates, 0, false);
    if constexpr (S::E > 0) with(Count<S::E>(), Count<SIZE>(), S::AT_EXTRA, a.extra, 0, false);
    with(Count<1>(), Count<SIZE>(), S::AT_DY, dy, below, false);
    if constexpr (S::READS_Y) with(Count<1>(), Count<SIZE>(), S::AT_H, a.y, 0, true);
    if constexpr (S::C > 0) {
      with(Count<1>(), Count<4>(), S::AT_C, a.c_all, 0, true);
      with(Count<1>(), Count<4>(), S::AT_DC, dc_all, below, false);
    }
  };
  constexpr int GATES = S::G * S::UNIT / 16;  // vectors
  Vectors<S, GATES * Cell::KEEPS_GATES + (S::E + 1 + S::READS_Y) * S::UNIT / 16 +
                 2 * S::C * S::WIDE / 16> vectors(stages, S::ROW_BACK);
  Vectors<S, GATES> leaving(stages, S::ROW_BACK);
  if (in_vectors) {
    each_array([&](auto count, auto size, int place, const void* base, int64_t skipped, bool before) {
      constexpr int COUNT = count.value, NUMBER = size.value;
      vectors.template of<COUNT, UNITS * NUMBER>(
          base, int64_t(me.stride) * COUNT * NUMBER, int64_t(H) * NUMBER, me.width * NUMBER, place,
          before, (line * COUNT - skipped + me.origin) * NUMBER);
    });
    leaving.template of<S::G, S::UNIT>(a.dgates, int64_t(me.stride) * S::G * SIZE,
                                       int64_t(H) * SIZE, me.width * SIZE, 0, false,
                                       (line * S::G + me.origin) * SIZE);
  }
  vectors.keep(), leaving.keep();
  const int ring = kept(room.columns * S::ROW_BACK);
  const auto on_its_way = [&](int step) {
    if (step >= 0 && step < steps) {
      const int time = time_of(step), stage = step % S::STAGES * ring, now = in_time.row(step);
      const int before = step + 1 < steps ? in_time.row(step + 1) : 0;
      if (in_vectors)
        vectors.each(me.count, vectors.before ? before : now, stage,
                     [&](int row, unsigned char* to, const void* from) {
                       const int length = lengths[row];
                       if (time < length && (!vectors.before || has_before(step, length)))
                         copy<16>(to, from);
                     });
      else
        each_array([&](auto count, auto size, int place, const void* base, int64_t skipped,
                       bool of_before) {
          constexpr int COUNT = count.value, NUMBER = size.value;
          if (!base) return;
          const auto* const from = static_cast<const unsigned char*>(base);
          each_piece<S, COUNT>(
              me.count, me.width * NUMBER, alignment, [&](int row, int piece, int at, int grain) {
                const int length = lengths[row];
                if (time >= length || (of_before && !has_before(step, length))) return;
                const int64_t first = int64_t((of_before ? before : now) + row) * me.stride + line;
                const int64_t number = first * COUNT - skipped + int64_t(piece) * H + me.origin;
                fetch_bytes(stages + stage + row * S::ROW_BACK + place + piece * UNITS * NUMBER + at,
                            from + number * NUMBER + at, grain);
              });
        });
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

  // A thread's elements are of every AT_ONCE-th column from its first on. Where they stand is the same
  // at every step.
  constexpr int AT_ONCE = S::THREADS / UNITS;
  const int first_column = column_of(thread());
  unsigned char* const my_stage = kept(stages + first_column * S::ROW_BACK + unit * SIZE);
  Carried* const my_states = kept(states + thread());
  unsigned char* const my_operand = kept(operand + first_column * S::PITCH + unit * SIZE);
  const int32_t* const my_length = kept(lengths + first_column);
  const int my_place = kept(int(line + me.beside(first_column, unit) - me.recurrence * H));
  enum { RESET = 1, MASK = 2, DY = 4, DC_ALL = 8 };
  const int asked = kept((a.reset ? RESET : 0) | (a.h_mask ? MASK : 0) | (dy ? DY : 0) |
                         (dc_all ? DC_ALL : 0));

  // What the product of the step behind gave an element, from all parts: loads of eight are on their way
  // together.
  const int apart = kept(elements * 4), parts = exchange.parts();
  const auto sum_of = [&](const unsigned char* from) {
    float s = 0.0f;
#pragma unroll 1
    for (int p = 0; p < parts; p += 8, from += 8 * apart) {
      float v[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) v[k] = p + k < parts ? load<float>(from + k * apart) : 0.0f;
#pragma unroll
      for (int k = 0; k < 8; ++k) s += v[k];
    }
    return s;
  };
  unsigned char* const my_sums = kept(exchange.sums(0) + thread() * 4);
  const int places = kept(int(exchange.sums(1) - exchange.sums(0)));
  // The step's time and first row, found in the step before.
  const auto in_range = [&](int step) { return !S::WAVE || (step >= 0 && step < steps) ? step : 0; };
  int time = time_of(in_range(-later));
  int first_row = turns > 0 ? in_time.row(in_range(-later)) : 0;

#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    const int step = turn - later;
    const bool walks = !S::WAVE || (step >= 0 && step < steps);
    if (turn > 0) exchange.take_sums(turn - 1, elements);
    const int stage = int(unsigned(step) % S::STAGES) * ring;
    const bool lost = is_marked(exchange.lost);
    float biases[BIASES] = {};
    const unsigned char* sums = my_sums + (turn - 1 & 1) * places;
    Carried* state = my_states;
    unsigned char *mine = my_stage + stage, *to_product = my_operand;
    const int32_t* length_of = my_length;
    int column = first_column;
    int64_t place = int64_t(first_row) * me.stride + my_place;
#pragma unroll 1
    for (int e = thread(); e < elements; e += S::THREADS) {
      const auto* const wide = reinterpret_cast<const float*>(mine + unit * (4 - SIZE));
      // All loads come first, so that they are on their way together; of what is not there anything.
      Number saved[S::G], extras[S::E ? S::E : 1], of_h, of_y;
      float of_c, of_dc;
      const Carried was = load<Carried>(state);
      if constexpr (Cell::KEEPS_GATES) {
#pragma unroll
        for (int g = 0; g < S::G; ++g) saved[g] = load<Number>(mine + g * S::UNIT);
      }
#pragma unroll
      for (int k = 0; k < S::E; ++k) extras[k] = load<Number>(mine + S::AT_EXTRA + k * S::UNIT);
      of_y = load<Number>(mine + S::AT_DY);
      if constexpr (S::READS_Y) of_h = load<Number>(mine + S::AT_H);
      if constexpr (S::C > 0) of_c = wide[S::AT_C / 4], of_dc = wide[S::AT_DC / 4];
      const float h_kept = BOTH ? h_at[e] : was.at, c_kept = was.at, dc_kept = was.dc;
      const int length = *length_of;
      const float product = turn == 0 ? 0.0f : sum_of(sums);
      const float dh = was.gain == 0.0f ? was.direct : was.direct + was.gain * product;
      const bool there = is_unit && column < me.count, lives = there && walks && time < length;
      bool is_reset = false;
      if (asked & RESET) is_reset = there && resets.of(step, column);
      const bool has = has_before(step, length);
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
      at.dh_now = asked & DY ? dh + widen(of_y) : dh;
      if constexpr (S::WAVE)
        if (has_upper && lives) at.dh_now += sum_of(sums + room.sums);
      at.dc_now[0] = dc_kept;
      if constexpr (S::C > 0)
        if (asked & DC_ALL) at.dc_now[0] += of_dc;
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
      if ((asked & MASK) && there) mask = number_at<Number>(a.h_mask, me.state(column, unit));
      Carried now = was;
      if (lives) {
        now = {is_reset ? 0.0f : at.dh_before, is_reset ? 0.0f : mask,
               is_reset ? 0.0f : at.dc_before[0], S::C ? c_before : h_before};
        if (BOTH) h_at[e] = h_before;
#pragma unroll
        for (int u = 0; u < S::U; ++u) dunit[u].add(at.dunits[u]);
      } else {
        now.direct = dh, now.gain = 0.0f;
      }
      store(state, now);
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
          store(to + g * S::UNIT, taken);
        };
        if (there) take(to_product, dproduct);
        if constexpr (S::WAVE)
          if (there && has_lower)
            take(to_product + room.operand, narrow<Number>(lives ? at.din[g] : 0.0f));
        if (S::DIFFERS && a.dproduct && lives)
          static_cast<Number*>(
              a.dproduct)[(place - me.origin - unit) * S::G_HH + g * H + me.origin + unit] = dproduct;
      }
      sums += S::THREADS * 4;
      column += AT_ONCE, length_of += AT_ONCE, mine += AT_ONCE * S::ROW_BACK;
      to_product += AT_ONCE * S::PITCH, state += S::THREADS, place += AT_ONCE * me.stride;
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
    if (turn > 0) exchange.again(turn - 1);
    const auto leaves = [&](int row) { return walks && time < lengths[row]; };
    if (in_vectors)
      leaving.each(me.count, first_row, stage, [&](int row, unsigned char* from, void* to) {
        if (leaves(row)) store(to, load<Words4>(from));
      });
    else
      each_piece<S, S::G>(
          me.count, me.width * SIZE, alignment, [&](int row, int piece, int at, int grain) {
            if (!leaves(row)) return;
            const int64_t first = int64_t(first_row + row) * me.stride + line;
            put_bytes(static_cast<unsigned char*>(a.dgates) +
                          (first * S::G + int64_t(piece) * H + me.origin) * SIZE + at,
                      stages + stage + row * S::ROW_BACK + piece * S::UNIT + at, grain);
          });
    on_its_way(step + S::STAGES - 1);
    if (asked & RESET) {
      resets.put(step + 1, next_reset);
      next_reset = reset_of(step + 2);
    }
    if (turn + 1 < turns) {
      time = time_of(in_range(step + 1));
      first_row = in_time.row(in_range(step + 1));
    }
    arrived<S::STAGES - 2>();
    meet();
  }

  if (a.dh_0 && turns > 0) exchange.take_sums(turns - 1, elements);
  const bool lost = is_marked(exchange.lost);
  const Member<S> you = Member<S>::again(a);
  const int last_unit = unit_of(thread_again());
  for (int e = thread_again(); e < elements; e += S::THREADS) {
    const int column = column_of(e);
    if (last_unit >= you.width || column >= you.count) continue;
    const Carried was = states[e];
    float dh = was.direct;
    if (a.dh_0 && turns > 0 && was.gain != 0.0f)
      dh += was.gain * sum_of(exchange.sums(turns - 1) + e * 4);
    if (lost) dh = bits_to_float(0x7fffffff);
    if (a.dh_0) put_at<Number>(a.dh_0, you.state(column, last_unit), dh);
    if (S::C > 0 && a.dc_0) put_at<Number>(a.dc_0, you.state(column, last_unit), was.dc);
  }
  exchange.end();

  // Over the sequences: threads of the same unit, in their order. Nobody needs the ring any more.
  auto* const totals = reinterpret_cast<float*>(stages);
  const auto leave = [&](float* to, int count, int which, float total) {
    if (!to) return;
    meet();
    totals[thread()] = total;
    meet();
    if (thread() >= you.width) return;
    float s = 0.0f;
#pragma unroll 1
    for (int k = 0; k < S::THREADS; ++k)
      if (unit_of(k) == thread()) s += totals[k];
    const int tile = int(a.first / a.tile) + you.tile;
    to[you.unit_of(tile * int(a.R) * you.layers + you.place, count, which, thread())] = s;
  };
#pragma unroll
  for (int g = 0; g < BIASES; ++g) leave(a.dbias, BIASES, g, dbias[g].total());
#pragma unroll
  for (int u = 0; u < S::U; ++u) leave(a.dunit, S::U, u, dunit[u].total());
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

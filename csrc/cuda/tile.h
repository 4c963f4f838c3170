// What one CTA is: sizes known to the compiler, where its threads stand, and how it holds weights,
// hands on operands and fetches rows.
//
// A CTA owns up to EIGHT sequences of one recurrence for all of time, the columns of its products.
// Rows are hidden units. A thread has all that the cell's text takes of its own units (one or two,
// EACH) in two columns, and no value but h (backward: the gates' gradients) goes from thread to thread:
// mma gives lane (g, q) = (lane / 4, lane % 4) rows g and g + 8 of columns 2 q and 2 q + 1. Then
//
//   EACH = 2   a warp owns 16 units. A row tile is one gate of them, row g unit 2 g and row g + 8
//              unit 2 g + 1; backward it is h of them.
//   EACH = 1   twice the warps, each with half of the text: a step is then as long as a thread's
//              own instructions. Forward a warp owns 8 units, and a row tile is two gates of them.
//              Backward two warps share a row tile of 16 units and halve its inner length; each
//              gives the other the half of its sums that belongs there.
//
// Up to four sequences stand in the even columns alone, and the text is run for these. Where there
// are multiprocessors enough, a CTA is given no more than four.
//
// The inner length of a product may be taken in any order, as long as both operands agree. Here a
// thread takes 16 bytes in a row of each of them: of 64 bytes, which are two fragments of mma's
// inner length, lane q has bytes 16 q to 16 q + 15. So a fragment is a vector load, of weights, of h
// and of gradients alike, whatever the type.
#pragma once
#include "numbers.h"

namespace fastseq {
namespace FASTSEQ_ISA {

constexpr int EIGHT = 8, LANES = 32;
// Bytes of shared memory that a CTA may have: on the devices that have least of it, and most.
constexpr int SMALLEST = 99 << 10, LARGEST = 227 << 10;

CONSTANT int least(int a, int b) { return a < b ? a : b; }
// Bytes of a piece of a row that is loaded in vectors of 16.
CONSTANT int whole(int bytes) { return (bytes + 15) / 16 * 16; }

// Of a kernel. HC: how many hidden units it has room for.
template <class Cell, class Type, int HC, bool BACKWARD>
struct Tile {
  using Number = typename Type::Number;
  using Value = Real<Type::QUICK>;
  static constexpr int SIZE = sizeof(Number), PARTS = Type::PARTS, WIDTH = HC;
  static constexpr int G = Cell::G, G_HH = Cell::FIRST[1], C = Cell::C, E = Cell::E, U = Cell::U;
  static constexpr bool MULTIPLIES = G_HH > 0, READS_Y = Cell::READS_H || !Cell::KEEPS_GATES;
  // Whether a gate's recurrent part has a gradient of its own.
  static constexpr bool DIFFERS = MULTIPLIES && (Cell::APART > 0 || G_HH < G);
  static_assert(Cell::PHASES == 1 && C <= 1 && HC % 32 == 0, "what a CTA walks");
  static_assert(MULTIPLIES || G == 1, "a tile of units is a piece of a row");

  // More warps where there are few, as far as their registers hold weights and all else.
  static constexpr int EACH = HC <= 64 ? 1 : 2;
  static constexpr int THREADS = HC / (8 * EACH) * LANES, ROW_LANES = THREADS / EIGHT;

  // Row tiles of a warp, and the pairs of fragments of its part of the inner length.
  static constexpr int INNER = (BACKWARD ? G_HH : 1) * HC * SIZE;  // bytes
  static constexpr int TILES = BACKWARD || !MULTIPLIES ? 1 : EACH == 2 ? G_HH : (G_HH + 1) / 2;
  static constexpr int SPLIT = BACKWARD && EACH == 1 ? 2 : 1;
  static constexpr int PAIRS = (INNER / 64 + SPLIT - 1) / SPLIT;
  // How many of them stay in registers, eight of a thread for each tile and part; the rest stands
  // in shared memory, as each lane will load it, and is made parts of then.
  static constexpr int COPIES = PARTS == 2 ? 2 : 1;
  static constexpr int ROOM = THREADS > 384 ? 24 : THREADS > 256 ? 64 : PARTS == 2 ? 96 : 128;
  static constexpr int HELD = least(PAIRS, ROOM / (8 * COPIES * TILES)), REST = PAIRS - HELD;
  static constexpr int WEIGHTS = MULTIPLIES ? THREADS * REST * TILES * 32 : 0;

  // An operand: EIGHT rows of the inner length. Rows 2 k and 2 k + 1 start half the banks apart, so
  // that vector loads of two rows meet in none; pairs are shifted against each other by the eight
  // numbers that a warp stores in each.
  static constexpr int PITCH = INNER % 128 ? INNER : INNER + 64, SHIFT = 8 * SIZE;
  static constexpr int OPERAND = MULTIPLIES ? EIGHT * PITCH + 4 * SHIFT : 0;
  static CONSTANT int place(int row) { return row * PITCH + (row >> 1) * SHIFT; }
  // Sums that two warps exchange, two of a thread.
  static constexpr int SUMS = MULTIPLIES && SPLIT == 2 ? THREADS * 8 : 0;

  // A step's pieces of a row, each of HC units: gates, over which backward's gradients are put;
  // extras, dy, h and the other state of the step before, and that one's gradient.
  static constexpr int UNIT = whole(HC * SIZE);
  static constexpr int AT_EXTRA = G * UNIT, AT_DY = AT_EXTRA + E * UNIT, AT_H = AT_DY + UNIT;
  static constexpr int AT_C = AT_H + READS_Y * UNIT, AT_DC = AT_C + C * HC * 4;
  // and 16 bytes, so that rows start in banks of their own
  static constexpr int ROW = (BACKWARD ? AT_DC + C * HC * 4 : AT_EXTRA) + 16;
  static constexpr int STAGE = EIGHT * ROW;

  // Shared memory: weights, two operands, sums, and stages of the steps that are on their way at
  // once. Eight of few gates, else six, or four, where every device has that much; else what fits.
  static constexpr int AT_SUMS = WEIGHTS + 2 * OPERAND, AT_STAGES = AT_SUMS + SUMS;
  static CONSTANT int stages() {
    int found = G < 3 ? 8 : 6;
    while (found > 4 && AT_STAGES + found * STAGE > SMALLEST) found -= 2;
    return AT_STAGES + found * STAGE > LARGEST ? 3 : found;
  }
  static constexpr int STAGES = stages(), BYTES = AT_STAGES + STAGES * STAGE;
  static_assert(BYTES <= LARGEST, "it must fit somewhere");

  // How many shall be on a multiprocessor at once: as its registers allow, of which a thread takes
  // so many beside the weights.
  static constexpr int BESIDE = PARTS == 2 ? 130 : 100;
  static constexpr int REGISTERS = MULTIPLIES * 8 * COPIES * TILES * HELD + BESIDE;
  static constexpr int ALIKE = 65536 / (THREADS * least(256, REGISTERS));
  static constexpr int CTAS = ALIKE < 1 ? 1 : least(16, ALIKE);
};

// A thread's part in a CTA: its EACH units and two columns.
template <class T>
struct Seat {
  const Arguments& a;
  const int lane = thread() % LANES, warp = thread() / LANES, g = lane / 4, q = lane % 4;
  const int recurrence = tile_y(), first = tile_x() * int(a.tile);  // of the tile's sequences
  const int origin = tile_z() * T::WIDTH;                // the tile's first unit
  const int width = least(int(a.H) - origin, T::WIDTH);  // how many it has
  const int local = T::EACH == 2    ? warp * 16 + 2 * g  // this thread's first one, of these
                    : T::SPLIT == 2 ? warp / 2 * 16 + warp % 2 * 8 + g
                                    : warp * 8 + g;
  const bool reverse = (a.reverse >> (recurrence % 32)) & 1;
  const bool few = a.tile <= 4 || a.B - first <= 4;
  const int stride = int(a.R * a.H);  // from a row to the next, of H numbers each recurrence

  DEVICE explicit Seat(const Arguments& a) : a(a) {}

  // Of the tile's sequences that in column 2 q + k; of four the odd columns have none.
  DEVICE int one(int k) const { return few ? (k ? EIGHT : q) : 2 * q + k; }
  DEVICE int length(int one) const {
    if (one >= (few ? 4 : EIGHT) || first + one >= a.B) return 0;
    return a.lengths ? int(a.lengths[first + one]) : int(a.T);
  }
  DEVICE bool is_sequence(int k) const { return one(k) < EIGHT && first + one(k) < a.B; }
  DEVICE bool is_unit(int j) const { return local + j < width; }
  // The first row of a step of the tile. There are fewer than 2^31.
  DEVICE int row(int time) const {
    return (a.offsets ? int(a.offsets[time]) : time * int(a.B)) + first;
  }
  // Where a column's numbers are: of the states, and of a row of H numbers each recurrence.
  DEVICE int64_t state(int k) const {
    return (int64_t(recurrence) * a.B + first + one(k)) * a.H + origin + local;
  }
  DEVICE int64_t beside(int k) const {
    return int64_t(one(k)) * stride + recurrence * int(a.H) + origin + local;
  }
  // Nothing that a step would have to look at: sequences of one length, no reset, no mask, rows of
  // as many units as the kernel has room for.
  DEVICE bool is_plain() const { return !a.lengths && !a.reset && !a.h_mask && a.H == T::WIDTH; }
};

template <class Number>
DEVICE float number_at(const void* base, int64_t place) {
  return widen(static_cast<const Number*>(base)[place]);
}
template <class Number>
DEVICE void put_at(void* base, int64_t place, float v) {
  static_cast<Number*>(base)[place] = narrow<Number>(v);
}

// EACH neighbouring numbers of shared memory, where they are a vector.
template <class Number, int EACH>
DEVICE void load_each(float (&v)[EACH], const unsigned char* from) {
  if constexpr (EACH == 2) {
    const Two<Number> both = load<Two<Number>>(from);
    v[0] = widen(both.first), v[1] = widen(both.second);
  } else {
    v[0] = widen(load<Number>(from));
  }
}
template <class Number, int EACH>
DEVICE void load_where(bool there, float (&v)[EACH], const unsigned char* from) {
#pragma unroll
  for (int j = 0; j < EACH; ++j) v[j] = 0.0f;
  if (there) load_each<Number>(v, from);
}
template <class Number, int EACH>
DEVICE void store_each(unsigned char* to, const Number (&v)[EACH]) {
  if constexpr (EACH == 2)
    store(to, Two<Number>{v[0], v[1]});
  else
    store(to, v[0]);
}
// The same of global memory, where the second may not exist, or not stand beside the first.
template <class Number, int EACH>
DEVICE void put_each(void* base, int64_t place, const Number (&v)[EACH], bool second,
                     bool paired) {
  auto* const to = static_cast<Number*>(base) + place;
  if constexpr (EACH == 2) {
    if (paired) {
      store(to, Two<Number>{v[0], v[1]});
      return;
    }
    if (second) to[1] = v[1];
  }
  to[0] = v[0];
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// COUNT pieces of a row into shared memory, where one is UNIT bytes behind the other, by `lanes`
// threads of which this is one: in vectors of 16 bytes, in words, or number by number, as far as
// their length and place are multiples of these.
template <int COUNT, int UNIT, int SIZE>
DEVICE void fetch(unsigned char* to, const unsigned char* from, int bytes, int pitch, int one,
                  int lanes) {
#pragma unroll 1
  for (int piece = 0; piece < COUNT; ++piece, to += UNIT, from += pitch) {
    const int grain = bytes | (int(reinterpret_cast<uintptr_t>(from)) & 15);
    if (grain % 16 == 0) {
#pragma unroll 1
      for (int k = one * 16; k < bytes; k += lanes * 16) copy<16>(to + k, from + k);
    } else if (grain % 4 == 0) {
#pragma unroll 1
      for (int k = one * 4; k < bytes; k += lanes * 4) copy<4>(to + k, from + k);
    } else {
#pragma unroll 1
      for (int k = one * SIZE; k < bytes; k += lanes * SIZE)
        store(to + k, load<uint16_t>(from + k));
    }
  }
}
// And out of it.
template <int COUNT, int UNIT, int SIZE>
DEVICE void put(unsigned char* to, const unsigned char* from, int bytes, int pitch, int one,
                int lanes) {
#pragma unroll 1
  for (int piece = 0; piece < COUNT; ++piece, to += pitch, from += UNIT) {
    const int grain = bytes | (int(reinterpret_cast<uintptr_t>(to)) & 15);
    if (grain % 16 == 0) {
#pragma unroll 1
      for (int k = one * 16; k < bytes; k += lanes * 16) store(to + k, load<Words4>(from + k));
    } else if (grain % 4 == 0) {
#pragma unroll 1
      for (int k = one * 4; k < bytes; k += lanes * 4) store(to + k, load<uint32_t>(from + k));
    } else {
#pragma unroll 1
      for (int k = one * SIZE; k < bytes; k += lanes * SIZE)
        store(to + k, load<uint16_t>(from + k));
    }
  }
}
// The same where the pieces are one, of known length, at a place that 16 divides.
template <int BYTES, int ROW_LANES>
DEVICE void fetch_whole(unsigned char* to, const unsigned char* from, int one) {
#pragma unroll
  for (int k = 0; k < BYTES; k += ROW_LANES * 16)
    if (BYTES % (ROW_LANES * 16) == 0 || k + one * 16 < BYTES)
      copy<16>(to + k + one * 16, from + k + one * 16);
}
template <int BYTES, int ROW_LANES>
DEVICE void put_whole(unsigned char* to, const unsigned char* from, int one) {
#pragma unroll
  for (int k = 0; k < BYTES; k += ROW_LANES * 16)
    if (BYTES % (ROW_LANES * 16) == 0 || k + one * 16 < BYTES)
      store(to + k + one * 16, load<Words4>(from + k + one * 16));
}
DEVICE bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The operands of a product of TF32 parts.
DEVICE uint32_t high(uint32_t w) { return float_to_bits(round_tf32(bits_to_float(w))); }
DEVICE uint32_t low(uint32_t w, uint32_t high) {
  return float_to_bits(round_tf32(bits_to_float(w) - bits_to_float(high)));
}

// The weights of a warp, TILES row tiles of 16 rows, and what they multiply. The first pairs of
// fragments of the inner length are held, the rest stands in shared memory in the order in which it
// is read.
template <class T>
struct Weights {
  static constexpr int TILES = T::TILES, HELD = T::HELD;
  static constexpr bool PARTS = T::PARTS == 2;
  // Chains of additions that stand side by side: mma's latency is that of eight of them.
  static constexpr int CHAINS = TILES >= 3 ? 1 : TILES == 2 ? 2 : 4;
  using Number = typename T::Number;
  struct Pair {
    uint32_t w[2][4];
  };
  Pair held[TILES][HELD], held_low[TILES][PARTS ? HELD : 1];
  unsigned char* rest;  // this lane's

  DEVICE unsigned char* resting(int tile, int pair, int k) const {
    return rest + (((pair - HELD) * TILES + tile) * 2 + k) * T::THREADS * 16;
  }

  // row(m, lower): where this lane's row g (lower: g + 8) of tile m starts, or 0 for zeros.
  // part: which of SPLIT parts of the inner length, whose pairs alternate.
  template <class RowOf>
  DEVICE void fill(unsigned char* room, const RowOf& row, int part, int q) {
    rest = room + thread() * 16;
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
      const unsigned char *upper_row = row(m, false), *lower_row = row(m, true);
#pragma unroll
      for (int pair = 0; pair < T::PAIRS; ++pair) {
        const int at = (pair * T::SPLIT + part) * 64 + 16 * q;
        Words4 upper = {}, lower = {};
        if (upper_row && at < T::INNER) upper = load<Words4>(upper_row + at);
        if (lower_row && at < T::INNER) lower = load<Words4>(lower_row + at);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          Words4 w = {{upper.w[2 * k], lower.w[2 * k], upper.w[2 * k + 1], lower.w[2 * k + 1]}};
          if (pair < HELD) {
            const int place = pair < HELD ? pair : 0;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              held[m][place].w[k][j] = T::PARTS ? high(w.w[j]) : w.w[j];
              if constexpr (PARTS) held_low[m][place].w[k][j] = low(w.w[j], high(w.w[j]));
            }
          } else {
#pragma unroll
            for (int j = 0; j < 4; ++j)
              if (T::PARTS == 1) w.w[j] = high(w.w[j]);
            store(resting(m, pair, k), w);
          }
        }
      }
    }
  }

  // sums[m]: of tile m. operand: this thread's row and lane of it.
  DEVICE void multiply(float (&sums)[TILES][4], const unsigned char* operand, int part) const {
    float chain[TILES][CHAINS][4] = {};
    const unsigned char* const from = operand + part * 64;
#pragma unroll
    for (int pair = 0; pair < HELD; ++pair) {
      const Words4 b = load_inner(from, pair, part);
#pragma unroll
      for (int m = 0; m < TILES; ++m)
        add(chain[m][pair * 2 % CHAINS], chain[m][(pair * 2 + 1) % CHAINS], held[m][pair],
            held_low[m][PARTS ? pair : 0], b);
    }
#pragma unroll 1
    for (int pair = HELD; pair < T::PAIRS; ++pair) {
      const Words4 b = load_inner(from, pair, part);
#pragma unroll
      for (int m = 0; m < TILES; ++m) {
        Pair w, small;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const Words4 raw = load<Words4>(resting(m, pair, k));
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            w.w[k][j] = PARTS ? high(raw.w[j]) : raw.w[j];
            small.w[k][j] = PARTS ? low(raw.w[j], w.w[k][j]) : 0;
          }
        }
        add(chain[m][0], chain[m][1 % CHAINS], w, small, b);
      }
    }
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float s = chain[m][0][j];
#pragma unroll
        for (int c = 1; c < CHAINS; ++c) s += chain[m][c][j];
        sums[m][j] = s;
      }
  }

  DEVICE static Words4 load_inner(const unsigned char* from, int pair, int part) {
    if (T::INNER / 64 % T::SPLIT && (pair * T::SPLIT + part) * 64 >= T::INNER) return {};
    return load<Words4>(from + pair * T::SPLIT * 64);
  }

  // A pair's products. Of two parts they are a sum of their own, small ones first: the tensor cores
  // cut off what they add up, and torch's float32 rounds.
  DEVICE static void add(float (&first)[4], float (&second)[4], const Pair& w, const Pair& small,
                         const Words4& b) {
    if constexpr (PARTS) {
      float d[4] = {};
      uint32_t big[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) big[j] = high(b.w[j]);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t l0 = low(b.w[2 * k], big[2 * k]), l1 = low(b.w[2 * k + 1], big[2 * k + 1]);
        mma(d, small.w[k], l0, l1, Number());
        mma(d, small.w[k], big[2 * k], big[2 * k + 1], Number());
        mma(d, w.w[k], l0, l1, Number());
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) mma(d, w.w[k], big[2 * k], big[2 * k + 1], Number());
#pragma unroll
      for (int j = 0; j < 4; ++j) first[j] += d[j];
    } else {
      mma(first, w.w[0], b.w[0], b.w[1], Number());
      mma(second, w.w[1], b.w[2], b.w[3], Number());
    }
  }
};

// As an operand takes numbers: in TF32 rounded, in parts as they are.
template <class T>
DEVICE void put_operand(unsigned char* to, const typename T::Number (&v)[T::EACH]) {
  typename T::Number taken[T::EACH];
#pragma unroll
  for (int j = 0; j < T::EACH; ++j) {
    if constexpr (T::PARTS == 1)
      taken[j] = round_tf32(v[j]);
    else
      taken[j] = v[j];
  }
  store_each(to, taken);
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

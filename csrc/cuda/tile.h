// What one CTA is: sizes known to the compiler, where its threads stand, and how it holds weights,
// hands on operands and fetches rows.
//
// A CTA owns EIGHT sequences of one recurrence for all of time, the columns of its products. Rows
// are hidden units: a warp owns UNITS of them, with all their gates, so that a thread has all that
// the cell's text takes of its four elements, and no value but h (backward: the gates' gradients)
// goes from thread to thread. An element is a unit and a sequence, as mma's accumulators lie:
//
//   thread (warp, g, q) = (w, lane / 4, lane % 4):  units 16 w + g and 16 w + g + 8,
//                                                   sequences 2 q and 2 q + 1
//
// The inner length of a product may be taken in any order, as long as both operands agree. Here a
// thread takes 16 bytes in a row of each of them: of 64 bytes, which are two fragments of mma's
// inner length, lane q has bytes 16 q to 16 q + 15. So a fragment is a vector load, of weights, of h
// and of gradients alike, whatever the type.
#pragma once
#include "numbers.h"

namespace fastseq {
namespace FASTSEQ_ISA {

constexpr int EIGHT = 8, UNITS = 16, LANES = 32;
// Bytes of shared memory that a CTA may have: on the devices that have least of it, and most.
constexpr int SMALLEST = 99 << 10, LARGEST = 227 << 10;

CONSTANT int least(int a, int b) { return a < b ? a : b; }
// Bytes of a row that vectors of 16 bytes take up, and 16 more: rows start in banks of their own.
CONSTANT int apart(int bytes) { return (bytes + 15) / 16 * 16 + 16; }

// Of a kernel. HC: how many hidden units it has room for.
template <class Cell, class Type, int HC, bool BACKWARD>
struct Tile {
  using Number = typename Type::Number;
  using Value = Real<Type::QUICK>;
  static constexpr int SIZE = sizeof(Number), PARTS = Type::PARTS;
  static constexpr int G = Cell::G, G_HH = Cell::FIRST[1], C = Cell::C, E = Cell::E, U = Cell::U;
  static constexpr int WARPS = HC / UNITS, THREADS = WARPS * LANES;
  static constexpr bool MULTIPLIES = G_HH > 0;
  static constexpr bool WALKS_BY_H = Cell::READS_H || !Cell::KEEPS_GATES;
  static_assert(Cell::PHASES == 1 && C <= 1 && HC % 32 == 0, "what a CTA walks");
  static_assert(MULTIPLIES || G == 1, "a tile of units is a piece of a row");

  // Fragments of weights that a warp has, and how many of them stay in registers, four each and
  // part; the rest stands in shared memory, as each lane will load it, and is made parts of then.
  static constexpr int PER_GATE = HC * SIZE / 32, FRAGMENTS = G_HH * PER_GATE;
  static constexpr int COPIES = PARTS == 2 ? 2 : 1;
  static constexpr int ROOM = THREADS > 384 ? 48 : THREADS > 256 ? 64 : 128;
  // Whole pairs of each row tile, of which forward has one a gate.
  static constexpr int TILES = BACKWARD || !MULTIPLIES ? 1 : G_HH, EACH = 2 * TILES;
  static constexpr int HELD = least(FRAGMENTS, ROOM / (4 * COPIES) / EACH * EACH);
  static constexpr int REST = FRAGMENTS - HELD;
  static constexpr int WEIGHTS = WARPS * REST * LANES * 16;

  // An operand: EIGHT rows of the inner length. Rows 2 k and 2 k + 1 start half the banks apart, so
  // that vector loads of two rows meet in none; pairs are shifted against each other by the eight
  // numbers that a warp stores in each.
  static constexpr int INNER = (BACKWARD ? G_HH : 1) * HC * SIZE;
  static constexpr int PITCH = INNER % 128 ? INNER : INNER + 64, SHIFT = 8 * SIZE;
  static constexpr int OPERAND = MULTIPLIES ? EIGHT * PITCH + 4 * SHIFT : 0;
  static CONSTANT int place(int row) { return row * PITCH + (row >> 1) * SHIFT; }

  // A step's pieces of a row: gates, which backward's gradients are put over; extras, dy, h and the
  // other state of the step before, and that one's gradient.
  static constexpr int GATES = apart(G * HC * SIZE), EXTRA = E ? apart(E * HC * SIZE) : 0;
  static constexpr int DY = apart(HC * SIZE), OF_H = WALKS_BY_H ? apart(HC * SIZE) : 0;
  static constexpr int OF_C = C ? apart(C * HC * 4) : 0;
  static constexpr int AT_EXTRA = GATES, AT_DY = AT_EXTRA + EXTRA, AT_H = AT_DY + DY;
  static constexpr int AT_C = AT_H + OF_H, AT_DC = AT_C + OF_C;
  static constexpr int ROW = BACKWARD ? AT_DC + OF_C : GATES, STAGE = EIGHT * ROW;

  // Shared memory: weights, two operands, stages of the steps that are on their way at once. Eight
  // of few gates, else six, or four, where every device has that much; else as many as fit.
  static constexpr int AT_STAGES = WEIGHTS + 2 * OPERAND;
  static CONSTANT int stages() {
    int found = G < 3 ? 8 : 6;
    while (found > 4 && AT_STAGES + found * STAGE > SMALLEST) found -= 2;
    return AT_STAGES + found * STAGE > LARGEST ? 3 : found;
  }
  static constexpr int STAGES = stages(), BYTES = AT_STAGES + STAGES * STAGE;
  static_assert(BYTES <= LARGEST, "it must fit somewhere");

  // How many shall be on a multiprocessor at once: as its registers allow, of which a thread takes
  // so many beside the weights.
  static constexpr int BESIDE = 120, REGISTERS = 4 * COPIES * HELD + BESIDE;
  static constexpr int ALIKE = 65536 / (THREADS * least(256, REGISTERS));
  static constexpr int CTAS = ALIKE < 1 ? 1 : least(16, ALIKE);
};

// A thread's part in a CTA, and which sequences and units are there.
template <class T>
struct Seat {
  const Arguments& a;
  const int lane, warp, g, q;
  const int recurrence, first;  // of the tile's sequences
  const int unit;               // of the whole layer, of this thread's first element
  const int origin, width;      // the tile's first unit, and how many it has
  const bool reverse;

  DEVICE explicit Seat(const Arguments& a)
      : a(a), lane(thread() % LANES), warp(thread() / LANES), g(lane / 4), q(lane % 4),
        recurrence(tile_y()), first(tile_x() * EIGHT),
        unit(tile_z() * T::WARPS * UNITS + warp * UNITS + g), origin(tile_z() * T::WARPS * UNITS),
        width(least(int(a.H) - origin, T::WARPS * UNITS)),
        reverse((a.reverse >> (recurrence % 32)) & 1) {}

  DEVICE int sequence(int column) const { return first + column; }
  DEVICE int length(int column) const {
    const int b = sequence(column);
    return b >= a.B ? 0 : a.lengths ? int(a.lengths[b]) : int(a.T);
  }
  // The first row of a step of the tile.
  DEVICE int64_t row(int time) const {
    return (a.offsets ? a.offsets[time] : int64_t(time) * a.B) + first;
  }
  // Elements: two units by two sequences.
  DEVICE int unit_of(int e) const { return unit + 8 * (e / 2); }
  DEVICE int local_unit(int e) const { return unit_of(e) - origin; }
  DEVICE int column_of(int e) const { return 2 * q + e % 2; }
  DEVICE bool is_unit(int e) const { return unit_of(e) < a.H; }
  DEVICE int64_t state(int e) const {
    return (int64_t(recurrence) * a.B + sequence(column_of(e))) * a.H + unit_of(e);
  }
};

template <class Number>
DEVICE float number_at(const void* base, int64_t place) {
  return widen(static_cast<const Number*>(base)[place]);
}
template <class Number>
DEVICE void put_at(void* base, int64_t place, float v) {
  static_cast<Number*>(base)[place] = narrow<Number>(v);
}

// What divides a piece's length and its place in global memory: a tile of some of the units has
// pieces whose rows are longer than they.
DEVICE int grain(const void* place, int bytes) {
  return bytes | (int(reinterpret_cast<uintptr_t>(place)) & 15);
}
// A row's piece into shared memory, by `lanes` threads of which this is one: in vectors of 16
// bytes, in words, or number by number, as far as its length and its place are multiples of these.
template <int SIZE>
DEVICE void fetch(unsigned char* to, const unsigned char* from, int bytes, int one, int lanes) {
  const int whole = grain(from, bytes);
  if (whole % 16 == 0) {
#pragma unroll 2
    for (int k = one * 16; k < bytes; k += lanes * 16) copy<16>(to + k, from + k);
  } else if (whole % 4 == 0) {
#pragma unroll 1
    for (int k = one * 4; k < bytes; k += lanes * 4) copy<4>(to + k, from + k);
  } else {
#pragma unroll 1
    for (int k = one * SIZE; k < bytes; k += lanes * SIZE)
      store<uint16_t>(to + k, load<uint16_t>(from + k));
  }
}
// And out of it.
template <int SIZE>
DEVICE void put(unsigned char* to, const unsigned char* from, int bytes, int one, int lanes) {
  const int whole = grain(to, bytes);
  if (whole % 16 == 0) {
#pragma unroll 2
    for (int k = one * 16; k < bytes; k += lanes * 16) store(to + k, load<Words4>(from + k));
  } else if (whole % 4 == 0) {
#pragma unroll 1
    for (int k = one * 4; k < bytes; k += lanes * 4) store(to + k, load<uint32_t>(from + k));
  } else {
#pragma unroll 1
    for (int k = one * SIZE; k < bytes; k += lanes * SIZE)
      store(to + k, load<uint16_t>(from + k));
  }
}

// The operands of a product of TF32 parts.
DEVICE uint32_t high(uint32_t w) { return float_to_bits(round_tf32(bits_to_float(w))); }
DEVICE uint32_t low(uint32_t w, uint32_t high) {
  return float_to_bits(round_tf32(bits_to_float(w) - bits_to_float(high)));
}

// The weights of a warp, TILES row tiles of UNITS rows, and what they multiply. Of each tile the
// first fragments of the inner length are held, the rest stands in shared memory, in the order in
// which it is read.
template <class T>
struct Weights {
  static constexpr int TILES = T::TILES, DEEP = T::FRAGMENTS / TILES, HELD = T::HELD / TILES;
  // Chains of additions that stand side by side: mma's latency is that of eight of them.
  static constexpr int CHAINS = TILES >= 3 ? 1 : TILES == 2 ? 2 : least(4, DEEP);
  static constexpr bool PARTS = T::PARTS == 2;
  using Number = typename T::Number;
  uint32_t held[TILES][HELD][4], held_low[TILES][PARTS ? HELD : 1][4];
  unsigned char* rest;  // this lane's

  DEVICE unsigned char* resting(int tile, int at) const {
    return rest + ((at - HELD) * TILES + tile) * LANES * 16;
  }

  // row: of tile m, the warp's first; pitch: bytes from a row to the next.
  template <class RowOf>
  DEVICE void fill(unsigned char* room, const RowOf& row, int pitch, int warp, int lane) {
    const int g = lane / 4, q = lane % 4;
    rest = room + (warp * T::REST * LANES + lane) * 16;
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
      const unsigned char* top = row(m) + int64_t(g) * pitch + 16 * q;
#pragma unroll
      for (int pair = 0; pair < DEEP / 2; ++pair) {
        const Words4 upper = load<Words4>(top + 64 * pair);
        const Words4 lower = load<Words4>(top + int64_t(8) * pitch + 64 * pair);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int at = 2 * pair + k;
          Words4 w = {{upper.w[2 * k], lower.w[2 * k], upper.w[2 * k + 1], lower.w[2 * k + 1]}};
          if (at < HELD) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              held[m][at < HELD ? at : 0][j] = T::PARTS ? high(w.w[j]) : w.w[j];
              if constexpr (PARTS)
                held_low[m][at < HELD ? at : 0][j] = low(w.w[j], high(w.w[j]));
            }
          } else {
#pragma unroll
            for (int j = 0; j < 4; ++j)
              if (T::PARTS == 1) w.w[j] = high(w.w[j]);
            store(resting(m, at), w);
          }
        }
      }
    }
  }

  // sums[m]: of tile m. operand: this thread's row and lane of it.
  DEVICE void multiply(float (&sums)[TILES][4], const unsigned char* operand) const {
    float chain[TILES][CHAINS][4] = {};
#pragma unroll
    for (int pair = 0; pair < HELD / 2; ++pair) {
      const Words4 b = load<Words4>(operand + 64 * pair);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int at = 2 * pair + k;
#pragma unroll
        for (int m = 0; m < TILES; ++m)
          add(chain[m][at % CHAINS], held[m][at], held_low[m][PARTS ? at : 0], b.w[2 * k],
              b.w[2 * k + 1]);
      }
    }
#pragma unroll 2
    for (int pair = HELD / 2; pair < DEEP / 2; ++pair) {
      const Words4 b = load<Words4>(operand + 64 * pair);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
          Words4 w = load<Words4>(resting(m, 2 * pair + k)), small = w;
          if constexpr (PARTS) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              w.w[j] = high(small.w[j]);
              small.w[j] = low(small.w[j], w.w[j]);
            }
          }
          add(chain[m][k % CHAINS], w.w, small.w, b.w[2 * k], b.w[2 * k + 1]);
        }
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

  // One fragment's products; of two parts the small ones first.
  DEVICE static void add(float (&d)[4], const uint32_t (&w)[4], const uint32_t (&small)[4],
                         uint32_t b0, uint32_t b1) {
    if constexpr (PARTS) {
      const uint32_t h0 = high(b0), h1 = high(b1);
      mma(d, small, h0, h1, Number());
      mma(d, w, low(b0, h0), low(b1, h1), Number());
      mma(d, w, h0, h1, Number());
    } else {
      mma(d, w, b0, b1, Number());
    }
  }
};

// As an operand takes a number: in TF32 rounded, in parts as it is.
template <class T>
DEVICE void put_operand(unsigned char* to, float v) {
  store(to, narrow<typename T::Number>(T::PARTS == 1 ? round_tf32(v) : v));
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

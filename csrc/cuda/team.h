// What a team of CTAs is, which share a recurrence that no single one holds: where each stands, how it
// holds its part of the weights, and how rows come and go.
//
// A team owns some sequences of one recurrence for all of time, the columns of its products. Each of
// its CTAs owns a slice of the hidden units, UNITS of them, and the rows of w_hh of all their gates.
//
//   forward    multiplies its rows with all of h_{t-1}, runs the text of its units, and hands their h
//              on to everyone
//   backward   runs the text of its units, and multiplies their gates' gradients with the same rows:
//              a part of dh_{t-1} of all units, which it hands to the CTAs that own them
//
// So both ways hold the same weights, as torch has them, and what goes round is h, or sums of float32.
//
// The rows of a product are cut into tiles of 16, and the inner length into parts, so that each of the
// eight warps has as much of the weights as any other. Sums go through shared memory to the threads
// that run the text, one element (unit, sequence) after another. As many weights as leave the compiler
// enough registers are held in them; the rest stands in shared memory.
//
// Sizes that only take room are known when the kernel runs: hidden units, sequences, CTAs of a team.
#pragma once
#include "backward.h"
#include "forward.h"

namespace fastseq {
namespace FASTSEQ_ISA {

// How the CTAs of a team reach each other. UNITS: of a slice. INNER: bytes of h at most. OPERANDS:
// places for h, of which peers write one while the other is read.
struct ByCluster {
  using Way = ByCluster;
  static constexpr int UNITS = 32, OPERANDS = 2;
  static constexpr bool WAVE = false;
  CONSTANT static int inner(int size) { return 512 * size; }
};
struct ByGrid {
  using Way = ByGrid;
  static constexpr int UNITS = 16, OPERANDS = 1;
  static constexpr bool WAVE = false;
  CONSTANT static int inner(int) { return 4096; }
};
// A grid with slices twice as wide: half as many CTAs read each number of h, or give a part of each sum,
// and half of the weights of a CTA stand in shared memory.
struct ByWideGrid {
  using Way = ByGrid;
  static constexpr int UNITS = 32, OPERANDS = 1;
  static constexpr bool WAVE = false;
  CONSTANT static int inner(int) { return 2048; }
};
// A wave: teams of several layers, which are one cluster. A layer takes a step when the one below it
// has taken it, one exchange before, so T steps of L layers are T + L - 1 exchanges. A CTA then holds
// its rows of w_ih as well, but in the first layer, whose input product is made before.
struct ByWave {
  using Way = ByCluster;
  static constexpr int UNITS = 32, OPERANDS = 2;
  static constexpr bool WAVE = true;
  CONSTANT static int inner(int size) { return 256 * size; }
};

// In the list of kernels these stand in the place of a number of hidden units.
constexpr int cluster = -1, grid = -2, wave = -3, wide = -4;
template <int>
struct OfKind;
template <>
struct OfKind<cluster> {
  using By = ByCluster;
};
template <>
struct OfKind<grid> {
  using By = ByGrid;
};
template <>
struct OfKind<wave> {
  using By = ByWave;
};
template <>
struct OfKind<wide> {
  using By = ByWideGrid;
};

CONSTANT int up_to(int n, int to) { return (n + to - 1) / to * to; }
// From a row of an operand to the next: pairs of rows start half the banks apart.
CONSTANT int pitch_of(int inner) { return inner % 128 ? inner : inner + 64; }

template <class Cell, class Type, class By_>
struct Slice {
  using Number = typename Type::Number;
  using Value = Real<Type::QUICK>;
  using By = By_;
  static constexpr int SIZE = sizeof(Number), PARTS = Type::PARTS, UNITS = By::UNITS;
  static constexpr int G = Cell::G, G_HH = Cell::FIRST[1], C = Cell::C, E = Cell::E, U = Cell::U;
  static constexpr bool MULTIPLIES = true, READS_Y = Cell::READS_H || !Cell::KEEPS_GATES;
  static constexpr bool DIFFERS = Cell::APART > 0 || G_HH < G;
  static_assert(G_HH > 0 && Cell::PHASES == 1 && C <= 1 && PARTS < 2, "what a team walks");

  static constexpr int WARPS = 8, THREADS = WARPS * LANES;
  // Elements that a warp has at once: neighbours are units of one sequence.
  static constexpr int PAGE = LANES;
  // Registers of a thread that hold weights of a matrix, of which a wave has two.
  static constexpr bool WAVE = By::WAVE;
  static constexpr int ROOM = WAVE ? 64 : 128;
  static_assert(!WAVE || G == G_HH, "both matrices have the same rows");

  static constexpr int ROWS = G_HH * UNITS, ROW_TILES = ROWS / 16;
  // Forward: row tiles of a warp, how many warps share the inner length of them, and how many pairs
  // of fragments each warp takes of it, BLOCK at a time.
  static constexpr int TILES = ROW_TILES < 4 ? (ROW_TILES == 3 ? 3 : 1) : ROW_TILES % 3 ? 2 : 3;
  // Tiles of columns that are multiplied at once: what of the weights is not held is read for both.
  static constexpr int COLUMNS = By::OPERANDS == 1 && UNITS == 32 && TILES < 3 ? 2 : 1;
  static constexpr int SPLIT = WARPS * TILES / ROW_TILES;
  static constexpr int BLOCK = SPLIT < 4 && COLUMNS == 1 ? 8 / SPLIT : 2;
  static constexpr int MOST_PAIRS = By::inner(SIZE) / 64 / SPLIT;
  // Unit parameters take registers of their own, which a grid has not to spare.
  static constexpr int ROOM_FORWARD = U > 0 && By::OPERANDS == 1 ? ROOM - 16 : ROOM;
  static constexpr int HELD = least(MOST_PAIRS, ROOM_FORWARD / (8 * TILES) / BLOCK * BLOCK);
  // From a column of the sums to the next, each with the parts of its rows one after another: what two
  // lanes write together is in banks of its own.
  static constexpr int SUMS = SPLIT * ROWS + 4;
  static constexpr int STATES = 1 + C;  // of an element: h, and the other state beside it
  static_assert(SPLIT * ROW_TILES == WARPS * TILES && HELD % BLOCK == 0, "warps have the same work");

  // Backward: the inner length is that of the slice's gates, the row tiles are those of all units.
  static constexpr int INNER = up_to(ROWS * SIZE, 64), PAIRS = INNER / 64;
  static constexpr int PITCH = pitch_of(INNER);
  static constexpr int MOST_TILES = By::inner(SIZE) / SIZE / 16 / WARPS;
  // Sums of unit parameters take registers of their own, which float32 and a grid have not to spare.
  // TOGETHER: how many tiles' products are made side by side.
  static constexpr int ROOM_BACK = U > 0 && (SIZE == 4 || By::OPERANDS == 1) ? ROOM - 32 : ROOM;
  static constexpr int TOGETHER = ROOM_BACK < 16 * PAIRS ? 1 : 2;
  static constexpr int HELD_TILES = least(MOST_TILES, ROOM_BACK / (8 * PAIRS) / TOGETHER * TOGETHER);
  static constexpr int SUBS = UNITS / 16;  // tiles of a slice
  static_assert(HELD_TILES > 0, "something is held");

  // A step's pieces of a row in the ring, as in Tile.
  static constexpr int UNIT = UNITS * SIZE, WIDE = UNITS * 4, STAGES = 4;
  static constexpr int AT_EXTRA = G * UNIT, AT_DY = AT_EXTRA + E * UNIT, AT_H = AT_DY + UNIT;
  static constexpr int AT_C = AT_H + READS_Y * UNIT, AT_DC = AT_C + C * WIDE;
  static constexpr int ROW = AT_EXTRA + 16, ROW_BACK = AT_DC + C * WIDE + 16;
};

// Where things stand in a CTA's shared memory: a function of sizes. pairs: of a warp, of the inner
// length; tiles: of a warp, backward.
// A wave has two operands in each place, two of all sums, and two blocks of weights: those of w_ih
// stand behind those of w_hh.
struct Room {
  int columns, pairs, tiles, pitch, operand, weights, sums;
  int at_weights, at_operands, at_sums, at_states, at_stages, at_pages, at_lengths, at_words, bytes;
};
constexpr int AT_LOST = 16, AT_WEIGHTS = 128;  // behind two boxes; and behind what is small

// inner: bytes of a row of h of all slices.
template <class S>
CONSTANT Room forward_room(int team, int sequences) {
  Room r{};
  const int inner = up_to(team * S::UNIT, 64 * S::SPLIT * S::BLOCK);
  r.columns = up_to(sequences, EIGHT);
  r.pairs = inner / 64 / S::SPLIT;
  r.pitch = pitch_of(inner);
  r.operand = r.columns * r.pitch;
  r.weights = (r.pairs > S::HELD ? r.pairs - S::HELD : 0) * S::TILES * 32 * S::THREADS;
  r.at_weights = AT_WEIGHTS;
  constexpr int MATRICES = S::WAVE ? 2 : 1;
  r.at_operands = r.at_weights + MATRICES * r.weights;
  r.at_sums = r.at_operands + MATRICES * S::By::OPERANDS * r.operand;
  r.sums = r.columns * S::SUMS * 4;
  r.at_states = r.at_sums + MATRICES * r.sums;
  r.at_pages = r.at_states + r.columns * S::UNITS * S::STATES * 4;
  r.at_lengths = r.at_pages + S::WARPS * S::PAGE * S::SIZE;  // and flags of resets
  r.at_words = up_to(r.at_lengths + r.columns * 4 + 2 * r.columns, 16);
  r.at_stages = r.at_words + (S::WAVE ? 2 * team * 16 : 0);
  r.bytes = r.at_stages + S::STAGES * r.columns * S::ROW;
  return r;
}
// Sums come from all of a cluster's CTAs, into two places; in a grid each warp adds up some of them.
template <class S>
CONSTANT Room backward_room(int team, int sequences) {
  Room r{};
  r.columns = up_to(sequences, EIGHT);
  r.tiles = up_to((team * S::SUBS + S::WARPS - 1) / S::WARPS, S::TOGETHER);
  r.pitch = S::PITCH;
  r.operand = r.columns * r.pitch;
  r.weights = (r.tiles > S::HELD_TILES ? r.tiles - S::HELD_TILES : 0) * S::PAIRS * 32 * S::THREADS;
  r.at_weights = AT_WEIGHTS;
  constexpr int MATRICES = S::WAVE ? 2 : 1;
  r.at_operands = r.at_weights + MATRICES * r.weights;
  r.at_sums = r.at_operands + MATRICES * r.operand;
  const int elements = r.columns * S::UNITS * 4, places = S::By::OPERANDS == 2 ? 2 * team : S::WARPS;
  r.sums = places * elements;
  r.at_states = r.at_sums + MATRICES * r.sums;
  r.at_pages = r.at_lengths = r.at_states + 5 * elements;
  r.at_words = up_to(r.at_lengths + r.columns * 4 + 2 * r.columns, 16);
  r.at_stages = r.at_words + (S::WAVE ? 2 * team * 16 : 0);
  r.bytes = r.at_stages + S::STAGES * r.columns * S::ROW_BACK;
  return r;
}

// A CTA's part in a team, and a thread's in the CTA.
template <class S>
struct Member {
  const Arguments& a;
  const int lane, warp, g = lane >> 2, q = lane & 3;
  const int H = int(a.H), team = int(a.team), layers = S::WAVE ? int(a.layers) : 1;
  const int layer, rank, tile, recurrence;
  const int first = int(a.first) + tile * int(a.tile);  // of the team's sequences
  const int count = least(int(a.tile), int(a.B) - first);
  const int origin = rank * S::UNITS;               // the slice's first unit
  const int width = least(H - origin, S::UNITS);    // how many it has
  const bool reverse = (a.reverse >> (recurrence % 32)) & 1;
  const int stride = int(a.R) * H;  // from a row to the next, of H numbers each recurrence
  const int place = layer * int(a.R) + recurrence;  // among all that have states and weights

  DEVICE explicit Member(const Arguments& a) : Member(a, thread(), tile_x(), tile_y()) {}
  DEVICE Member(const Arguments& a, int thread, int x, int y)
      : a(a), lane(thread & 31), warp(thread >> 5),
        layer(S::WAVE ? x % (team * layers) / team : 0), rank(x % team),
        tile(x / (team * layers)), recurrence(int(a.start) + y) {}
  // The same behind the loop, which takes no register in it.
  DEVICE static Member again(const Arguments& a) {
    return Member(a, thread_again(), tile_x_again(), tile_y_again());
  }

  DEVICE int length(int column) const {
    if (column >= count) return 0;
    return a.lengths ? int(a.lengths[first + column]) : int(a.T);
  }
  // The first row of a step of the team, in its layer. There are fewer than 2^31 in all.
  DEVICE int row_of_layer(int time) const {
    return (a.offsets ? int(a.offsets[time]) : time * int(a.B)) + first;
  }
  // Where an element's number is: of the states, and of a row of H numbers each recurrence.
  DEVICE int64_t state(int column, int unit) const {
    return (int64_t(place) * a.B + first + column) * H + origin + unit;
  }
  DEVICE int64_t beside(int column, int unit) const {
    return int64_t(column) * stride + recurrence * H + origin + unit;
  }
  // Of the slice's rows of w_hh, one: of a gate of a unit. Rows have `pitch` numbers, whole vectors of
  // 16 bytes. There is none beyond the last: is_row().
  const int pitch = up_to(H, 16 / S::SIZE);
  DEVICE bool is_row(int row) const { return row < S::ROWS && row % S::UNITS < width; }
  DEVICE const typename S::Number* weights(int row) const {
    return static_cast<const typename S::Number*>(a.w_hh) +
           row_of_weights(place, row);
  }
  DEVICE const typename S::Number* input_weights(int row) const {  // not of the first layer
    return static_cast<const typename S::Number*>(a.w_ih) +
           row_of_weights(place - int(a.R), row);
  }
  DEVICE int64_t row_of_weights(int place, int row) const {
    return ((int64_t(place) * S::G_HH + row / S::UNITS) * H + origin + row % S::UNITS) * pitch;
  }
  // Of a number each unit, `count` of them each recurrence: that of a unit of the slice.
  DEVICE int64_t unit_of(int place, int count, int which, int unit) const {
    return (int64_t(place) * count + which) * H + origin + unit;
  }
};

// Weights as operands take them: in TF32 rounded. `is`: else zeros. There is no branch, so that loads
// of many are on their way together.
template <class S>
DEVICE Words4 weight_words(bool is, Words4 w) {
#pragma unroll
  for (int j = 0; j < 4; ++j) w.w[j] = !is ? 0 : S::PARTS == 1 ? high(w.w[j]) : w.w[j];
  return w;
}
template <class Number>
struct alignas(2 * sizeof(Number)) Columns {  // two neighbours of a row, as they stand
  uint32_t w[sizeof(Number) / 2];
};

// A warp's weights: `tiles` row tiles by `pairs` of the inner length, of which HELD_TILES by HELD_PAIRS
// are held in registers, the rest in shared memory in the order in which it is read.
template <class S, int HELD_TILES, int HELD_PAIRS>
struct Held {
  struct Pair {
    uint32_t w[2][4];
  };
  Pair held[HELD_TILES][HELD_PAIRS];
  unsigned char* rest;  // this lane's

  DEVICE unsigned char* resting(int fragment) const { return rest + fragment * S::THREADS * 16; }

  // both(upper, lower, tile, pair): this lane's 16 bytes of rows g and g + 8 of a tile
  template <class Both>
  DEVICE static void split(Pair& to, const Both& both, int tile, int pair) {
    Words4 upper, lower;
    both(upper, lower, tile, pair);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      to.w[k][0] = upper.w[2 * k], to.w[k][1] = lower.w[2 * k];
      to.w[k][2] = upper.w[2 * k + 1], to.w[k][3] = lower.w[2 * k + 1];
    }
  }
  // As many tiles as there are. Those that are not there are not used; the branch keeps the loads of
  // one tile from all others', which would take registers for their addresses.
  template <class Both>
  DEVICE void hold(const Both& both, int tiles) {
#pragma unroll
    for (int m = 0; m < HELD_TILES; ++m) {
      if (m >= tiles) break;
#pragma unroll
      for (int pair = 0; pair < HELD_PAIRS; ++pair) split(held[m][pair], both, m, pair);
    }
  }
  template <class Both>
  DEVICE void rest_of(const Both& both, int fragment, int tile, int pair) const {
    Pair one;
    split(one, both, tile, pair);
#pragma unroll
    for (int k = 0; k < 2; ++k)
      store(resting(2 * fragment + k), Words4{{one.w[k][0], one.w[k][1], one.w[k][2], one.w[k][3]}});
  }
  DEVICE Pair load_rest(int fragment) const {
    Pair both;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const Words4 w = load<Words4>(resting(2 * fragment + k));
#pragma unroll
      for (int j = 0; j < 4; ++j) both.w[k][j] = w.w[j];
    }
    return both;
  }
  DEVICE static void add(float (&first)[4], float (&second)[4], const Pair& w, const Words4& b) {
    mma(first, w.w[0], b.w[0], b.w[1], typename S::Number());
    mma(second, w.w[1], b.w[2], b.w[3], typename S::Number());
  }
};

// COUNT pieces of `bytes` each of `rows` rows, one after another, by all threads: each(row, piece, at,
// how many bytes at once). What vectors of 16 bytes do not reach comes so.
template <class S, int COUNT, class Each>
DEVICE void each_piece(int rows, int bytes, int alignment, const Each& each) {
  const unsigned me = unsigned(thread_again()), all_rows = unsigned(rows) * COUNT;
  const int all = bytes | alignment, grain = all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 2;
#pragma unroll 1
  for (unsigned k = me / LANES; k < all_rows; k += S::WARPS)
#pragma unroll 1
    for (int at = int(me % LANES) * grain; at < bytes; at += LANES * grain)
      each(int(k / COUNT), int(k % COUNT), at, grain);
}
DEVICE void fetch_bytes(unsigned char* to, const unsigned char* from, int grain) {
  if (grain == 16)
    copy<16>(to, from);
  else if (grain == 4)
    copy<4>(to, from);
  else
    store(to, load<uint16_t>(from));
}
DEVICE void put_bytes(unsigned char* to, const unsigned char* from, int grain) {
  if (grain == 16)
    store(to, load<Words4>(from));
  else if (grain == 4)
    store(to, load<uint32_t>(from));
  else
    store(to, load<uint16_t>(from));
}
// Kept, but by a grid, which has not the registers.
template <class S, class V>
DEVICE V spared(V v) {
  return S::By::OPERANDS == 2 ? kept(v) : v;
}

// Rows of several arrays beside each other, in vectors of 16 bytes, of which there are at most ALL in a
// row: a thread has the same vector of every STEP-th row, at every step, and knows where it is.
template <class S, int ALL>
struct Vectors {
  static constexpr int STEP = S::THREADS / ALL;
  static_assert(STEP > 0, "a vector for each thread");
  // from the last thread on: the last warps have the least to do else
  int row = (S::THREADS - 1 - thread()) / ALL, which = (S::THREADS - 1 - thread()) % ALL;
  const int line;                  // from a row to the next here, in shared memory
  unsigned char* here;             // its first row's; what follows are the places of steps
  unsigned char* there = nullptr;  // of row 0 in global memory; null: this thread has none
  int pitch = 0;                   // from a row to the next there
  bool before = false;

  DEVICE Vectors(unsigned char* stages, int line) : line(line), here(stages + row * line) {}
  // COUNT pieces of BYTES, of which `width` are there, `apart` from one to the next, in row 0 from
  // byte `first` of an array on.
  template <int COUNT, int BYTES>
  DEVICE void of(const void* base, int64_t pitch, int64_t apart, int width, int place,
                 bool before = false, int64_t first = 0) {
    constexpr int EACH = BYTES / 16;
    const int piece = which / EACH, at = which % EACH * 16;
    if (base && row < STEP && which >= 0 && which < COUNT * EACH && at < width) {
      there = static_cast<unsigned char*>(const_cast<void*>(base)) + first + piece * apart + at;
      this->pitch = int(pitch), here += place + piece * BYTES + at, this->before = before;
    }
    which -= COUNT * EACH;
  }
  DEVICE void keep() { here = kept(here), pitch = spared<S>(pitch); }
  // Of `rows` rows from number `first` on: each(row, here, there).
  template <class Each>
  DEVICE void each(int rows, int first, int stage, const Each& each) const {
    if (!there) return;
    unsigned char* to = here + stage;
#pragma unroll 1
    for (int r = row; r < rows; r += STEP, to += STEP * line)
      each(r, to, there + int64_t(first + r) * pitch);
  }
};
// What divides a place and the way from a piece to the next.
DEVICE int alignment_of(const void* p, int64_t pitch) {
  return (int(reinterpret_cast<uintptr_t>(p)) | int(pitch)) & 15;
}

// A team's steps: which time each is, from the first to the last or back, and its first row.
template <class S>
struct Steps {
  const Member<S>& me;
  const int first, by;          // times
  const int first_row, by_row;  // and rows, where all sequences have all steps
  const int base;               // of rows

  // back: from the last step of `count` to the first.
  DEVICE Steps(const Member<S>& me, int count, bool back, int layer)
      : me(me), first(spared<S>(back ? count - 1 : 0)), by(back ? -1 : 1),
        first_row(spared<S>(me.first + layer * int(me.a.rows) +
                         (back ? count - 1 : 0) * int(me.a.B))),
        by_row(spared<S>((back ? -1 : 1) * int(me.a.B))), base(me.first + layer * int(me.a.rows)) {}
  DEVICE int time(int step) const { return first + step * by; }
  DEVICE int row(int step) const {
    return me.a.offsets ? base + int(me.a.offsets[time(step)]) : first_row + step * by_row;
  }
};

// Whether states are zeroed at a step, of each column: a thread looks for one column's two steps ahead,
// and puts it where all see it behind the step's barrier.
template <class S>
struct Resets {
  const Member<S>& me;
  unsigned char* const flags;
  const int columns;

  DEVICE Resets(const Member<S>& me, unsigned char* flags, int columns)
      : me(me), flags(flags), columns(columns) {}

  DEVICE bool look(int time) const {
    const int column = thread();
    return me.a.reset && time < me.length(column) &&
           me.a.reset[me.recurrence * me.a.rows + me.row_of_layer(time) + column] != 0;
  }
  DEVICE void put(int step, bool is_reset) const {
    if (me.a.reset && thread() < me.count) flags[(step & 1) * columns + thread()] = is_reset;
  }
  DEVICE bool of(int step, int column) const {
    return me.a.reset && flags[(step & 1) * columns + column] != 0;
  }
};

// Waits in vain no longer than the caller's patience, and tells; with none it gives up before it looks.
// Nobody of a CTA waits after that, what it makes is NaN, and it hands nothing on: others run out of
// patience themselves, and no place is written that they may still read.
template <class Ready>
DEVICE void wait_for(const Arguments& a, int32_t* lost, const Ready& ready) {
  for (int64_t looks = 0; looks >= a.patience || !ready(); ++looks) {
    if (is_marked(lost)) return;
    if (looks >= a.patience) {
      mark(lost);
      if (a.fault) tell(a.fault, int32_t(a.code));
      return;
    }
    look_again();
  }
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

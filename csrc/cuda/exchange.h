// How the CTAs of a team hand numbers to each other: h forward, sums backward, once a step. An
// exchange n is handed on by all and taken in by all; n and n + 1 go through places of their own.
//
// A CTA hands on n + 1 only when it has taken in n, which another handed on behind the barrier that
// follows its last read of n - 1. So what is written over nobody reads any more.
//
// By a cluster: into the receiver's shared memory, where a box of each place counts the bytes. By a
// grid: in packets of 16 bytes through global memory, which carry the exchange that they belong to, n + 1,
// or its last 16 bits beside h of 16 bits: waiting is loading. What else may stand in their place is of n - 2,
// or zeros. h of 16 bits goes as it is; h in TF32, and sums, as numbers of 24 bits, 2^-17 of each, which is
// less than what a product's operands were rounded by.
#pragma once
#include "team.h"

namespace fastseq {
namespace FASTSEQ_ISA {

template <class S, class Way = typename S::By::Way>
struct Exchange;

template <class S>
struct Exchange<S, ByCluster> {
  const Member<S>& me;
  const Room& room;
  unsigned char* const memory;
  int32_t* const lost;
  const int count, bytes;  // of exchanges, and of what a CTA is given in each
  // A lane hands on a vector of a page of h, which are the units of one sequence, to every CTAS-th CTA.
  static constexpr int VECTOR = 16 / S::SIZE, VECTORS = S::PAGE / VECTOR, CTAS = LANES / VECTORS;
  const int vector = kept(me.lane % VECTORS * 16), receiver = kept(me.lane / VECTORS);
  const int slice = kept(me.origin * S::SIZE + vector), receivers = kept(me.team - receiver);

  DEVICE Exchange(const Member<S>& me, const Room& room, unsigned char* memory, int count, int bytes,
                  bool)
      : me(me), room(room), memory(kept(memory)),
        lost(reinterpret_cast<int32_t*>(this->memory + AT_LOST)), count(count), bytes(bytes) {}

  DEVICE Box* box(int n) const { return reinterpret_cast<Box*>(memory) + (n & 1); }

  DEVICE void begin() const {
    if (thread() == 0) {
      open(box(0)), open(box(1));
      if (count > 0) expect(box(0), bytes);
      if (count > 1) expect(box(1), bytes);
    }
    meet_cluster();
  }
  // Nobody leaves while others may still write into its memory.
  DEVICE void end() const { meet_cluster(); }

  DEVICE void take_in(int n) const {
    wait_for(me.a, lost, [&] { return has_come(box(n), n >> 1 & 1); });
  }
  // Behind a barrier that follows take_in(n): what comes in n + 2 is expected, which is all that the
  // place needs. By the last warp, which has the least to do.
  DEVICE void again(int n) const {
    if (thread() == S::THREADS - 1 && n + 2 < count && !is_marked(lost)) expect(box(n), bytes);
  }

  static constexpr int MATRICES = S::WAVE ? 2 : 1;

  // of_input: in a wave, the h of the layer below.
  DEVICE unsigned char* operand(int n, bool of_input = false) const {
    return memory + room.at_operands + ((n & 1) * MATRICES + of_input) * room.operand;
  }
  // A page of h, by a warp: every vector to every CTA of the layer, or of the one above.
  DEVICE void hand_h(int n, int page, const unsigned char* h, bool above = false) const {
    static_assert(S::UNITS == S::PAGE, "a page is of one sequence");
    const Words4 w = load<Words4>(h + vector);
    unsigned char* const to = operand(n, above) + page * room.pitch + slice;
    const int first = receiver + (S::WAVE ? (me.layer + above) * me.team : 0);
#pragma unroll 1
    for (int k = 0; k < receivers; k += CTAS) push(to, box(n), first + k, w);
  }
  // In a wave the layer that is handed h, or sums, by another hands it nothing back but a word: that
  // it is behind the barrier that follows its last read of n - 1.
  static constexpr int WORD = 16;  // bytes
  DEVICE void hand_word(int n, int layer) const {
    if (WORD && thread() < me.team)
      push(memory + room.at_words + ((n & 1) * me.team + me.rank) * 16, box(n),
           layer * me.team + thread(), Words4{});
  }
  DEVICE void take_h(int n) const { take_in(n); }

  // Where the sums of an exchange stand, one after another of so many CTAs.
  DEVICE int parts() const { return me.team; }
  // of_above: in a wave, of the layer above.
  DEVICE unsigned char* sums(int n, bool of_above = false) const {
    return memory + room.at_sums + of_above * room.sums +
           (n & 1) * me.team * room.columns * S::UNITS * 4;
  }
  // What lanes have of one tile, to the CTA that owns it, of the layer or of the one below, but for
  // columns without a sequence. elements: of a slice.
  DEVICE void hand_sums(int n, int tile, int columns, int elements, const float (&v)[4],
                        bool below) const {
    if (columns * EIGHT + 2 * me.q >= me.count) return;
    const int place = me.rank * elements + (columns * S::SUBS + tile % S::SUBS) * 128 + me.lane * 4;
    push(sums(n, below) + place * 4, box(n), (me.layer - below) * me.team + tile / S::SUBS,
         Words4{{float_to_bits(v[0]), float_to_bits(v[1]), float_to_bits(v[2]),
                 float_to_bits(v[3])}});
  }
  DEVICE void take_sums(int n, int) const { take_in(n); }
};

// Numbers of 24 bits: a float32 without its last 8.
DEVICE uint32_t rounded(float v) {  // to nearest; of a NaN the sum would be no NaN
  const uint32_t w = float_to_bits(v);
  return (v == v ? w + 0x80 : w) >> 8;
}
DEVICE Words4 packed(uint32_t a, uint32_t b, uint32_t c, uint32_t d, int epoch) {
  return {{a | b << 24, b >> 8 | c << 16, c >> 16 | d << 8, uint32_t(epoch)}};
}
DEVICE void unpack(float (&v)[4], const Words4& p) {
  v[0] = bits_to_float(p.w[0] << 8);
  v[1] = bits_to_float((p.w[0] >> 24 | p.w[1] << 8) << 8);
  v[2] = bits_to_float((p.w[1] >> 16 | p.w[2] << 16) << 8);
  v[3] = bits_to_float(p.w[2] >> 8 << 8);
}

template <class S>
struct Exchange<S, ByGrid> {
  const Member<S>& me;
  const Room& room;
  unsigned char* const memory;
  int32_t* const lost;
  // Packets of a page of h. What a page of all CTAs has stands one packet after another, and pages do:
  // a warp takes GROUPS of a CTA's packets of a page at once, a lane always the same packet of them, and
  // BATCH of those before it looks at any; of sums those of so many SENDERS.
  static constexpr int PACKETS = S::SIZE == 2 ? 5 : 8, GROUPS = LANES / PACKETS, BYTES = 16;
  static constexpr int H_EPOCH = S::SIZE == 2 ? 16 : 32;  // bits
  static constexpr int AT_ONCE = S::WARPS * GROUPS, BATCH = 6;
  static constexpr int SENDERS = S::UNITS == 32 ? 4 : S::SIZE == 4 || S::PAIRS == 1 ? 6 : 8;
  // This team's packets, and how many bytes from one place to the other.
  unsigned char* const base;
  const int apart;
  // This lane's packet, its first group, and where its words go: of three of 16 bits 32 a page, of those
  // in TF32 four numbers.
  const int packet = me.lane % PACKETS, group = me.warp * GROUPS + me.lane / PACKETS;
  const int own = narrow_kept((group * PACKETS + packet) * BYTES);
  int first_word;
  const unsigned each_team = unsigned(kept(int(0xffffffffu / unsigned(me.team) + 1)));

  // sums: it is those that are handed on, else h.
  DEVICE Exchange(const Member<S>& me, const Room& room, unsigned char* memory, int, int, bool sums)
      : me(me), room(room), memory(kept(memory)),
        lost(reinterpret_cast<int32_t*>(this->memory + AT_LOST)),
        base(static_cast<unsigned char*>(me.a.packets) +
             (int64_t(me.tile) * me.a.R + me.recurrence) * 2 * (sums ? of_sums() : of_h())),
        apart(sums ? of_sums() : of_h()) {
    // of a page, a sequence of which has UNIT bytes
    const int byte = packet * (S::SIZE == 2 ? 12 : 16);
    first_word = narrow_kept(byte / S::UNIT * room.pitch + byte % S::UNIT);
  }
  // Wide slices have no registers for them.
  DEVICE static int narrow_kept(int v) { return S::UNITS < S::PAGE ? kept(v) : v; }

  DEVICE void begin() const { meet(); }
  DEVICE void end() const {}
  DEVICE void again(int) const {}

  // What the packets of an exchange are known by; those of no exchange are 0.
  DEVICE static int epoch(int n) { return n + 1; }
  DEVICE unsigned char* packets(int n) const { return base + (n & 1) * apart; }
  // Bytes of an exchange of h, and of sums.
  DEVICE int of_h() const {
    return (int(me.a.tile) * S::UNITS + S::PAGE - 1) / S::PAGE * me.team * PACKETS * BYTES;
  }
  DEVICE int of_sums() const { return me.team * me.team * each() * BYTES; }
  // COUNT packets of an exchange, or the `have` that there are, from one to the next `pitch` bytes: asked
  // for side by side, and until all are there those that are missing again.
  template <int COUNT>
  DEVICE static void ask(Words4 (&got)[COUNT], const unsigned char* from, int have, int pitch) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
      if (k < have) got[k] = load_packet(from + k * pitch);
  }
  template <int BITS, int COUNT>
  DEVICE void wait(Words4 (&got)[COUNT], int epoch, const unsigned char* from, int have,
                   int pitch) const {
    const auto is = [&](const Words4& p) {
      return p.w[3] << (32 - BITS) == uint32_t(epoch) << (32 - BITS);
    };
    wait_for(me.a, lost, [&] {
      bool all = true;
#pragma unroll
      for (int k = 0; k < COUNT; ++k) all &= k >= have || is(got[k]);
      if (all) return true;
#pragma unroll
      for (int k = 0; k < COUNT; ++k)
        if (k < have && !is(got[k])) got[k] = load_packet(from + k * pitch);
      return false;
    });
  }

  DEVICE unsigned char* operand(int) const { return memory + room.at_operands; }
  // Of the 16 words of a page of 16 bits packet k has three, 3 k on, and the first two packets half of
  // the last word as well, beside the lower half of the epoch. In TF32 a packet has four numbers.
  DEVICE void hand_h(int n, int page, const unsigned char* h, bool = false) const {
    if (me.lane >= PACKETS) return;
    Words4 packet{{0, 0, 0, uint32_t(epoch(n))}};
    if constexpr (S::SIZE == 2) {
#pragma unroll
      for (int j = 0; j < 3; ++j) packet.w[j] = load<uint32_t>(h + (3 * me.lane + j) * 4);
      const uint32_t half = load<uint16_t>(h + 60 + (me.lane & 1) * 2);
      packet.w[3] = half << 16 | (packet.w[3] & 0xffff);
    } else {
      const Words4 w = load<Words4>(h + me.lane * 16);
      packet = packed(w.w[0] >> 8, w.w[1] >> 8, w.w[2] >> 8, w.w[3] >> 8, epoch(n));
    }
    store_packet(packets(n) + ((page * me.team + me.rank) * PACKETS + me.lane) * BYTES, packet);
  }
  DEVICE void take_h(int n) const {
    const unsigned team = unsigned(me.team);
    const int used = (me.count * S::UNITS + S::PAGE - 1) / S::PAGE * int(team);  // groups
    constexpr int PITCH = AT_ONCE * PACKETS * BYTES;
    const unsigned char* from = packets(n) + own;
    unsigned at = unsigned(group);
    int have = me.lane < GROUPS * PACKETS ? (used - group + AT_ONCE - 1) / AT_ONCE : 0;
#pragma unroll 1
    for (; have > 0; have -= BATCH, at += BATCH * AT_ONCE, from += BATCH * PITCH) {
      Words4 got[BATCH];
      ask(got, from, have, PITCH);
      wait<H_EPOCH>(got, epoch(n), from, have, PITCH);
#pragma unroll
      for (int k = 0; k < BATCH; ++k) {
        if (k >= have) continue;
        const unsigned one = at + k * AT_ONCE;
        const unsigned page = team > 1 ? quotient(one, each_team) : one, sender = one - page * team;
        put_h(operand(0) + page * (S::PAGE / S::UNITS) * room.pitch + sender * S::UNIT, got[k]);
      }
    }
    meet();
  }
  DEVICE void put_h(unsigned char* to, const Words4& p) const {
    if constexpr (S::SIZE == 2) {
      // Slices of 16 units have two sequences in a page: the second begins with word 8, the last of
      // packet 2, and ends with word 15.
      constexpr bool TWO = S::UNITS < S::PAGE;
      const int second = room.pitch - S::UNIT;
      unsigned char* const first = to + first_word;
      store(first, p.w[0]), store(first + 4, p.w[1]);
      store(first + 8 + (TWO && first_word == 24 ? second : 0), p.w[2]);
      if (first_word <= 12)
        store(to + 60 + (TWO ? second : 0) + (first_word ? 2 : 0), uint16_t(p.w[3] >> 16));
    } else {
      float v[4];
      unpack(v, p);
      store(to + first_word, Words4{{float_to_bits(v[0]), float_to_bits(v[1]), float_to_bits(v[2]),
                                  float_to_bits(v[3])}});
    }
  }

  DEVICE int parts() const { return S::WARPS; }
  DEVICE unsigned char* sums(int) const { return memory + room.at_sums; }
  // Of all sums that a CTA gets from another there is a packet for each lane of each tile.
  DEVICE int each() const { return room.columns * S::UNITS / 4; }
  DEVICE void hand_sums(int n, int tile, int columns, int, const float (&v)[4], bool) const {
    if (columns * EIGHT + 2 * me.q >= me.count) return;
    store_packet(
        packets(n) + ((tile / S::SUBS * me.team + me.rank) * each() +
                      (columns * S::SUBS + tile % S::SUBS) * LANES + me.lane) *
                         BYTES,
        packed(rounded(v[0]), rounded(v[1]), rounded(v[2]), rounded(v[3]), epoch(n)));
  }
  // Each warp adds up what some of the CTAs gave.
  DEVICE void take_sums(int n, int elements) const {
    const int pitch = each() * BYTES;
    const unsigned char* const from =
        packets(n) + (me.rank * me.team + me.warp) * pitch + me.lane * BYTES;
    const int of_warp = (me.team - me.warp + S::WARPS - 1) / S::WARPS;  // CTAs
#pragma unroll 1
    for (int place = 0; place < elements / 4; place += LANES) {
      float total[4] = {};
      const int all = place / (LANES * S::SUBS) * EIGHT + 2 * me.q < me.count ? of_warp : 0;
#pragma unroll 1
      for (int first = 0; first < all; first += SENDERS) {
        Words4 got[SENDERS];
        const unsigned char* const here = from + first * S::WARPS * pitch + place * BYTES;
        ask(got, here, all - first, S::WARPS * pitch);
        wait<32>(got, epoch(n), here, all - first, S::WARPS * pitch);
#pragma unroll
        for (int k = 0; k < SENDERS; ++k) {
          float v[4];
          unpack(v, got[k]);
#pragma unroll
          for (int j = 0; j < 4; ++j) total[j] += first + k < all ? v[j] : 0.0f;
        }
      }
      store(sums(n) + ((me.warp * elements) + (place + me.lane) * 4) * 4,
            Words4{{float_to_bits(total[0]), float_to_bits(total[1]), float_to_bits(total[2]),
                    float_to_bits(total[3])}});
    }
    meet();
  }
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

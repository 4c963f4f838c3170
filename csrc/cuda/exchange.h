// How the CTAs of a team hand numbers to each other: h forward, sums backward, once a step. An
// exchange n is handed on by all and taken in by all; n and n + 1 go through places of their own.
//
// A CTA hands on n + 1 only when it has taken in n, which another handed on behind the barrier that
// follows its last read of n - 1. So what is written over nobody reads any more.
//
// By a cluster: into the receiver's shared memory, where a box of each place counts the bytes. By a
// grid: in packets of 16 bytes through global memory, 12 of numbers and the exchange that they belong
// to, n + 1, which only grows: waiting is loading. h of 16 bits goes as it is; h in TF32, and sums, as
// numbers of 24 bits, 2^-17 of each, which is less than what a product's operands were rounded by.
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
  static constexpr int VECTOR = 16 / S::SIZE, VECTORS = S::PAGE / VECTOR;

  DEVICE Exchange(const Member<S>& me, const Room& room, unsigned char* memory, int count, int bytes)
      : me(me), room(room), memory(memory), lost(reinterpret_cast<int32_t*>(memory + AT_LOST)),
        count(count), bytes(bytes) {}

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
    if (thread() == 0 && n + 2 < count && !is_marked(lost)) expect(box(n), bytes);
  }

  static constexpr int MATRICES = S::WAVE ? 2 : 1;

  // of_input: in a wave, the h of the layer below.
  DEVICE unsigned char* operand(int n, bool of_input = false) const {
    return memory + room.at_operands + ((n & 1) * MATRICES + of_input) * room.operand;
  }
  // A page of h, by a warp: every vector to every CTA of the layer, or of the one above.
  DEVICE void hand_h(int n, int page, const unsigned char* h, bool above = false) const {
    const unsigned vector = unsigned(me.lane) % VECTORS;
    const unsigned element = unsigned(page) * S::PAGE + vector * VECTOR;
    const int column = int(element / S::UNITS), unit = int(element % S::UNITS);
    if (column >= me.count) return;
    const Words4 w = load<Words4>(h + vector * 16);
    unsigned char* const to =
        operand(n, above) + column * room.pitch + (me.origin + unit) * S::SIZE;
    const int first = (me.layer + above) * me.team;
#pragma unroll 1
    for (int receiver = int(unsigned(me.lane) / VECTORS); receiver < me.team;
         receiver += LANES / VECTORS)
      push(to, box(n), first + receiver, w);
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
  // Packets of a page of h. Of a page from all CTAs, MOST of them, a thread takes EACH, and PAGES of
  // them side by side; of sums those of so many SENDERS. With 6 loads of each thread on their way L2
  // gives about half of what it can, 64 bytes a clock; for more there are no registers.
  static constexpr int PACKETS = S::SIZE == 2 ? 6 : 8, MOST = S::By::inner(S::SIZE) / S::UNIT;
  static constexpr int EACH = (MOST * PACKETS + S::THREADS - 1) / S::THREADS;
  static constexpr int PAGES = (S::U > 0 ? 4 : 6) / EACH;
  static constexpr int SENDERS = 6;

  DEVICE Exchange(const Member<S>& me, const Room& room, unsigned char* memory, int, int)
      : me(me), room(room), memory(memory), lost(reinterpret_cast<int32_t*>(memory + AT_LOST)) {}

  DEVICE void begin() const { meet(); }
  DEVICE void end() const {}

  // What the packets of an exchange are known by; those of no exchange are 0.
  DEVICE static int epoch(int n) { return n + 1; }
  // The packets of an exchange of this team, where there is room for so many in each.
  DEVICE Words4* packets(int n, int64_t each) const {
    const int64_t team = int64_t(me.tile) * me.a.R + me.recurrence;
    return static_cast<Words4*>(me.a.packets) + (team * 2 + (n & 1)) * each;
  }
  DEVICE int pages() const { return (int(me.a.tile) * S::UNITS + S::PAGE - 1) / S::PAGE; }
  // Until all COUNT packets of an exchange are there: from(k) is where, or null where there is none.
  // Those that are missing are looked for side by side, so a look takes as long as one load.
  template <int COUNT, class From>
  DEVICE void wait(Words4 (&got)[COUNT], int epoch, const From& from) const {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) got[k].w[3] = 0;  // of no exchange
    wait_for(me.a, lost, [&] {
#pragma unroll
      for (int k = 0; k < COUNT; ++k)
        if (from(k) && got[k].w[3] != uint32_t(epoch)) got[k] = load_packet(from(k));
      bool all = true;
#pragma unroll
      for (int k = 0; k < COUNT; ++k) all &= !from(k) || got[k].w[3] == uint32_t(epoch);
      return all;
    });
  }

  DEVICE unsigned char* operand(int) const { return memory + room.at_operands; }
  // A packet of a page of h has three words, or four numbers.
  DEVICE void hand_h(int n, int page, const unsigned char* h) const {
    if (me.lane >= PACKETS) return;
    Words4* const to =
        packets(n, int64_t(pages()) * me.team * PACKETS) +
        (int64_t(page) * me.team + me.rank) * PACKETS + me.lane;
    Words4 packet{{0, 0, 0, uint32_t(epoch(n))}};
    if constexpr (S::SIZE == 2) {
#pragma unroll
      for (int j = 0; j < 3; ++j)
        if (3 * me.lane + j < S::PAGE / 2)
          packet.w[j] = load<uint32_t>(h + (3 * me.lane + j) * 4);
    } else {
      const Words4 w = load<Words4>(h + me.lane * 16);
      packet = packed(w.w[0] >> 8, w.w[1] >> 8, w.w[2] >> 8, w.w[3] >> 8, epoch(n));
    }
    store_packet(to, packet);
  }
  DEVICE void take_h(int n) const {
    const int all = me.team * PACKETS, used = (me.count * S::UNITS + S::PAGE - 1) / S::PAGE;
    const int own = thread_again();
    const Words4* const from = packets(n, int64_t(pages()) * all);
#pragma unroll 1
    for (int page = 0; page < used; page += PAGES) {
      Words4 got[PAGES * EACH];
      const auto is = [&](int k) {
        return page + k / EACH < used && k % EACH * S::THREADS + own < all;
      };
      wait(got, epoch(n), [&](int k) {
        return is(k) ? from + (page + k / EACH) * all + k % EACH * S::THREADS + own : nullptr;
      });
#pragma unroll
      for (int k = 0; k < PAGES * EACH; ++k) {
        const unsigned packet = unsigned(k % EACH * S::THREADS + own);
        if (is(k)) put_h(page + k / EACH, int(packet / PACKETS), int(packet % PACKETS), got[k]);
      }
    }
    meet();
  }
  DEVICE void put_h(int page, int sender, int packet, const Words4& p) const {
    constexpr int LINE = S::UNIT;  // of a sequence in a page
    const auto place = [&](int byte) {
      const int column = page * (S::PAGE / S::UNITS) + byte / LINE;
      return operand(0) + column * room.pitch + sender * LINE + byte % LINE;
    };
    if constexpr (S::SIZE == 2) {
#pragma unroll
      for (int j = 0; j < 3; ++j)
        if (3 * packet + j < S::PAGE / 2) store(place((3 * packet + j) * 4), p.w[j]);
    } else {
      float v[4];
      unpack(v, p);
      store(place(packet * 16), Words4{{float_to_bits(v[0]), float_to_bits(v[1]),
                                        float_to_bits(v[2]), float_to_bits(v[3])}});
    }
  }

  DEVICE int parts() const { return S::WARPS; }
  DEVICE unsigned char* sums(int) const { return memory + room.at_sums; }
  // Of all sums that a CTA gets from another there is a packet for each lane of each tile.
  DEVICE int64_t each() const { return int64_t(room.columns) * S::UNITS / 4; }
  DEVICE void hand_sums(int n, int tile, int columns, int, const float (&v)[4], bool) const {
    if (columns * EIGHT + 2 * me.q >= me.count) return;
    Words4* const to =
        packets(n, each() * me.team * me.team) +
        (int64_t(tile / S::SUBS) * me.team + me.rank) * each() +
        (columns * S::SUBS + tile % S::SUBS) * LANES + me.lane;
    store_packet(to, packed(rounded(v[0]), rounded(v[1]), rounded(v[2]), rounded(v[3]), epoch(n)));
  }
  // Each warp adds up what some of the CTAs gave.
  DEVICE void take_sums(int n, int elements) const {
    const Words4* const from = packets(n, each() * me.team * me.team) +
                               int64_t(me.rank) * me.team * each() + me.lane;
#pragma unroll 1
    for (int place = 0; place < elements / 4; place += LANES) {
      float total[4] = {};
      const bool is_given = place / (LANES * S::SUBS) * EIGHT + 2 * me.q < me.count;
#pragma unroll 1
      for (int first = is_given ? me.warp : me.team; first < me.team;
           first += S::WARPS * SENDERS) {
        Words4 got[SENDERS];
        wait(got, epoch(n), [&](int k) {
          const int sender = first + k * S::WARPS;
          return sender < me.team ? from + sender * each() + place : nullptr;
        });
#pragma unroll
        for (int k = 0; k < SENDERS; ++k) {
          float v[4];
          unpack(v, got[k]);
#pragma unroll
          for (int j = 0; j < 4; ++j) total[j] += first + k * S::WARPS < me.team ? v[j] : 0.0f;
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

// Kernels that try the words of csrc/cuda/words.h, of memory that the test lays out.
#include "words.h"

using namespace fastseq::FASTSEQ_ISA;

namespace {

// A lane's words of a (4), of b (2) and its numbers of d (4), which are added to.
template <class Type>
void product(const fastseq::Arguments& at) {
  const uint32_t* a = static_cast<const uint32_t*>(at.w_hh) + 4 * thread();
  const uint32_t* b = static_cast<const uint32_t*>(at.b_hh) + 2 * thread();
  float* d = static_cast<float*>(at.y) + 4 * thread();
  const uint32_t words[4] = {a[0], a[1], a[2], a[3]};
  float sums[4] = {d[0], d[1], d[2], d[3]};
  for (int64_t t = 0; t < at.T; ++t) mma(sums, words, b[0], b[1], Type());
  for (int k = 0; k < 4; ++k) d[k] = sums[k];
}

}  // namespace

KERNEL(product_bf16, 32, 1) { product<Bf16>(a); }
KERNEL(product_f16, 32, 1) { product<F16>(a); }
KERNEL(product_tf32, 32, 1) { product<float>(a); }

// From H numbers h_0: to float32 (y), and back (h_n).
KERNEL(widen_bf16, 32, 1) {
  for (int64_t k = thread(); k < a.H; k += 32)
    static_cast<float*>(a.y)[k] = widen(static_cast<const Bf16*>(a.h_0)[k]);
}
KERNEL(widen_f16, 32, 1) {
  for (int64_t k = thread(); k < a.H; k += 32)
    static_cast<float*>(a.y)[k] = widen(static_cast<const F16*>(a.h_0)[k]);
}
KERNEL(narrow_bf16, 32, 1) {
  for (int64_t k = thread(); k < a.H; k += 32)
    static_cast<Bf16*>(a.y)[k] = narrow<Bf16>(static_cast<const float*>(a.h_0)[k]);
}
KERNEL(narrow_f16, 32, 1) {
  for (int64_t k = thread(); k < a.H; k += 32)
    static_cast<F16*>(a.y)[k] = narrow<F16>(static_cast<const float*>(a.h_0)[k]);
}
KERNEL(narrow_tf32, 32, 1) {
  for (int64_t k = thread(); k < a.H; k += 32)
    static_cast<float*>(a.y)[k] = round_tf32(static_cast<const float*>(a.h_0)[k]);
}

// y (N,) = h_0 (N,), N = T * 64 to a CTA: in pieces of 16 bytes, the next on its way while one is
// summed with those of the other threads. `save` chooses a mistake.
enum Mistake {
  NONE,
  NO_WAIT,       // for the copies
  NO_BARRIER,    // between those who write and those who read
  ONE_BUFFER,    // the next copy into what is being read
  UNALIGNED,
  OUTSIDE,       // a copy to what is not shared memory
  BESIDE,        // a write behind the shared memory
  OTHER_WORD,    // one lane in another mask
  LEAVES,        // one thread, before a barrier of the others
  SOURCE,        // which changes while it is copied
  MISALIGNED_LOAD,
};

KERNEL(stream, 64, 1) {
  const float* from = static_cast<const float*>(a.h_0) + tile_x() * a.T * 64;
  float* to = static_cast<float*>(a.y) + tile_x() * a.T * 64;
  float* buffers = reinterpret_cast<float*>(shared());  // (2, 64)
  const int me = thread();
  const auto fetch = [&](int64_t t) {
    float* buffer = buffers + (a.save == ONE_BUFFER ? 0 : t % 2 * 64);
    const int shift = a.save == UNALIGNED;
    if (t < a.T && me < 16) copy<16>(buffer + 4 * me + shift, from + t * 64 + 4 * me);
    close();
  };
  fetch(0);
  for (int64_t t = 0; t < a.T; ++t) {
    fetch(t + 1);
    if (a.save != NO_WAIT) arrived<1>();
    if (a.save != NO_BARRIER) meet();
    const float* buffer = buffers + (a.save == ONE_BUFFER ? 0 : t % 2 * 64);
    to[t * 64 + me] = buffer[63 - me];
    meet();
  }
  if (a.save == OUTSIDE) copy<4>(to, from);
  if (a.save == BESIDE && me == 0) buffers[128] = 1;
  if (a.save == OTHER_WORD) neighbour(1.0f, me == 3 ? 2 : 1);
  if (a.save == LEAVES && me == 3) return;
  if (a.save == LEAVES) meet();
  if (a.save == SOURCE && me == 0) {
    copy<4>(buffers, to);
    to[0] += 1;
    close();
    arrived<0>();
  }
  if (a.save == MISALIGNED_LOAD) load<Words4>(buffers + 1);
}

// y (2 a lane, of 32) = the sum over a warp, and its own
KERNEL(sums, 64, 1) {
  float* y = static_cast<float*>(a.y) + 2 * thread();
  const float own = static_cast<const float*>(a.h_0)[thread()];
  float all = own;
  for (int mask = 1; mask < 32; mask *= 2) all = sum(all, neighbour(all, mask));
  y[0] = all, y[1] = own;
}

// y (lanes) = the number of the lane beside it
KERNEL(beside, 32, 1) {
  float* place = reinterpret_cast<float*>(shared());
  place[thread()] = static_cast<const float*>(a.h_0)[thread()];
  if (a.save && thread() == 3) neighbour(1.0f, 1);
  meet_warp();
  static_cast<float*>(a.y)[thread()] = place[thread() ^ 1];
}

// CTAs with 64 numbers each, all of which each needs in every step: y (CTAs, 64) after T steps from
// h_0. In a step number k of CTA x becomes x + the sum over the CTAs c of c + 1 times their number
// 63 - k, modulo 64. First by pushing, in a cluster; shared memory: what a CTA hands out, (64,); what it is
// given, (2, CTAs, 64); a Box for each of the two.
float modulo_64(float v) {  // of a whole number
  return v - 64 * std::floor(v / 64);
}

enum PushMistake {
  P_NONE,
  P_NO_WAIT,     // by one warp
  P_ONE_BUFFER,
  P_TOO_MANY,    // bytes, for what is expected
  P_TOO_FEW,     // so that all wait in vain
  P_LEAVES,      // a CTA, after the first step
  P_NOT_OPEN,
  P_OPENED_TWICE,
  P_EXPECTED_TWICE,
  P_NO_MEETING,  // between open() and push()
  P_UNALIGNED,
  P_OUTSIDE,
  P_NO_RANK,
  P_WRITTEN_OVER,
  P_MEETS_ALONE,  // a thread does not come to the cluster's barrier
  P_UNDER_WAY,    // a write to where something is pushed
};

KERNEL(pushes, 64, 1) {
  const int me = thread(), team = ranks(), own = rank();
  float* out = reinterpret_cast<float*>(shared());
  Box* boxes = reinterpret_cast<Box*>(out + 64 + 2 * team * 64);
  if (me == 0 && a.save != P_NOT_OPEN) {
    open(boxes), open(boxes + 1);
    if (a.save == P_OPENED_TWICE) open(boxes);
    if (a.save == P_WRITTEN_OVER) boxes[1].state = 0;
  }
  if (a.save == P_MEETS_ALONE && me == 7) return;
  if (a.save != P_NO_MEETING) meet_cluster();
  const int64_t place = tile_x() * 64 + me;
  float mine = static_cast<const float*>(a.h_0)[place];
  for (int64_t t = 0; t < a.T; ++t) {
    float* all = out + 64 + (a.save == P_ONE_BUFFER ? 0 : t % 2 * team * 64);
    Box* box = boxes + t % 2;
    const int bytes = team * 256 - 16 * (a.save == P_TOO_MANY) + 16 * (a.save == P_TOO_FEW);
    if (me == 0) expect(box, bytes);
    if (me == 0 && a.save == P_EXPECTED_TWICE) expect(box, bytes);
    out[me] = mine;
    meet();
    if (me < 16) {
      const Words4 words = load<Words4>(out + 4 * me);  // all of it before the first is pushed
      for (int c = 0; c < team; ++c) {
        float* to = all + own * 64 + 4 * me;
        if (a.save == P_UNALIGNED) ++to;
        if (a.save == P_OUTSIDE) to += 1 << 20;
        push(to, box, a.save == P_NO_RANK ? c + 1 : c, words);
      }
    }
    if (a.save == P_UNDER_WAY) all[own * 64 + me] = 1;
    if (a.save != P_NO_WAIT || me < 32)
      for (int64_t looks = 0; !has_come(box, t / 2 % 2); ++looks)
        if (looks == a.patience) return tell(a.fault, int32_t(a.code));
    mine = float(own);
    for (int c = 0; c < team; ++c) mine += float(c + 1) * all[c * 64 + 63 - me];
    mine = modulo_64(mine);
    if (a.save == P_LEAVES && own == 1) return;
  }
  static_cast<float*>(a.y)[place] = mine;
}

// The same by packets, across a grid: `packets` (2, CTAs, 64) of a number, three times, and the step it
// is of, from `first` on. c_all (2, CTAs, 64) is for a mistake, and so is the second half of `packets`.
enum PacketMistake {
  Q_NONE,
  Q_NO_WAIT,
  Q_ONE_BUFFER,
  Q_FLAG,        // a packet says that another one is there
  Q_BESIDE,      // a packet says that something else is there
  Q_PLAIN,       // a packet is loaded as anything else
  Q_UNALIGNED,
  Q_NEVER,       // a CTA leaves
};

KERNEL(packets, 64, 1) {
  const int me = thread(), own = tile_x(), team = int(a.team);
  if (a.save == Q_NEVER && own == 1) return;
  int64_t patience = a.patience;
  float mine = static_cast<const float*>(a.h_0)[own * 64 + me];
  for (int64_t t = 0; t < a.T; ++t) {
    const int64_t buffer = a.save == Q_ONE_BUFFER ? 0 : t % 2 * team * 64;
    Words4* all = static_cast<Words4*>(a.packets) + buffer;
    Words4* flags = a.save == Q_FLAG ? all + 2 * team * 64 : all;
    const uint32_t stamp = uint32_t(a.first + t + 1);
    if (a.save == Q_UNALIGNED) load_packet(reinterpret_cast<Words4*>(&all->w[1]));
    if (a.save == Q_BESIDE) a.c_all[buffer + own * 64 + me] = mine;
    const uint32_t bits = float_to_bits(mine);
    store_packet(all + own * 64 + me, {{bits, bits, bits, stamp}});
    if (a.save == Q_FLAG) store_packet(flags + own * 64 + me, {{0, 0, 0, stamp}});
    mine = float(own);
    for (int c = 0; c < team; ++c) {
      const int at = c * 64 + 63 - me;
      Words4 found;
      for (int64_t looks = 0;; ++looks) {
        found = a.save == Q_PLAIN ? load<Words4>(flags + at) : load_packet(flags + at);
        if (found.w[3] == stamp || a.save == Q_NO_WAIT) break;
        if (looks >= patience) {  // and goes on, so that the others meet it
          if (patience) tell(a.fault, int32_t(a.code));
          patience = 0;
          break;
        }
        look_again();
      }
      if (a.save == Q_FLAG) found = load_packet(all + at);
      const bool whole = found.w[0] == found.w[1] && found.w[0] == found.w[2];
      const float theirs =
          a.save == Q_BESIDE ? a.c_all[buffer + at] : bits_to_float(whole ? found.w[0] : 0xffffffff);
      mine += float(c + 1) * theirs;
    }
    mine = modulo_64(mine);
    meet();
  }
  static_cast<float*>(a.y)[own * 64 + me] = mine;
}

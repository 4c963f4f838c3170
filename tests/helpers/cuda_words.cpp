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

// The kernels without Python and torch, for the sanitizers: every cell over some shapes, on one
// thread, on three, and on three that turn out to be one. Buffers are of the exact size on the heap,
// so that AddressSanitizer sees a step beyond them. What more threads give is compared with what one
// gives: outputs and the gradients of inputs and states bit for bit, those of weights closely, since
// they are added up in other pieces; so are outputs where the weights are not packed. What forward
// saves is made again from its y, bit for bit.
//
//   driver base | avx2 | avx512 | avx512_bf16 [SIZE]
//
// With a size it writes behind a piece of so many numbers of a scratch block, and does no more:
// AddressSanitizer has to report it.
// The kernels of the instruction set that is named are linked, and those of no other.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "cpu/run.h"

namespace fastseq {
static bool never() { return false; }
#define FASTSEQ_ABSENT(name)                                                  \
  namespace name {                                                            \
  extern const InstructionSet instruction_set __attribute__((weak));          \
  const InstructionSet instruction_set = {#name, 0, never, {}, {}};           \
  }
FASTSEQ_ABSENT(base)
FASTSEQ_ABSENT(avx2)
FASTSEQ_ABSENT(avx512)
FASTSEQ_ABSENT(avx512_bf16)
}  // namespace fastseq

using namespace fastseq;

namespace {

const Kernels<float>& kernels(float) { return instruction_set().f32; }
const Kernels<double>& kernels(double) { return instruction_set().f64; }

thread_local int own_id = 0, own_count = 1;

void parallel(void (*function)(void*), void* data, unsigned count, unsigned) {
  const auto work = [=](int id) {
    own_id = id, own_count = static_cast<int>(count);
    function(data);
    own_id = 0, own_count = 1;
  };
  std::vector<std::thread> others;
  for (unsigned id = 1; id < count; ++id) others.emplace_back(work, id);
  work(0);
  for (std::thread& other : others) other.join();
}

// As an OpenMP runtime does within another parallel region: the caller alone, whatever was asked.
void alone(void (*function)(void*), void* data, unsigned, unsigned) { function(data); }

int thread_num() { return own_id; }
int num_threads() { return own_count; }

struct Form {
  const char* name;
  int gates, recurrent;
  bool has_c, has_extra, has_unit, keeps_gates, is_square;  // is_square: h has the gates' size
};
const Form forms[CELLS] = {
    {"lstm", 4, 4, true, false, false, true, false},
    {"gru", 3, 3, false, true, false, true, true},
    {"gru_reset_before", 3, 3, false, true, false, true, true},
    {"rnn_tanh", 1, 1, false, false, false, false, false},
    {"rnn_relu", 1, 1, false, false, false, false, false},
    {"indrnn", 1, 0, false, false, true, false, true},
};

struct Shape {
  int64_t T, B, I, H, P;  // P 0: no projection
  int R;
  bool ragged, state, bias, reset, h_mask;
};
const Shape shapes[] = {
    {1, 1, 1, 1, 0, 1, false, true, true, false, false},
    {3, 2, 5, 17, 0, 1, false, false, false, false, false},
    {4, 7, 3, 33, 0, 2, false, true, true, true, true},
    {5, 4, 9, 20, 7, 2, true, true, true, true, false},
    {5, 9, 2, 16, 0, 1, true, true, true, true, true},
    {2, 1, 70, 65, 0, 2, false, true, true, false, false},
    {3, 1, 6, 130, 0, 1, false, true, true, true, false},   // the units are shared out
    {3, 2, 4, 260, 0, 1, true, true, false, false, false},  // and so for every cell
    {2, 1, 3, 4, 0, 70, false, true, true, false, false},  // members of an ensemble
    {0, 3, 4, 5, 0, 2, false, true, true, false, false},
    {21, 6, 6, 18, 10, 2, true, true, true, true, true},  // even, more rows than a product takes
};

// Exactly `size` numbers.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t size) : size_(size), data_(new T[size]()) {}
  T* data() const { return data_.get(); }
  T* row(int64_t k, int64_t width) const { return data_ ? data_.get() + k * width : nullptr; }
  int64_t size() const { return size_; }
  T& operator[](int64_t k) const { return data_[k]; }

 private:
  int64_t size_ = 0;
  std::unique_ptr<T[]> data_;
};

struct Random {
  uint64_t state = 1;
  double operator()() {  // in [-1, 1)
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(static_cast<int64_t>(state) >> 11) / (int64_t(1) << 52);
  }
  template <class T>
  Array<T> array(int64_t size, double scale) {
    Array<T> a(size);
    for (int64_t k = 0; k < size; ++k) a[k] = static_cast<T>(scale * (*this)());
    return a;
  }
};

// The weights are packed in the call, read as they are, were packed before it, or are packed as
// bfloat16 where there is a dot product of it, which they are already in the last case.
enum Weighing { PACKED, PLAIN, AHEAD, BF16, HALVES };

uint16_t bfloat16(float value) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
struct Outputs {
  Array<T> y, h_n, c_n, c_all, dx, dh, dc;
  std::vector<Array<T>> saved, weights;  // saved: gates, extra and m of each recurrence
};

template <class T>
struct Problem {
  Cell cell;
  const Form& form;
  Shape shape;
  int64_t P, N = 0;
  Array<int64_t> sizes, offsets;
  Array<T> x, h_0, c_0, h_mask, dy, dc_all, dh_n, dc_n;
  Array<uint8_t> reset;
  std::vector<Array<T>> weights;  // w_ih, w_hh, b_ih, b_hh, w_hr, unit of each recurrence
  std::vector<Array<uint16_t>> halves;  // the same in bfloat16

  Problem(Cell cell, Shape given) : cell(cell), form(forms[cell]), shape(given) {
    if (form.is_square) shape.P = 0;
    P = shape.P ? shape.P : shape.H;
    const auto [T_, B, I, H, projection, R, ragged, state, bias, resets, masks] = shape;
    offsets = Array<int64_t>(T_ + 1), sizes = Array<int64_t>(T_);
    for (int64_t t = 0; t < T_; ++t) {
      sizes[t] = ragged ? B - 1 - t * (B - 1) / T_ : B;  // the last sequence is empty
      offsets[t + 1] = offsets[t] + sizes[t];
    }
    N = offsets[T_];
    Random random;
    const double bound = 1 / std::sqrt(static_cast<double>(H));
    const int64_t G = form.gates, S = form.recurrent;
    for (int r = 0; r < R; ++r) {
      weights.push_back(random.array<T>(G * H * I, bound));
      weights.push_back(S ? random.array<T>(S * H * P, bound) : Array<T>());
      weights.push_back(bias ? random.array<T>(G * H, bound) : Array<T>());
      weights.push_back(bias && S ? random.array<T>(S * H, bound) : Array<T>());
      weights.push_back(projection ? random.array<T>(P * H, bound) : Array<T>());
      weights.push_back(form.has_unit ? random.array<T>(H, 1) : Array<T>());
    }
    for (const Array<T>& w : weights) {
      halves.push_back(w.data() ? Array<uint16_t>(w.size()) : Array<uint16_t>());
      for (int64_t k = 0; k < w.size(); ++k) halves.back()[k] = bfloat16(static_cast<float>(w[k]));
    }
    x = random.array<T>(N * I, 1);
    if (state) h_0 = random.array<T>(R * B * P, 1);
    if (state && form.has_c) c_0 = random.array<T>(R * B * H, 1);
    if (masks) h_mask = random.array<T>(R * B * P, 1);
    if (resets) {
      reset = Array<uint8_t>(R * N);
      for (int64_t k = 0; k < R * N; ++k) reset[k] = random() > 0.5;
    }
    dy = random.array<T>(N * R * P, 1);
    dh_n = random.array<T>(R * B * P, 1);
    if (form.has_c) dc_n = random.array<T>(R * B * H, 1), dc_all = random.array<T>(N * R * H, 1);
  }

  Weights<T> of(const std::vector<Array<T>>& all, int r) const {
    const Array<T>* w = all.data() + 6 * r;
    return {w[0].data(), w[1].data(), w[2].data(), w[3].data(), w[4].data(), w[5].data()};
  }

  Input<T> input() const {
    Input<T> in{};
    in.steps = shape.T, in.batch = shape.B, in.rows = N, in.I = shape.I, in.H = shape.H, in.P = P;
    if (shape.ragged) in.sizes = sizes.data(), in.offsets = offsets.data();
    in.x = x.data(), in.x_step = shape.B * shape.I, in.x_row = shape.I;
    return in;
  }
  bool keeps_gates() const { return form.keeps_gates || shape.P; }
  bool saves() const { return keeps_gates() || form.has_extra || form.has_c; }

  // With `known`, the y of an earlier call, only what is saved is made.
  bool forward(int threads, bool save, Weighing how, const T* known,
               std::vector<Recurrence<T>>& recurrence, Outputs<T>* out) const {
    const int64_t B = shape.B, H = shape.H, R = shape.R, G = form.gates;
    std::vector<Array<T>> packed;
    const auto keep = [&](bool wanted, int64_t size) {
      if (!save || !wanted) return static_cast<T*>(nullptr);
      out->saved.push_back(Array<T>(size));
      return out->saved.back().data();
    };
    if (!known) out->y = Array<T>(N * R * P);
    out->h_n = Array<T>(R * B * P);
    if (form.has_c) out->c_n = Array<T>(R * B * H), out->c_all = Array<T>(N * R * H);
    recurrence.resize(R);
    for (int r = 0; r < R; ++r) {
      Recurrence<T>& at = recurrence[r];
      at = {};
      at.weights = of(weights, r), at.reverse = r % 2;
      if (how == HALVES) {
        const auto half = [&](int k) {
          return reinterpret_cast<const T*>(halves[6 * r + k].data());
        };
        at.weights.w_ih = half(0), at.weights.w_hh = half(1), at.weights.w_hr = half(4);
      }
      at.h_0 = h_0.row(r, B * P), at.c_0 = c_0.row(r, B * H);
      at.reset = reset.row(r, N), at.h_mask = h_mask.row(r, B * P);
      at.h_n = out->h_n.row(r, B * P), at.c_n = out->c_n.row(r, B * H);
      at.gates = keep(keeps_gates(), N * G * H), at.extra = keep(form.has_extra, N * H);
      at.m = keep(shape.P, N * H);
    }
    ForwardCall<T> call{};
    call.cell = cell, call.R = shape.R, call.input = input(), call.recurrence = recurrence.data();
    call.y = out->y.data(), call.known = known, call.c_all = save ? out->c_all.data() : nullptr;
    call.pack = how != PLAIN, call.bf16 = how == BF16 || how == HALVES, call.halves = how == HALVES;
    if (how == AHEAD)
      for (int r = 0; r < R; ++r) {
        const auto pack = kernels(T()).pack;
        packed.push_back(Array<T>((pack(call, r, nullptr) + sizeof(T) - 1) / sizeof(T)));
        pack(call, r, packed.back().data());
        recurrence[r].packed = packed.back().data();
      }
    return fastseq::run(call, threads);
  }

  bool run(int threads, bool save, Weighing how, Outputs<T>* out) const {
    const int64_t B = shape.B, H = shape.H, R = shape.R;
    std::vector<Recurrence<T>> recurrence;
    if (!forward(threads, save, how, nullptr, recurrence, out)) return false;
    if (!save) return true;

    out->dx = Array<T>(N * shape.I), out->dh = Array<T>(R * B * P), out->dc = Array<T>(dc_n.size());
    std::memcpy(out->dh.data(), dh_n.data(), sizeof(T) * dh_n.size());
    if (form.has_c) std::memcpy(out->dc.data(), dc_n.data(), sizeof(T) * dc_n.size());
    for (const Array<T>& w : weights) out->weights.push_back(w.data() ? Array<T>(w.size()) : Array<T>());
    std::vector<RecurrenceGradients<T>> gradients(R);
    for (int r = 0; r < R; ++r)
      gradients[r] = {out->dh.row(r, B * P), form.has_c ? out->dc.row(r, B * H) : nullptr,
                      of(out->weights, r)};
    BackwardCall<T> backward{};
    backward.cell = cell, backward.R = shape.R, backward.input = input();
    backward.recurrence = recurrence.data(), backward.gradients = gradients.data();
    backward.y = out->y.data(), backward.c_all = out->c_all.data();
    backward.dy = dy.data(), backward.dc_all = dc_all.data();
    backward.dx = out->dx.data(), backward.weights = backward.states = true;
    backward.bf16 = how == BF16 || how == HALVES, backward.halves = how == HALVES;
    return fastseq::run(backward, threads);
  }
};

int failures = 0;

template <class T>
void compare(const char* what, const Array<T>& a, const Array<T>& b, double allowed) {
  for (int64_t k = 0; k < a.size(); ++k) {
    const double difference = std::fabs(double(a[k]) - double(b[k]));
    if (difference <= allowed && std::isfinite(double(a[k]))) continue;
    std::printf("%s[%lld]: %.9g and %.9g\n", what, (long long)k, double(a[k]), double(b[k]));
    ++failures;
    return;
  }
}

template <class T>
void check(Cell cell, const Shape& shape) {
  const Problem<T> problem(cell, shape);
  const auto run = [&](int threads, bool save, Weighing how) {
    Outputs<T> out;
    if (!problem.run(threads, save, how, &out)) ++failures, std::printf("out of memory\n");
    return out;
  };
  const auto again = [&](int threads, Weighing how, const Outputs<T>& known) {
    Outputs<T> out;
    std::vector<Recurrence<T>> recurrence;
    if (!problem.forward(threads, true, how, known.y.data(), recurrence, &out))
      ++failures, std::printf("out of memory\n");
    return out;
  };
  const auto told = [&](int before, const char* what) {
    if (failures > before)
      std::printf("  %s, float%d, T=%d B=%d H=%d: %s\n", forms[cell].name, int(8 * sizeof(T)),
                  int(shape.T), int(shape.B), int(shape.H), what);
  };
  const auto same_saved = [&](const Outputs<T>& a, const Outputs<T>& b, const char* what) {
    const int before = failures;
    for (size_t k = 0; k < a.saved.size(); ++k) compare("saved", a.saved[k], b.saved[k], 0);
    compare("c_all", a.c_all, b.c_all, 0);
    told(before, what);
  };
  const auto same = [&](const Outputs<T>& a, const Outputs<T>& b, const char* what, double allowed) {
    const int before = failures;
    compare("y", a.y, b.y, allowed), compare("h_n", a.h_n, b.h_n, allowed);
    compare("c_n", a.c_n, b.c_n, allowed);
    if (!b.weights.empty()) {
      compare("dx", a.dx, b.dx, allowed), compare("dh_0", a.dh, b.dh, allowed);
      compare("dc_0", a.dc, b.dc, allowed);
      for (size_t k = 0; k < a.weights.size(); ++k)
        compare("dw", a.weights[k], b.weights[k], sizeof(T) == 4 ? 1e-3 : 1e-10);
    }
    told(before, what);
  };
  pool.parallel = parallel;
  const Outputs<T> one = run(1, true, PACKED), plain = run(1, true, PLAIN);
  same(one, run(2, true, PACKED), "two threads", 0);
  same(one, run(3, true, PACKED), "three threads", 0);
  same(one, run(3, false, PACKED), "three threads that save nothing", 0);
  same(one, run(1, false, AHEAD), "weights packed before", 0);
  same(one, run(3, false, AHEAD), "weights packed before, three threads", 0);
  same(one, plain, "weights not packed", sizeof(T) == 4 ? 1e-4 : 1e-11);
  same(plain, run(3, true, PLAIN), "weights not packed, three threads", 0);
  const Outputs<T> rounded = run(1, true, BF16);
  same(rounded, run(3, true, BF16), "bfloat16, three threads", 0);
  const bool halves = kernels(T()).in_pairs(problem.input());
  if (halves) {
    same(rounded, run(1, true, HALVES), "weights of bfloat16", 0);
    same(rounded, run(3, true, HALVES), "weights of bfloat16, three threads", 0);
  }
  if (problem.saves()) {
    same_saved(one, again(1, PACKED, one), "from a known y");
    same_saved(one, again(3, PACKED, one), "from a known y, three threads");
    same_saved(rounded, again(3, halves ? HALVES : BF16, rounded), "from a known y of bfloat16");
  }
  pool.parallel = alone;
  same(one, run(3, true, PACKED), "one thread where three were asked for", 0);
}

}  // namespace

// One number behind the first of two pieces, into the room that they are rounded up to or beyond it.
void overrun(int64_t size) {
  const Array<char> block(4096);
  Arena arena(block.data());
  float* piece = arena.take<float>(size);
  arena.take<float>(16);
  static_cast<volatile float*>(piece)[size] = 1;
}

int main(int count, char** names) {
  if (count < 2 || !use_instruction_set(names[1])) {
    std::printf("driver: name one instruction set that this machine can run\n");
    return 2;
  }
  if (count > 2) return overrun(std::atoi(names[2])), 0;
  pool.thread_num = thread_num, pool.num_threads = num_threads;
  for (int cell = 0; cell < CELLS; ++cell)
    for (const Shape& shape : shapes) {
      check<float>(static_cast<Cell>(cell), shape);
      check<double>(static_cast<Cell>(cell), shape);
    }
  std::printf("%d failures\n", failures);
  return failures > 0;
}

// The kernels without Python and torch, for the sanitizers: every cell over some shapes, on one
// thread, on three, and on three that turn out to be one. Buffers are of the exact size on the heap,
// so that AddressSanitizer sees a step beyond them. What more threads give is compared with what one
// gives: outputs and the gradients of inputs and states bit for bit, those of weights closely, since
// they are added up in other pieces; so are outputs where the weights are not packed. What forward
// saves is made again from its y, bit for bit. Conditional random fields come last.
//
// The cell of trial.h has more than one of all that a cell may have several of; it is compared with
// plain loops over scalars besides, forward and backward. Some shapes zone states out.
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

#define FASTSEQ_ISA driver  // of the cells, their declarations alone are used here
#include "cells/generated.h"
#include "cpu/run.h"
#include "trial.h"

namespace fastseq {
static bool never() { return false; }
#define FASTSEQ_ABSENT(name)                                                  \
  namespace name {                                                            \
  extern const InstructionSet instruction_set __attribute__((weak));          \
  const InstructionSet instruction_set = {#name, 0, never, {}, {}, nullptr};  \
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
  int gates, recurrent, C, E, U;
  bool keeps_gates, is_square;  // is_square: h has the gates' size
  const bool* taken_back;
};

template <class Cell>
constexpr Form form_of() {
  return {Cell::NAME, Cell::G, Cell::FIRST[Cell::PHASES], Cell::C, Cell::E, Cell::U,
          Cell::KEEPS_GATES, Cell::READS_H || Cell::PHASES > 1, Cell::TAKEN_BACK};
}

const Form forms[CELLS + 1] = {
#define FASTSEQ_FORM(name, type) form_of<driver::type>(),
    FASTSEQ_CELLS(FASTSEQ_FORM)
#undef FASTSEQ_FORM
    form_of<driver::Trial>(),
};

enum Zoneout { NONE, FLAGS, PARTS };

struct Shape {
  int64_t T, B, I, H, P;  // P 0: no projection
  int R;
  bool ragged, state, bias, reset, h_mask;
  Zoneout zoneout = NONE;
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
    {4, 7, 3, 33, 0, 2, true, true, true, true, true, FLAGS},
    {5, 4, 9, 20, 7, 2, false, true, true, true, false, FLAGS},
    {5, 4, 9, 20, 7, 1, true, false, true, true, true, PARTS},
    {3, 1, 6, 130, 0, 1, false, true, true, true, false, FLAGS},  // the units are shared out
    {3, 2, 4, 260, 0, 1, false, true, false, false, false, PARTS},
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
  Array<T> y, h_n, c_n[MOST_EACH], c_all[MOST_EACH], dx, dh, dc[MOST_EACH];
  std::vector<Array<T>> saved, weights;  // saved: gates, extras and m of each recurrence
};

template <class T>
struct Problem {
  Cell cell;
  const Form& form;
  Shape shape;
  int64_t P, N = 0;
  int each;  // weights of a recurrence
  Array<int64_t> sizes, offsets;
  Array<T> x, h_0, c_0[MOST_EACH], h_mask, dy, dc_all[MOST_EACH], dh_n, dc_n[MOST_EACH];
  Array<uint8_t> reset, stay[1 + MOST_EACH];
  std::vector<Array<T>> weights;  // w_ih, w_hh, b_ih, b_hh, w_hr, units of each recurrence
  std::vector<Array<uint16_t>> halves;  // the same in bfloat16

  Problem(Cell cell, Shape given) : cell(cell), form(forms[cell]), shape(given) {
    if (form.is_square) shape.P = 0;
    P = shape.P ? shape.P : shape.H;
    each = 5 + form.U;
    const auto [T_, B, I, H, projection, R, ragged, state, bias, resets, masks, zoneout] = shape;
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
      for (int k = 0; k < form.U; ++k) weights.push_back(random.array<T>(H, 1));
    }
    for (const Array<T>& w : weights) {
      halves.push_back(w.data() ? Array<uint16_t>(w.size()) : Array<uint16_t>());
      for (int64_t k = 0; k < w.size(); ++k) halves.back()[k] = bfloat16(static_cast<float>(w[k]));
    }
    x = random.array<T>(N * I, 1);
    if (state) h_0 = random.array<T>(R * B * P, 1);
    for (int k = 0; state && k < form.C; ++k) c_0[k] = random.array<T>(R * B * H, 1);
    if (masks) h_mask = random.array<T>(R * B * P, 1);
    if (resets) {
      reset = Array<uint8_t>(R * N);
      for (int64_t k = 0; k < R * N; ++k) reset[k] = random() > 0.5;
    }
    for (int k = 0; zoneout == FLAGS && k < 1 + form.C; ++k) {
      stay[k] = Array<uint8_t>(R * N * (k ? H : P));
      for (int64_t at = 0; at < stay[k].size(); ++at) stay[k][at] = random() > 0.2;
    }
    dy = random.array<T>(N * R * P, 1);
    dh_n = random.array<T>(R * B * P, 1);
    for (int k = 0; k < form.C; ++k)
      dc_n[k] = random.array<T>(R * B * H, 1), dc_all[k] = random.array<T>(N * R * H, 1);
  }

  Weights<T> of(const std::vector<Array<T>>& all, int r) const {
    const Array<T>* w = all.data() + each * r;
    Weights<T> of{w[0].data(), w[1].data(), w[2].data(), w[3].data(), w[4].data(), {}};
    for (int k = 0; k < form.U; ++k) of.unit[k] = w[5 + k].data();
    return of;
  }

  Input<T> input() const {
    Input<T> in{};
    in.steps = shape.T, in.batch = shape.B, in.rows = N, in.I = shape.I, in.H = shape.H, in.P = P;
    if (shape.ragged) in.sizes = sizes.data(), in.offsets = offsets.data();
    in.x = x.data(), in.x_step = shape.B * shape.I, in.x_row = shape.I;
    return in;
  }
  bool keeps_gates() const { return form.keeps_gates || shape.P; }
  bool saves() const { return keeps_gates() || form.E || form.C || as_made(0); }
  bool as_made(int state) const { return shape.zoneout != NONE && form.taken_back[state]; }
  static T part(int state) { return static_cast<T>(0.25 + 0.125 * state); }
  // How much of unit u of a state stays, in row `at` of recurrence r.
  double stays(int state, int r, int64_t at, int64_t u) const {
    if (shape.zoneout == PARTS) return part(state);
    return shape.zoneout == FLAGS && stay[state][(r * N + at) * (state ? shape.H : P) + u];
  }

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
    for (int k = 0; k < form.C; ++k)
      out->c_n[k] = Array<T>(R * B * H), out->c_all[k] = Array<T>(N * R * H);
    recurrence.resize(R);
    for (int r = 0; r < R; ++r) {
      Recurrence<T>& at = recurrence[r];
      at = {};
      at.weights = of(weights, r), at.reverse = r % 2;
      if (how == HALVES) {
        const auto half = [&](int k) {
          return reinterpret_cast<const T*>(halves[each * r + k].data());
        };
        at.weights.w_ih = half(0), at.weights.w_hh = half(1), at.weights.w_hr = half(4);
      }
      at.h_0 = h_0.row(r, B * P), at.h_n = out->h_n.row(r, B * P);
      for (int k = 0; k < form.C; ++k)
        at.c_0[k] = c_0[k].row(r, B * H), at.c_n[k] = out->c_n[k].row(r, B * H);
      at.reset = reset.row(r, N), at.h_mask = h_mask.row(r, B * P);
      at.gates = keep(keeps_gates(), N * G * H);
      for (int k = 0; k < form.E; ++k) at.extra[k] = keep(true, N * H);
      at.m = keep(shape.P || as_made(0), N * H);
      for (int k = 0; k < 1 + form.C; ++k) {
        at.stay[k] = stay[k].row(r, N * (k ? H : P));
        if (shape.zoneout == PARTS) at.part[k] = part(k);
        if (k) at.made[k - 1] = keep(as_made(k), N * H);
      }
    }
    ForwardCall<T> call{};
    call.cell = cell, call.R = shape.R, call.input = input(), call.recurrence = recurrence.data();
    call.y = out->y.data(), call.known = known;
    for (int k = 0; save && k < form.C; ++k) call.c_all[k] = out->c_all[k].data();
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

    out->dx = Array<T>(N * shape.I), out->dh = Array<T>(R * B * P);
    std::memcpy(out->dh.data(), dh_n.data(), sizeof(T) * dh_n.size());
    for (int k = 0; k < form.C; ++k) {
      out->dc[k] = Array<T>(dc_n[k].size());
      std::memcpy(out->dc[k].data(), dc_n[k].data(), sizeof(T) * dc_n[k].size());
    }
    for (const Array<T>& w : weights) out->weights.push_back(w.data() ? Array<T>(w.size()) : Array<T>());
    std::vector<RecurrenceGradients<T>> gradients(R);
    for (int r = 0; r < R; ++r) {
      gradients[r] = {out->dh.row(r, B * P), {}, of(out->weights, r)};
      for (int k = 0; k < form.C; ++k) gradients[r].dc[k] = out->dc[k].row(r, B * H);
    }
    BackwardCall<T> backward{};
    backward.cell = cell, backward.R = shape.R, backward.input = input();
    backward.recurrence = recurrence.data(), backward.gradients = gradients.data();
    backward.y = out->y.data(), backward.dy = dy.data();
    for (int k = 0; k < form.C; ++k)
      backward.c_all[k] = out->c_all[k].data(), backward.dc_all[k] = dc_all[k].data();
    backward.dx = out->dx.data(), backward.weights = backward.states = true;
    backward.bf16 = how == BF16 || how == HALVES, backward.halves = how == HALVES;
    return fastseq::run(backward, threads);
  }
};

// The same of the trial cell, packed or dense, over scalars in the order of the equations.
Outputs<double> trial_by_scalars(const Problem<double>& p) {
  const auto [T_, B, I, H, projection, R, ragged, state, bias, resets, masks, zoneout] = p.shape;
  const int64_t P = p.P;
  const auto number = [](const Array<double>& a, int64_t k) { return a.data() ? a[k] : 0.0; };
  const auto alive = [&](int64_t t) { return p.sizes[t]; };
  Outputs<double> out;
  out.y = Array<double>(p.N * R * P), out.h_n = Array<double>(R * B * P);
  out.dx = Array<double>(p.N * I), out.dh = Array<double>(R * B * P);
  for (int k = 0; k < 2; ++k) {
    out.c_n[k] = Array<double>(R * B * H), out.c_all[k] = Array<double>(p.N * R * H);
    out.dc[k] = Array<double>(R * B * H);
  }
  for (const Array<double>& w : p.weights)
    out.weights.push_back(w.data() ? Array<double>(w.size()) : Array<double>());
  for (int64_t r = 0; r < R; ++r)
    for (int64_t b = 0; b < B; ++b) {
      const Array<double>*w = p.weights.data() + r * p.each, *dw = out.weights.data() + r * p.each;
      int64_t length = 0;
      while (length < T_ && alive(length) > b) ++length;
      const auto row = [&](int64_t s) {
        const int64_t t = r % 2 ? length - 1 - s : s;
        return p.offsets[t] + b;
      };
      struct Unit {  // of a step and hidden unit
        double c_prev, n_prev, i, g, s_g, e, c, n, m;
      };
      const auto stays = [&](int k, int64_t at, int64_t u) {
        return p.stays(k, static_cast<int>(r), at, u);
      };
      // What of a gradient, in the place of which the rest is left, goes to the state before the step.
      const auto split = [&](int k, int64_t at, int64_t u, double* gradient) {
        const double before = stays(k, at, u) * *gradient;
        *gradient -= before;
        return before;
      };
      Array<Unit> units(length * H);
      Array<double> fed(length * P), h(P), c(H), n(H);
      for (int64_t k = 0; k < P; ++k) h[k] = number(p.h_0, (r * B + b) * P + k);
      for (int64_t u = 0; u < H; ++u)
        c[u] = number(p.c_0[0], (r * B + b) * H + u), n[u] = number(p.c_0[1], (r * B + b) * H + u);
      for (int64_t s = 0; s < length; ++s) {
        const int64_t at = row(s);
        const bool begins = resets && p.reset[r * p.N + at];
        for (int64_t k = 0; k < P; ++k)
          fed[s * P + k] =
              (begins ? 0 : h[k]) * (masks ? p.h_mask[(r * B + b) * P + k] : 1);
        for (int64_t u = 0; u < H; ++u) {
          double x_i = number(w[2], u), x_g = number(w[2], H + u);
          double s_i = number(w[3], u), s_g = number(w[3], H + u);
          for (int64_t k = 0; k < I; ++k)
            x_i += w[0][u * I + k] * p.x[at * I + k], x_g += w[0][(H + u) * I + k] * p.x[at * I + k];
          for (int64_t k = 0; k < P; ++k)
            s_i += w[1][u * P + k] * fed[s * P + k], s_g += w[1][(H + u) * P + k] * fed[s * P + k];
          Unit& one = units[s * H + u];
          one.c_prev = begins ? 0 : c[u], one.n_prev = begins ? 0 : n[u], one.s_g = s_g;
          one.i = 1 / (1 + std::exp(-(x_i + s_i + w[5][u] * one.c_prev)));
          one.g = std::tanh(x_g + w[6][u] * s_g), one.e = one.g * one.n_prev;
          one.c = one.i * one.c_prev + one.g, one.n = one.i * one.e + w[6][u] * one.n_prev;
          one.m = one.i * one.c + one.n;
        }
        for (int64_t u = 0; u < H; ++u) {
          const Unit& one = units[s * H + u];
          c[u] = one.c + stays(1, at, u) * (one.c_prev - one.c);
          n[u] = one.n + stays(2, at, u) * (one.n_prev - one.n);
          out.c_all[0][(at * R + r) * H + u] = c[u], out.c_all[1][(at * R + r) * H + u] = n[u];
        }
        for (int64_t k = 0; k < P; ++k) {
          double made = 0;
          for (int64_t u = 0; u < H; ++u)
            made += (projection ? w[4][k * H + u] : double(k == u)) * units[s * H + u].m;
          h[k] = made + stays(0, at, k) * ((begins ? 0 : h[k]) - made);
          out.y[(at * R + r) * P + k] = h[k];
        }
      }
      Array<double> dh(P), dc(H), dn(H);
      for (int64_t k = 0; k < P; ++k)
        out.h_n[(r * B + b) * P + k] = h[k], dh[k] = p.dh_n[(r * B + b) * P + k];
      for (int64_t u = 0; u < H; ++u) {
        const int64_t at = (r * B + b) * H + u;
        out.c_n[0][at] = c[u], out.c_n[1][at] = n[u];
        dc[u] = p.dc_n[0][at], dn[u] = p.dc_n[1][at];
      }
      for (int64_t s = length - 1; s >= 0; --s) {
        const int64_t at = row(s);
        const bool begins = resets && p.reset[r * p.N + at];
        Array<double> dh_prev(P), held(P);
        for (int64_t k = 0; k < P; ++k) {
          dh[k] += p.dy[(at * R + r) * P + k];
          held[k] = split(0, at, k, &dh[k]);
        }
        for (int64_t u = 0; u < H; ++u) {
          const Unit& one = units[s * H + u];
          double dm = projection ? 0 : dh[u];
          for (int64_t k = 0; projection && k < P; ++k)
            dm += w[4][k * H + u] * dh[k], dw[4][k * H + u] += dh[k] * one.m;
          dc[u] += p.dc_all[0][(at * R + r) * H + u], dn[u] += p.dc_all[1][(at * R + r) * H + u];
          const double held_c = split(1, at, u, &dc[u]), held_n = split(2, at, u, &dn[u]);
          const double dn_all = dn[u] + dm, dc_all = dc[u] + dm * one.i;
          const double di = dm * one.c + dc_all * one.c_prev + dn_all * one.e;
          const double da_i = di * one.i * (1 - one.i);
          const double dx_g = (dc_all + dn_all * one.i * one.n_prev) * (1 - one.g * one.g);
          const double ds_g = dx_g * w[6][u];
          dw[5][u] += da_i * one.c_prev, dw[6][u] += dx_g * one.s_g + dn_all * one.n_prev;
          dc[u] = begins ? 0 : dc_all * one.i + da_i * w[5][u] + held_c;
          dn[u] = begins ? 0 : dn_all * (one.i * one.g + w[6][u]) + held_n;
          for (int64_t k = 0; k < I; ++k) {
            dw[0][u * I + k] += da_i * p.x[at * I + k], dw[0][(H + u) * I + k] += dx_g * p.x[at * I + k];
            out.dx[at * I + k] += da_i * w[0][u * I + k] + dx_g * w[0][(H + u) * I + k];
          }
          for (int64_t k = 0; k < P; ++k) {
            const double from = fed[s * P + k];
            dw[1][u * P + k] += da_i * from, dw[1][(H + u) * P + k] += ds_g * from;
            dh_prev[k] += da_i * w[1][u * P + k] + ds_g * w[1][(H + u) * P + k];
          }
          if (bias) dw[2][u] += da_i, dw[2][H + u] += dx_g, dw[3][u] += da_i, dw[3][H + u] += ds_g;
        }
        for (int64_t k = 0; k < P; ++k)
          dh[k] = begins ? 0 : dh_prev[k] * (masks ? p.h_mask[(r * B + b) * P + k] : 1) + held[k];
      }
      for (int64_t k = 0; k < P; ++k) out.dh[(r * B + b) * P + k] = dh[k];
      for (int64_t u = 0; u < H; ++u)
        out.dc[0][(r * B + b) * H + u] = dc[u], out.dc[1][(r * B + b) * H + u] = dn[u];
    }
  return out;
}

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
    for (int k = 0; k < MOST_EACH; ++k) compare("c_all", a.c_all[k], b.c_all[k], 0);
    told(before, what);
  };
  const auto same = [&](const Outputs<T>& a, const Outputs<T>& b, const char* what, double allowed) {
    const int before = failures;
    compare("y", a.y, b.y, allowed), compare("h_n", a.h_n, b.h_n, allowed);
    for (int k = 0; k < MOST_EACH; ++k) compare("c_n", a.c_n[k], b.c_n[k], allowed);
    if (!b.weights.empty()) {
      compare("dx", a.dx, b.dx, allowed), compare("dh_0", a.dh, b.dh, allowed);
      for (int k = 0; k < MOST_EACH; ++k) compare("dc_0", a.dc[k], b.dc[k], allowed);
      for (size_t k = 0; k < a.weights.size(); ++k)
        compare("dw", a.weights[k], b.weights[k], sizeof(T) == 4 ? 1e-3 : 1e-10);
    }
    told(before, what);
  };
  pool.parallel = parallel;
  const Outputs<T> one = run(1, true, PACKED), plain = run(1, true, PLAIN);
  if constexpr (sizeof(T) == 8)
    if (cell == TRIAL) {
      const Outputs<double> scalars = trial_by_scalars(problem);
      same(scalars, one, "loops over scalars", 1e-10);
      const int before = failures;
      for (int k = 0; k < 2; ++k) compare("c_all", scalars.c_all[k], one.c_all[k], 1e-10);
      told(before, "loops over scalars");
    }
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

// Rows of odd sizes, of exactly as much memory as they take, drawn by as many threads as asked for.
void check_masks() {
  const int64_t sites[] = {3, 70};
  for (int64_t units : {1, 7, 64, 333}) {
    Array<int64_t> ids(37);
    for (int64_t k = 0; k < ids.size(); ++k) ids[k] = k << 40 | k;
    const auto drawn = [&](int threads) {
      Array<uint8_t> out(2 * ids.size() * units);
      DrawCall call{{1, 2}, 2, ids.size(), units, sites, ids.data(), nullptr, 1u << 31, out.data(), 0};
      run(call, threads);
      return out;
    };
    pool.parallel = parallel;
    const Array<uint8_t> one = drawn(1);
    compare("kept", one, drawn(3), 0);
    pool.parallel = alone;
    compare("kept", one, drawn(3), 0);
  }
}

#include "driver_chains.h"

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
#ifdef FASTSEQ_FEW  // of each cell some shapes, other ones than of its neighbours
  const int turns = 3;
#else
  const int turns = 1;
#endif
  for (int cell = 0; cell <= TRIAL; ++cell)
    for (const Shape& shape : shapes) {
      if ((cell + (&shape - shapes)) % turns) continue;
      check<float>(static_cast<Cell>(cell), shape);
      check<double>(static_cast<Cell>(cell), shape);
    }
  check_masks();
  for (int64_t K : {1, 2, 17, 66})
    for (int64_t n : {1, 3, 5})
      for (bool far : {false, true}) {
        if (turns > 1 && (K > 17 || n == 1 + 2 * far)) continue;
        check_chains<float>(7, 19, K, n, far), check_chains<double>(5, 3, K, n, far);
        check_chains<float>(40, 9, K, n, far);
      }
  std::printf("%d failures\n", failures);
  return failures > 0;
}

// The kernels on the host without Python and torch, for the sanitizers: forward, and backward of what
// it left, of a choice of cells, types and shapes, by CTAs alone and by teams of them. Each runs twice,
// what comes late differs, and has to give the same bits; all that it has to write is finite, nothing
// beside it is touched, and what it only reads stays as it was. It is compared with plain loops over
// the same text, one sequence after another.
//
//   host_driver [NAME ...]     of the cases; all by default
//
// FASTSEQ_FEW leaves out most of them, so that the compiler has done soon.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "backward.h"
#include "forward.h"
#include "team_backward.h"
#include "team_forward.h"

using namespace fastseq;
using namespace fastseq::FASTSEQ_ISA;

namespace {

int failures = 0;
std::string at_hand;  // the case and the shape

void fail(const std::string& what) {
  if (++failures <= 20) std::printf("%s: %s\n", at_hand.c_str(), what.c_str());
}

struct Random {
  uint64_t state = 1;
  float operator()() {  // in [-1, 1)
    state = state * 6364136223846793005u + 1442695040888963407u;
    return float(int64_t(state) >> 40) / float(1 << 23);
  }
};

// `size` numbers, NaN at first, between guards.
template <class Number>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0) : size_(size), bytes_(2 * MARGIN + size * sizeof(Number)) {
    std::fill(bytes_.begin(), bytes_.end(), host::GUARD);
    std::memset(data(), host::POISON, size * sizeof(Number));
    guard(true);
  }
  Buffer(const Buffer& other) : Buffer(other.size_) {
    if (size_) std::memcpy(data(), other.data(), size_ * sizeof(Number));
  }
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { guard(false); }

  Number* data() const { return reinterpret_cast<Number*>(aligned()); }
  Number* or_null() const { return size_ ? data() : nullptr; }
  Number& operator[](int64_t k) const { return data()[k]; }
  int64_t size() const { return size_; }

  void fill(Random& random, float scale) const {
    for (int64_t k = 0; k < size_; ++k) (*this)[k] = narrow<Number>(scale * random());
  }
  void zero() const { std::memset(static_cast<void*>(data()), 0, size_ * sizeof(Number)); }
  bool same(const Buffer& other) const {
    return size_ == other.size_ && !std::memcmp(data(), other.data(), size_ * sizeof(Number));
  }
  bool is_guarded() {
    guard(false);
    const unsigned char *begin = bytes_.data(), *first = aligned(), *end = begin + bytes_.size();
    const auto is_guard = [](unsigned char byte) { return byte == host::GUARD; };
    const bool whole = std::all_of(begin, first, is_guard) &&
                       std::all_of(first + size_ * sizeof(Number), end, is_guard);
    guard(true);
    return whole;
  }

 private:
  static constexpr size_t MARGIN = 256;

  unsigned char* aligned() const {
    const auto begin = reinterpret_cast<uintptr_t>(bytes_.data());
    return const_cast<unsigned char*>(bytes_.data()) + ((begin + 127) / 128 * 128 + 128 - begin);
  }
  void guard(bool on) {
    unsigned char *begin = bytes_.data(), *first = aligned(), *end = begin + bytes_.size();
    unsigned char* last = first + size_ * sizeof(Number);
    (on ? forbid : allow)(begin, first - begin);
    (on ? forbid : allow)(last, end - last);
  }

  int64_t size_;
  std::vector<unsigned char> bytes_;
};

struct Shape {
  int T, B, R, H;
  bool ragged, state, reset, h_mask, save;  // state: initial ones are given
  int tile = 8;                             // sequences of a CTA, or of a team
};

enum Role { READ, FORWARD, BACKWARD };  // by what it is written

// Of CTAs alone, which hold up to HC hidden units.
template <class Cell_, class Type_, int HC>
struct Alone {
  using Cell = Cell_;
  using Type = Type_;
  using T = Tile<Cell, Type, HC, false>;
  static constexpr bool TEAMS = false;
  // Of the matrices that they are given: rows of a gate, and numbers of a row.
  static int height(int) { return HC; }
  static int width(int) { return HC; }

  static std::string run(const char* name, const Shape& s, int64_t tiles, bool backward,
                         const Arguments& a) {
    const host::Kernel kernel{
        name, backward ? backward_walk<Cell, Type, HC> : forward_walk<Cell, Type, HC>, T::THREADS};
    const int64_t parts = T::MULTIPLIES ? 1 : (s.H + HC - 1) / HC;
    return host::run(kernel, tiles, s.R, parts, T::THREADS,
                     backward ? Tile<Cell, Type, HC, true>::BYTES : T::BYTES, a);
  }
};

// Of teams. What a grid's hand to each other stands in a Buffer of its own.
template <class Cell_, class Type_, class By>
struct Teams {
  using Cell = Cell_;
  using Type = Type_;
  using T = Slice<Cell, Type, By>;
  static constexpr bool TEAMS = true, IS_GRID = By::OPERANDS == 1;
  static int height(int H) { return H; }
  static int width(int H) { return up_to(H, 16 / T::SIZE); }

  static std::string run(const char* name, const Shape& s, int64_t tiles, bool backward,
                         const Arguments& given) {
    const host::Kernel kernel{name, backward ? team_backward<T, Cell> : team_forward<T, Cell>,
                              T::THREADS};
    const int team = (s.H + T::UNITS - 1) / T::UNITS;
    const Room room = backward ? backward_room<T>(team, s.tile) : forward_room<T>(team, s.tile);
    const int64_t of_h = (s.tile * T::UNITS + T::PAGE - 1) / T::PAGE * (T::SIZE == 2 ? 6 : 8);
    const int64_t of_sums = int64_t(room.columns) * T::UNITS / 4 * team;
    const int64_t each = 2 * team * (backward ? of_sums : of_h);  // packets of a team
    Buffer<uint32_t> packets(IS_GRID ? 4 * each * tiles * s.R : 0);
    packets.zero();
    int32_t fault = 0;
    Arguments a = given;
    a.team = team, a.packets = packets.or_null(), a.fault = &fault, a.code = 7;
    a.patience = 60000;
    std::string why = host::run(kernel, team * tiles, s.R, 1, T::THREADS, room.bytes, a, IS_GRID,
                                IS_GRID ? 1 : team);
    if (why.empty() && fault) why = "a CTA waited in vain";
    if (why.empty() && !packets.is_guarded()) why = "written beside the packets";
    return why;
  }
};

// All that a call of the two kernels is given.
template <class Kernels>
struct Memory {
  using T = typename Kernels::T;
  using Cell = typename Kernels::Cell;
  using Number = typename T::Number;
  static constexpr int G = T::G, G_HH = T::G_HH, C = T::C, E = T::E, U = T::U;

  const Shape s;
  const int HR, HC;  // rows of a gate in w_hh, and from a row to the next
  const int64_t N, tiles;
  Buffer<int64_t> lengths, offsets;
  Buffer<Number> gates, extra, y, h_0, c_0, h_n, c_n, w_forward, w_backward, b_hh, unit, h_mask;
  Buffer<Number> dy, dh_n, dc_n, dh_0, dc_0, dgates, dproduct;
  Buffer<float> c_all, dc_all, dbias, dunit;
  Buffer<uint8_t> reset;

  explicit Memory(Shape s)
      : s(s), HR(Kernels::height(s.H)), HC(Kernels::width(s.H)), N(rows(s)),
        tiles((s.B + s.tile - 1) / s.tile), lengths(s.ragged ? s.B : 0),
        offsets(s.ragged ? s.T : 0), gates(N * s.R * G * s.H), extra(s.save * N * s.R * E * s.H),
        y(N * s.R * s.H), h_0(s.state * states()), c_0(s.state * C * states()), h_n(states()),
        c_n(C * states()), w_forward(int64_t(s.R) * G_HH * HR * HC),
        w_backward(int64_t(s.R) * G_HH * HC * HC),
        b_hh(Cell::APART * states() / s.B * G_HH), unit(int64_t(s.R) * U * s.H),
        h_mask(s.h_mask * states()), dy(y.size()), dh_n(states()), dc_n(C * states()),
        dh_0(states()), dc_0(C * states()), dgates(gates.size()),
        dproduct((Cell::APART > 0) * N * s.R * G_HH * s.H), c_all(s.save * C * y.size()),
        dc_all(c_all.size()), dbias(tiles * s.R * (G + Cell::APART) * s.H),
        dunit(tiles * unit.size()), reset(s.reset * s.R * N) {
    Random random;
    for (int b = 0; b < s.B && s.ragged; ++b) lengths[b] = length(s, b);
    for (int64_t t = 0, row = 0; t < s.T && s.ragged; ++t) {
      offsets[t] = row;
      for (int b = 0; b < s.B; ++b) row += t < length(s, b);
    }
    for (const Buffer<Number>* one : {&gates, &h_0, &c_0, &b_hh, &unit, &h_mask, &dy, &dh_n, &dc_n})
      one->fill(random, 1);
    dc_all.fill(random, 1);
    for (int64_t k = 0; k < reset.size(); ++k) reset[k] = random() > 0.4f;
    w_forward.zero(), w_backward.zero();
    const float bound = 2 / std::sqrt(float(s.H));
    for (int r = 0; r < s.R; ++r)
      for (int g = 0; g < G_HH; ++g)
        for (int u = 0; u < s.H; ++u)
          for (int k = 0; k < s.H; ++k)
            w_forward[((int64_t(r) * G_HH + g) * HR + u) * HC + k] =
                w_backward[((int64_t(r) * HC + k) * G_HH + g) * HC + u] =
                    narrow<Number>(bound * random());
  }

  static int length(const Shape& s, int b) { return s.ragged ? std::max(0, s.T - b / 2) : s.T; }
  static int64_t rows(const Shape& s) {
    int64_t all = 0;
    for (int b = 0; b < s.B; ++b) all += length(s, b);
    return all;
  }
  int64_t states() const { return int64_t(s.R) * s.B * s.H; }
  int64_t row(int t, int b) const { return (s.ragged ? offsets[t] : int64_t(t) * s.B) + b; }
  bool is_reverse(int r) const { return r % 2; }

  Arguments arguments(bool backward) const {
    Arguments a{};
    a.T = s.T, a.B = s.B, a.R = s.R, a.H = s.H, a.rows = N, a.tile = s.tile;
    a.reverse = 0xaaaaaaaa, a.save = s.save;
    a.lengths = lengths.or_null(), a.offsets = offsets.or_null();
    a.gates = gates.or_null(), a.extra = extra.or_null();
    a.y = y.or_null(), a.c_all = c_all.or_null();
    a.h_0 = h_0.or_null(), a.c_0 = c_0.or_null(), a.h_n = h_n.or_null(), a.c_n = c_n.or_null();
    a.w_hh = (backward && !Kernels::TEAMS ? w_backward : w_forward).or_null();
    a.b_hh = b_hh.or_null();
    a.unit = unit.or_null(), a.reset = reset.or_null(), a.h_mask = h_mask.or_null();
    a.dy = dy.or_null(), a.dc_all = dc_all.or_null();
    a.dh_n = dh_n.or_null(), a.dc_n = dc_n.or_null();
    a.dh_0 = dh_0.or_null(), a.dc_0 = dc_0.or_null();
    a.dgates = dgates.or_null(), a.dproduct = dproduct.or_null();
    a.dbias = dbias.or_null(), a.dunit = dunit.or_null();
    return a;
  }

  // Its arrays, as pointers to members.
  template <class See>
  static void each(const Shape& s, const See& see) {
    using M = Memory;
    see(&M::lengths, "lengths", READ), see(&M::offsets, "offsets", READ);
    see(&M::h_0, "h_0", READ), see(&M::c_0, "c_0", READ), see(&M::b_hh, "b_hh", READ);
    see(&M::w_forward, "w_hh", READ), see(&M::w_backward, "w_hh transposed", READ);
    see(&M::unit, "unit", READ), see(&M::h_mask, "h_mask", READ), see(&M::reset, "reset", READ);
    see(&M::dy, "dy", READ), see(&M::dc_all, "dc_all", READ);
    see(&M::dh_n, "dh_n", READ), see(&M::dc_n, "dc_n", READ);
    see(&M::gates, "gates", s.save && Cell::KEEPS_GATES ? FORWARD : READ);
    see(&M::extra, "extra", FORWARD), see(&M::y, "y", FORWARD), see(&M::h_n, "h_n", FORWARD);
    see(&M::c_all, "c_all", FORWARD), see(&M::c_n, "c_n", FORWARD);
    see(&M::dh_0, "dh_0", BACKWARD), see(&M::dc_0, "dc_0", BACKWARD);
    see(&M::dgates, "dgates", BACKWARD), see(&M::dproduct, "dproduct", BACKWARD);
    see(&M::dbias, "dbias", BACKWARD), see(&M::dunit, "dunit", BACKWARD);
  }
};

bool finite(float v) { return std::isfinite(v); }
bool finite(Bf16 v) { return std::isfinite(widen(v)); }
bool finite(F16 v) { return std::isfinite(widen(v)); }
bool finite(int64_t) { return true; }
bool finite(uint8_t) { return true; }

template <class Type>
struct Tolerance;  // the unit roundoff of what the products take, a few times
template <>
struct Tolerance<bfloat16> {
  static constexpr float VALUE = 0x1p-5f;
};
template <>
struct Tolerance<float16> {
  static constexpr float VALUE = 0x1p-8f;
};
template <>
struct Tolerance<tf32> {
  static constexpr float VALUE = 0x1p-8f;
};
template <>
struct Tolerance<float32> {
  static constexpr float VALUE = 0x1p-16f;
};

template <class Kernels>
struct Loops {
  using M = Memory<Kernels>;
  using Cell = typename Kernels::Cell;
  using Type = typename Kernels::Type;
  using T = typename M::T;
  using Number = typename T::Number;
  static constexpr int G = T::G, G_HH = T::G_HH, C = T::C, E = T::E, U = T::U;

  // An operand of the product.
  static double operand(float v) {
    v = widen(narrow<Number>(v));
    return T::PARTS == 1 ? round_tf32(v) : v;
  }
  static double weight(const M& m, int r, int g, int u, int k) {
    return operand(widen(m.w_forward[((int64_t(r) * G_HH + g) * m.HR + u) * m.HC + k]));
  }

  template <class Array>
  static void compare(const Array& ours, int64_t k, float expected, const char* name) {
    const float v = widen(ours[k]);
    if (std::fabs(v - expected) > Tolerance<Type>::VALUE * (1 + std::fabs(expected)))
      fail(std::string(name) + "[" + std::to_string(k) + "]: " + std::to_string(v) + ", by loops " +
           std::to_string(expected));
  }

  // given: before the kernel; m: after it. Each step begins with the states that the kernel left,
  // so that errors do not add up.
  static void forward(const M& given, const M& m) {
    const Shape& s = m.s;
    const int H = s.H;
    for (int r = 0; r < s.R; ++r)
      for (int b = 0; b < s.B; ++b) {
        const int length = M::length(s, b);
        const int64_t state = (int64_t(r) * s.B + b) * H;
        std::vector<float> h(H), c(H);
        for (int u = 0; u < H; ++u) {
          h[u] = s.state ? widen(m.h_0[state + u]) : 0;
          c[u] = s.state && C ? widen(m.c_0[state + u]) : 0;
        }
        for (int step = 0; step < length; ++step) {
          const int64_t row = m.row(m.is_reverse(r) ? length - 1 - step : step, b);
          const int64_t at_row = row * s.R + r;
          const bool kept = !s.reset || !m.reset[r * m.N + row];
          const std::vector<float> before = h;
          for (int u = 0; u < H; ++u) {
            ForwardAt<T> at{};
            for (int g = 0; g < G; ++g) at.in[g] = widen(given.gates[(at_row * G + g) * H + u]);
            for (int g = 0; g < G_HH; ++g) {
              double product = 0;
              for (int k = 0; k < H && kept; ++k)
                product += weight(m, r, g, u, k) *
                           operand(before[k] * (s.h_mask ? widen(m.h_mask[state + k]) : 1));
              if (g >= G_HH - Cell::APART)
                product += widen(m.b_hh[(int64_t(r) * G_HH + g) * H + u]);
              at.product[g] = float(product);
            }
            at.h_before = kept ? before[u] : 0, at.c_before[0] = kept ? c[u] : 0;
            for (int k = 0; k < U; ++k) at.units[k] = widen(m.unit[(int64_t(r) * U + k) * H + u]);
            Cell::template forward<0>(at);
            compare(m.y, at_row * H + u, at.h_after, "y");
            h[u] = widen(m.y[at_row * H + u]);
            if (C) c[u] = at.c_after[0];
            if (!s.save) continue;
            if (C) {
              compare(m.c_all, at_row * H + u, at.c_after[0], "c_all");
              c[u] = m.c_all[at_row * H + u];
            }
            for (int g = 0; g < G && Cell::KEEPS_GATES; ++g)
              compare(m.gates, (at_row * G + g) * H + u, at.saves[g], "saved");
            for (int k = 0; k < E; ++k)
              compare(m.extra, (at_row * E + k) * H + u, at.extras[k], "extra");
          }
        }
        for (int u = 0; u < H; ++u) {
          compare(m.h_n, state + u, h[u], "h_n");
          if (C) compare(m.c_n, state + u, c[u], "c_n");
        }
      }
  }

  // given: before the kernel.
  static void backward(const M& given, const M& m) {
    const Shape& s = m.s;
    const int H = s.H;
    constexpr int BIASES = G + Cell::APART;
    std::vector<float> dunit(m.unit.size()), dbias(int64_t(s.R) * BIASES * H);
    for (int r = 0; r < s.R; ++r)
      for (int b = 0; b < s.B; ++b) {
        const int length = M::length(s, b);
        const int64_t state = (int64_t(r) * s.B + b) * H;
        std::vector<float> dh(H), dc(H);
        for (int u = 0; u < H; ++u) {
          dh[u] = widen(given.dh_n[state + u]);
          if (C) dc[u] = widen(given.dc_n[state + u]);
        }
        for (int step = length - 1; step >= 0; --step) {
          const auto row_of = [&](int k) { return m.row(m.is_reverse(r) ? length - 1 - k : k, b); };
          const int64_t row = row_of(step), at_row = row * s.R + r;
          const int64_t at_before = step ? row_of(step - 1) * s.R + r : 0;
          const bool kept = !s.reset || !m.reset[r * m.N + row];
          std::vector<double> dproduct(G_HH * H);
          std::vector<float> direct(H);
          for (int u = 0; u < H; ++u) {
            BackwardAt<T> at{};
            float h_prev = s.state ? widen(m.h_0[state + u]) : 0;
            float c_prev = s.state && C ? widen(m.c_0[state + u]) : 0;
            if (step) h_prev = widen(m.y[at_before * H + u]);
            if (step && C) c_prev = m.c_all[at_before * H + u];
            at.dh_now = dh[u] + widen(m.dy[at_row * H + u]);
            at.dc_now[0] = C ? dc[u] + m.dc_all[at_row * H + u] : 0;
            for (int g = 0; g < G; ++g) at.saves[g] = widen(m.gates[(at_row * G + g) * H + u]);
            for (int k = 0; k < E; ++k) at.extras[k] = widen(m.extra[(at_row * E + k) * H + u]);
            at.h_after = widen(m.y[at_row * H + u]), at.h_before = kept ? h_prev : 0;
            at.c_after[0] = C ? m.c_all[at_row * H + u] : 0, at.c_before[0] = kept ? c_prev : 0;
            for (int k = 0; k < U; ++k) at.units[k] = widen(m.unit[(int64_t(r) * U + k) * H + u]);
            Cell::template backward<0>(at);
            for (int g = 0; g < G; ++g) {
              compare(m.dgates, (at_row * G + g) * H + u, at.din[g], "dgates");
              dbias[(int64_t(r) * BIASES + g) * H + u] += at.din[g];
            }
            for (int g = G; g < BIASES; ++g)
              dbias[(int64_t(r) * BIASES + g) * H + u] += at.dproduct[g - Cell::APART];
            for (int g = 0; g < G_HH; ++g) {
              if (Cell::APART)
                compare(m.dproduct, (at_row * G_HH + g) * H + u, at.dproduct[g], "dproduct");
              dproduct[g * H + u] = operand(at.dproduct[g]);
            }
            for (int k = 0; k < U; ++k) dunit[(int64_t(r) * U + k) * H + u] += at.dunits[k];
            direct[u] = at.dh_before, dc[u] = kept ? at.dc_before[0] : 0;
          }
          for (int k = 0; k < H; ++k) {
            double product = 0;
            for (int g = 0; g < G_HH; ++g)
              for (int u = 0; u < H; ++u) product += weight(m, r, g, u, k) * dproduct[g * H + u];
            const double mask = s.h_mask ? widen(m.h_mask[state + k]) : 1;
            dh[k] = kept ? float(product * mask + direct[k]) : 0;
          }
        }
        for (int u = 0; u < H; ++u) {
          compare(m.dh_0, state + u, dh[u], "dh_0");
          if (C) compare(m.dc_0, state + u, dc[u], "dc_0");
        }
      }
    const auto compare_sums = [&](const Buffer<float>& tiles, const std::vector<float>& expected,
                                  const char* name) {
      const int64_t size = int64_t(expected.size());
      for (int64_t k = 0; k < size; ++k) {
        float all = 0;
        for (int64_t tile = 0; tile < m.tiles; ++tile) all += tiles[tile * size + k];
        compare(std::vector<float>{all}, 0, expected[k], name);
      }
    };
    compare_sums(m.dunit, dunit, "dunit");
    compare_sums(m.dbias, dbias, "dbias");
  }
};

template <class Kernels>
void run(const char* name, Shape s) {
  if (!s.H) s.H = Kernels::width(0);
  using M = Memory<Kernels>;
  const auto launch = [&](bool backward, const M& memory) {
    const std::string why =
        Kernels::run(name, s, memory.tiles, backward, memory.arguments(backward));
    if (!why.empty()) fail(why);
    host::seed += 1;
    return why.empty();
  };
  const auto twice = [&](bool backward, const M& before, M& after) {
    at_hand = std::string(name) + (backward ? " backward" : " forward");
    at_hand += " T=" + std::to_string(s.T) + " B=" + std::to_string(s.B);
    at_hand += " R=" + std::to_string(s.R) + " H=" + std::to_string(s.H);
    const int failed = failures;
    const M again(before);
    if (!launch(backward, after) || !launch(backward, again)) return false;
    M::each(s, [&](auto member, const char* what, Role role) {
      if (!(after.*member).is_guarded()) fail(std::string("written beside ") + what);
      if (role != (backward ? BACKWARD : FORWARD)) {
        if (!(after.*member).same(before.*member)) fail(std::string("wrote ") + what);
        return;
      }
      if (!(after.*member).same(again.*member)) fail(what + std::string(" has other bits"));
      for (int64_t k = 0; k < (after.*member).size(); ++k)
        if (!finite((after.*member)[k])) return fail(what + std::string(" is not finite"));
    });
    return failures == failed;
  };
  const M given(s);
  M forward(given);
  if (!twice(false, given, forward)) return;
  Loops<Kernels>::forward(given, forward);
  if (!s.save) return;
  M backward(forward);
  if (twice(true, forward, backward)) Loops<Kernels>::backward(forward, backward);
}

// {T, B, R, H, ragged, state, reset, h_mask, save}; H 0: as many as the kernel has room for
// PLAIN, LONG: more steps than are on their way at once
const Shape PLAIN{11, 9, 2, 0, false, true, false, false, true};
const Shape SMALLEST{1, 1, 1, 1, false, false, false, false, true};
const Shape RAGGED{4, 9, 2, 19, true, true, true, true, true};  // the ninth sequence is empty
const Shape LONG{11, 3, 2, 30, false, true, true, false, true};
const Shape LEAN{3, 2, 2, 17, true, false, false, true, false};
const Shape FEW{4, 6, 2, 32, false, true, false, false, true, 4};
const Shape PARTS{4, 3, 1, 70, true, true, true, false, true};  // of a cell without a product
// Of a cluster two or three CTAs, of a grid three to five: two teams of two tiles of columns and of
// one, whose pieces stand anywhere; steps enough for the ring; slices that are whole
const Shape TWO{3, 13, 1, 37, true, true, true, true, true, 10};
const Shape BOTH{6, 2, 2, 40, false, true, false, false, true};
const Shape WHOLE{3, 3, 1, 64, false, false, true, true, true};
const Shape THREE{4, 2, 1, 70, true, true, false, false, true};

struct Case {
  const char* name;
  void (*run)();
};
#define FASTSEQ_CASE(Kernels, Cell, Type, how, ...)                                     \
  {#Cell " " #Type " " #how, [] {                                                       \
     for (const Shape& shape : {__VA_ARGS__})                                           \
       run<Kernels<Cell, Type, how>>(#Cell " " #Type " " #how, shape);                  \
   }}
const Case cases[] = {
    FASTSEQ_CASE(Alone, Lstm, bfloat16, 32, SMALLEST, PLAIN, RAGGED, LONG, FEW),
    FASTSEQ_CASE(Teams, Gru, bfloat16, ByCluster, TWO, BOTH),
    FASTSEQ_CASE(Teams, Lstm, bfloat16, ByGrid, TWO, BOTH),
#ifndef FASTSEQ_FEW
    FASTSEQ_CASE(Alone, Gru, float32, 32, PLAIN, RAGGED),
    FASTSEQ_CASE(Alone, RnnTanh, float16, 32, RAGGED, LONG, LEAN),
    FASTSEQ_CASE(Alone, PeepholeLstm, tf32, 32, RAGGED, LEAN),
    FASTSEQ_CASE(Alone, CoupledLstm, float16, 64, RAGGED),
    FASTSEQ_CASE(Alone, Gru, bfloat16, 128, RAGGED, LONG),
    FASTSEQ_CASE(Alone, Lstm, tf32, 64, SMALLEST, RAGGED),
    FASTSEQ_CASE(Alone, Lstm, float32, 64, SMALLEST, RAGGED),  // some weights in shared memory
    FASTSEQ_CASE(Alone, LeakyIntegrator, bfloat16, 64, RAGGED, LONG),
    FASTSEQ_CASE(Teams, Lstm, tf32, ByCluster, SMALLEST, TWO, WHOLE),
    FASTSEQ_CASE(Teams, RnnTanh, float16, ByCluster, LONG, THREE, LEAN),
    FASTSEQ_CASE(Teams, PeepholeLstm, bfloat16, ByCluster, THREE),
    FASTSEQ_CASE(Teams, Gru, tf32, ByGrid, SMALLEST, TWO, WHOLE),
    FASTSEQ_CASE(Teams, RnnTanh, float16, ByGrid, LONG, THREE, LEAN),
    FASTSEQ_CASE(Teams, CoupledLstm, bfloat16, ByGrid, THREE),
#endif
    FASTSEQ_CASE(Alone, IndrnnTanh, float32, 64, RAGGED, PARTS),
};

}  // namespace

int main(int count, char** names) {
  int run = 0;
  for (const Case& one : cases) {
    const auto is_asked = [&](const char* name) { return !std::strcmp(name, one.name); };
    if (count > 1 && std::none_of(names + 1, names + count, is_asked)) continue;
    one.run();
    ++run;
  }
  std::printf("%d cases, %d failures\n", run, failures);
  return failures > 0 || run == 0;
}

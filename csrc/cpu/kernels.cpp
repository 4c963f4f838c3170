// The kernels of one instruction set. Compiled once for each, with FASTSEQ_ISA its name and the
// compiler's options to match.
#include <new>
#include <type_traits>

#include "vocabulary.h"
//
#include "../cells/elman.h"
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "loops.h"

namespace fastseq {
namespace FASTSEQ_ISA {

// Calls `function` with the struct of a cell.
template <class Function>
FASTSEQ_INLINE auto with_cell(fastseq::Cell cell, Function function) {
  switch (cell) {
    case LSTM: return function(Lstm{});
    case GRU: return function(Gru{});
    case GRU_RESET_BEFORE: return function(GruResetBefore{});
    case RNN_TANH: return function(RnnTanh{});
    case RNN_RELU: return function(RnnRelu{});
    default: return function(IndRnn{});
  }
}

// What a step costs: floating-point operations of a row, and bytes of weights.
template <class Cell, class CallT>
FASTSEQ_INLINE double step_flops(const CallT& call) {
  const double H = static_cast<double>(call.input.H);
  return 2 * H * (Cell::FIRST[Cell::PHASES] * static_cast<double>(call.input.P) + 30 * Cell::G);
}
template <class Cell, class CallT>
FASTSEQ_INLINE double step_bytes(const CallT& call) {
  return sizeof(typename CallT::Element) * static_cast<double>(call.input.H) * call.input.P *
         Cell::FIRST[Cell::PHASES];
}

template <class Cell, class CallT>
FASTSEQ_INLINE bool may_share_units(const CallT& call) {
  const auto& r = call.recurrence[0];
  return units_apart<Cell>(r.weights.w_hr != nullptr, r.h_mask != nullptr);
}

template <class Cell, class T>
FASTSEQ_INLINE index forward_panels(const ForwardCall<T>& call) {
  return input_panels<Cell, T>(call.input.H, call.input.I).count();
}
template <class Cell, class T>
FASTSEQ_INLINE index backward_panels(const BackwardCall<T>& call) {
  return BackwardShare<Cell, T>::unit_panels(call.input.H).count();
}

// The share of thread `id` of `count`, and with a larger `turn` its next one.
template <class Cell, class CallT>
FASTSEQ_INLINE bool next_place(const CallT& call, int id, int count, int turn, index panels,
                               Place* place) {
  return place_of(call, id, count, turn, panels, may_share_units<Cell>(call),
                  step_flops<Cell>(call), step_bytes<Cell>(call), place);
}

template <class T>
void forward_scratch(const ForwardCall<T>& call, int threads, size_t* each, size_t* shared) {
  *shared = 0;
  *each = with_cell(call.cell, [&](auto cell) {
    using Cell = decltype(cell);
    size_t most = 0;
    Place place;
    for (int id = 0; id < threads; ++id)
      for (int turn = 0; next_place<Cell>(call, id, threads, turn, forward_panels<Cell>(call), &place);
           ++turn) {
        Arena arena(nullptr);
        ForwardShare<Cell, T> share(call, place, arena);
        if (arena.used() > most) most = arena.used();
      }
    return most;
  });
}

template <class T>
void forward(const ForwardCall<T>& call, int id, int count) {
  with_cell(call.cell, [&](auto cell) {
    using Cell = decltype(cell);
    Place place;
    for (int turn = 0; next_place<Cell>(call, id, count, turn, forward_panels<Cell>(call), &place);
         ++turn) {
      Arena arena(call.scratch + id * call.scratch_each);
      ForwardShare<Cell, T> share(call, place, arena);
      share.run();
    }
  });
}

template <class T>
size_t pack(const ForwardCall<T>& call, int r, void* out) {
  return with_cell(call.cell, [&](auto cell) {
    using Cell = decltype(cell);
    const Place place{r, 0, 0, 0, forward_panels<Cell>(call), 0, 1, nullptr, 0, 1};
    Arena nothing(nullptr), arena(out);
    ForwardShare<Cell, T> share(call, place, nothing);
    share.take_packed(arena);
    if (out) share.pack();
    return arena.used();
  });
}

// ------------------------------------------------------- the large products, after the walk back

struct Range {
  index first, last;
};
// What thread `id` of `count` does of `total`, in whole tiles.
FASTSEQ_INLINE Range range_of(index total, int id, int count, int tile) {
  const index tiles = (total + tile - 1) / tile;
  const index first = tiles * id / count * tile, last = tiles * (id + 1) / count * tile;
  return {first < total ? first : total, last < total ? last : total};
}

// Their left-hand side is the gate gradients of a window of steps, which the walk has just left in
// cache; so no more than two windows of them are ever kept.
template <class Cell, class T>
struct Gradients {
  static constexpr int TOGETHER = Cell::G - Cell::APART;
  static constexpr int Q = Cell::G + Cell::APART;
  const BackwardCall<T>& call;
  const Input<T>& in;
  const index H, P;
  const bool pairs;
  T* scratch;

  Gradients(const BackwardCall<T>& call, Arena& arena)
      : call(call), in(call.input), H(in.H), P(in.P), pairs(call.bf16 && in_pairs(in)) {
    const index wide = P > H ? P : H;
    const index products = products_scratch<T>(in.I, wide), rows = rows_scratch<T>();
    scratch = arena.take<T>(products > rows ? products : rows);
  }

  // The row of w_ih whose gradient is column m of dgates.
  FASTSEQ_INLINE index input_row(index m) const {
    if constexpr (Cell::APART == 0) return m;
    const index c = m / H;
    return (c < Cell::APART ? TOGETHER + c : c - Cell::APART) * H + m % H;
  }

  template <class RowAt>
  struct RowsOfInput {
    const Gradients& of;
    RowAt row;
    FASTSEQ_INLINE auto operator()(index k) const { return row(of.input_row(k)); }
  };

  // dx of the window's rows. Of two directions the one that comes first to a row writes it, which
  // the other adds to: x is cleared before, and both add.
  void dx(int r, const Window<T>& window, int id, int count) {
    const Range rows = range_of(window.rows, id, count, SIX);
    const T* w_ih = call.recurrence[r].weights.w_ih;
    with_rows(pairs, call.halves, w_ih, in.I, [&](auto operation, auto row) {
      using Operation = decltype(operation);
      product_of_rows<Operation>(
          pairs ? window.pairs : window.dgates, Q * H / Operation::EACH, rows.first, rows.last,
          Cell::G * H / Operation::EACH, RowsOfInput<decltype(row)>{*this, row}, in.I,
          call.dx + window.base * in.I, in.I, call.R > 1, scratch);
    });
  }

  static T* writable(const T* p) { return const_cast<T*>(p); }

  // What thread `id` does of columns [first, last).
  static Columns part(index first, index last, bool a, bool b, int id, int count) {
    const Range range = range_of(last - first, id, count, SIX);
    return {first + range.first, first + range.last, a, b};
  }

  template <class A, class B>
  void products(const T* d, index stride, index N, const Columns* columns, int count, const A& a,
                const B& b, T* sums, bool add) {
    with_operation<T>(pairs, [&](auto operation) {
      products_over_rows<decltype(operation)>(d, stride, N, columns, count, a, b, sums, add, scratch);
    });
  }

  // sums: (Q*H), where the biases' gradients gather; end: whether this window is the last.
  void weights(int r, const Window<T>& window, T* sums, bool begin, bool end, int id, int count) {
    constexpr int G_HH = Cell::FIRST[Cell::PHASES], FIRST_HH = Cell::FIRST[1];
    const Weights<T>& out = call.gradients[r].out;
    const Recurrence<T>& from = call.recurrence[r];
    const index base = window.base, N = window.rows;
    const bool flat = in.offsets || in.x_step == in.batch * in.x_row;
    const auto input = side<T>(
        [&](index k) {
          const index n = base + k;
          return flat ? in.x + n * in.x_row : in.at(n / in.batch, n % in.batch);
        },
        in.I, [&](index m) { return writable(out.w_ih) + input_row(m) * in.I; });
    const auto recurrent = side<T>(
        [&](index k) { return window.h_prev[k]; }, P,
        [&](index m) { return writable(out.w_hh) + (m - Cell::APART * H) * P; });
    // columns of dgates: x of the gates apart | what the first phase takes | the rest of x | s of
    // the gates apart. What a cell does not have is empty.
    const index apart = Cell::APART * H, both = apart + (FIRST_HH - Cell::APART) * H;
    const Columns parts[] = {
        part(0, apart, true, false, id, count),
        part(apart, both, true, true, id, count),
        part(both, Cell::G * H, true, false, id, count),
        part(Cell::G * H, Q * H, false, true, id, count),
    };
    products(window.dgates, Q * H, N, parts, 4, input, recurrent, sums, !begin);
    if (end)
      for (const Columns& c : parts)
        for (index m = c.first; m < c.last; ++m) {
          if (out.b_ih && m < Cell::G * H) writable(out.b_ih)[input_row(m)] = sums[m];
          if (out.b_hh && m >= apart && m - apart < G_HH * H)
            writable(out.b_hh)[m - apart] = sums[m];
        }
    const auto none = side<T>([](index) { return static_cast<const T*>(nullptr); }, 0,
                              [](index) { return static_cast<T*>(nullptr); });
    T* unused = sums + Q * H;
    if constexpr (Cell::PHASES > 1) {
      const Columns second[] = {part(FIRST_HH * H, G_HH * H, true, false, id, count)};
      const auto value = side<T>([&](index k) { return from.extra + (base + k) * H; }, H,
                                 [&](index m) { return writable(out.w_hh) + m * P; });
      products(window.dgates, Q * H, N, second, 1, value, none, unused, !begin);
    }
    if (out.w_hr) {
      const Columns all[] = {part(0, P, true, false, id, count)};
      const auto m = side<T>([&](index k) { return from.m + (base + k) * H; }, H,
                             [&](index row) { return writable(out.w_hr) + row * H; });
      products(window.dh_all, P, N, all, 1, m, none, unused, !begin);
    }
  }
};

// What all threads share in backward: two windows of each recurrence, and sums.
template <class Cell, class T>
struct Shared {
  static constexpr int Q = Cell::G + Cell::APART;
  static constexpr index LEAST_ROWS = 768, LEAST_BYTES = index(1) << 20;
  const BackwardCall<T>& call;
  const Input<T>& in;
  index rows;  // of a window, at most, but for a single step
  Arena& arena;
  index most;

  struct OfRecurrence {
    Window<T> window[2];
    T *sums, *dunit;
  };

  static index row_bytes(const Input<T>& in) { return Q * in.H * index(sizeof(T)); }

  Shared(const BackwardCall<T>& call, Arena& arena) : call(call), in(call.input), arena(arena) {
    rows = LEAST_BYTES / row_bytes(in);
    if (rows < LEAST_ROWS) rows = LEAST_ROWS;
    most = rows > in.batch ? rows : in.batch;
    if (most > in.rows) most = in.rows;
  }

  OfRecurrence take(int r) {
    OfRecurrence of;
    const bool masked = call.recurrence[r].h_mask, projected = call.recurrence[r].weights.w_hr;
    for (Window<T>& w : of.window) {
      w = {};
      w.dgates = arena.take<T>(most * Q * in.H);
      w.pairs = arena.take<T>(call.bf16 && in_pairs(in) ? most * Q * in.H / 2 : 0);
      w.h_prev = arena.take<const T*>(most);
      w.dh_all = arena.take<T>(projected ? most * in.P : 0);
      w.masked = arena.take<T>(masked ? most * in.P : 0);
    }
    const index wide = Q * in.H > in.P ? Q * in.H : in.P;
    of.sums = arena.take<T>(Q * in.H + wide);
    of.dunit = arena.take<T>(Cell::HAS_UNIT ? 2 * call.threads * in.H : 0);
    return of;
  }

  // Where the window that begins at the k-th step walked ends.
  index window_end(bool reverse, index k) const {
    index end = k, n = 0;
    while (end < in.steps) {
      const index more = in.alive(reverse ? end : in.steps - 1 - end);
      if (end > k && n + more > rows) break;
      n += more;
      ++end;
    }
    return end;
  }

  // The window of the steps from the k-th walked up to the one before `end`.
  void set(bool reverse, index k, index end, Window<T>* w) const {
    w->t0 = reverse ? k : in.steps - end;
    w->t1 = reverse ? end : in.steps - k;
    w->base = w->t0 < in.steps ? in.base(w->t0) : 0;
    w->rows = 0;
    for (index t = w->t0; t < w->t1; ++t) w->rows += in.alive(t);
  }
};

// What a thread knows of all recurrences, and its shares of them; in its own scratch.
template <class Cell, class T>
struct Tables {
  typename Shared<Cell, T>::OfRecurrence* of;
  Window<T>** now;
  BackwardShare<Cell, T>* shares;

  Tables(int R, int threads, Arena& arena)
      : of(arena.take<typename Shared<Cell, T>::OfRecurrence>(R)),
        now(arena.take<Window<T>*>(R)),
        shares(arena.take<BackwardShare<Cell, T>>(R / threads + 1)) {}
};

template <class T>
void backward_scratch(const BackwardCall<T>& call, int threads, size_t* each, size_t* shared) {
  with_cell(call.cell, [&](auto cell) {
    using Cell = decltype(cell);
    *each = 0;
    Place place;
    for (int id = 0; id < threads; ++id) {
      Arena arena(nullptr);
      Tables<Cell, T>(call.R, threads, arena);
      for (int turn = 0; next_place<Cell>(call, id, threads, turn, backward_panels<Cell>(call), &place);
           ++turn)
        BackwardShare<Cell, T>(call, place, arena);
      Gradients<Cell, T>(call, arena);
      if (arena.used() > *each) *each = arena.used();
    }
    Arena arena(nullptr);
    Shared<Cell, T> common(call, arena);
    for (int r = 0; r < call.R; ++r) common.take(r);
    *shared = arena.used();
  });
}

template <class T>
void backward(const BackwardCall<T>& call, int id, int count) {
  with_cell(call.cell, [&](auto cell) {
    using Cell = decltype(cell);
    const Input<T>& in = call.input;
    const index panels = backward_panels<Cell>(call);
    Arena common(call.scratch + call.threads * call.scratch_each);
    Shared<Cell, T> shared(call, common);
    Arena arena(call.scratch + id * call.scratch_each);
    const Tables<Cell, T> tables(call.R, count, arena);
    const auto [of, now, shares] = tables;
    for (int r = 0; r < call.R; ++r) of[r] = shared.take(r);
    int turns = 0;
    Place place{};
    for (; next_place<Cell>(call, id, count, turns, panels, &place); ++turns) {
      new (shares + turns) BackwardShare<Cell, T>(call, place, arena);
      shares[turns].pack(of[place.recurrence].dunit);
    }
    Gradients<Cell, T> gradients(call, arena);
    Slot* all = call.slots + index(call.R) * call.threads * call.threads;

    for (index k = 0, turn = 0; k < in.steps || k == 0; ++turn) {
      // the same steps counted from either end: of each recurrence its own window
      index end = in.steps;
      for (int r = 0; r < call.R; ++r) {
        now[r] = &of[r].window[turn % 2];
        const index last = shared.window_end(call.recurrence[r].reverse, k);
        if (last < end) end = last;
      }
      for (int r = 0; r < call.R; ++r) shared.set(call.recurrence[r].reverse, k, end, now[r]);
      for (int s = 0; s < turns; ++s)
        shares[s].run(k, end, *now[shares[s].place.recurrence]);
      if (count > 1) meet(all, id, count);
      for (int r = 0; r < call.R; ++r) {
        if (call.dx) gradients.dx(r, *now[r], id, count);
        if (call.weights)
          gradients.weights(r, *now[r], of[r].sums, k == 0, end >= in.steps, id, count);
        // of two directions, each adds to rows that the other wrote
        if (call.dx && count > 1 && r + 1 < call.R) meet(all, id, count);
      }
      if (count > 1) meet(all, id, count);
      k = end;
      if (in.steps == 0) break;
    }
    if (Cell::HAS_UNIT && call.weights && id == 0)
      for (int r = 0; r < call.R; ++r) {  // one accumulator a share of rows, summed in their order
        const int each = count / call.R > 1 ? count / call.R : 1;
        next_place<Cell>(call, each == 1 ? r % count : r * each, count, each == 1 ? r / count : 0,
                         panels, &place);
        T* out = const_cast<T*>(call.gradients[r].out.unit);
        for (index u = 0; u < in.H; ++u) out[u] = 0;
        for (int part = 0; part < place.parts; ++part)
          for (index u = 0; u < in.H; ++u) out[u] += of[r].dunit[(2 * part + 1) * in.H + u];
      }
  });
}

// ------------------------------------------------------------------------------- for the tests

template <class T>
void vocabulary(int name, const T* x, T* y, int64_t n) {
  for (index i = 0; i < n; i += LANES<T>) {
    const int m = n - i < LANES<T> ? static_cast<int>(n - i) : LANES<T>;
    const Vec<T> v = load_part(x + i, m);
    Vec<T> out = v;
    switch (name) {
      case 0: out = exp(v); break;
      case 1: out = sigmoid(v); break;
      case 2: out = tanh(v); break;
      case 3: out = relu(v); break;
      case 4: out = dsigmoid(v); break;
      case 5: out = dtanh(v); break;
      case 6: out = drelu(v); break;
    }
    store_part(y + i, out, m);
  }
}

template <class T>
constexpr Kernels<T> kernels() {
  return {forward_scratch<T>, forward<T>,    pack<T>,    backward_scratch<T>,
          backward<T>,        vocabulary<T>, in_pairs<T>};
}

static bool runs_here() {
#if defined(__x86_64__) && defined(__AVX512F__)
#if defined(__AVX512BF16__)
  if (!__builtin_cpu_supports("avx512bf16")) return false;
#endif
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#elif defined(__x86_64__) && defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

#define FASTSEQ_STRING(name) #name
#define FASTSEQ_NAME(name) FASTSEQ_STRING(name)
extern const InstructionSet instruction_set;
const InstructionSet instruction_set = {FASTSEQ_NAME(FASTSEQ_ISA), FASTSEQ_VECTOR_BYTES, runs_here,
                                        kernels<float>(), kernels<double>()};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

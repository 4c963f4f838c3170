// The kernels of one instruction set. Compiled once for each, with FASTSEQ_ISA its name and the
// compiler's options to match.
#include <new>
#include <type_traits>

#include "vocabulary.h"
//
#include "../cells/generated.h"
#ifdef FASTSEQ_TRIAL
#include "../trial.h"
#endif
#include "attention.h"
#include "chains_backward.h"
#include "draw.h"
#include "forward.h"
#include "gradients.h"
#include "viterbi.h"

namespace fastseq {
namespace FASTSEQ_ISA {

// Calls `function` with the struct of a cell.
template <class Function>
FASTSEQ_INLINE auto with_cell(fastseq::Cell cell, Function function) {
  switch (cell) {
#define FASTSEQ_CASE(name, type) \
  case name: return function(type{});
    FASTSEQ_CELLS(FASTSEQ_CASE)
#undef FASTSEQ_CASE
#ifdef FASTSEQ_TRIAL
    case TRIAL: return function(Trial{});
#endif
    default: __builtin_unreachable();
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
      // so many steps from either end: each recurrence has a window of its own
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
        // each recurrence adds to rows that the one before wrote
        if (call.dx && count > 1 && r + 1 < call.R) meet(all, id, count);
      }
      if (count > 1) meet(all, id, count);
      k = end;
      if (in.steps == 0) break;
    }
    if (Cell::U && call.weights && id == 0)
      for (int r = 0; r < call.R; ++r) {  // one accumulator a share of rows, summed in their order
        const int each = count / call.R > 1 ? count / call.R : 1;
        next_place<Cell>(call, each == 1 ? r % count : r * each, count, each == 1 ? r / count : 0,
                         panels, &place);
        for (int k = 0; k < Cell::U; ++k) {
          T* out = const_cast<T*>(call.gradients[r].out.unit[k]);
          for (index u = 0; u < in.H; ++u) out[u] = 0;
          for (int part = 0; part < place.parts; ++part) {
            const T* sum = of[r].dunit + (LEVELS * (part * Cell::U + k) + LEVELS - 1) * in.H;
            for (index u = 0; u < in.H; ++u) out[u] += sum[u];
          }
        }
      }
  });
}

template <class T>
void chains_scratch(const ChainCall<T>& call, int, size_t* each, size_t* shared) {
  Arena arena(nullptr), common(nullptr);
  switch (call.what) {
    case Chains::FORWARD: ChainsForward<T>(call, arena); break;
    case Chains::VITERBI: Viterbi<T>(call, arena); break;
    case Chains::BACKWARD:
      ChainsBackward<T>(call, arena);
      for (index k = 0; call.dtransitions && k < ChainsBackward<T>::groups(call); ++k)
        ChainsBackward<T>::group(call, common);
  }
  *each = arena.used(), *shared = common.used();
}

template <class T>
void chains(const ChainCall<T>& call, int id, int count) {
  Arena arena(call.scratch + id * call.scratch_each);
  switch (call.what) {
    case Chains::FORWARD: return ChainsForward<T>(call, arena).run();
    case Chains::VITERBI: return Viterbi<T>(call, arena).run();
    case Chains::BACKWARD: return ChainsBackward<T>(call, arena).run(id, count);
  }
}

// ------------------------------------------------------------------------------- for the tests

template <class T>
void vocabulary(int name, const T* x, T* y, int64_t n) {
  for (index i = 0; i < n; i += LANES<T>) {
    const int m = n - i < LANES<T> ? static_cast<int>(n - i) : LANES<T>;
    const Vec<T> v = load_part(x + i, m);
    const Vec<T> other = load_part(y + i, m);  // what a word of two values takes besides
    Vec<T> out = v;
    switch (name) {
      case 0: out = exp(v); break;
      case 1: out = sigmoid(v); break;
      case 2: out = tanh(v); break;
      case 3: out = relu(v); break;
      case 4: out = dsigmoid(v); break;
      case 5: out = dtanh(v); break;
      case 6: out = drelu(v); break;
      case 7: out = reciprocal(v); break;
      case 8: out = logsigmoid(v); break;
      case 9: out = sqrt(v); break;
      case 10: out = dlogsigmoid(v); break;
      case 11: out = dsqrt(v); break;
      case 12: out = maximum(v, other); break;
      case 13: out = dmaximum(v, other); break;
      case 14: out = log(v); break;
    }
    store_part(y + i, out, m);
  }
}

template <class T>
constexpr Kernels<T> kernels() {
  return {forward_scratch<T>, forward<T>,    pack<T>,    backward_scratch<T>,
          backward<T>,        vocabulary<T>, in_pairs<T>, attend<T>,
          attend_backward<T>, chains_scratch<T>, chains<T>};
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
                                        kernels<float>(), kernels<double>(), draw_masks};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

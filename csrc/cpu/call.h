// What a call of a kernel is made of: raw pointers, sizes, and who shares the work. No torch.
//
// Letters: T steps, B batch, N rows (sequences at steps) of the input, I input size, H hidden units,
// P size of h (H, or what it is projected to), R recurrences over the same input. Rows are
// time-major; `sizes` and `offsets` are null where all B sequences are alive at every step.
// Offsets count elements, in 64 bits. Nothing is written but what is named an output.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../cells/list.h"
#include "asan.h"

namespace fastseq {

enum Cell : int {
#define FASTSEQ_NUMBER(name, type) name,
  FASTSEQ_CELLS(FASTSEQ_NUMBER)
#undef FASTSEQ_NUMBER
  CELLS,
  TRIAL = CELLS  // of trial.h, in driver.cpp alone
};

// A cell has any number, up to MOST_EACH, of unit parameters, of states beside h, and of extras (values
// kept for backward beside the gates). Its header says how many; pointers beyond that are null.
constexpr int MOST_EACH = 4;

// The weights of one recurrence, each contiguous; null where there is none.
template <class T>
struct Weights {
  const T* w_ih;  // (G*H, I)
  const T* w_hh;  // (G_hh*H, P)
  const T* b_ih;  // (G*H)
  const T* b_hh;  // (G_hh*H)
  const T* w_hr;  // (P, H)
  const T* unit[MOST_EACH];  // (H) each
};

// What forward has and leaves for one recurrence.
template <class T>
struct Recurrence {
  Weights<T> weights;
  bool reverse;
  const T* h_0;          // (B, P), null: zeros
  const T* c_0[MOST_EACH];    // (B, H) each, null: zeros
  const uint8_t* reset;  // (N), null: nowhere
  const T* h_mask;       // (B, P), null: none
  // Zoneout, of h and each other state: where it stays as it was before the step, (N, P) or (N, H),
  // null: nowhere; or the part of it that stays.
  const uint8_t* stay[1 + MOST_EACH];
  T part[1 + MOST_EACH];
  const T* packed;       // the weights as `pack` left them, null: pack them in the call
  T* h_n;                // (B, P), output
  T* c_n[MOST_EACH];          // (B, H) each, output; carries c
  T* gates;              // (N, G*H), output if not null: what backward wants
  T* extra[MOST_EACH];        // (N, H) each, output if not null
  T* m;                  // (N, H), output if not null: h before its projection, and before zoneout
  T* made[MOST_EACH];    // (N, H) each, output if not null: c before zoneout

  bool zones(int state) const { return stay[state] || part[state] != 0; }
};

template <class T>
struct Input {
  int64_t steps, batch, rows, I, H, P;
  const int64_t* sizes;
  const int64_t* offsets;
  const T* x;  // row (t, b) at t * x_step + b * x_row; packed: row n at n * x_row
  int64_t x_step, x_row;

  int64_t alive(int64_t t) const { return sizes ? sizes[t] : batch; }
  int64_t base(int64_t t) const { return offsets ? offsets[t] : t * batch; }
  const T* at(int64_t t, int64_t b) const {
    return offsets ? x + (offsets[t] + b) * x_row : x + t * x_step + b * x_row;
  }
};

// How the threads of a call share one recurrence: rows x units of them. `units` threads meet at
// every step.
struct Plan {
  int rows, units;
};

// threads: those that one recurrence may have. blocks: smallest shares of hidden units there are; 1
// where a step wants all units at once. flops: of one row's step. bytes: of the weights that a step
// reads.
Plan make_plan(int threads, int64_t batch, int64_t blocks, double flops, double bytes);

// Where threads meet: a slot for each, all zero at first. A thread waits until all others have come
// as often as itself. It spins for a while, since they are busy on other cores, then lets others run.
struct alignas(64) Slot {
  std::atomic<uint32_t> epoch;
};
void pause(int spins);

inline __attribute__((always_inline)) void meet(Slot* slots, int id, int count) {
  const uint32_t here = slots[id].epoch.load(std::memory_order_relaxed) + 1;
  slots[id].epoch.store(here, std::memory_order_release);
  for (int other = 0; other < count; ++other) {
    int spins = 0;
    while (static_cast<int32_t>(slots[other].epoch.load(std::memory_order_acquire) - here) < 0)
      pause(++spins);
  }
}

// Hands out pieces of one block of memory; with no block it only counts. Threads that take the same
// pieces of the same block are told of the same borders.
class Arena {
 public:
  static constexpr int64_t BETWEEN = 64 + RED_ZONE;  // bytes that a piece may take beside its own

  explicit Arena(void* block) : block_(static_cast<char*>(block)) {}
  template <class T>
  __attribute__((always_inline)) T* take(int64_t count) {  // no two instruction sets may share it
    const size_t size = static_cast<size_t>(count > 0 ? count : 0) * sizeof(T);
    const size_t room = (size + 63) / 64 * 64 + RED_ZONE;
    char* piece = block_ ? block_ + used_ : nullptr;
    used_ += room;
    if (piece) allow(piece, size), forbid(piece + size, room - size);
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
  char* block_;
  size_t used_ = 0;
};

template <class T>
struct ForwardCall {
  using Element = T;
  Cell cell;
  int R;
  Input<T> input;
  Recurrence<T>* recurrence;  // R of them
  T* y;                       // (N, R*P), output
  const T* known;             // y as it was, (N, R*P): the gates alone are made again; or null
  T* c_all[MOST_EACH];             // (N, R*H) each, output if not null
  bool pack;                  // false: so few rows that the weights are read as they are
  bool bf16;                  // products of numbers rounded to bfloat16, where there is a dot product
  bool halves;                // w_ih, w_hh and w_hr are bfloat16; only where `in_pairs` says so
  int threads;
  char* scratch;              // scratch_each bytes for each thread
  size_t scratch_each, scratch_shared;
  Slot* slots;                // (R * threads, threads): for each recurrence and share of rows
};

// The gradients of one recurrence.
template <class T>
struct RecurrenceGradients {
  T* dh;           // (B, P): gradient of h_n, becomes that of h_0
  T* dc[MOST_EACH];     // (B, H) each
  Weights<T> out;  // gradients of the weights; const cast away. Null where not wanted.
};

template <class T>
struct BackwardCall {
  using Element = T;
  Cell cell;
  int R;
  Input<T> input;
  const Recurrence<T>* recurrence;
  RecurrenceGradients<T>* gradients;
  const T* y;             // (N, R*P)
  const T* c_all[MOST_EACH];   // (N, R*H) each
  const T* dy;            // (N, R*P), or null
  const T* dc_all[MOST_EACH];  // (N, R*H) each, or null
  T* dx;                  // (N, I), output if not null
  bool weights;           // whether the gradients of weights are wanted
  bool states;            // whether those of h_0 and c_0 are; else dh and dc hold anything
  bool bf16;              // as in forward
  bool halves;
  int threads;
  char* scratch;    // scratch_each bytes for each thread, and scratch_shared behind them
  size_t scratch_each, scratch_shared;
  Slot* slots;      // (R * threads + 1, threads): the last row for all
};

// Masks of rows at sites (draw.h): whether the word of a unit is at least `threshold`, up to 2^32.
struct DrawCall {
  uint32_t key[2];
  int64_t sites, rows, units;
  const int64_t* site;   // (sites), 16 bits each
  const int64_t *ids, *steps;  // (rows); steps null: zeros
  uint64_t threshold;
  uint8_t* out;          // (sites, rows, units)
  int threads;
};

// Attention of U queries a sequence over S keys of A numbers and values of V (attention.h). In backward
// context and weights are read: the former is its own gradient.
template <class T>
struct AttentionCall {
  int64_t B, U, S, A, V;
  const T *queries, *keys, *values;  // (B, U, A), (B, S, A), (B, S, V)
  const T* v;                        // (A), or null: the score is a dot product
  const uint8_t* mask;               // (B, S), or null
  T scale;
  T* weights;                        // (B, U, S)
  T* context;                        // (B, U, V), rows context_row apart
  int64_t context_row;
  const T* dweights;                 // (B, U, S), or null
  T* dqueries;                       // (B, U, A), output
  T *dkeys, *dv;                     // (B, S, A) and (B, A), which are added to
  T* dscores;                        // (B, U, S), scratch
  int threads;
};

// Linear-chain conditional random fields (crf.h, viterbi.h), of K tags. fastseq/backends/crf has the
// equations.
enum class Chains { FORWARD, BACKWARD, VITERBI };

template <class T>
struct ChainCall {
  static constexpr int R = 0;  // threads meet all together alone
  Chains what;
  int64_t steps, batch, K;
  const T* emissions;         // those of step t of sequence b at t * e_step + b * e_row
  int64_t e_step, e_row;
  const int64_t* lengths;     // (B), null: all are T
  const int64_t* order;       // (B): the sequences, the longest first
  const T *start, *end;       // (K)
  const T* transitions;       // (K, K)
  const int64_t* tags;        // as emissions, or null
  int64_t tags_step, tags_row;
  T* value;                   // (B), output of FORWARD
  T* u;                       // (T, B, K), its output if not null, and BACKWARD's input
  const T* dvalue;            // (B), dvalue_row apart
  int64_t dvalue_row;
  T* demissions;              // (T, B, K), output of BACKWARD
  T *dstart, *dend, *dtransitions;  // likewise, or null
  int64_t n;                  // how many paths VITERBI finds
  T* scores;                  // (B, n), its output
  int64_t* paths;             // (B, n, T)
  std::atomic<int64_t>* next; // of what threads take one by one; 0 at first
  int threads;
  char* scratch;              // as BackwardCall's
  size_t scratch_each, scratch_shared;
  Slot* slots;

  int64_t length(int64_t b) const { return lengths ? lengths[b] : steps; }
  const T* emission(int64_t t, int64_t b) const { return emissions + t * e_step + b * e_row; }
  int64_t tag(int64_t t, int64_t b) const { return tags[t * tags_step + b * tags_row]; }
};

// What the kernels of one instruction set offer. `id` of `count` threads; scratch: bytes for each
// thread, and bytes for all.
template <class T>
struct Kernels {
  void (*forward_scratch)(const ForwardCall<T>&, int threads, size_t* each, size_t* shared);
  void (*forward)(const ForwardCall<T>&, int id, int count);
  // Packs the weights of recurrence r for calls to come, into so many bytes; with null counts them.
  size_t (*pack)(const ForwardCall<T>&, int r, void* out);
  void (*backward_scratch)(const BackwardCall<T>&, int threads, size_t* each, size_t* shared);
  void (*backward)(const BackwardCall<T>&, int id, int count);
  void (*vocabulary)(int name, const T* x, T* y, int64_t n);
  bool (*in_pairs)(const Input<T>&);  // whether products in bfloat16 are made as such
  void (*attend)(const AttentionCall<T>&, int id, int count);
  void (*attend_backward)(const AttentionCall<T>&, int id, int count);
  void (*chains_scratch)(const ChainCall<T>&, int threads, size_t* each, size_t* shared);
  void (*chains)(const ChainCall<T>&, int id, int count);
};

struct InstructionSet {
  const char* name;
  int vector_bytes;
  bool (*runs_here)();
  Kernels<float> f32;
  Kernels<double> f64;
  void (*draw)(const DrawCall&, int id, int count);
};

extern const InstructionSet* const instruction_sets[];  // the best first; null ends them

}  // namespace fastseq

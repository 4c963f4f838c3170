#include "run.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastseq {

#if defined(__x86_64__)
namespace avx512_bf16 {  // not linked where the compiler does not know it
extern const InstructionSet instruction_set __attribute__((weak));
const InstructionSet instruction_set = {"avx512_bf16", 0, [] { return false; }, {}, {}, nullptr};
}
namespace avx512 {
extern const InstructionSet instruction_set;
}
namespace avx2 {
extern const InstructionSet instruction_set;
}
#endif
namespace base {
extern const InstructionSet instruction_set;
}

const InstructionSet* const instruction_sets[] = {
#if defined(__x86_64__)
    &avx512_bf16::instruction_set, &avx512::instruction_set, &avx2::instruction_set,
#endif
    &base::instruction_set, nullptr};

Pool pool;

static const InstructionSet* chosen = nullptr;

const InstructionSet& instruction_set() {
  if (!chosen)
    for (const InstructionSet* const* set = instruction_sets; *set && !chosen; ++set)
      if ((*set)->runs_here()) chosen = *set;
  return *chosen;
}

bool use_instruction_set(const char* name) {
  for (const InstructionSet* const* set = instruction_sets; *set; ++set)
    if (!strcmp((*set)->name, name) && (*set)->runs_here()) {
      chosen = *set;
      return true;
    }
  return false;
}

void pause(int spins) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
  if (spins > 4000) sched_yield();
}

int useful_threads(int threads, double flops) {
  const double share = 2.5e6;  // about 20 us of work: a thread that is awake takes 2 us to start
  const double most = flops / share;
  if (threads < 2 || most < 2) return 1;
  if (most < threads) threads = static_cast<int>(most);
  if (pool.quota > 0 && pool.quota < threads) threads = pool.quota;
  // asked at each call that is shared, 0.1 us: the affinity of a running process may change
  const int cores = pool.num_procs ? pool.num_procs() : threads;
  return cores < threads ? cores : threads;
}

Plan make_plan(int threads, int64_t batch, int64_t blocks, double flops, double bytes) {
  const int rows = static_cast<int>(batch < threads ? batch : threads);
  const int units = static_cast<int>(blocks < threads ? blocks : threads);
  const double step = flops * static_cast<double>(batch) / threads;
  // a meeting costs about as much as 60,000 operations
  const bool pays = units > 1 && step > 3e4;
  // Sharing rows, every thread reads all weights: up to three rows each, that takes longer than the
  // products; and weights that do not fit into its cache, whatever the rows.
  const bool reads = batch <= 3 * threads && bytes > 3e4 * threads;
  if (pays && (rows < threads || reads || bytes > 1.5e6)) return {1, units};
  return {rows > 0 ? rows : 1, 1};
}

namespace {

// Memory that a thread keeps from call to call, since fresh pages cost more than many a call.
class Scratch {
 public:
  static constexpr size_t KEPT = size_t(64) << 20, LARGE = size_t(2) << 20;
  ~Scratch() { free(block_); }
  char* at_least(size_t size) {
    if (size > size_) {
      free(block_);
      block_ = nullptr, size_ = 0;
      const bool large = size >= 2 * LARGE;
      if (posix_memalign(reinterpret_cast<void**>(&block_), large ? LARGE : 64, size))
        return block_ = nullptr;
#if defined(__linux__)
      if (large) madvise(block_, size / LARGE * LARGE, MADV_HUGEPAGE);  // its first touch costs less
#endif
      size_ = size;
    }
    return block_;
  }
  void trim() {
    if (size_ <= KEPT) return;
    free(block_);
    block_ = nullptr, size_ = 0;
  }

 private:
  char* block_ = nullptr;
  size_t size_ = 0;
};
thread_local Scratch scratch;

template <class Call>
struct Region {
  const Call* call;
  void (*kernel)(const Call&, int, int);
  static void enter(void* data) {
    const Region& region = *static_cast<Region*>(data);
    const int count = pool.num_threads(), id = pool.thread_num();
    if (count == region.call->threads)
      region.kernel(*region.call, id, count);
    else if (id == 0)  // fewer than asked for, as within another parallel region
      region.kernel(*region.call, 0, 1);
  }
};

template <class Call>
bool run_call(Call& call, int threads, void (*size)(const Call&, int, size_t*, size_t*),
              void (*kernel)(const Call&, int, int)) {
  if (!pool.parallel) threads = 1;
  call.threads = threads;
  size_t each = 0, shared = 0, alone = 0, alone_shared = 0;
  size(call, threads, &each, &shared);
  if (threads > 1) {  // room for one thread that has to do it all, too
    size(call, 1, &alone, &alone_shared);
    if (each * threads < alone) each = (alone + threads - 1) / threads;
    if (shared < alone_shared) shared = alone_shared;
  }
  each = (each + 63) / 64 * 64, shared = (shared + 63) / 64 * 64;
  const size_t slots = (static_cast<size_t>(call.R) * threads + 1) * threads * sizeof(Slot);
  char* block = scratch.at_least(each * threads + shared + (threads > 1 ? slots : 0));
  if (!block) return false;
  call.scratch = block, call.scratch_each = each, call.scratch_shared = shared;
  call.slots = reinterpret_cast<Slot*>(block + each * threads + shared);
  forbid(block, each * threads + shared);  // but what an Arena hands out
  if (threads > 1) {
    memset(static_cast<void*>(call.slots), 0, slots);
    Region<Call> region{&call, kernel};
    pool.parallel(Region<Call>::enter, &region, threads, 0);
  } else {
    kernel(call, 0, 1);
  }
  allow(block, each * threads + shared);
  scratch.trim();
  return true;
}

const Kernels<float>& kernels(float) { return instruction_set().f32; }
const Kernels<double>& kernels(double) { return instruction_set().f64; }

}  // namespace

template <class T>
bool run(ForwardCall<T>& call, int threads) {
  const Kernels<T>& k = kernels(T());
  return run_call(call, threads, k.forward_scratch, k.forward);
}
template <class T>
bool run(BackwardCall<T>& call, int threads) {
  const Kernels<T>& k = kernels(T());
  return run_call(call, threads, k.backward_scratch, k.backward);
}
template <class T>
bool run(ChainCall<T>& call, int threads) {
  const Kernels<T>& k = kernels(T());
  std::atomic<int64_t> next{0};
  call.next = &next;
  return run_call(call, threads, k.chains_scratch, k.chains);
}
void run(DrawCall& call, int threads) {
  call.threads = pool.parallel ? threads : 1;
  Region<DrawCall> region{&call, instruction_set().draw};
  if (call.threads > 1)
    pool.parallel(Region<DrawCall>::enter, &region, call.threads, 0);
  else
    region.kernel(call, 0, 1);
}
template bool run(ForwardCall<float>&, int);
template bool run(ForwardCall<double>&, int);
template bool run(BackwardCall<float>&, int);
template bool run(BackwardCall<double>&, int);
template bool run(ChainCall<float>&, int);
template bool run(ChainCall<double>&, int);

}  // namespace fastseq

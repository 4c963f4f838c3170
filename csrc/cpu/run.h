// Runs a call on threads: the instruction set, scratch memory, and torch's pool.
#pragma once
#include "call.h"

namespace fastseq {

// GOMP_parallel, omp_get_thread_num, omp_get_num_threads and omp_get_num_procs of the OpenMP runtime
// whose threads are to be used; without them every call runs on its caller's thread alone.
struct Pool {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*num_procs)() = nullptr;  // null: as many as there are threads
  int quota = 0;  // how many processors' time the process may use; 0: any number's
};
extern Pool pool;

const InstructionSet& instruction_set();
bool use_instruction_set(const char* name);  // for tests; false if this machine cannot run it

// How many of `threads` a call of so many floating-point operations is worth: never more than there are
// cores for them. Threads that meet at every step and take turns on a core wait for each other most of
// the time: on 2 cores 16 threads took 77 ms for an LSTM of T100 B1 H256 that 2 threads run in 1.0.
int useful_threads(int threads, double flops);

// Fills in threads, scratch and slots, and runs. false: out of memory, and nothing was written.
template <class T>
bool run(ForwardCall<T>& call, int threads);
template <class T>
bool run(BackwardCall<T>& call, int threads);
template <class T>
bool run(ChainCall<T>& call, int threads);
void run(DrawCall& call, int threads);

}  // namespace fastseq

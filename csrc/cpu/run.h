// Runs a call on threads: the instruction set, scratch memory, and torch's pool.
#pragma once
#include "call.h"

namespace fastseq {

// GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the OpenMP runtime whose threads are
// to be used; without them every call runs on its caller's thread alone.
struct Pool {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
};
extern Pool pool;

const InstructionSet& instruction_set();
bool use_instruction_set(const char* name);  // for tests; false if this machine cannot run it

// How many threads a call of so many floating-point operations is worth.
int useful_threads(int threads, double flops);

// Fills in threads, scratch and slots, and runs. false: out of memory, and nothing was written.
template <class T>
bool run(ForwardCall<T>& call, int threads);
template <class T>
bool run(BackwardCall<T>& call, int threads);

}  // namespace fastseq

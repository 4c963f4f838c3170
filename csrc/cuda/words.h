// The words in which the kernels speak. nvcc gives them their meaning on a GPU, in this file; any
// other compiler one on the host, in words_host.h, where a thread is a thread, so that sanitizers
// watch them.
//
//   KERNEL(name, threads, ctas) { ... }   a kernel of `const Arguments& a`, and how many CTAs of it
//                                         shall fit on a multiprocessor
//   thread(), tile_x(), tile_y(), tile_z()        where it is: in its CTA, and the CTA in the grid
//   tiles_z()                             how many CTAs the grid has that way
//   thread_again()                        thread(), so that what is computed from it takes no register
//                                         until then; and tile_x_again(), tile_y_again()
//   kept(v)                               v, an integer or a place in shared(), which stays in a register
//                                         and is not made again where it is used (of all lanes of a
//                                         warp at once)
//   shared()                              the CTA's memory, aligned to 128 bytes
//   meet()                                a barrier of all threads of the CTA
//   meet_pair(n)                          of the two warps 2 n and 2 n + 1, n < 15
//   copy<N>(to, from)                     N = 4, 8, 16 aligned bytes into shared memory, some time
//   close()                               what was copied since is one group of this thread's
//   arrived<N>()                          all of this thread's groups but the last N are there; for
//                                         other threads they are there behind the next meet()
//   quotient(a, m)                        the upper half of a m: where m = 2^32 / b, rounded up, a / b for
//                                         a b < 2^32
//   neighbour(v, mask)                    v of the lane that differs in mask (of all lanes at once)
//   mma(d, a, b0, b1, Type)               d += a b on tensor cores, of all lanes of a warp at once
//   load<V>(p), store<V>(p, v)            a vector of bytes at an aligned place
//   meet_warp()                           of the lanes of a warp, for what they store and load
//
// CTAs that share a recurrence hand numbers to each other in two ways. Within a cluster, by pushing
// into each other's shared memory:
//
//   rank(), ranks()                       which CTA of its cluster, and how many it has
//   meet_cluster()                        a barrier of all threads of the cluster
//   Box                                   of shared memory: counts the bytes that are pushed
//   open(box)                             makes it, by one thread, before meet_cluster(); its phases
//                                         have the parities 0, 1, 0, ...
//   expect(box, bytes)                    by one thread, once a phase: it ends when they have come
//   has_come(box, parity)                 whether the phase of that parity has ended: what was pushed
//                                         is there then; may wait a little for it
//   push(to, box, rank, w)                16 bytes to that CTA of the cluster, which counts them; `to`
//                                         and `box` are where this CTA has the same
//
// And across the grid, all of which is on the GPU at once, through packets in global memory:
//
//   load_packet(p), store_packet(p, w)    16 bytes as one, which no other CTA sees in part
//   look_again()                          between two looks at what has not come yet
//
//   tell(place, code)                     into the host's memory, that something went wrong
//   mark(place), is_marked(place)         a number of shared memory that any thread may write and
//                                         read at any time: it is not 0
#pragma once
#include <stdint.h>

#include "arguments.h"

#define FASTSEQ_ISA cuda
// Of what the compiler computes itself, wherever it is used.
#ifdef __CUDACC__
#define CONSTANT __host__ __device__ constexpr
#else
#define CONSTANT constexpr
#endif

namespace fastseq {
namespace FASTSEQ_ISA {

// Four words of 32 bits, which are loaded and stored as one.
struct alignas(16) Words4 {
  uint32_t w[4];
};

// Numbers of 16 bits as memory holds them.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
// What counts the bytes that are pushed into a CTA.
struct alignas(8) Box {
  uint64_t state;
};
// Two neighbours, which are loaded and stored as one.
template <class Number>
struct alignas(2 * sizeof(Number)) Two {
  Number first, second;
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

#ifndef __CUDACC__
#include "words_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEVICE __device__ __forceinline__
#define FASTSEQ_INLINE DEVICE
#define KERNEL(name, threads, ctas) \
  extern "C" __global__ void __launch_bounds__(threads, ctas) \
      name(const __grid_constant__ fastseq::Arguments a)

namespace fastseq {
namespace FASTSEQ_ISA {

DEVICE int thread() { return threadIdx.x; }
DEVICE int thread_again() {
  int found;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(found));
  return found;
}
DEVICE int tile_x_again() {
  int found;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(found));
  return found;
}
DEVICE int tile_y_again() {
  int found;
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(found));
  return found;
}
DEVICE int tile_x() { return blockIdx.x; }
DEVICE int tile_y() { return blockIdx.y; }
DEVICE int tile_z() { return blockIdx.z; }
DEVICE int tiles_z() { return gridDim.z; }

extern __shared__ __align__(128) unsigned char cta_memory[];
DEVICE unsigned char* shared() { return cta_memory; }

// From a lane to itself: neither compiler nor assembler sees what it is, or can do it twice.
DEVICE int kept(int v) { return __shfl_sync(0xffffffffu, v, thread() & 31); }
DEVICE int64_t kept(int64_t v) { return __shfl_sync(0xffffffffu, v, thread() & 31); }
template <class T>
DEVICE T* kept(T* p) {
  const int place = kept(int(__cvta_generic_to_shared(p)));
  return static_cast<T*>(__cvta_shared_to_generic(unsigned(place)));  // known to be in shared memory
}
DEVICE void meet() { __syncthreads(); }
DEVICE void meet_pair(int n) { asm volatile("bar.sync %0, 64;" ::"r"(n + 1) : "memory"); }

template <int N>
DEVICE void copy(void* to, const void* from) {
  const uint32_t place = uint32_t(__cvta_generic_to_shared(to));
  if constexpr (N == 16) {  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(place), "l"(from), "n"(N)
                 : "memory");
  }
}
DEVICE void close() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void arrived() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

DEVICE uint32_t quotient(uint32_t a, uint32_t m) { return __umulhi(a, m); }
DEVICE float neighbour(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

#define FASTSEQ_MMA(shape, types) \
  asm("mma.sync.aligned." shape ".row.col." types \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Bf16) {
  FASTSEQ_MMA("m16n8k16", "f32.bf16.bf16.f32");
}
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F16) {
  FASTSEQ_MMA("m16n8k16", "f32.f16.f16.f32");
}
// float: of numbers of TF32
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
  FASTSEQ_MMA("m16n8k8", "f32.tf32.tf32.f32");
}
#undef FASTSEQ_MMA

template <class V>
DEVICE V load(const void* p) {
  return *static_cast<const V*>(p);
}
template <class V>
DEVICE void store(void* p, V v) {
  *static_cast<V*>(p) = v;
}

DEVICE void meet_warp() { __syncwarp(); }

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Before sm_90 there are no clusters: kernels that ask for them are empty there, and never launched.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool HAS_CLUSTERS = true;
DEVICE int rank() {
  uint32_t found;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(found));
  return int(found);
}
DEVICE int ranks() {
  uint32_t found;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(found));
  return int(found);
}
DEVICE void meet_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
DEVICE void open(Box* box) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(box)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void expect(Box* box, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(box)),
               "r"(bytes)
               : "memory");
}
DEVICE bool has_come(Box* box, int parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(box)), "r"(parity)
      : "memory");
  return done != 0;
}
DEVICE uint32_t address_at(const void* p, int rank) {
  uint32_t found;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(shared_address(p)), "r"(rank));
  return found;
}
DEVICE void push(void* to, Box* box, int rank, Words4 v) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address_at(to, rank)),
      "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]), "r"(address_at(box, rank))
      : "memory");
}
#else
constexpr bool HAS_CLUSTERS = false;
DEVICE int rank() { return 0; }
DEVICE int ranks() { return 1; }
DEVICE void meet_cluster() {}
DEVICE void open(Box*) {}
DEVICE void expect(Box*, int) {}
DEVICE bool has_come(Box*, int) { return true; }
DEVICE void push(void*, Box*, int, Words4) {}
#endif

DEVICE Words4 load_packet(const void* p) {
  Words4 v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p)
               : "memory");
  return v;
}
DEVICE void store_packet(void* p, Words4 v) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]),
               "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}
DEVICE void look_again() {}
DEVICE void tell(int32_t* place, int32_t code) {
  asm volatile("st.relaxed.sys.global.b32 [%0], %1;" ::"l"(place), "r"(code) : "memory");
}
DEVICE void mark(int32_t* place) { *static_cast<volatile int32_t*>(place) = 1; }
DEVICE bool is_marked(const int32_t* place) {
  return *static_cast<const volatile int32_t*>(place) != 0;
}

DEVICE float bits_to_float(uint32_t w) { return __uint_as_float(w); }
DEVICE uint32_t float_to_bits(float v) { return __float_as_uint(v); }

DEVICE float widen(float v) { return v; }
DEVICE float widen(Bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
DEVICE float widen(F16 v) { return __half2float(__ushort_as_half(v.bits)); }

template <class Number>
DEVICE Number narrow(float v);
template <>
DEVICE float narrow<float>(float v) {
  return v;
}
template <>
DEVICE Bf16 narrow<Bf16>(float v) {
  return {__bfloat16_as_ushort(__floats2bfloat162_rn(v, 0.0f).x)};  // of two: a faster instruction
}
template <>
DEVICE F16 narrow<F16>(float v) {
  return {__half_as_ushort(__floats2half2_rn(v, 0.0f).x)};
}

// To the nearest number of TF32, which is a float32 whose last 13 bits are 0.
DEVICE float round_tf32(float v) {
  uint32_t w;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(w) : "f"(v));
  return __uint_as_float(w);
}

// The quick ones: 2^x and 1 / x to 2 ULP, what is denormal as 0. The exact ones are right to 2 ULP.
DEVICE float quick_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float quick_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float exact_exp(float x) { return expf(x); }
DEVICE float exact_ratio(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float exact_tanh(float x) { return tanhf(x); }
DEVICE float exact_log1p(float x) { return log1pf(x); }
DEVICE float exact_expm1(float x) { return expm1f(x); }
DEVICE float exact_sqrt(float x) { return __fsqrt_rn(x); }
DEVICE float magnitude(float x) { return fabsf(x); }
DEVICE float with_sign(float x, float of) { return copysignf(x, of); }
// no contraction: a sum whose error is wanted
DEVICE float sum(float a, float b) { return __fadd_rn(a, b); }

}  // namespace FASTSEQ_ISA
}  // namespace fastseq
#endif

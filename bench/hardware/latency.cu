// What the parts of a recurrence cost on this GPU, each alone: a meeting of CTAs, a vector handed from
// CTA to CTA, a launch, a product. A fused time step can be no faster than the sum of the parts that
// it needs, so these are the floors that a kernel is judged by.
//
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a bench/hardware/latency.cu -o latency
//   ./latency            a line of CSV for each figure: name, CTAs, bytes, ns (median), least ns
//
// A step of `cluster-push` and of `grid-packets` is what a recurrence's step does with h: each CTA gives
// its slice to all the others and waits for theirs. In one of `cluster-scatter` and `grid-scatter` it
// gives each of them a piece of its own, and adds up what it is given, as a step backward does with
// sums. The number behind `-ahead` and `grid-scatter` is how many packets a thread asks for before it
// looks at any. Waits give up after a second, so nothing hangs.

#include <algorithm>
#include <cooperative_groups.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <vector>

namespace {

__device__ unsigned torn_packets;  // packets whose epoch came before the rest of them

constexpr int kSteps = 2000;
constexpr int kRounds = 15;

#define CHECK(call)                                                                        \
  do {                                                                                     \
    cudaError_t error_ = (call);                                                           \
    if (error_ != cudaSuccess) {                                                           \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call,                   \
                   cudaGetErrorString(error_));                                            \
      std::exit(1);                                                                        \
    }                                                                                      \
  } while (0)

__device__ inline void give_up_after_a_second(long long start) {
  if (clock64() - start > 2'000'000'000LL) asm volatile("trap;");
}

// --- vocabulary ---------------------------------------------------------------------------------------

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline uint32_t at_rank(uint32_t address, uint32_t rank) {
  uint32_t result;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline void cluster_meet() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n"
               "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ inline void mbarrier_init(uint64_t* bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals));
}

__device__ inline void mbarrier_expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
               "r"(bytes)
               : "memory");
}

__device__ inline bool mbarrier_test(uint64_t* bar, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\n"
               "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
               "selp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(shared_address(bar)), "r"(parity)
               : "memory");
  return done != 0;
}

__device__ inline void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  const long long start = clock64();
  while (!mbarrier_test(bar, parity)) give_up_after_a_second(start);
}

__device__ inline void push16(uint32_t address, uint4 v, uint32_t bar) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(bar)
               : "memory");
}

__device__ inline uint4 load_packet(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

__device__ inline void store_packet(uint4* p, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// --- what is timed ------------------------------------------------------------------------------------

__global__ void block_barrier(int steps) {
  for (int t = 0; t < steps; ++t) __syncthreads();
}

__global__ void cluster_barrier(int steps) {
  for (int t = 0; t < steps; ++t) cluster_meet();
}

// Every CTA of a cluster gives `bytes` to each of its CTAs (itself too) with st.async; the receiver's
// mbarrier counts them. Two buffers: a CTA that has step t's data knows that all have read step t-1's,
// because a CTA sends t only after it has taken in t-1.
__global__ void cluster_push(int steps, int bytes) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint64_t full[2];
  const int size = static_cast<int>(cooperative_groups::this_cluster().num_blocks());
  const uint32_t me = cluster_rank();
  const int taken = bytes * size;
  if (threadIdx.x == 0) {
    mbarrier_init(&full[0], 1);
    mbarrier_init(&full[1], 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    mbarrier_expect(&full[0], taken);
    mbarrier_expect(&full[1], taken);
  }
  cluster_meet();
  const int packets = bytes / 16;
  uint4 value = make_uint4(threadIdx.x, me, 0, 0);
  uint32_t sum = 0;
  for (int t = 0; t < steps; ++t) {
    const int b = t & 1;
    for (int p = threadIdx.x; p < packets * size; p += blockDim.x) {
      const uint32_t peer = p / packets;
      const uint32_t place = b * taken + me * bytes + (p % packets) * 16;
      push16(at_rank(shared_address(shared + place), peer), value, at_rank(shared_address(&full[b]), peer));
    }
    mbarrier_wait(&full[b], (t >> 1) & 1);
    // What a step would do with h: each thread reads some of it, so that the next send depends on it.
    const uint4 got = *reinterpret_cast<uint4*>(shared + b * taken + (threadIdx.x * 16) % taken);
    sum += got.x;
    value.z = sum;
    __syncthreads();
    if (threadIdx.x == 0 && t + 2 < steps) mbarrier_expect(&full[b], taken);
  }
  cluster_meet();
  if (sum == 0x7fffffff) std::printf("never\n");
}

// Every CTA writes `bytes` of packets (12 bytes of data and an epoch), and reads everyone's: waiting is
// loading. Two buffers.
__global__ void grid_packets(int steps, int bytes, uint4* buffers, uint32_t epoch0) {
  const int ctas = gridDim.x;
  const int packets = bytes / 16;
  const int all = packets * ctas;
  uint32_t sum = 0;
  for (int t = 0; t < steps; ++t) {
    uint4* buffer = buffers + static_cast<size_t>(t & 1) * all;
    const uint32_t epoch = epoch0 + t;
    for (int p = threadIdx.x; p < packets; p += blockDim.x)
      store_packet(buffer + blockIdx.x * packets + p, make_uint4(sum, p, t, epoch));
    for (int p = threadIdx.x; p < all; p += blockDim.x) {
      const long long start = clock64();
      uint4 v = load_packet(buffer + p);
      while (v.w != epoch) {
        give_up_after_a_second(start);
        v = load_packet(buffer + p);
      }
      if (v.z != static_cast<uint32_t>(t)) atomicAdd(&torn_packets, 1);
      sum += v.y;
    }
    __syncthreads();
  }
  if (sum == 0x7fffffff) std::printf("never\n");
}

// The same, where a thread asks for several packets before it looks at any: it waits once for all of
// them, as the kernels of csrc/cuda do.
template <int kAhead>
__global__ void grid_packets_ahead(int steps, int bytes, uint4* buffers, uint32_t epoch0) {
  const int packets = bytes / 16;
  const int all = packets * gridDim.x, threads = blockDim.x;
  uint32_t sum = 0;
  for (int t = 0; t < steps; ++t) {
    uint4* buffer = buffers + static_cast<size_t>(t & 1) * all;
    const uint32_t epoch = epoch0 + t;
    for (int p = threadIdx.x; p < packets; p += threads)
      store_packet(buffer + blockIdx.x * packets + p, make_uint4(sum, p, t, epoch));
    for (int first = threadIdx.x; first < all; first += kAhead * threads) {
      uint4 v[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (first + k * threads < all) v[k] = load_packet(buffer + first + k * threads);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (first + k * threads >= all) continue;
        const long long start = clock64();
        while (v[k].w != epoch) {
          give_up_after_a_second(start);
          v[k] = load_packet(buffer + first + k * threads);
        }
        if (v[k].z != static_cast<uint32_t>(t)) atomicAdd(&torn_packets, 1);
        sum += v[k].y;
      }
    }
    __syncthreads();
  }
  if (sum == 0x7fffffff) std::printf("never\n");
}

// Every CTA gives each other one `bytes` of packets of its own, and adds up what it gets: a warp what
// some of the CTAs gave, kAhead of them at once.
template <int kAhead>
__global__ void grid_scatter(int steps, int bytes, uint4* buffers, uint32_t epoch0) {
  const int ctas = gridDim.x, packets = bytes / 16;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t all = static_cast<size_t>(packets) * ctas * ctas;
  uint32_t sum = 0;
  for (int t = 0; t < steps; ++t) {
    uint4* buffer = buffers + (t & 1) * all;
    const uint32_t epoch = epoch0 + t;
    for (int p = threadIdx.x; p < packets * ctas; p += blockDim.x)
      store_packet(buffer + (static_cast<size_t>(p / packets) * ctas + blockIdx.x) * packets + p % packets,
                   make_uint4(sum, p, t, epoch));
    const uint4* mine = buffer + static_cast<size_t>(blockIdx.x) * ctas * packets;
    for (int p = lane; p < packets; p += 32)
      for (int first = warp; first < ctas; first += warps * kAhead) {
        uint4 v[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          if (first + k * warps < ctas) v[k] = load_packet(mine + (first + k * warps) * packets + p);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          if (first + k * warps >= ctas) continue;
          const long long start = clock64();
          while (v[k].w != epoch) {
            give_up_after_a_second(start);
            v[k] = load_packet(mine + (first + k * warps) * packets + p);
          }
          if (v[k].z != static_cast<uint32_t>(t)) atomicAdd(&torn_packets, 1);
          sum += v[k].y;
        }
      }
    __syncthreads();
  }
  if (sum == 0x7fffffff) std::printf("never\n");
}

// Every CTA of a cluster pushes to each of its CTAs (itself too) a piece of its own, `bytes` of float32,
// and adds up the pieces that it is given, one of each.
__global__ void cluster_scatter(int steps, int bytes) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint64_t full[2];
  const int size = static_cast<int>(cooperative_groups::this_cluster().num_blocks());
  const uint32_t me = cluster_rank();
  const int taken = bytes * size, vectors = bytes / 16;
  if (threadIdx.x == 0) {
    mbarrier_init(&full[0], 1);
    mbarrier_init(&full[1], 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    mbarrier_expect(&full[0], taken);
    mbarrier_expect(&full[1], taken);
  }
  cluster_meet();
  float sum = threadIdx.x * 1e-3f;
  for (int t = 0; t < steps; ++t) {
    const int b = t & 1;
    for (int p = threadIdx.x; p < vectors * size; p += blockDim.x) {
      const uint32_t peer = p / vectors, word = __float_as_uint(sum + p);
      const uint32_t place = b * taken + me * bytes + (p % vectors) * 16;
      push16(at_rank(shared_address(shared + place), peer), make_uint4(word, word, word, word),
             at_rank(shared_address(&full[b]), peer));
    }
    mbarrier_wait(&full[b], (t >> 1) & 1);
    float total = 0;
    for (int k = threadIdx.x; k < bytes / 4; k += blockDim.x)
      for (int from = 0; from < size; ++from)
        total += *reinterpret_cast<const float*>(shared + b * taken + from * bytes + k * 4);
    sum = total * 1e-6f;
    __syncthreads();
    if (threadIdx.x == 0 && t + 2 < steps) mbarrier_expect(&full[b], taken);
  }
  cluster_meet();
  if (sum == 12345.0f) std::printf("never\n");
}

// The same with one counter: write, one thread adds, all wait for it, read past L1.
__global__ void grid_counter(int steps, int bytes, uint4* buffers, uint32_t* counter, uint32_t base) {
  const int ctas = gridDim.x;
  const int packets = bytes / 16;
  const int all = packets * ctas;
  uint32_t sum = 0;
  for (int t = 0; t < steps; ++t) {
    uint4* buffer = buffers + static_cast<size_t>(t & 1) * all;
    for (int p = threadIdx.x; p < packets; p += blockDim.x)
      buffer[blockIdx.x * packets + p] = make_uint4(sum, p, t, 1);
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
      const uint32_t goal = base + static_cast<uint32_t>(t + 1) * ctas;
      uint32_t now;
      const long long start = clock64();
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
        give_up_after_a_second(start);
      } while (static_cast<int32_t>(now - goal) < 0);
    }
    __syncthreads();
    for (int p = threadIdx.x; p < all; p += blockDim.x) sum += __ldcg(buffer + p).y;
  }
  if (sum == 0x7fffffff) std::printf("never\n");
}

// The hop alone: two CTAs throw one packet to and fro through L2, or through distributed shared memory.
__global__ void ping_pong_l2(int steps, uint4* packets, uint32_t epoch0) {
  if (threadIdx.x != 0) return;
  const int me = blockIdx.x;
  for (int t = 0; t < steps; ++t) {
    const uint32_t epoch = epoch0 + t;
    if ((t & 1) == me) {
      store_packet(packets, make_uint4(t, 0, 0, epoch));
    } else {
      const long long start = clock64();
      while (load_packet(packets).w != epoch) give_up_after_a_second(start);
    }
  }
}

__global__ void ping_pong_cluster(int steps) {
  __shared__ __align__(16) uint4 slot;
  __shared__ uint64_t full;
  const uint32_t me = cluster_rank();
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    mbarrier_expect(&full, 16);
  }
  cluster_meet();
  if (threadIdx.x == 0) {
    uint32_t parity = 0;
    for (int t = 0; t < steps; ++t) {
      if ((t & 1) == static_cast<int>(me)) {
        push16(at_rank(shared_address(&slot), me ^ 1), make_uint4(t, 0, 0, 0),
               at_rank(shared_address(&full), me ^ 1));
      } else {
        mbarrier_wait(&full, parity);
        parity ^= 1;
        if (t + 2 < steps) mbarrier_expect(&full, 16);
      }
    }
  }
  cluster_meet();
}

// bf16 products of m16n8k16 with their weights in registers, as a recurrence that holds its weights
// does them: `kChains` sums a warp, each a chain of dependent products.
template <int kChains>
__global__ void products(int steps, float* out) {
  float d[kChains][4] = {};
  uint32_t a[kChains][4], b[2] = {threadIdx.x, threadIdx.x * 3};
  for (int c = 0; c < kChains; ++c)
    for (int i = 0; i < 4; ++i) a[c][i] = threadIdx.x + c * 7 + i;
  for (int t = 0; t < steps; ++t)
#pragma unroll
    for (int c = 0; c < kChains; ++c)
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                   "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+f"(d[c][0]), "+f"(d[c][1]), "+f"(d[c][2]), "+f"(d[c][3])
                   : "r"(a[c][0]), "r"(a[c][1]), "r"(a[c][2]), "r"(a[c][3]), "r"(b[0]), "r"(b[1]));
  float sum = 0;
  for (int c = 0; c < kChains; ++c) sum += d[c][0] + d[c][3];
  if (sum == 12345.0f) out[threadIdx.x] = sum;
}

// Products with the weights read from shared memory by ldmatrix in each step.
__global__ void products_shared(int steps, float* out) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float d[4][4] = {};
  uint32_t b[2] = {threadIdx.x, threadIdx.x * 3};
  for (int t = 0; t < steps; ++t)
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      uint32_t a[4];
      const uint32_t address = shared_address(shared + ((warp * 16 + c) * 512) % (128 * 1024) + lane * 16);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                   : "r"(address));
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                   "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+f"(d[c % 4][0]), "+f"(d[c % 4][1]), "+f"(d[c % 4][2]), "+f"(d[c % 4][3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  float sum = 0;
  for (int c = 0; c < 4; ++c) sum += d[c][0] + d[c][3];
  if (sum == 12345.0f) out[threadIdx.x] = sum;
}

__global__ void nothing() {}

template <typename Function>
__global__ void chain(int steps, float* out, Function function) {
  float x = 0.25f + threadIdx.x * 1e-3f;
  for (int t = 0; t < steps; ++t) x = function(x);
  if (x == 12345.0f) out[threadIdx.x] = x;
}

struct TanhApprox {
  __device__ float operator()(float x) const {
    float y;
    asm volatile("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
};
struct TanhExp {
  __device__ float operator()(float x) const { return 1.0f - 2.0f / (1.0f + __expf(2.0f * x)); }
};
struct TanhFastDivide {
  __device__ float operator()(float x) const {
    return 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * x));
  }
};
struct TanhLibrary {
  __device__ float operator()(float x) const { return tanhf(x); }
};

// --- how it is timed ----------------------------------------------------------------------------------

template <typename Launch>
void time_it(const char* name, int ctas, int bytes, double steps, Launch launch) {
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  std::vector<float> times;
  for (int round = 0; round < kRounds + 2; ++round) {
    CHECK(cudaEventRecord(start));
    cudaError_t error = launch();
    if (error != cudaSuccess) {
      std::printf("%s,%d,%d,,,%s\n", name, ctas, bytes, cudaGetErrorString(error));
      std::fflush(stdout);
      (void)cudaGetLastError();
      return;
    }
    CHECK(cudaEventRecord(stop));
    CHECK(cudaEventSynchronize(stop));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    if (round >= 2) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  std::printf("%s,%d,%d,%.1f,%.1f,\n", name, ctas, bytes, times[times.size() / 2] * 1e6 / steps,
              times[0] * 1e6 / steps);
  std::fflush(stdout);
}

template <typename... Types, typename... Arguments>
cudaError_t launch(void (*kernel)(Types...), int grid, int threads, int shared, int cluster, bool together,
                   Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  cudaLaunchAttribute attributes[2];
  int count = 0;
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (together) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count].val.cooperative = 1;
    ++count;
  }
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Types>(arguments)...);
}

template <typename Kernel>
void allow(Kernel kernel, int shared) {
  if (shared > 48 * 1024)
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
}

}  // namespace

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  int clock = 0;
  CHECK(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0));
  std::printf("# %s, %d multiprocessors, at most %d MHz\n", device.name, device.multiProcessorCount,
              clock / 1000);
  std::printf("name,ctas,bytes,ns,least_ns,error\n");
  uint4* buffers;
  uint32_t* counter;
  float* out;
  CHECK(cudaMalloc(&buffers, 64 << 20));
  CHECK(cudaMemset(buffers, 0, 64 << 20));
  CHECK(cudaMalloc(&counter, 256));
  CHECK(cudaMemset(counter, 0, 256));
  CHECK(cudaMalloc(&out, 4096));
  uint32_t epoch = 1;

  // Launches: alone in a stream, in a graph, and in a graph with programmatic dependence.
  const int launches = 500;
  time_it("launch-stream", 1, 0, launches, [&] {
    for (int i = 0; i < launches; ++i) nothing<<<1, 32>>>();
    return cudaGetLastError();
  });
  for (int ctas : {1, 132}) {
    for (bool early : {false, true}) {
      cudaStream_t stream;
      CHECK(cudaStreamCreate(&stream));
      cudaGraph_t graph;
      cudaGraphExec_t runs;
      CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
      for (int i = 0; i < launches; ++i) {
        cudaLaunchConfig_t config = {};
        config.gridDim = ctas;
        config.blockDim = 128;
        config.stream = stream;
        cudaLaunchAttribute attribute;
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        config.attrs = &attribute;
        config.numAttrs = early ? 1 : 0;
        CHECK(cudaLaunchKernelEx(&config, nothing));
      }
      CHECK(cudaStreamEndCapture(stream, &graph));
      CHECK(cudaGraphInstantiate(&runs, graph, 0));
      time_it(early ? "launch-graph-early" : "launch-graph", ctas, 0, launches,
              [&] { return cudaGraphLaunch(runs, nullptr); });
    }
  }

  // Meetings.
  for (int threads : {128, 256, 512, 1024})
    time_it("block-barrier", 1, threads, kSteps, [&] {
      return launch(block_barrier, 1, threads, 0, 1, false, kSteps);
    });
  CHECK(cudaFuncSetAttribute(cluster_barrier, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  for (int size : {2, 4, 8, 16})
    time_it("cluster-barrier", size, 0, kSteps, [&] {
      return launch(cluster_barrier, size, 256, 0, size, false, kSteps);
    });

  // One packet to and fro: half a round trip.
  time_it("hop-l2", 2, 16, kSteps, [&] {
    cudaError_t error = launch(ping_pong_l2, 2, 32, 0, 1, true, kSteps, buffers, epoch);
    epoch += kSteps;
    return error;
  });
  time_it("hop-cluster", 2, 16, kSteps,
          [&] { return launch(ping_pong_cluster, 2, 32, 0, 2, false, kSteps); });

  // Everyone's slice to everyone, through a cluster. Bytes are a CTA's slice: 16 rows of h in 16 bits
  // of H units are 32 H bytes in all.
  CHECK(cudaFuncSetAttribute(cluster_push, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  for (int size : {2, 4, 8, 16})
    for (int total : {2048, 4096, 8192, 16384, 32768}) {
      const int bytes = total / size;
      const int shared = 2 * total;
      allow(cluster_push, shared);
      time_it("cluster-push", size, bytes, kSteps, [&] {
        return launch(cluster_push, size, 256, shared, size, false, kSteps, bytes);
      });
    }
  // The same while all clusters that fit run at once.
  for (int size : {8, 16}) {
    const int grid = (132 / size) * size - (size == 16 ? 16 : 0);
    allow(cluster_push, 2 * 16384);
    time_it("cluster-push-all", grid, 16384 / size, kSteps, [&] {
      return launch(cluster_push, grid, 256, 2 * 16384, size, false, kSteps, 16384 / size);
    });
  }

  // A piece of its own from each to each, of 32 hidden units of 8, 16 or 32 sequences.
  CHECK(cudaFuncSetAttribute(cluster_scatter, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  for (int size : {4, 8, 10, 16})
    for (int bytes : {1024, 2048, 4096}) {
      const int shared = 2 * bytes * size;
      allow(cluster_scatter, shared);
      time_it("cluster-scatter", size, bytes, kSteps, [&] {
        return launch(cluster_scatter, size, 256, shared, size, false, kSteps, bytes);
      });
    }

  // Everyone's slice to everyone, through L2.
  for (int ctas : {8, 16, 32, 64, 128})
    for (int total : {4096, 16384, 32768, 65536, 131072}) {
      const int bytes = total / ctas;
      if (bytes < 16) continue;
      time_it("grid-packets", ctas, bytes, kSteps, [&] {
        cudaError_t error =
            launch(grid_packets, ctas, 256, 0, 1, true, kSteps, bytes, buffers, epoch);
        epoch += kSteps;
        return error;
      });
    }
  // The slices of 16 hidden units of 2, 8, 16 and 64 sequences in 16 bits, 80 bytes of packets for
  // two of them; the teams of H = 256, 512, 768, 1024 and 2048.
  for (int ctas : {16, 32, 48, 64, 128})
    for (int pages : {1, 4, 8, 32}) {
      const int bytes = 80 * pages;
      time_it("grid-packets-ahead-1", ctas, bytes, kSteps, [&] {
        cudaError_t error =
            launch(grid_packets, ctas, 256, 0, 1, true, kSteps, bytes, buffers, epoch);
        epoch += kSteps;
        return error;
      });
      time_it("grid-packets-ahead-3", ctas, bytes, kSteps, [&] {
        cudaError_t error =
            launch(grid_packets_ahead<3>, ctas, 256, 0, 1, true, kSteps, bytes, buffers, epoch);
        epoch += kSteps;
        return error;
      });
      time_it("grid-packets-ahead-8", ctas, bytes, kSteps, [&] {
        cudaError_t error =
            launch(grid_packets_ahead<8>, ctas, 256, 0, 1, true, kSteps, bytes, buffers, epoch);
        epoch += kSteps;
        return error;
      });
    }
  // Sums of 16 hidden units of 8 and 16 sequences, from each to each.
  for (int ctas : {16, 32, 48, 64, 128})
    for (int bytes : {512, 1024})
      time_it("grid-scatter-8", ctas, bytes, kSteps, [&] {
        cudaError_t error =
            launch(grid_scatter<8>, ctas, 256, 0, 1, true, kSteps, bytes, buffers, epoch);
        epoch += kSteps;
        return error;
      });
  unsigned torn = 0;
  CHECK(cudaMemcpyFromSymbol(&torn, torn_packets, sizeof torn));
  std::printf("torn-packets,0,16,%u,%u,\n", torn, torn);
  uint32_t base = 0;
  for (int ctas : {8, 32, 64, 128})
    for (int total : {4096, 32768, 131072}) {
      const int bytes = total / ctas;
      time_it("grid-counter", ctas, bytes, kSteps, [&] {
        cudaError_t error =
            launch(grid_counter, ctas, 256, 0, 1, true, kSteps, bytes, buffers, counter, base);
        base += static_cast<uint32_t>(kSteps) * ctas;
        return error;
      });
    }

  // Products: ns for each round of a CTA's warps; `bytes` is the weights that the CTA multiplies by.
  for (int warps : {4, 8, 16}) {
    time_it("mma-registers-1", 1, warps * 1 * 512, kSteps,
            [&] { return launch(products<1>, 1, warps * 32, 0, 1, false, kSteps, out); });
    time_it("mma-registers-4", 1, warps * 4 * 512, kSteps,
            [&] { return launch(products<4>, 1, warps * 32, 0, 1, false, kSteps, out); });
    time_it("mma-registers-16", 1, warps * 16 * 512, kSteps,
            [&] { return launch(products<16>, 1, warps * 32, 0, 1, false, kSteps, out); });
    allow(products_shared, 128 * 1024);
    time_it("mma-shared-16", 1, warps * 16 * 512, kSteps,
            [&] { return launch(products_shared, 1, warps * 32, 128 * 1024, 1, false, kSteps, out); });
  }

  // One tanh after another.
  time_it("tanh-approx", 1, 0, kSteps,
          [&] { return launch(chain<TanhApprox>, 1, 128, 0, 1, false, kSteps, out, TanhApprox{}); });
  time_it("tanh-exp", 1, 0, kSteps,
          [&] { return launch(chain<TanhExp>, 1, 128, 0, 1, false, kSteps, out, TanhExp{}); });
  time_it("tanh-fast-divide", 1, 0, kSteps, [&] {
    return launch(chain<TanhFastDivide>, 1, 128, 0, 1, false, kSteps, out, TanhFastDivide{});
  });
  time_it("tanh-library", 1, 0, kSteps,
          [&] { return launch(chain<TanhLibrary>, 1, 128, 0, 1, false, kSteps, out, TanhLibrary{}); });
  CHECK(cudaDeviceSynchronize());
  return 0;
}

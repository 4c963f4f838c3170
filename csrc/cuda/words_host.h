// The words of words.h on the host: each thread of a CTA is a thread of the machine, and what is not
// ordered by a barrier is a race that ThreadSanitizer sees. What a GPU leaves undefined is made to
// show here:
//
//   shared()      is filled with NaNs when a CTA begins and when it ends; what is written beside it
//                 is found by guard bytes when the CTA ends, at once by AddressSanitizer
//   copy<N>()     leaves NaNs, and brings its bytes only in the arrived<>() that must have them;
//                 bytes that changed meanwhile, at either place, are an error, and so is an address
//                 that is not aligned
//   mma(), neighbour()    are an error where not all lanes of the warp are at the same word
//   meet(), meet_pair(), meet_cluster()   are an error where one of their threads has left the kernel,
//                 or does not come for two minutes
//   push()        leaves NaNs and is kept back, of two every other one, until its CTA looks at the Box:
//                 then what was kept back comes, in any order. The order that has_come() gives is
//                 from those who pushed or expected to those who were told so, no other.
//   Box           is an error where it is not open, or opened twice, where its bytes and those
//                 expected differ, where a CTA leaves before they are there, or they come after
//   load_packet() sees every other packet a few looks late, or when its thread meets others, so that
//                 of two packets either may be seen first. Packets give no order to anything else.
//
// What is kept back is drawn from `seed`, by each thread for itself; from seed 0, nothing is. A wait
// for what does not come ends after LOOK, with the launch at once.
//
// An error ends the launch: the threads leave at the next barrier, and run() gives its message.
//
// One meeting of its lanes is all that a warp needs for an mma: there are two sets of places for what
// is exchanged, and a lane writes to one when all lanes have read the other.
#pragma once
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "../cpu/asan.h"

#if defined(__has_feature)  // Clang; GCC has a macro
#if __has_feature(thread_sanitizer)
#define FASTSEQ_TSAN
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define FASTSEQ_TSAN
#endif
#if defined(FASTSEQ_TSAN)
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void AnnotateIgnoreSyncBegin(const char*, int);
void AnnotateIgnoreSyncEnd(const char*, int);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif

#define DEVICE inline
#define FASTSEQ_INLINE inline
#define KERNEL(name, threads, ctas) FASTSEQ_HOST_KERNEL(name, threads)  // name may be a macro's
#define FASTSEQ_HOST_KERNEL(name, threads)                                    \
  extern "C" void name(const fastseq::Arguments& a);                          \
  static const fastseq::host::Listed listed_##name(#name, name, threads);     \
  extern "C" void name([[maybe_unused]] const fastseq::Arguments& a)

namespace fastseq {
namespace host {

constexpr int LANES = 32, MOST_SHARED = 232448, MOST_CLUSTER = 16;
constexpr int SIDE_BY_SIDE = 256, MOST_THREADS = 8192;  // at once: where it is free, and at all
constexpr unsigned char POISON = 0xff, GUARD = 0xa5;  // a NaN of every type; not a NaN
constexpr size_t GUARDED = 256;                       // bytes on each side of a CTA's memory
constexpr int YIELDS = 2;
constexpr auto PATIENCE = std::chrono::seconds(120);  // of a busy machine too
constexpr auto LOOK = std::chrono::milliseconds(5);

inline std::atomic<int64_t> seed{1};  // of the launches to come

using Function = void (*)(const Arguments&);
struct Kernel {
  const char* name;
  Function function;
  int threads;
};
inline std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}
struct Listed {
  Listed(const char* name, Function function, int threads) {
    kernels().push_back({name, function, threads});
  }
};

// ThreadSanitizer takes locks and atomics of the words themselves for order among those who come by.
// While an Unseen lives it looks away from this thread; a Seen is a hole in that. What order a word
// gives is said by release() and acquire(), of the same place.
#if defined(FASTSEQ_TSAN)
inline void look_away() {
  AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
inline void look_here() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
}
inline void release(void* place) { __tsan_release(place); }
inline void acquire(void* place) { __tsan_acquire(place); }
#else
inline void look_away() {}
inline void look_here() {}
inline void release(void*) {}
inline void acquire(void*) {}
#endif
struct Unseen {
  Unseen() { look_away(); }
  ~Unseen() { look_here(); }
  Unseen(const Unseen&) = delete;
};
struct Seen {
  Seen() { look_here(); }
  ~Seen() { look_away(); }
  Seen(const Seen&) = delete;
};

using Word = std::atomic<uint32_t>;
#if defined(__linux__)
inline void wake(Word& word, int most) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, most, nullptr, nullptr, 0);
}
inline void sleep_while(Word& word, uint32_t value) {  // not long: none misses the end of a launch
  const timespec most{0, std::chrono::nanoseconds(LOOK).count()};
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, &most, nullptr, 0);
}
#else
inline void wake(Word&, int) {}
inline void sleep_while(Word&, uint32_t) {
  std::this_thread::sleep_for(std::chrono::microseconds(100));
}
#endif

// What some wait for and others make happen, again and again.
class Event {
 public:
  uint32_t count() const { return count_.load(); }
  void happen(int to_wake = INT_MAX) {
    ++count_;
    if (sleepers_.load()) wake(count_, to_wake);
  }
  // Until it happens after the count was `seen`, but not for long.
  void wait(uint32_t seen) {
    for (int k = 0; k < YIELDS; ++k) {
      if (count() != seen) return;
      std::this_thread::yield();
    }
    ++sleepers_;
    if (count() == seen) sleep_while(count_, seen);
    --sleepers_;
  }

 private:
  Word count_{0};
  std::atomic<int> sleepers_{0};
};

// Of a thread: what it keeps back.
class Chance {
 public:
  Chance(int64_t seed, uint64_t member) : off_(!seed), state_(uint64_t(seed) << 32 ^ member) {}
  uint64_t draw() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u, z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  bool one_in(uint64_t n) { return !off_ && draw() % n == 0; }

 private:
  bool off_;
  uint64_t state_;
};

using fastseq::FASTSEQ_ISA::Box;
using fastseq::FASTSEQ_ISA::Words4;

// 16 bytes whose halves are atomic and give no order; that they are one, a lock sees to.
inline Words4 read_packet(const Words4* from) {
  Words4 w;
  for (int k = 0; k < 4; k += 2) {
    auto* half = reinterpret_cast<uint64_t*>(const_cast<uint32_t*>(from->w + k));
    const uint64_t bits = std::atomic_ref<uint64_t>(*half).load(std::memory_order_relaxed);
    std::memcpy(w.w + k, &bits, sizeof bits);
  }
  return w;
}
inline void write_packet(Words4* to, const Words4& w) {
  for (int k = 0; k < 4; k += 2) {
    uint64_t bits;
    std::memcpy(&bits, w.w + k, sizeof bits);
    std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(to->w + k))
        .store(bits, std::memory_order_relaxed);
  }
}

// The packets of a launch that are not yet to be seen, by where they are.
struct Late {
  Words4* to;
  Words4 packet;
  const void* by;
  int looks;  // that miss it
};
struct Shelf {
  std::mutex mutex;
  std::vector<Late> late;
  Event stored;

  // The place in `late` of what goes to `to`, or its end.
  std::vector<Late>::iterator find(const Words4* to) {
    return std::find_if(late.begin(), late.end(), [&](const Late& one) { return one.to == to; });
  }
};
class Shelves {
 public:
  Event stored;  // on any
  Shelf& of(const Words4* p) {
    return all_[(reinterpret_cast<uintptr_t>(p) / sizeof *p * 0x9e3779b97f4a7c15u) >> 58];
  }

 private:
  Shelf all_[64];
};

struct Stopped {};  // thrown through a kernel, whose launch has failed

// What the CTAs of a launch share.
class Launch {
 public:
  int tiles_z = 1;  // of the grid
  const int64_t seed = host::seed.load();
  Shelves packets;

  // Keeps the first message.
  void blame(const std::string& why) {
    const std::lock_guard<std::mutex> hold(mutex_);
    if (message_.empty()) message_ = why;
    failed_.store(true, std::memory_order_release);
  }
  [[noreturn]] void fail(const std::string& why) {
    blame(why);
    throw Stopped();
  }
  bool failed() const { return failed_.load(std::memory_order_acquire); }
  const std::string& message() const { return message_; }

 private:
  std::mutex mutex_;
  std::string message_;
  std::atomic<bool> failed_{false};
};

// Those who wait yield YIELDS times, and sleep then. On two processors a meeting of 32 threads costs
// 25 to 45 us where they only yield, 37 to 46 in std::barrier, 70 to 90 where they sleep at once; of a
// kernel with eight warps, the processors' time is least with two.
class Barrier {
 public:
  explicit Barrier(int members) : members_(members), missing_(members) {}

  void meet(Launch& launch) {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    const int missing = missing_.fetch_sub(1) - 1;
    if (missing == 0) {
      missing_.store(members_, std::memory_order_relaxed);
      round_.store(round + 1);
      if (sleepers_.load()) wake(round_, INT_MAX);
    } else {
      wait(launch, round);
    }
    if (launch.failed()) throw Stopped();
  }

  void leave(Launch& launch) {
    ++gone_;
    if (missing_.load() != members_) launch.blame("a thread left the kernel, and others wait for it");
  }

 private:
  void wait(Launch& launch, uint32_t round) {
    const auto passed = [&] { return round_.load(std::memory_order_acquire) != round; };
    if (gone_.load() && !passed()) launch.fail("threads wait for one that has left the kernel");
    for (int k = 0; k < YIELDS; ++k) {
      if (passed()) return;
      std::this_thread::yield();
    }
    const auto since = std::chrono::steady_clock::now();
    ++sleepers_;
    while (!passed() && !launch.failed()) {
      sleep_while(round_, round);
      if (!passed() && std::chrono::steady_clock::now() - since > PATIENCE)
        launch.blame("threads wait at a barrier for others that do not come");
    }
    --sleepers_;
  }

  const int members_;
  Word round_{0};
  std::atomic<int> missing_, gone_{0}, sleepers_{0};
};

// What lanes hand to each other, and the word that each is at.
struct Exchange {
  float a[LANES][8], b[LANES][4], value[LANES];
  int word[LANES];
};
struct Warp {
  Barrier barrier{LANES};
  Exchange exchange[2];
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int size;
  unsigned char seen[16];
};

struct Cta;
struct Cluster {
  Cluster(int size, int threads) : barrier(size * threads) {}
  Barrier barrier;
  std::vector<Cta*> ctas;
};

struct Pushed {
  unsigned char* to;
  Words4 words;
};

// What a Box counts, under the lock of its CTA.
struct Count {
  uint32_t phase = 0;
  bool expected = false;
  int64_t bytes = 0;         // to come; of more than is expected so far, less than 0
  std::vector<Pushed> kept;  // back
  Event event;               // the phase has ended, or there is more that is kept back
  uint64_t order[2];         // for release() and acquire(), by the parity of the phase

  void come(Launch& launch, int64_t size) {
    bytes -= size;
    if (expected && bytes < 0) launch.fail("Box: more bytes have come than were expected");
    if (!expected || bytes) return;
    ++phase, expected = false;
    event.happen();
  }
  // Some of what was kept back, at least one.
  void bring(Launch& launch, Chance& chance) {
    for (size_t some = 1 + chance.draw() % kept.size(); some; --some) {
      std::swap(kept[chance.draw() % kept.size()], kept.back());
      const Pushed one = kept.back();
      kept.pop_back();
      for (size_t k = 0; k < sizeof one.words; ++k)
        if (one.to[k] != POISON) launch.fail("push: written to before it has come");
      std::memcpy(one.to, &one.words, sizeof one.words);
      come(launch, sizeof one.words);
    }
  }
};
constexpr uint64_t OPEN = 0x6e65706f20786f42;  // what a Box holds

struct Cta {
  Cta(Launch& launch, Cluster& cluster, int x, int y, int z, int threads, size_t size)
      : launch(launch),
        cluster(cluster),
        x(x),
        y(y),
        z(z),
        rank(int(cluster.ctas.size())),
        size(size),
        barrier(threads),
        remain(threads) {
    cluster.ctas.push_back(this);
    const size_t all = (size + 2 * GUARDED + 127) / 128 * 128;
    block = static_cast<unsigned char*>(std::aligned_alloc(128, all));
    if (!block) throw std::bad_alloc();
    memory = block + GUARDED, behind = all - GUARDED - size;
    std::memset(block, GUARD, all);
    std::memset(memory, POISON, size);
    forbid(block, GUARDED), forbid(memory + size, behind);
    for (int k = 0; k < threads / LANES; ++k) warps.push_back(std::make_unique<Warp>());
    for (int k = 0; k < threads / LANES / 2; ++k)
      pairs.push_back(std::make_unique<Barrier>(2 * LANES));
  }
  ~Cta() {
    allow(block, GUARDED), allow(memory + size, behind);
    std::free(block);
  }
  Cta(const Cta&) = delete;

  // Where in the shared memory that is.
  size_t place(const void* p, size_t bytes, const char* what) {
    const auto* at = static_cast<const unsigned char*>(p);
    if (at < memory || at + bytes > memory + size)
      launch.fail(std::string(what) + ": not in the CTA's shared memory");
    return size_t(at - memory);
  }
  // Of the Box at a place.
  Count& count(size_t at) {
    const auto found = counts.find(at);
    if (found == counts.end()) launch.fail("Box: not open");
    uint64_t holds;
    {
      const Seen seen;
      std::memcpy(&holds, memory + at, sizeof holds);
    }
    if (holds != OPEN) launch.fail("Box: written over");
    return found->second;
  }

  void close_boxes() {
    {
      const Unseen unseen;
      const std::lock_guard<std::mutex> hold(mutex);
      left = true;
      for (const auto& [at, box] : counts) {
        if (!box.kept.empty())
          launch.blame("a CTA has left the kernel before what was pushed into it has come");
        if (!box.expected && box.bytes)
          launch.blame("Box: more bytes have come than were expected");
      }
    }
    for (auto& [at, box] : counts) acquire(&box.order[0]), acquire(&box.order[1]);
  }

  // By the last of its threads.
  void end() {
    close_boxes();
    std::memset(memory, POISON, size);
    allow(block, GUARDED), allow(memory + size, behind);
    bool whole = true;
    for (size_t k = 0; k < GUARDED; ++k) whole &= block[k] == GUARD;
    for (size_t k = 0; k < behind; ++k) whole &= memory[size + k] == GUARD;
    if (!whole) launch.blame("written beside the shared memory");
    forbid(block, GUARDED), forbid(memory + size, behind);
  }

  Launch& launch;
  Cluster& cluster;
  const int x, y, z, rank;
  const size_t size;
  size_t behind;  // guard bytes
  unsigned char *block, *memory;
  Barrier barrier;
  std::atomic<int> remain;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Barrier>> pairs;
  std::mutex mutex;                // of what follows
  std::map<size_t, Count> counts;  // of Boxes, by where they are
  bool left = false;
};

struct Thread {
  Cta& cta;
  Warp& warp;
  const int id, lane;
  int turn = 0;              // which of the warp's two exchanges comes next
  std::vector<Copy> copies;  // on their way, oldest first
  std::vector<size_t> ends;  // of the groups among them

  Chance chance;
  std::vector<Words4*> stored;  // where its packets may be late
  Event* awaited = nullptr;     // what may change what it has loaded since it last looked again
  uint32_t seen = 0, seen_all = 0;
  bool missed = false;  // a packet that is late

  Thread(Cta& cta, int id)
      : cta(cta),
        warp(*cta.warps[id / LANES]),
        id(id),
        lane(id % LANES),
        chance(cta.launch.seed, uint64_t(cta.x) << 40 ^ uint64_t(cta.y) << 28 ^
                                    uint64_t(cta.z) << 16 ^ uint64_t(id)) {}

  void check_aligned(const void* p, size_t to, const char* what) {
    if (reinterpret_cast<uintptr_t>(p) % to)
      cta.launch.fail(std::string(what) + ": an address is not aligned to " + std::to_string(to));
  }

  void begin_copy(void* to, const void* from, int size) {
    check_aligned(to, size, "copy"), check_aligned(from, size, "copy");
    Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), size, {}};
    cta.place(to, size, "copy");
    for (int k = 0; k < size; ++k) copy.seen[k] = copy.from[k];
    for (int k = 0; k < size; ++k) copy.to[k] = POISON;
    copies.push_back(copy);
  }
  void end_copies(size_t open) {  // all groups but the last `open`
    if (ends.size() <= open) return;
    const size_t groups = ends.size() - open, done = ends[groups - 1];
    for (size_t at = 0; at < done; ++at) {
      const Copy& copy = copies[at];
      for (int k = 0; k < copy.size; ++k) {
        if (copy.to[k] != POISON) cta.launch.fail("copy: written to before it arrived");
        if (copy.from[k] != copy.seen[k]) cta.launch.fail("copy: its source changed on the way");
        copy.to[k] = copy.seen[k];
      }
    }
    copies.erase(copies.begin(), copies.begin() + done);
    ends.erase(ends.begin(), ends.begin() + groups);
    for (size_t& end : ends) end -= done;
  }

  void meet(Barrier& barrier) {
    show_packets();
    barrier.meet(cta.launch);
  }

  void open(Box* box) {
    check_aligned(box, sizeof *box, "Box");
    const size_t at = cta.place(box, sizeof *box, "Box");
    const Unseen unseen;
    const std::lock_guard<std::mutex> hold(cta.mutex);
    if (!cta.counts.try_emplace(at).second) cta.launch.fail("Box: opened twice");
    const Seen seen;
    std::memcpy(cta.memory + at, &OPEN, sizeof OPEN);
  }
  void expect(Box* box, int bytes) {
    show_packets();
    const size_t at = cta.place(box, sizeof *box, "Box");
    const Unseen unseen;
    const std::lock_guard<std::mutex> hold(cta.mutex);
    Count& count = cta.count(at);
    if (count.expected) cta.launch.fail("Box: expect() twice in a phase");
    {
      const Seen seen;
      release(&count.order[count.phase % 2]);
    }
    count.expected = true;
    count.come(cta.launch, -int64_t(bytes));
  }
  void push(void* to, Box* box, int rank, const Words4& words) {
    check_aligned(to, sizeof words, "push");
    const size_t at = cta.place(to, sizeof words, "push");
    const size_t box_at = cta.place(box, sizeof *box, "Box");
    if (rank < 0 || rank >= int(cta.cluster.ctas.size()))
      cta.launch.fail("push: the cluster has no CTA " + std::to_string(rank));
    Cta& peer = *cta.cluster.ctas[rank];
    const bool keep = chance.one_in(2);
    const Unseen unseen;
    const std::lock_guard<std::mutex> hold(peer.mutex);
    if (peer.left) cta.launch.fail("push: into a CTA that has left the kernel");
    Count& count = peer.count(box_at);
    unsigned char* const place = peer.memory + at;
    {
      const Seen seen;
      if (keep)
        std::memset(place, POISON, sizeof words);
      else
        std::memcpy(place, &words, sizeof words);
      release(&count.order[count.phase % 2]);
    }
    if (keep) {
      count.kept.push_back({place, words});
      count.event.happen(1);
    } else {
      count.come(cta.launch, sizeof words);
    }
  }
  bool has_come(Box* box, int parity) {
    if (parity != 0 && parity != 1) cta.launch.fail("Box: a parity is 0 or 1");
    const size_t at = cta.place(box, sizeof *box, "Box");
    const bool briefly = chance.one_in(8);
    const auto since = std::chrono::steady_clock::now();
    for (;;) {
      Count* count;
      bool ended;
      {
        const Unseen unseen;
        const std::lock_guard<std::mutex> hold(cta.mutex);
        count = &cta.count(at);
        const auto has_ended = [&] { return int(count->phase % 2) != parity; };
        if (!has_ended() && !count->kept.empty() && !briefly) count->bring(cta.launch, chance);
        ended = has_ended();
        seen = count->event.count();
        if (!ended && !count->kept.empty()) --seen;  // there is more to bring
      }
      if (cta.launch.failed()) throw Stopped();
      if (ended) {
        acquire(&count->order[parity]);
        return true;
      }
      if (briefly || std::chrono::steady_clock::now() - since > LOOK) return false;
      const Unseen unseen;
      count->event.wait(seen);
    }
  }

  Words4 load_packet(const Words4* from) {
    check_aligned(from, sizeof *from, "packet");
    const Unseen unseen;
    Shelves& all = cta.launch.packets;
    Shelf& shelf = all.of(from);
    const std::lock_guard<std::mutex> hold(shelf.mutex);
    if (!awaited) {
      awaited = &shelf.stored, seen = shelf.stored.count(), seen_all = all.stored.count();
    } else if (awaited != &shelf.stored) {
      awaited = &all.stored, seen = seen_all;
    }
    const auto late = shelf.find(from);
    if (late != shelf.late.end()) {
      if (late->by == this || late->looks-- == 0) {
        write_packet(late->to, late->packet);
        shelf.late.erase(late);
      } else {
        missed = true;
      }
    }
    const Seen seen;
    return read_packet(from);
  }
  void store_packet(Words4* to, const Words4& packet) {
    check_aligned(to, sizeof *to, "packet");
    const bool keep = chance.one_in(2);
    const Unseen unseen;
    Shelves& all = cta.launch.packets;
    Shelf& shelf = all.of(to);
    const std::lock_guard<std::mutex> hold(shelf.mutex);
    const auto late = shelf.find(to);
    if (late != shelf.late.end()) shelf.late.erase(late);  // nobody will have seen it
    {
      const Seen seen;
      write_packet(to, keep ? read_packet(to) : packet);
    }
    if (keep) {
      shelf.late.push_back({to, packet, this, 1 + int(chance.draw() % 3)});
      stored.push_back(to);
    }
    awaited = nullptr;
    shelf.stored.happen(), all.stored.happen();
  }
  // Those of this thread, to everybody.
  void show_packets() {
    awaited = nullptr;
    if (stored.empty()) return;
    const Unseen unseen;
    Shelves& all = cta.launch.packets;
    for (const Words4* to : stored) {
      Shelf& shelf = all.of(to);
      const std::lock_guard<std::mutex> hold(shelf.mutex);
      const auto late = shelf.find(to);
      if (late == shelf.late.end() || late->by != this) continue;
      write_packet(late->to, late->packet);
      shelf.late.erase(late);
      shelf.stored.happen(), all.stored.happen();
    }
    stored.clear();
  }
  void look_again() {
    if (cta.launch.failed()) throw Stopped();
    const Unseen unseen;
    if (!awaited) awaited = &cta.launch.packets.stored, seen = awaited->count();
    if (missed)
      std::this_thread::yield();
    else
      awaited->wait(seen);
    awaited = nullptr, missed = false;
  }

  // What all lanes of the warp have written. `word` is the same for all of them.
  template <class Write>
  const Exchange& exchange(int word, Write write) {
    Exchange& place = warp.exchange[turn];
    turn ^= 1;
    place.word[lane] = word;
    write(place);
    meet(warp.barrier);
    if (place.word[lane ^ 1] != word || place.word[0] != word)
      cta.launch.fail("lanes of a warp are at different words");
    return place;
  }
};

inline constinit thread_local Thread* current = nullptr;

// The numbers of a word of 32 bits.
inline float of_bits(uint32_t w) {
  float v;
  std::memcpy(&v, &w, sizeof v);
  return v;
}
inline uint32_t bits_of(float v) {
  uint32_t w;
  std::memcpy(&w, &v, sizeof w);
  return w;
}
inline float of_half(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, rest = bits & 1023;
  if (exponent == 31) return of_bits(sign | 0x7f800000 | rest << 13);
  if (exponent == 0) return of_bits(sign | bits_of(float(rest) * 0x1p-24f));
  return of_bits(sign | (exponent + 112) << 23 | rest << 13);
}
inline uint16_t half_of(float v) {  // to nearest even
  const uint32_t w = bits_of(v), sign = w >> 16 & 0x8000, size = w & 0x7fffffff;
  if (size > 0x7f800000) return 0x7fff;
  if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more
  if (size < 0x38800000)  // less than 2^-14: a multiple of 2^-24, to which the sum rounds
    return static_cast<uint16_t>(sign | (bits_of(of_bits(size) + 0.5f) - bits_of(0.5f)));
  return static_cast<uint16_t>(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}
inline uint16_t bfloat_of(float v) {  // to nearest even
  const uint32_t w = bits_of(v);
  if ((w & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((w + 0x7fff + (w >> 16 & 1)) >> 16);
}

using fastseq::FASTSEQ_ISA::Bf16;
using fastseq::FASTSEQ_ISA::F16;

template <class Type>
struct Operand;  // how many numbers a word of it holds, and which
template <>
struct Operand<Bf16> {
  static constexpr int EACH = 2, WORD = 1;
  static float number(uint32_t w, int k) { return of_bits(k ? w & 0xffff0000 : w << 16); }
};
template <>
struct Operand<F16> {
  static constexpr int EACH = 2, WORD = 2;
  static float number(uint32_t w, int k) { return of_half(static_cast<uint16_t>(w >> 16 * k)); }
};
template <>
struct Operand<float> {
  static constexpr int EACH = 1, WORD = 3;
  static float number(uint32_t w, int) { return of_bits(w & 0xffffe000); }  // of TF32
};
constexpr int MEET = 4;        // of the warp alone
constexpr int NEIGHBOUR = 16;  // words of neighbour: this plus its mask

// About as tensor cores add: all terms are cut towards zero to multiples of 2^-24 of the largest
// one's power of two, and their sum to a float32. (Fasi, Higham, Mikaitis and Pranesh, "Numerical
// behavior of NVIDIA tensor cores", 2021. Where they cut differs by generation.)
inline float cut_sum(const float* terms, int count) {
  float largest = 0, plain = 0;
  for (int k = 0; k < count; ++k) {
    largest = std::max(largest, std::fabs(terms[k]));
    plain += terms[k];
  }
  if (!std::isfinite(plain) || largest == 0) return plain;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 24), inverse = 1 / unit;
  int64_t sum = 0;
  for (int k = 0; k < count; ++k) sum += int64_t(terms[k] * inverse);  // towards zero
  const double exact = double(sum) * unit;
  const float v = float(exact);
  return std::fabs(v) > std::fabs(exact) ? std::nextafter(v, 0.0f) : v;
}

// d (16, 8) += a (16, K) b (K, 8), K = 8 EACH; lane 4 g + q holds rows g and g + 8 of columns 2 q
// and 2 q + 1 of d; words 0 and 1 of a are numbers EACH q ... of rows g and g + 8, words 2 and 3
// those 4 EACH further on; b0 and b1 likewise of column g.
template <class Type>
inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using Is = Operand<Type>;
  constexpr int EACH = Is::EACH;
  Thread& me = *current;
  const Exchange& all = me.exchange(Is::WORD, [&](Exchange& to) {
    for (int k = 0; k < EACH; ++k) {
      for (int w = 0; w < 4; ++w) to.a[me.lane][w * EACH + k] = Is::number(a[w], k);
      to.b[me.lane][k] = Is::number(b0, k), to.b[me.lane][EACH + k] = Is::number(b1, k);
    }
  });
  const int g = me.lane / 4 * 4, n = me.lane % 4 * 2 * 4;  // first lanes of the row and the column
  float terms[4][9 * EACH];
  int count = 0;
  for (int w = 0; w < 2; ++w)  // in increasing order of the inner index
    for (int q = 0; q < 4; ++q)
      for (int k = 0; k < EACH; ++k, ++count) {
        const float* row = all.a[g + q] + 2 * w * EACH + k;
        const float left = all.b[n + q][w * EACH + k], right = all.b[n + 4 + q][w * EACH + k];
        terms[0][count] = row[0] * left, terms[1][count] = row[0] * right;
        terms[2][count] = row[EACH] * left, terms[3][count] = row[EACH] * right;
      }
  for (int k = 0; k < 4; ++k) {
    terms[k][count] = d[k];
    d[k] = cut_sum(terms[k], count + 1);
  }
}

// Threads that wait for work: to make one takes 10 to 40 us, under ThreadSanitizer ten times that.
class Crew {
 public:
  // work(0) to work(count - 1), each on a thread of its own.
  void run(int count, const std::function<void(int)>& work) {
    while (int(members_.size()) < count) {
      auto member = std::make_unique<Member>();
      std::thread([this, one = member.get()] { serve(*one); }).detach();
      members_.push_back(std::move(member));
    }
    left_ = count;
    for (int id = 0; id < count; ++id) {
      Member& one = *members_[id];
      const std::lock_guard<std::mutex> hold(one.mutex);
      one.id = id, one.work = &work;
      one.called.notify_one();
    }
    std::unique_lock<std::mutex> hold(mutex_);
    done_.wait(hold, [&] { return left_ == 0; });
  }

 private:
  struct Member {
    std::mutex mutex;
    std::condition_variable called;
    const std::function<void(int)>* work = nullptr;
    int id = 0;
  };

  void serve(Member& me) {
    for (;;) {
      std::unique_lock<std::mutex> hold(me.mutex);
      me.called.wait(hold, [&] { return me.work; });
      (*me.work)(me.id);
      me.work = nullptr;
      hold.unlock();
      if (--left_ == 0) {
        const std::lock_guard<std::mutex> hold(mutex_);
        done_.notify_one();
      }
    }
  }

  std::vector<std::unique_ptr<Member>> members_;
  std::mutex mutex_;
  std::condition_variable done_;
  std::atomic<int> left_{0};
};

// One launch after another. The threads are not ended: a process may end while they wait.
inline void run_together(int count, const std::function<void(int)>& work) {
  static std::mutex mutex;
  static Crew* crew = nullptr;
  static pid_t process = 0;
  const std::lock_guard<std::mutex> hold(mutex);
  if (process != getpid()) crew = new Crew, process = getpid();  // threads do not follow a fork
  crew->run(count, work);
}

// Runs a kernel over its grid, as many clusters side by side as have SIDE_BY_SIDE threads, or all of
// them where they have to be. Neighbours in x are a cluster. Returns why it failed, or nothing.
inline std::string run(const Kernel& kernel, int64_t gx, int64_t gy, int64_t gz, int threads,
                       int64_t shared, const Arguments& arguments, bool together = false,
                       int cluster = 1) {
  if (gx < 1 || gy < 1 || gz < 1) return "the grid is empty";
  if (threads < LANES || threads % LANES || threads > kernel.threads)
    return std::to_string(threads) + " threads: expected whole warps, at most " +
           std::to_string(kernel.threads);
  if (shared < 0 || shared > MOST_SHARED) return "more shared memory than a multiprocessor has";
  if (cluster < 1 || cluster > MOST_CLUSTER || gx % cluster)
    return std::to_string(gx) + " CTAs in x: expected whole clusters of at most " +
           std::to_string(MOST_CLUSTER) + ", got " + std::to_string(cluster);
  const int64_t all = gx * gy * gz;
  const int64_t clusters = std::max(1, SIDE_BY_SIDE / (threads * cluster));
  const int64_t beside = together ? all : std::min(clusters * cluster, all);
  if (beside * threads > MOST_THREADS)
    return std::to_string(beside) + " CTAs of " + std::to_string(threads) +
           " threads at once: the host has at most " + std::to_string(MOST_THREADS) + " threads";
  Launch launch;
  launch.tiles_z = int(gz);
  for (int64_t first = 0, count; first < all && !launch.failed(); first += count) {
    count = std::min(beside, all - first);
    std::vector<std::unique_ptr<Cluster>> teams;
    std::vector<std::unique_ptr<Cta>> ctas;
    const auto work = [&](int member) {
      Cta& cta = *ctas[member / threads];
      const int id = member % threads;
      Thread thread(cta, id);
      current = &thread;
      try {
        kernel.function(arguments);
        thread.show_packets();
        thread.warp.barrier.leave(launch), cta.barrier.leave(launch);
        cta.cluster.barrier.leave(launch);
        if (size_t(id / LANES / 2) < cta.pairs.size()) cta.pairs[id / LANES / 2]->leave(launch);
      } catch (const Stopped&) {
      }
      if (--cta.remain == 0) cta.end();
    };
    for (int64_t k = first; k < first + count; ++k) {
      if (k % cluster == 0) teams.push_back(std::make_unique<Cluster>(cluster, threads));
      ctas.push_back(std::make_unique<Cta>(launch, *teams.back(), int(k % gx), int(k / gx % gy),
                                           int(k / gx / gy), threads, size_t(shared)));
    }
    try {
      run_together(int(count) * threads, work);
    } catch (const std::system_error& why) {
      launch.blame(std::string("no thread: ") + why.what());
    }
  }
  return launch.message();
}

}  // namespace host

namespace FASTSEQ_ISA {

constexpr bool HAS_CLUSTERS = true;

DEVICE int thread() { return host::current->id; }
DEVICE int thread_again() { return thread(); }
template <class V>
DEVICE V kept(V v) {
  return v;
}
DEVICE uint32_t quotient(uint32_t a, uint32_t m) { return uint32_t(uint64_t(a) * m >> 32); }
DEVICE int tile_x() { return host::current->cta.x; }
DEVICE int tile_y() { return host::current->cta.y; }
DEVICE int tile_z() { return host::current->cta.z; }
DEVICE int tile_x_again() { return tile_x(); }
DEVICE int tile_y_again() { return tile_y(); }
DEVICE int tiles_z() { return host::current->cta.launch.tiles_z; }
DEVICE unsigned char* shared() { return host::current->cta.memory; }
DEVICE void meet() { host::current->meet(host::current->cta.barrier); }
DEVICE void meet_pair(int n) {
  host::Thread& me = *host::current;
  if (me.id / (2 * host::LANES) != n) me.cta.launch.fail("meet_pair: of another pair of warps");
  me.meet(*me.cta.pairs[n]);
}
DEVICE void meet_warp() {
  host::current->exchange(host::MEET, [](host::Exchange&) {});
}

DEVICE int rank() { return host::current->cta.rank; }
DEVICE int ranks() { return int(host::current->cta.cluster.ctas.size()); }
DEVICE void meet_cluster() { host::current->meet(host::current->cta.cluster.barrier); }
DEVICE void open(Box* box) { host::current->open(box); }
DEVICE void expect(Box* box, int bytes) { host::current->expect(box, bytes); }
DEVICE bool has_come(Box* box, int parity) { return host::current->has_come(box, parity); }
DEVICE void push(void* to, Box* box, int rank, Words4 v) {
  host::current->push(to, box, rank, v);
}

DEVICE Words4 load_packet(const void* p) { return host::current->load_packet(static_cast<const Words4*>(p)); }
DEVICE void store_packet(void* p, Words4 v) { host::current->store_packet(static_cast<Words4*>(p), v); }
DEVICE void look_again() { host::current->look_again(); }
DEVICE void tell(int32_t* place, int32_t code) {
  std::atomic_ref<int32_t>(*place).store(code, std::memory_order_relaxed);
}

template <int N>
DEVICE void copy(void* to, const void* from) {
  static_assert(N == 4 || N == 8 || N == 16);
  host::current->begin_copy(to, from, N);
}
DEVICE void close() { host::current->ends.push_back(host::current->copies.size()); }
template <int N>
DEVICE void arrived() {
  host::current->end_copies(N);
}

DEVICE void mark(int32_t* place) {
  std::atomic_ref<int32_t>(*place).store(1, std::memory_order_relaxed);
}
DEVICE bool is_marked(const int32_t* place) {
  return std::atomic_ref<int32_t>(*const_cast<int32_t*>(place)).load(std::memory_order_relaxed);
}

DEVICE float neighbour(float v, int mask) {
  host::Thread& me = *host::current;
  return me
      .exchange(host::NEIGHBOUR + mask, [&](host::Exchange& to) { to.value[me.lane] = v; })
      .value[me.lane ^ mask];
}

DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Bf16) {
  host::multiply<Bf16>(d, a, b0, b1);
}
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F16) {
  host::multiply<F16>(d, a, b0, b1);
}
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
  host::multiply<float>(d, a, b0, b1);
}

template <class V>
DEVICE V load(const void* p) {
  host::current->check_aligned(p, alignof(V), "load");
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
DEVICE void store(void* p, V v) {
  host::current->check_aligned(p, alignof(V), "store");
  std::memcpy(p, &v, sizeof v);
}

DEVICE float bits_to_float(uint32_t w) { return host::of_bits(w); }
DEVICE uint32_t float_to_bits(float v) { return host::bits_of(v); }

DEVICE float widen(float v) { return v; }
DEVICE float widen(Bf16 v) { return host::of_bits(uint32_t(v.bits) << 16); }
DEVICE float widen(F16 v) { return host::of_half(v.bits); }

template <class Number>
DEVICE Number narrow(float v);
template <>
DEVICE float narrow<float>(float v) {
  return v;
}
template <>
DEVICE Bf16 narrow<Bf16>(float v) {
  return {host::bfloat_of(v)};
}
template <>
DEVICE F16 narrow<F16>(float v) {
  return {host::half_of(v)};
}

DEVICE float round_tf32(float v) {  // a half away from zero
  const uint32_t w = host::bits_of(v);
  if ((w & 0x7fffffff) > 0x7f800000) return host::of_bits(0x7fffffff);
  return host::of_bits((w + 0x1000) & 0xffffe000);
}

DEVICE float exact_exp(float x) { return std::exp(x); }
// As on a GPU, what is denormal is 0, given or made.
DEVICE float without_denormals(float x) { return std::fabs(x) < 0x1p-126f ? x * 0.0f : x; }
DEVICE float quick_exp2(float x) { return without_denormals(std::exp2(without_denormals(x))); }
DEVICE float quick_reciprocal(float x) { return without_denormals(1.0f / without_denormals(x)); }
DEVICE float exact_ratio(float a, float b) { return a / b; }
DEVICE float exact_tanh(float x) { return std::tanh(x); }
DEVICE float exact_log1p(float x) { return std::log1p(x); }
DEVICE float exact_expm1(float x) { return std::expm1(x); }
DEVICE float exact_sqrt(float x) { return std::sqrt(x); }
DEVICE float magnitude(float x) { return std::fabs(x); }
DEVICE float with_sign(float x, float of) { return std::copysign(x, of); }
DEVICE float sum(float a, float b) { return a + b; }

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

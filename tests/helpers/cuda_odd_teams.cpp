// Teams of which CTA 1 is odd:
//
//   mute_   hands nothing on from exchange 2 on, not even to itself
//   slow_   is late, where it takes in every other exchange: its peers could be two ahead
#include <chrono>
#include <thread>

#include "team_backward.h"
#include "team_forward.h"

namespace fastseq {
namespace FASTSEQ_ISA {

template <class By>
struct Mute : By {
  using Way = Mute;
};
template <class By>
struct Slow : By {
  using Way = Slow;
};

template <class S, class By>
struct Exchange<S, Mute<By>> : Exchange<S, By> {
  using Exchange<S, By>::Exchange;
  bool is_mute(int n) const { return this->me.rank == 1 && n >= 2; }
  void hand_h(int n, int page, const unsigned char* h) const {
    if (!is_mute(n)) Exchange<S, By>::hand_h(n, page, h);
  }
  void hand_sums(int n, int tile, int columns, int elements, const float (&v)[4],
                 bool below) const {
    if (!is_mute(n)) Exchange<S, By>::hand_sums(n, tile, columns, elements, v, below);
  }
};
template <class S, class By>
struct Exchange<S, Slow<By>> : Exchange<S, By> {
  using Exchange<S, By>::Exchange;
  void be_late(int n) const {
    if (this->me.rank == 1 && n % 2 == 0)
      std::this_thread::sleep_for(std::chrono::milliseconds(60));
  }
  void take_h(int n) const {
    be_late(n);
    Exchange<S, By>::take_h(n);
  }
  void take_sums(int n, int elements) const {
    be_late(n);
    Exchange<S, By>::take_sums(n, elements);
  }
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

using namespace fastseq::FASTSEQ_ISA;

#define ODD(how, Manner, regime, By)                                  \
  KERNEL(how##_forward_lstm_bfloat16_##regime, 256, 1) {              \
    team_forward<Slice<Lstm, bfloat16, Manner<By>>, Lstm>(a);         \
  }                                                                   \
  KERNEL(how##_backward_lstm_bfloat16_##regime, 256, 1) {             \
    team_backward<Slice<Lstm, bfloat16, Manner<By>>, Lstm>(a);        \
  }
ODD(mute, Mute, cluster, ByCluster)
ODD(mute, Mute, grid, ByGrid)
ODD(slow, Slow, cluster, ByCluster)
ODD(slow, Slow, grid, ByGrid)

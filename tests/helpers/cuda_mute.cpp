// Teams of which CTA 1 hands nothing on from exchange 2 on, not even to itself.
#include "team_backward.h"
#include "team_forward.h"

namespace fastseq {
namespace FASTSEQ_ISA {

struct MuteCluster : ByCluster {};
struct MuteGrid : ByGrid {};

template <class S, class By>
struct Mute : Exchange<S, By> {
  using Exchange<S, By>::Exchange;
  bool is_mute(int n) const { return this->me.rank == 1 && n >= 2; }
  void hand_h(int n, int page, const unsigned char* h) const {
    if (!is_mute(n)) Exchange<S, By>::hand_h(n, page, h);
  }
  void hand_sums(int n, int tile, int columns, int elements, const float (&v)[4]) const {
    if (!is_mute(n)) Exchange<S, By>::hand_sums(n, tile, columns, elements, v);
  }
};
template <class S>
struct Exchange<S, MuteCluster> : Mute<S, ByCluster> {
  using Mute<S, ByCluster>::Mute;
};
template <class S>
struct Exchange<S, MuteGrid> : Mute<S, ByGrid> {
  using Mute<S, ByGrid>::Mute;
};

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

using namespace fastseq::FASTSEQ_ISA;

KERNEL(mute_forward_lstm_bfloat16_cluster, 256, 1) {
  team_forward<Slice<Lstm, bfloat16, MuteCluster>, Lstm>(a);
}
KERNEL(mute_backward_lstm_bfloat16_cluster, 256, 1) {
  team_backward<Slice<Lstm, bfloat16, MuteCluster>, Lstm>(a);
}
KERNEL(mute_forward_lstm_bfloat16_grid, 256, 1) {
  team_forward<Slice<Lstm, bfloat16, MuteGrid>, Lstm>(a);
}
KERNEL(mute_backward_lstm_bfloat16_grid, 256, 1) {
  team_backward<Slice<Lstm, bfloat16, MuteGrid>, Lstm>(a);
}

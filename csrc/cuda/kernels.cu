// The kernels of one cell, which -DFASTSEQ_UNIT names: setup.py compiles this file once for each unit
// of list.h, and the module carries what nvcc made of it as data (launch/kernels.h).
#include "list.h"
#include "previous.h"
#include "team_backward.h"
#include "team_forward.h"

using fastseq::Arguments;
using namespace fastseq::cuda;

template <class Cell, class Type, int HC>
using Team = Slice<Cell, Type, typename OfKind<HC>::By>;

// What one CTA walks, or a team.
#define FASTSEQ_WAY(way)                                              \
  template <class Cell, class Type, int HC>                           \
  CONSTANT int way##_bound() {                                        \
    if constexpr (HC < 0)                                             \
      return Team<Cell, Type, HC>::THREADS;                           \
    else                                                              \
      return way##_threads<Cell, Type, HC>();                         \
  }                                                                   \
  template <class Cell, class Type, int HC>                           \
  CONSTANT int way##_beside() {                                       \
    if constexpr (HC < 0)                                             \
      return 1;                                                       \
    else                                                              \
      return way##_ctas<Cell, Type, HC>();                            \
  }                                                                   \
  template <class Cell, class Type, int HC>                           \
  DEVICE void way##_kernel(const Arguments& a) {                      \
    if constexpr ((HC == cluster || HC == wave) && !HAS_CLUSTERS)                     \
      return;                                                         \
    else if constexpr (HC < 0)                                        \
      team_##way<Team<Cell, Type, HC>, Cell>(a);                      \
    else                                                              \
      way##_walk<Cell, Type, HC>(a);                                  \
  }
template <class, class>
DEVICE void team_previous(const Arguments&) {}  // there is none
FASTSEQ_WAY(forward)
FASTSEQ_WAY(backward)
FASTSEQ_WAY(previous)

#define FASTSEQ_KERNEL(way, cell, Cell, type, HC)                               \
  KERNEL(way##_##cell##_##type##_##HC, (way##_bound<Cell, type, HC>()),         \
         (way##_beside<Cell, type, HC>())) {                                    \
    way##_kernel<Cell, type, HC>(a);                                            \
  }
#define FASTSEQ_JOINED(a, b) a##b
#define FASTSEQ_LIST_OF(unit) FASTSEQ_JOINED(FASTSEQ_KERNELS_, unit)

FASTSEQ_LIST_OF(FASTSEQ_UNIT)(FASTSEQ_KERNEL)

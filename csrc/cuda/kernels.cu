// The kernels of one cell, which -DFASTSEQ_UNIT names: setup.py compiles this file once for each unit
// of list.h, and the module carries what nvcc made of it as data (launch/kernels.h).
#include "backward.h"
#include "forward.h"
#include "list.h"
#include "previous.h"

using namespace fastseq::cuda;

#define FASTSEQ_KERNEL(way, cell, Cell, type, HC)                                      \
  KERNEL(way##_##cell##_##type##_##HC, (way##_threads<Cell, type, HC>()),              \
         (way##_ctas<Cell, type, HC>())) {                                             \
    way##_walk<Cell, type, HC>(a);                                                     \
  }
#define FASTSEQ_JOINED(a, b) a##b
#define FASTSEQ_LIST_OF(unit) FASTSEQ_JOINED(FASTSEQ_KERNELS_, unit)

FASTSEQ_LIST_OF(FASTSEQ_UNIT)(FASTSEQ_KERNEL)

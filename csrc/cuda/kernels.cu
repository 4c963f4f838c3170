// The kernels of one cell, which -DFASTSEQ_UNIT names: setup.py compiles this file once for each unit
// of list.h, and the module carries what nvcc made of it as data (launch/kernels.h).
#include "words.h"

#include "../cells/generated.h"
#include "list.h"
#include "stub.h"

namespace fastseq {
namespace FASTSEQ_ISA {

// The types of list.h, as the loops have them.
using bfloat16 = Bf16;
using float16 = F16;
using tf32 = float;
using float32 = float;

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

using namespace fastseq::cuda;

#define FASTSEQ_KERNEL(way, cell, Cell, type, HC)                                      \
  KERNEL(way##_##cell##_##type##_##HC, (way##_threads<Cell, type, HC>()),              \
         (way##_ctas<Cell, type, HC>())) {                                             \
    way##_walk<Cell, type, HC>(a);                                                     \
  }
#define FASTSEQ_JOINED(a, b) a##b
#define FASTSEQ_LIST_OF(unit) FASTSEQ_JOINED(FASTSEQ_KERNELS_, unit)

FASTSEQ_LIST_OF(FASTSEQ_UNIT)(FASTSEQ_KERNEL)

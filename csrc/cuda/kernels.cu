// The kernels of a unit (a cell, or `previous`), which -DFASTSEQ_UNIT names: setup.py compiles this file
// once for each unit of list.h, and the module carries what nvcc made of it as data (launch/kernels.h).
#include "backward.h"
#include "forward.h"
#include "list.h"
#include "previous.h"

using namespace fastseq::FASTSEQ_ISA;

#define FASTSEQ_BARE(...) __VA_ARGS__
#define FASTSEQ_KERNEL(unit, name, threads, ctas, function) \
  KERNEL(name, threads, ctas) { FASTSEQ_BARE function(a); }
#define FASTSEQ_JOINED(a, b) a##b
#define FASTSEQ_KERNELS_OF(unit) FASTSEQ_JOINED(FASTSEQ_KERNELS_, unit)

FASTSEQ_KERNELS_OF(FASTSEQ_UNIT)(FASTSEQ_KERNEL)

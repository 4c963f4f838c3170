"""Compiles a chain's kernels for sm_90 without a GPU, in a process of its own, and prints what each
takes.

The host code runs on CPU tensors with its launches recorded, as in triton_compile.py.

    python tests/helpers/crf_triton_compile.py [--full]
"""

import sys
from contextlib import nullcontext

import torch
import triton
from chains import draw
from triton_compile import TARGETS, resources, source

from fastseq.backends.crf import triton as room
from fastseq.backends.triton_kernels import Kernel

SINGLE, DOUBLE = torch.float32, torch.float64
#: K, the type, and the paths that are asked for; 128 tags put registers aside.
SHORT = [(32, SINGLE, 1)]
CASES = [(9, SINGLE, 2), (33, SINGLE, 4), (64, SINGLE, 1), (32, DOUBLE, 1), (64, DOUBLE, 3)]
LARGEST = [(128, SINGLE, 2)]


def recorded(K, dtype, n):
    launches = []
    Kernel.__call__ = lambda self, grid, values, options: launches.append(
        (self, {name: values[name] for name in self.arguments}, options)
    )
    chain, tags = draw(3, 4, K, dtype=dtype)
    value, u = room.forward(chain, tags, True)
    room.backward(chain, tags, u, value, True)
    room.viterbi(chain, n)
    return launches


def main():
    full = "--full" in sys.argv
    torch.cuda.device = lambda index: nullcontext()
    for K, dtype, n in SHORT + (CASES + LARGEST) * full:
        for kernel, values, options in recorded(K, dtype, n):
            out = triton.compile(
                source(kernel, values),
                target=TARGETS["sm_90"][0],
                options=options | {"enable_fp_fusion": True},
            )
            taken = resources(out)
            allowed = taken["spilled"] == 0 or (K, dtype, n) in LARGEST
            name = f"{kernel.function.__name__} {K} {dtype} {n}"
            print("ok" if allowed else "BAD", name, taken)


if __name__ == "__main__":
    main()

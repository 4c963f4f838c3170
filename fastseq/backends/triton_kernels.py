"""Triton kernels for any cell: the vocabulary of the texts, and loops bound to them.

Gate arithmetic is in float32, for float64 in float64.
"""

from __future__ import annotations

import inspect
import linecache
import re
import textwrap
from functools import cache
from types import FunctionType
from typing import Any

import torch
import triton
import triton.language as tl

from ..cells import Cell, bind
from ..cells.derive import compiled
from ..cells.text import number_of
from . import triton_source as source
from .triton_text import UNZONED, Zoned, backward_text, forward_text

#: Under TRITON_INTERPRET=1 kernels run in NumPy, on the CPU. It is read when a kernel is made.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)
#: Whether operands in TF32 are rounded: by an instruction of Nvidia's.
ROUNDS = not INTERPRETED and torch.version.hip is None
_ROUNDS = tl.constexpr(ROUNDS)
_OLDER = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9))

# The vocabulary


@triton.jit
def sigmoid(x):
    # exp of a negative number alone: no overflow, full relative accuracy at both ends
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    """Cephes' series for |x| < 0.625, where 1 - exp(-2|x|) would cancel."""
    z = tl.minimum(tl.abs(x), 1.0)
    z = z * z
    if x.dtype == tl.float64:
        p = -9.64399179425052238628e-1 * z - 9.92877231001918586564e1
        p = p * z - 1.61468768441708447952e3
        q = (z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3
        q = q * z + 4.84406305325125486048e3
        near = p / q
    else:
        near = -5.70498872745e-3 * z + 2.06390887954e-2
        near = near * z - 5.37397155531e-2
        near = near * z + 1.33314422036e-1
        near = near * z - 3.33332819422e-1
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * z * near, tl.where(x < 0, -far, far))


@triton.jit
def relu(x):
    return tl.where(x <= 0, 0.0, x)  # NaN passes, as in torch


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def reciprocal(x):
    return 1.0 / x


@triton.jit
def maximum(a, b):
    return tl.where(b == b, tl.where(a < b, b, a), b)  # NaN where either is


@triton.jit
def logsigmoid(x):
    """min(x, 0) - log1p(exp(-|x|)); log1p(t) = s + s w g(w) with s = 2 t / (2 + t), w = s^2."""
    t = tl.exp(-tl.abs(x))
    s = (t + t) / (2.0 + t)
    w = s * s
    if x.dtype == tl.float64:
        g = 8.115072007421204e-08 * w + 1.590751205243499e-07
        g = g * w + 9.236208645175118e-07
        g = g * w + 4.059135077360162e-06
        g = g * w + 1.8782421773348337e-05
        g = g * w + 8.877804650658325e-05
        g = g * w + 0.00043402781190950303
        g = g * w + 0.0022321428553009983
        g = g * w + 0.012500000000049144
        g = g * w + 0.08333333333333288
    else:
        g = 0.0005473527126014233 * w + 0.0021874329540878534
        g = g * w + 0.01250678114593029
        g = g * w + 0.08333301544189453
    return tl.where(x > 0, 0.0, x) - (s + s * (w * g))


@triton.jit
def sqrt(x):
    if x.dtype == tl.float32:
        y = tl.sqrt_rn(x)
    else:
        y = tl.sqrt(x)
    return y


@triton.jit
def dsigmoid(y):
    return y * (1.0 - y)


@triton.jit
def dtanh(y):
    return (1.0 - y) * (1.0 + y)  # 1 - y*y cancels near 1


@triton.jit
def drelu(y):
    return tl.where(y <= 0, 0.0, 1.0)


@triton.jit
def dmaximum(a, b):
    return tl.where(a < b, 0.0, tl.where(a == b, 0.5, 1.0))


@triton.jit
def dlogsigmoid(y):
    """1 - exp(y) by tanh(y / 2), which keeps its accuracy near 0."""
    u = tanh(0.5 * y)
    return -2.0 * u / (1.0 - u)


@triton.jit
def dsqrt(y):
    return 0.5 / y


VOCABULARY = {
    "sigmoid": sigmoid,
    "tanh": tanh,
    "relu": relu,
    "exp": exp,
    "reciprocal": reciprocal,
    "maximum": maximum,
    "logsigmoid": logsigmoid,
    "sqrt": sqrt,
    "dsigmoid": dsigmoid,
    "dtanh": dtanh,
    "drelu": drelu,
    "dmaximum": dmaximum,
    "dlogsigmoid": dlogsigmoid,
    "dsqrt": dsqrt,
}

# What the loops are made of


@triton.jit
def load(ptr, place, mask, WIDE: tl.constexpr):
    return tl.load(ptr + place, mask=mask, other=0.0).to(WIDE)


@triton.jit
def load_or_zero(ptr, place, mask, WIDE: tl.constexpr):
    """Zeros for a buffer that is not there."""
    if ptr is None:
        value = tl.zeros_like(mask).to(WIDE)
    else:
        value = tl.load(ptr + place, mask=mask, other=0.0).to(WIDE)
    return value


@triton.jit
def shared(ptr, place, mask, WIDE: tl.constexpr):
    """From a buffer that programs write in the same launch: past the first-level cache, which is
    not kept coherent."""
    return tl.load(ptr + place, mask=mask, other=0.0, cache_modifier=".cg").to(WIDE)


@triton.jit
def ahead(ptr, place, mask):
    """For a later step, as it is stored; nobody waits for it here. Zeros for a buffer that is not
    there. Past the first-level cache: each value is read once."""
    if ptr is None:
        value = tl.zeros_like(mask).to(tl.float32)
    else:
        value = tl.load(ptr + place, mask=mask, other=0.0, cache_modifier=".cg")
    return value


# Tiles of gates. The values of n gates, n two or four, are one tile (BLOCK_B, n * BLOCK_H), and so
# is their product. A gate's units stand side by side in its columns; or, in a product whose warps
# cover more columns than a gate has (PAIRED), the units of two gates take turns. Then a thread
# holds all gates of its units, and to take them apart moves nothing. A tile of three dimensions
# would say the same, but Triton 3.6 changes its layout in many rounds.


@triton.jit
def columns(n: tl.constexpr, BLOCK_H: tl.constexpr, PAIRED: tl.constexpr):
    """Gate and unit of each column, (1, n * BLOCK_H)."""
    column = tl.arange(0, n * BLOCK_H)[None, :]
    if PAIRED:
        gate = column // (2 * BLOCK_H) * 2 + column % 2
        unit = column % (2 * BLOCK_H) // 2
    else:
        gate = column // BLOCK_H
        unit = column % BLOCK_H
    return gate, tl.program_id(2) * BLOCK_H + unit


@triton.jit
def apart2(tile, BLOCK_H: tl.constexpr, PAIRED: tl.constexpr):
    """Two gates' values, (BLOCK_B, BLOCK_H) each."""
    if PAIRED:
        tile = tile.reshape(tile.shape[0], BLOCK_H, 2)
    else:
        tile = tile.reshape(tile.shape[0], 2, BLOCK_H).permute(0, 2, 1)
    return tile.split()


@triton.jit
def apart4(tile, BLOCK_H: tl.constexpr, PAIRED: tl.constexpr):
    if PAIRED:
        tile = tile.reshape(tile.shape[0], 2, BLOCK_H, 2).permute(0, 2, 1, 3)
    else:
        tile = tile.reshape(tile.shape[0], 2, 2, BLOCK_H).permute(0, 3, 1, 2)
    even, odd = tile.split()
    a, c = even.split()
    b, d = odd.split()
    return a, b, c, d


@triton.jit
def together2(a, b):
    """The tile of two gates."""
    return tl.join(a, b).permute(0, 2, 1).reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def together4(a, b, c, d):
    tile = tl.join(tl.join(a, c), tl.join(b, d))
    return tile.permute(0, 2, 3, 1).reshape(a.shape[0], 4 * a.shape[1])


@triton.jit
def masked(value, mask_ptr, mask):
    """value * mask, where there is one."""
    if mask_ptr is not None:
        value = value * mask.to(value.dtype)
    return value


@triton.jit
def lengths_of(lengths_ptr, batch, B, T):
    """How long each sequence is; 0 behind the batch."""
    if lengths_ptr is None:
        length = tl.where(batch < B, T, 0)
    else:
        length = tl.load(lengths_ptr + batch, mask=batch < B, other=0)
    return length


@triton.jit
def within(time, length):
    """Whether a step is one of a sequence's."""
    time += tl.zeros_like(length)  # the interpreter makes integers of a scalar truth it spreads
    return (time >= 0) & (time < length)


@triton.jit
def first_row(offsets_ptr, time, T, B):
    """The packed row of a step's first sequence; of some step for a time that is none."""
    time = tl.minimum(tl.maximum(time, 0), T - 1)
    if offsets_ptr is None:
        row = time.to(tl.int64) * B
    else:
        row = tl.load(offsets_ptr + time)
    return row


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """To the nearest number of TF32, as cuDNN and cuBLAS round what they multiply. The tensor cores
    themselves cut the last bits off: every product comes out smaller, and gradients of biases, sums
    of many, were twice as far from float64 as cuDNN's. The weights are rounded before the launch
    (:data:`ROUND`); what the programs of a grid that holds its weights hand to one another, as it
    is written, since between a load and its product it makes the loads of a step wait for one
    another.
    """
    if _ROUNDS and PRECISION == "tf32":
        x = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return x


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    if WIDE == tl.float64:  # of which Triton 3.6 compiles no tl.dot for Hopper
        product = tl.sum(a[:, :, None] * b[None, :, :], 1)
    elif _INTERPRETED:  # NumPy has no bfloat16
        product = tl.dot(a.to(WIDE), b.to(WIDE), input_precision=PRECISION, out_dtype=WIDE)
    else:
        product = tl.dot(a, b, input_precision=PRECISION, out_dtype=WIDE)
    return product


@triton.jit
def slices(k: tl.constexpr, BLOCK_K: tl.constexpr):
    """The k-th BLOCK_K numbers in four slices, (4, 1, BLOCK_K / 4)."""
    quarter: tl.constexpr = BLOCK_K // 4
    first = k * BLOCK_K + tl.arange(0, 4)[:, None, None] * quarter
    return first + tl.arange(0, quarter)[None, None, :]


@triton.jit
def sliced_dot(a, b, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """Products of four slices of the inner length, (4, BLOCK_B, columns): one for each warp.

    a: (4, BLOCK_B, inner), b: (4, inner, columns), of a quarter of the inner length each.
    """
    if _INTERPRETED:
        product = tl.dot(a.to(WIDE), b.to(WIDE), input_precision=PRECISION, out_dtype=WIDE)
    else:
        product = tl.dot(a, b, input_precision=PRECISION, out_dtype=WIDE)
    return product


@triton.jit
def sum_of_slices(product):
    """(4, BLOCK_B, columns), a slice a warp, to (BLOCK_B, columns), an element a thread. (tl.sum
    would leave the whole of it in every warp.)"""
    tile = product.permute(1, 2, 0).reshape(product.shape[1], product.shape[2], 2, 2)
    even, odd = tile.split()
    a, c = even.split()
    b, d = odd.split()
    return (a + b) + (c + d)


@triton.jit
def dot_apart(a, b, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """A product that leaves the tensor cores' layout: else all that it meets in a text, however
    many loads and stores, would be brought into that."""
    product = dot(a, b, PRECISION, WIDE)
    half: tl.constexpr = product.shape[1] // 2
    left, right = product.reshape(product.shape[0], 2, half).permute(0, 2, 1).split()
    return together2(left, right)


@triton.jit
def afresh(tile, patience):
    """The same number. Triton 3.6 takes it for another, so that what is computed from it again
    takes no register while the steps run; 3.9 does better by itself."""
    if _OLDER:
        tile += tl.where(patience < 0, 1, 0)
    return tile


@triton.jit
def arrive(counter):
    """What all threads of this program wrote is to be seen by those who wait."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter, goal, patience):
    """Until ``goal`` arrivals are counted; what those programs wrote, all threads may read then.

    How often to look the next time: not at all, 0, once it was in vain.
    """
    came = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    looks = 0
    while (came < goal) & (looks < patience):
        came = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        looks += 1
    tl.debug_barrier()
    return tl.where(came < goal, 0, patience)


_HELPERS = {
    f.__name__: f
    for f in (
        load,
        load_or_zero,
        shared,
        ahead,
        columns,
        apart2,
        apart4,
        together2,
        together4,
        slices,
        sliced_dot,
        sum_of_slices,
        dot_apart,
        afresh,
        masked,
        lengths_of,
        within,
        first_row,
        rounded,
        dot,
        arrive,
        wait,
    )
}

# Kernels


#: Nothing is compiled again for another number of steps, sequences or recurrences. (Where the two
#: tables lie depends on T.)
_NOT_SPECIALIZED = tuple("step tiles patience fault T B R capacity lengths_ptr offsets_ptr".split())


class Kernel:
    """A function that Triton compiles, and what it takes."""

    def __init__(self, function: Any, arguments: tuple[str, ...]) -> None:
        self.function, self.arguments = function, arguments

    def __call__(
        self, grid: tuple[int, ...], values: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """Launch it, on those of the values that it names; options: of the compiler."""
        given = {name: values[name] for name in self.arguments}
        # A product and a sum may join: said here, since the default changes. The bits are the same
        # in every run.
        self.function[grid](**given, **options, enable_fp_fusion=True)


@cache
def _jit_text(text: Any) -> Any:
    bound = bind(_with_literals(text), "triton", **VOCABULARY)
    # the interpreter looks for the language, and for the function under the name in its text
    bound.__globals__["tl"] = tl
    bound.__name__ = text.__name__
    return triton.jit(bound)


def _with_literals(text: Any) -> Any:
    """A text with its numbers as literals, to which Triton gives the type of what they meet; what a
    function returns has one of its own."""
    numbers = {n: number_of(n) for n in text.__code__.co_names if number_of(n) is not None}
    if not numbers:
        return text
    source = textwrap.dedent(inspect.getsource(text))
    for name, value in numbers.items():
        source = re.sub(rf"\b{name}\(\)", repr(value), source)
    return compiled(text.__name__, source, text.__module__)


def unreadable(cell: Cell) -> str | None:
    """The name of a text whose source Triton cannot read, if there is one."""
    for phase in cell.phases:
        for text in (phase.forward, phase.backward):
            try:
                inspect.getsource(text)  # type: ignore[arg-type]
            except (OSError, TypeError):
                return getattr(text, "__name__", repr(text))
    return None


@cache
def kernel(cell: Cell, kind: str, projected: bool, k: Any = None, zoned: Zoned = UNZONED) -> Kernel:
    """A loop of :mod:`.triton_source`, bound to the texts of its cell."""
    text = source.TEXTS[kind](cell, projected, k, zoned)
    names: dict[str, Any] = {"tl": tl, "__name__": __name__, **_HELPERS}
    for at, phase in enumerate(cell.phases):
        names[forward_text(at)] = _jit_text(phase.forward)
        names[backward_text(at)] = _jit_text(phase.backward)
    name = text[4 : text.index("(")]
    # inspect, by which Triton finds a function's text, asks linecache
    file = f"<fastseq {name}{' projected' if projected else ''} {k} {zoned}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), names)
    loop: FunctionType = names[name]
    arguments = loop.__code__.co_varnames[: loop.__code__.co_argcount]
    fixed = [a for a in _NOT_SPECIALIZED if a in arguments]
    return Kernel(triton.jit(loop, do_not_specialize=fixed), arguments)


@triton.jit(do_not_specialize=["T", "B", "R", "tiles", "capacity", "lengths_ptr", "offsets_ptr"])
def previous_h_kernel(
    y_ptr, h_0_ptr, h_mask_ptr, reset_ptr, reverse_ptr, lengths_ptr, offsets_ptr, out_ptr,
    T, B, R, P, tiles, capacity, WIDE: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr
):  # fmt: skip
    """out (N, R, P): what w_hh multiplied at every row, h_{t-1}, reset and masked.

    A program owns one step's tile of the batch in one recurrence.
    """
    recurrence = tl.program_id(1).to(tl.int64)
    time = tl.program_id(0) // tiles
    batch = (tl.program_id(0) % tiles * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    reverse = tl.load(reverse_ptr + recurrence) != 0
    length = lengths_of(lengths_ptr, batch, B, T)
    live = within(time, length)
    rows = first_row(offsets_ptr, time, T, B) + batch
    earlier = tl.where(reverse, time + 1, time - 1)
    kept = live
    if reset_ptr is not None:
        kept = live & (tl.load(reset_ptr + recurrence * capacity + rows, mask=live, other=0) == 0)
    known = kept & within(earlier, length)
    fresh = kept & (known == 0)
    at_earlier = (first_row(offsets_ptr, earlier, T, B) + batch) * R + recurrence
    state = recurrence * B + batch
    at = rows * R + recurrence
    for first in range(0, P, BLOCK_P):
        hidden = (first + tl.arange(0, BLOCK_P))[None, :]
        value = load(y_ptr, at_earlier * P + hidden, known & (hidden < P), WIDE)
        value += load_or_zero(h_0_ptr, state * P + hidden, fresh & (hidden < P), WIDE)
        mask = load_or_zero(h_mask_ptr, state * P + hidden, live & (hidden < P), WIDE)
        value = masked(value, h_mask_ptr, mask)
        tl.store(out_ptr + at * P + hidden, value, mask=live & (hidden < P))


PREVIOUS_H = Kernel(previous_h_kernel, tuple(previous_h_kernel.arg_names))


@triton.jit(do_not_specialize=["n"])
def round_kernel(x_ptr, out_ptr, n, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    """out = x, each ``rounded``."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < n, other=0.0)
    tl.store(out_ptr + place, rounded(x, PRECISION), mask=place < n)


ROUND = Kernel(round_kernel, tuple(round_kernel.arg_names))

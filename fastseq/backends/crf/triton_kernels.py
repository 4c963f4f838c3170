"""Kernels that walk a chain: a program owns a sequence for all of time, and holds the transitions,
a tile (BLOCK, BLOCK), in registers. Tags are padded to a power of two; what is behind scores -inf.

Sums over the previous tag are made in log space, the greatest term of each column apart. A sum of
linear terms, as on the CPU, would need the maximum of a vector where this needs that of a tile's
columns, and besides a branch for what underflows; a step waits for its reductions, not for the
exponentials, of which a thread has eight at 32 tags.

Traffic of a step: K numbers of emissions are read and, in training, K of u written; backward reads
these and writes K gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_kernels import Kernel


@triton.jit
def rows_of(ptr, t, b, t_stride, b_stride):
    """Where a step of a sequence begins."""
    return ptr + tl.cast(t, tl.int64) * t_stride + tl.cast(b, tl.int64) * b_stride


@triton.jit
def tile_of(moves_ptr, i_stride, j_stride, K, BLOCK: tl.constexpr):
    """The transitions, from row to column."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (i < K) & (j < K)
    return tl.load(moves_ptr + i * i_stride + j * j_stride, mask=inside, other=float("-inf"))


@triton.jit
def finite(x):
    """0 in place of -inf, which no number may be taken from."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def log_sum(x):
    """log sum exp over the rows of a tile, or of a vector's numbers."""
    most = finite(tl.max(x, 0))
    if len(x.shape) == 2:
        parts = tl.exp(x - most[None, :])
    else:
        parts = tl.exp(x - most)
    return most + tl.log(tl.sum(parts, 0))


@triton.jit
def length_of(lengths_ptr, b, T):
    if lengths_ptr is None:
        length = T
    else:
        length = tl.load(lengths_ptr + b).to(tl.int32)
    return length


@triton.jit(do_not_specialize=["T", "B", "e_t", "e_b", "tags_t", "tags_b"])
def forward_kernel(
    e_ptr, e_t, e_b, lengths_ptr, start_ptr, end_ptr, moves_ptr, i_stride, j_stride, tags_ptr,
    tags_t, tags_b, u_ptr, value_ptr, T, B, K, BLOCK: tl.constexpr
):  # fmt: skip
    """value (B,) and, where it is wanted, u (T, B, K); totals over time in float64."""
    b = tl.program_id(0)
    length = length_of(lengths_ptr, b, T)
    tag = tl.arange(0, BLOCK)
    inside = tag < K
    moves = tile_of(moves_ptr, i_stride, j_stride, K, BLOCK)
    total, score = tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64)
    previous = tl.cast(0, tl.int64)
    if length > 0:
        e = tl.load(rows_of(e_ptr, 0, b, e_t, e_b) + tag, mask=inside, other=0.0)
        u = tl.load(start_ptr + tag, mask=inside, other=float("-inf")) + e
        if tags_ptr is not None:
            previous = tl.load(rows_of(tags_ptr, 0, b, tags_t, tags_b))
            score += tl.load(rows_of(e_ptr, 0, b, e_t, e_b) + previous)
            score += tl.load(start_ptr + previous)
        following = tl.minimum(1, length - 1)
        e = tl.load(rows_of(e_ptr, following, b, e_t, e_b) + tag, mask=inside, other=0.0)
        for t in range(1, length):
            if u_ptr is not None:
                tl.store(rows_of(u_ptr, t - 1, b, B * K, K) + tag, u, mask=inside)
            following = tl.minimum(t + 1, length - 1)
            ahead = tl.load(rows_of(e_ptr, following, b, e_t, e_b) + tag, mask=inside, other=0.0)
            if tags_ptr is not None:
                now = tl.load(rows_of(tags_ptr, t, b, tags_t, tags_b))
                score += tl.load(rows_of(e_ptr, t, b, e_t, e_b) + now)
                score += tl.load(moves_ptr + previous * i_stride + now * j_stride)
                previous = now
            m = finite(tl.max(u, 0))
            u = log_sum((u - m)[:, None] + moves) + e
            total += m
            e = ahead
        if u_ptr is not None:
            tl.store(rows_of(u_ptr, length - 1, b, B * K, K) + tag, u, mask=inside)
        end = tl.load(end_ptr + tag, mask=inside, other=float("-inf"))
        total += log_sum(u + end)
        if tags_ptr is not None:
            total = score + tl.load(end_ptr + previous) - total
    tl.store(value_ptr + b, total.to(value_ptr.dtype.element_ty))


@triton.jit
def add_up(counts_ptr, counts, K, BLOCK: tl.constexpr):
    """Adds a tile to a program's own (K, K) doubles."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (i < K) & (j < K)
    place = counts_ptr + i * K + j
    total = tl.load(place, mask=inside, other=0.0) + counts
    tl.store(place, total, mask=inside)


@triton.jit(do_not_specialize=["T", "B", "e_t", "e_b", "tags_t", "tags_b"])
def backward_kernel(
    e_ptr, e_t, e_b, lengths_ptr, end_ptr, moves_ptr, i_stride, j_stride, tags_ptr, tags_t, tags_b,
    u_ptr, dvalue_ptr, de_ptr, counts_ptr, T, B, K, BLOCK: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """de (T, B, K), zero beyond the lengths, and, where it is wanted, the gradient of transitions.

    A program takes one sequence after another, and adds up in doubles of its own, STEPS at a time.
    """
    tag = tl.arange(0, BLOCK)
    inside = tag < K
    moves = tile_of(moves_ptr, i_stride, j_stride, K, BLOCK)
    end = tl.load(end_ptr + tag, mask=inside, other=float("-inf"))
    counts = tl.zeros_like(moves)
    taken = 0
    if counts_ptr is not None:
        counts_ptr += tl.program_id(0).to(tl.int64) * K * K
    for b in range(tl.program_id(0), B, tl.num_programs(0)):
        length = length_of(lengths_ptr, b, T)
        dvalue = tl.load(dvalue_ptr + b)
        g = dvalue  # of log Z
        if tags_ptr is not None:
            g = -dvalue
        for t in range(length, T):
            tl.store(rows_of(de_ptr, t, b, B * K, K) + tag, tl.zeros_like(end), mask=inside)
        if length > 0:
            last = length - 1
            u = tl.load(rows_of(u_ptr, last, b, B * K, K) + tag, mask=inside, other=0.0) + end
            log_z = log_sum(u)
            p = tl.where(log_z == float("-inf"), 0.0, tl.exp(u - log_z))
            for k in range(0, length):
                t = last - k
                de = g * p
                if tags_ptr is not None:
                    now = tl.load(rows_of(tags_ptr, t, b, tags_t, tags_b))
                    de += tl.where(tag == now, dvalue, 0.0)
                tl.store(rows_of(de_ptr, t, b, B * K, K) + tag, de, mask=inside)
                if t > 0:
                    u = tl.load(rows_of(u_ptr, t, b, B * K, K) + tag, mask=inside, other=0.0)
                    e = tl.load(rows_of(e_ptr, t, b, e_t, e_b) + tag, mask=inside, other=0.0)
                    before = tl.load(
                        rows_of(u_ptr, t - 1, b, B * K, K) + tag, mask=inside, other=float("-inf")
                    )
                    # what has no probability came from nowhere
                    log_s = tl.where(p == 0, float("inf"), u - e)
                    x = (before - finite(tl.max(before, 0)))[:, None] + moves
                    w = p[None, :] * tl.exp(x - log_s[None, :])
                    p = tl.sum(w, 1)
                    sum_of_p = tl.sum(p, 0)  # would drift away from 1 as rounding adds up
                    p = p / tl.where(sum_of_p > 0, sum_of_p, 1.0)
                    if counts_ptr is not None:
                        counts += g * w
                        if tags_ptr is not None:
                            old = tl.load(rows_of(tags_ptr, t - 1, b, tags_t, tags_b))
                            of_path = (tag == old)[:, None] & (tag == now)[None, :]
                            counts += tl.where(of_path, dvalue, 0.0)
                        taken += 1
                        if taken == STEPS:
                            add_up(counts_ptr, counts, K, BLOCK)
                            counts = tl.zeros_like(moves)
                            taken = 0
    if counts_ptr is not None:
        add_up(counts_ptr, counts, K, BLOCK)


@triton.jit
def best_of(x):
    """The greatest number of each column, and its row."""
    return tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)


@triton.jit(do_not_specialize=["T", "B", "e_t", "e_b"])
def viterbi_kernel(
    e_ptr, e_t, e_b, lengths_ptr, start_ptr, end_ptr, moves_ptr, i_stride, j_stride, v_ptr,
    came_ptr, score_ptr, place_ptr, T, B, K, N, ONE: tl.constexpr, BLOCK: tl.constexpr,
    OFTEN: tl.constexpr
):  # fmt: skip
    """At which place each of the N best paths ends: place a * K + j is the a-th best path to tag j.
    Scores (B, N) tell where there is none, -inf, and that something is NaN.

    v (2, B, N, K): the scores of all places at two steps. came (T, B, N, K): from which place.
    The paths to a tag are sorted, so those that others have come from are the first few: each of N
    passes takes the best of what is at their heads.
    """
    b = tl.program_id(0)
    length = length_of(lengths_ptr, b, T)
    tag = tl.arange(0, BLOCK)
    inside = tag < K
    moves = tile_of(moves_ptr, i_stride, j_stride, K, BLOCK)
    row = tl.arange(0, BLOCK)[:, None]
    size = N * K
    end = tl.load(end_ptr + tag, mask=inside, other=float("-inf"))
    odd = (end != end).to(tl.int32)  # of each tag, whether NaN was met
    if length > 1:
        odd |= tl.max((moves != moves).to(tl.int32), 0)
    if length > 0:
        e = tl.load(rows_of(e_ptr, 0, b, e_t, e_b) + tag, mask=inside, other=0.0)
        v = tl.load(start_ptr + tag, mask=inside, other=float("-inf")) + e
        odd |= (v != v).to(tl.int32)
        now_ptr = rows_of(v_ptr, 0, b, B * size, size)
        tl.store(now_ptr + tag, v, mask=inside)
        for a in range(1, N):
            nothing = tl.full((BLOCK,), float("-inf"), v.dtype)
            tl.store(now_ptr + a * K + tag, nothing, mask=inside)
        for t in range(1, length):
            e = tl.load(rows_of(e_ptr, t, b, e_t, e_b) + tag, mask=inside, other=0.0)
            before_ptr = rows_of(v_ptr, (t - 1) % 2, b, B * size, size)
            now_ptr = rows_of(v_ptr, t % 2, b, B * size, size)
            at_ptr = rows_of(came_ptr, t, b, B * size, size)
            odd |= (e != e).to(tl.int32)
            tl.debug_barrier()  # what the step before has stored
            top = tl.cast(0.0, v.dtype)  # what is taken off, or float32 would lose the rest
            if t % OFTEN == 0:
                leading = tl.load(before_ptr + tag, mask=inside, other=float("-inf"))
                top = finite(tl.max(leading, 0))
            if ONE:
                head = tl.load(before_ptr + row, mask=row < K, other=float("-inf")) - top
                best, i = best_of(head + moves)
                tl.store(now_ptr + tag, best + e, mask=inside)
                tl.store(at_ptr + tag, i.to(came_ptr.dtype.element_ty), mask=inside)
            else:
                taken = tl.zeros((BLOCK, BLOCK), tl.int32)
                for a in range(0, N):
                    there = (row < K) & (taken < N)
                    heads = tl.load(before_ptr + taken * K + row, mask=there, other=float("-inf"))
                    best, i = best_of(heads - top + moves)
                    at = tl.sum(tl.where(row == i[None, :], taken, 0), 0) * K + i
                    taken += (row == i[None, :]).to(tl.int32)
                    tl.store(now_ptr + a * K + tag, best + e, mask=inside)
                    tl.store(at_ptr + a * K + tag, at.to(came_ptr.dtype.element_ty), mask=inside)
        tl.debug_barrier()
        now_ptr = rows_of(v_ptr, (length - 1) % 2, b, B * size, size)
        is_odd = tl.max(odd, 0) > 0
        ended = tl.zeros((BLOCK,), tl.int32)
        for a in range(0, N):
            head = tl.load(
                now_ptr + ended * K + tag, mask=inside & (ended < N), other=float("-inf")
            )
            best, j = best_of(head + end)
            place = tl.sum(tl.where(tag == j, ended, 0), 0) * K + j
            ended += (tag == j).to(tl.int32)
            instead = tl.where(a == 0, float("nan"), float("-inf"))
            tl.store(score_ptr + b * N + a, tl.where(is_odd, instead.to(best.dtype), best))
            tl.store(place_ptr + b * N + a, place)


@triton.jit(do_not_specialize=["T", "B", "e_t", "e_b"])
def back_kernel(
    e_ptr, e_t, e_b, lengths_ptr, start_ptr, end_ptr, moves_ptr, i_stride, j_stride, came_ptr,
    score_ptr, place_ptr, paths_ptr, T, B, K, N, BLOCK: tl.constexpr
):  # fmt: skip
    """paths (B, N, T) int64, -1 beyond a length and of a score of -inf, and the scores of the
    others, made of the paths in float64. A thread walks a path. Where a score is NaN tags are 0."""
    path = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = path < B * N
    b = path // N
    if lengths_ptr is None:
        length = tl.where(there, T, 0)
    else:
        length = tl.load(lengths_ptr + b, mask=there, other=0).to(tl.int32)
    score = tl.load(score_ptr + path, mask=there, other=float("-inf"))
    place = tl.load(place_ptr + path, mask=there, other=0)
    place = tl.where(score == score, place, 0)
    any_path = score != float("-inf")
    walked = (score == score) & any_path & (length > 0)
    tag = place % K
    total = tl.load(end_ptr + tag, mask=walked, other=0.0).to(tl.float64)
    for k in range(0, T):
        t = T - 1 - k
        within = (t < length) & any_path
        read = within & walked
        tl.store(
            paths_ptr + path.to(tl.int64) * T + t,
            tl.where(within, tag, -1).to(tl.int64),
            mask=there,
        )
        total += tl.load(rows_of(e_ptr, t, b, e_t, e_b) + tag, mask=read, other=0.0)
        goes_on = read & (tl.minimum(t, length) > 0)
        came = rows_of(came_ptr, t, b, B * N * K, N * K) + place
        place = tl.where(goes_on, tl.load(came, mask=goes_on, other=0).to(tl.int32), place)
        before = place % K
        move = moves_ptr + before * i_stride + tag * j_stride
        total += tl.load(move, mask=goes_on, other=0.0)
        tag = before
    total += tl.load(start_ptr + tag, mask=walked, other=0.0)
    tl.store(score_ptr + path, total.to(score_ptr.dtype.element_ty), mask=walked)


def _kernel(function: triton.JITFunction) -> Kernel:
    return Kernel(function, tuple(function.arg_names))


FORWARD = _kernel(forward_kernel)
BACKWARD = _kernel(backward_kernel)
VITERBI = _kernel(viterbi_kernel)
BACK = _kernel(back_kernel)

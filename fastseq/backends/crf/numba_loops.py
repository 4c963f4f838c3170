# ruff: noqa: F821  (the free names of the loops are bound by kernel)
"""The loops over a chain for Numba: on vectors, whose lanes are tags.

A task of forward is a group of ROWS sequences, the longest first, so that those alive at a step are
the first ones. The recursion is the contract's, with

    top(j)  = max_i transitions(i, j),  E(i, j) = exp(transitions(i, j) - top(j))
    s_t(j)  = exp(top(j)) z_t(j),       z_t(j)  = sum_i exp(u_{t-1}(i) - m_{t-1}) E(i, j)

so that a step is a product of a few rows with E, and a log and an exp for each tag. Where z_t(j) is
too small to be right, what counts has underflowed: log s_t(j) is made of u_{t-1} itself.

Backward has the same product with E^T. The counts of transitions are E times products of two
matrices, which have a row for each step of a sequence. They are made when FLUSH rows are there, and
are added up in double, by parts of the batch, whose number depends on no number of threads.

A matrix has rows of W numbers: K, and padding up to whole vectors. Each thread has a room, whose
beginning `prepare` fills.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from ...cells import bind
from ..numba_loops import Kernel
from ..numba_simd import JIT, digest, simd
from . import OFTEN, numba_words

#: Sequences of a group: accumulators enough to hide the latency of a product.
ROWS = 8
#: Rows of the counts' products: for 20 tags in float32 both operands, 32 KB, stay in cache.
FLUSH = 128
#: A sum z below this is made again. The terms that it may lack are below the least normal number,
#: 1e-38 (float64: 1e-308), so that it is right to 1e-14; and of p / z no sum overflows.
LEAST = {np.float32: 1e-24, np.float64: 1e-290}


def copied(source, row_stride, column_stride, rows, columns, W, out):
    """(rows, columns) in rows of W, with -inf behind."""
    apart()
    for i in range(rows):
        for j in range(columns):
            store1(out, i * W + j, load1(source, i * row_stride + j * column_stride))
        for j in range(columns, W):
            store1(out, i * W + j, NOTHING)


def prepare(moves, i_stride, j_stride, start, end, K, W, room):
    """E, E^T and the transitions' transpose (K, W); top, start, end and 0 (W), with -inf behind."""
    apart()
    matrix, row = K * W * ITEMSIZE, W * ITEMSIZE
    E, E_t, moves_t, top = room, room + matrix, room + 2 * matrix, room + 3 * matrix
    copied(moves, j_stride, i_stride, K, K, W, moves_t)
    copied(start, 0, 1, 1, K, W, top + row)
    copied(end, 0, 1, 1, K, W, top + 2 * row)
    for v in range(0, W, LANES):
        store(top, v, splat(NOTHING))
        store(top + 3 * row, v, splat(NOTHING))
        for i in range(K):
            store(E, i * W + v, splat(ZERO))
    for j in range(K):
        highest = highest_of(moves_t + j * row, W)
        store1(top, j, highest)
        store1(top + 3 * row, j, ZERO)
        if highest == NOTHING:
            highest = ZERO
        for v in range(0, W, LANES):
            store(E_t, j * W + v, exp(load(moves_t, j * W + v) - splat(highest)))
        for i in range(K):
            store1(E, i * W + j, load1(E_t, j * W + i))


def highest_of(row, W):
    apart()
    most = load(row, 0)
    for v in range(LANES, W, LANES):
        most = larger(most, load(row, v))
    return largest(most)


def product(a, a_row, a_step, w, W, out, rows, inner):
    """out (rows, W) = sum_k a[r * a_row + k * a_step] w[k * W + j], each a chain over k."""
    apart()
    zero = splat(ZERO)
    for v in range(0, W, LANES):
        r = 0
        while r + 8 <= rows:
            s_0, s_1, s_2, s_3, s_4, s_5, s_6, s_7 = zero, zero, zero, zero, zero, zero, zero, zero
            for k in range(inner):
                x, a_k = load(w, k * W + v), r * a_row + k * a_step
                s_0 = fma(splat(load1(a, a_k)), x, s_0)
                s_1 = fma(splat(load1(a, a_k + a_row)), x, s_1)
                s_2 = fma(splat(load1(a, a_k + 2 * a_row)), x, s_2)
                s_3 = fma(splat(load1(a, a_k + 3 * a_row)), x, s_3)
                s_4 = fma(splat(load1(a, a_k + 4 * a_row)), x, s_4)
                s_5 = fma(splat(load1(a, a_k + 5 * a_row)), x, s_5)
                s_6 = fma(splat(load1(a, a_k + 6 * a_row)), x, s_6)
                s_7 = fma(splat(load1(a, a_k + 7 * a_row)), x, s_7)
            store(out, r * W + v, s_0)
            store(out, (r + 1) * W + v, s_1)
            store(out, (r + 2) * W + v, s_2)
            store(out, (r + 3) * W + v, s_3)
            store(out, (r + 4) * W + v, s_4)
            store(out, (r + 5) * W + v, s_5)
            store(out, (r + 6) * W + v, s_6)
            store(out, (r + 7) * W + v, s_7)
            r += 8
        while r < rows:
            s_0 = zero
            for k in range(inner):
                s_0 = fma(splat(load1(a, r * a_row + k * a_step)), load(w, k * W + v), s_0)
            store(out, r * W + v, s_0)
            r += 1


def log_sum(u, moves_t, W):
    """log sum_i exp(u(i) + moves_t(i)), a number."""
    apart()
    most = splat(NOTHING)
    for v in range(0, W, LANES):
        most = larger(most, load(u, v) + load(moves_t, v))
    highest = largest(most)
    if highest == NOTHING:
        return highest
    parts = splat(ZERO)
    for v in range(0, W, LANES):
        parts = parts + exp(load(u, v) + load(moves_t, v) - splat(highest))
    return highest + largest(log(splat(total(parts))))


def forward_loop(data):
    """A task is a group. Its first tag that is none is told: 1 + t * B + b."""
    apart()
    groups, slot = load_int(data, 1), take(data + 16)
    B, K, W = load_int(data, 4), load_int(data, 5), load_int(data, 6)
    order, lengths = load_int(data, 7), load_int(data, 8)
    e, e_t, e_b = load_int(data, 9), load_int(data, 10), load_int(data, 11)
    moves, i_stride, j_stride = load_int(data, 12), load_int(data, 13), load_int(data, 14)
    start, end = load_int(data, 15), load_int(data, 16)
    tags, tags_t, tags_b = load_int(data, 17), load_int(data, 18), load_int(data, 19)
    matrix, row = K * W * ITEMSIZE, W * ITEMSIZE
    E = load_int(data, 20) + slot * load_int(data, 21)
    u, value, fault = load_int(data, 22), load_int(data, 23), load_int(data, 24)

    moves_t, top = E + 2 * matrix, E + 3 * matrix
    first, last = top + row, top + 2 * row
    steps_of = top + 4 * row  # u of two steps
    q, z = steps_of + 2 * ROWS * row, steps_of + 3 * ROWS * row
    m = steps_of + 4 * ROWS * row
    log_z, score, tags_before = m + 64, m + 128, m + 192  # of 8 bytes each
    group = take(data)
    if group < groups:
        prepare(moves, i_stride, j_stride, start, end, K, W, E)
        for v in range(0, ROWS * W, LANES):
            store(q, v, splat(ZERO))
    while group < groups:
        b_0 = group * ROWS
        alive = min(ROWS, B - b_0)
        for r in range(alive):
            store_double(log_z, r, NONE)
            store_double(score, r, NONE)
            if load_int(lengths, b_0 + r) == 0:
                store1(value, load_int(order, b_0 + r), ZERO)
        for t in range(load_int(lengths, b_0)):
            while load_int(lengths, b_0 + alive - 1) <= t:
                alive -= 1
            before, now = steps_of + (t + 1) % 2 * ROWS * row, steps_of + t % 2 * ROWS * row
            if t:
                product(q, W, 1, E, W, z, ROWS if alive > 2 else alive, K)
            for r in range(alive):
                b = load_int(order, b_0 + r)
                e_row, u_row = e + (t * e_t + b * e_b) * ITEMSIZE, now + r * row
                most = splat(NOTHING)
                for v in range(0, W, LANES):
                    x = load_part(e_row, v, K - v)
                    if t:
                        sums = load(z, r * W + v)
                        x = x + load(top, v) + log(sums)
                        if below(sums, LEAST, load(top, v)):
                            store(u_row, v, x)
                            for j in range(v, min(v + LANES, K)):
                                if load1(z, r * W + j) < LEAST:
                                    log_s = log_sum(before + r * row, moves_t + j * row, W)
                                    store1(u_row, j, load1(e_row, j) + (log_s - load1(m, r)))
                            x = load(u_row, v)
                    else:
                        x = x + load(first, v)
                    store(u_row, v, x)
                    most = larger(most, x)
                    if u:
                        store_part(u, (t * B + b) * K + v, x, K - v)
                if t:
                    add_double(log_z, r, double(load1(m, r)))
                highest = largest(most)
                if highest == NOTHING:
                    highest = ZERO
                store1(m, r, highest)
                if tags:
                    tag = load_int(tags, t * tags_t + b * tags_b)
                    if tag < 0 or tag >= K:
                        if load_int(fault, group) == 0:
                            store_int(fault, group, 1 + t * B + b)
                        tag = 0
                    move = load1(start, tag)
                    if t:
                        move = load1(moves, load_int(tags_before, r) * i_stride + tag * j_stride)
                    store_int(tags_before, r, tag)
                    add_double(score, r, double(load1(e_row, tag)) + double(move))
                if load_int(lengths, b_0 + r) == t + 1:
                    found = load_double(log_z, r) + double(log_sum(u_row, last, W))
                    if tags:
                        found = load_double(score, r) + double(load1(end, tag)) - found
                    store1(value, b, real(found))
            for r in range(alive):
                for v in range(r * W, (r + 1) * W, LANES):
                    store(q, v, exp(load(now, v) - splat(load1(m, r))))
        group = take(data)


def begin(u, last, K, W, p):
    """p = softmax(u + end), of a sequence's last step; 0 where it has no path at all."""
    apart()
    for v in range(0, W, LANES):
        store(p, v, load_part(u, v, K - v))
    log_z = log_sum(p, last, W)
    for v in range(0, W, LANES):
        x = exp(load(p, v) + load(last, v) - splat(log_z))
        store(p, v, splat(ZERO) if log_z == NOTHING else x)


def ratios(p, u, e, top, K, W, r):
    """r = p / z, and 0 where z was made again; whether it was, of a tag of some probability."""
    apart()
    away = False
    for v in range(0, W, LANES):
        log_z = load_part(u, v, K - v) - load_part(e, v, K - v) - load(top, v)
        store(r, v, ratio(log_z, LOG_LEAST, load(p, v)))
        away = away or missed(log_z, LOG_LEAST, load(p, v))
    return away


def weights(u, g, pad, K, W, q, Q):
    """q = exp(u - m), and g q in Q. Returns m."""
    apart()
    most = splat(NOTHING)
    for v in range(0, W, LANES):
        x = load_part(u, v, K - v) + load(pad, v)
        store(q, v, x)
        most = larger(most, x)
    m = largest(most)
    if m == NOTHING:
        m = ZERO
    for v in range(0, W, LANES):
        x = exp(load(q, v) - splat(m))
        store(q, v, x)
        store(Q, v, splat(g) * x)
    return m


def add_far(p, r, u, e, u_before, m, g, moves_t, K, W, p_before, counts):
    """What `ratios` left out, tag by tag: w(i, j) = p(j) exp(u_before(i) + transitions(i, j) - m
    - log s(j))."""
    apart()
    for j in range(K):
        if load1(p, j) != ZERO and load1(r, j) == ZERO:
            log_s = load1(u, j) - load1(e, j) + m
            for i in range(K):
                x = load1(u_before, i) + load1(moves_t, j * W + i) - log_s
                w = load1(p, j) * largest(exp(splat(x)))
                store1(p_before, i, load1(p_before, i) + w)
                if counts:
                    add_double(counts, i * W + j, double(g * w))


def made_one(p, W):
    """p by its sum, which drifts away from 1 as rounding adds up; of no path at all it stays 0."""
    apart()
    parts = splat(ZERO)
    for v in range(0, W, LANES):
        parts = parts + load(p, v)
    sum_of_p = total(parts)
    if sum_of_p > ZERO:
        for v in range(0, W, LANES):
            store(p, v, load(p, v) * splat(ONE / sum_of_p))


def flush(Q, R, E, room, counts, K, W, n):
    """counts (K, W) += E * (Q^T R), of n rows; Q and R begin with them."""
    apart()
    product(Q, 1, W, R, W, room, (K + 7) // 8 * 8, n)
    for v in range(0, K * W, LANES):
        add_doubles(counts, v, load(E, v) * load(room, v))


def backward_loop(data):
    """A task is a part of the batch, some groups. Gradients of parameters are in doubles, a part's
    (K + 2, W): of transitions, start and end."""
    apart()
    parts, slot = load_int(data, 1), take(data + 16)
    T, B, K, W = load_int(data, 3), load_int(data, 4), load_int(data, 5), load_int(data, 6)
    order, lengths = load_int(data, 7), load_int(data, 8)
    e, e_t, e_b = load_int(data, 9), load_int(data, 10), load_int(data, 11)
    moves, i_stride, j_stride = load_int(data, 12), load_int(data, 13), load_int(data, 14)
    start, end = load_int(data, 15), load_int(data, 16)
    tags, tags_t, tags_b = load_int(data, 17), load_int(data, 18), load_int(data, 19)
    E, matrix, row = load_int(data, 20) + slot * load_int(data, 21), K * W * ITEMSIZE, W * ITEMSIZE
    u, dvalue, de, wanted = (
        load_int(data, 22), load_int(data, 23), load_int(data, 24), load_int(data, 25)
    )  # fmt: skip

    E_t, moves_t, top = E + matrix, E + 2 * matrix, E + 3 * matrix
    last, pad, p_of = top + 2 * row, top + 3 * row, top + 4 * row  # p of two steps
    q, z = p_of + 2 * ROWS * row, p_of + 3 * ROWS * row
    Q, R = z + ROWS * row, z + (ROWS + FLUSH) * row
    scratch = R + FLUSH * row
    sign = -ONE if tags else ONE  # of log Z in the value
    part = take(data)
    if part < parts:
        prepare(moves, i_stride, j_stride, start, end, K, W, E)
    groups = (B + ROWS - 1) // ROWS
    while part < parts:
        counts = wanted + part * (K + 2) * W * 8 if wanted else 0
        dstart, dend = counts + K * W * 8, counts + (K + 1) * W * 8
        n = 0  # rows of Q and R
        for group in range(groups * part // parts, groups * (part + 1) // parts):
            b_0 = group * ROWS
            rows, alive, t = min(ROWS, B - b_0), 0, T
            while t > 0:
                t -= 1
                now, before = p_of + t % 2 * ROWS * row, p_of + (t + 1) % 2 * ROWS * row
                while alive < rows and load_int(lengths, b_0 + alive) > t:
                    at = (t * B + load_int(order, b_0 + alive)) * K
                    begin(u + at * ITEMSIZE, last, K, W, now + alive * row)
                    alive += 1
                if n + ROWS > FLUSH:
                    if counts:
                        flush(Q, R, E, scratch, counts, K, W, n)
                    n = 0
                far = 0  # the rows of which something is left out, as bits
                for r in range(rows):
                    b = load_int(order, b_0 + r)
                    at = (t * B + b) * K
                    de_row = de + at * ITEMSIZE
                    if r >= alive:
                        for v in range(0, K, LANES):
                            store_part(de_row, v, splat(ZERO), K - v)
                        continue
                    g = sign * load1(dvalue, b)
                    p = now + r * row
                    for v in range(0, K, LANES):
                        store_part(de_row, v, splat(g) * load(p, v), K - v)
                    if tags:
                        tag = load_int(tags, t * tags_t + b * tags_b)
                        store1(de_row, tag, load1(de_row, tag) - g)
                        if t and counts:
                            old = load_int(tags, (t - 1) * tags_t + b * tags_b)
                            add_double(counts, old * W + tag, -double(g))
                    if counts and load_int(lengths, b_0 + r) == t + 1:
                        for v in range(0, W, LANES):
                            add_doubles(dend, v, load_part(de_row, v, K - v))
                    if counts and t == 0:
                        for v in range(0, W, LANES):
                            add_doubles(dstart, v, load_part(de_row, v, K - v))
                    if t:
                        e_row = e + (t * e_t + b * e_b) * ITEMSIZE
                        u_row, Q_row = u + at * ITEMSIZE, Q + (n + r) * row
                        if ratios(p, u_row, e_row, top, K, W, R + (n + r) * row):
                            far |= 1 << r
                        weights(u_row - B * K * ITEMSIZE, g, pad, K, W, q + r * row, Q_row)
                if t:
                    size = ROWS if alive > 2 else alive
                    product(R + n * row, W, 1, E_t, W, z, size, K)
                    for v in range(0, alive * W, LANES):
                        store(before, v, load(q, v) * load(z, v))
                    for r in range(alive):
                        if far >> r & 1:
                            b = load_int(order, b_0 + r)
                            at = (t * B + b) * K
                            e_row = e + (t * e_t + b * e_b) * ITEMSIZE
                            u_row, u_before = u + at * ITEMSIZE, u + (at - B * K) * ITEMSIZE
                            g = sign * load1(dvalue, b)
                            m = weights(u_before, g, pad, K, W, q + r * row, Q + (n + r) * row)
                            add_far(
                                now + r * row, R + (n + r) * row, u_row, e_row, u_before, m, g,
                                moves_t, K, W, before + r * row, counts
                            )  # fmt: skip
                        if t % OFTEN == 0:
                            made_one(before + r * row, W)
                    n += alive
        if counts:
            flush(Q, R, E, scratch, counts, K, W, n)
        part = take(data)


def best(v_before, moves, e, K, W, v_now):
    """v_now(j) = e(j) + max_i (v_before(i) + moves(i, j))."""
    apart()
    for v in range(0, W, LANES):
        most = splat(NOTHING)
        for i in range(K):
            most = larger(most, splat(load1(v_before, i)) + load(moves, i * W + v))
        store(v_now, v, most + load_part(e, v, K - v))


def n_best(v_before, moves, e, n, K, W, v_now, room):
    """The same of the n best (n, W) before, sorted: four that stay in registers, then of what is
    left the next four, and so on."""
    apart()
    for v in range(0, W, LANES):
        e_v = load_part(e, v, K - v)
        for a in range(0, n, 4):
            s_0, s_1, s_2 = splat(NOTHING), splat(NOTHING), splat(NOTHING)
            s_3 = splat(NOTHING)
            for c in range(n):
                for i in range(K):
                    if a == 0:
                        x = splat(load1(v_before, c * W + i)) + load(moves, i * W + v)
                    else:
                        x = load(room, (c * K + i) * LANES)
                    s_0, x = larger(s_0, x), lesser(s_0, x)
                    s_1, x = larger(s_1, x), lesser(s_1, x)
                    s_2, x = larger(s_2, x), lesser(s_2, x)
                    s_3, x = larger(s_3, x), lesser(s_3, x)
                    if a + 4 < n:
                        store(room, (c * K + i) * LANES, x)
            store(v_now, a * W + v, s_0 + e_v)
            if a + 1 < n:
                store(v_now, (a + 1) * W + v, s_1 + e_v)
            if a + 2 < n:
                store(v_now, (a + 2) * W + v, s_2 + e_v)
            if a + 3 < n:
                store(v_now, (a + 3) * W + v, s_3 + e_v)


def came_from(v_before, moves_t, e, top, x, rank, n, W):
    """Which place c * W + i of v_before (n, W), with the move and e added and top taken off, is x,
    and has so many others of the same sum before it."""
    apart()
    for c in range(n):
        for v in range(0, W, LANES):
            sums = load(v_before, c * W + v) + load(moves_t, v) + splat(e) - splat(top)
            if has(sums, x):
                for i in range(v, v + LANES):
                    if load1(v_before, c * W + i) + load1(moves_t, i) + e - top == x:
                        if rank == 0:
                            return c * W + i
                        rank -= 1
    return 0


def rank_of(v, place, W):
    """Of the values that are sorted along with one of v (n, W), how many of the same are before."""
    apart()
    x, rank = load1(v, place), 0
    while place >= W:
        place -= W
        if load1(v, place) == x:
            rank += 1
    return rank


def odd(row, W):
    """Whether one of W numbers is NaN."""
    apart()
    for v in range(0, W, LANES):
        if unordered(load(row, v)):
            return True
    return False


def trace(place, e, e_t, tops, steps, v_of, last, first, moves_w, moves_t, n, K, W, path):
    """Writes the tags of the path that ends at a place of the last step. Returns its score."""
    apart()
    row, t, j = W * ITEMSIZE, steps - 1, place % W
    total_score = double(load1(last, j))
    while t > 0:
        v_now, top = v_of + t * n * row, load1(tops, t)
        x, rank, x_e = load1(v_now, place), rank_of(v_now, place, W), load1(e, t * e_t + j)
        place = came_from(v_now - n * row, moves_t + j * row, x_e, top, x, rank, n, W)
        store_int(path, t, j)
        total_score += double(x_e) + double(load1(moves_w, place % W * W + j))
        t, j = t - 1, place % W
    store_int(path, 0, j)
    return total_score + double(load1(e, j)) + double(load1(first, j))


def viterbi_loop(data):
    """A task is a sequence. Of every step the room keeps v (n, W): the scores of the n best paths
    to each tag, sorted. The way back finds again where each came from."""
    apart()
    slot = take(data + 16)
    T, B, K, W = load_int(data, 3), load_int(data, 4), load_int(data, 5), load_int(data, 6)
    lengths = load_int(data, 8)
    e, e_t, e_b = load_int(data, 9), load_int(data, 10), load_int(data, 11)
    moves, i_stride, j_stride = load_int(data, 12), load_int(data, 13), load_int(data, 14)
    start, end = load_int(data, 15), load_int(data, 16)
    moves_w, row = load_int(data, 20) + slot * load_int(data, 21), W * ITEMSIZE
    scores, paths, n = load_int(data, 22), load_int(data, 23), load_int(data, 24)

    moves_t, first = moves_w + K * row, moves_w + 2 * K * row
    last, ends = first + row, first + 2 * row
    left = ends + n * row
    v_of = left + n * K * LANES * ITEMSIZE  # of every step
    tops = v_of + T * n * row  # what was taken off at every step
    b, end_is_odd, moves_are_odd = take(data), False, False
    if b < B:
        copied(moves, i_stride, j_stride, K, K, W, moves_w)
        copied(moves, j_stride, i_stride, K, K, W, moves_t)
        copied(start, 0, 1, 1, K, W, first)
        copied(end, 0, 1, 1, K, W, last)
        end_is_odd, moves_are_odd = odd(last, W), odd(moves_w, K * W)
    while b < B:
        steps, e_b_0 = load_int(lengths, b), e + b * e_b * ITEMSIZE
        is_odd = (steps > 0 and end_is_odd) or (steps > 1 and moves_are_odd)
        for t in range(steps):
            v_now, e_row = v_of + t * n * row, e_b_0 + t * e_t * ITEMSIZE
            if t and n == 1:
                best(v_now - row, moves_w, e_row, K, W, v_now)
            elif t:
                n_best(v_now - n * row, moves_w, e_row, n, K, W, v_now, left)
            else:
                for v in range(0, W, LANES):
                    store(v_now, v, load(first, v) + load_part(e_row, v, K - v))
                    for a in range(1, n):
                        store(v_now, a * W + v, splat(NOTHING))
            is_odd = is_odd or odd(v_now, W)
            top = ZERO
            if t and t % OFTEN == 0:
                top = highest_of(v_now, W)
                if top == NOTHING:
                    top = ZERO
                for v in range(0, n * W, LANES):
                    store(v_now, v, load(v_now, v) - splat(top))
            store1(tops, t, top)
        v_now = v_of + (steps - 1) * n * row
        for a in range(n if steps else 0):
            for v in range(0, W, LANES):
                store(ends, a * W + v, load(v_now, a * W + v) + load(last, v))
        for k in range(n):
            path, score = paths + (b * n + k) * T * 8, ZERO if k == 0 and steps == 0 else NOTHING
            for t in range(T):
                store_int(path, t, -1)
            if is_odd:
                if k == 0:
                    score = NAN
                    for t in range(steps):
                        store_int(path, t, 0)
            elif steps:
                score = highest_of(ends, n * W)
                if score != NOTHING:
                    place = 0
                    while load1(ends, place) != score:
                        place += 1
                    store1(ends, place, NOTHING)
                    score = real(
                        trace(
                            place, e_b_0, e_t, tops, steps, v_of, last, first, moves_w, moves_t,
                            n, K, W, path
                        )
                    )  # fmt: skip
            store1(scores, b * n + k, score)
        b = take(data)


#: In an order in which each comes behind those that it calls.
_HELPERS = (
    copied, highest_of, prepare, product, log_sum, begin, ratios, weights, add_far, made_one, flush,
    best, n_best, rank_of, came_from, trace, odd
)  # fmt: skip


@cache
def _vocabulary(dtype: Any) -> tuple[str, dict[str, Any]]:
    """A label that hashes the sources, and what the loops' free names are, of vectors of a type."""
    s = simd(dtype)
    label = f"{s.fingerprint}_{digest(__name__, numba_words.__name__, __package__)[:16]}"
    names = vars(s) | numba_words.words(dtype, s.LANES)
    names |= {"ROWS": ROWS, "FLUSH": FLUSH, "OFTEN": OFTEN, "NONE": 0.0}
    names |= {"LEAST": dtype(LEAST[dtype]), "LOG_LEAST": dtype(np.log(LEAST[dtype]))}
    names |= {"NOTHING": dtype(-np.inf), "NAN": dtype(np.nan)}
    names |= {"ZERO": dtype(0), "ONE": dtype(1), "min": min, "range": range}
    for helper in _HELPERS:
        names[helper.__name__] = numba.njit(**JIT)(bind(helper, label, **names))
    return label, names


@cache
def kernel(text: Any, dtype: Any) -> Kernel:
    """A loop, bound to vectors of ``dtype``.

    Numba's disk cache sees names and byte code alone, so that names hash what is bound in.
    """
    label, names = _vocabulary(dtype)
    return Kernel(bind(text, label, **names))

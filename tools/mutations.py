"""What tools/mutate.py breaks, and the tests that must notice.

An old text stands exactly once in its file. Where the code moves, its mutation moves along.
"""

from typing import NamedTuple


class Mutation(NamedTuple):
    name: str  # what goes wrong
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # words for pytest, a file or a node of it each


WINDOWS = ("tests/test_native_windows.py::test_windows",)
ROWS = ("tests/test_native_windows.py::test_many_rows",)
NUMBAS_ROWS = ("tests/test_native_windows.py::test_many_rows_of_numba",)
WIDE = ("tests/test_native_windows.py::test_wide_products",)
TRITON = ("tests/test_triton.py::test_under_the_interpreter",)
SERVED = ("tests/test_served.py",)
KERNELS, LOOPS, PRODUCT = "csrc/cpu/kernels.cpp", "csrc/cpu/loops.h", "csrc/cpu/product.h"
NUMBA, NUMBA_LOOPS = "fastseq/backends/numba.py", "fastseq/backends/numba_loops.py"
PADDING, STACK = "fastseq/ops/padding.py", "fastseq/ops/stack.py"
AUTOGRAD, EAGER = "fastseq/ops/autograd.py", "fastseq/backends/eager.py"


def parity(backend_and_cell: str, special: str) -> tuple[str, ...]:
    """A test of tests/test_parity.py, in float32."""
    return (f"tests/test_parity.py::test_special[{backend_and_cell}-{special}-float32]",)


MUTATIONS = (
    # Native's windows
    Mutation(
        "native: the last window alone is summed",
        KERNELS,
        "N, parts, 4, input, recurrent, sums, !begin);",
        "N, parts, 4, input, recurrent, sums, false);",
        WINDOWS,
    ),
    Mutation(
        "native: the first window alone is summed",
        KERNELS,
        "if (call.weights)\n",
        "if (call.weights && (k == 0 || end >= in.steps))\n",
        WINDOWS,
    ),
    Mutation(
        "native: the reverse direction takes forward's windows",
        KERNELS,
        "shared.set(call.recurrence[r].reverse, k, end, now[r]);",
        "shared.set(false, k, end, now[r]);",
        WINDOWS,
    ),
    Mutation(
        "native: dx of the last window alone",
        KERNELS,
        "if (call.dx) gradients.dx(",
        "if (call.dx && end >= in.steps) gradients.dx(",
        WINDOWS,
    ),
    Mutation(
        "native: a window begins one step late",
        KERNELS,
        "w->t0 = reverse ? k : in.steps - end;",
        "w->t0 = reverse ? k : in.steps - end + (end < in.steps);",
        WINDOWS,
    ),
    Mutation(
        "native: dh does not cross a window's edge",
        LOOPS,
        "operand[b] = after(s, own) && !cut(s, own)",
        "operand[b] = after(s, own) && !cut(s, own) && s.after >= now.t0 && s.after < now.t1",
        WINDOWS,
    ),
    Mutation(
        "native: the biases' gradients of the last window alone",
        PRODUCT,
        "  if (!add)\n    for (int c = 0; c < count; ++c)",
        "  if (true)\n    for (int c = 0; c < count; ++c)",
        WINDOWS,
    ),
    Mutation(
        "native: the units' gradients of the last chain alone",
        LOOPS,
        "dunit[H + u] += dunit[u]",
        "dunit[H + u] = dunit[u]",
        WINDOWS,
    ),
    Mutation(
        "native: dW_hh without h_mask",
        LOOPS,
        "        now.h_prev[at] = product;\n",
        "",
        WINDOWS,
    ),
    Mutation(
        "native: dW_hh without reset",
        LOOPS,
        "      if (r.reset && r.reset[n]) h = zeros;\n",
        "",
        WINDOWS,
    ),
    Mutation(
        "native: the second phase's dW_hh of the last window alone",
        KERNELS,
        "N, second, 1, value, none, unused, !begin);",
        "N, second, 1, value, none, unused, false);",
        WINDOWS,
    ),
    Mutation(
        "native: dW_hr of the last window alone",
        KERNELS,
        "N, all, 1, m, none, unused, !begin);",
        "N, all, 1, m, none, unused, false);",
        WINDOWS,
    ),
    Mutation(
        "native: the last chunk of a sum over rows alone",
        PRODUCT,
        "const bool adds = add || k0 > 0;",
        "const bool adds = add;",
        ROWS,
    ),
    # Numba's loops and products
    Mutation(
        "numba: the last piece of a product alone",
        "fastseq/backends/numba_products.py",
        "rows, n, columns, k > 0)",
        "rows, n, columns, False)",
        (*NUMBAS_ROWS, *WIDE),
    ),
    Mutation(
        "numba: a chain of the units' gradients counts twice",
        NUMBA_LOOPS,
        "        store1(dunit_0, i, ZERO)\n",
        "",
        NUMBAS_ROWS,
    ),
    Mutation(
        "numba: the units' gradients of one task alone",
        NUMBA,
        "for d in dunits)",
        "for d in dunits[:1])",
        NUMBAS_ROWS,
    ),
    Mutation(
        "numba: backward walks as if time ran forward",
        NUMBA_LOOPS,
        'walk="step if reverse else T - 1 - step"',
        'walk="T - 1 - step"',
        parity("numba-lstm", "reset"),
    ),
    Mutation(
        "numba: dW_hh without reset",
        NUMBA,
        "h.masked_fill_(self.reset[r, : self.rows.N, None], 0)",
        "pass",
        parity("numba-lstm", "reset"),
    ),
    Mutation(
        "numba: dW_hh without h_mask",
        NUMBA,
        "h *= self.h_mask[r].index_select(0, row)",
        "pass",
        parity("numba-lstm", "h_mask"),
    ),
    Mutation(
        "numba: the first direction's h_mask for both",
        NUMBA,
        '_address(task.h_mask[r]),\n            "operand": _address(operand),\n            "b_hh"',
        '_address(task.h_mask[0]),\n            "operand": _address(operand),\n            "b_hh"',
        parity("numba-lstm", "h_mask"),
    ),
    Mutation(
        "numba: backward writes over the saved gates",
        NUMBA,
        "dgates = [task.new(N, cell.G * H) for _ in range(R)]",
        "dgates = [task.new(N, cell.G * H) if k.gates is None else k.gates[:N] for k in kept]",
        ("tests/test_properties.py::test_a_second_backward_gives_the_same_bits",),
    ),
    Mutation(
        "numba: backward writes to the gradients it is given",
        NUMBA,
        "else g.to(dtype).clone(memory_format=torch.contiguous_format)",
        "else g.to(dtype).contiguous()",
        ("tests/test_properties.py::test_inputs_are_never_written_to",),
    ),
    Mutation(
        "numba: lean memory begins with c_0 of zeros",
        NUMBA,
        '"""\n    finals = [s.clone() for s in task.states]',
        '"""\n    finals = [torch.zeros_like(s) for s in task.states]',
        ("tests/test_parity.py::test_lean",),
    ),
    # Triton's grids, under its interpreter
    Mutation(
        "triton: a program walks one tile of the batch alone",
        "fastseq/backends/triton_text.py",
        "range(tl.program_id(0), tiles, tl.num_programs(0))",
        "range(tl.program_id(0), tl.num_programs(0))",
        TRITON,
    ),
    Mutation(
        "triton: the first parts of an operand alone",
        "fastseq/backends/triton_text.py",
        "for start in range(0, count, step):",
        "for start in range(0, step, step):",
        TRITON,
    ),
    # The equations and the reference
    Mutation(
        "cells: the LSTM's forget gate takes the new c",
        "fastseq/cells/lstm.py",
        "dc_total * c_prev * dsigmoid(f)",
        "dc_total * c * dsigmoid(f)",
        ("tests/test_cells.py::test_backward_is_the_complex_step_derivative",),
    ),
    Mutation(
        "cells: the GRU's gates trade places",
        "fastseq/cells/gru.py",
        "def gru_forward(a_r, a_z, x_n, s_n, h_prev):\n    r = sigmoid(a_r)\n    z = sigmoid(a_z)",
        "def gru_forward(a_r, a_z, x_n, s_n, h_prev):\n    r = sigmoid(a_z)\n    z = sigmoid(a_r)",
        ("tests/test_reference.py::test_against_torch",),
    ),
    Mutation(
        "reference: no gradient is cut where reset",
        "fastseq/reference.py",
        "value = np.where(tape.reset[rows, None], 0.0, value)",
        "pass",
        ("tests/test_reference.py::test_against_the_independent_writing",),
    ),
    Mutation(
        "reference: dh without h_mask",
        "fastseq/reference.py",
        "doperand = doperand * h_mask[:B_t]",
        "pass",
        ("tests/test_reference.py::test_against_the_independent_writing",),
    ),
    # The eager form
    Mutation(
        "eager: the reverse direction's outputs stand backwards",
        EAGER,
        "        outputs.reverse()\n",
        "",
        parity("eager-lstm", "two layers"),
    ),
    Mutation(
        "eager: the sequences that ended lose their state",
        EAGER,
        "torch.cat([now[state], carried[B_t:]])",
        "torch.cat([now[state], 0 * carried[B_t:]])",
        parity("eager-lstm", "ragged"),
    ),
    Mutation(
        "eager: the first direction's h_mask for both",
        EAGER,
        "None if call.h_mask is None else call.h_mask[r]",
        "None if call.h_mask is None else call.h_mask[0]",
        parity("eager-lstm", "h_mask"),
    ),
    # What users pass, and what becomes of it
    Mutation(
        "reset: the reverse direction takes forward's",
        PADDING,
        "reset.roll(-1, 0).masked_fill(last[:, None], False)",
        "reset",
        parity("eager-lstm", "reset"),
    ),
    Mutation(
        "lengths: the states are not put back in order",
        PADDING,
        "self._on(state, self.restore)",
        "self._on(state, torch.arange(self.B))",
        parity("eager-lstm", "ragged"),
    ),
    Mutation(
        "lengths: the states are not sorted",
        PADDING,
        "self._on(state, self.order)",
        "self._on(state, torch.arange(self.B))",
        parity("eager-lstm", "ragged"),
    ),
    Mutation(
        "lengths: reset is not sorted",
        STACK,
        "stack.reset = stack.reset.index_select(1, padding.order)",
        "pass",
        parity("eager-lstm", "all at once"),
    ),
    Mutation(
        "lengths: h_mask is not sorted",
        STACK,
        "stack.h_mask = padding.sort(stack.h_mask)",
        "pass",
        parity("eager-lstm", "all at once"),
    ),
    Mutation(
        "stack: every layer takes the first one's h_mask",
        STACK,
        "stack.h_mask.narrow(0, layer * D, D)",
        "stack.h_mask.narrow(0, 0, D)",
        parity("eager-lstm", "all at once"),
    ),
    Mutation(
        "packed: the states are not put back in order",
        "fastseq/nn/recurrent.py",
        "finals = [s.index_select(1, unsorted_indices) for s in finals]",
        "pass",
        ("tests/test_calling.py::test_packed",),
    ),
    Mutation(
        "masks: zoneout of both directions is one",
        "fastseq/ops/masks.py",
        "return kind | direction << 3 | layer << 4",
        "return kind | layer << 4",
        ("tests/test_masks.py::test_no_two_places_share_a_mask",),
    ),
    # Autograd and the choice
    Mutation(
        "autograd: the initial states' gradients trade places",
        AUTOGRAD,
        "grads += dstates[: layout.n_states]",
        "grads += dstates[: layout.n_states][::-1]",
        parity("numba-lstm", "reset"),
    ),
    Mutation(
        "autograd: second derivatives as if time ran forward",
        AUTOGRAD,
        "        rest[n:],\n        layout.reverse,\n",
        "        rest[n:],\n        (False,) * len(layout.reverse),\n",
        ("tests/test_derivatives.py::test_gradgradcheck",),
    ),
    Mutation(
        "vmap: folded sequences keep the other members' lengths",
        "fastseq/ops/batching.py",
        "None if batch_sizes is None else batch_sizes * V",
        "batch_sizes",
        ("tests/test_transforms.py::test_lengths",),
    ),
    Mutation(
        "choice: a backend that declines falls back in silence",
        "fastseq/backends/choice.py",
        "if backend is None else names(backend):",
        'if backend is None else (*names(backend), "eager"):',
        ("tests/test_choice.py",),
    ),
    Mutation(
        "native: an extension of other sources is refused",
        "fastseq/backends/native.py",
        '"instruction_sets": "() -> [name]"',
        '"instruction_sets": "() -> [names]"',
        ("tests/test_served.py::test_native_serves_where_there_is_a_compiler",),
    ),
    Mutation(
        "layers: the short way takes no heed of the backend named",
        "fastseq/nn/direct.py",
        'module.backend in (None, "native")',
        "True",
        SERVED,
    ),
    Mutation(
        "layers: the kernels of whole stacks drop out",
        "fastseq/ops/whole.py",
        "    return cell in _numbers\n",
        "    return False\n",
        SERVED,
    ),
    Mutation(
        "autograd: numba's backward is the eager form's",
        AUTOGRAD,
        "            if torch.autograd.forward_ad._current_level >= 0:",
        "            if True:",
        SERVED,
    ),
)

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
ABILITIES = ("tests/test_own_backend.py::test_what_it_cannot_is_declined_for_it",)
MASKED = ("tests/test_masks.py::test_every_form_of_input",)
MISTAKES = ("tests/test_functional.py::test_mistakes",)
DROPOUT = ("tests/test_calling.py::test_dropout_is_torchs_between_single_layers",)
NESTED = ("tests/test_nested.py::test_it_is_what_lengths_gives",)
PACKED = ("tests/test_ragged.py::test_packed",)
REFUSED = ("tests/test_declaration.py::test_refused",)
OPTIONS = ("tests/test_whole.py::test_options_in_one_call",)
DRAWN = ("tests/test_native.py::test_masks_on_every_instruction_set",)
KERNELS, PRODUCT = "csrc/cpu/kernels.cpp", "csrc/cpu/product.h"
BACKWARD, GRADIENTS = "csrc/cpu/backward.h", "csrc/cpu/gradients.h"
NUMBA, NUMBA_LOOPS = "fastseq/backends/numba.py", "fastseq/backends/numba_loops.py"
CHOICE, STACKED = "fastseq/backends/choice.py", "fastseq/backends/stacked.py"
GEOMETRY, RUN, WHOLE = "fastseq/ops/geometry.py", "fastseq/ops/run.py", "fastseq/ops/whole.py"
FORWARD_CUDA, BACKWARD_CUDA, TILE = (f"csrc/cuda/{n}.h" for n in ("forward", "backward", "tile"))
RACES = ("tests/test_cuda_on_host.py::test_a_few_under[thread]",)
LOOPS = ("tests/test_cuda_on_host.py::test_a_few_under[address]",)
LONG_WAY = ("tests/test_streaming.py::test_resets_and_all_states_have_the_bits_of_the_long_way",)
CHECKS, SHORT = "fastseq/ops/checks.py", "fastseq/nn/short.py"
AUTOGRAD, EAGER = "fastseq/ops/autograd.py", "fastseq/backends/eager.py"


def parity(backend_and_cell: str, special: str) -> tuple[str, ...]:
    """A test of tests/test_parity.py, in float32."""
    return (f"tests/test_parity.py::test_special[{backend_and_cell}-{special}-float32]",)


MUTATIONS = (
    # More threads than cores
    Mutation(
        "native: a call takes more threads than the quota",
        "csrc/cpu/run.cpp",
        "if (pool.quota > 0 && pool.quota < threads)",
        "if (pool.quota < 0)",
        ("tests/test_cores.py::test_threads_of_a_call",),
    ),
    Mutation(
        "native: a call takes more threads than there are processors",
        "csrc/cpu/run.cpp",
        "return cores < threads ? cores : threads;",
        "return threads;",
        ("tests/test_cores.py",),
    ),
    Mutation(
        "the limits of the groups around a process's own are not read",
        "fastseq/backends/openmp.py",
        "for group in (own, *own.parents):",
        "for group in (own,):",
        ("tests/test_cores.py::test_quota",),
    ),
    # Native's windows
    Mutation(
        "native: the last window alone is summed",
        GRADIENTS,
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
        GRADIENTS,
        "w->t0 = reverse ? k : in.steps - end;",
        "w->t0 = reverse ? k : in.steps - end + (end < in.steps);",
        WINDOWS,
    ),
    Mutation(
        "native: dh does not cross a window's edge",
        BACKWARD,
        "operand[b] = after(s, own) && !cut(s, own)\n",
        "const index next = time_after(s);\n"
        "operand[b] = after(s, own) && !cut(s, own) && next >= now.t0 && next < now.t1\n",
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
        BACKWARD,
        "of[H + u] += of[u]",
        "of[H + u] = of[u]",
        WINDOWS,
    ),
    Mutation(
        "native: dW_hh without h_mask",
        BACKWARD,
        "now.h_prev[at] = multiplied(h_prev[b], own, now.masked + at * P);",
        "now.h_prev[at] = h_prev[b];",
        WINDOWS,
    ),
    Mutation(
        "native: dW_hh without reset",
        BACKWARD,
        "now.h_prev[at] = multiplied(h_prev[b], own,",
        "const T* h = h_prev[b];\n"
        "if (own < s.before.alive) h = call.y + column(s.before.base + own) * P;\n"
        "now.h_prev[at] = multiplied(h, own,",
        WINDOWS,
    ),
    Mutation(
        "native: the second phase's dW_hh of the last window alone",
        GRADIENTS,
        "N, second, 1, value, none, unused, !begin);",
        "N, second, 1, value, none, unused, false);",
        WINDOWS,
    ),
    Mutation(
        "native: dW_hr of the last window alone",
        GRADIENTS,
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
        "        store1(dunit, i, ZERO)\n",
        "",
        NUMBAS_ROWS,
    ),
    Mutation(
        "numba: the units' gradients of one task alone",
        NUMBA,
        "sum((d[k] for d in sums),",
        "sum((d[k] for d in sums[:1]),",
        NUMBAS_ROWS,
    ),
    Mutation(
        "numba: backward walks as if time ran forward",
        NUMBA_LOOPS,
        '"step if reverse else T - 1 - step"',
        '"T - 1 - step"',
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
    Mutation(
        "numba: two extra values share a buffer",
        NUMBA,
        "_address(row if extra is None else extra)",
        "_address(row if extra is None else kept[r].extras[0])",
        ("tests/test_own_cell.py::test_on_the_cpu",),
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
        "cells: the LSTM's gates trade places",
        "fastseq/cells/lstm.py",
        'name="lstm",\n    gates=("i", "f", "g", "o")',
        'name="lstm",\n    gates=("f", "i", "g", "o")',
        ("tests/test_reference.py::test_against_torch",),
    ),
    Mutation(
        "cells: the GRU's gates trade places",
        "fastseq/cells/gru.py",
        'name="gru",\n    gates=("r", "z", "n")',
        'name="gru",\n    gates=("z", "r", "n")',
        ("tests/test_reference.py::test_against_torch",),
    ),
    Mutation(
        "cells: a backward that is no derivative is taken",
        "fastseq/cells/check.py",
        "abs(got - sum(terms)) <= 1e-9 * size,",
        "True,",
        REFUSED,
    ),
    Mutation(
        "cells: a derivation forgets a minus",
        "fastseq/cells/derive.py",
        'own = -sign if slope[0] == "-" else sign',
        "own = sign",
        ("tests/test_derive.py::test_a_backend_runs_it",),
    ),
    Mutation(
        "cells: a derivation takes a returned value that is not saved",
        "fastseq/cells/derive.py",
        "for n in reversed(kept) if n in inside or n in takes}",
        "for n in reversed([*kept, *inside]) if n in inside or n in takes}",
        ("tests/test_derive.py",),
    ),
    Mutation(
        "cells: a word outside of what it is defined for is compared",
        "fastseq/cells/check.py",
        "if not all(map(cmath.isfinite, known.values())):",
        "if False:",
        ("tests/test_declaration.py::test_the_gradient_that_is_wrong_is_named",),
    ),
    Mutation(
        "cells: the C++ of a second phase writes over the gradient of a state",
        "tools/write_cells.py",
        'again = "add_" if any(name in p.gradients for p in later) else ""',
        'again = ""',
        ("tests/test_native_texts.py",),
    ),
    Mutation(
        "triton: infinity beyond the last unit enters a product",
        "fastseq/backends/triton_source.py",
        'return [f"{name} = tl.where(is_unit, {name}, 0.0)" for name in values]',
        "return []",
        TRITON,
    ),
    Mutation(
        "numba: maximum loses a NaN",
        "fastseq/backends/numba_vectors.py",
        'return w.builder.select(w.builder.fcmp_unordered("uno", b, b), b, larger)',
        "return larger",
        ("tests/test_numba_vocabulary.py::test_ends",),
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
    Mutation(
        "cells: an operand may be a gate's part",
        "fastseq/cells/check.py",
        "known and phase.operand not in parts,",
        "known,",
        REFUSED,
    ),
    Mutation(
        "cells: a value that goes to a later phase may be lost",
        "fastseq/cells/check.py",
        "        not unsaved,\n",
        "        True,\n",
        REFUSED,
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
        "torch.cat([new, carried[B_t:]])",
        "torch.cat([new, 0 * carried[B_t:]])",
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
        "a stream's state is not copied with its handle",
        "fastseq/nn/streaming.py",
        'own["_states"] = {name: s.clone() for name, s in self._states.items()}',
        'own["_states"] = {name: s.zero_() for name, s in self._states.items()}',
        ("tests/test_streaming.py::test_copies",),
    ),
    Mutation(
        "a stream's state is broadcast",
        "fastseq/nn/streaming.py",
        '_like(f"state: {name}", new, tuple(mine.shape), words, mine)',
        "new",
        ("tests/test_streaming.py::test_states_that_do_not_fit",),
    ),
    Mutation(
        "a stream does not see a forward of the subclass's own",
        "fastseq/nn/streaming.py",
        "type(module).forward is not own.forward",
        "False",
        ("tests/test_streaming.py::test_a_forward_of_its_own",),
    ),
    Mutation(
        "a stream's step leaves the state where it was",
        "csrc/python/stream.h",
        "one.r.h_0 = one.r.h_n = states + layer * B * P;",
        "one.r.h_0 = states + layer * B * P, one.r.h_n = output_.data();",
        ("tests/test_streaming.py::test_steps_are_those_of_the_module",),
    ),
    Mutation(
        "reset: the reverse direction takes forward's",
        GEOMETRY,
        "reset.roll(-1, 0) & ~last[:, None]",
        "reset",
        parity("eager-lstm", "reset"),
    ),
    Mutation(
        "batch_first: reset is not transposed",
        GEOMETRY,
        "if self.batch_first and value.dim() == 2 else value\n\n\nclass OneStep",
        "if False else value\n\n\nclass OneStep",
        ("tests/test_calling.py::test_reset",),
    ),
    Mutation(
        "batch_first: reset of packed rows is not transposed",
        GEOMETRY,
        "if self.batch_first and value.dim() == 2 else value\n\n\nclass Padded",
        "if False else value\n\n\nclass Padded",
        ("tests/test_calling.py::test_reset_unbatched_and_packed",),
    ),
    Mutation(
        "lengths: the states are not put back in order",
        GEOMETRY,
        "_on(state, self.restore))\n\n\nclass Jagged",
        "torch.arange(self.B))\n\n\nclass Jagged",
        parity("eager-lstm", "ragged"),
    ),
    Mutation(
        "lengths: the states are not sorted",
        GEOMETRY,
        "        return self.sorted(state, 1)\n\n    def final(self, state: Tensor) -> Tensor:\n"
        "        return state.index",
        "        return state\n\n    def final(self, state: Tensor) -> Tensor:\n"
        "        return state.index",
        parity("eager-lstm", "ragged"),
    ),
    Mutation(
        "lengths: the padding of the output is not zero",
        GEOMETRY,
        "y.new_zeros(shape)",
        "y.new_ones(shape)",
        ("tests/test_gradients_alone.py::test_batch_first_with_lengths",),
    ),
    Mutation(
        "nested: the sequences are not sorted",
        GEOMETRY,
        "starts = offsets[:-1].index_select(0, self.order)",
        "starts = offsets[:-1]",
        NESTED,
    ),
    Mutation(
        "nested: the states are not put back in order",
        GEOMETRY,
        "_on(state, self.restore))\n\n\ndef geometry_of",
        "torch.arange(self.B))\n\n\ndef geometry_of",
        NESTED,
    ),
    Mutation(
        "nested: the output does not know its longest",
        GEOMETRY,
        "return x._maybe_min_seqlen, x._maybe_max_seqlen",
        "return None, None",
        ("tests/test_nested.py::test_the_output_is_padded_as_the_input_is",),
    ),
    Mutation(
        "SCRN: the parts of a layer draw from one seed",
        "fastseq/nn/scrn.py",
        "2 * layer + hidden",
        "2 * layer",
        ("tests/test_literature.py::test_no_two_masks_of_scrn_are_the_same",),
    ),
    Mutation(
        "numba: a sum of a unit parameter is one chain",
        "fastseq/backends/numba_loops.py",
        "CHAIN, LEVELS = 32, 3",
        "CHAIN, LEVELS = 1 << 40, 3",
        ("tests/test_properties.py::test_sums_over_many_rows_of_units",),
    ),
    Mutation(
        "packed: the states are not put back in order",
        GEOMETRY,
        "return state if self.restore is None else state.index_select(1, self.restore)",
        "return state",
        PACKED,
    ),
    Mutation(
        "packed and nested: the states are not sorted",
        GEOMETRY,
        'in the order of the rows."""\n        return self.sorted(state, 1)',
        'in the order of the rows."""\n        return state',
        (*PACKED, *NESTED),
    ),
    Mutation(
        "lengths: reset is not sorted",
        RUN,
        "stack.reset = geometry.sorted(stack.reset, 1)",
        "pass",
        parity("eager-lstm", "all at once"),
    ),
    Mutation(
        "lengths: h_mask is not sorted",
        RUN,
        "stack.h_mask = geometry.sorted(stack.h_mask, 1)",
        "pass",
        parity("eager-lstm", "all at once"),
    ),
    Mutation(
        "lengths: the input's masks are not sorted",
        RUN,
        "stack.input_masks = [geometry.sorted(mask, 0) for mask in stack.input_masks]",
        "pass",
        MASKED,
    ),
    Mutation(
        "lengths: the names of the sequences are not sorted",
        RUN,
        "stack.zoneout.ids = geometry.sorted(stack.zoneout.ids, 0)",
        "pass",
        ("tests/test_masks.py::test_zoneout",),
    ),
    Mutation(
        "stack: every layer takes the first one's h_mask",
        RUN,
        "stack.h_mask.narrow(0, layer * D, D)",
        "stack.h_mask.narrow(0, 0, D)",
        parity("eager-lstm", "all at once"),
    ),
    Mutation(
        "stack: the input of no layer is masked",
        RUN,
        "return masks.mask_input(x, stack.input_masks[layer], sizes)",
        "return x",
        ("tests/test_masks.py::test_it_is_what_the_loop_computes",),
    ),
    Mutation(
        "stack: the input of a stack in one call is not masked",
        RUN,
        "x = masks.mask_input(x, stack.input_masks[0], sizes)",
        "pass",
        ("tests/test_masks.py::test_an_input_that_is_masked_alone",),
    ),
    Mutation(
        "stack: the states of every step are the first layer's",
        RUN,
        "layer == request.layers - 1",
        "layer == 0",
        ("tests/test_calling.py::test_all_states",),
    ),
    Mutation(
        "stack: what a caller may edit is never copied",
        RUN,
        'o.clone() if getattr(o.grad_fn, "_forward_cls", None) is RecurrenceFunction else o',
        "o",
        ("tests/test_calling.py::test_output_may_be_edited_before_backward",),
    ),
    Mutation(
        "stack: the final states stand in the wrong order of layers",
        STACKED,
        "zip(*finals, strict=True)",
        "zip(*reversed(finals), strict=True)",
        parity("eager-lstm", "two layers"),
    ),
    Mutation(
        "stack: the first layer's input is dropped out, too",
        STACKED,
        "        elif layer:\n",
        "        else:\n",
        DROPOUT,
    ),
    Mutation(
        "stack: of layers one by one the first one's input is dropped out, too",
        RUN,
        "        if layer:\n            x = dropped(request, x)",
        "        if True:\n            x = dropped(request, x)",
        DROPOUT,
    ),
    Mutation(
        "checks: the two directions may have other sizes",
        CHECKS,
        'raise ValueError("weights: both directions must have the same sizes")',
        "pass",
        MISTAKES,
    ),
    Mutation(
        "checks: h_mask may want a gradient",
        CHECKS,
        'raise ValueError("h_mask: gets no gradient; pass h_mask.detach()")',
        "pass",
        MISTAKES,
    ),
    Mutation(
        "functional: the states trade places",
        "fastseq/ops/functional.py",
        "tuple(finals) if stack.cell.other_states",
        "tuple(finals[::-1]) if stack.cell.other_states",
        ("tests/test_functional.py::test_options",),
    ),
    Mutation(
        "masks: zoneout of both directions is one",
        "fastseq/ops/masks.py",
        "return kind | direction << 3 | layer << 4",
        "return kind | layer << 4",
        ("tests/test_masks.py::test_no_two_places_share_a_mask",),
    ),
    Mutation(
        "masks: a backend draws for tensors that stand for others",
        "fastseq/ops/masks.py",
        "if modes.is_ordinary(seed, ids, steps):",
        "if True:",
        ("tests/test_masks.py::test_who_draws",),
    ),
    Mutation(
        "draw: no row has the upper half of its name",
        "csrc/cpu/draw.h",
        " | static_cast<uint32_t>(name >> 32) << 16",
        "",
        DRAWN,
    ),
    Mutation(
        "draw: a word that is the threshold is dropped",
        "csrc/cpu/draw.h",
        "none + call.threshold",
        "none + call.threshold + 1",
        ("tests/test_masks.py::test_a_word_that_is_the_threshold_is_kept",),
    ),
    # Zoneout, and stacks with options
    Mutation(
        "zoneout: the parts of a gradient are swapped",
        "csrc/cpu/step.h",
        "*before = stays ? of : Vec<T>{}, *left = stays ? Vec<T>{} : of;",
        "*left = stays ? of : Vec<T>{}, *before = stays ? Vec<T>{} : of;",
        parity("native-lstm", "zoneout"),
    ),
    Mutation(
        "zoneout: a reset is forgotten before blending",
        "csrc/cpu/forward.h",
        "const T* before = Way::resets(n) ? zeros : carried;",
        "const T* before = carried;",
        parity("native-lstm", "zoneout at once"),
    ),
    Mutation(
        "zoneout: backward takes c as it was carried",
        BACKWARD,
        "row.c[k] = r.made[k] ? r.made[k] + n * H : call.c_all[k] + across * H;",
        "row.c[k] = call.c_all[k] + across * H;",
        parity("native-lstm", "zoneout at once"),
    ),
    Mutation(
        "zoneout: what is held is forgotten",
        BACKWARD,
        "if (PHASE == 0 && zones) join(row, b + i, u0, u1);",
        "",
        parity("native-gru", "zoneout"),
    ),
    Mutation(
        "zoneout: what is held of h is left behind at each step",
        BACKWARD,
        "carries_h(Cell::READS_H || r.zones(0))",
        "carries_h(Cell::READS_H)",
        parity("native-lstm", "zoneout"),
    ),
    Mutation(
        "zoneout: native draws again for backward",
        "fastseq/backends/native.py",
        "        given.stay,\n        given.part,\n        torch.get_num_threads(),\n"
        "        request.deterministic,\n        False,\n        y,\n",
        "        tuple(s if s is None else s.roll(1, -1) for s in given.stay),\n"
        "        given.part,\n        torch.get_num_threads(),\n"
        "        request.deterministic,\n        False,\n        y,\n",
        OPTIONS,
    ),
    Mutation(
        "stack in one call: every layer takes the first one's h_mask",
        "csrc/python/call.h",
        "r.h_mask = h_mask_ + rows * in.P",
        "r.h_mask = h_mask_ + d * in.batch * in.P",
        OPTIONS,
    ),
    Mutation(
        "stack in one call: the gradient of a masked input is not masked",
        "csrc/python/call.h",
        "      mask_input(layer, before, dx);\n",
        "",
        OPTIONS,
    ),
    # The CUDA kernels, on the host
    Mutation(
        "cuda: forward's steps do not meet",
        FORWARD_CUDA,
        "      arrived<STAGES - 3>();\n      meet();\n",
        "      arrived<STAGES - 3>();\n",
        RACES,
    ),
    Mutation(
        "cuda: backward's steps do not meet",
        BACKWARD_CUDA,
        "      arrived<STAGES - 3>();\n      meet();\n",
        "      arrived<STAGES - 3>();\n",
        RACES,
    ),
    Mutation(
        "cuda: forward's threads do not meet before the first step",
        FORWARD_CUDA,
        "    arrived<STAGES - 2>();\n    meet();\n",
        "    arrived<STAGES - 2>();\n",
        RACES,
    ),
    Mutation(
        "cuda: forward writes h over the h that others still read",
        FORWARD_CUDA,
        "next = operands + ((step + 1) & 1) * T::OPERAND",
        "next = operands + (step & 1) * T::OPERAND",
        RACES,
    ),
    Mutation(
        "cuda: one buffer of backward's gradients instead of two",
        BACKWARD_CUDA,
        "operand = operands + (step & 1) * T::OPERAND",
        "operand = operands",
        RACES,
    ),
    Mutation(
        "cuda: two warps of backward do not meet before they read each other's sums",
        BACKWARD_CUDA,
        "        meet_pair(seat.warp / 2);\n",
        "",
        RACES,
    ),
    Mutation(
        "cuda: forward does not wait for its input",
        FORWARD_CUDA,
        "      arrived<STAGES - 3>();\n",
        "",
        LOOPS,
    ),
    Mutation(
        "cuda: forward waits for the step that it has read, not for the next",
        FORWARD_CUDA,
        "      arrived<STAGES - 3>();\n",
        "      arrived<STAGES - 2>();\n",
        LOOPS,
    ),
    Mutation(
        "cuda: backward waits for the step that it has read, not for the next",
        BACKWARD_CUDA,
        "      arrived<STAGES - 3>();\n",
        "      arrived<STAGES - 2>();\n",
        LOOPS,
    ),
    Mutation(
        "cuda: forward fetches into what it still needs",
        FORWARD_CUDA,
        "on_its_way(step + STAGES - 2, free_slot,",
        "on_its_way(step + STAGES - 2, last_slot,",
        LOOPS,
    ),
    Mutation(
        "cuda: two words of a fragment of weights trade places",
        TILE,
        "{upper.w[2 * k], lower.w[2 * k],",
        "{lower.w[2 * k], upper.w[2 * k],",
        LOOPS,
    ),
    Mutation(
        "cuda: two words of a fragment of h trade places",
        TILE,
        "mma(first, w.w[0], b.w[0], b.w[1], Number());",
        "mma(first, w.w[0], b.w[1], b.w[0], Number());",
        LOOPS,
    ),
    Mutation(
        "cuda: a lane hands h on as another sequence's",
        FORWARD_CUDA,
        "put_operand<T>(next + T::place(2 * seat.q + k)",
        "put_operand<T>(next + T::place(2 * seat.q + 1 - k)",
        LOOPS,
    ),
    Mutation(
        "cuda: vectors of a place that is not aligned to them",
        TILE,
        "grain = bytes | (int(reinterpret_cast<uintptr_t>(from)) & 15);",
        "grain = bytes;",
        LOOPS,
    ),
    Mutation(
        "cuda: gradients of unit parameters of half the sequences",
        BACKWARD_CUDA,
        "    total += neighbour(total, 2);\n",
        "",
        LOOPS,
    ),
    Mutation(
        "cuda on the host: copies arrive when they are asked for",
        "csrc/cuda/words_host.h",
        "copy.to[k] = POISON;",
        "copy.to[k] = copy.from[k];",
        ("tests/test_cuda_words.py::test_a_forgotten_wait_shows",),
    ),
    Mutation(
        "cuda on the host: nothing is late",
        "csrc/cuda/words_host.h",
        "return !off_ && draw() % n == 0;",
        "return false;",
        ("tests/test_cuda_words.py::test_packets_without_order_show",),
    ),
    Mutation(
        "cuda on the host: a push gives no order",
        "csrc/cuda/words_host.h",
        "acquire(&count->order[parity]);",
        "",
        ("tests/test_cuda_words.py::test_no_race_is_seen",),
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
        "                weights,\n                layout.reverse,\n",
        "                weights,\n                (False,) * len(layout.reverse),\n",
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
        "vmap: reset is another sequence's",
        "fastseq/ops/batching.py",
        "_fold(reset, dims[2], 1, V),",
        "_fold(None if reset is None else reset.roll(1, -1), dims[2], 1, V),",
        ("tests/test_transforms.py::test_members_with_their_own_masks",),
    ),
    Mutation(
        "choice: a backend that declines falls back in silence",
        CHOICE,
        "names(backend):\n        reason =",
        '(*names(backend), "eager"):\n        reason =',
        ("tests/test_choice.py",),
    ),
    *(
        Mutation(
            f"choice: {how} {ability}",
            CHOICE,
            f"if problem.{asked} and not can.{ability}:",
            f"if {new.format(asked)}:",
            ABILITIES,
        )
        for ability, asked in (
            ("zoneout", "zoneout"),
            ("deterministic", "deterministic"),
            ("input_product", "input_product"),
            ("heads", "heads > 1"),
        )
        for how, new in (
            ("every backend is asked for", "False and problem.{}"),
            ("no backend gets", "problem.{}"),
        )
    ),
    Mutation(
        "choice: the short way is that of full memory",
        CHOICE,
        'memory: Memory = "lean" if lean else "full"',
        'memory: Memory = "full"',
        ("tests/test_served.py::test_lean_memory_runs_on_what_is_named",),
    ),
    Mutation(
        "choice: the short way is that of inference",
        CHOICE,
        "for training in (False, True):\n        chosen =",
        "for training in (False, False):\n        chosen =",
        ("tests/test_served.py::test_lean_memory_runs_on_what_is_named",),
    ),
    Mutation(
        "torch: the states of empty sequences are lost",
        "fastseq/backends/torch.py",
        "torch.cat([new, old.narrow(",
        "torch.cat([new, 0 * old.narrow(",
        parity("torch-lstm", "zero lengths"),
    ),
    Mutation(
        "choice: a stack in one call takes the options of a layer",
        CHOICE,
        "stacks is not None and stacks(problem)",
        "stacks is not None",
        parity("native-lstm", "reset"),
    ),
    Mutation(
        "contract: a function may name its arguments otherwise",
        "fastseq/backends/contract.py",
        "if found != expected:",
        "if len(found) != len(expected):",
        ("tests/test_own_backend.py::test_what_the_contract_asks_is_checked_as_it_is_loaded",),
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
        SHORT,
        "device, own.backend, lean, single)",
        "device, None, lean, single)",
        SERVED,
    ),
    Mutation(
        "layers: the kernels of whole stacks drop out",
        "fastseq/backends/native.py",
        "return plain and not lean",
        "return False",
        SERVED,
    ),
    Mutation(
        "layers: the short way hands back batch_first's output time first",
        SHORT,
        "y = y.transpose(0, 1)",
        "pass",
        ("tests/test_calling.py::test_batch_first",),
    ),
    Mutation(
        "layers: the short way forgets where sequences begin",
        SHORT,
        "given = given._replace(reset=reset)",
        "pass",
        LONG_WAY,
    ),
    Mutation(
        "layers: the short way hands back all states time first",
        SHORT,
        "tuple([c.transpose(0, 1) for c in along])",
        "along",
        LONG_WAY,
    ),
    Mutation(
        "layers: the short way does not read a reset batch first",
        SHORT,
        "reset.transpose(0, 1) if first else reset",
        "reset.reshape(x.shape[:2])",
        LONG_WAY,
    ),
    Mutation(
        "layers: the short way is open under autocast",
        "fastseq/ops/modes.py",
        "        torch._C._is_any_autocast_enabled()\n        or torch",
        "        torch",
        ("tests/test_calling.py::test_autocast_of_layers",),
    ),
    Mutation(
        "whole: states that were not given get gradients",
        WHOLE,
        "found[1 : 1 + len(states)],",
        "found[1 : 1 + len(dstates)],",
        ("tests/test_whole.py::test_only_what_wants_a_gradient_has_one",),
    ),
    Mutation(
        "whole: a second derivative drops nothing out",
        WHOLE,
        "x = x * (mask / (1.0 - request.dropout) if request.dropout < 1 else mask)",
        "pass",
        ("tests/test_whole.py::test_second_derivatives",),
    ),
    Mutation(
        "autograd: numba's backward is the eager form's",
        AUTOGRAD,
        "            if torch.autograd.forward_ad._current_level >= 0:",
        "            if True:",
        SERVED,
    ),
    # What users' code does to a layer
    Mutation(
        "steps: what a step leaves is not its own",
        "fastseq/ops/steps.py",
        "self.left.append(left if at_once else left.copied())",
        "self.left.append(left)",
        ("tests/test_steps.py::test_a_gradient_that_is_edited",),
    ),
    Mutation(
        "steps: another cell's rows go into one product",
        "fastseq/ops/steps.py",
        "if self.by is not None and self.by[:2] != (module, request):",
        "if False:",
        ("tests/test_steps.py::test_another_nonlinearity_in_between",),
    ),
    Mutation(
        "steps: a token is for weights that were frozen since",
        "fastseq/ops/steps.py",
        "if mine is not theirs or theirs.requires_grad is not needs:",
        "if mine is not theirs:",
        ("tests/test_steps.py::test_frozen_weights",),
    ),
    Mutation(
        "steps: small weights and many rows share products, too",
        "fastseq/ops/steps.py",
        "return size >= LEAST and size >= LEAST_EACH * rows",
        "return True",
        ("tests/test_steps.py::test_where_it_pays",),
    ),
    Mutation(
        "whole: a hook on an unused state is called",
        WHOLE,
        "kept = 1 if request.order == ONE_STEP else 0",
        "kept = 2",
        ("tests/test_steps.py::test_hooks_of_states",),
    ),
    Mutation(
        "layers: what was put into _flat_weights is not computed with",
        "fastseq/nn/recurrent.py",
        "if module._fastseq_put is not None and (put := flat_weights.valid(module)) is not None:",
        "if False:",
        ("tests/test_users_code.py::test_flat_weights_reach_every_way_of_calling",),
    ),
    Mutation(
        "layers: the short way reads the parameters alone",
        SHORT,
        "if module._fastseq_put is not None and (put := flat_weights.valid(module)) is not None:",
        "if False:",
        ("tests/test_users_code.py::test_flat_weights",),
    ),
    Mutation(
        "layers: what was put into _flat_weights outlives its attribute",
        "fastseq/nn/flat_weights.py",
        "if getattr(module, name, None) is not then:",
        "if False:",
        ("tests/test_users_code.py::test_flat_weights",),
    ),
    Mutation(
        "layers: final states are those that backward reads",
        "fastseq/ops/run.py",
        "        finals = editable(finals)\n",
        "",
        ("tests/test_users_code.py::test_final_states_edited_before_backward",),
    ),
    Mutation(
        "layers: weights of any size go to a kernel",
        "fastseq/ops/checks.py",
        "    if found != expected:\n",
        "    if False:\n",
        ("tests/test_users_code.py::test_weights_of_another_size",),
    ),
    Mutation(
        "layers: a tensor subclass is a plain tensor",
        "fastseq/ops/modes.py",
        "    return overridden(tensors) or any(",
        "    return any(",
        ("tests/test_users_code.py::test_tensor_subclasses",),
    ),
    Mutation(
        "layers: a subclass in a checkpoint goes another way the second time",
        "fastseq/ops/modes.py",
        "if not torch._C._has_torch_function(tensors) and torch._C._is_torch_function_enabled():",
        "if not torch._C._has_torch_function(tensors):",
        ("tests/test_native_runs.py::test_a_subclass_in_a_checkpoint",),
    ),
    Mutation(
        "layers: a default device closes the short way",
        SHORT,
        "        with without_default_devices():\n            return step(cell, input, states)",
        "        return None",
        ("tests/test_users_code.py::test_a_default_device_leaves_the_short_way_open",),
    ),
    Mutation(
        "layers: torch.fx takes a subclass with its own forward as a leaf",
        "fastseq/nn/graph.py",
        "type(module).forward is not forward",
        "False",
        ("tests/test_users_code.py::test_symbolic_trace_of_a_subclass_with_its_own_forward",),
    ),
    Mutation(
        "options: a rate that is set masks nothing",
        "fastseq/nn/options.py",
        'self.__dict__["rates"] = rates if any(rates) else None',
        "pass",
        ("tests/test_masks.py::test_the_options_show_and_change",),
    ),
    Mutation(
        "replace: a forward on the instance is passed over",
        "fastseq/nn/counterparts.py",
        "return [name for name in _METHODS if name in vars(module)]",
        "return []",
        ("tests/test_replace.py",),
    ),
    # Initial values, and a state that is learned
    Mutation(
        "init: another gate has the bias",
        "fastseq/nn/init.py",
        "gates.index(gate))",
        "0)",
        ("tests/test_init.py::test_bias_of_a_gate",),
    ),
    Mutation(
        "init: one orthogonal matrix for all gates",
        "fastseq/nn/init.py",
        '_write(module, names["weight_hh"], change, len(cell.recurrent_gates))',
        '_write(module, names["weight_hh"], change)',
        ("tests/test_init.py::test_orthogonal",),
    ),
    Mutation(
        "init: a gate f that drops the state is opened",
        "fastseq/nn/init.py",
        'if kept.get("f") == -1:',
        "if False:",
        ("tests/test_init.py::test_which_gate_keeps_the_state",),
    ),
    Mutation(
        "learned state: a short call begins with zeros",
        SHORT,
        "if hx is None and own.learn_state:",
        "if False:",
        ("tests/test_init.py::test_it_is_the_state_where_none_is_given",),
    ),
    Mutation(
        "learned state: a checked call begins with zeros",
        "fastseq/nn/recurrent.py",
        "if hx is None and options(module).learn_state:",
        "if False:",
        ("tests/test_init.py::test_it_is_the_state_where_none_is_given",),
    ),
    Mutation(
        "learned state: it goes out as torch.nn's zeros",
        "fastseq/nn/counterparts.py",
        'if getattr(options(module), "learn_state", False):',
        "if False:",
        ("tests/test_init.py::test_torchs_layers_have_no_such_state",),
    ),
    Mutation(
        "cells page: a sum behind a minus loses its brackets",
        "bench/cells.py",
        '("+", _SUM) if isinstance(node.op, ast.Add) else ("-", _PRODUCT)',
        '("+", _SUM) if isinstance(node.op, ast.Add) else ("-", _SUM)',
        ("tests/test_cells_page.py::test_sums_and_products_hold_together",),
    ),
)

"""Drives torch's own table of module inputs, ``module_db``, for the recurrent modules.

    python tests/helpers/torch_suite.py RESULTS.json [--torch] [--every N] [--backend NAME]

With ``--torch`` the modules are torch.nn's; else fastseq's stand in their place on torch.nn before
the table is imported. It runs in a process of its own: the table keeps the classes it finds.
RESULTS: the outcome of every test by name, and how many forward calls each class served. With
``--every N`` the derivatives are checked on every N-th sample alone; they take nearly all the time.
"""

import argparse
import copy
import functools
import io
import itertools
import json
import pickle
import sys
import unittest
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import nn

KINDS = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
calls = Counter()


def substitute(backend):
    """fastseq's classes in the places of torch.nn's."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import fastseq

    fastseq.install()
    for kind in KINDS if backend is not None else ():
        ours = getattr(nn, kind)
        ours.__init__ = functools.partialmethod(ours.__init__, backend=backend)


def count_calls():
    """Count the forward calls of what stands on torch.nn, by module path."""
    for kind in KINDS:
        cls = getattr(nn, kind)

        def forward(self, *args, _forward=cls.forward, **kwargs):
            calls[f"{type(self).__module__}.{type(self).__name__}"] += 1
            return _forward(self, *args, **kwargs)

        cls.forward = forward


def build_tests(every):
    """One TestCase over module_db, made when the classes are in place."""
    from torch.nn.utils.rnn import PackedSequence
    from torch.testing._internal.common_device_type import instantiate_device_type_tests
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db, modules
    from torch.testing._internal.common_utils import (
        TestCase,
        freeze_rng_state,
        gradcheck,
        gradgradcheck,
    )
    from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

    recurrent = [m for m in module_db if m.module_cls.__name__ in KINDS]
    assert len(recurrent) == len(KINDS), [m.name for m in recurrent]
    doubles = [torch.float64]

    def to_list(value):
        """Tensors of an input or output, a packed sequence as its data."""
        return [v for v in tree_flatten(value)[0] if isinstance(v, torch.Tensor)]

    class TestModule(TestCase):
        def samples(self, info, device, dtype, training, requires_grad=False, packed=False):
            """(module, args, kwargs, sample) of every sample of the table."""
            table = info.module_inputs_func(
                info,
                device=device,
                dtype=dtype,
                requires_grad=requires_grad,
                training=training,
                **({"with_packed_sequence": True} if packed else {}),
            )
            for sample in table:
                if sample.forward_input is None:
                    continue
                made = sample.constructor_input
                with freeze_rng_state():
                    torch.manual_seed(0)
                    module = info.module_cls(*made.args, **made.kwargs).to(device, dtype)
                module.train(training)
                args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
                yield module, args, kwargs, sample

        @modules(recurrent)
        def test_forward(self, device, dtype, module_info, training):
            for module, args, kwargs, sample in self.samples(module_info, device, dtype, training):
                out = module(*args, **kwargs)
                self.assertTrue(all(t.dtype == dtype for t in to_list(out)))
                if sample.reference_fn is not None:
                    self.assertEqual(out, sample.reference_fn(module, *args, **kwargs))

        @modules(recurrent)
        def test_forward_packed(self, device, dtype, module_info, training):
            for module, args, kwargs, _ in self.samples(
                module_info, device, dtype, training, packed=True
            ):
                if isinstance(args[0], PackedSequence):
                    out = module(*args, **kwargs)[0]
                    self.assertIs(out.batch_sizes, args[0].batch_sizes)
                    self.assertEqual(out.data.shape[0], args[0].data.shape[0])

        @modules(recurrent)
        def test_factory_kwargs(self, device, dtype, module_info, training):
            for _, _, _, sample in self.samples(module_info, device, dtype, training):
                made = sample.constructor_input
                for where in (device, "meta"):
                    module = module_info.module_cls(
                        *made.args, **{**made.kwargs, "device": where, "dtype": dtype}
                    )
                    for p in module.parameters():
                        self.assertEqual(p.device.type, torch.device(where).type)
                        self.assertEqual(p.dtype, dtype)

        @modules(recurrent)
        def test_device_context(self, device, dtype, module_info, training):
            for _, _, _, sample in self.samples(module_info, device, dtype, training):
                made = sample.constructor_input
                with torch.device("meta"):
                    module = module_info.module_cls(*made.args, **made.kwargs)
                self.assertTrue(all(p.is_meta for p in module.parameters()))

        @modules(recurrent)
        def test_to_and_to_empty(self, device, dtype, module_info, training):
            other = torch.float32 if dtype is torch.float64 else torch.float64
            for module, args, kwargs, _ in self.samples(module_info, device, dtype, training):
                before = copy.deepcopy(module.state_dict())
                expected = module(*args, **kwargs)
                module.to(other).to(dtype)
                if other is torch.float64:
                    self.assertEqual(module(*args, **kwargs), expected)
                module.to("meta").to_empty(device=device)
                module.load_state_dict(before)
                self.assertEqual(module(*args, **kwargs), expected)

        @modules(recurrent)
        def test_save_load(self, device, dtype, module_info, training):
            for module, args, kwargs, _ in self.samples(module_info, device, dtype, training):
                expected = module(*args, **kwargs)
                file = io.BytesIO()
                torch.save(module, file)
                file.seek(0)
                self.assertEqual(torch.load(file, weights_only=False)(*args, **kwargs), expected)
                for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
                    loaded = pickle.loads(pickle.dumps(module, protocol))
                    self.assertEqual(loaded(*args, **kwargs), expected)
                self.assertEqual(copy.deepcopy(module)(*args, **kwargs), expected)
                fresh = copy.deepcopy(module)
                fresh.reset_parameters()
                fresh.load_state_dict(module.state_dict())
                self.assertEqual(fresh(*args, **kwargs), expected)

        @modules(recurrent)
        def test_repr(self, device, dtype, module_info, training):
            for module, _, _, _ in self.samples(module_info, device, dtype, training):
                self.assertTrue(repr(module).startswith(f"{module_info.module_cls.__name__}("))
                self.assertIsInstance(str(module), str)

        @modules(recurrent)
        def test_train_and_eval(self, device, dtype, module_info, training):
            for module, args, kwargs, _ in self.samples(module_info, device, dtype, training):
                self.assertEqual(module(*args, **kwargs), module(*args, **kwargs))
                module.train(not training)
                self.assertEqual(module.training, not training)
                module(*args, **kwargs)

        @modules(recurrent)
        def test_non_contiguous(self, device, dtype, module_info, training):
            def strided(value):
                if isinstance(value, torch.Tensor) and value.dim() and value.is_floating_point():
                    wide = torch.repeat_interleave(value.detach(), 2, dim=-1)
                    return wide[..., ::2].requires_grad_(value.requires_grad)
                return value

            for module, args, kwargs, _ in self.samples(
                module_info, device, dtype, training, requires_grad=True, packed=True
            ):
                if isinstance(args[0], PackedSequence):
                    continue
                results = []
                variants = [
                    (plain_args, plain_weights)
                    for plain_args in (True, False)
                    for plain_weights in (True, False)
                ]
                for plain_args, plain_weights in variants:
                    given = tree_map(lambda v: v.detach().requires_grad_(), (args, kwargs))
                    given = given if plain_args else tree_map(strided, given)
                    named = dict(module.named_parameters())
                    named = named if plain_weights else {k: strided(w) for k, w in named.items()}
                    out = torch.func.functional_call(module, named, *given)
                    loss = sum((t * torch.arange(t.numel()).view_as(t)).sum() for t in to_list(out))
                    leaves = [*to_list(given), *named.values()]
                    results.append((out, torch.autograd.grad(loss, leaves)))
                for result in results[1:]:
                    self.assertEqual(result, results[0])

        def check_gradients(self, check, info, device, dtype, training):
            samples = self.samples(info, device, dtype, training, requires_grad=True, packed=True)
            for module, args, kwargs, _ in itertools.islice(samples, 0, None, every):
                names = [name for name, _ in module.named_parameters()]
                packed = args[0] if isinstance(args[0], PackedSequence) else None
                if packed is not None:
                    args = (packed.data, *args[1:])
                flat, spec = tree_flatten((args, kwargs))
                count = len(flat)

                def call(
                    *tensors, module=module, spec=spec, count=count, names=names, packed=packed
                ):
                    given, named = tree_unflatten(tensors[:count], spec)
                    if packed is not None:
                        given = (PackedSequence(given[0], *packed[1:]), *given[1:])
                    weights = dict(zip(names, tensors[count:], strict=True))
                    with freeze_rng_state():
                        out = torch.func.functional_call(module, weights, given, named)
                    return tuple(t for t in to_list(out) if t.requires_grad)

                leaves = [v.detach().requires_grad_() for v in (*flat, *module.parameters())]
                self.assertTrue(check(call, tuple(leaves), nondet_tol=info.gradcheck_nondet_tol))

        @modules(recurrent, allowed_dtypes=doubles)
        def test_grad(self, device, dtype, module_info, training):
            self.check_gradients(gradcheck, module_info, device, dtype, training)

        @modules([m for m in recurrent if m.supports_gradgrad], allowed_dtypes=doubles)
        def test_gradgrad(self, device, dtype, module_info, training):
            self.check_gradients(gradgradcheck, module_info, device, dtype, training)

        @modules([m for m in recurrent if m.module_error_inputs_func is not None])
        def test_errors(self, device, dtype, module_info, training):
            table = module_info.module_error_inputs_func(
                module_info, device=device, dtype=dtype, requires_grad=False, training=training
            )
            for mistake in table:
                made = mistake.module_error_input.constructor_input
                given = mistake.module_error_input.forward_input

                def construct(made=made):
                    return module_info.module_cls(*made.args, **made.kwargs)

                if mistake.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
                    with self.assertRaisesRegex(mistake.error_type, mistake.error_regex):
                        construct()
                    continue
                module = construct()
                if "dtype" not in made.kwargs:
                    module = module.to(device, dtype)
                module.train(training)
                with self.assertRaisesRegex(mistake.error_type, mistake.error_regex):
                    module(*given.args, **given.kwargs)

    scope = {"TestModule": TestModule}
    instantiate_device_type_tests(TestModule, scope, only_for="cpu")
    return scope["TestModuleCPU"]


class Outcomes(unittest.TestResult):
    """Outcome by the test's name: passed, skipped, or the last line of the failure."""

    def __init__(self):
        super().__init__()
        self.by_name = {}

    def _fail(self, test, error):
        self.by_name[_name(test)] = f"{error[0].__name__}: {str(error[1])[:2000]}"

    def addSuccess(self, test):
        self.by_name.setdefault(_name(test), "passed")

    def addSkip(self, test, reason):
        self.by_name[_name(test)] = f"skipped: {reason}"

    def addFailure(self, test, error):
        self._fail(test, error)

    def addError(self, test, error):
        self._fail(test, error)


def _name(test):
    return test.id().rsplit(".", 1)[-1]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("results")
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--backend")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.torch:
        substitute(arguments.backend)
    count_calls()
    sys.argv = sys.argv[:1]  # torch's modules read it
    warnings.simplefilter("ignore")
    cases = build_tests(arguments.every)
    names = unittest.TestLoader().getTestCaseNames(cases)
    suite = unittest.TestSuite(cases(name) for name in names)
    outcomes = Outcomes()
    suite.run(outcomes)
    Path(arguments.results).write_text(json.dumps({"tests": outcomes.by_name, "calls": calls}))


if __name__ == "__main__":
    main()

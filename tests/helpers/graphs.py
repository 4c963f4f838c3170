"""What tests of compiled graphs share: rows of options, their layers and calls, values compared."""

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from twins import assert_same_bits, detached, state_for, tensors

import fastseq

I, H, P = 4, 6, 3  # noqa: E741


def plain(kind="LSTM", form="dense", shape="one", **changes):
    row = {name: False for name in ("state", "reset", "all_states", "batch_first")}
    return row | {"kind": kind, "form": form, "shape": shape, "memory": "full"} | changes


def layer(row):
    """A layer on the backend that compiled graphs run, so that the two agree to the bit or so."""
    options = {"batch_first": row.get("batch_first", False), "memory": row.get("memory", "full")}
    if row["shape"] == "stack":
        options |= {"num_layers": 2, "bidirectional": True}
    if row["shape"] == "projected":
        options |= {"proj_size": P}
    return getattr(fastseq, row["kind"])(I, H, backend="numba", **options)


def call_of(row, T, B, seed=0):
    """What a layer of ``row`` is given: arguments and keywords."""
    torch.manual_seed(seed)
    x = torch.randn(T, B, I)
    lengths = torch.randint(1, T + 1, (B,))
    lengths[-1] = T
    padded = x.transpose(0, 1) if row["batch_first"] else x
    keywords = {}
    if row["form"] in ("dense", "lengths"):
        given = padded.contiguous()
        if row["form"] == "lengths":
            lengths[0] = 0
            keywords["lengths"] = lengths
    else:
        in_order = row["form"] == "packed"
        lengths = lengths.sort(descending=True)[0] if in_order else lengths
        given = pack_padded_sequence(
            padded, lengths, batch_first=row["batch_first"], enforce_sorted=in_order
        )
    if row["reset"]:
        reset = torch.rand(T, B) < 0.3
        keywords["reset"] = reset.t().contiguous() if row["batch_first"] else reset
    if row["all_states"]:
        keywords["all_states"] = True
    if not row["state"]:
        return (given,), keywords
    ways = 4 if row["shape"] == "stack" else 1
    state = state_for(row["kind"], ways, B, H)
    if row["shape"] == "projected":
        state = (torch.randn(ways, B, P), state[1])
    return (given, detached(state)), keywords


def results(function, module, arguments, keywords):
    """Outputs and the gradients of parameters and states."""
    leaves = list(module.parameters())
    leaves += [t for t in tensors(arguments[1:]) if t.requires_grad]
    out = function(*arguments, **keywords)
    torch.manual_seed(1)
    loss = sum((t * torch.randn_like(t)).sum() for t in tensors(out))
    return out, torch.autograd.grad(loss, leaves)


def compare(compiled, module, arguments, keywords, same=assert_same_bits):
    """Values and gradients; to the bit where both run the same kernels."""
    out, grads = results(compiled, module, arguments, keywords)
    expected, expected_grads = results(module, module, arguments, keywords)
    same(out, expected)
    same(grads, expected_grads)
    if isinstance(expected[0], PackedSequence):
        assert type(out[0]) is PackedSequence
        for a, b in zip(out[0][1:], expected[0][1:], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


class FromParts(nn.Module):
    """torch.export names no dynamic size inside a PackedSequence: it is made within."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *parts):
        y, state = self.layer(PackedSequence(*parts))
        return y.data, state

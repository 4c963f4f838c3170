"""torch.onnx.export gives ONNX's standard operators; ONNX Runtime computes the same from them."""

import io
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from problems import draw
from torch import nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_sequence

import fastseq
from fastseq.cells import CELLS
from fastseq.ops.geometry import Dense
from fastseq.ops.onnx import STANDARDS
from fastseq.ops.run import run

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

#: What the exporter is warned of by the libraries that it uses is theirs.
pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error:::fastseq"),
]

I, H = 5, 7  # noqa: E741  (the field's letters)
DYNAMIC = Dim.DYNAMIC

#: name -> kind and options; together every operator, direction, depth and order of dimensions.
LAYERS = {
    "lstm": ("LSTM", {}),
    "lstm both ways": ("LSTM", {"bidirectional": True, "bias": False, "batch_first": True}),
    "lstm deep": ("LSTM", {"num_layers": 3, "bidirectional": True, "dropout": 0.5}),
    "gru": ("GRU", {"batch_first": True}),
    "gru deep": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "gru without bias": ("GRU", {"num_layers": 2, "bias": False}),
    "rnn": ("RNN", {"bidirectional": True}),
    "rnn relu": ("RNN", {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True}),
    "rnn sigmoid": ("RNN", {"nonlinearity": "sigmoid"}),
    "gru reset before": ("GRU", {"reset_after": False, "bidirectional": True}),
    "mgu": ("MGU", {"num_layers": 2, "bias": False}),
    "peephole lstm": ("PeepholeLSTM", {"num_layers": 2, "bidirectional": True}),
    "coupled lstm": ("CoupledLSTM", {"bidirectional": True}),
}


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in flat(v)]


class Layers(nn.Module):
    """All of LAYERS over one input (T, B, I); ``state`` scales every initial state."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            getattr(fastseq, kind)(I, H, **options) for kind, options in LAYERS.values()
        )

    def forward(self, x, state=None, lengths=None):
        found = []
        for layer in self.layers:
            hx = None
            if state is not None:
                count = layer.num_layers * (1 + layer.bidirectional)
                h = state.expand(count, -1, -1) * torch.arange(1.0, count + 1)[:, None, None]
                hx = (h, -h) if CELLS[layer._fastseq_cell].other_states else h
            ordered = x.transpose(0, 1) if layer.batch_first else x
            y, last = layer(ordered, hx, lengths=lengths)
            found += [y.transpose(0, 1) if layer.batch_first else y, *flat(last)]
        return found


def export(module, arguments, **options):
    return torch.onnx.export(module.eval(), arguments, dynamo=True, verbose=False, **options)


def operators(program):
    graph = program.model_proto.graph
    told = ("LSTM", "GRU", "RNN", "Where")
    return Counter(node.op_type for node in graph.node if node.op_type in told)


def check_same(program, module, arguments):
    """ONNX Runtime's numbers are the module's, up to the rounding of its own kernels."""
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    given = [a.numpy() for a in arguments if a is not None]
    names = [value.name for value in session.get_inputs()]
    found = session.run(None, dict(zip(names, given, strict=True)))
    with torch.no_grad():
        expected = flat(module(*arguments))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(mine), theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "with_state, with_lengths",
    [
        pytest.param(False, False, id="zero state"),
        pytest.param(True, False, id="state", marks=pytest.mark.full),
        pytest.param(False, True, id="lengths", marks=pytest.mark.full),
        pytest.param(True, True, id="state and lengths"),
    ],
)
def test_one_file_serves_every_size(with_state, with_lengths):
    """Standard operators alone, one a layer, and any T and B."""
    module = Layers()

    def arguments(T, B):
        state = torch.randn(B, H) if with_state else None
        lengths = torch.arange(B) * 7 % (T + 1) if with_lengths else None  # the first is empty
        return torch.randn(T, B, I), state, lengths

    batch = {0: DYNAMIC}
    shapes = {
        "x": {0: DYNAMIC, 1: DYNAMIC},
        "state": batch if with_state else None,
        "lengths": batch if with_lengths else None,
    }
    program = export(module, arguments(6, 3), dynamic_shapes=shapes)
    found = operators(program)
    # what ONNX leaves open is said: zeros behind an end, and the first state of an empty sequence
    assert found.pop("Where", 0) == (15 + 10 + 6 if with_lengths else 0)
    assert found == {"LSTM": 8, "GRU": 8, "RNN": 4}
    for T, B in ((6, 3), (1, 1), (9, 4), (40, 2)):
        check_same(program, module, arguments(T, B))


def test_gru_says_where_its_reset_gate_stands():
    program = export(fastseq.GRU(I, H), (torch.randn(4, 2, I),))
    (node,) = [n for n in program.model_proto.graph.node if n.op_type == "GRU"]
    attributes = {a.name: a.i for a in node.attribute}
    assert attributes["linear_before_reset"] == 1 and attributes["hidden_size"] == H


def test_the_weights_are_reordered_in_the_file():
    """Small matrices are constants of the file, and no operator turns them at each run."""
    program = export(fastseq.LSTM(I, H), (torch.randn(4, 2, I),))
    graph = program.model_proto.graph
    (node,) = [n for n in graph.node if n.op_type == "LSTM"]
    constants = {c.name for c in graph.initializer}
    constants |= {n.output[0] for n in graph.node if n.op_type == "Constant"}
    assert set(node.input[1:4]) <= constants


class OneLayer(nn.Module):
    """A cell that no module has, from its weights."""

    def __init__(self, drawn):
        super().__init__()
        self.drawn = drawn

    def forward(self, x):
        stack = self.drawn.stack()
        stack.x, stack.states, stack.geometry = x, [], Dense(x, False)
        return run(stack)[0]


@pytest.mark.parametrize("cell", STANDARDS)
def test_every_cell_with_an_operator(cell):
    module = OneLayer(draw(cell, dtype=torch.float32, directions=2, I=I, grad=False))
    x = torch.randn(5, 3, I)
    program = export(module, (x,))
    assert operators(program) == {STANDARDS[cell].operator: 1}
    check_same(program, module, (x,))


def test_unbatched_and_cells():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.cell = fastseq.GRU(I, H), fastseq.LSTMCell(H, H)

        def forward(self, x):
            y, h = self.layer(x)
            return [y, h, *self.cell(y[-1])]

    module = Model()
    program = export(module, (torch.randn(6, I),), dynamic_shapes={"x": {0: DYNAMIC}})
    for T in (6, 2, 9):
        check_same(program, module, (torch.randn(T, I),))


REFUSED = {
    "projection": (lambda: fastseq.LSTM(I, H, proj_size=3), {}, "projection"),
    "reset": (lambda: fastseq.GRU(I, H), {"reset": torch.zeros(4, 2, dtype=torch.bool)}, "reset="),
    "zoneout": (lambda: fastseq.LSTM(I, H, zoneout=0.2), {}, "zoneout"),
    "all_states": (lambda: fastseq.LSTM(I, H), {"all_states": True}, "all_states=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_operator_says_what_to_do(name):
    make, keywords, words = REFUSED[name]
    arguments = (torch.randn(4, 2, I),)
    with pytest.raises(Exception, match="backend='eager'") as caught:
        export(make(), arguments, kwargs=keywords)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "projection" else pytest.mark.full) for n in REFUSED],
)
def test_the_eager_form_is_exported_step_by_step(name):
    """What the sentence says helps: any batch, one number of steps."""
    make, keywords, _ = REFUSED[name]
    layer = make()
    layer.fastseq.backend = "eager"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, **keywords)

    module = Model()
    x = torch.randn(4, 2, I)
    program = export(module, (x,))
    assert not set(operators(program)) - {"Where"}
    check_same(program, module, (x,))


def test_packed_rows_are_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastseq.GRU(I, H)

        def forward(self, data):
            return self.layer(SPLIT._replace(data=data))[0].data

    SPLIT = pack_sequence([torch.randn(4, I), torch.randn(2, I)])
    with pytest.raises(Exception, match="pass the padded tensor and lengths="):
        export(Model(), (SPLIT.data,))


def test_a_cell_without_operator_is_named():
    module = OneLayer(draw("indrnn", dtype=torch.float32, I=I, grad=False))
    with pytest.raises(Exception, match="ONNX has no operator for indrnn"):
        export(module, (torch.randn(5, 3, I),))
    assert set(CELLS) - set(STANDARDS) == {"indrnn", "indrnn_tanh", "leaky_integrator"}


def test_outside_of_the_export_nothing_changes():
    """torch.export alone keeps our operator, and a layer that was exported runs as before."""
    layer = fastseq.GRU(I, H, backend="numba").eval()
    x = torch.randn(6, 3, I)
    before = layer(x)[0]
    export(layer, (x,))
    assert torch.equal(layer(x)[0], before)
    graph = torch.export.export(layer, (x,)).graph
    assert "fastseq.recurrence.default" in {str(node.target) for node in graph.nodes}


def test_by_torchscript():
    """``dynamo=False``, the exporter that was: torch's own layer stands in the trace."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastseq.LSTM(I, H, bidirectional=True)

        def forward(self, x):
            return flat(self.layer(x))

    module, file = Model().eval(), io.BytesIO()
    torch.onnx.export(
        module,
        (torch.randn(6, 3, I),),
        file,
        dynamo=False,
        input_names=["x"],
        dynamic_axes={"x": {0: "T", 1: "B"}},
    )
    onnx = pytest.importorskip("onnx")
    program = SimpleNamespace(model_proto=onnx.load_from_string(file.getvalue()))
    assert operators(program) == {"LSTM": 1}
    check_same(program, module, (torch.randn(9, 4, I),))


@pytest.mark.parametrize(
    "connections",
    [*(pytest.param(c, marks=pytest.mark.full) for c in ("plain", "residual")), "highway"],
)
def test_a_stack_of_kinds(connections):
    """An operator for each layer, and torch's own for what stands between; any batch."""
    torch.manual_seed(0)
    layers = [fastseq.LSTM(I, H), fastseq.LSTM(H, H), fastseq.GRU(H, 6)]
    reverse = [fastseq.RNN(I, H), fastseq.GRU(H, H), fastseq.GRU(H, 6)]
    stack = fastseq.Stacked(layers, reverse=reverse, connections=connections, dropout=0.5)
    x = torch.randn(4, 3, I)
    program = export(stack, (x,), dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},))
    found = operators(program)
    assert (found["LSTM"], found["GRU"], found["RNN"]) == (2, 3, 1)
    for T, B in ((4, 3), (7, 2), (1, 1)):
        check_same(program, stack, (torch.randn(T, B, I),))

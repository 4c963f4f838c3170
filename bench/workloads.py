"""The one list of named workloads: what is timed here is what the tests check.

Each has the shape of something that people run, and says whose. Letters as everywhere: T time
steps, B batch, I input size, H hidden size, P projected size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

Mode = Literal["layer", "cell", "streaming"]
Form = Literal["layer", "cell", "handle"]  # what is called with one step
Rule = Literal["equal", "spread"]

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
LAYERS = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}
TEXTS = {"rnn": "rnn_tanh"}  # where fastseq.cells has another name


@dataclass(frozen=True)
class Workload:
    """One cell at one shape.

    source: the paper or project the shape is from; where a size is our choice, it says so.
    training: whether forward and backward are timed beside forward alone.
    mode: 'layer' one call for all of T; 'streaming' T calls of a layer with one step each, the
        state carried; 'cell' T calls of a cell module.
    lengths: 'equal', or 'spread' evenly from T down to T/8, given as a PackedSequence.
    """

    name: str
    cell: Literal["rnn", "gru", "lstm"]
    T: int
    B: int
    I: int  # noqa: E741  (the field's letter)
    H: int
    source: str
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    training: bool = True
    mode: Mode = "layer"
    lengths: Rule = "equal"
    dtype: torch.dtype = torch.float32

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def sequence_lengths(self) -> list[int]:
        """(B,) decreasing."""
        if self.lengths == "equal" or self.B == 1:
            return [self.T] * self.B
        shortest = max(1, self.T // 8)
        span = self.T - shortest
        return [self.T - span * b // (self.B - 1) for b in range(self.B)]

    @property
    def N(self) -> int:
        """Rows: the sum of the lengths."""
        return sum(self.sequence_lengths)

    @property
    def shape(self) -> str:
        """For people: 'LSTM T35 B20 I650 H650 x2'; the type where it is not float32."""
        text = f"{self.cell.upper()} T{self.T} B{self.B} I{self.I} H{self.H}"
        text += f" P{self.proj}" if self.proj else ""
        text += f" x{self.layers}" if self.layers > 1 else ""
        text += " both ways" if self.bidirectional else ""
        text += " ragged" if self.lengths != "equal" else ""
        text += f" {self.mode}" if self.mode != "layer" else ""
        return text + (f" {self.type}" if self.dtype is not torch.float32 else "")

    @property
    def type(self) -> str:
        """'float32', say."""
        return str(self.dtype).removeprefix("torch.")

    def _products(self) -> int:
        """Weights that are multiplied per row, over layers and directions."""
        G, H, P = GATES[self.cell], self.H, self.proj or self.H
        total = 0
        for layer in range(self.layers):
            width = self.I if layer == 0 else P * self.D
            total += self.D * (G * H * (width + P) + (self.proj * H))
        return total

    def flops(self, training: bool) -> int:
        """Floating point operations of the products: forward, or with all gradients."""
        return 2 * self.N * self._products() * (3 if training else 1)

    def bytes(self, training: bool) -> int:
        """Roughly what one contender holds: weights, their gradients, and rows of every layer."""
        size = self.dtype.itemsize
        G, P = GATES[self.cell], self.proj or self.H
        rows = self.I + self.layers * self.D * ((G + 2) * self.H + P) * (2 if training else 1)
        return size * (self._products() * (2 if training else 1) + self.N * rows)

    @property
    def form(self) -> Form:
        """What the mode calls."""
        return "cell" if self.mode == "cell" else "layer"

    def module(self, library: Any = nn, form: Form | None = None, **options: Any) -> nn.Module:
        """The module of ``library``, torch.nn or fastseq, seeded; the mode's, or of a form."""
        torch.manual_seed(0)
        name = LAYERS[self.cell]
        if (form or self.form) == "cell":
            return getattr(library, name + "Cell")(self.I, self.H, dtype=self.dtype, **options)
        if self.proj:
            options["proj_size"] = self.proj
        return getattr(library, name)(
            self.I,
            self.H,
            self.layers,
            bidirectional=self.bidirectional,
            dtype=self.dtype,
            **options,
        )

    def input(self) -> Tensor | PackedSequence:
        """Standard normal, seeded: (T, B, I), packed where the lengths differ."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.T, self.B, self.I, generator=generator, dtype=self.dtype)
        if self.lengths == "equal":
            return x
        return pack_padded_sequence(x, torch.tensor(self.sequence_lengths))

    def run(self, module: nn.Module, x: Tensor | PackedSequence) -> Tensor:
        """The output of every step as one tensor, called as the mode says."""
        if self.mode == "layer":
            y = module(x)[0]
            return y.data if isinstance(y, PackedSequence) else y
        outputs = []
        state = None
        for t in range(self.T):
            if self.mode == "cell":
                state = module(x[t], state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            else:
                y, state = module(x[t : t + 1], state)
                outputs.append(y[0])
        return torch.stack(outputs)


class Walk:
    """A workload of one step a call: T calls of a module, or of a handle of fastseq.streaming.

    The input is cut before the clock starts. The state begins with zeros and is handed on; the
    outputs are left where they are.
    """

    def __init__(self, workload: Workload, called: Any, form: Form) -> None:
        x = workload.input()
        assert isinstance(x, Tensor)
        self.called, self.form = called, form
        self.steps = list(x.split(1) if form == "layer" else x)
        shape = (workload.B, workload.H) if form == "cell" else (1, workload.B, workload.H)
        zeros = x.new_zeros(shape)
        self.state: Any = (zeros, zeros) if workload.cell == "lstm" else zeros

    def begin(self) -> None:
        """Before the clock starts: a handle keeps its state itself."""
        if self.form == "handle":
            self.called.reset()

    def __call__(self, see: Callable[[Tensor], Any] | None = None) -> None:
        """``see`` is shown each output."""
        called, state = self.called, self.state
        if self.form == "handle":
            called = called.step
            for x in self.steps:
                y = called(x)
                if see:
                    see(y)
        elif self.form == "cell":
            for x in self.steps:
                state = called(x, state)
                if see:
                    see(state[0] if isinstance(state, tuple) else state)
        else:
            for x in self.steps:
                y, state = called(x, state)
                if see:
                    see(y[0])

    def outputs(self) -> Tensor:
        """(T, B, H)."""
        seen: list[Tensor] = []
        self.begin()
        self(lambda y: seen.append(y.clone()))
        return torch.stack(seen)


def as_cell(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a layer as a cell names them."""
    return {name.removesuffix("_l0"): value for name, value in state.items()}


def as_layer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a cell as a layer names them."""
    return {f"{name}_l0": value for name, value in as_cell(state).items()}


def _each(cells: Iterable[str], name: str, **shape: Any) -> list[Workload]:
    return [Workload(name=f"{name}-{cell}", cell=cell, **shape) for cell in cells]  # type: ignore[arg-type]


ZAREMBA = "Zaremba et al. 2014, Recurrent Neural Network Regularization, arXiv:1409.2329"
MERITY = "Merity et al. 2017, Regularizing and Optimizing LSTM Language Models, arXiv:1708.02182"
KARPATHY = "Karpathy 2015, char-rnn, one-hot of the 65 characters of its Shakespeare file"
AMODEI = "Amodei et al. 2015, Deep Speech 2, arXiv:1512.02595; an inner layer of 1024 units"
WAN = (
    "Wan et al. 2017, Generalized End-to-End Loss for Speaker Verification, arXiv:1710.10467, in "
    "the size of Resemblyzer; the batch is our choice"
)
SILERO = "Silero VAD, one chunk of audio a call; 64 calls"
SHEN = (
    "Shen et al. 2017, Tacotron 2, arXiv:1712.05884: the attention LSTM of the decoder, one frame "
    "a call; 32 calls"
)
LAMPLE = (
    "Lample et al. 2016, Neural Architectures for Named Entity Recognition, arXiv:1603.01360; "
    "the hidden size is rounded up, batch and lengths are our choice"
)
PETERS = (
    "Peters et al. 2018, Deep contextualized word representations (ELMo), arXiv:1802.05365; "
    "the batch is our choice"
)
CLEANRL = "CleanRL, ppo_atari_lstm: 8 environments, 128 steps, features of 512, 128 units"
SIMULATORS = "PPO over a vectorised simulator of 2048 environments; the sizes are our choice"
SALINAS = "After Salinas et al. 2017, DeepAR, arXiv:1704.04110; the sizes are our choice"
POEPPEL = "Poeppel et al. 2024, FlashRNN, arXiv:2412.07752: batch 16, 1024 steps, 768 units"
OURS = "fastseq: "

PEER_SHAPES = (  # T, B, I, H
    (64, 1, 128, 128),
    (256, 1, 256, 256),
    (100, 32, 128, 256),
    (50, 64, 512, 512),
    (35, 20, 650, 650),
    (200, 16, 64, 64),
    (1000, 1, 64, 64),
    (500, 128, 32, 32),
)
TYPE_SHAPES = ((100, 16, 128), (256, 1, 64))  # T, B, H
#: what is timed beside other libraries, where nothing else is asked for
PEER_WORKLOADS = "peers-* streaming-*"

WORKLOADS: tuple[Workload, ...] = (
    # Language
    Workload("ptb-medium", "lstm", T=35, B=20, I=650, H=650, layers=2, source=ZAREMBA),
    Workload("ptb-large", "lstm", T=35, B=20, I=1500, H=1500, layers=2, source=ZAREMBA),
    Workload("awd-lstm-first", "lstm", T=70, B=80, I=400, H=1150, source=MERITY),
    Workload("awd-lstm-middle", "lstm", T=70, B=80, I=1150, H=1150, source=MERITY),
    Workload("awd-lstm-last", "lstm", T=70, B=80, I=1150, H=400, source=MERITY),
    *_each(
        ("lstm", "gru", "rnn"), "char-rnn-h128", T=50, B=50, I=65, H=128, layers=2, source=KARPATHY
    ),
    *_each(("lstm", "gru"), "char-rnn-h512", T=50, B=50, I=65, H=512, layers=2, source=KARPATHY),
    *_each(
        ("lstm", "gru"),
        "tagger",
        T=50,
        B=32,
        I=100,
        H=128,
        bidirectional=True,
        lengths="spread",
        source=LAMPLE,
    ),
    *_each(
        ("lstm", "gru"),
        "tagger-dense",
        T=50,
        B=32,
        I=100,
        H=128,
        bidirectional=True,
        source=LAMPLE + "; all of the full length, beside which a ragged token's cost stands",
    ),
    Workload(
        "elmo",
        "lstm",
        T=20,
        B=16,
        I=512,
        H=4096,
        proj=512,
        layers=2,
        bidirectional=True,
        training=False,
        source=PETERS,
    ),
    # Speech
    *_each(
        ("gru", "rnn"),
        "deepspeech2",
        T=400,
        B=16,
        I=1024,
        H=1024,
        bidirectional=True,
        source=AMODEI,
    ),
    Workload("speaker-encoder", "lstm", T=160, B=32, I=40, H=256, layers=3, source=WAN),
    Workload(
        "vad-streaming",
        "lstm",
        T=64,
        B=1,
        I=128,
        H=128,
        training=False,
        mode="streaming",
        source=SILERO,
    ),
    Workload(
        "tts-decoder", "lstm", T=32, B=1, I=768, H=1024, training=False, mode="cell", source=SHEN
    ),
    # Control and time series
    Workload("rl-policy-b8", "lstm", T=128, B=8, I=512, H=128, source=CLEANRL),
    Workload("rl-policy-b2048-h64", "gru", T=128, B=2048, I=64, H=64, source=SIMULATORS),
    Workload("rl-policy-b2048-h256", "lstm", T=128, B=2048, I=64, H=256, source=SIMULATORS),
    *_each(("lstm", "gru"), "forecaster", T=100, B=256, I=10, H=64, layers=2, source=SALINAS),
    # Extremes
    Workload("flashrnn-point", "lstm", T=1024, B=16, I=768, H=768, source=POEPPEL),
    *_each(
        ("lstm", "gru", "rnn"),
        "long",
        T=65536,
        B=1,
        I=64,
        H=64,
        source=OURS + "one long recording in one call",
    ),
    # Where torch.nn spends its time between the products
    *(
        workload
        for H in (32, 64, 128, 256)
        for T, B in ((512, 1), (128, 4))
        for workload in _each(
            ("lstm", "gru", "rnn"),
            f"small-b{B}-h{H}",
            T=T,
            B=B,
            I=H,
            H=H,
            source=OURS + "a grid of small shapes",
        )
    ),
    # Beside other libraries (bench/peers.py)
    *(
        workload
        for T, B, I, H in PEER_SHAPES  # noqa: E741
        for workload in _each(
            ("lstm", "gru"),
            f"peers-t{T}-b{B}-i{I}-h{H}",
            T=T,
            B=B,
            I=I,
            H=H,
            source=OURS + "a spread of shapes for the comparison with other libraries",
        )
    ),
    *(
        workload
        for T, H in ((64, 128), (16, 1024))
        for workload in _each(
            ("lstm", "gru"),
            f"streaming-h{H}",
            T=T,
            B=1,
            I=H,
            H=H,
            training=False,
            mode="streaming",
            source=OURS + f"one step a call, {T} calls",
        )
    ),
    # Other types than float32, and the projection
    *(
        workload
        for T, B, H in TYPE_SHAPES
        for name, cells, more in (
            ("proj", ("lstm",), {"proj": H // 2}),
            ("float64", ("lstm", "gru"), {"dtype": torch.float64}),
            ("float16", ("lstm", "gru"), {"dtype": torch.float16}),
            ("bfloat16", ("gru",), {"dtype": torch.bfloat16}),
        )
        for workload in _each(
            cells,
            f"types-{name}-b{B}-h{H}",
            T=T,
            B=B,
            I=H,
            H=H,
            source=OURS + "two sizes in each type, our choice",
            **more,
        )
    ),
    # For the tests of the benchmarks themselves
    Workload("tiny-layer", "gru", T=5, B=2, I=3, H=4, source=OURS + "smoke test"),
    Workload(
        "tiny-ragged", "lstm", T=6, B=3, I=3, H=4, lengths="spread", source=OURS + "smoke test"
    ),
    Workload(
        "tiny-float16", "lstm", T=5, B=2, I=3, H=4, dtype=torch.float16, source=OURS + "smoke test"
    ),
    Workload(
        "tiny-streaming",
        "lstm",
        T=3,
        B=1,
        I=3,
        H=4,
        training=False,
        mode="streaming",
        source=OURS + "smoke test",
    ),
)


def by_name(name: str) -> Workload:
    for workload in WORKLOADS:
        if workload.name == name:
            return workload
    raise ValueError(
        f"no workload is named {name!r}; names: {', '.join(w.name for w in WORKLOADS)}"
    )


def matching(patterns: str | None, more: Iterable[Workload] = ()) -> list[Workload]:
    """Those whose name matches one of the patterns ('small* ptb-medium'); all but tiny if None.

    more: what a pattern may match beside those of the list.
    """
    if patterns is None:
        return [w for w in WORKLOADS if not w.name.startswith("tiny-")]
    among = [*WORKLOADS, *more]
    found = []
    for pattern in patterns.replace(",", " ").split():
        hits = [w for w in among if fnmatchcase(w.name, pattern)]
        if not hits:
            names = ", ".join(w.name for w in WORKLOADS)
            raise ValueError(f"no workload matches {pattern!r}; names: {names}")
        found += [w for w in hits if w not in found]
    return found

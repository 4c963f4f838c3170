"""Learn word vectors in four ways, and start a language model from them.

The words are those of the standard library's source: its docstrings, comments and identifiers,
these split at underscores and capitals. Two ways count which words stand together and factor the
counts: positive pointwise mutual information (PPMI) with a truncated singular value decomposition,
and GloVe. The other two, word2vec's skip-gram and CBOW, learn to tell words that stand together
from words drawn at random. Vectors of words are the first layer of most recurrent models, which is
why this example is here: at the end a GRU language model starts from them and from random ones.

How good vectors are is asked in three ways that need no taste: is a word's plural or past tense
among its ten nearest neighbours; does "file is to files as line is to ..." give "lines"; and does
the cosine of two words go with how much more often than by chance they stand together in files
that were held out.

Paper: Mikolov, Sutskever, Chen, Corrado and Dean 2013, Distributed Representations of Words and
Phrases and their Compositionality. Pennington, Socher and Manning 2014, GloVe: Global Vectors for
Word Representation. Levy and Goldberg 2014, Neural Word Embedding as Implicit Matrix Factorization.

    python examples/embeddings.py --dim 100 --words 8000
    python examples/embeddings.py --text novel.txt --show king queen london
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import common
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, logsigmoid, normalize

import fastseq

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # HTTPServer gives HTTP and Server
RARE = 5  # a word that occurs less often has no vector
SEEN = 30  # a word whose plural or past tense is asked for occurs so often, and so does that
NEAREST = 10
BREAK = -1  # between two files; no window reaches across

NEGATIVES = 5  # words drawn for each pair
DRAWN = 64  # words drawn for a batch, which its positions share
POSITIONS = 512  # of a batch
ROWS = 100  # of the counts, a batch of GloVe's
X_MAX = 10.0  # pairs that are seen so often count fully; GloVe's 100 was for 1000 times the text

BPTT, BATCH = 32, 16  # of the language model

LABELS = {"svd": "PPMI and SVD", "skip_gram": "skip-gram", "cbow": "CBOW", "glove": "GloVe"}

#: a : b :: c : d, for any two pairs of a line.
ANALOGIES = """
file:files line:lines list:lists key:keys value:values name:names argument:arguments method:methods
int:integer str:string dict:dictionary bool:boolean func:function arg:argument char:character
read:reader write:writer parse:parser load:loader format:formatter encode:encoder decode:decoder
call:called use:used return:returned define:defined create:created pass:passed close:closed
min:max first:last start:end left:right get:set open:close encode:decode read:write old:new
attr:attribute param:parameter num:number dir:directory addr:address msg:message prev:previous
"""

GROUPS = {
    "types": "int float str bytes list tuple dict bool",
    "files": "file path directory filename folder open read write",
    "time": "day month year hour minute week date timezone",
    "network": "socket server client http host port url request",
    "concurrency": "thread process lock queue pool executor semaphore task",
}


# Text


def words_of(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


def documents(options: argparse.Namespace) -> list[list[str]]:
    """The words of each file; of one text, of ten parts of it."""
    if options.text is None:
        paths = common.modules(files=options.files, packages=options.packages)
        return [words_of(common.read(path)) for path in paths]
    words = words_of(common.read(options.text))
    if len(words) < 1000:
        common.stop(f"{options.text}: the text has {len(words)} words; expected at least 1000")
    part = math.ceil(len(words) / 10)
    return [words[k : k + part] for k in range(0, len(words), part)]


class Vocabulary:
    """The most frequent words, by falling frequency."""

    def __init__(self, texts: list[list[str]], size: int) -> None:
        found = Counter(word for text in texts for word in text).most_common(size)
        self.words = [word for word, count in found if count >= RARE]
        self.number = {word: k for k, word in enumerate(self.words)}
        self.counts = torch.tensor([float(count) for _, count in found[: len(self.words)]])

    def __len__(self) -> int:
        return len(self.words)

    def numbers(self, words: list[str]) -> list[int]:
        return [self.number[word] for word in words if word in self.number]

    def stream(self, texts: list[list[str]]) -> Tensor:
        """The texts' words as numbers, with a ``BREAK`` after each text. Words without a number
        are left out, so that windows reach across them, as word2vec's do."""
        return torch.tensor([k for text in texts for k in [*self.numbers(text), BREAK]])


# Counts


def cooccurrence(stream: Tensor, size: int, window: int, *, harmonic: bool) -> Tensor:
    """X (size, size): how often two words stand within ``window`` words of each other.

    Args:
        harmonic: words that stand d apart count 1 / d, as in GloVe, and not 1.
    """
    x = torch.zeros(size * size)
    for distance in range(1, window + 1):
        spans = stream.unfold(0, distance + 1, 1)
        first, second = spans[(spans != BREAK).all(1)][:, [0, -1]].unbind(1)
        weight = 1 / distance if harmonic else 1.0
        x.scatter_add_(0, first * size + second, torch.full((len(first),), weight))
    x = x.view(size, size)
    return x + x.t()


def pmi(x: Tensor, smoothing: float = 0.75) -> Tensor:
    """log p(a, b) / (p(a) q(b)), pointwise mutual information, and 0 where a and b never meet.

    q is of the counts to the power of ``smoothing`` (Levy, Goldberg and Dagan 2015), or a rare word
    would seem close to all it stands by.
    """
    p_a = x.sum(1, keepdim=True) / x.sum()
    q_b = x.sum(0) ** smoothing
    ratio = (x / x.sum()) / (p_a * (q_b / q_b.sum()))
    return torch.where(x > 0, ratio, 1.0).log()


def svd_vectors(x: Tensor, dim: int) -> Tensor:
    """U sqrt(S) of the ``dim`` greatest singular values."""
    u, s, _ = torch.svd_lowrank(x, dim, niter=2)
    return u * s.sqrt()


class GloVe(nn.Module):
    """J = 1/2 sum f(X_ab) (w_a . c_b + b_a + d_b - log X_ab)², with f(x) = min(1, x / x_max)^3/4.

    f(0) = 0 leaves out pairs that never meet. A batch is some rows of X, all columns: a matrix
    product makes all its w . c, some ten times as fast here as gathering the pairs that are there.
    """

    def __init__(self, x: Tensor, dim: int) -> None:
        super().__init__()
        self.w = nn.Parameter((torch.rand(len(x), dim) - 0.5) / dim)
        self.c = nn.Parameter((torch.rand(len(x), dim) - 0.5) / dim)
        self.b = nn.Parameter(torch.zeros(len(x), 1))
        self.d = nn.Parameter(torch.zeros(len(x)))
        self.weight = (x / X_MAX).clamp(max=1) ** 0.75
        self.log_x = torch.where(x > 0, x, 1.0).log()

    def vectors(self) -> Tensor:
        """w + c: X is symmetric, and the two differ by how they started alone."""
        return (self.w + self.c).detach()


def glove_loss(model: GloVe, rows: Tensor) -> Tensor:
    """J of some rows, for each of them."""
    apart = model.w[rows] @ model.c.t() + model.b[rows] + model.d - model.log_x[rows]
    return 0.5 * (model.weight[rows] * apart**2).sum() / len(rows)


def rows_in_turn(size: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(size).split(ROWS)


# word2vec


def keep_chance(counts: Tensor, threshold: float) -> Tensor:
    """sqrt(t / f) of a word with frequency f, at most 1: frequent words are thinned out."""
    return (threshold * counts.sum() / counts).sqrt().clamp(max=1)


def noise(counts: Tensor) -> Tensor:
    """From which words are drawn that do not stand there: the frequencies to the power of 3/4."""
    powers = counts**0.75
    return powers / powers.sum()


def positions(stream: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Words (N,) and what stands around each (N, 2 window), ``BREAK`` where nothing does.

    Each position draws how far its window reaches, from 1 to ``window``, so that near words count
    more; and a file's end ends it too. Positions with nothing around them are left out.
    """
    outside = torch.full((window,), BREAK)
    spans = torch.cat([outside, stream, outside]).unfold(0, 2 * window + 1, 1)
    spans = spans[stream != BREAK]
    before, after = spans[:, :window].flip(1), spans[:, window + 1 :]
    reach = torch.randint(1, window + 1, (len(spans), 1))
    sides = []
    for side in (before, after):  # from near to far
        inside = torch.arange(window) < reach
        inside &= (side != BREAK).cumprod(1).bool()
        sides.append(torch.where(inside, side, BREAK))
    around = torch.cat(sides, 1)
    some = (around != BREAK).any(1)
    return spans[some, window], around[some]


class Word2Vec(nn.Module):
    """Vectors v of words that predict, and u of words that are predicted."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.v = nn.Parameter((torch.rand(size, dim) - 0.5) / dim)
        self.u = nn.Parameter(torch.zeros(size, dim))

    def vectors(self) -> Tensor:
        return self.v.detach()


Positions = tuple[Tensor, Tensor, Tensor]  # words, what stands around them, words drawn


def skip_gram_loss(model: Word2Vec, batch: Positions) -> Tensor:
    """-log s(u_c . v_w) - k E[log s(-u_n . v_w)], the mean over a word's pairs (w, c).

    The expectation over words n drawn from the noise is taken as the mean of ``DRAWN`` words that
    all pairs of a batch share: the same objective as k words for each pair, and one matrix product
    in place of k gathers (Ji et al. 2016, Parallelizing Word2Vec in Shared and Distributed Memory).
    """
    words, around, drawn = batch
    there = around != BREAK
    v = embedding(words, model.v)
    u = embedding(around.clamp(min=0), model.u)
    right = (logsigmoid((u * v[:, None]).sum(-1)) * there).sum()
    wrong = (logsigmoid(-v @ model.u[drawn].t()).mean(1) * there.sum(1)).sum()
    return -(right + NEGATIVES * wrong) / there.sum()


def cbow_loss(model: Word2Vec, batch: Positions) -> Tensor:
    """-log s(u_w . h) - k E[log s(-u_n . h)], with h the mean of the v around the word w."""
    words, around, drawn = batch
    there = (around != BREAK)[:, :, None]
    h = (embedding(around.clamp(min=0), model.v) * there).sum(1) / there.sum(1)
    right = logsigmoid((embedding(words, model.u) * h).sum(-1)).mean()
    return -(right + NEGATIVES * logsigmoid(-h @ model.u[drawn].t()).mean())


def position_batches(
    stream: Tensor, counts: Tensor, window: int, threshold: float
) -> Iterator[Positions]:
    """Without end, each epoch thinned out and shuffled anew."""
    chance, drawn_from = keep_chance(counts, threshold), noise(counts)
    while True:
        kept = (stream == BREAK) | (torch.rand(len(stream)) < chance[stream.clamp(min=0)])
        words, around = positions(stream[kept], window)
        for part in torch.randperm(len(words)).split(POSITIONS):
            drawn = torch.multinomial(drawn_from, DRAWN, replacement=True)
            yield words[part], around[part], drawn


def fit(label: str, model, loss, batches, *, steps: int, lr: float, seconds: float) -> Tensor:
    """The vectors after Adam with a rate that falls to 0 in a line, with the steps or the seconds,
    whichever end first. Gradients are dense: the tables are small, and one fused update of all of
    them costs less than sparse ones of a batch's rows."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    start = time.perf_counter()

    def slow_down(step: int) -> None:
        gone = max(step / steps, (time.perf_counter() - start) / seconds)
        for group in optimizer.param_groups:
            group["lr"] = lr * max(1 - gone, 0.0)

    common.train(
        label,
        model,
        loss,
        batches,
        steps=steps,
        seconds=seconds,
        clip=math.inf,
        optimizer=optimizer,
        after=slow_down,
    )
    return model.vectors()


# How good they are


def nearest(vectors: Tensor, queries: Tensor, apart: Tensor, count: int) -> Tensor:
    """The ``count`` words nearest to queries (N, D) by cosine, but for ``apart`` (N, any)."""
    cosine = normalize(queries, dim=1) @ normalize(vectors, dim=1).t()
    return cosine.scatter(1, apart, -2.0).topk(count).indices


def form_pairs(vocabulary: Vocabulary) -> Tensor:
    """(N, 2) words and their plural or past tense, where both are seen often enough."""
    often = [w for w, n in zip(vocabulary.words, vocabulary.counts, strict=True) if n >= SEEN]
    known = set(often)
    pairs = [
        (word, form)
        for word in often
        if len(word) > 2
        for form in (word + "s", word + ("d" if word[-1] == "e" else "ed"))
        if form in known
    ]
    return torch.tensor([vocabulary.numbers(pair) for pair in pairs], dtype=torch.long).view(-1, 2)


def analogy_questions(vocabulary: Vocabulary) -> Tensor:
    """(N, 4): a, b, c and the answer."""
    questions = []
    for line in ANALOGIES.split("\n"):
        pairs = [vocabulary.numbers(pair.split(":")) for pair in line.split()]
        pairs = [pair for pair in pairs if len(pair) == 2]
        questions += [[*one, *other] for one in pairs for other in pairs if one != other]
    return torch.tensor(questions, dtype=torch.long).view(-1, 4)


def forms_found(vectors: Tensor, pairs: Tensor) -> float:
    found = nearest(vectors, vectors[pairs[:, 0]], pairs[:, :1], NEAREST)
    return share((found == pairs[:, 1:]).any(1))


def answers(vectors: Tensor, questions: Tensor) -> Tensor:
    """(N, 1): the word nearest to b - a + c, of unit vectors, which is none of the three."""
    a, b, c, _ = normalize(vectors, dim=1)[questions].unbind(1)
    return nearest(vectors, b - a + c, questions[:, :3], 1)


def analogies_solved(vectors: Tensor, questions: Tensor) -> float:
    return share((answers(vectors, questions) == questions[:, 3:]).any(1))


def share(right: Tensor) -> float:
    return right.float().mean().item() if len(right) else 0.0


def held_out_agreement(vectors: Tensor, x: Tensor) -> float:
    """Spearman's rank correlation of cosine and PMI, over the pairs that meet in the counts x."""
    a, b = torch.nonzero(x.triu(1) >= RARE).unbind(1)
    if len(a) < 3:
        return 0.0
    unit = normalize(vectors, dim=1)
    cosine = (unit[a] * unit[b]).sum(1)
    ranks = torch.stack([values.argsort().argsort() for values in (cosine, pmi(x)[a, b])])
    return torch.corrcoef(ranks.double())[0, 1].item()


# What they are for


class WordLM(nn.Module):
    """An embedding, a GRU and a linear readout."""

    def __init__(self, vectors: Tensor, hidden: int, backend: str | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(vectors.clone(), freeze=False)
        self.layer = fastseq.GRU(vectors.shape[1], hidden, backend=backend)
        self.readout = nn.Linear(hidden, len(vectors))

    def forward(self, words: Tensor) -> Tensor:
        return self.readout(self.layer(self.embedding(words))[0])


def lm_loss(model: WordLM, text: Tensor) -> Tensor:
    """Nats per word of (T + 1, B) words."""
    return cross_entropy(model(text[:-1]).flatten(0, 1), text[1:].flatten())


def passages(stream: Tensor) -> Tensor:
    """(N, T + 1): the words of a stream, cut."""
    words = stream[stream != BREAK]
    count = len(words) // (BPTT + 1)
    return words[: count * (BPTT + 1)].view(count, BPTT + 1)


def text_batches(cut: Tensor, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for part in torch.randperm(len(cut), generator=generator).split(BATCH):
            yield cut[part].t()


@torch.no_grad()
def held_out_loss(model: WordLM, cut: Tensor) -> float:
    """Over 2048 passages at most, spread over the text."""
    spread = cut[:: math.ceil(len(cut) / 2048)]
    losses = [lm_loss(model, part.t()) * len(part) for part in spread.split(64)]
    return sum(losses).item() / len(spread)


# What is shown


def plot(vectors: dict[str, Tensor], vocabulary: Vocabulary, out: Path) -> None:
    """Groups of words on the two directions in which they differ most."""
    groups = {
        name: [word for word in words.split() if word in vocabulary.number]
        for name, words in GROUPS.items()
    }
    words = [word for group in groups.values() for word in group]
    if len(words) < 3:  # another text: its own most frequent words
        words = [word for word in vocabulary.words if len(word) > 3][:40]
        groups = {"frequent words": words}
    figure, panels = common.picture(columns=len(vectors), height=4.8)
    for axes, (name, table) in zip(panels, vectors.items(), strict=True):
        unit = normalize(table[vocabulary.numbers(words)], dim=1)
        unit = unit - unit.mean(0)
        x, y = (unit @ torch.linalg.svd(unit, full_matrices=False).Vh[:2].t()).t()
        start = 0
        for colour, (kind, group) in zip(common.COLOURS, groups.items(), strict=False):
            part = slice(start, start + len(group))
            axes.plot(x[part], y[part], "o", color=colour, markersize=4, label=kind)
            start = part.stop
        for word, *at in zip(words, x.tolist(), y.tolist(), strict=True):
            axes.annotate(word, at, xytext=(3, 2), textcoords="offset points", fontsize=6.5)
        axes.set_title(LABELS[name], fontsize=11, loc="left")
        axes.margins(0.1)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(groups),
        frameon=False,
    )
    common.save(figure, out / "embeddings.png")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    made = common.parser(__doc__, seconds=120.0)
    made.add_argument("--text", type=Path, help="a text file in place of the standard library")
    made.add_argument("--files", type=common.positive, help="files of it; all if left out")
    made.add_argument(
        "--packages",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the library's packages too",
    )
    made.add_argument(
        "--words", type=common.positive, default=4000, help="with vectors: counts are its square"
    )
    made.add_argument("--dim", type=common.positive, default=64, help="numbers of a vector")
    made.add_argument("--window", type=common.positive, default=5, help="words on either side")
    made.add_argument(
        "--epochs", type=common.positive, default=8, help="passes over the text of word2vec"
    )
    made.add_argument(
        "--passes", type=common.positive, default=30, help="passes over the counts of GloVe"
    )
    made.add_argument(
        "--threshold", type=common.above_zero, default=2e-4, help="of frequency, to thin out words"
    )
    made.add_argument("--hidden", type=common.positive, default=128, help="the GRU's units")
    made.add_argument("--steps", type=common.positive, default=1000, help="of the language model")
    made.add_argument(
        "--show", nargs="+", metavar="WORD", default=["file", "read", "int", "min", "thread"]
    )
    short = {"seconds": 40.0, "words": 3000, "epochs": 2, "passes": 15, "hidden": 64, "steps": 100}
    return common.parse(made, argv, short)


def main(argv: list[str] | None = None) -> dict[str, float]:
    options = arguments(argv)
    texts, held_out_texts = common.split(documents(options))
    vocabulary = Vocabulary(texts, options.words)
    size = len(vocabulary)
    least = max(options.dim, 2 * NEAREST)
    if size <= least:
        common.stop(
            f"{size} words occur {RARE} times or more; expected more than {least} for --dim "
            f"{options.dim}: give a longer text"
        )
    stream, held_out = vocabulary.stream(texts), vocabulary.stream(held_out_texts)
    print(
        f"{len(stream) - len(texts):,} words to learn from, {len(held_out) - len(held_out_texts):,}"
        f" held out; {size:,} words have a vector of {options.dim} numbers"
    )

    def svd() -> Tensor:
        counts = cooccurrence(stream, size, options.window, harmonic=False)
        return svd_vectors(pmi(counts).clamp(min=0), options.dim)

    def glove() -> Tensor:
        counts = cooccurrence(stream, size, options.window, harmonic=True)
        steps = options.passes * math.ceil(size / ROWS)
        model = GloVe(counts, options.dim)
        return fit(
            "GloVe", model, glove_loss, rows_in_turn(size), steps=steps, lr=0.05, seconds=seconds
        )

    def word2vec(label, loss) -> Tensor:
        kept = vocabulary.counts @ keep_chance(vocabulary.counts, options.threshold)
        steps = math.ceil(options.epochs * kept.item() / POSITIONS)
        batches = position_batches(stream, vocabulary.counts, options.window, options.threshold)
        model = Word2Vec(size, options.dim)
        return fit(label, model, loss, batches, steps=steps, lr=0.03, seconds=seconds)

    seconds = options.seconds / 5  # of each training: three of vectors, two of language models
    learn = {
        "svd": svd,
        "skip_gram": lambda: word2vec("skip-gram", skip_gram_loss),
        "cbow": lambda: word2vec("CBOW", cbow_loss),
        "glove": glove,
    }
    pairs, questions = form_pairs(vocabulary), analogy_questions(vocabulary)
    held_out_counts = cooccurrence(held_out, size, options.window, harmonic=False)
    vectors, rows, figures = {}, [], {}
    for name, label in LABELS.items():
        start = time.perf_counter()
        vectors[name] = learn[name]()
        took = time.perf_counter() - start
        figures[f"{name}_forms"] = forms_found(vectors[name], pairs)
        figures[f"{name}_analogies"] = analogies_solved(vectors[name], questions)
        figures[f"{name}_held_out"] = held_out_agreement(vectors[name], held_out_counts)
        scores = list(figures.values())[-3:]
        rows.append([label, *(f"{score:.3f}" for score in scores), f"{took:.1f}"])
    figures["chance_forms"], figures["chance_analogies"] = NEAREST / (size - 1), 1 / (size - 3)
    rows.append(
        ["chance", f"{figures['chance_forms']:.4f}", f"{figures['chance_analogies']:.4f}", "0", ""]
    )
    print(
        f"\n{len(pairs)} plurals and past tenses, found if among the {NEAREST} nearest; "
        f"{len(questions)} analogies; rank correlation\nof cosine and PMI in the files held out:\n"
    )
    print(common.table(("", "forms", "analogies", "held out", "seconds"), rows))

    print("\nNearest neighbours:")
    for word in options.show:
        if word not in vocabulary.number:
            print(f"{word}: not among the words that have a vector")
            continue
        at = torch.tensor([[vocabulary.number[word]]])
        for name, label in LABELS.items():
            found = nearest(vectors[name], vectors[name][at[0]], at, 6)[0].tolist()
            print(f"{word:8} {label:13} {' '.join(vocabulary.words[k] for k in found)}")

    if len(questions):
        some = questions[:: math.ceil(len(questions) / 5)]
        found = [answers(vectors[name], some)[:, 0].tolist() for name in LABELS]
        rows = []
        for question, *answered in zip(some.tolist(), *found, strict=True):
            a, b, c, *answered = (vocabulary.words[k] for k in question[:3] + answered)
            rows.append([f"{a} : {b} :: {c} :", *answered])
        print(f"\n{common.table(('', *LABELS.values()), rows)}")

    best = max(LABELS, key=lambda name: figures[f"{name}_forms"])
    train_cut, held_out_cut = passages(stream), passages(held_out)
    if not len(held_out_cut):
        common.stop(f"the text held out has fewer than {BPTT + 1} words; give a longer text")
    starts = {
        "random": torch.randn(size, options.dim),
        "vectors": vectors[best] / vectors[best].std(),  # as large as the random ones
    }
    rows, steps, limit = [], options.steps, seconds
    for name, start in starts.items():
        torch.manual_seed(options.seed)
        model = WordLM(start, options.hidden, options.backend)
        batches = text_batches(train_cut, options.seed)
        done = common.train(name, model, lm_loss, batches, steps=steps, seconds=limit)
        steps, limit = len(done.losses), math.inf  # the other has as many, however long they take
        figures[f"lm_{name}_train"] = sum(done.losses) / len(done.losses)
        figures[f"lm_{name}"] = held_out_loss(model, held_out_cut)
        label = f"{LABELS[best]} vectors" if name == "vectors" else "random vectors"
        rows.append([label, f"{figures[f'lm_{name}_train']:.3f}", f"{figures[f'lm_{name}']:.3f}"])
    print(
        f"\nA GRU of {options.hidden} units that predicts the next word; nats per word in and "
        f"after {len(done.losses)} steps of training:\n"
    )
    print(common.table(("starts from", "in training, mean", "then, held out"), rows))
    found = common.speed(model, lm_loss, text_batches(train_cut, 1), seconds=min(seconds, 3.0))
    figures["ratio"] = found.ratio
    print(f"\n{found}")

    plot({name: vectors[name] for name in ("svd", "skip_gram")}, vocabulary, options.out)
    print(
        f"{LABELS[best]} finds {figures[f'{best}_forms']:.0%} of the plurals and past tenses "
        f"(chance {figures['chance_forms']:.2%}), and the language\nmodel that starts from it has "
        f"{figures['lm_vectors']:.3f} nats per word on files held out, from random vectors "
        f"{figures['lm_random']:.3f}."
    )
    return figures


if __name__ == "__main__":
    common.run(main)

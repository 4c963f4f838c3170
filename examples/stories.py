"""Answer questions about short stories with memory networks of 1 to 3 hops, and with an LSTM.

The stories are made as those of the bAbI tasks are: a small world of people, places and things is
played through, told in sentences, and asked about. Where is the apple? takes two sentences to
answer, who took it last and where that person went; which of them matter is never told. A memory
network looks at all sentences at once, weighs them against the question, adds what it found to the
question and looks again: one hop can find the thing's carrier, and the next one where the carrier
is. The LSTM reads the story and the question as one text. Each model learns all tasks together.

Stories differ between training, validation and the held-out ones that the table counts. Instead of
the made ones, --file reads files of bAbI's own form, a task each. The softmax of the hops is left
out at first and put in once the validation loss stalls, as in the paper; --no-linear-start has it
from the beginning. At the end: the accuracy of each task, a story with the weights of each hop on
its sentences, a picture of both, and the speed of the LSTM beside torch.nn's.

Paper: Sukhbaatar, Szlam, Weston and Fergus 2015, End-To-End Memory Networks. Weston, Bordes,
Chopra, Rush, van Merriënboer, Joulin and Mikolov 2015, Towards AI-Complete Question Answering: A
Set of Prerequisite Toy Tasks.

    python examples/stories.py --tasks one_fact two_facts --sentences 10
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import torch
from torch import Tensor, nn

import fastseq
from fastseq.nn.memory import MemoryHops

PEOPLE = ("Ada", "Bruno", "Clara", "Dario")
PLACES = ("attic", "cellar", "garden", "hall", "kitchen", "library")
THINGS = ("apple", "book", "lamp", "letter")
WENT = ("went to", "walked to", "hurried to")
TOOK, DROPPED = ("took", "picked up"), ("dropped", "put down")
NUMBERS = ("none", "one", "two", "three", "four")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
ROOMS = (*PLACES, "bathroom", "bedroom", "office", "workshop")

HOPS = (1, 2, 3)
CHECKS = 25  # steps between two looks at the validation loss


class Story(NamedTuple):
    """A question about sentences, its answer, and which sentences the answer follows from."""

    task: str
    sentences: tuple[str, ...]
    question: str
    answer: str
    facts: tuple[int, ...]


Asked = tuple[str, str, set[int]]  # question, answer, facts


# Stories that are made


class World:
    """People who go to places and carry things, told sentence by sentence.

    What is known of a person or a thing is kept with the numbers of the sentences that say so.
    Where a thing lies at first is not told: it is known from when somebody takes it.
    """

    def __init__(self, draw: random.Random, kind: Kind) -> None:
        self.draw, self.kind, self.sentences = draw, kind, list[str]()
        self.place: dict[str, tuple[str, int]] = {}  # of a person: where to, told in which sentence
        self.lies = {thing: draw.choice(kind.places) for thing in kind.things}
        self.carrier: dict[str, tuple[str, int]] = {}  # of a thing: who, since which sentence
        self.path: dict[str, list[tuple[str, set[int]]]] = {}  # where a thing was, in this order
        self.handled: dict[str, set[int]] = {}  # sentences of what a person took and dropped

    @property
    def moved(self) -> list[str]:
        return [thing for thing, path in self.path.items() if len(path) > 1]

    def carried(self, person: str) -> list[str]:
        return sorted(thing for thing, (who, _) in self.carrier.items() if who == person)

    def tell(self, person: str, did: Sequence[str], what: str) -> int:
        self.sentences.append(f"{person} {self.draw.choice(did)} the {what}.")
        return len(self.sentences) - 1

    def step(self) -> None:
        """Someone does something: half of the time a thing changes hands, where one can."""
        person = self.draw.choice(self.kind.people)
        here, since = self.place.get(person, (None, -1))
        near = [thing for thing, place in self.lies.items() if place == here]
        has = self.carried(person)
        if (near or has) and self.draw.random() < 0.5:
            thing = self.draw.choice(near + has)
            if thing in has:
                n = self.tell(person, DROPPED, thing)
                del self.carrier[thing]
                self.lies[thing] = here
                self.path[thing][-1] = (here, {since, n})
            else:
                n = self.tell(person, TOOK, thing)
                del self.lies[thing]
                self.carrier[thing] = person, n
                if thing not in self.path:
                    self.path[thing] = [(here, {since, n})]
            self.handled.setdefault(person, set()).add(n)
            return
        to = self.draw.choice([place for place in self.kind.places if place != here])
        n = self.tell(person, WENT, to)
        self.place[person] = to, n
        for thing in self.carried(person):
            self.path[thing].append((to, {self.carrier[thing][1], n}))


def where_is_someone(world: World, person: str) -> Asked:
    place, n = world.place[person]
    return f"Where is {person}?", place, {n}


def where_is_a_thing(world: World, thing: str) -> Asked:
    place, facts = world.path[thing][-1]
    return f"Where is the {thing}?", place, facts


def where_was_a_thing(world: World, thing: str) -> Asked:
    (before, first), (place, last) = world.path[thing][-2:]
    return f"Where was the {thing} before the {place}?", before, first | last


def yes_or_no(world: World, person: str) -> Asked:
    place, n = world.place[person]
    if world.draw.random() < 0.5:
        return f"Is {person} in the {place}?", "yes", {n}
    other = world.draw.choice([one for one in PLACES if one != place])
    return f"Is {person} in the {other}?", "no", {n}


def how_many(world: World, person: str) -> Asked:
    count = NUMBERS[len(world.carried(person))]
    return f"How many things does {person} carry?", count, world.handled[person]


def what_all(world: World, person: str) -> Asked:
    answer = ",".join(world.carried(person)) or "nothing"
    return f"What does {person} carry?", answer, world.handled[person]


def relations(draw: random.Random) -> tuple[list[str], Asked]:
    """Rooms around one room; what is asked was told in the same direction."""
    count = draw.choice((2, 3))
    middle, *rooms = draw.sample(ROOMS, count + 1)
    told = []
    for room, side in zip(rooms, draw.sample(list(OPPOSITE), count), strict=True):
        turned = draw.random() < 0.5
        told.append((middle, OPPOSITE[side], room) if turned else (room, side, middle))
    n = draw.randrange(count)
    first, side, second = told[n]
    sentences = [f"The {a} is {side} of the {b}." for a, side, b in told]
    if draw.random() < 0.5:
        return sentences, (f"What is {side} of the {second}?", first, {n})
    return sentences, (f"What is the {first} {side} of?", second, {n})


class Kind(NamedTuple):
    """What a task asks of whom an attribute of its world names, and what the world has."""

    ask: Callable[[World, str], Asked]
    about: str
    things: tuple[str, ...] = ()
    people: tuple[str, ...] = PEOPLE
    places: tuple[str, ...] = PLACES


#: None for rooms alone.
TASKS: dict[str, Kind | None] = {
    "one_fact": Kind(where_is_someone, "place"),
    "two_facts": Kind(where_is_a_thing, "path", THINGS),
    "three_facts": Kind(where_was_a_thing, "moved", THINGS),
    "relations": None,
    "yes_no": Kind(yes_or_no, "place"),
    # Few people and places, or most would carry one thing.
    "counting": Kind(how_many, "handled", THINGS, PEOPLE[:2], PLACES[:2]),
    "lists": Kind(what_all, "handled", THINGS, PEOPLE[:2], PLACES[:2]),
}


def made(task: str, draw: random.Random, longest: int) -> Story | None:
    """A story of half as many sentences as ``longest`` at least; None if it cannot be asked."""
    kind = TASKS[task]
    if kind is None:
        sentences, (question, answer, facts) = relations(draw)
    else:
        world = World(draw, kind)
        for _ in range(draw.randint(longest // 2, longest)):
            world.step()
        about = sorted(getattr(world, kind.about))
        if not about:
            return None
        sentences, (question, answer, facts) = world.sentences, kind.ask(world, draw.choice(about))
    return Story(task, tuple(sentences), question, answer, tuple(sorted(facts)))


def many(task: str, count: int, longest: int, seed: int) -> list[list[Story]]:
    """So many stories of one question each, no two of the same sentences."""
    draw, found = random.Random(f"{task} {seed}"), dict[tuple[str, ...], Story]()
    for _ in range(50 * count):
        if len(found) == count:
            return [[story] for story in found.values()]
        story = made(task, draw, longest)
        if story:
            found.setdefault(story.sentences, story)
    got = f"found {len(found)} different stories of {task}"
    common.stop(f"--stories {count}: {got}; ask for fewer, or raise --sentences")


# Stories of a file


def read(path: Path) -> list[list[Story]]:
    """The different stories of a file in bAbI's form, with all questions of each.

    A line is a number and a sentence, or a number, a question, its answer, and the numbers of the
    lines that it follows from, with tabs between. The number 1 begins a story. A question is asked
    of the sentences above it.
    """
    stories: list[list[Story]] = []
    sentences: list[str] = []
    lines: dict[int, int] = {}  # the number of a line: which sentence it is
    number = 0
    for row, line in enumerate(common.read(path).splitlines(), 1):
        if not line.strip():
            continue
        at = f"{path}, line {row}"
        form = re.fullmatch(r"\s*(\d{1,9}) +(\S.*)", line)
        if not form or not words(form[2].split("\t")[0]):
            common.stop(f"{at}: expected a number and a sentence, got {line.strip()[:60]!r}")
        if int(form[1]) not in (1, number + 1):
            expected = f"the number {number + 1}, or 1" if number else "the number 1"
            common.stop(f"{at}: expected {expected} of a new story, got {form[1]}")
        number = int(form[1])
        if number == 1:
            sentences, lines = [], {}
            stories.append([])
        question, *rest = (part.strip() for part in form[2].split("\t"))
        if not rest:
            lines[number] = len(sentences)
            sentences.append(question)
            continue
        if len(rest) != 2 or not rest[0]:
            common.stop(
                f"{at}: expected a question, its answer and the numbers of its facts, with tabs "
                f"between, got {len(rest) + 1} parts"
            )
        if not sentences:
            common.stop(f"{at}: expected a sentence before the first question of a story")
        for fact in rest[1].split():
            if not fact.isdecimal() or int(fact) not in lines:
                common.stop(f"{at}: expected facts that are sentences above it, got {fact}")
        facts = sorted({lines[int(fact)] for fact in rest[1].split()})
        stories[-1].append(Story(path.stem, tuple(sentences), question, rest[0], tuple(facts)))
    different = list({story[-1].sentences: story for story in stories if story}.values())
    if len(different) < 20:
        common.stop(f"{path}: expected at least 20 different stories, got {len(different)}")
    return different


def divided(stories: list[list[Story]]) -> tuple[list[Story], list[Story], list[Story]]:
    """Questions to train on, to validate and to hold out, of other stories each."""
    rest, held_out = common.split(stories)
    train, valid = common.split(rest)
    return tuple([story for some in part for story in some] for part in (train, valid, held_out))


# What the models read


class Batch(NamedTuple):
    sentences: Tensor  # (B, M, W)
    lengths: Tensor  # (B,) sentences of each story
    question: Tensor  # (B, Q)
    answers: Tensor  # (B,); -1 for one that training has not


def words(text: str) -> list[str]:
    return re.findall(r"\w[\w'-]*", text.lower())


def vocabulary(stories: Sequence[Story]) -> dict[str, int]:
    """Numbers of the words and the answers. 0 stands for no word, 1 for an unknown one."""
    found = Counter(word for story in stories for text in story.sentences for word in words(text))
    found.update(word for story in stories for word in words(story.question))
    found.update(story.answer.lower() for story in stories)
    return {word: n for n, word in enumerate(sorted(found), 2)}


def encoded(stories: Sequence[Story], numbers: dict[str, int], memory: int) -> Batch:
    """Padded with zeros; of a story longer than ``memory`` its latest sentences."""
    texts = [[words(text) for text in story.sentences[-memory:]] for story in stories]
    asked = [words(story.question) for story in stories]
    answers = [numbers.get(story.answer.lower(), -1) for story in stories]
    lengths = list(map(len, texts))
    width, asks = max(len(text) for story in texts for text in story), max(map(len, asked))

    def row(text: list[str], size: int) -> list[int]:
        return [*(numbers.get(word, 1) for word in text), *[0] * (size - len(text))]

    padded = [story + [[]] * (max(lengths) - len(story)) for story in texts]
    sentences = [[row(text, width) for text in story] for story in padded]
    questions = [row(text, asks) for text in asked]
    return Batch(*map(torch.tensor, (sentences, lengths, questions, answers)))


def noisy(batch: Batch, noise: float, memory: int) -> Batch:
    """With empty sentences at random, so that times vary more; the latest ``memory`` of all."""
    B, M, W = batch.sentences.shape
    lengths = batch.lengths.unsqueeze(1)
    there = torch.arange(M) < lengths
    empty = ((torch.rand(B, M) < noise) & there).long()
    behind = empty.flip(1).cumsum(1).flip(1)
    distance = lengths - 1 - torch.arange(M) + behind  # to the last sentence
    total = (batch.lengths + behind[:, 0]).clamp(max=memory)
    kept = there & (distance < memory)
    sentences = batch.sentences.new_zeros(B, int(total.max()), W)
    row = torch.arange(B).unsqueeze(1).expand(B, M)[kept]
    sentences[row, (total.unsqueeze(1) - 1 - distance)[kept]] = batch.sentences[kept]
    return batch._replace(sentences=sentences, lengths=total)


def batches(data: Batch, size: int, noise: float, memory: int) -> Iterator[Batch]:
    """Without end, in another order each time."""
    while True:
        for some in torch.randperm(len(data.answers)).split(size):
            yield noisy(Batch(*(part[some] for part in data)), noise, memory)


class Reader(nn.Module):
    """An LSTM that reads the words of the story and then those of the question."""

    def __init__(self, count: int, layer: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, layer.input_size)
        self.layer = layer
        self.readout = nn.Linear(layer.hidden_size, count)

    def forward(self, sentences: Tensor, question: Tensor, lengths: Tensor) -> tuple[Tensor, None]:
        """Logits (B, N), and no weights. The padding within the text goes to its end."""
        text = torch.cat([sentences.flatten(1), question], 1)
        padding = text == 0
        ends = (~padding).sum(1)
        order = padding.long().argsort(dim=1, stable=True)[:, : int(ends.max())]
        _, (h, _) = common.ragged(self.layer, self.embedding(text.gather(1, order)), ends)
        return self.readout(h[-1]), None


def loss(model: nn.Module, batch: Batch) -> Tensor:
    logits, _ = model(batch.sentences, batch.question, batch.lengths)
    return nn.functional.cross_entropy(logits, batch.answers, ignore_index=-1)


@torch.no_grad()
def answered(model: nn.Module, data: Batch) -> Tensor:
    """The answers (S,) of many stories."""
    return model(data.sentences, data.question, data.lengths)[0].argmax(1)


class LinearStart:
    """Puts the softmax into the hops when the validation loss stalls, or after ``last`` steps."""

    def __init__(self, memory: MemoryHops, valid: Batch, last: int) -> None:
        self.memory, self.valid, self.last = memory, valid, last
        self.best = float("inf")
        self.ended = 0 if not memory.linear_start else None

    def __call__(self, step: int) -> None:
        if self.ended is not None or (step % CHECKS and step < self.last):
            return
        with torch.no_grad():
            now = loss(self.memory, self.valid).item()
        if now >= self.best or step >= self.last:
            self.memory.linear_start, self.ended = False, step
        self.best = min(self.best, now)


def learn(
    label: str,
    model: nn.Module,
    data: Batch,
    options: argparse.Namespace,
    start: LinearStart | None,
) -> None:
    """By Adam, whose rate falls to almost nothing over the second half."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 2 * (1 - step / options.steps) + 0.02)
    )

    def after(step: int) -> None:
        rate.step()
        if start:
            start(step)

    feed = batches(data, options.batch, options.noise if start else 0.0, options.memory)
    bounds = {"steps": options.steps, "seconds": options.seconds / (1 + len(HOPS))}
    ways = {"clip": options.clip, "optimizer": optimizer, "after": after}
    common.train(label, model, loss, feed, **bounds, **ways)


# What is shown


def accuracies(right: Tensor, stories: Sequence[Story]) -> dict[str, float]:
    """Of each task."""
    asked = Counter(story.task for story in stories)
    good = Counter(s.task for s, well in zip(stories, right.tolist(), strict=True) if well)
    return {task: good[task] / count for task, count in asked.items()}


def majority(train: Sequence[Story], held_out: Sequence[Story]) -> Tensor:
    """Where each task's most frequent answer is right."""
    counts = Counter((story.task, story.answer) for story in train).most_common()
    best = {task: answer for (task, answer), _ in reversed(counts)}
    return torch.tensor([story.answer == best[story.task] for story in held_out])


def on_facts(weights: Tensor, story: Story) -> float:
    """The share of hops whose greatest weight (K, M) is a fact's."""
    first = max(0, len(story.sentences) - weights.shape[1])
    return sum(first + n in story.facts for n in weights.argmax(1).tolist()) / len(weights)


def plot(
    columns: dict[str, dict[str, float]], story: Story, weights: Tensor, answer: str, path: Path
) -> None:
    """Accuracy of each task, and the weights (K, M) of a story's latest sentences."""
    figure, (left, right) = common.picture(2, height=max(4.5, 0.25 * len(story.sentences) + 1))
    tasks = list(next(iter(columns.values())))
    thick = 0.8 / len(columns)
    colours = ("#bbbbbb", common.COLOURS[2], "#b5cbe0", "#6b98c2", common.FASTSEQ)
    for k, ((label, found), colour) in enumerate(zip(columns.items(), colours, strict=True)):
        at = [n + (k - (len(columns) - 1) / 2) * thick for n in range(len(tasks))]
        left.barh(at, [100 * found[task] for task in tasks], 0.9 * thick, color=colour, label=label)
    left.grid(axis="y", visible=False)
    left.set_yticks(range(len(tasks)), tasks)
    left.invert_yaxis()
    left.set_xlim(0, 100)
    left.set_xlabel("held-out questions answered right (%)")
    bars, labels = left.get_legend_handles_labels()
    figure.legend(bars, labels, loc="outside lower left", ncols=len(labels), frameon=False)

    hops, seen = weights.shape
    shown = weights.T.numpy()
    right.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    right.grid(False)
    for (m, k), p in np.ndenumerate(shown):
        if p >= 0.005:
            colour = "white" if p > 0.5 else "black"
            right.text(k, m, f"{p:.2f}", ha="center", va="center", color=colour, fontsize=8)
    right.set_xticks(range(hops), [f"hop {k + 1}" for k in range(hops)])
    right.yaxis.tick_right()
    right.set_yticks(range(seen), story.sentences[-seen:], fontsize=9)
    for m, text in enumerate(right.get_yticklabels(), len(story.sentences) - seen):
        text.set_fontweight("bold" if m in story.facts else "normal")
    right.set_xlabel("in bold: the facts")
    right.set_title(f"{story.question} {answer}", fontsize=11, loc="left")
    common.save(figure, path)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__, seconds=480.0)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    source.add_argument("--file", type=Path, nargs="+", help="files of bAbI's form, a task each")
    number = common.positive
    parser.add_argument("--stories", type=number, default=5000, help="of a task; 20 or more")
    parser.add_argument("--sentences", type=number, default=10, help="of the longest story")
    parser.add_argument("--embedding", type=number, default=48)
    parser.add_argument("--hidden", type=number, default=64, help="units of the LSTM")
    parser.add_argument("--memory", type=number, default=50, help="sentences, the latest")
    parser.add_argument("--noise", type=float, default=0.1, help="empty sentences for each")
    parser.add_argument("--linear-start", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=number, default=4000, help="of each model")
    parser.add_argument("--batch", type=number, default=64)
    parser.add_argument("--lr", type=common.above_zero, default=5e-3)
    parser.add_argument("--clip", type=common.above_zero, default=10.0)
    small = {"stories": 2000, "sentences": 8, "embedding": 32}
    few = {"tasks": ["one_fact", "two_facts", "relations"], "steps": 600, "lr": 1e-2}
    options = common.parse(parser, argv, {**small, **few, "seconds": 40.0})
    for name, least in (("sentences", 4), ("stories", 20)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    if not 0 <= options.noise < 1:
        parser.error(f"--noise: expected from 0 to below 1, got {options.noise:g}")
    names = [path.stem for path in options.file or ()]
    if len(set(names)) < len(names):
        parser.error(f"--file: expected files of different names, got {', '.join(names)}")
    return options


def example(stories: list[Story], weights: Tensor, answers: list[str]) -> tuple[Story, Tensor, str]:
    """The longest story of up to 12 sentences that was answered right, its weights and answer."""
    sizes = [len(story.sentences) for story in stories]
    right = [answers[n] == story.answer.lower() for n, story in enumerate(stories)]
    n = max(range(len(stories)), key=lambda n: (right[n], sizes[n] <= 12, min(sizes[n], 12)))
    seen = stories[n].sentences[-weights.shape[2] :]
    return stories[n], weights[:, n, : len(seen)], answers[n]


def show(story: Story, weights: Tensor, answer: str) -> None:
    """Print a story beside its weights (K, M)."""
    marks = [" *"[n in story.facts] for n in range(len(story.sentences))]
    columns = weights.T.tolist()
    told = zip(marks[-len(columns) :], story.sentences[-len(columns) :], columns, strict=True)
    rows = [[f"{mark} {text}", *(f"{p:.2f}" for p in ps)] for mark, text, ps in told]
    print(f"\nA held-out story of {story.task}; * marks the facts, which training does not see:")
    print(common.table(["", *(f"hop {k + 1}" for k in range(len(weights)))], rows))
    print(f"{story.question} {answer} (right: {story.answer})")


def main(argv: list[str] | None = None) -> dict[str, float]:
    options = arguments(argv)
    if options.file:
        sources = [read(path) for path in options.file]
    else:
        form = options.stories, options.sentences, options.seed
        sources = [many(task, *form) for task in dict.fromkeys(options.tasks)]
    parts = [divided(source) for source in sources]
    train, valid, held_out = ([s for part in parts for s in part[k]] for k in range(3))
    numbers = vocabulary(train)
    data, looks, asked = (encoded(s, numbers, options.memory) for s in (train, valid, held_out))
    print(
        f"{len(parts)} tasks; {len(train):,} questions to train on, {len(valid):,} to validate, "
        f"{len(held_out):,} held out;\n{len(numbers)} words and answers, up to "
        f"{data.sentences.shape[1]} sentences; {common.threads()}"
    )

    count = len(numbers) + 2
    columns = {"majority": accuracies(majority(train, held_out), held_out)}
    sizes = options.embedding, options.hidden
    reader = Reader(count, fastseq.LSTM(*sizes, batch_first=True, backend=options.backend))
    learn("LSTM", reader, data, options, None)
    columns["LSTM"] = accuracies(answered(reader, asked) == asked.answers, held_out)
    for hops in HOPS:
        torch.manual_seed(options.seed)
        sizes = count, options.embedding, hops, options.memory
        model = MemoryHops(*sizes, linear_start=options.linear_start)
        start = LinearStart(model, looks, options.steps // 4)
        label = f"{hops} hop{'s' * (hops > 1)}"
        learn(label, model, data, options, start)
        answers = answered(model, asked)
        columns[label] = accuracies(answers == asked.answers, held_out)
    if start.ended:
        print(f"With {hops} hops the softmax came in after {start.ended} steps.")

    tasks = list(columns["majority"])
    means = {label: sum(found.values()) / len(tasks) for label, found in columns.items()}
    shares = {label: {**found, "mean": means[label]} for label, found in columns.items()}
    rows = [[t, *(f"{found[t]:.1%}" for found in shares.values())] for t in (*tasks, "mean")]
    print(f"\nHeld-out questions answered right:\n{common.table(['task', *columns], rows)}")

    gained = max(tasks, key=lambda task: columns["3 hops"][task] - columns["1 hop"][task])
    at = [n for n, story in enumerate(held_out) if story.task == gained]
    with torch.no_grad():
        _, weights = model(asked.sentences[at], asked.question[at], asked.lengths[at])
    names = {n: word for word, n in numbers.items()}
    told = [held_out[n] for n in at]
    chosen = example(told, weights, [names.get(n, "?") for n in answers[at].tolist()])
    show(*chosen)
    facts = sum(on_facts(weights[:, n], story) for n, story in enumerate(told)) / len(told)
    chance = sum(len(story.facts) / len(story.sentences) for story in told) / len(told)
    print(f"{facts:.1%} of the hops weigh a fact the most; {chance:.1%} of sentences are facts.")
    plot(columns, *chosen, options.out / "stories.png")

    turns = batches(data, options.batch, 0.0, options.memory)
    speed = common.speed(reader, loss, turns, seconds=min(3.0, options.seconds))
    print(f"The LSTM: {speed}")
    figures = {"ratio": speed.ratio, "facts": facts, "chance_facts": chance}
    keys = ("majority", "lstm", "hops_1", "hops_2", "hops_3")
    for key, found in zip(keys, shares.values(), strict=True):
        figures[key] = found["mean"]
        figures |= {re.sub(r"\W", "_", f"{task}_{key}"): found[task] for task in tasks}
    best = {label: f"{found[gained]:.1%}" for label, found in columns.items()}
    print(
        f"Of the questions of {gained}, 3 hops answer {best['3 hops']} right and 1 hop "
        f"{best['1 hop']};\nthe LSTM {best['LSTM']}, the most frequent answer "
        f"{best['majority']}."
    )
    return figures


if __name__ == "__main__":
    common.run(main)

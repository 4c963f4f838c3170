"""The stories: what is asked follows from what is told, and files are read as bAbI writes them."""

import random
import re

import pytest
import torch
from scripts import example

import fastseq

TOLD = re.compile(r"(\w+) (\w+ to|took|picked up|dropped|put down) the (\w+)\.")
SIDES = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}


@pytest.fixture(scope="module")
def tales():
    return example("stories")


def oracle(sentences, question):
    """The answer, by reading the sentences one after another."""
    if side := re.fullmatch(r"What is (?:the )?(\w+)(?: of the (\w+)| (\w+) of)\?", question):
        at = {}
        told = [re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", s).groups() for s in sentences]
        at[told[0][0]] = 0, 0
        for _ in told:  # one after another joins those that are placed
            for a, way, b in told:
                x, y = SIDES[way]
                if a in at:
                    at[b] = at[a][0] - x, at[a][1] - y
                elif b in at:
                    at[a] = at[b][0] + x, at[b][1] + y
        way, of = (side[1], side[2]) if side[2] else (side[3], side[1])
        sign = 1 if side[2] else -1
        place = tuple(c + sign * s for c, s in zip(at[of], SIDES[way], strict=True))
        (answer,) = [room for room, there in at.items() if there == place]
        return answer
    people, carrier, seen = {}, {}, {}
    for sentence in sentences:
        who, did, what = TOLD.fullmatch(sentence).groups()
        if did.endswith(" to"):
            people[who] = what
        elif did in ("took", "picked up"):
            carrier[what] = who
        else:
            carrier.pop(what, None)
            if who in people:
                seen[what] = [*seen.get(what, []), people[who]]
        for thing, person in carrier.items():
            if person in people:
                seen[thing] = [*seen.get(thing, []), people[person]]
    *_, name, where = re.findall(r"\w+", "_ " + question)
    if question.startswith("Where is"):
        return people[where] if where in people else seen[where][-1]
    if question.startswith("Where was"):
        thing = re.search(r"the (\w+) before", question)[1]
        path = [p for n, p in enumerate(seen[thing]) if n == 0 or p != seen[thing][n - 1]]
        assert path[-1] == where
        return path[-2]
    if question.startswith("Is"):
        who = re.match(r"Is (\w+)", question)[1]
        return "yes" if people[who] == where else "no"
    has = sorted(thing for thing, person in carrier.items() if person == name)
    if question.startswith("How many"):
        return ["none", "one", "two", "three", "four"][len(has)]
    assert question.startswith("What does")
    return ",".join(has) or "nothing"


TASKS = ["one_fact", "two_facts", "three_facts", "relations", "yes_no", "counting", "lists"]


def test_every_task_is_tested(tales):
    assert list(tales.TASKS) == TASKS


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_the_story_and_from_its_facts_alone(tales, task):
    stories = [story for (story,) in tales.many(task, 300, 12, seed=1)]
    assert len({story.sentences for story in stories}) == 300
    assert len({story.answer for story in stories}) > 1
    for story in stories:
        assert oracle(story.sentences, story.question) == story.answer, story
        facts = [story.sentences[n] for n in story.facts]
        assert oracle(facts, story.question) == story.answer, story
        assert len(story.sentences) <= 12


def test_facts_are_as_many_as_the_task_says(tales):
    def counts(task):
        return {len(story.facts) for (story,) in tales.many(task, 200, 10, seed=2)}

    assert counts("one_fact") == counts("yes_no") == counts("relations") == {1}
    assert counts("two_facts") == {2}
    assert counts("three_facts") <= {3, 4}


def test_what_was_put_down_is_a_fact(tales):
    """Its carrier may have gone since."""
    put_down = 0
    for (story,) in tales.many("two_facts", 100, 12, seed=4):
        thing = story.question.split()[-1].strip("?")
        *_, last = [n for n, text in enumerate(story.sentences) if text.endswith(f"{thing}.")]
        if re.search("dropped|put down", story.sentences[last]):
            put_down += 1
            assert last in story.facts
    assert put_down


def test_a_seed_makes_its_stories_and_too_many_are_refused(tales):
    assert tales.many("lists", 20, 8, 5) == tales.many("lists", 20, 8, 5)
    assert tales.many("lists", 20, 8, 5) != tales.many("lists", 20, 8, 6)
    with pytest.raises(SystemExit, match=r"--stories 9: found 0 different stories of three_facts"):
        tales.many("three_facts", 9, 0, 0)  # a story of no sentences


def test_the_three_parts_share_no_story(tales):
    parts = tales.divided(tales.many("relations", 1000, 6, 0))  # some 14 are drawn twice
    assert [len(part) for part in parts] == [810, 90, 100]
    texts = [{story.sentences for story in part} for part in parts]
    assert len(set.union(*texts)) == 1000


TEXT = """1 Ada went to the hall.
2 Ada took the book.
3 Where is the book?\thall\t1 2
4 Bruno ran to the attic.
5 Where is Bruno?\tattic\t4
"""


def many_of(text, count=20):
    """So many stories that differ."""
    return "".join(text.replace("hall", f"hall{k}") for k in range(count))


def test_a_file_of_babi(tales, tmp_path):
    path = tmp_path / "qa2.txt"
    path.write_text(many_of(TEXT))
    stories = tales.read(path)
    assert len(stories) == 20
    first, second = stories[1]
    told = ("Ada went to the hall1.", "Ada took the book.")
    assert first == ("qa2", told, "Where is the book?", "hall1", (0, 1))
    assert second == ("qa2", (*told, "Bruno ran to the attic."), "Where is Bruno?", "attic", (2,))
    assert [len(part) for part in tales.divided(stories)] == [34, 2, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("2 Ada", "Ada"), "line 2: expected a number and a sentence, got 'Ada took the book.'"),
        (
            ("2 Ada took the book.", "2 ..."),
            "line 2: expected a number and a sentence, got '2 ...'",
        ),
        (("1 Ada", "2 Ada"), "line 1: expected the number 1 of a new story, got 2"),
        (("4 Bruno", "6 Bruno"), "line 4: expected the number 4, or 1 of a new story, got 6"),
        (("hall\t1 2", "hall"), "line 3: expected a question, its answer and the numbers of its"),
        (("hall\t1 2", "\t1 2"), "line 3: expected a question, its answer and the numbers of its"),
        (("attic\t4", "attic\t3"), "line 5: expected facts that are sentences above it, got 3"),
        (("attic\t4", "attic\tx"), "line 5: expected facts that are sentences above it, got x"),
        (("1 Ada went to the hall.", "1 Who?\tAda\t1"), "line 1: expected a sentence before the"),
    ],
)
def test_wrong_files_are_refused_by_their_line(tales, tmp_path, change, message):
    path = tmp_path / "qa.txt"
    path.write_text(TEXT.replace(*change))
    with pytest.raises(SystemExit, match=re.escape(f"{path}, {message}")):
        tales.read(path)


def test_files_that_are_missing_or_short_are_refused(tales, tmp_path, capsys):
    path = tmp_path / "qa.txt"
    with pytest.raises(SystemExit, match="No such file"):
        tales.main(["--file", str(path)])
    path.write_text(TEXT * 30)
    with pytest.raises(SystemExit, match="expected at least 20 different stories, got 1"):
        tales.main(["--file", str(path)])
    for given, message in (
        (["--file", str(path), str(path)], "--file: expected files of different names, got qa, qa"),
        (["--stories", "19"], "--stories: expected at least 20, got 19"),
        (["--sentences", "3"], "--sentences: expected at least 4, got 3"),
        (["--noise", "1"], "--noise: expected from 0 to below 1, got 1"),
    ):
        with pytest.raises(SystemExit):
            tales.main(given)
        assert message in capsys.readouterr().err


def test_files_are_learned_from(tales, tmp_path, capsys, monkeypatch):
    """Sentences beyond the memory are left out, and a held-out answer may be unknown."""
    path = tmp_path / "qa-2.txt"
    path.write_text(many_of(TEXT, 30))
    monkeypatch.setattr(tales, "learn", lambda *_: None)
    monkeypatch.setattr(tales, "plot", lambda *_: None)
    monkeypatch.setattr(tales.common, "speed", lambda *_, **__: tales.common.Speed(1, 1, 1))
    given = "--embedding 4 --hidden 4 --memory 2 --out"
    figures = tales.main(["--file", str(path), *given.split(), str(tmp_path)])
    assert 0 <= figures["qa_2_hops_3"] <= 0.5  # which hall it was is in no training story
    assert "up to 2 sentences" in capsys.readouterr().out


def encoded(tales, count=40):
    stories = [s for (s,) in tales.many("two_facts", count, 8, seed=3)]
    return stories, tales.encoded(stories, tales.vocabulary(stories), 50)


def test_stories_are_encoded_word_by_word(tales):
    stories, batch = encoded(tales)
    numbers = tales.vocabulary(stories)
    names = {n: word for word, n in numbers.items()} | {0: ""}
    for k, story in enumerate(stories):
        rows = [" ".join(names[n] for n in row).strip() for row in batch.sentences[k].tolist()]
        told = [s.lower().strip(".") for s in story.sentences]
        assert rows[: len(told)] == told and not any(rows[len(told) :])
        assert batch.lengths[k] == len(told) and names[int(batch.answers[k])] == story.answer
    latest = tales.encoded(stories, numbers, 3)
    n = int(batch.lengths[0])
    assert torch.equal(latest.sentences[0], batch.sentences[0, n - 3 : n])
    other = stories[0]._replace(answer="moon", question="Where is the sun?")
    unknown = tales.encoded([other], numbers, 50)
    assert unknown.answers.tolist() == [-1] and unknown.question[0].tolist()[-1] == 1


def test_noise_puts_empty_sentences_between(tales):
    _, batch = encoded(tales)
    noisy = tales.noisy(batch, 0.3, 50)
    assert noisy.lengths.sum() > batch.lengths.sum() and noisy.question is batch.question
    for k, n in enumerate(batch.lengths.tolist()):
        rows = noisy.sentences[k, : noisy.lengths[k]]
        assert torch.equal(rows[rows.any(1)], batch.sentences[k, :n])
        assert not noisy.sentences[k, noisy.lengths[k] :].any()
    few = tales.noisy(batch, 0.3, 4)
    assert few.sentences.shape[1] == 4 and few.lengths.max() == 4
    for k in range(len(few.lengths)):
        rows = few.sentences[k, : few.lengths[k]]
        rows = rows[rows.any(1)]
        n = int(batch.lengths[k])
        assert torch.equal(rows, batch.sentences[k, n - len(rows) : n])
    same = tales.noisy(batch, 0.0, 50)
    assert all(map(torch.equal, same, batch))


def test_the_lstm_reads_story_and_question_without_gaps(tales):
    stories, batch = encoded(tales, 5)
    count = len(tales.vocabulary(stories)) + 2
    model = tales.Reader(count, fastseq.LSTM(4, 4, batch_first=True, backend="eager")).eval()
    logits, _ = model(batch.sentences, batch.question, batch.lengths)
    for k in range(5):
        text = torch.cat([batch.sentences[k].flatten(), batch.question[k]])
        _, (h, _) = model.layer(model.embedding(text[text > 0])[None])
        torch.testing.assert_close(logits[k], model.readout(h[-1, 0]))


def test_the_softmax_comes_in_when_the_loss_stalls(tales, monkeypatch):
    memory = tales.MemoryHops(5, 2, linear_start=True)
    losses = iter([3.0, 2.0, 2.0])
    monkeypatch.setattr(tales, "loss", lambda *_: torch.tensor(next(losses)))
    start = tales.LinearStart(memory, None, last=1000)
    for step in range(1, 3 * tales.CHECKS):
        start(step)
        assert memory.linear_start and start.ended is None
    start(3 * tales.CHECKS)
    assert not memory.linear_start and start.ended == 3 * tales.CHECKS
    start(4 * tales.CHECKS)  # looks no more


def test_figures_by_hand(tales):
    draw = random.Random(0)
    stories = [tales.made(task, draw, 8) for task in ("one_fact", "one_fact", "yes_no")]
    found = tales.accuracies(torch.tensor([True, False, True]), stories)
    assert found == {"one_fact": 0.5, "yes_no": 1.0}
    told = [stories[0]._replace(answer=answer) for answer in "aab"]
    assert tales.majority(told, told).tolist() == [True, True, False]
    story = tales.Story("t", ("a", "b", "c"), "?", "x", (0, 2))
    weights = torch.tensor([[0.1, 0.2, 0.7, 0.0], [0.6, 0.3, 0.1, 0.0]])
    assert tales.on_facts(weights, story) == 1
    assert tales.on_facts(weights, story._replace(facts=(0, 1))) == 0.5
    memory = weights[:, :2]  # the first sentence is not in it
    assert tales.on_facts(memory, story._replace(facts=(2,))) == 0.5

"""Each example starts; with --full each one's short form learns."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import example

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "examples.md"
#: What other files test: the shared code, and scripts of other forms.
ELSEWHERE = {"common", "distributed", "own_cell"}
EXAMPLES = sorted({path.stem for path in (ROOT / "examples").glob("*.py")} - ELSEWHERE)

#: Arguments with which an example starts and ends within a second; --out is added.
TINY = {
    "caption": "--hidden 8 --channels 4 --batch 4 --steps 3 --held-out 30 --race 0.01",
    "char_lm": "--hidden 8 --batch 4 --bptt 8 --steps 3 --sample 20 --files 10",
    "classify": "--packages http json --models CBOW Elman --epochs 1 --hidden 4 --longest 9",
    "embeddings": "--files 10 --no-packages --words 300 --dim 8 --epochs 1 --passes 1"
    " --hidden 8 --steps 3 --seconds 0.5",
    "forecast": "--window 16 --horizon 4 --hidden 4 --members 1 --steps 3 --seconds 0.5",
    "stories": "--stories 60 --sentences 8 --steps 3 --embedding 4 --hidden 4 --seconds 0.2",
    "tag": "--hidden 8 --batch 4 --steps 2 --files 10 --longest 20 --race 0.01",
    "toys": "--tasks adding --cells IRNN MGU --lengths 3 --hidden 4 --batch 4 --steps 3",
    "translate": "--hidden 8 --batch 4 --steps 3 --held-out 9 --beam 2 --dates 1 --race 0.01",
    "trees": "--hidden 8 --width 8 --batch 4 --epochs 1 --files 10 --seconds 0.2",
    "word_lm": "--hidden 8 --batch 4 --bptt 8 --steps 3 --files 10 --no-packages --race 0.01",
}

#: What the figures of the short form must be, by the names under which ``main`` returns them.
LEARNS = {
    "caption": "min(attention, pooled) > 0.2 > majority and attention_words > 0.2 + majority_words",
    "char_lm": "fastseq_bits < 3.2 and abs(fastseq_bits - torch_bits) < 0.2",  # of 97: 6.6 bits
    "classify": "accuracy > majority + 0.25 and gru > majority + 0.2",
    "embeddings": "min(svd_forms, skip_gram_forms, cbow_forms, glove_forms) > 20 * chance_forms"
    " and lm_vectors < lm_random",
    "forecast": "max(lstm_one, gru_one) < min(naive_one, seasonal_one) and gru_mean < naive_mean",
    "stories": "two_facts_hops_3 > two_facts_hops_1 + 0.2 and hops_3 > lstm > majority + 0.05",
    "tag": "min(window_crf_f1, bilstm_crf_f1, stack_crf_f1) > max(0.7, 2 * baseline_f1)",
    "toys": "max(adding_50_gru, adding_50_lstm, adding_50_indrnn) < 0.1 < 0.7 < adding_50_elman",
    "translate": "min(luong, bahdanau) > 0.7 and last_state < 0.4",
    "trees": "min(tree_accuracy, sequence_accuracy) > majority + 0.15",
    "word_lm": "both < kneser_ney_4 < kneser_ney_2 and max(lstm, gru, rnn) < 190",
}

# The steps end it, not the seconds, so that it learns as much on a slow machine. One thread, since
# tests run in several processes.
SHORT = """
import importlib, json, sys
sys.path.insert(0, "examples")
argv = ["--short", "--seconds", "1000", "--threads", "1", "--out", sys.argv[2]]
figures = importlib.import_module(sys.argv[1]).main(argv)
with open(sys.argv[2] + "/figures.json", "w") as file:
    json.dump(figures, file)
"""


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_starts(name, tmp_path, capsys):
    figures = example(name).main([*TINY[name].split(), "--out", str(tmp_path)])
    printed = capsys.readouterr().out.strip().splitlines()
    numbers = [value for value in figures.values() if isinstance(value, int | float)]
    assert numbers and all(map(math.isfinite, numbers)), figures
    assert re.search(r"\d", printed[-1]), "the last line says what was learned, by a figure"
    pictures = list(tmp_path.glob("*.png"))
    assert pictures and all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)


@pytest.mark.full
@pytest.mark.parametrize("name", EXAMPLES)
def test_its_short_form_learns(name, tmp_path):
    command = [sys.executable, "-c", SHORT, name, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    # The words of the table are the figures' own names.
    assert eval(LEARNS[name], {"abs": abs, "max": max, "min": min}, figures), figures


def test_every_example_has_its_rows():
    assert list(TINY) == EXAMPLES, "one line an example, by the alphabet"
    assert list(LEARNS) == EXAMPLES
    if PAGE.exists():
        shown = re.findall(r"^## (\w+)$", PAGE.read_text(), re.MULTILINE)
        assert set(EXAMPLES) <= set(shown), "make examples ARGS=--write"

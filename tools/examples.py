"""Run the examples in their short form, and write docs/examples.md from what they print.

    python tools/examples.py [--only NAME ...] [--write]

Each runs as a process of its own. Its output goes to out/examples/NAME.txt, its pictures into
out/examples/NAME/. With --write the page is made again from all that ran, with their pictures under
docs/examples/; the sections of the others stay as they are.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OUT = Path("out") / "examples"
PAGE = ROOT / "docs" / "examples.md"
PICTURES = ROOT / "docs" / "examples"

#: What is no example that runs by itself: the shared code, and a script for torchrun.
APART = {"common", "distributed"}
#: Arguments of the short form of examples that have no --short.
SHORT = {"own_cell": ["--length", "20", "--steps", "400"]}

INTRODUCTION = """# Examples

<!-- Written by `make examples ARGS=--write`. -->

The applications that courses on recurrent networks teach, as scripts that train on text which every
machine has: Python's own standard library. Many take a file of your own. Each runs on its own, as
`python examples/NAME.py`, in some minutes; `--short` takes some 20 seconds, and is what is shown
here. `make examples` runs all short forms. Where torch.nn has the layer too, an example says how
fast both train on the same batches.
"""


def names() -> list[str]:
    """Of all examples, by the alphabet."""
    return sorted({path.stem for path in (ROOT / "examples").glob("*.py")} - APART)


def arguments(name: str) -> list[str]:
    """Of the short form."""
    return SHORT.get(name, ["--short", "--out", str(OUT / name)])


def run(name: str) -> tuple[int, float]:
    """The exit status and the seconds of an example, whose output is kept. Its bars go to the
    terminal."""
    folder = ROOT / OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    command = [sys.executable, f"examples/{name}.py", *arguments(name)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # this tree's fastseq
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    (ROOT / OUT / f"{name}.txt").write_text(done.stdout)
    return done.returncode, time.perf_counter() - start


def section(name: str) -> str:
    """Of the page: what the docstring says, the command, what it printed, and its pictures."""
    script = f"examples/{name}.py"
    doc = ast.get_docstring(ast.parse((ROOT / script).read_text())) or ""
    paragraphs = doc.split("\n\n")
    told = "\n\n".join(p for p in paragraphs if not re.match(r" *python ", p)).replace("``", "`")
    printed = (ROOT / OUT / f"{name}.txt").read_text()
    lines = [line.rstrip() for line in printed.splitlines() if not line.startswith("Picture: ")]
    command = " ".join(["python", script, *arguments(name)[: 1 if name not in SHORT else None]])
    pictures = []
    for old in PICTURES.glob(f"{name}*.png"):
        if re.fullmatch(rf"{name}(_.*)?", old.stem):
            old.unlink()
    for path in sorted((ROOT / OUT / name).glob("*.png")):
        kept = path.stem if path.stem.startswith(name) else f"{name}_{path.stem}"
        PICTURES.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, PICTURES / f"{kept}.png")
        pictures.append(f"![{name}](examples/{kept}.png)")
    text = "\n".join(lines).strip()
    shown = [f"## {name}", told, f"```sh\n{command}\n```", f"```\n{text}\n```", *pictures]
    return "\n\n".join(shown) + "\n"


def sections(page: str) -> dict[str, str]:
    """Of a page as it stands: name -> text. A heading within an output is none."""
    found: dict[str, str] = {}
    name, fenced = "", False
    for line in page.splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            name = line[3:].strip()
        if name:
            found[name] = found.get(name, "") + line
    return {name: text.rstrip() + "\n" for name, text in found.items()}


def write(ran: list[str]) -> None:
    from bench.pages import note

    old = sections(PAGE.read_text()) if PAGE.exists() else {}
    made = {**old, **{name: f"{section(name)}\n{note('Run on')}\n" for name in ran}}
    parts = [INTRODUCTION, *(made[name] for name in names() if name in made)]
    PAGE.write_text("\n".join(parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names(), help="these alone")
    parser.add_argument("--write", action="store_true", help="docs/examples.md and its pictures")
    options = parser.parse_args()
    chosen = options.only or names()
    failed, began = [], time.perf_counter()
    for k, name in enumerate(chosen, 1):
        print(f"[{k}/{len(chosen)}] {name} ...", flush=True)
        status, seconds = run(name)
        lines = (ROOT / OUT / f"{name}.txt").read_text().rstrip().splitlines() or ["(no output)"]
        print(f"    {seconds:.0f} s: {lines[-1]}" if not status else f"    FAILED, exit {status}")
        failed += [name] * bool(status)
    print(f"{len(chosen)} examples in {time.perf_counter() - began:.0f} s; outputs in {OUT}/")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    if options.write:
        write(chosen)
        print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

"""tests.xml: what became of each test, and what that says of each form, cell and type."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

#: lost: its process ended, or it hung; in the file it is a failure like any other.
OUTCOMES = ("passed", "failed", "lost", "skipped")


@dataclass
class Case:
    """A test. launched: the loops over time that it launched, as text."""

    nodeid: str
    outcome: str
    seconds: float = 0.0
    text: str = ""
    launched: list[str] = field(default_factory=list)

    @property
    def red(self) -> bool:
        return self.outcome in ("failed", "lost")


def write(path: Path, cases: Iterable[Case], properties: dict[str, str]) -> None:
    """The file, whole; one that is read meanwhile is the old or the new."""
    cases = list(cases)
    count = Counter(case.outcome for case in cases)
    root = ET.Element("testsuites")
    suite = ET.SubElement(
        root,
        "testsuite",
        name="fastseq on a GPU",
        tests=str(len(cases)),
        failures=str(count["failed"] + count["lost"]),
        errors="0",
        skipped=str(count["skipped"]),
        time=f"{sum(case.seconds for case in cases):.3f}",
    )
    _add_properties(suite, properties.items())
    for case in cases:
        file, _, name = case.nodeid.partition("::")
        element = ET.SubElement(
            suite,
            "testcase",
            classname=file.removesuffix(".py").replace("/", "."),
            name=_printable(name or file),
            file=file,
            time=f"{case.seconds:.3f}",
        )
        marks = [("launched", launch) for launch in case.launched]
        _add_properties(element, [("outcome", case.outcome), *marks])
        if case.red:
            first = case.text.strip().splitlines()[-1:] or [case.outcome]
            failure = ET.SubElement(element, "failure", message=_printable(first[0][:300]))
            failure.text = _printable(case.text)
        elif case.outcome == "skipped":
            ET.SubElement(element, "skipped", message=_printable(case.text[:300]))
    ET.indent(root)
    part = path.with_name(path.name + ".part")
    ET.ElementTree(root).write(part, encoding="utf-8", xml_declaration=True)
    os.replace(part, path)


def _add_properties(parent: ET.Element, pairs: Iterable[tuple[str, str]]) -> None:
    found = ET.SubElement(parent, "properties")
    for name, value in pairs:
        ET.SubElement(found, "property", name=name, value=_printable(value))


def _printable(text: str) -> str:
    """Without what XML cannot say: control characters, and an escape's colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def read(path: Path) -> tuple[list[Case], dict[str, str]]:
    """The cases and the suite's properties; nothing where the file is missing or broken."""
    try:
        suite = ET.parse(path).getroot().find("testsuite")
    except (OSError, ET.ParseError):
        return [], {}
    if suite is None:
        return [], {}
    cases = []
    for element in suite.iter("testcase"):
        pairs = [(p.get("name"), p.get("value", "")) for p in element.iter("property")]
        red = element.find("failure")
        nodeid = f"{element.get('file')}::{element.get('name')}"
        cases.append(
            Case(
                nodeid if element.get("name") != element.get("file") else nodeid.split("::")[0],
                dict(pairs).get("outcome", "passed" if red is None else "failed"),
                float(element.get("time", 0)),
                "" if red is None else red.text or "",
                [value for name, value in pairs if name == "launched"],
            )
        )
    given = suite.find("properties")
    properties = {} if given is None else {p.get("name", ""): p.get("value", "") for p in given}
    return cases, properties


def verdicts(cases: Iterable[Case]) -> dict[str, str]:
    """Of each launched loop: 'no' where a test that launched it is red, 'yes' where some passed."""
    found: dict[str, str] = {}
    for case in cases:
        for launch in case.launched:
            if case.red:
                found[launch] = "no"
            elif case.outcome == "passed":
                found.setdefault(launch, "yes")
    return found


def tested(needed: Iterable[str], found: dict[str, str]) -> str:
    """'yes' where all loops are green, 'no' where one is red, '' where one was not tested."""
    states = [found.get(launch, "") for launch in needed]
    return "no" if "no" in states else "" if "" in states else "yes"

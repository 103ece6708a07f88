"""The README's table of trainers, made by running tests/test_guarantees.py: python -m tests.guarantees README.md"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from tests.tasks import NAMES

BEGIN, END = "<!-- trainers: begin -->", "<!-- trainers: end -->"
# A test of each, called test_ and these words.
COLUMNS = ("trains", "overfits one batch", "resumes bit-identically", "2 processes equal 1", "streams")
MISSING = "NO"


def test_name(column: str) -> str:
    return "test_" + column.replace(" ", "_").replace("-", "_")


def shown_by_tests() -> dict[tuple[str, str], str]:
    """What each cell showed, by its test and its trainer; a test that failed or was skipped showed nothing."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        subprocess.run(
            [sys.executable, "-m", "pytest", "tests/test_guarantees.py", f"--junitxml={report}"], check=False
        )
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            test, _, name = case.attrib["name"].rstrip("]").partition("[")
            shown = [one.attrib["value"] for one in case.iter("property") if one.attrib["name"] == "shown"]
            if not {child.tag for child in case} & {"failure", "error", "skipped"}:
                found[test, name] = " ".join(shown)
        return found


def table(shown: dict[tuple[str, str], str]) -> str:
    """Markdown: a row for each trainer and kind of labels."""
    lines = ["| trainer | labels | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for trainer, labels in NAMES:
        cells = [shown.get((test_name(column), f"{trainer}-{labels}"), "") or MISSING for column in COLUMNS]
        lines.append(f"| {trainer} | {labels} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Put the table between its marks."""
    path = Path(sys.argv[1])
    made = table(shown_by_tests())
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{made}{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()

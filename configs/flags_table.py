"""The README's table of flags, made from the options themselves: python -m configs.flags_table README.md"""

from __future__ import annotations

import ast
import sys
from dataclasses import fields
from pathlib import Path

from configs.arguments import SECTIONS

BEGIN, END = "<!-- flags: begin -->", "<!-- flags: end -->"
TITLES = {"data": "Data", "model": "Model", "optim": "Optimization", "run": "Run"}


def docstrings() -> dict[str, str]:
    """The text under each field of options.py."""
    found = {}
    for node in ast.parse(Path(__file__).with_name("options.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, node.body[1:]):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), field.target.id
                    found[field.target.id] = str(after.value.value)
    return found


def table() -> str:
    """Markdown: one table a section, one row a flag."""
    texts, lines = docstrings(), []
    for section, options in SECTIONS.items():
        lines += [f"**{TITLES[section]}**", "", "| flag | default | meaning |", "|---|---|---|"]
        for field in fields(options):
            default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            choices = str(field.type).replace("Literal", "").replace(" | None", "")
            meaning = texts[field.name] + (f" One of {choices[1:-1]}." if choices.startswith("[") else "")
            shown = "" if default is None else f"`{default}`"
            lines.append(f"| `--{field.name}` | {shown} | {meaning.replace('|', '/')} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Put the table between its marks."""
    path = Path(sys.argv[1])
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{table()}{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Records of measurements, and the tables of the documentation that are made from them.

    python -m benchmarks.records            writes every table of the pages in `PAGES`
    python -m benchmarks.records --check    fails where a table differs from its record, or a command no longer parses

A record is one JSON file in `benchmarks/records`: the commands, the commit of the code that was measured, the date,
the hardware, the seeds, and the table. A benchmark writes its record when it is called with `--record`. A page shows
the table of a record between two comments, `<!-- record: NAME -->` and `<!-- end of record -->`, and a single figure in
front of a comment `<!-- NAME:ROW:COLUMN -->`, counted from 0.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"
PAGES = (
    *(ROOT / "docs" / f"{name}.md" for name in ("results", "reliability", "scale", "clusters")),
    ROOT / "README.md",
)
BLOCK = re.compile(r"(<!-- record: ([a-z0-9_]+) -->\n).*?(<!-- end of record -->)", re.DOTALL)

FIGURE = re.compile(r"[^\s|(]+(<!-- ([a-z0-9_]+):(\d+):(\d+) -->)")


@dataclass(kw_only=True)
class Record:
    """One table of figures, and everything that is needed to measure it again."""

    commands: list[str]
    """The command lines that produced the figures, in order, as given in the root of the project."""
    commit: str
    """The commit of the code that was measured; `-dirty` says that files differed from it."""
    date: str
    hardware: str
    seeds: list[int]
    columns: list[str]
    rows: list[list[str]]
    """Cells of the table as the page shows them."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Unrounded numbers behind the cells, where the benchmark keeps them."""

    def table(self) -> str:
        """The table in Markdown, with a line that says where its figures come from."""
        lines = [f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join(lines) + f"\n\n*{self.source()}*\n"

    def source(self) -> str:
        """Commit, date, hardware and seeds in one line."""
        seeds = (
            f"seed {self.seeds[0]}" if len(self.seeds) == 1 else f"seeds {', '.join(map(str, self.seeds))}"
        )
        parts = [f"Commit `{self.commit}`", self.date, self.hardware, *([seeds] if self.seeds else [])]
        return ", ".join(parts) + "."


def add_option(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark the option `--record [NAME]`."""
    name = Path(sys.argv[0]).stem
    parser.add_argument(
        "--record",
        nargs="?",
        const=name,
        metavar="NAME",
        help="also write the figures to benchmarks/records/NAME.json; NAME is that of the script by default",
    )


def write(
    name: str | None,
    *,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    seeds: Sequence[int] = (),
    figures: Mapping[str, Any] | None = None,
    commands: Sequence[str] | None = None,
) -> None:
    """Write the record of a benchmark that was called with `--record`; None writes nothing.

    commands: the command line of this process by default.
    """
    if name is None:
        return
    record = Record(
        commands=list(commands or [_command_line()]),
        commit=_commit(),
        date=datetime.date.today().isoformat(),
        hardware=_hardware(),
        seeds=list(seeds),
        columns=list(columns),
        rows=[list(map(str, row)) for row in rows],
        figures=dict(figures or {}),
    )
    RECORDS.mkdir(exist_ok=True)
    text = json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n"
    (RECORDS / f"{name}.json").write_text(text, encoding="utf-8")


def read(name: str) -> Record:
    """The record called `name`."""
    return Record(**json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8")))


def rendered(page: str) -> str:
    """A page with the tables and figures of all records it names."""
    page = BLOCK.sub(lambda found: found[1] + read(found[2]).table() + found[3], page)
    return FIGURE.sub(lambda found: read(found[2]).rows[int(found[3])][int(found[4])] + found[1], page)


def problems() -> Iterator[str]:
    """What is wrong between pages and records, one sentence each."""
    shown = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shown |= {found[2] for found in BLOCK.finditer(text)}
        if rendered(text) != text:
            yield f"{page.relative_to(ROOT)} differs from its records: run `make results`"
    for path in sorted(RECORDS.glob("*.json")):
        if path.stem not in shown:
            yield f"no page shows {path.relative_to(ROOT)}: remove it, or name it on a page"
        for command in read(path.stem).commands:
            if any(word.startswith("/") for word in shlex.split(command)):
                yield f"{path.relative_to(ROOT)}: `{command}` names a path of one machine: write its last part"
            if problem := parse_problem(command):
                yield f"{path.relative_to(ROOT)}: `{command}` no longer parses: {problem}"


def parse_problem(command: str) -> str | None:
    """Why the command line would be refused before it does anything; None when it would be accepted."""
    program, *arguments = shlex.split(command)
    if program in ("hierarchy-builder", "trainer"):
        return _problem_of_verb(program, arguments)
    if program == "python":
        return _problem_of_script(arguments)
    if program == "pytest":
        return next((f"{a} does not exist" for a in arguments if not (ROOT / a).exists()), None)
    if program == "make":
        known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return None if arguments[0] in known else f"the Makefile has no target {arguments[0]}"
    return f"{program} is not a program of this project"


def _problem_of_verb(program: str, arguments: list[str]) -> str | None:
    import typer

    if program == "trainer":
        from trainer.cli.app import app
    else:
        from hierarchy_builder.cli.app import app
    verbs = typer.main.get_command(app).commands
    if not arguments or arguments[0] not in verbs:
        return f"{program} has no verb {' '.join(arguments[:1])!r}"
    try:
        verbs[arguments[0]].make_context(arguments[0], arguments[1:])
    except Exception as error:  # Typer keeps the class of its usage errors to itself
        if not hasattr(error, "format_message"):
            raise
        message = str(error.format_message())
        return None if "does not exist, expected" in message else message  # RUN stands for a folder
    return None


def _problem_of_script(arguments: list[str]) -> str | None:
    name, *rest = arguments[1:] if arguments[0] == "-m" else arguments
    path = ROOT / (name.replace(".", "/") + ".py" if arguments[0] == "-m" else name)
    if not path.exists():
        return f"{path.relative_to(ROOT)} does not exist"
    sys.path[:0] = [str(ROOT), str(path.parent)]
    module = importlib.import_module(name if arguments[0] == "-m" else path.stem)
    parser: argparse.ArgumentParser = module.make_parser()
    parser.error = _refuse  # type: ignore[method-assign, assignment]
    try:
        parser.parse_args(rest)
    except ValueError as error:
        return str(error)
    return None


def _refuse(message: str) -> None:
    raise ValueError(message)


def _command_line() -> str:
    """The command of this process; of a path from the root of this machine only the last part."""
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    program = (
        ["-m", ".".join(script.with_suffix("").parts)] if script.parts[0] == "benchmarks" else [str(script)]
    )
    words = (Path(word).name if word.startswith("/") else word for word in sys.argv[1:])
    return shlex.join(["python", *program, *words])


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    # Records written before this one do not change what is measured.
    is_dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/records")
    return git("rev-parse", "--short=8", "HEAD") + ("-dirty" if is_dirty else "")


def _hardware() -> str:
    import torch

    cores = len(os.sched_getaffinity(0))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cores} cores of {_processor()}{gpu}, torch {torch.__version__}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing, and exit with 1 on a difference"
    )
    return parser


def main() -> None:
    if not make_parser().parse_args().check:
        for page in PAGES:
            page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")
    found = list(problems())
    for problem in found:
        print(problem, file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

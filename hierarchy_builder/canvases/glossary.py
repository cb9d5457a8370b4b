"""The figures of a page in words: a name that a reader understands, which direction is better, and what it means.

The glossary of a page is a YAML file, a list of `Figure`s beside the module that shows them.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hierarchy_builder.canvases.gallery import Definitions, Section, Table, Term
from hierarchy_builder.fields import from_mapping
from hierarchy_builder.files.untrusted.documents import parse_yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure, or one for each level or pair of levels."""

    names: str
    """Regular expression of its short names; groups are numbers of levels."""
    words: str
    text: str
    better: str = ""
    """↑ or ↓, or nothing where neither is better in itself."""
    where: str = "level {}"
    """What the groups say, after the words."""


@dataclass(frozen=True, slots=True)
class Glossary:
    """Figures by their short names or their words."""

    figures: Sequence[Figure]

    @classmethod
    def read(cls, package: str, file: str) -> Glossary:
        """Read the figures that a file of a package lists."""
        text = importlib.resources.files(package).joinpath(file).read_text(encoding="utf-8")
        return cls([from_mapping(Figure, row, file) for row in parse_yaml(text)])

    def with_names(self, *names: str) -> Glossary:
        """The same with these names in place of {0}, {1} … in the words."""
        return Glossary([dataclasses.replace(each, words=each.words.format(*names)) for each in self.figures])

    def find(self, name: str) -> tuple[Figure, str] | None:
        """The figure of a name, and the level it is of in words; None for names of other programs."""
        for figure in self.figures:
            if match := re.fullmatch(figure.names, name):
                found = [group.strip("_").replace("_", " ") for group in match.groups() if group is not None]
                return figure, figure.where.format(*found) if found else ""
            if name == figure.words:
                return figure, ""
        return None

    def words(self, name: str) -> str:
        """The words of a short name, or the name itself if it has none."""
        found = self.find(name)
        return found[0].words if found else name

    def term(self, name: str) -> str:
        """The name in words with its level and an arrow, linked to its meaning; the name itself if it has none."""
        found = self.find(name)
        if found is None:
            return name
        figure, where = found
        text = ", ".join(filter(None, (figure.words, where)))
        return Term(f"{text} {figure.better}".strip(), of=figure.words)

    def in_words(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rows of a table with figures as terms, in headings and in the columns `name`, `measure` and `score`."""
        named = ("name", "measure", "score")
        return [
            {self.term(key): self.term(value) if key in named else value for key, value in row.items()}
            for row in rows
        ]

    def meanings(self, sections: Sequence[Section], title: str, text: str) -> list[Section]:
        """What the terms in the tables of these sections mean, as they first occur; none if nothing is a term."""
        tables = [block for section in sections for block in section.blocks if isinstance(block, Table)]
        cells = [each for table in tables for row in table.rows for pair in row.items() for each in pair]
        used = dict.fromkeys(each.of for each in cells if isinstance(each, Term))
        by_words = {figure.words: figure for figure in self.figures}
        entries = {words: self._meaning(by_words[words]) for words in used}
        return [Section(title=title, text=text, blocks=[Definitions(entries=entries)])] if entries else []

    @staticmethod
    def _meaning(figure: Figure) -> str:
        """Its text, and its short names with N for a number and brackets around what may be absent: `lis[_N_N]`."""
        names = re.sub(r"\((?:\?:)?([^()]*)\)\?", r"[\1]", figure.names.replace(r"(\d+)", "N"))
        return f"{figure.text} In files: {names}."

"""Figures of several seeds as mean ± standard deviation, side by side.

    trainer evaluate RUN --shards SHARDS --json > FILE          # one for each seed
    python benchmarks/over_seeds.py tf=FILE,FILE,FILE lf=FILE,FILE,FILE [--names frechet_pooled,frechet_pictures]

`variety_last` and `frechet_tokens_last` are those of the last level. Deviations are those of the population of seeds,
divided by n − 1.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path

import records


def main() -> None:
    """Print one line for every group and name."""
    given = make_parser().parse_args()
    groups = {}
    for group in given.groups:
        name, _, files = group.partition("=")
        groups[name] = [_metrics(Path(file)) for file in files.split(",")]
    everywhere = [found for seeds in groups.values() for found in seeds]
    shared = [name for name in everywhere[0] if all(name in found for found in everywhere)]
    names = given.names.split(",") if given.names else shared
    width = max(map(len, groups))
    rows = {group: [group] for group in groups}
    for name in names:
        print(name)
        for group, seeds in groups.items():
            values = [found[name] for found in seeds if name in found]
            print(f"  {group:<{width}}  {_summary(values)}")
            rows[group].append(_summary(values))
    seeds = range(max(map(len, groups.values())))
    records.write(given.record, columns=["run", *names], rows=list(rows.values()), seeds=seeds)


def _metrics(file: Path) -> dict[str, float]:
    found = {row["name"]: row["value"] for row in json.loads(file.read_text(encoding="utf-8"))}
    for name in ("variety", "frechet_tokens"):  # methods differ in their number of levels
        levels = [each for each in found if re.fullmatch(rf"{name}_\d+", each)]
        if levels:
            found[f"{name}_last"] = found[max(levels, key=lambda each: int(each.rpartition("_")[2]))]
    return found


def _summary(values: list[float]) -> str:
    if not values:
        return "not measured"
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}  (n = {len(values)})"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="+", metavar="NAME=FILE,FILE,…")
    parser.add_argument("--names", help="metrics to print, with commas; all that every file holds by default")
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()

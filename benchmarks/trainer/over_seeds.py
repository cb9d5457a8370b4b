"""Figures of several seeds as mean ± standard deviation, side by side.

    trainer evaluate RUN --shards SHARDS --json > FILE          # one for each seed
    python -m benchmarks.trainer.over_seeds tf=FILE,FILE,FILE lf=FILE,FILE,FILE [--names frechet_pooled,…]

With `--real LABEL` a last line holds the same figures of real images, which `evaluate` prints too, from the first file.
`variety_last` and `frechet_tokens_last` are those of the last level. Deviations are those of the population of seeds,
divided by n − 1.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path

from benchmarks import records


def main() -> None:
    """Print one line for every group and name."""
    given = make_parser().parse_args()
    groups = {}
    for group in given.groups:
        name, _, files = group.partition("=")
        groups[name] = [_metrics(Path(file)) for file in files.split(",")]
    if given.real:
        first = next(iter(groups.values()))[0]
        groups[given.real] = [
            {name.removesuffix("_real"): each for name, each in first.items() if name.endswith("_real")}
        ]
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
        levels = [int(each[1]) for key in found if (each := re.fullmatch(rf"{name}_(\d+)", key))]
        if levels:
            last = f"{name}_{max(levels)}"
            found |= {
                key.replace(last, f"{name}_last"): found[key]
                for key in (last, f"{last}_real")
                if key in found
            }
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
    parser.add_argument("--real", metavar="LABEL", help="a line of real images, and what it is called")
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()

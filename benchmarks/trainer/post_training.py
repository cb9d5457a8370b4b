"""What post-training changes: a small network before it, after it, and after the same time of ordinary training.

    python -m benchmarks.trainer.post_training PHOTOS --judge dinov2-small=FILE --record post_training

Every fifth photograph of a class is held out, and judges all networks. Level statistics of the others are the target.
The judge is an encoder that nothing was trained with. Runs the command lines that a user would run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.trainer.tiny_model import run, split_photographs

LEVELS = range(4)
METRICS = {
    **{f"variety_{level}": f"variance within classes, level {level} (1 is real)" for level in LEVELS},
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "class_mean_accuracy": "class accuracy",
    **{
        f"frechet_tokens_{level}": f"Fréchet distance of tokens, level {level} (a target)" for level in LEVELS
    },
    "frechet_pooled": "Fréchet distance of mean tokens",
    "pmr_spatial_0_1": "PMR, spatial, levels 0 and 1",
    "pmr_feature_2_3": "PMR, features, levels 2 and 3",
    "lis_0_3": "LIS of level 3 for edits of level 0, 10⁻⁵",
    "lis_2_3": "LIS of level 3 for edits of level 2, 10⁻⁵",
    "fdr": "FDr of the judge that was no target",
}
"""Names that `trainer evaluate` prints, and the rows of the table."""
WAYS = ("before", "post-trained", "trained on")


def main() -> None:
    options = make_parser().parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        root = Path(options.keep or scratch)
        builds = {}
        split_photographs(Path(options.photos), root / "photos")
        for split in ("train", "val"):
            builds[split] = root / split
            made = ["hierarchy-builder", "build", str(root / "photos"), "--split", split, *options.build]
            run([*made, "--images", "--workers", str(options.workers), "--out", str(builds[split])])
        if options.decoder:
            decoder = [
                "trainer",
                "train-decoder",
                str(builds["train"]),
                "--out",
                str(root / "decoder"),
                "--quiet",
            ]
            run([*decoder, *options.decoder])
        found = [measured(root / f"seed-{seed}", builds, seed, options) for seed in range(options.seeds)]
    names = [name for name in METRICS if all(name in each[way] for each in found for way in WAYS)]
    rows = []
    for name in names:
        real = found[0]["before"].get(f"{name}_real")
        cells = [spread([each[way][name] for each in found]) for way in WAYS]
        rows.append([METRICS[name], *cells, "" if real is None else f"{real:.3g}"])
    rows.append(["seconds", *(spread([each[way]["seconds"] for each in found]) for way in WAYS), ""])
    for row in rows:
        print(*row, sep="\t")
    records.write(
        options.record,
        columns=["", *WAYS, "real images"],
        rows=rows,
        seeds=range(options.seeds),
        figures={str(seed): each for seed, each in enumerate(found)},
    )


def measured(
    root: Path, builds: dict[str, Path], seed: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Train, post-train, and train on for as long: the figures of the three networks."""
    train, small = str(builds["train"]), ["--seed", str(seed), "--quiet", "--json"]
    preset = ["--preset", "tiny-cpu", *options.train]
    runs = {way: root / way.replace(" ", "-") for way in WAYS}
    first = json.loads(run(["trainer", "train", train, "--out", str(runs["before"]), *preset, *small]))
    post = [
        "trainer",
        "post-train",
        str(runs["before"]),
        "--shards",
        train,
        "--out",
        str(runs["post-trained"]),
    ]
    second = json.loads(run([*post, *options.post, *small]))
    more = round(second["seconds"] * first["images_seen"] / first["seconds"])
    on = [*preset, "--resume", str(runs["before"]), "--total-images", str(first["images_seen"] + more)]
    third = json.loads(run(["trainer", "train", train, "--out", str(runs["trained on"]), *on, *small]))
    seconds = {
        "before": first["seconds"],
        "post-trained": second["seconds"],
        "trained on": third["seconds"] - first["seconds"],
    }
    return {way: {**evaluated(runs[way], builds["val"], options), "seconds": seconds[way]} for way in WAYS}


def evaluated(path: Path, val: Path, options: argparse.Namespace) -> dict[str, float]:
    """Figures of a run by name, on the held-out photographs; a trained decoder lies beside the runs of the seeds."""
    command = ["trainer", "evaluate", str(path), "--shards", str(val), "--json", "--quiet"]
    if options.decoder:
        command += ["--decoder", str(path.parent.parent / "decoder")]
    command += ["--samples-per-class", str(options.samples)]
    found = {row["name"]: row["value"] for row in json.loads(run(command))}
    found |= locality(command)
    if options.judge:
        name, _, file = options.judge.partition("=")
        weights = ["--judge-file", options.judge] if file else []
        rows: list[dict[str, Any]] = json.loads(run([*command, "--fdr", name, *weights]))
        found["fdr"] = rows[0]["ratio"]
    return found


def locality(evaluate: list[str]) -> dict[str, float]:
    """LIS of edits in two samples of up to 12 classes, in units of 10⁻⁵."""
    rows = json.loads(run([*evaluate, "--edits", "--samples-per-class", "2"]))
    return {row["name"]: 1e5 * row["value"] for row in rows if row["name"].startswith("lis_")}


def spread(values: list[float]) -> str:
    """The mean, and the standard deviation over seeds."""
    mean = f"{statistics.fmean(values):.3g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", help="a folder of class folders")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("--samples", type=int, default=16, help="samples of each class")
    parser.add_argument("--workers", type=int, default=2, help="workers of the builds")
    parser.add_argument(
        "--build",
        type=shlex.split,
        default=["--encoder", "dct"],
        help="encoder and further options of `hierarchy-builder build`",
    )
    parser.add_argument(
        "--decoder",
        type=shlex.split,
        help="options of `trainer train-decoder`, where the encoder has no decoder",
    )
    parser.add_argument("--judge", metavar="NAME[=FILE]", help="encoder that was no target, and its weights")
    parser.add_argument("--train", type=shlex.split, default=[], help="further options of `trainer train`")
    parser.add_argument(
        "--post", type=shlex.split, default=[], help="further options of `trainer post-train`"
    )
    parser.add_argument("--scratch", help="folder for what is built and removed; the system's by default")
    parser.add_argument("--keep", help="folder where everything stays, so that a repeated command goes on")
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()

"""The estimates of `hierarchy-builder plan` against a real build of the same images.

    python -m benchmarks.builder.plan IMAGENET --encoder dct --workers 0

IMAGES is a folder of class folders. Each row compares one way of building: bytes of every artefact and seconds of all
stages, estimated over real.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import records
from hierarchy_builder.build.pipeline import BuildPlan, build
from hierarchy_builder.build.plan import make_plan
from hierarchy_builder.build.session import Session
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.files.whole import size_on_disk
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.folder import BuildFolder


def main() -> None:
    arguments = make_parser().parse_args()
    session = Session(workers=Workers(count=arguments.workers), reporter=Reporter(quiet=True))
    plain = BuildPlan(
        extract=ExtractConfig(encoder=arguments.encoder, max_bad_fraction=1.0),
        hierarchy=HierarchyRecipe.paper(),
        shard=ShardConfig(),
    )
    rich = replace(
        plain,
        vocabulary=VocabularyConfig(sizes=(64, 512)),
        shard=ShardConfig(images=True, covariance=True),
    )
    kinds = {
        "stages": (plain, False),
        "stages, vocabulary 64,512, pictures, covariance": (rich, False),
        "fused": (plain, True),
    }
    rows = []
    for kind, (plan, fused) in kinds.items():
        rows.append([kind, *compare(arguments.images, plan, session, fused=fused)])
        print(" | ".join(rows[-1]), flush=True)
    columns = [
        "build",
        "images tried",
        "largest deviation",
        "all bytes",
        "seconds, estimated",
        "seconds, real",
    ]
    records.write(arguments.record, columns=columns, rows=rows, seeds=[0])


def compare(images: str, plan: BuildPlan, session: Session, *, fused: bool) -> list[str]:
    """Cells of one row: images tried, the artefact with the largest relative deviation, that of all bytes, seconds."""
    with tempfile.TemporaryDirectory() as place:
        folder = BuildFolder(Path(place) / "build")
        found = make_plan(folder, images, plan, session, fused=fused)
        started = time.perf_counter()
        build(folder, images, plan, session, fused=fused)
        seconds = time.perf_counter() - started
        real = {name: size_on_disk(folder.root / name) for name in found.sizes}
    deviations = {name: size / real[name] - 1 for name, size in found.sizes.items()}
    worst = max(deviations, key=lambda name: abs(deviations[name]))
    return [
        f"{found.tried:,} of {found.num_images:,}",
        f"{deviations[worst]:+.2%} ({worst})",
        f"{found.total / sum(real.values()) - 1:+.2%}",
        f"{found.seconds:.0f}",
        f"{seconds:.0f}",
    ]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", metavar="IMAGES")
    parser.add_argument("--encoder", default="dct")
    parser.add_argument("--workers", type=int, default=0)
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()

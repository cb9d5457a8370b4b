"""What the driver costs where a data set is large: CPU seconds and peak memory of commands, without encoding the set.

    python -m benchmarks.builder.million WORK --images 1281000

WORK gets a tree of hard links to a few drawn photographs, 1,000 classes of equal size, and a set of hard links to one
tar of 1,000 samples. It must be empty or left by an earlier call. Every command runs in a process of its own until it
has ended, or until it has begun its work: a build until its first unit is done, a training until its run folder is
prepared. Then it is stopped, which does not count. Figures are those of this process, the driver; Ray's worker is
another one.

`status` looks at the started build with a marker and blocks for every unit, copied and linked from the first one;
`verify --quick` looks at them when the last unit is done, and at the set of shards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import records

CLASSES, SAMPLES = 1000, 1000
LINKS = 60_000
"""Links to one file; ext4 allows 65,000."""
POLL_S = 0.05


def main() -> None:
    arguments = make_parser().parse_args()
    work, count = arguments.work.resolve(), arguments.images
    tree, shards = work / f"tree-{count}", work / f"shards-{count // SAMPLES}"
    make_tree(tree, count)
    make_shards(work, shards, count // SAMPLES, work / f"{tree.name}-0.jpg")
    for left in ("build", "run"):
        shutil.rmtree(work / left, ignore_errors=True)
    builder, build = (sys.executable, "-m", "hierarchy_builder"), str(work / "build")
    asked = (str(tree), "--out", build, "--encoder", "dct", "--workers", "1", "--quiet")
    marker = work / "build/ledger/extract/000000.json"
    run = work / "run"
    train = ("trainer", "train", str(shards), "--out", str(run), "--preset", "tiny-cpu", "--quiet")
    rows = [
        measured("plan", (*builder, "plan", *asked, "--force"), work),
        measured("build, until a unit is done", (*builder, "build", *asked, "--force"), work, marker.exists),
    ]
    copy_units(work / "build", marker)
    rows.append(measured("status", (*builder, "status", build, "--json"), work))
    rows.append(
        measured(
            "build goes on, until a unit is done",
            (*builder, "build", *asked, "--force"),
            work,
            lambda: unfinished(work / "build").exists(),
        )
    )
    rows.append(measured("verify --quick, of the build", (*builder, "verify", "--quick", build), work))
    rows.append(measured("verify --quick, of the shards", (*builder, "verify", "--quick", str(shards)), work))
    started = (sys.executable, "-m", *train)
    rows.append(measured("train, until it begins", started, work, (run / "config.yaml").exists))
    command = f"{count:,} images, {count // SAMPLES:,} shards"
    columns = [command, "seconds", "CPU seconds", "peak memory, MB"]
    records.write(
        arguments.record,
        columns=columns,
        rows=rows,
        figures={"images": count, "classes": CLASSES, "shards": count // SAMPLES},
    )


def make_tree(tree: Path, count: int) -> None:
    """1,000 class folders of hard links to drawn photographs."""
    if (tree / ".whole").exists():
        return
    sources = []
    for number in range(-(-count // LINKS)):
        path = tree.parent / f"{tree.name}-{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC).save(path, quality=85)
        os.utime(path, (1.6e9, 1.6e9))  # so that the outcomes of one unit are true of all
        sources.append(path)
    each = count // CLASSES
    for label in range(CLASSES):
        folder = tree / f"n{label:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(each):
            name = folder / f"n{label:08d}_{number}.jpg"
            if not name.exists():
                os.link(sources[(label * each + number) // LINKS], name)
    (tree / ".whole").touch()


def make_shards(work: Path, shards: Path, count: int, photo: Path) -> None:
    """A finished set whose tars are links to one."""
    from hierarchy_builder.build.calls import build_shards

    if (shards / "_SUCCESS").exists():
        return
    small = work / "small"
    shutil.rmtree(small, ignore_errors=True)
    shutil.rmtree(work / "small-build", ignore_errors=True)
    for label in range(CLASSES):
        (small / f"n{label:08d}").mkdir(parents=True)
        shutil.copy(photo, small / f"n{label:08d}" / f"n{label:08d}_0.jpg")
    built = build_shards(small, work / "small-build", encoder="dct", workers=0)
    shards.mkdir(parents=True)
    index = json.loads((built / "index.json").read_text())
    entry = index["shardlist"][0]
    for path in built.iterdir():
        if path.stem != Path(entry["url"]).stem and path.name != "_SUCCESS":
            shutil.copy(path, shards / path.name)
    index["shardlist"] = [{**entry, "url": f"train-{number:06d}.tar"} for number in range(count)]
    index["num_samples"] = count * entry["nsamples"]
    for number in range(count):
        for suffix in (".tar", ".json"):
            os.link((built / entry["url"]).with_suffix(suffix), shards / f"train-{number:06d}{suffix}")
    (shards / "index.json").write_text(json.dumps(index, indent=2))
    from hierarchy_builder.store.shard_set import write_success

    write_success(shards, index["num_samples"])


def copy_units(build: Path, first: Path) -> None:
    """Mark every unit of the stage but the last as done, with the outcomes and the blocks of the first one."""
    from hierarchy_builder.store.folder import BuildFolder
    from hierarchy_builder.store.ledger import open_ledger, read_marker
    from hierarchy_builder.store.units import stage_units

    folder = BuildFolder(build)
    ledger, content = open_ledger(folder, "extract"), read_marker(first)
    chunks = [path for path in folder.features.glob("*/c") if path.is_dir()]
    for unit in stage_units(folder, "extract")[1:-1]:
        if ledger.marker(unit.number).exists():
            continue
        for chunk in chunks:
            source, target = chunk / "0", chunk / str(unit.number)
            shutil.rmtree(target, ignore_errors=True)
            if source.is_dir():
                shutil.copytree(source, target, copy_function=os.link)
            else:
                target.unlink(missing_ok=True)
                os.link(source, target)
        ledger.finish(unit.number, {**content, "unit": unit.number})


def unfinished(build: Path) -> Path:
    """The marker of the last unit."""
    from hierarchy_builder.store.folder import BuildFolder
    from hierarchy_builder.store.ledger import open_ledger
    from hierarchy_builder.store.units import stage_units

    folder = BuildFolder(build)
    return open_ledger(folder, "extract").marker(stage_units(folder, "extract")[-1].number)


def measured(
    name: str, command: Sequence[str], work: Path, until: Callable[[], bool] | None = None
) -> list[str]:
    """Run a command until it ends, or `until` holds; its name, seconds, CPU seconds and peak memory in MB."""
    began = time.perf_counter()
    with open(work / "command.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        cpu, peak, seconds, code = 0.0, 0.0, 0.0, None
        while code is None:
            # The kernel's figure for an ended child counts the memory of the parent that it was forked from.
            with contextlib.suppress(OSError, StopIteration):
                running, peak = usage_of(process.pid)
            if until is not None and until():
                cpu, seconds, until = running, time.perf_counter() - began, None
                process.terminate()
            ended, status, spent = os.wait4(process.pid, os.WNOHANG)
            code = status if ended else None
            time.sleep(POLL_S)
        process.returncode = code
        seconds = seconds or time.perf_counter() - began
    if not cpu:
        if code:
            raise SystemExit(f"{' '.join(command)} failed:\n{(work / 'command.log').read_text()[-2000:]}")
        cpu = spent.ru_utime + spent.ru_stime
    row = [name, f"{seconds:.1f}", f"{cpu:.1f}", f"{peak / 1e6:.0f}"]
    print(" | ".join(row), flush=True)
    return row


def usage_of(process: int) -> tuple[float, float]:
    """CPU seconds and peak memory in bytes of a process that runs."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    ticks = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return ticks, peak * 1024.0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder on a file system with hard links")
    parser.add_argument("--images", type=int, default=1_281_000, help="a multiple of 1,000")
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()

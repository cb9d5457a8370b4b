"""From photographs to samples you can look at, on a laptop and offline; `make demo` runs this.

    python examples/demo.py --out runs/demo [--photos FOLDER]

Each step is one command of the toolkit, printed before it runs. Without --photos the photographs are crops of the
colour pictures that scikit-image ships.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
CROPS_PER_CLASS = 48
CROP_PX = 256
console = Console(stderr=True)


def main(
    out: Annotated[Path, typer.Option(help="Folder of everything the demo makes.")] = Path("runs/demo"),
    photos: Annotated[Path | None, typer.Option(help="Your own photographs: one folder per class.")] = None,
    total_images: Annotated[
        int | None, typer.Option(help="Images seen in training; default: the preset's.")
    ] = None,
) -> None:
    """Photographs → teacher hierarchies → shards → a trained model → samples → one page."""
    if photos is None:
        photos = out / "photos"
        cut_photographs(photos)
    build, run, samples = out / "build", out / "run", out / "samples"
    rows = [
        {name: value for name, value in row.items() if name != "notes"}
        for row in command(
            "hierarchy-builder", "build", photos, "--out", build,
            "--encoder", "dct", "--images", "--workers", 2, "--json",
        )
    ]  # fmt: skip
    budget = () if total_images is None else ("--total-images", total_images)
    training, seconds = timed(
        "trainer", "train", build, "--out", run, "--preset", "tiny-cpu", *budget, "--json"
    )
    rows.append(stage("train", training["images_seen"], seconds, run))
    labels = list(json.loads((build / "class_map.json").read_text()))[:8]
    drawn, seconds = timed(
        "trainer", "sample", run, "--labels", ",".join(labels), "--seeds", "0-3", "--out", samples, "--json"
    )
    rows.append(stage("sample", len(drawn), seconds, samples))
    command("trainer", "evaluate", run, "--shards", build, "--json")
    (out / "stages.json").write_text(json.dumps(rows, indent=2))
    report = out / "report.html"
    command(
        "trainer", "report", run, "--shards", build, "--seeds", "0-1",
        "--stages", out / "stages.json", "--out", report,
    )  # fmt: skip
    show(rows)
    console.print(f"\nopen {report}", highlight=False)


def cut_photographs(folder: Path) -> None:
    """Cut seeded crops out of scikit-image's colour photographs into an ImageFolder tree; done once."""
    import skimage

    source = Path(skimage.__file__).parent / "data"
    for name, file in PHOTOGRAPHS.items():
        target = folder / name
        if target.is_dir() and len(list(target.iterdir())) == CROPS_PER_CLASS:
            continue
        target.mkdir(parents=True, exist_ok=True)
        photograph = Image.open(source / file).convert("RGB")
        random = np.random.default_rng(sorted(PHOTOGRAPHS).index(name))
        for number in range(CROPS_PER_CLASS):
            crop_once(photograph, random).save(target / f"{number:03d}.jpg", quality=95)


def crop_once(photograph: Image.Image, random: np.random.Generator) -> Image.Image:
    """A square of 50 to 100 % of the short side at a random place, mirrored half of the time."""
    side = int(min(photograph.size) * random.uniform(0.5, 1.0))
    left, top = (int(random.integers(0, extent - side + 1)) for extent in photograph.size)
    crop = photograph.crop((left, top, left + side, top + side)).resize(
        (CROP_PX, CROP_PX), Image.Resampling.BICUBIC
    )
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else crop


def command(*words: Any) -> Any:
    """Run one command of the toolkit, show it, and return its JSON when it was asked for any."""
    name, *arguments = map(str, words)
    console.print(f"\n$ {name} {' '.join(arguments)}", style="bold", highlight=False, soft_wrap=True)
    wants_json = "--json" in arguments
    program = Path(sys.executable).with_name(name)
    done = subprocess.run([program, *arguments], stdout=subprocess.PIPE if wants_json else None, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout) if wants_json else None


def timed(*words: Any) -> tuple[Any, float]:
    """The JSON of a command, and the seconds it took."""
    started = time.perf_counter()
    return command(*words), time.perf_counter() - started


def stage(name: str, images: int, seconds: float, folder: Path) -> dict[str, Any]:
    """One row of the closing table, shaped like those of `hierarchy-builder build --json`."""
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "stage": name,
        "images": images,
        "new_images": images,
        "seconds": round(seconds, 2),
        "images_per_second": round(images / seconds, 1),
        "num_bytes": num_bytes,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The closing table of stages."""
    table = Table("stage", "count", "seconds", "images/s", "bytes", title="stages")
    for row in rows:
        rate = f"{row['images_per_second']:,.1f}" if row["new_images"] else "done before"
        table.add_row(
            row["stage"], f"{row['images']:,}", f"{row['seconds']:.1f}", rate, f"{row['num_bytes']:,}"
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)

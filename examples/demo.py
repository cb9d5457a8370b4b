"""From pictures to samples you can look at, on a laptop and offline; `make demo` runs this.

    python examples/demo.py --out runs/demo [--photos FOLDER]

Each step is one command of the toolkit, printed before it runs. First it builds the teacher hierarchies of photographs
that scikit-image ships, as a page. Then it trains a small network on the 1,797 handwritten digits inside scikit-learn,
because anyone sees at a glance whether a generated digit is the one that was asked for. With --photos the network is
trained on your own photographs instead.
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
CROPS_PER_CLASS = 3
SIDE_PX = 256
MARGIN_PX = 16
PAPER, INK = np.array([250.0, 244.0, 230.0]), np.array([24.0, 52.0, 110.0])
"""sRGB colours in which the digits are drawn."""
HELD_OUT = 10
"""Every tenth digit is kept from the network and judges it."""
DEMO_IMAGES = 16_000
"""Digits seen in training: about 4 minutes on 2 cores."""
console = Console(stderr=True)


def main(
    out: Annotated[Path, typer.Option(help="Folder of everything the demo makes.")] = Path("runs/demo"),
    photos: Annotated[
        Path | None, typer.Option(help="Train on your own photographs: one folder per class.")
    ] = None,
    total_images: Annotated[int | None, typer.Option(help="Images seen in training.")] = None,
) -> None:
    """Pictures → teacher hierarchies → shards → a trained model → samples → one page."""
    build, run, samples = out / "build", out / "run", out / "samples"
    rows: list[dict[str, Any]] = []
    if photos is None:
        total_images = total_images or DEMO_IMAGES
        cut_photographs(out / "photos")
        hierarchies = out / "photographs"
        built(out / "photos", hierarchies)
        command("hierarchy-builder", "report", hierarchies, "--out", out / "photographs.html")
        draw_digits(out / "digits")
        for split in ("train", "val"):
            rows += built(out / "digits" / split, build / split, "--split", split)
        shards = build / "train"
    else:
        rows += built(photos, build)
        shards = build
    budget = () if total_images is None else ("--total-images", total_images)
    training, seconds = timed(
        "trainer", "train", shards, "--out", run, "--preset", "tiny-cpu", *budget, "--json"
    )
    rows.append(stage("train", training["images_seen"], seconds, run))
    labels = list(json.loads((shards / "class_map.json").read_text()))[:10]
    drawn, seconds = timed(
        "trainer", "sample", run, "--labels", ",".join(labels), "--seeds", "0-3", "--out", samples, "--json"
    )
    rows.append(stage("sample", len(drawn), seconds, samples))
    command("trainer", "evaluate", run, "--shards", build, "--json")
    (out / "stages.json").write_text(json.dumps(rows, indent=2))
    report = out / "report.html"
    command(
        "trainer", "report", run, "--shards", shards, "--seeds", "0-2",
        "--stages", out / "stages.json", "--out", report,
    )  # fmt: skip
    show(rows)
    if photos is None:
        console.print(
            f"\nteacher hierarchies of photographs: open {out / 'photographs.html'}", highlight=False
        )
    console.print(f"\nsamples of the network: open {report}", highlight=False)


def built(images: Path, folder: Path, *words: Any) -> list[dict[str, Any]]:
    """Build the hierarchies and shards of a folder of images, and return the rows of the closing table."""
    rows = command(
        "hierarchy-builder", "build", images, "--out", folder,
        "--encoder", "dct", "--images", "--workers", 2, *words, "--json",
    )  # fmt: skip
    return [{name: value for name, value in row.items() if name != "notes"} for row in rows]


def draw_digits(folder: Path) -> None:
    """Draw scikit-learn's digits, 8×8 pixels in 17 grey levels, smoothly at 256 px into folders of train and val."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    side = SIDE_PX - 2 * MARGIN_PX
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "val" if number % HELD_OUT == HELD_OUT - 1 else "train"
        target = folder / split / str(label) / f"{number:04d}.png"
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray((pixels / 16).astype(np.float32)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        ink = 1 / (1 + np.exp(-14 * (np.pad(np.asarray(smooth), MARGIN_PX) - 0.45)))[..., None]
        Image.fromarray((PAPER + (INK - PAPER) * ink).round().astype(np.uint8)).save(target)


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
    """A square of 75 to 100 % of the short side at a random place."""
    side = int(min(photograph.size) * random.uniform(0.75, 1.0))
    left, top = (int(random.integers(0, extent - side + 1)) for extent in photograph.size)
    crop = photograph.crop((left, top, left + side, top + side))
    return crop.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)


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

"""From pictures to samples you can look at, on a laptop and offline; `make demo` runs this.

    python examples/demo.py --out runs/demo [--photos FOLDER] [--encoder NAME [--weights FILE]]

Each step is one command of the toolkit, printed before it runs. First it builds the teacher hierarchies of photographs
that scikit-image ships, as a page. Then it trains a small network on the 1,797 handwritten digits inside scikit-learn,
because anyone sees at a glance whether a generated digit is the one that was asked for. With --photos the network is
trained on your own photographs instead.

With --encoder, for example dinov2-small or dinov2-small@9, everything is made from photographs by that encoder: yours,
or else crops of ten photographs that scikit-image and scikit-learn ship. Only `dct` features can be turned back into
pixels by themselves, so a small decoder is trained first, on the same photographs. It knows no others, and it is small:
expect blurred pictures with the colours and the layout of a photograph, not its details. Both trainings see a fixed
number of images, together about 12 minutes of one core's work; encoding takes about 0.2 seconds a photograph.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image, ImageOps
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
"""Photographs of scikit-image: class and file."""
MORE_PHOTOGRAPHS = {"flower": "flower.jpg", "pagoda": "china.jpg"}
"""Photographs of scikit-learn."""
CROPS_PER_CLASS = 3
CROPS_FOR_DECODER = 48
"""Crops of each photograph where a decoder is trained on them, every second one mirrored."""
SIDE_PX = 256
MARGIN_PX = 16
PAPER, INK = np.array([250.0, 244.0, 230.0]), np.array([24.0, 52.0, 110.0])
"""sRGB colours in which the digits are drawn."""
HELD_OUT = 10
"""Every tenth digit is kept from the network and judges it."""
DEMO_IMAGES = 16_000
"""Photographs seen in the training of the network."""
DIGIT_IMAGES = 40_000
"""Digits seen instead: about 4 minutes on 2 cores."""
DIGIT_SETTINGS = ("model.patch_size=4", "model.start_share=0.65", "batch_size=32")
"""A pixel of a digit covers about 2×2 tokens, so the network can join 4×4 of them, which is faster."""
TEMPERATURE = ("--temperature", "0.8")
"""A network of minutes leaves specks, fewer where less noise goes in; docs/results.md has figures with all of it."""
DECODER_IMAGES = 6_400
"""Photographs seen in the training of the decoder; most are seen many times."""
JUDGES = 8
"""One of so many photographs is kept from the decoder and judges it."""
OWN_DECODER = "dct"
"""The encoder whose features are turned into pixels without a trained decoder."""
EXPECT = """
What to expect: the decoder is small and was trained for minutes, on {images} of these photographs. It draws colours and
layout, blurred, no details. In the report, compare each photograph under "Teacher hierarchies" with the picture that is
decoded from its own tokens: no sample can look better. Sharp pictures need a large decoder and a million photographs.
"""
console = Console(stderr=True)


def main(
    out: Annotated[Path, typer.Option(help="Folder of everything the demo makes.")] = Path("runs/demo"),
    photos: Annotated[
        Path | None, typer.Option(help="Train on your own photographs: one folder per class.")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="Encoder of photographs, for example dinov2-small or dinov2-small@9.")
    ] = OWN_DECODER,
    weights: Annotated[
        str | None, typer.Option(help="Weight file of the encoder; without it those of the hub.")
    ] = None,
    total_images: Annotated[int | None, typer.Option(help="Images seen in training.")] = None,
    decoder_images: Annotated[
        int, typer.Option(help="Images seen in the training of a decoder.")
    ] = DECODER_IMAGES,
) -> None:
    """Pictures → teacher hierarchies → shards → a trained model → samples → one page."""
    build, run, samples = out / "build", out / "run", out / "samples"
    rows: list[dict[str, Any]] = []
    pages: dict[str, Path] = {}
    photographs = shipped("skimage", "data", PHOTOGRAPHS)
    if photos is None and encoder == OWN_DECODER:
        total_images = total_images or DIGIT_IMAGES
        cut_photographs(out / "photos", photographs, CROPS_PER_CLASS)
        hierarchies, shards = out / "photographs", build / "train"
        built(out / "photos", hierarchies)
        draw_digits(out / "digits")
        for split in ("train", "val"):
            rows += built(out / "digits" / split, build / split, "--split", split)
    else:
        if photos is None:
            photos = out / "crops"
            photographs |= shipped("sklearn", "datasets/images", MORE_PHOTOGRAPHS)
            cut_photographs(photos, photographs, CROPS_FOR_DECODER, mirrored=True)
        hierarchies = shards = build
        rows += built(photos, build, *encoder_words(encoder, weights, photos))
    if photos is None or encoder != OWN_DECODER:
        pages["teacher hierarchies of photographs"] = page = out / "photographs.html"
        command("hierarchy-builder", "report", hierarchies, "--out", page)
    facts = json.loads((shards / "shards" / "index.json").read_text())
    if facts["encoder"]["decoder"] is None:
        total_images = total_images or DEMO_IMAGES
        decoder, seconds = timed(*decoder_words(shards, run, facts, decoder_images))
        rows.append(stage("train-decoder", decoder["images_seen"], seconds, run / "decoder"))
        pages["photographs above, decoded from their features below"] = run / "decoder" / "samples"
    words: tuple[object, ...] = () if total_images is None else ("--total-images", total_images)
    if shards != build:
        words += tuple(word for setting in DIGIT_SETTINGS for word in ("--set", setting))
    training, seconds = timed(
        "trainer", "train", shards, "--out", run, "--preset", "tiny-cpu", *words, "--json"
    )
    rows.append(stage("train", training["images_seen"], seconds, run))
    labels = list(json.loads((shards / "class_map.json").read_text()))[:10]
    drawn, seconds = timed(
        "trainer", "sample", run, "--labels", ",".join(labels), "--seeds", "0-3", "--out", samples,
        *TEMPERATURE, "--json",
    )  # fmt: skip
    rows.append(stage("sample", len(drawn), seconds, samples))
    command("trainer", "evaluate", run, "--shards", build, *TEMPERATURE, "--json")
    (out / "stages.json").write_text(json.dumps(rows, indent=2))
    pages["samples of the network"] = report = out / "report.html"
    command(
        "trainer", "report", run, "--shards", shards, "--seeds", "0-2",
        "--stages", out / "stages.json", "--out", report, *TEMPERATURE,
    )  # fmt: skip
    show(rows)
    if "train-decoder" in {row["stage"] for row in rows}:
        console.print(
            EXPECT.format(images=facts["shardlist"][0]["nsamples"]).rstrip(), highlight=False, soft_wrap=True
        )
    for what, page in pages.items():
        console.print(f"\n{what}: open {page}", highlight=False, soft_wrap=True)


def built(images: Path, folder: Path, *words: Any) -> list[dict[str, Any]]:
    """Build the hierarchies and shards of a folder of images, and return the rows of the closing table."""
    encoder = () if "--encoder" in words else ("--encoder", OWN_DECODER)
    rows = command(
        "hierarchy-builder", "build", images, "--out", folder, *encoder, "--images", *words, "--json"
    )  # fmt: skip
    return [{name: value for name, value in row.items() if name != "notes"} for row in rows]


def encoder_words(encoder: str, weights: str | None, photos: Path) -> list[Any]:
    """Options of the build: the encoder, and a second shard with an eighth of the photographs, to judge a decoder."""
    words: list[Any] = ["--encoder", encoder, *(("--weights", weights) if weights else ())]
    count = sum(path.is_file() for path in photos.rglob("*"))
    judges = count // JUDGES if encoder != OWN_DECODER else 0
    return [*words, "--samples-per-shard", count - judges] if judges else words


def decoder_words(shards: Path, run: Path, facts: dict[str, Any], images: int) -> list[Any]:
    """The command that trains a small decoder for the run, at the size of the pictures that the encoder saw.

    facts: index.json of the shards; the last of several shards is kept from the decoder and judges it.
    """
    patch = facts["encoder"]["image_size_px"] // facts["grid"][0]
    held_out = int(len(facts["shardlist"]) > 1)
    settings = ("--set", f"patch_size={patch}", "--set", f"held_out_shards={held_out}")
    return [
        "trainer", "train-decoder", shards, "--out", run / "decoder", "--size", "tiny",
        "--total-images", images, *settings, "--json",
    ]  # fmt: skip


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


def cut_photographs(folder: Path, photographs: dict[str, Path], count: int, mirrored: bool = False) -> None:
    """Cut `count` seeded crops out of each photograph into an ImageFolder tree; done once.

    mirrored: whether every second crop is mirrored.
    """
    for seed, (name, source) in enumerate(sorted(photographs.items())):
        target = folder / name
        if target.is_dir() and len(list(target.iterdir())) == count:
            continue
        target.mkdir(parents=True, exist_ok=True)
        photograph = Image.open(source).convert("RGB")
        random = np.random.default_rng(seed)
        for number in range(count):
            crop = crop_once(photograph, random)
            crop = ImageOps.mirror(crop) if mirrored and number % 2 else crop
            crop.save(target / f"{number:03d}.jpg", quality=95)


def shipped(package: str, folder: str, files: dict[str, str]) -> dict[str, Path]:
    """Name and path of photographs that a package ships."""
    root = Path(str(importlib.import_module(package).__file__)).parent / folder
    return {name: root / file for name, file in files.items()}


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

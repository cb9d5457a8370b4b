"""Decoders of JPEG that could stand in for Pillow: processor time on a CPU, and how far their pixels differ.

    pip install nvidia-nvimgcodec-cu13 nvidia-dali-cuda130          what is missing is left out
    python -m benchmarks.builder.jpeg_decoders IMAGES --record

IMAGES: a folder of JPEGs, of which some are taken; besides them, drawn photographs of ImageNet's size. Each decoder
has one thread, and its shortest time of several rounds counts. Both libraries have a back end for CPUs, which is
compared here; that of a GPU is a section of benchmarks/gpu.py.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import records
from benchmarks.gpu import draw_photos
from hierarchy_builder.images.decoding import decode_image

ROUNDS = 5
DecodeAll = Callable[[list[bytes]], list[np.ndarray]]


def pillow(data: list[bytes]) -> list[np.ndarray]:
    """As a build decodes: upright, and with all checks."""
    return [np.asarray(decode_image(each)[0]) for each in data]


def nvimgcodec(options: str = "") -> DecodeAll:
    """nvImageCodec without a GPU. options: of the decoder."""
    from nvidia import nvimgcodec as codec

    ends = [codec.Backend(codec.CPU_ONLY)]
    place = codec.NVIMGCODEC_DEVICE_CPU_ONLY
    decoder = codec.Decoder(device_id=place, max_num_cpu_threads=1, backends=ends, options=options)
    wanted = codec.DecodeParams(color_spec=codec.ColorSpec.SRGB)
    return lambda data: [
        np.asarray(decoder.decode(codec.CodeStream(each), params=wanted).cpu()) for each in data
    ]


def dali() -> DecodeAll:
    """DALI without a GPU, one image at a time."""
    from nvidia.dali import fn, pipeline_def

    def decode(data: list[bytes]) -> list[np.ndarray]:
        images = [np.frombuffer(each, np.uint8) for each in data]

        @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        def pipeline() -> Any:
            source = fn.external_source(source=([each] for each in images))
            return fn.decoders.image(source, device="cpu", jpeg_fancy_upsampling=True)

        running = pipeline()
        return [np.array(running.run()[0].at(0)) for _ in images]

    return decode


DECODERS: dict[str, Callable[[], DecodeAll]] = {
    "Pillow, as a build": lambda: pillow,
    "nvImageCodec": nvimgcodec,
    "nvImageCodec, plain upsampling": lambda: nvimgcodec(":fancy_upsampling=0"),
    "DALI": dali,
}


def main() -> None:
    options = make_parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        draw_photos(Path(scratch), 64)
        sets = {"drawn, 500×375": sorted(Path(scratch).glob("*/*.jpg"))}
        found = sorted(options.images.rglob("*.jpg"))
        sets["photographs"] = found[:: max(1, len(found) // options.count)][: options.count]
        pictures = {name: [path.read_bytes() for path in paths] for name, paths in sets.items()}
    rows, figures = [], {}
    for name, data in pictures.items():
        expected = pillow(data)
        for decoder, load in DECODERS.items():
            try:
                decode = load()
            except ImportError as error:
                print(f"{decoder} is left out: {error}")
                continue
            spent = []
            for _ in range(ROUNDS):
                began = time.process_time()
                images = decode(data)
                spent.append(1e3 * (time.process_time() - began) / len(data))
            apart = [abs(a.astype(np.int16) - b).ravel() for a, b in zip(images, expected, strict=True)]
            equal, values = sum(not each.any() for each in apart), np.concatenate(apart)
            row = [f"{name}: {decoder}", f"{min(spent):.2f} ms", f"{equal} of {len(data)}"]
            rows.append([*row, f"{values.mean():.2f}", str(values.max())])
            print("  ".join(rows[-1]))
            figures[rows[-1][0]] = {"ms": min(spent), "equal": equal, "mean": float(values.mean())}
    columns = [
        "pictures: decoder",
        "processor time of one",
        "equal to Pillow's",
        "mean difference of a value",
        "most",
    ]
    records.write(options.record, columns=columns, rows=rows, figures=figures)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, metavar="IMAGES", help="Folder of JPEGs.")
    parser.add_argument("--count", type=int, default=200, help="Photographs that are taken.")
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()

"""Writers of sampled trajectories: sheets, pages, tars and arrays. Only a few trajectories are in memory at a time.

    N trajectories, L levels, H×W grid of tokens, C channels, h×w pixels

The writer of a format is a context: it takes one trajectory after the other, finishes its last file where all came,
and removes what is unfinished where the context ends by an error. Many trajectories are spread over several sheets,
pages or tars.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from hierarchy_builder.canvases.colours import Palette
from hierarchy_builder.canvases.gallery import write_page
from hierarchy_builder.errors import UsageError
from hierarchy_builder.files.whole import target_of, whole_file
from hierarchy_builder.records import CANVASES_MEMBER, LABEL_MEMBER, METADATA_MEMBER
from trainer.trajectories.trajectory import Trajectory
from trainer.trajectories.view import TrajectoryView, page_palette, trajectories_page, trajectory_grid_png

PER_SHEET = 64
"""Trajectories on one sheet or page."""
PER_TAR = 1000
TITLE = "Generated trajectories"


class Drawn:
    """A trajectory and its pictures, which are decoded once and only if a file shows them.

    number: of the trajectories before it.
    """

    def __init__(self, trajectory: Trajectory, number: int) -> None:
        self.trajectory, self.number = trajectory, number
        self.label, self.seed = trajectory.label, trajectory.seeds[-1]
        self.name = f"label{self.label:04d}-seed{self.seed:06d}"

    @cached_property
    def view(self) -> TrajectoryView:
        """All levels with their pictures."""
        return self.trajectory.view()

    @cached_property
    def picture(self) -> np.ndarray | None:
        """The last level, uint8 [h, w, 3]; None without a decoder."""
        if "view" in self.__dict__ or not self.trajectory.can_decode:
            decoded = self.view.decoded
            return None if decoded is None else decoded[-1]
        return self.trajectory.decode(level=len(self.trajectory.levels) - 1)

    def file(self, out: Path) -> Path:
        """Where the whole trajectory is written, with the format `safetensors`."""
        return out / "trajectories" / f"{self.name}.safetensors"


Add = Callable[[Drawn], None]
"""Takes one trajectory."""
Views = Sequence[TrajectoryView]
Facts = Mapping[str, Any]


@contextmanager
def _trajectories(out: Path, count: int, facts: Facts) -> Iterator[Add]:
    """`trajectories/label0207-seed000003.safetensors`: whole trajectories, which can be edited and resumed."""
    yield lambda drawn: drawn.trajectory.save(drawn.file(out))


@contextmanager
def _sheets(
    stem: str,
    suffix: str,
    write: Callable[[Path, Views, Palette | None, Facts], None],
    out: Path,
    count: int,
    facts: Facts,
) -> Iterator[Add]:
    """Files of up to PER_SHEET trajectories each; all share one palette."""
    views: list[TrajectoryView] = []
    palette: Palette | None = None
    written = 0

    def end() -> None:
        nonlocal palette, written
        number = f"-{written:04d}" if count > PER_SHEET else ""
        palette = palette or page_palette(views)
        write(out / f"{stem}{number}{suffix}", views, palette, facts)
        written += 1
        views.clear()

    def add(drawn: Drawn) -> None:
        views.append(drawn.view)
        if len(views) == PER_SHEET:
            end()

    yield add
    if views:
        end()


def _write_png(path: Path, views: Views, palette: Palette | None, facts: Facts) -> None:
    """Rows are trajectories, columns are levels."""
    with whole_file(path) as partial_file:
        trajectory_grid_png(views, palette).save(partial_file, "PNG")


def _write_html(path: Path, views: Views, palette: Palette | None, facts: Facts) -> None:
    """A self-contained page."""
    page = trajectories_page(title=TITLE, facts=facts, trajectories=views, palette=palette)
    write_page(page, target_of(path))


@contextmanager
def _tars(out: Path, count: int, facts: Facts) -> Iterator[Add]:
    """`samples-000000.tar` for webdataset: `canvases.npy` float16 [L, H, W, C], `cls`, `json`; `png` of level L−1."""
    writer: Any = None
    with ExitStack() as opened:

        def add(drawn: Drawn) -> None:
            nonlocal writer
            if drawn.number % PER_TAR == 0:
                opened.close()
                place = whole_file(out / f"samples-{drawn.number // PER_TAR:06d}.tar")
                options = {"encoder": False, "mtime": 0, "user": "", "group": "", "mode": 0o444}
                writer = opened.enter_context(
                    webdataset.TarWriter(str(opened.enter_context(place)), **options)
                )
            writer.write({"__key__": drawn.name, **_members(drawn)})

        yield add


@contextmanager
def _arrays(out: Path, count: int, facts: Facts) -> Iterator[Add]:
    """`samples.npz`: `levels` float32 [N, L, H, W, C], `label` and `seed` int64 [N], `pictures` uint8 [N, h, w, 3]."""
    arrays: dict[str, np.memmap] = {}
    with tempfile.TemporaryDirectory(prefix="samples.tmp-", dir=out, ignore_cleanup_errors=True) as folder:

        def add(drawn: Drawn) -> None:
            values = {
                "levels": drawn.trajectory.levels.numpy(),
                "label": np.asarray(drawn.label),
                "seed": np.asarray(drawn.seed),
            }
            if drawn.picture is not None:
                values["pictures"] = drawn.picture
            for name, value in values.items():
                if name not in arrays:
                    path = Path(folder) / f"{name}.npy"
                    array = np.lib.format.open_memmap(path, "w+", value.dtype, (count, *value.shape))
                    reserve(path)
                    arrays[name] = array
                arrays[name][drawn.number] = value

        yield add
        _pack(arrays, out / "samples.npz")


def _pack(arrays: Mapping[str, np.memmap], path: Path) -> None:
    with whole_file(path) as partial_file, zipfile.ZipFile(partial_file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in sorted(arrays.items()):
            array.flush()
            # A member without the time of its file, so that equal samples are equal bytes.
            with (
                open(str(array.filename), "rb") as source,
                archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member,
            ):
                shutil.copyfileobj(source, member)


def reserve(path: Path) -> None:
    """Take the room on the disk for a file that is mapped into memory, or raise OSError.

    Without it the file has holes, and where the disk is full a write into one ends the process by SIGBUS.
    """
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


FORMATS: dict[str, Callable[[Path, int, Facts], AbstractContextManager[Add]]] = {
    "png": partial(_sheets, "grid", ".png", _write_png),
    "html": partial(_sheets, "index", ".html", _write_html),
    "safetensors": _trajectories,
    "webdataset": _tars,
    "npz": _arrays,
}
"""(folder, number of trajectories to come, facts for pages) → the context of a writer."""


def parse_formats(text: str) -> list[str]:
    """Split names of formats at commas. Raises UsageError listing the known formats."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in FORMATS]:
        raise UsageError(f"unknown format {unknown[0]!r}, expected one or more of {', '.join(FORMATS)}")
    return names


def write_samples(
    trajectories: Iterable[Trajectory], out: Path, formats: Sequence[str], count: int, facts: Facts
) -> Iterator[dict[str, Any]]:
    """Write trajectories to `out` in every format as they come, and yield a row about each.

    count: number of trajectories to come. facts: name → value, shown on pages. A row has label, class, seed and, with
    the format `safetensors`, the file. After a failure, unfinished files are removed.
    """
    adds: list[Add] = []
    is_whole = False

    def end(writer: AbstractContextManager[Add], *failure: Any) -> None:
        """End a writer, which finishes its files also where another one failed to finish its own."""
        writer.__exit__(*((None,) * 3 if is_whole else failure))

    with ExitStack() as ends:
        for number, trajectory in enumerate(trajectories):
            if not adds:  # no folder is made before the first trajectory is drawn
                out.mkdir(parents=True, exist_ok=True)
                for name in formats:
                    writer = FORMATS[name](out, count, facts)
                    adds.append(writer.__enter__())
                    ends.push(partial(end, writer))
            drawn = Drawn(trajectory, number)
            for add in adds:
                add(drawn)
            row = {"label": drawn.label, "class": trajectory.class_name, "seed": drawn.seed}
            if "safetensors" in formats:
                row["file"] = str(drawn.file(out))
            yield row
        is_whole = True


def _members(drawn: Drawn) -> dict[str, bytes]:
    trajectory = drawn.trajectory
    about = {
        "seeds": trajectory.seeds,
        "class_name": trajectory.class_name,
        **asdict(trajectory.sampling),
    }
    canvases = io.BytesIO()
    np.lib.format.write_array(canvases, trajectory.levels.numpy().astype(np.float16), allow_pickle=False)
    members = {
        CANVASES_MEMBER: canvases.getvalue(),
        LABEL_MEMBER: str(drawn.label).encode(),
        METADATA_MEMBER: json.dumps(about, ensure_ascii=False).encode(),
    }
    if drawn.picture is not None:
        picture = io.BytesIO()
        Image.fromarray(drawn.picture).save(picture, "PNG")
        members["png"] = picture.getvalue()
    return members

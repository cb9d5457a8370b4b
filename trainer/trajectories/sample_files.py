"""Writers of sampled trajectories: sheets, pages, tars and arrays. Only a few trajectories are in memory at a time.

    N trajectories, L levels, H×W grid of tokens, C channels, h×w pixels

A file gets its name when it is complete. Many trajectories are spread over several sheets, pages or tars.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from hierarchy_builder.canvases.colours import Palette
from hierarchy_builder.canvases.gallery import write_page
from hierarchy_builder.errors import UsageError
from hierarchy_builder.files import partial_name, sync, target_of, whole_file
from hierarchy_builder.records import CANVASES_MEMBER, LABEL_MEMBER, METADATA_MEMBER
from trainer.trajectories.trajectory import Trajectory
from trainer.trajectories.view import TrajectoryView, page_palette, trajectories_page, trajectory_grid_png

PER_SHEET = 64
"""Trajectories on one sheet or page."""
PER_TAR = 1000
TITLE = "Generated trajectories"


class Drawn:
    """A trajectory and its pictures, which are decoded once and only if a file shows them."""

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory
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

    def row(self) -> dict[str, Any]:
        """Return label, class and seed as plain data."""
        return {"label": self.label, "class": self.trajectory.class_name, "seed": self.seed}


class SampleFiles(ABC):
    """Files of one format in a folder: `add` takes each trajectory, `end` finishes the last file."""

    def __init__(self, out: Path, count: int, facts: Mapping[str, Any]) -> None:
        """count: number of trajectories to come. facts: name → value, shown on pages."""
        self.out, self.count, self.facts = out, count, facts
        self.files: list[Path] = []

    @abstractmethod
    def add(self, drawn: Drawn) -> None:
        """Take one trajectory."""

    @abstractmethod
    def end(self, is_whole: bool) -> None:
        """Finish the open file, or remove it if not all trajectories came."""


class TrajectoryFiles(SampleFiles):
    """`trajectories/label0207-seed000003.safetensors`: a whole trajectory, which can be edited and resumed."""

    def add(self, drawn: Drawn) -> None:
        path = self.out / "trajectories" / f"{drawn.name}.safetensors"
        drawn.trajectory.save(path)
        self.files.append(path)

    def end(self, is_whole: bool) -> None:
        """Do nothing: each file holds one trajectory."""


class Sheets(SampleFiles, ABC):
    """Files of up to PER_SHEET trajectories each; all share one palette."""

    stem: str
    suffix: str

    def __init__(self, out: Path, count: int, facts: Mapping[str, Any]) -> None:
        super().__init__(out, count, facts)
        self._views: list[TrajectoryView] = []
        self._palette: Palette | None = None

    def add(self, drawn: Drawn) -> None:
        self._views.append(drawn.view)
        if len(self._views) == PER_SHEET:
            self.end(is_whole=True)

    def end(self, is_whole: bool) -> None:
        if not (self._views and is_whole):
            return
        number = f"-{len(self.files):04d}" if self.count > PER_SHEET else ""
        path = self.out / f"{self.stem}{number}{self.suffix}"
        self._palette = self._palette or page_palette(self._views)
        self._write(path, self._views, self._palette)
        self.files.append(path)
        self._views = []

    @abstractmethod
    def _write(self, path: Path, views: Sequence[TrajectoryView], palette: Palette | None) -> None: ...


class PngSheets(Sheets):
    """`grid.png`: rows are trajectories, columns are levels."""

    stem, suffix = "grid", ".png"

    def _write(self, path: Path, views: Sequence[TrajectoryView], palette: Palette | None) -> None:
        with whole_file(path) as partial:
            trajectory_grid_png(views, palette).save(partial, "PNG")


class HtmlPages(Sheets):
    """`index.html`: a self-contained page."""

    stem, suffix = "index", ".html"

    def _write(self, path: Path, views: Sequence[TrajectoryView], palette: Palette | None) -> None:
        write_page(
            trajectories_page(title=TITLE, facts=self.facts, trajectories=views, palette=palette),
            target_of(path),
        )


class Tars(SampleFiles):
    """`samples-000000.tar` for webdataset: `canvases.npy` float16 [L, H, W, C], `cls`, `json`; `png` of level L−1."""

    def __init__(self, out: Path, count: int, facts: Mapping[str, Any]) -> None:
        super().__init__(out, count, facts)
        self._writer: webdataset.TarWriter | None = None
        self._written = 0

    def add(self, drawn: Drawn) -> None:
        if self._writer is None:
            partial = str(partial_name(self._path()))
            self._writer = webdataset.TarWriter(
                partial, encoder=False, mtime=0, user="", group="", mode=0o444
            )
        self._writer.write({"__key__": drawn.name, **_members(drawn)})
        self._written += 1
        if self._written % PER_TAR == 0:
            self.end(is_whole=True)

    def end(self, is_whole: bool) -> None:
        if self._writer is None:
            return
        writer, self._writer, path = self._writer, None, self._path()
        partial = partial_name(path)
        try:
            writer.close()
            if is_whole:
                sync(partial)
                partial.replace(path)
                self.files.append(path)
        finally:
            partial.unlink(missing_ok=True)

    def _path(self) -> Path:
        return target_of(self.out / f"samples-{len(self.files):06d}.tar")


def reserve(path: Path) -> None:
    """Take the room on the disk for a file that is mapped into memory, or raise OSError.

    Without it the file has holes, and where the disk is full a write into one ends the process by SIGBUS.
    """
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


class Arrays(SampleFiles):
    """`samples.npz`: `levels` float32 [N, L, H, W, C], `label` and `seed` int64 [N], `pictures` uint8 [N, h, w, 3]."""

    def __init__(self, out: Path, count: int, facts: Mapping[str, Any]) -> None:
        super().__init__(out, count, facts)
        self._folder: Path | None = None
        self._arrays: dict[str, np.memmap] = {}
        self._filled = 0

    def add(self, drawn: Drawn) -> None:
        values = {
            "levels": drawn.trajectory.levels.numpy(),
            "label": np.asarray(drawn.label),
            "seed": np.asarray(drawn.seed),
        }
        if drawn.picture is not None:
            values["pictures"] = drawn.picture
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="samples.tmp-", dir=self.out))
            for name, value in values.items():
                path = self._folder / f"{name}.npy"
                array = np.lib.format.open_memmap(path, "w+", value.dtype, (self.count, *value.shape))
                reserve(path)
                self._arrays[name] = array
        for name, value in values.items():
            self._arrays[name][self._filled] = value
        self._filled += 1

    def end(self, is_whole: bool) -> None:
        try:
            if is_whole:
                self._pack()
        finally:
            self._arrays = {}
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _pack(self) -> None:
        path = self.out / "samples.npz"
        with (
            whole_file(path) as partial,
            zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
        ):
            for name, array in sorted(self._arrays.items()):
                array.flush()
                # A member without the time of its file, so that equal samples are equal bytes.
                with (
                    open(str(array.filename), "rb") as source,
                    archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member,
                ):
                    shutil.copyfileobj(source, member)
        self.files.append(path)


FORMATS: dict[str, Callable[[Path, int, Mapping[str, Any]], SampleFiles]] = {
    "png": PngSheets,
    "html": HtmlPages,
    "safetensors": TrajectoryFiles,
    "webdataset": Tars,
    "npz": Arrays,
}


def parse_formats(text: str) -> list[str]:
    """Split names of formats at commas. Raises UsageError listing the known formats."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in FORMATS]:
        raise UsageError(f"unknown format {unknown[0]!r}, expected one or more of {', '.join(FORMATS)}")
    return names


def write_samples(
    trajectories: Iterable[Trajectory],
    out: Path,
    formats: Sequence[str],
    count: int,
    facts: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Write trajectories to `out` in every format as they come, and yield a row about each.

    count: number of trajectories to come. facts: name → value, shown on pages. A row has label, class, seed and, with
    the format `safetensors`, the file. After a failure, unfinished files are removed.
    """
    sinks: list[SampleFiles] = []
    is_whole = False

    def end(sink: SampleFiles) -> None:
        sink.end(is_whole)

    with ExitStack() as ends:  # every writer is ended, even if ending another one fails
        for trajectory in trajectories:
            if not sinks:  # no folder is made before the first trajectory is drawn
                out.mkdir(parents=True, exist_ok=True)
                sinks = [FORMATS[name](out, count, facts) for name in formats]
                for sink in sinks:
                    ends.callback(end, sink)
            drawn = Drawn(trajectory)
            row = drawn.row()
            for sink in sinks:
                sink.add(drawn)
                if isinstance(sink, TrajectoryFiles):
                    row["file"] = str(sink.files[-1])
            yield row
        is_whole = True


def _members(drawn: Drawn) -> dict[str, bytes]:
    trajectory = drawn.trajectory
    about = {
        "seeds": trajectory.seeds,
        "class_name": trajectory.class_name,
        "num_steps": trajectory.num_steps,
        "guidance": trajectory.guidance,
        "weak_scale": trajectory.weak_scale,
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

"""Processes that only encode, fed by workers that read and write: the same bytes, whoever is killed."""

import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from tiny_builds import PLAN, digests, session

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.workers import Workers, _num_encoding, shutdown
from hierarchy_builder.encoders.dct import DctEncoder
from hierarchy_builder.encoders.encoding import ImageEncoder
from hierarchy_builder.errors import UsageError
from hierarchy_builder.images.sources import FileReader, open_source
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.folder import BuildFolder

KILLS = "KILLS_OF_TEST"
"""Environment variable: the folder in which each kill is noted, so that it happens once."""


class Deadly(DctEncoder):
    """Kills a worker that reads, then the process that encodes."""

    def encode(self, images: np.ndarray) -> np.ndarray:
        if len(images) > 1:
            for victim in ("reader", "encoder"):
                if not (Path(os.environ[KILLS]) / victim).exists():
                    (Path(os.environ[KILLS]) / victim).touch()
                    os.kill(os.getpid() if victim == "encoder" else self.reader(), signal.SIGKILL)
                    break
        return super().encode(images)

    @staticmethod
    def reader() -> int:
        """A worker of the same Ray."""
        for each in filter(str.isdecimal, os.listdir("/proc")):
            process = Path("/proc") / each
            is_worker = (process / "cmdline").read_bytes().startswith(b"ray::_Worker")
            if is_worker and f"PPid:\t{os.getppid()}\n" in (process / "status").read_text():
                return int(each)
        raise AssertionError("no worker")


@pytest.mark.drill
@pytest.mark.parametrize("fused", [False, True])
def test_killed_readers_and_encoders_lose_nothing(
    tiny_build, tiny_photos, tmp_path, monkeypatch, *, fused: bool
) -> None:
    monkeypatch.setenv(KILLS, str(tmp_path / "kills"))
    places = [str(Path(__file__).parent), *sys.path]  # the encoder imports what this module does
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))
    (tmp_path / "kills").mkdir()
    folder, config = BuildFolder(tmp_path / "build"), replace(PLAN.extract, encoder=f"{__name__}:Deadly")
    apart = steps.Session(workers=Workers(count=2, encoding=1), reporter=Reporter(quiet=True))
    try:
        if fused:  # workers on CPUs cluster and write as well
            plan = replace(PLAN, extract=config, vocabulary=None)
            steps.build(folder, str(tiny_photos), plan, apart, fused=True)
        else:
            steps.extract(folder, str(tiny_photos), config, apart)
    finally:
        shutdown()
    assert {path.name for path in (tmp_path / "kills").iterdir()} == {"reader", "encoder"}
    if fused:
        here, plan = BuildFolder(tmp_path / "here"), replace(PLAN, vocabulary=None)
        steps.build(here, str(tiny_photos), plan, session(), fused=True)
        assert digests(folder.shards, "*.tar") == digests(here.shards, "*.tar") != {}
        return
    expected = digests(tiny_build.features)
    for name in ("features", "status", "block_count", "block_mean", "block_m2"):
        expected_of = {path: digest for path, digest in expected.items() if path.startswith(f"{name}/")}
        assert {
            f"{name}/{path}": each for path, each in digests(folder.features / name).items()
        } == expected_of


class Slow(DctEncoder):
    """Counts how many images were read and not encoded yet."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.encoded, self.most = 0, 0, 0

    def encode(self, images: np.ndarray) -> np.ndarray:
        self.most = max(self.most, self.read - self.encoded)
        self.encoded += len(images)
        return super().encode(images)


def test_a_worker_reads_a_bounded_number_of_images_ahead_of_the_encoder(tiny_photos) -> None:
    encoder, source = Slow(), open_source(str(tiny_photos))

    class Counting(FileReader):
        def read(self, path: str) -> bytes:
            encoder.read += 1
            return super().read(path)

    reader = Counting(source.reader.fs, source.reader.root)
    images = ImageEncoder(encoder, reader, batch_size=1, max_pixels=10**9)
    records = list(source.records)
    with ThreadPoolExecutor(1) as pool:
        assert sum(len(batch.rows) for batch in images.batches(records, [{} for _ in records], pool)) == 18
    assert (
        encoder.most <= 3 + 3
    )  # two batches and one image that are decoded, and two batches that wait or run


class OnDevice(DctEncoder):
    """Gives features only while another batch is on the device too; the fourth image of each batch is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.both = torch.device("cuda"), Barrier(2)

    def begin_half(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        def arrived() -> np.ndarray:
            self.both.wait(timeout=60)
            features[3] = np.nan
            return features

        features = DctEncoder().encode(images).astype(np.float16)
        return arrived


def test_a_device_has_the_next_batch_before_one_ends(tiny_photos) -> None:
    source = open_source(str(tiny_photos))
    records = [*source.records][:16]
    found = {}
    for encoder in (DctEncoder(), OnDevice()):
        images = ImageEncoder(encoder, source.reader, batch_size=4, max_pixels=10**9)
        with ThreadPoolExecutor(1) as pool:
            found[type(encoder)] = list(images.batches(records, [{} for _ in records], pool))
    for plain, batch in zip(*found.values(), strict=True):
        assert batch.rows == plain.rows
        assert batch.finite.tolist() == [True, True, True, False]
        np.testing.assert_array_equal(batch.features[:3], plain.features[:3])
        assert not batch.features[3].any()


@pytest.mark.parametrize(
    ("asked", "nodes", "expected"),
    [
        (None, [(16, 1), (32, 0)], 2),
        (None, [(16, 4), (32, 0)], 8),
        (None, [(16, 8), (16, 8)], 0),
        (None, [(16, 0), (16, 0)], 0),
        (None, [(16, 1), (0, 0)], 0),
        (0, [(16, 1), (32, 0)], 0),
        (3, [(16, 0)], 3),
    ],
)
def test_gpus_are_fed_from_other_nodes_where_there_are_any(asked, nodes, expected) -> None:
    assert _num_encoding(Workers(encoding=asked), nodes) == expected


def test_fewer_than_no_processes_are_refused() -> None:
    with pytest.raises(UsageError, match="--encoding-workers is -1, expected 0 or more"):
        Workers(encoding=-1)

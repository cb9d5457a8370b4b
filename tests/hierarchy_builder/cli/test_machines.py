"""Odd machines: no home, a full disk, long paths, output that is not UTF-8, one CPU."""

import errno
import io
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from command_line import cli
from pictures import write_tree

from hierarchy_builder import terminal
from hierarchy_builder.build import workers
from hierarchy_builder.build.publish import publish_to
from hierarchy_builder.errors import BuilderError, UsageError, explained
from hierarchy_builder.files.paths import a_place, filesystem_of
from hierarchy_builder.files.whole import whole_file
from hierarchy_builder.images.sources import open_source
from hierarchy_builder.machine import process
from hierarchy_builder.progress import Reporter
from trainer.data.shards import open_index
from trainer.studio.address import bypass_proxy, check_host
from trainer.trajectories.sample_files import reserve

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

# Paths


def test_home_is_expanded_once_for_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    write_tree(home / "photos", per_class=1)
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    words = ("extract", "~/photos", "--out=~/out", "--encoder", "dct", "--workers", "0", "--quiet")
    assert cli("hierarchy-builder", *words).code == 0
    assert (home / "out" / "features.zarr").is_dir()
    assert cli("hierarchy-builder", "status", "~/out", "--json").code == 0
    missing = cli("trainer", "train", "~/nothing", "--out", "~/run")
    assert missing.code != 0
    assert str(home / "nothing") in missing.err
    assert list(here.iterdir()) == []


def test_place_is_a_url_or_a_path_that_can_be_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    assert a_place("s3://bucket/~/x") == "s3://bucket/~/x"
    assert a_place("a/~/b") == "a/~/b"
    for text, message in (("", "is empty"), (" ", "is empty"), ("b\udcff", r"b\\xff is not UTF-8")):
        with pytest.raises(UsageError, match=message):
            a_place(text)
    with pytest.raises(UsageError, match="the home folder is not known"):
        a_place("~no-such-user/x")


def test_a_url_where_only_a_path_works_is_refused_and_makes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = cli("trainer", "sample", "run", "--labels", "0", "--out", "s3://bucket/samples")
    assert found.code == 2
    assert not (tmp_path / "s3:").exists()
    assert list(tmp_path.iterdir()) == []


def test_two_colons_in_a_path_are_no_chain(tmp_path: Path, shards: str) -> None:
    photos = write_tree(tmp_path / "a::b", per_class=1)
    assert len(open_source(str(photos)).records) == 3
    assert filesystem_of(str(photos))[1] == str(photos)
    (tmp_path / "c::d").symlink_to(shards)
    assert open_index(str(tmp_path / "c::d")).num_samples > 0


# Output


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        terminal.run(lambda: (_ for _ in ()).throw(UsageError("class ':b:' and [red]x[/red]")))
    Reporter().say("warning: :smile: [bold]")
    terminal.print_cells((":b:",), [("[red] :b:",)])
    printed = capsys.readouterr()
    assert "class ':b:' and [red]x[/red]" in printed.err
    assert ":smile: [bold]" in printed.err
    assert printed.out.count(":b:") == 2
    assert "[red] :b:" in printed.out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_that_is_not_utf8_ends_no_command(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    process.prepare()
    terminal.print_json({"name": "café 漢字"})
    sys.stdout.flush()
    assert json.loads(written.getvalue().decode(encoding)) == {"name": "café 漢字"}
    terminal.print_cells(("name", "value"), [("café 漢字", "–"), (os.fsdecode(b"\xff"), "…")])
    sys.stdout.flush()


# Home, caches, CPUs


def test_a_command_does_not_look_for_garbage_among_the_modules_it_loaded() -> None:
    code = (
        "import atexit, gc\n"
        "from hierarchy_builder.machine.process import prepare\n"
        "atexit.register(lambda: print(gc.get_threshold()[0] > 2_000, gc.get_count()[0] < gc.get_freeze_count()))\n"
        "prepare()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n", done.stderr


def test_user_without_home_gets_one_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "unset below")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(process, "home_folder", lambda: None)
    process.give_home()
    home = Path(os.environ["HOME"])
    assert home.is_dir()
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_compiled_code_gets_a_private_folder_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    process.place_numba_cache(tmp_path)
    assert os.environ["NUMBA_CACHE_DIR"] == "", "the sources can be written"
    monkeypatch.setattr(process, "_can_be_written", lambda folder: False)
    process.place_numba_cache(tmp_path)
    chosen = Path(os.environ["NUMBA_CACHE_DIR"])
    assert stat.S_IMODE(chosen.stat().st_mode) == 0o700
    process.place_numba_cache(tmp_path)
    assert os.environ["NUMBA_CACHE_DIR"] == str(chosen), "what is set is kept"


def test_every_folder_with_compiled_code_chooses_its_place_first() -> None:
    root = Path(process.__file__).parents[2]
    files = [path for package in ("hierarchy_builder", "trainer") for path in (root / package).rglob("*.py")]
    folders = {path.parent for path in files if "\nimport numba\n" in path.read_text(encoding="utf-8")}
    assert {folder.name for folder in folders} == {"hierarchy", "images"}
    for folder in folders:
        assert "\nplace_numba_cache(" in (folder / "__init__.py").read_text(encoding="utf-8"), folder


@pytest.mark.parametrize(
    ("files", "own", "granted"),
    [
        ({}, "0::/job", float("inf")),
        ({"cpu.max": "max 100000"}, "0::/", float("inf")),
        ({"cpu.max": "150000 100000"}, "0::/job", 1.5),  # a container, whose own group is the root
        ({"job/cpu.max": "400000 100000", "job/step/cpu.max": "max 100000"}, "0::/job/step", 4.0),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/x", 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/", float("inf")),
    ],
)
def test_limits_of_control_groups_are_read(
    files: dict[str, str], own: str, granted: float, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text(f"{own}\n")
    assert process.granted_cpus(tmp_path / "groups", tmp_path / "own") == granted
    assert process.granted_cpus(tmp_path / "groups", tmp_path / "none") in (granted, float("inf"))


def test_a_process_on_one_cpu_starts_no_second_worker() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert process.num_cpus() == 1
        assert not workers.saves_time(1000.0, 1000.0, 100)  # Ray would have one CPU, and so gain nothing
    finally:
        os.sched_setaffinity(0, before)


def test_cpus_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda number: {3})
    assert process.num_cpus() == 1
    for count, message in ((17, "expected at most 16"), (10**9, "1,000,000,000"), (-1, "0 or more")):
        with pytest.raises(UsageError, match=message):
            workers.Workers(count=count)
    assert workers.Workers(count=16).count == 16
    assert workers.Workers(count=500, address="auto").count == 500


def test_ray_gets_a_short_folder_for_its_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 20)))
    chosen = workers._private_session()
    assert len(chosen) <= process.MAX_SOCKET_FOLDER
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert (own := Path(workers._private_session()).parent).parent == Path("/tmp")
    assert own.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 20)))
    with pytest.raises(BuilderError, match="set RAY_TMPDIR to a folder with a shorter path"):
        workers._private_session()


# The network


def test_host_that_is_not_of_this_machine_is_refused() -> None:
    check_host("127.0.0.1")
    check_host("0.0.0.0")
    with pytest.raises(UsageError, match=r"--host 192\.0\.2\.1: .*expected an address of this machine"):
        check_host("192.0.2.1")


def test_studio_is_reached_without_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "example.org")
    bypass_proxy("10.1.2.3")
    assert os.environ["no_proxy"].split(",")[:3] == ["example.org", "10.1.2.3", "localhost"]


def test_store_that_cannot_be_reached_is_one_line(
    tiny_build: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    def refuse(*given: object, **options: object) -> None:
        raise RuntimeError("ConnectError: [Errno -2] Name or service not known\nmore")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "makedirs", refuse)
    with pytest.raises(BuilderError, match="Name or service not known; the same command goes on from here"):
        publish_to(tiny_build, "memory://nowhere", Reporter(quiet=True))


# A full disk


def test_error_of_a_write_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, whole_file(tmp_path / "x.json"):
        raise OSError(*FULL.args)
    expected = f"{tmp_path / 'x.json'}: No space left on device; make room, then give the same command again"
    assert explained(caught.value) == expected


def test_full_place_of_the_command_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer", "sample", "RUN", f"--out={tmp_path}/new"])
    real = os.statvfs

    def full_there(path: str) -> os.statvfs_result:
        values = list(real(path))
        values[4] = 0 if str(path).startswith(str(tmp_path)) else 10**9
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", full_there)
    assert explained(FULL).startswith(f"{tmp_path}/new: No space left on device; make room")


def test_room_for_mapped_arrays_is_taken_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.lib.format.open_memmap(path, "w+", np.float32, (1000, 1000)).flush()
    assert path.stat().st_blocks * 512 < 2_000_000, "the file has holes"
    reserve(path)
    assert path.stat().st_blocks * 512 >= 4_000_000


def test_thread_that_cannot_write_prints_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threading, "excepthook", process._report_thread)

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "RUN/tensorboard")

    thread = threading.Thread(target=fail, name="writer")
    thread.start()
    thread.join()
    printed = capsys.readouterr().err
    assert printed.startswith("warning: writer: RUN/tensorboard: No space left on device")
    assert "Traceback" not in printed

"""Inputs as people have them: nothing is lost without a word, and one bad file is one row."""

import io
import os
import tarfile
import threading
import unicodedata
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import NOISE, encoded

from hierarchy_builder.errors import BuilderError, ImageError, UsageError
from hierarchy_builder.images import reading
from hierarchy_builder.images.sources import ImageSource, open_reader, open_source

DATA = encoded(NOISE)


def tree(root: Path, *paths: str | bytes) -> Path:
    for path in paths:
        place = os.path.join(os.fsencode(root), os.fsencode(path))
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "wb") as file:
            file.write(DATA)
    return root


def said(source: ImageSource) -> str:
    return "\n".join(source.warnings)


def paths(source: ImageSource) -> list[str]:
    return [record.path for record in source.records]


# Folders


def test_names_that_are_not_utf8_are_left_out_and_named(tmp_path: Path) -> None:
    source = open_source(str(tree(tmp_path, "a/1.png", b"b\xff/2.png", b"c/3\xe9.png", "c/4.png")))
    assert paths(source) == ["a/1.png", "c/4.png"]
    assert source.class_map == {"a": 0, "c": 1}
    assert r"c/3\xe9.png" in said(source)
    assert r"b\xff/" in said(source)
    tree(tmp_path / "other", b"b\xff/2.png")
    with pytest.raises(BuilderError, match=r"not UTF-8: .*b\\xff/"):
        open_source(str(tmp_path / "other"))


def test_files_that_are_no_pictures_by_their_names_are_counted_and_named(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png", "a/2.svg", "a/3.svg", "b/4", "b/notes.txt", "b/5.png", "b/Thumbs.db")
    assert "left out: 2 files .svg, 1 file without extension, 1 file .txt, such as a/2.svg" in said(
        open_source(str(tmp_path))
    )
    tree(tmp_path / "other", "1.svg")
    with pytest.raises(BuilderError, match=r"1 other files: 1 file \.svg, such as 1\.svg"):
        open_source(str(tmp_path / "other"))


def test_missing_plugin_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hierarchy_builder.images.listings.missing_plugin",
        lambda suffix: "pillow-heif" if suffix == ".heic" else None,
    )
    monkeypatch.setattr("hierarchy_builder.images.listings.picture_suffixes", lambda: frozenset({".png"}))
    source = open_source(str(tree(tmp_path, "a/1.png", "a/2.HEIC")))
    assert "1 file .heic (to read them: pip install pillow-heif), such as a/2.HEIC" in said(source)


def test_system_folders_are_no_classes(tmp_path: Path) -> None:
    tree(tmp_path, "cat/1.png", "cat/@eaDir/1.png/SYNOPHOTO_THUMB.png", "$RECYCLE.BIN/2.png", "dog/3.png")
    for name in ("lost+found", "System Volume Information"):
        (tmp_path / name).mkdir(mode=0)
    source = open_source(str(tmp_path))
    assert source.class_map == {"cat": 0, "dog": 1}
    assert paths(source) == ["cat/1.png", "dog/3.png"]


def test_folder_above_the_classes_is_noticed(tmp_path: Path) -> None:
    tree(tmp_path, "objects/cat/1.png", "objects/dog/2.png")
    source = open_source(str(tmp_path))
    assert source.class_map == {"objects": 0}
    assert f"pass {tmp_path / 'objects'}" in said(source)
    assert open_source(str(tmp_path / "objects")).warnings == ()


def test_folder_of_one_class_is_noticed(tmp_path: Path) -> None:
    assert "pass the folder above it" in said(open_source(str(tree(tmp_path, "1.png", "2.png"))))


def test_numbers_in_the_order_of_text_are_noticed(tmp_path: Path) -> None:
    source = open_source(str(tree(tmp_path / "a", "1/1.png", "2/1.png", "10/1.png")))
    assert source.class_map == {"1": 0, "10": 1, "2": 2}
    assert "the id of a class is not its number" in said(source)
    assert said(open_source(str(tree(tmp_path / "b", "01/1.png", "02/1.png", "10/1.png")))) == ""


COMPOSED, APART = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("on_disk", "written"), [(APART, COMPOSED), (COMPOSED, APART)])
def test_accents_match_however_they_are_composed(tmp_path: Path, on_disk: str, written: str) -> None:
    tree(tmp_path, f"{on_disk}/1.png", f"{on_disk}/2.png")
    mapped = open_source(str(tmp_path), class_map={written: 4})
    assert {(record.class_name, record.label) for record in mapped.records} == {(written, 4)}
    assert [record.key for record in mapped.records] == ["cafe/1", "cafe/2"]
    (tmp_path / "list.csv").write_text(f"path,class\n{written}/1.png,x\n", encoding="utf-8")
    listed = open_source(str(tmp_path / "list.csv"))
    assert listed.records[0].num_bytes == len(DATA)
    assert listed.read(f"{written}/1.png") == DATA


def test_a_class_whose_accents_are_written_in_two_ways_is_one(tmp_path: Path) -> None:
    tree(tmp_path, f"{APART}/1.png", f"{COMPOSED}/2.png", "dog/3.png")
    rows = f"{APART}/1.png,{APART}\n{COMPOSED}/2.png,{COMPOSED}\ndog/3.png,dog\n"
    (tmp_path / "list.csv").write_text(f"path,class\n{rows}", encoding="utf-8")
    for place in (tmp_path, tmp_path / "list.csv"):
        source = open_source(str(place))
        assert source.class_map == {COMPOSED: 0, "dog": 1}
        assert [record.label for record in source.records] == [0, 0, 1]
        assert len({record.key for record in source.records}) == 3


# Tars


def tar(path: Path, members: dict[str, bytes | tuple[bytes, str]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def test_links_in_a_tar_are_the_files_they_lead_to(tmp_path: Path) -> None:
    members = {
        "a/1.png": DATA,
        "b/2.png": (tarfile.LNKTYPE, "a/1.png"),
        "b/3.png": (tarfile.SYMTYPE, "../b/2.png"),
        "b/4.png": (tarfile.SYMTYPE, "4.png"),
        "b/5.png": (tarfile.FIFOTYPE, ""),
    }
    source = open_source(str(tar(tmp_path / "links.tar", members)))
    assert paths(source) == ["a/1.png", "b/2.png", "b/3.png"]
    assert source.read("b/3.png") == open_reader(source.location).read("b/2.png") == DATA
    assert "2 members of the tar that are no files or lead to none in it: b/4.png, b/5.png" in said(source)


def test_tars_after_the_first_are_read_too(tmp_path: Path) -> None:
    first, second = tar(tmp_path / "1.tar", {"a/1.png": DATA}), tar(tmp_path / "2.tar", {"b/2.png": DATA})
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    source = open_source(str(joined))
    assert paths(source) == ["a/1.png", "b/2.png"]
    assert open_reader(source.location).read("b/2.png") == DATA
    joined.write_bytes(first.read_bytes() + b"something else" * 99)
    with pytest.raises(BuilderError, match="not a complete, uncompressed tar"):
        open_source(str(joined))


def test_labels_of_webdataset_samples_are_read(tmp_path: Path) -> None:
    members = {
        "0001.jpg": DATA,
        "0001.cls": b"7\n",
        "0001.json": b"{}",
        "0002.jpg": DATA,
        "0002.cls": b"2",
        "0003.jpg": DATA,
    }
    source = open_source(str(tar(tmp_path / "train.tar", members)))
    assert {record.path: record.label for record in source.records} == {"0001.jpg": 7, "0002.jpg": 2}
    assert "1 image without a member cls: 0003.jpg" in said(source)
    named = {"cat/1.jpg": DATA, "cat/1.cls": b"3", "dog/2.jpg": DATA, "dog/2.cls": b"1"}
    assert open_source(str(tar(tmp_path / "named.tar", named))).class_map == {"cat": 3, "dog": 1}
    words = {"1.jpg": DATA, "1.cls": b"cat", "2.jpg": DATA, "2.cls": b"ant"}
    assert open_source(str(tar(tmp_path / "words.tar", words))).class_map == {"ant": 0, "cat": 1}


# Tables


@pytest.mark.parametrize("column", ["file_name", "image", "filename"])
def test_other_names_of_the_column_of_paths_are_taken(tmp_path: Path, column: str) -> None:
    tree(tmp_path, "1.png")
    (tmp_path / "list.csv").write_text(f"{column},label\n1.png,ant\n")
    pq.write_table(pa.table({column: ["1.png"], "label": ["ant"], "x": [[1]]}), tmp_path / "list.parquet")
    for name in ("list.csv", "list.parquet"):
        source = open_source(str(tmp_path / name))
        assert (paths(source), source.class_map) == (["1.png"], {"ant": 0})
        assert f"the paths are those of the column {column!r}" in said(source)


def test_pictures_in_a_column_are_no_paths(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": DATA, "path": "1.png"}], "label": [1]})
    pq.write_table(table, tmp_path / "list.parquet")
    with pytest.raises(UsageError, match=r"no column 'path', found image .struct.*, label"):
        open_source(str(tmp_path / "list.parquet"))


@pytest.mark.parametrize("empty", ["", "nan", "NaN"])
def test_cells_without_a_class_are_refused(tmp_path: Path, empty: str) -> None:
    tree(tmp_path, "1.png", "2.png")
    table = tmp_path / "list.csv"
    table.write_text(f"path,class\n1.png,ant\n2.png,{empty}\n")
    with pytest.raises(UsageError, match=r"row 2 \(2\.png\) has class '.*', which is no class"):
        open_source(str(table))
    table.write_text(f"path,class\n1.png,{empty}\n2.png,{empty}\n")
    assert open_source(str(table)).class_map == {"unlabelled": 0}


# Reading


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that were asked for; none is made."""
    pauses: list[float] = []
    monkeypatch.setattr(reading.time, "sleep", pauses.append)
    return pauses


def reason_of(source: ImageSource, path: str) -> str:
    with pytest.raises(ImageError) as caught:
        source.read(path)
    return str(caught.value)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "endless.png").symlink_to("/dev/zero")
    (tmp_path / "a" / "folder.png").mkdir()
    source = open_source(str(tmp_path))
    assert paths(source) == ["a/1.png", "a/endless.png", "a/pipe.png"]
    assert reason_of(source, "a/pipe.png").startswith("not_a_file: found a named pipe")
    assert reason_of(source, "a/endless.png").startswith("not_a_file: found a device")
    assert reason_of(source, "a/folder.png").startswith("not_a_file: found a folder")


def test_huge_file_is_not_read_into_memory(tmp_path: Path) -> None:
    source = open_source(str(tree(tmp_path, "a/1.png")))
    with open(tmp_path / "a/1.png", "r+b") as file:
        file.truncate(30 * 2**30)
    assert reason_of(source, "a/1.png") == "too_large: more than 1,073,741,824 bytes"


def test_read_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, release = open_source(str(tree(tmp_path, "a/1.png"))), threading.Event()
    monkeypatch.setattr(reading, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(reading, "_local", lambda *given: release.wait(60) and DATA)
    assert reason_of(source, "a/1.png") == "timeout: reading it took more than 0.05 s"
    release.set()


def test_error_that_passes_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: list[float]
) -> None:
    source, read = open_source(str(tree(tmp_path, "a/1.png"))), reading._local
    errors = [OSError(5, "Input/output error"), OSError(5, "Input/output error")]

    def fail_twice(*given: object) -> bytes:
        if errors:
            raise errors.pop()
        return read(*given)

    monkeypatch.setattr(reading, "_local", fail_twice)
    assert source.read("a/1.png") == DATA
    assert at_once == [0.5, 2.0]
    errors += [OSError(5, "Input/output error")] * 3
    assert reason_of(source, "a/1.png") == "unreadable: Input/output error (3 tries)"
    errors.append(PermissionError(13, "Permission denied"))
    assert reason_of(source, "a/1.png") == "unreadable: Permission denied"


@pytest.fixture
def server() -> Iterator[str]:
    """A web server: /ok.png is a picture, /busy.png the second time, any other number is the answer."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, with_body: bool) -> None:
            name = self.path.strip("/").removesuffix(".png")
            seen = sum(1 for path in asked if path == self.path)
            if with_body:
                asked.append(self.path)
            status = int(name) if name.isdigit() else 429 if name == "busy" and seen == 0 else 200
            self.send_response(status)
            self.send_header("Content-Length", str(len(DATA)) if status == 200 else "0")
            self.end_headers()
            if with_body and status == 200:
                self.wfile.write(DATA)

        def log_message(self, *given: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_answer_of_a_web_server_is_the_outcome_of_one_row(
    tmp_path: Path, server: str, at_once: list[float]
) -> None:
    names = ("ok", "busy", "403", "404", "429")
    rows = "".join(f"{server}/{name}.png,x\n" for name in names)
    (tmp_path / "list.csv").write_text(f"path,class\n{rows}")
    source = open_source(str(tmp_path / "list.csv"))
    assert len(source.records) == 5
    assert source.read(f"{server}/ok.png") == DATA
    assert source.read(f"{server}/busy.png") == DATA
    at_once.clear()
    assert reason_of(source, f"{server}/403.png").startswith("unreadable: the server answers 403")
    assert reason_of(source, f"{server}/404.png").startswith("missing")
    assert at_once == []
    assert reason_of(source, f"{server}/429.png").startswith("unreadable: the server answers 429")
    assert at_once == [0.5, 2.0]

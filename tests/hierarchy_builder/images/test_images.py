"""Listing: every kind of source, and keys that are safe and unique."""

import base64
import gzip
import io
import json
import os
import re
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from pictures import NOISE, encoded

from hierarchy_builder.errors import BuilderError, ImageError, UsageError
from hierarchy_builder.images.keys import plain_key, unique_keys
from hierarchy_builder.images.listings import list_folder, list_table
from hierarchy_builder.images.sources import open_reader, open_source
from hierarchy_builder.images.table import ImageTable
from hierarchy_builder.store.index import read_index, write_index


def tree(root: Path, *paths: str) -> Path:
    """Files at `paths` below `root`, each a different 1-pixel picture."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encoded(np.full((1, 1, 3), number, np.uint8)))
    return root


def labels(source: str | Path, **options: object) -> dict[str, tuple[str, int]]:
    return {r.path: (r.key, r.label) for r in open_source(str(source), **options).records}


# Listing


def test_class_folders_become_classes_in_sorted_order(tmp_path: Path) -> None:
    tree(tmp_path, "dog/b.png", "cat/2.JPG", "cat/1.png", "cat/deep/3.webp", "dog/.hidden.png", ".git/x.png")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    source = open_source(str(tmp_path))
    assert [(r.path, r.key, r.label) for r in source.records] == [
        ("cat/1.png", "cat/1", 0),
        ("cat/2.JPG", "cat/2", 0),
        ("cat/deep/3.webp", "cat/deep_3", 0),
        ("dog/b.png", "dog/b", 1),
    ]
    assert source.class_map == {"cat": 0, "dog": 1}
    assert source.records[0].num_bytes == (tmp_path / "cat/1.png").stat().st_size
    assert source.read("dog/b.png") == (tmp_path / "dog/b.png").read_bytes()


def test_empty_class_folder_gets_an_id_and_a_warning(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png", "c/1.png")
    (tmp_path / "b").mkdir()
    source = open_source(str(tmp_path))
    assert source.class_map == {"a": 0, "b": 1, "c": 2}
    assert [r.label for r in source.records] == [0, 2]
    assert "b" in source.warnings[0]


def test_folder_without_class_folders_is_one_class(tmp_path: Path) -> None:
    source = open_source(str(tree(tmp_path, "one.png", "two.png")))
    assert source.class_map == {"unlabelled": 0}
    assert [r.key for r in source.records] == ["unlabelled/one", "unlabelled/two"]


def test_images_outside_class_folders_are_left_out_with_a_warning(tmp_path: Path) -> None:
    source = open_source(str(tree(tmp_path, "cat/1.png", "cover.png")))
    assert [r.path for r in source.records] == ["cat/1.png"]
    assert "1 image outside the class folders" in source.warnings[0]


def test_links_are_followed_except_to_parent_folders(tmp_path: Path) -> None:
    tree(tmp_path / "data", "cat/1.png")
    tree(tmp_path / "elsewhere", "2.png")
    (tmp_path / "data/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/cat/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/cat/self.png").symlink_to(tmp_path / "data/cat/self.png")
    (tmp_path / "data/cat/gone.png").symlink_to(tmp_path / "nowhere")
    source = open_source(str(tmp_path / "data"))
    assert [r.path for r in source.records] == ["cat/1.png", "cat/gone.png", "cat/self.png", "dog/2.png"]
    with pytest.raises(ImageError, match="missing"):
        source.read("cat/gone.png")


def test_split_is_a_sub_folder_and_part_of_the_path(tmp_path: Path) -> None:
    tree(tmp_path, "train/cat/1.png", "train/dog/1.png", "val/cat/9.png")
    source = open_source(str(tmp_path), split="train")
    assert source.class_map == {"cat": 0, "dog": 1}
    assert source.records[0].key == "cat/1"
    assert open_reader(source.location).read("train/cat/1.png") == source.read(source.records[0].path)
    with pytest.raises(UsageError, match="train, val: choose one with --split"):
        open_source(str(tmp_path))
    with pytest.raises(UsageError, match=r"no split 'test'.*found train, val"):
        open_source(str(tmp_path), split="test")


def test_unusable_source_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(BuilderError, match=r"no images under .*1 other files.*expected one folder per class"):
        open_source(str(tmp_path))
    with pytest.raises(UsageError, match="does not exist: expected a folder"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="is a file: expected a folder"):
        open_source(str(tmp_path / "notes.txt"))
    with pytest.raises(UsageError, match="nonsense"):
        open_source("nonsense://bucket/photos")


def test_class_map_decides_ids_of_present_and_absent_classes(tmp_path: Path) -> None:
    tree(tmp_path / "data", "dog/1.png")
    map_file = tmp_path / "map.json"
    map_file.write_text(json.dumps({"cat": 0, "dog": 7}))
    assert labels(tmp_path / "data", class_map=str(map_file))["dog/1.png"] == ("dog/1", 7)
    assert open_source(str(tmp_path / "data"), class_map={"dog": 7}).class_map == {"dog": 7}
    with pytest.raises(
        UsageError, match="1 class missing in the class map, the first is 'dog': did you mean 'dogs'"
    ):
        open_source(str(tmp_path / "data"), class_map={"dogs": 0})
    for content in ('["cat"]', '{"cat": 0, "dog": 0}', '{"dog": -1}', '{"dog": 1700000000}', "{}"):
        map_file.write_text(content)
        with pytest.raises(UsageError, match="expected JSON of class names and different ids"):
            open_source(str(tmp_path / "data"), class_map=str(map_file))


def test_listing_hash_depends_on_names_sizes_and_labels(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png", "b/2.png")
    first = open_source(str(tmp_path)).listing_hash
    assert open_source(str(tmp_path)).listing_hash == first
    assert open_source(str(tmp_path), class_map={"a": 1, "b": 0}).listing_hash != first
    (tmp_path / "a/1.png").write_bytes(b"longer than a picture of one pixel" * 9)
    assert open_source(str(tmp_path)).listing_hash != first


def make_tar(path: Path, folder: Path, arcname: str) -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=arcname)
    return path


@pytest.mark.parametrize("arcname", [".", "photos"])
def test_tar_is_listed_as_the_tree_it_contains(tmp_path: Path, arcname: str) -> None:
    data = tree(tmp_path / "data", "cat/1.png", "dog/2.png")
    (data / "empty").mkdir()
    source = open_source(str(make_tar(tmp_path / "photos.tar", data, arcname)))
    assert source.class_map == {"cat": 0, "dog": 1, "empty": 2}
    assert [r.key for r in source.records] == ["cat/1", "dog/2"]
    for record in source.records:
        expected = (data / record.key).with_suffix(".png").read_bytes()
        assert source.read(record.path) == open_reader(source.location).read(record.path) == expected


def test_split_of_a_tar_is_a_folder_in_it(tmp_path: Path) -> None:
    data = tree(tmp_path / "data", "train/cat/1.png", "val/dog/2.png")
    path = str(make_tar(tmp_path / "photos.tar", data, "photos"))
    assert labels(path, split="val") == {"photos/val/dog/2.png": ("dog/2", 0)}
    with pytest.raises(UsageError, match="no split 'test'"):
        open_source(path, split="test")


def test_truncated_or_compressed_tar_is_refused(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "photos.tar", tree(tmp_path / "data", "cat/1.png"), ".")
    whole = path.read_bytes()
    for end in (1400, 1536, 1600, 2048, 2600):  # inside headers, between members, inside data
        path.write_bytes(whole[:end])
        with pytest.raises(BuilderError, match="not a complete, uncompressed tar"):
            open_source(str(path))
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(BuilderError, match="not a complete, uncompressed tar"):
        open_source(str(path))


def test_csv_tsv_and_parquet_tables_give_the_same_records(tmp_path: Path) -> None:
    tree(tmp_path, "x/1.png", "y/2.png", "y/3.png")
    rows = {"path": ["y/2.png", "x/1.png", "y/3.png"], "class": ["zebra", "ant", "ant"]}
    pq.write_table(pa.table(rows), tmp_path / "list.parquet")
    lines = ["path,class", *(f"{p},{c}" for p, c in zip(*rows.values(), strict=True))]
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    (tmp_path / "list.tsv").write_text("\n".join(lines).replace(",", "\t"))
    expected = {"x/1.png": ("ant/1", 0), "y/2.png": ("zebra/2", 1), "y/3.png": ("ant/3", 0)}
    for name in ("list.csv", "list.tsv", "list.parquet"):
        source = open_source(str(tmp_path / name))
        assert {r.path: (r.key, r.label) for r in source.records} == expected
        assert source.read("x/1.png") == (tmp_path / "x/1.png").read_bytes()
        assert source.records[0].num_bytes > 0


def test_numeric_labels_of_a_table_are_class_ids(tmp_path: Path) -> None:
    tree(tmp_path, "1.png", "2.png")
    table = tmp_path / "list.csv"
    table.write_text("path,label\n1.png,10\n2.png,2\n")
    source = open_source(str(table))
    assert [r.label for r in source.records] == [10, 2]
    assert source.class_map == {str(n): n for n in range(11)}
    table.write_text("path,label,class\n1.png,10,ant\n2.png,2,bee\n")
    assert open_source(str(table)).class_map == {"ant": 10, "bee": 2}
    table.write_text("path,label\n1.png,ant\n2.png,2\n")
    assert open_source(str(table)).class_map == {"2": 0, "ant": 1}
    pq.write_table(pa.table({"path": ["1.png", "2.png"], "label": [10, 2]}), tmp_path / "list.parquet")
    assert [r.label for r in open_source(str(tmp_path / "list.parquet")).records] == [10, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n1.png,0\n", "no column 'path', found file, label"),
        ("path,class\n1.png,a\n1.png,b\n", "listed as 'a' and as 'b'"),
        ("path,class,label\n1.png,a,0\n2.png,a,1\n", "class 'a' has labels 0 and 1"),
        ("path\n9.png\n8.png\n", "none of the 2 paths.*the first is '9.png'.*relative to the folder"),
        ("path,class\n,a\n", "row 1 has no path"),
        ("path\n", "no images in"),
        ("path,label\n1.png,0\n2.png,-1\n", "row 2 has label '-1', expected class ids"),
        ("path,label\n1.png,3.0\n2.png,5\n", "row 1 has label '3.0', expected class ids"),
        ("path,label\n1.png,3\n2.png,\n", "row 2 has label '', expected class ids"),
        ("path,label\n1.png,3\n2.png,1700000000\n", "label 1700000000, expected class ids from 0 to 999999"),
        ("path,class,label\n1.png,a,1\n2.png,b,1\n", "classes 'a' and 'b' share label 1"),
    ],
)
def test_unusable_table_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    table = tree(tmp_path, "1.png", "2.png") / "list.csv"
    table.write_text(text)
    with pytest.raises(BuilderError, match=message):
        open_source(str(table))


def test_table_with_missing_or_repeated_files_gives_warnings(tmp_path: Path) -> None:
    table = tree(tmp_path, "1.png") / "list.csv"
    table.write_text("path,split\n1.png,a\n1.png,a\ngone.png,a\nother.png,b\n")
    source = open_source(str(table), split="a")
    assert [r.path for r in source.records] == ["1.png", "gone.png"]
    assert len(source.warnings) == 2
    with pytest.raises(ImageError, match="missing"):
        source.read("gone.png")


def test_fsspec_urls_are_listed_and_read() -> None:
    fs = fsspec.filesystem("memory")
    picture = encoded(NOISE)
    for path in ("photos/cat/1.png", "photos/dog/2.png", "photos/.cache/3.png"):
        fs.pipe(f"/{path}", picture)
    fs.pipe("/photos/list.csv", b"path,class\ncat/1.png,c\nmemory://photos/dog/2.png,d\n")
    source = open_source("memory://photos")
    assert [(r.key, r.num_bytes) for r in source.records] == [
        ("cat/1", len(picture)),
        ("dog/2", len(picture)),
    ]
    assert source.read("dog/2.png") == picture
    table = open_source("memory://photos/list.csv")
    assert [r.path for r in table.records] == ["cat/1.png", "memory://photos/dog/2.png"]
    assert table.read("memory://photos/dog/2.png") == open_reader(table.location).read("cat/1.png") == picture


def test_a_folder_that_lists_itself_is_not_listed_twice(tmp_path: Path) -> None:
    """Index pages link to themselves, and object stores have placeholders of folders."""
    tree(tmp_path, "photos/cat/1.png")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(IndexPages, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever).start()
        source = open_source(f"http://127.0.0.1:{server.server_port}/photos")
        server.shutdown()
    assert [(record.path, record.class_name) for record in source.records] == [("cat/1.png", "cat")]


def test_a_password_is_read_from_the_netrc_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "photos/cat/1.png")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(PrivatePages, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever).start()
        source = open_source(f"http://127.0.0.1:{server.server_port}/photos")
        server.shutdown()
    assert [record.path for record in source.records] == ["cat/1.png"]


class IndexPages(SimpleHTTPRequestHandler):
    """Serves a folder; the index page of each folder links to the page itself."""

    def list_directory(self, path: str | os.PathLike[str]) -> io.BytesIO:
        names = [f"{name}/" if os.path.isdir(os.path.join(path, name)) else name for name in os.listdir(path)]
        links = [self.path.rstrip("/") + "/", *names]
        page = "".join(f'<a href="{link}">{link}</a>' for link in links).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        return io.BytesIO(page)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the output of tests short."""


class PrivatePages(IndexPages):
    """The same for who says `me` and `secret`."""

    def send_head(self) -> Any:
        if self.headers.get("Authorization") == f"Basic {base64.b64encode(b'me:secret').decode()}":
            return super().send_head()
        self.send_error(401)
        return None


def test_text_of_a_listing_is_not_limited_to_two_gibibytes(tmp_path: Path) -> None:
    """Arrow counts the text of one piece of a column in 32 bits, unless the kind of the column is `large_string`."""
    records = open_source(str(tree(tmp_path / "photos", "cat/1.png", "cat/1.jpg", "cat/2.png"))).records
    write_index(tmp_path / "index.parquet", records)
    table = read_index(tmp_path / "index.parquet")
    assert table.schema.field("path").type == pa.string()  # on disk as before
    for images in (records, ImageTable(table), ImageTable(table).take(np.array([2, 0]))):
        kinds = [images.column(name).type for name in ("key", "path", "class_name")]
        assert kinds == [pa.large_string()] * 3


def test_a_table_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    contents = [b"path,class\n1.png,a\n", b"path,class\n1.png,a\n", b"path,class\n1.png,b\n"]

    class Changing(MemoryFileSystem):
        """A file system whose file is another one at every reading."""

        def open(self, path: str, *args: object, **named: object) -> io.BytesIO:
            return io.BytesIO(contents.pop(0))

    with pytest.raises(UsageError, match="changed while it was read: repeat the command"):
        list_table(Changing(), "/list.csv", lambda path: 1, "list.csv", None)


def test_a_folder_that_changes_while_it_is_listed_holds_what_was_there_when_its_page_was_read() -> None:
    class Changing(MemoryFileSystem):
        """A store in which images come and go after the page of the first class was read."""

        def find(self, path: str, *args: object, **named: object) -> object:
            found = super().find(path, *args, **named)
            if path == "/changing/a":
                self.rm_file("/changing/b/1.png")
                self.pipe({"/changing/a/0.png": b"", "/changing/b/3.png": b"", "/changing/c/1.png": b""})
            return found

    fs = Changing()
    fs.pipe({f"/changing/{path}.png": b"" for path in ("a/1", "b/1", "b/2")})
    try:
        listed = list_folder(fs, "/changing", "memory://changing", None)
    finally:
        fs.rm("/changing", recursive=True)
    assert listed.table.column("path").to_pylist() == ["a/1.png", "b/2.png", "b/3.png"]
    assert listed.classes == ["a", "b"]


# Keys

PARTS = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=150)


def keys_of(images: list[tuple[str, str]]) -> list[str]:
    """Keys of images, given as paths and names of classes."""
    columns = [plain_key(*image) for image in images], [path for path, _ in images]
    plain, paths = (pa.chunked_array([pa.array(texts, pa.large_string())]) for texts in columns)
    return unique_keys(plain, paths).to_pylist()


@given(st.sets(st.tuples(PARTS, PARTS), max_size=30))
def test_keys_are_safe_and_unique(parts: set[tuple[str, str]]) -> None:
    images = [(f"{folder}/{name}.png", folder) for folder, name in parts]
    keys = keys_of(images)
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+/[A-Za-z0-9_-]+", key) and len(key) <= 120 for key in keys)
    assert dict(zip(images, keys, strict=True)) == dict(zip(images[::-1], keys_of(images[::-1]), strict=True))


def test_keys_are_readable_and_colliding_ones_get_a_hash() -> None:
    keys = keys_of(
        [("cat/a.b c.png", "cat"), ("cat/x.jpg", "cat"), ("cat/x.png", "cat"), ("chien/été.png", "chien")]
    )
    assert keys[0] == "cat/a_b_c"
    assert keys[3] == "chien/ete"
    assert [key[:6] for key in keys[1:3]] == ["cat/x-", "cat/x-"]
    assert keys[1] != keys[2]
    assert keys_of([("cat/x.jpg", "cat")]) == ["cat/x"]
    twice = keys_of([("cat/\u00e9.png", "cat"), ("cat/e\u0301.png", "cat")])  # one name, composed and not
    assert len(set(twice)) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_unreadable_folder_is_named_in_the_error(tmp_path: Path) -> None:
    tree(tmp_path, "cat/1.png")
    (tmp_path / "cat").chmod(0)
    with pytest.raises(BuilderError, match="Permission denied"):
        open_source(str(tmp_path))
    (tmp_path / "cat").chmod(0o700)

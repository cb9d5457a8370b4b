"""Nothing that comes from outside is run, and nothing lands outside its folder."""

import ast
import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from odd_pictures import PICTURE
from pictures import encoded

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, read_sections
from hierarchy_builder.encoders import load_encoder
from hierarchy_builder.errors import BuilderError, UsageError
from hierarchy_builder.images.keys import check_key
from hierarchy_builder.images.sources import open_source
from hierarchy_builder.progress import Reporter
from hierarchy_builder.records import Sample
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.shards import read_shard, write_shard
from hierarchy_builder.vocabulary.prototypes import load_vocabulary

ROOT = Path(__file__).resolve().parents[2]
RUN_BY_LOADING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NEVER_CALLED = {
    "eval", "exec", "__import__", "os.system", "os.popen", "tempfile.mktemp", "pickle.load", "pickle.loads",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "pandas.read_pickle", "pd.read_pickle",
}  # fmt: skip
NEVER_METHODS = {"extractall", "unpack_archive"}
"""Of whatever object: they write where an archive tells them to."""
MUST_SAY = {
    "np.load": ("allow_pickle", False),
    "np.save": ("allow_pickle", False),
    "np.savez": ("allow_pickle", False),
    "np.lib.format.read_array": ("allow_pickle", False),
    "np.lib.format.write_array": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
}
ARRAYS_ONLY = "trainer/post_training/bundle.py"
NEVER_SAID = {("shell", True), ("allow_pickle", True), ("weights_only", False), ("trust_remote_code", True)}


def forbidden(source: str) -> list[str]:
    """What a file must not do, by line."""
    return [
        f"{node.lineno}: {ast.unparse(node)}" for node in ast.walk(ast.parse(source)) if _is_forbidden(node)
    ]


def _is_forbidden(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in RUN_BY_LOADING for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] in RUN_BY_LOADING
    if isinstance(node, ast.Attribute):
        return node.attr == "LOAD_TRUNCATED_IMAGES"
    return isinstance(node, ast.Call) and _is_forbidden_call(node)


def _is_forbidden_call(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    said = {(word.arg, word.value.value) for word in call.keywords if isinstance(word.value, ast.Constant)}
    return bool(
        name in NEVER_CALLED
        or name.rpartition(".")[2] in NEVER_METHODS
        or (name in MUST_SAY and MUST_SAY[name] not in said)
        or said & NEVER_SAID
    )


def sources(*folders: str) -> Iterator[tuple[str, str]]:
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def test_no_file_calls_what_runs_foreign_code() -> None:
    folders = ("hierarchy_builder", "trainer", "pipelines", "examples", "benchmarks")
    found = {path: calls for path, text in sources(*folders) if (calls := forbidden(text))}
    # The release's statistics are a pickle: this reader resolves nothing but NumPy arrays, see test_picture_judges.py.
    assert found == {ARRAYS_ONLY: ["10: import pickle"]}


def test_no_room_writes_pickles() -> None:
    for path, text in sources("hierarchy_builder", "trainer", "pipelines", "examples"):
        assert "torch.save(" not in text.replace("safetensors.torch.save(", ""), path


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from cloudpickle import loads", "eval(text)", "exec(text)", "os.system(command)",
        "subprocess.run(command, shell=True)", "yaml.load(file)", "yaml.unsafe_load(file)", "np.load(path)",
        "np.load(path, allow_pickle=True)", "np.savez(path, a=a)", "torch.load(path)",
        "torch.load(path, weights_only=False)", "tarfile.open(path).extractall(folder)",
        "ImageFile.LOAD_TRUNCATED_IMAGES = True", "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_search_finds(line: str) -> None:
    assert forbidden(f"def f():\n    {line}\n")


def test_the_search_leaves_the_safe_forms() -> None:
    safe = (
        "np.load(p, allow_pickle=False)\ntorch.load(p, weights_only=True)\nyaml.safe_load(f)\nmodel.eval()\n"
    )
    assert forbidden(safe) == []


# Files from outside


class Planted:
    """Unpickling it writes a file."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.trap), "w")


def test_a_trap_in_a_pickle_is_real(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Planted(tmp_path / "trap"))).close()  # noqa: S301 (made here)
    assert (tmp_path / "trap").exists()


def test_weights_with_a_trap_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": Planted(tmp_path / "trap")}, tmp_path / "weights.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Planted(tmp_path / "trap")))
    for name in ("weights.pth", "plain.pth"):
        with pytest.raises(BuilderError, match="does not hold the weights"):
            load_encoder("timm:test_vit", weights=str(tmp_path / name), device="cpu")
    assert not (tmp_path / "trap").exists()


def test_arrays_with_a_trap_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "vocabulary.npz", description=np.array([Planted(tmp_path / "trap")], dtype=object))
    with pytest.raises(BuilderError, match="is damaged"):
        load_vocabulary(tmp_path / "vocabulary.npz")
    assert not (tmp_path / "trap").exists()


def test_yaml_with_a_trap_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "build.yaml").write_text(f"extract: !!python/object/apply:builtins.open ['{trap}', 'w']\n")
    with pytest.raises(UsageError, match="could not determine a constructor"):
        read_sections(tmp_path / "build.yaml")
    assert not trap.exists()


# Names from outside

SECRET = "not a picture of the archive"


def hostile_tar(path: Path, secret: Path) -> Path:
    """Two pictures among members that point elsewhere."""
    data = encoded(PICTURE)
    with tarfile.open(path, "w") as tar:
        for name in ("a/fine.png", "../up.png", "/abs/olute.png", "b/../../../etc/deep.png", "c/./ok.png"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in (("a/soft.png", tarfile.SYMTYPE), ("a/hard.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
        for name, kind in (("a/pipe.png", tarfile.FIFOTYPE), ("a/device.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    return path


def test_a_hostile_tar_gives_pictures_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    secret = tmp_path / "secret.png"
    secret.write_text(SECRET)
    tar = hostile_tar(tmp_path / "work" / "photos.tar", secret)
    source = open_source(str(tar))
    assert {record.path for record in source.records} == {"a/fine.png", "abs/olute.png", "c/ok.png"}
    assert {source.read(record.path) for record in source.records} == {encoded(PICTURE)}
    for path in ("a/soft.png", "a/hard.png", "../../secret.png", str(secret)):
        with pytest.raises(BuilderError, match="missing"):
            source.read(path)
    before = set(tmp_path.rglob("*"))
    folder = BuildFolder(tmp_path / "work" / "build")
    plan = steps.BuildPlan(
        extract=ExtractConfig(encoder="dct"),
        hierarchy=HierarchyRecipe.paper(),
        shard=ShardConfig(images=True),
    )
    steps.build(
        folder, str(tar), plan, steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))
    )
    assert all(path.is_relative_to(folder.root) for path in set(tmp_path.rglob("*")) - before)
    keys = [sample.key for sample in read_shard(folder.shards / "train-000000.tar")]
    assert sorted(keys) == ["a/fine", "abs/olute", "c/ok"]


def test_a_listing_may_point_anywhere_but_keys_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "list").mkdir()
    (tmp_path / "outside.png").write_bytes(encoded(PICTURE))
    listing = tmp_path / "list" / "photos.csv"
    listing.write_text(f"path,class\n../outside.png,..\n{tmp_path}/outside.png,/etc\n")
    keys = [record.key for record in open_source(str(listing)).records]
    assert len(set(keys)) == 2
    assert [check_key(key, "listing") for key in keys] == keys


@given(st.text(min_size=1, max_size=12), st.sampled_from(["..", ".", "/", "\\", "\0", "\n"]))
def test_a_key_that_leads_elsewhere_is_refused(text: str, part: str) -> None:
    for key in (part, f"{part}/{text}", f"{text}/{part}/x", f"/{text}", f"{text}/"):
        with pytest.raises(BuilderError, match="expected <class>/<name> without dots"):
            check_key(key, "sample")


@pytest.mark.parametrize("name", ["../x.cls", "/x.cls", "a/../../x.cls", "./x.cls", "a//x.cls"])
def test_shards_neither_hold_nor_yield_such_keys(tmp_path: Path, name: str) -> None:
    features, regions = np.zeros((2, 2, 3), np.float16), np.zeros((1, 2, 2), np.uint8)
    key = name.removesuffix(".cls")
    with pytest.raises(BuilderError, match="without dots"):
        write_shard(
            tmp_path / "a.tar", [Sample(key=key, label=0, features=features, regions=regions)], config_hash=""
        )
    assert list(tmp_path.iterdir()) == []
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(BuilderError, match=r"b\.tar, member .*without dots"):
        list(read_shard(tmp_path / "b.tar"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_shards_hold_no_links(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "secret").write_text(SECRET)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        whole = tarfile.TarInfo("a/b.cls")
        whole.size = 1
        tar.addfile(whole, io.BytesIO(b"1"))
        link = tarfile.TarInfo("a/b.json")
        link.type, link.linkname = kind, "a/b.cls" if kind == tarfile.LNKTYPE else str(tmp_path / "secret")
        tar.addfile(link)
    with pytest.raises(BuilderError, match=r"a/b\.json is not a file"):
        list(read_shard(tmp_path / "a.tar"))

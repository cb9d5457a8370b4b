"""Two hosts that share no folder, and an object store between them: builds on Ray, runs under torchrun, takeovers."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import SETTINGS, cli, trainer
from hosts import PREFIX, Host, Network, network
from object_store import Store, contents, sent, served
from pictures import write_tree
from processes import processes_below

from hierarchy_builder.files import remote
from hierarchy_builder.files.paths import a_folder

pytestmark = [pytest.mark.drill, pytest.mark.timeout(1800)]
WORDS = ("--encoder", "dct", "--block-rows", 4, "--batch-size", 4, "--samples-per-shard", 5, "--images")
RUN = ("--preset", "tiny-cpu", *SETTINGS, "--batch-size", 8, "--total-images", 48, "--quiet")
BUILDER, TRAINER = ("-m", "hierarchy_builder.cli"), ("-m", "trainer.cli")
PORT = 6379
STARTED = "Ray runtime started."
"""What Ray prints when a node is up."""


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def lan(store: Store) -> Iterator[Network]:
    """Hosts whose environment leads to the store."""
    with (
        network() as made,
        store.also_at(made.listening()) as endpoint,
        pytest.MonkeyPatch.context() as patch,
    ):
        made.environment["AWS_ENDPOINT_URL"] = endpoint
        made.environment["GLOO_SOCKET_IFNAME"] = "eth0"
        made.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        patch.delenv("RAY_ADDRESS", raising=False)
        yield made


@pytest.fixture(scope="module")
def pair(lan: Network) -> tuple[Host, Host]:
    return lan.add(), lan.add()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("photos"), per_class=8)


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """The build on a disk, by one process."""
    folder = tmp_path_factory.mktemp("near") / "build"
    assert cli("hierarchy-builder", "build", photos, "--out", folder, *WORDS, "--workers", 0).code == 0
    return folder


@pytest.fixture(scope="module")
def cluster(pair: tuple[Host, Host]) -> Iterator[str]:
    """The address of a Ray of one worker on each host."""
    head, other = pair
    start = ("-m", "ray.scripts.scripts", "start", "--num-cpus", 1, "--object-store-memory", 10**8, "--block")
    address = f"{head.address}:{PORT}"
    of_head = ("--head", "--port", PORT, "--node-ip-address", head.address, "--include-dashboard", "false")
    nodes = []
    for host, words in ((head, of_head), (other, ("--address", address, "--node-ip-address", other.address))):
        nodes.append(host.start(*start, *words))
        assert any(STARTED in line for line in nodes[-1].stdout), "Ray ended before it was up"
    yield address
    for node in nodes:
        node.terminate()


def test_hosts_share_no_folder(pair: tuple[Host, Host], tmp_path: Path) -> None:
    first, second = pair
    write = "import sys; open(sys.argv[1], 'w')"
    first.run("-c", write, first.folder / "mine")
    look = second.run("-c", "import os, sys; print(os.path.exists(sys.argv[1]))", first.folder / "mine")
    assert look.stdout == "False\n"
    for place in (tmp_path, Path(__file__).parent, Path.home()):
        assert "Read-only" in first.run("-c", write, place / "ours", code=1).stderr


def test_two_nodes_build_verify_repair_train_and_sample(
    store: Store, pair: tuple[Host, Host], cluster: str, photos: Path, near: Path, tmp_path: Path
) -> None:
    first, second = pair
    bucket = store.bucket("two-nodes")
    sent(photos, a_folder(f"{bucket}/photos"))
    url = f"{bucket}/build"
    on_ray = ("--workers", 2, "--address", cluster)
    first.run(*BUILDER, "build", f"{bucket}/photos", "--out", url, *WORDS, *on_ray)
    whole = contents(a_folder(url))
    assert whole == contents(near)
    assert {first.address, second.address} <= store.door.writers.keys()
    second.run(*BUILDER, "verify", url)
    for name in ("features.zarr/features/c/1/0/0/0", "shards/train-000001.tar"):
        data = bytearray(whole[name])
        data[len(data) // 2] ^= 1
        remote.put(a_folder(url) / name, bytes(data))
    second.run(*BUILDER, "verify", url, code=4)
    second.run(*BUILDER, "repair", url, *on_ray)
    assert contents(a_folder(url)) == whole
    run = f"{bucket}/run"
    second.run(*TRAINER, "train", url, "--out", run, *RUN)
    first.run(*TRAINER, "sample", run, "--labels", 0, "--seeds", 0, "--out", first.folder / "drawn")
    trainer("train", near, "--out", tmp_path / "run", *RUN)
    trainer("sample", tmp_path / "run", "--labels", 0, "--seeds", 0, "--out", tmp_path / "drawn")
    expected = pictures(tmp_path / "drawn")
    assert expected
    assert pictures(first.seen(first.folder / "drawn")) == expected


def test_a_driver_that_was_frozen_writes_nothing_after_its_successor(
    store: Store, pair: tuple[Host, Host], cluster: str, photos: Path, near: Path
) -> None:
    first, second = pair
    url = f"{store.bucket('takeover')}/build"
    place, seen = sent(photos, a_folder(f"{url}-photos")), threading.Event()

    def fault(environ: dict[str, Any]) -> None:
        if environ["REQUEST_METHOD"] == "PUT" and "/ledger/extract/0" in environ["PATH_INFO"]:
            seen.set()

    words = ("build", place, "--out", url, *WORDS)
    with store.failing(fault):
        driver = first.start(*BUILDER, *words, "--workers", 2, "--address", cluster)
        assert seen.wait(560)
        frozen = processes_below(driver.pid)
        for process in frozen:
            os.kill(process, signal.SIGSTOP)
    followed = second.run(*BUILDER, *words, "--workers", 0)
    assert "waiting for at most" in followed.stderr
    at_takeover = contents(a_folder(url))
    with store.door.lock:
        store.door.requests.clear()
    for process in frozen:
        os.kill(process, signal.SIGCONT)
    _, said = driver.communicate(timeout=120)
    assert driver.returncode == 75, said
    assert "was taken over by another process" in said
    assert {path for method, path in store.door.requests if method in ("PUT", "DELETE", "POST")} == set()
    assert contents(a_folder(url)) == at_takeover == contents(near)


@pytest.fixture(scope="module")
def one_host(near: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The checkpoints of two ranks on one machine, with its disk."""
    run = tmp_path_factory.mktemp("one-host") / "run"
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trainer.cli")
    words = [sys.executable, *two, "train", str(near), "--out", str(run), *map(str, RUN)]
    alone = subprocess.run(words, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    assert tensors(run)
    return tensors(run)


def torchrun(host: Host, rank: int, *words: object) -> subprocess.Popen[str]:
    """`trainer train` as one of two hosts of torchrun, of which rank 0 is the main one."""
    of_two = ("--nnodes", 2, "--node-rank", rank, "--master-addr", f"{PREFIX}2", "--master-port", 29400)
    launch = ("-m", "torch.distributed.run", *of_two, "--nproc-per-node", 1, "-m", "trainer.cli")
    return host.start(*launch, "train", *words)


def test_two_hosts_under_torchrun_write_the_checkpoints_of_one(
    store: Store, pair: tuple[Host, Host], near: Path, one_host: dict[str, bytes]
) -> None:
    bucket = store.bucket("torchrun")
    shards = sent(near / "shards", a_folder(f"{bucket}/shards"))
    run, stopped = a_folder(f"{bucket}/run"), [shards, "--out", f"{bucket}/run", *RUN]

    def trained(*more: object) -> list[tuple[int, str]]:
        ranks = [torchrun(host, rank, *stopped, *more) for rank, host in enumerate(pair)]
        return [(rank.wait(560), rank.communicate()[1]) for rank in ranks]

    killed = threading.Event()

    def fault(environ: dict[str, Any]) -> None:
        if environ["REQUEST_METHOD"] == "PUT" and "/checkpoints/step-00000002/state" in environ["PATH_INFO"]:
            killed.set()

    with store.failing(fault):
        ranks = [torchrun(host, rank, *stopped) for rank, host in enumerate(pair)]
        assert killed.wait(560)
        for rank in ranks:
            for process in processes_below(rank.pid):
                os.kill(process, signal.SIGKILL)
            rank.communicate()
    pair[0].run("-c", f"import shutil; shutil.rmtree('{pair[0].folder}/cache')")  # as a new machine
    for code, said in trained():
        assert code == 0, said
    assert tensors(run) == one_host


def test_ray_train_across_hosts_writes_the_same_checkpoints(
    store: Store, pair: tuple[Host, Host], cluster: str, near: Path, one_host: dict[str, bytes]
) -> None:
    bucket = store.bucket("ray-train")
    shards, run = sent(near / "shards", a_folder(f"{bucket}/shards")), f"{bucket}/run"
    ranks = ("-m", "pipelines.train", "--workers", 2, "--address", cluster, "--json", "--")
    trained = pair[0].run(*ranks, shards, "--out", run, *RUN)
    assert json.loads(trained.stdout)["step"] == 6
    assert tensors(a_folder(run)) == one_host


def tensors(run: Path) -> dict[str, bytes]:
    """The tensors of the checkpoints of a run, by path."""
    files = remote.files_below(run) if remote.is_remote(run) else run.rglob("*")
    found = {path.relative_to(run).as_posix(): path for path in files if path.suffix == ".safetensors"}
    return {name: path.read_bytes() for name, path in found.items()}


def pictures(folder: Path) -> dict[str, bytes]:
    """The files of samples by name."""
    return {path.name: path.read_bytes() for path in folder.rglob("*.png")}

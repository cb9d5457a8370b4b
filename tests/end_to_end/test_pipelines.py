"""The build as a cluster job: a real Ray of two nodes, and files a scheduler would take."""

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from pictures import write_tree

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.workers import RAY_ENVIRONMENT, Workers
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.folder import BuildFolder

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
CLUSTER = Path(__file__).resolve().parents[2] / "pipelines" / "cluster"
RAY_JOBS = pytest.mark.parametrize("name", sorted(path.name for path in CLUSTER.glob("*-rayjob.yaml")))


def test_no_cluster_at_the_address_is_said(tmp_path) -> None:
    photos = write_tree(tmp_path / "photos", per_class=1)
    address = f"127.0.0.1:{_free_port()}"
    job = subprocess.run(
        [
            *(sys.executable, "-m", "pipelines.build", photos, "--out", tmp_path / "job", "--encoder", "dct"),
            *("--address", address),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "NO_COLOR": "1", "RAY_ADDRESS": ""},
    )
    assert job.returncode == 1
    assert f"no Ray cluster answers at '{address}'" in job.stderr
    assert not list(tmp_path.rglob("*.tar"))


@pytest.fixture
def two_nodes(monkeypatch):
    """Address of a Ray of two nodes with one CPU each, which needs the token of this environment.

    It starts from a process of its own, since Ray reads the mode of authentication only once.
    """
    for name, value in {**RAY_ENVIRONMENT, **TOKEN, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}.items():
        monkeypatch.setenv(name, value)
    start = """
        from ray.cluster_utils import Cluster
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes(timeout=60)
        print("ready", cluster.address, flush=True)
        input()
        cluster.shutdown()
    """
    with running(start) as address:
        yield address


@contextlib.contextmanager
def running(program):
    """What `program` prints behind "ready"; it goes on when the block ends."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            while not (line := process.stdout.readline()).startswith("ready"):
                assert line, "the program ended before it was ready"
            yield line.removeprefix("ready").strip()
        finally:
            process.stdin.write("\n")
            process.stdin.close()


@pytest.mark.timeout(240)
def test_job_on_two_nodes_makes_the_bytes_of_one_process(two_nodes, tmp_path) -> None:
    photos = write_tree(tmp_path / "photos", per_class=6)
    config = tmp_path / "build.yaml"
    config.write_text("extract: {block_rows: 8}\nshard: {samples_per_shard: 6}\n")
    job = subprocess.run(
        [
            *(sys.executable, "-m", "pipelines.build", photos, "--out", tmp_path / "job", "--encoder", "dct"),
            *("--config", config, "--address", two_nodes, "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert job.returncode == 0, job.stderr
    assert [row["images"] for row in json.loads(job.stdout)] == [18, 18, 18]
    refused = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "pipelines.build", photos, "--out", tmp_path / f"refused{number}"),
                *("--quiet", "--encoder", "dct", "--address", two_nodes),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "NO_COLOR": "1",
                "HOME": str(tmp_path),
                "RAY_AUTH_TOKEN": token,
                "RAY_NUM_REDIS_GET_RETRIES": "1",  # Ray asks once, not for 20 s
            },
        )
        for number, token in enumerate(("0" * 64, ""))
    ]
    for process in refused:
        _, complained = process.communicate(timeout=100)
        assert process.returncode == 1, complained
        assert "RAY_AUTH_TOKEN" in complained
        assert len(complained.strip().splitlines()) == 1, complained
    alone = BuildFolder(tmp_path / "alone")
    plan = steps.BuildPlan(
        extract=ExtractConfig(encoder="dct", block_rows=8),
        hierarchy=HierarchyRecipe.paper(),
        shard=ShardConfig(samples_per_shard=6),
    )
    session = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))
    steps.build(alone, str(photos), plan, session)
    tars = sorted(path.name for path in alone.shards.glob("*.tar"))
    assert len(tars) == 3
    for name in tars:
        assert (tmp_path / "job" / "shards" / name).read_bytes() == (alone.shards / name).read_bytes()


@RAY_JOBS
def test_cluster_files_name_the_job(name: str) -> None:
    job = yaml.safe_load((CLUSTER / name).read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert "pipelines.build" in job["spec"]["entrypoint"]
    for group in (
        job["spec"]["rayClusterSpec"]["headGroupSpec"],
        *job["spec"]["rayClusterSpec"]["workerGroupSpecs"],
    ):
        (container,) = group["template"]["spec"]["containers"]
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == {
            volume["name"] for volume in group["template"]["spec"].get("volumes", [])
        }
        assert ("volumeMounts" in container) != (
            "envFrom" in container
        )  # a volume, or credentials of a store
    cluster = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    assert cluster["provider"]["type"] == "local"
    assert cluster["max_workers"] == len(cluster["provider"]["worker_ips"])


@RAY_JOBS
def test_cluster_files_turn_tokens_on(name: str) -> None:
    job = yaml.safe_load((CLUSTER / name).read_text())["spec"]["rayClusterSpec"]
    assert job["authOptions"] == {"mode": "token"}
    assert [int(part) for part in job["rayVersion"].split(".")] >= [2, 52, 0]  # older ones have no tokens
    cluster = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    for command in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]:
        assert "ray start" not in command or command.startswith("RAY_AUTH_MODE=token "), command
    assert list(cluster["file_mounts"]) == [f"/home/{cluster['auth']['ssh_user']}/.ray/auth_token"]
    for path in CLUSTER.iterdir():
        assert "0.0.0.0" not in path.read_text(), path


def test_slurm_script_is_valid_shell() -> None:
    subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"], check=True)


def test_slurm_script_starts_ray_and_passes_the_exit_code(tmp_path) -> None:
    """Run the script with stand-ins for Slurm's and Ray's commands, and look at what they were asked."""
    calls = tmp_path / "calls"
    stand_ins = {
        "srun": 'echo "srun $*" >> "$CALLS"; echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" >> "$CALLS.tokens"',
        "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" = show ] && printf "a\\nb\\n" || true',
        "sleep": "exit 0",
        "python": 'echo "python $*" >> "$CALLS"; echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" >> "$CALLS.tokens"; exit 75',
        "ray": "exit 0",
    }
    for name, script in stand_ins.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "VENV": str(tmp_path),
        "SLURM_JOB_NODELIST": "a,b",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_JOB_NUM_NODES": "2",
    }
    done = subprocess.run(
        ["bash", CLUSTER / "slurm.sh", "/images", "/out", "--encoder", "dct"],
        env=environment,
        timeout=60,
        capture_output=True,
        text=True,
    )
    said = calls.read_text()
    assert done.returncode == 75, done.stderr
    assert "-m pipelines.build /images --out /out --address a:20007 --encoder dct" in said
    assert "srun --nodes=1 --ntasks=1 --cpus-per-task=4 -w a" in said
    assert "--exclude=a" in said
    assert "scontrol requeue 7" in said
    (token,) = set(
        Path(f"{calls}.tokens").read_text().splitlines()
    )  # the same on the nodes and in the driver
    assert re.fullmatch("token [0-9a-f]{64}", token)
    assert token.removeprefix("token ") not in said + done.stdout + done.stderr


@pytest.fixture
def job_server(monkeypatch):
    """Address of the job server of a Ray of one node; skips without the cluster extra.

    It starts from a process of its own: this one has had another Ray, of which something always stays.
    """
    for module in ("aiohttp", "aiohttp_cors", "opencensus", "prometheus_client", "smart_open", "virtualenv"):
        pytest.importorskip(module, reason="`ray job submit` needs the cluster extra (ray[default])")
    for name, value in {**RAY_ENVIRONMENT, **TOKEN}.items():
        monkeypatch.setenv(name, value)
    port = _free_port()
    start = f"""
        from ray.cluster_utils import Cluster
        ports = dict(dashboard_port={port}, dashboard_agent_listen_port={_free_port()})
        head = dict(num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1", **ports)
        cluster = Cluster(initialize_head=True, head_node_args=head)
        print("ready", flush=True)
        input()
        cluster.shutdown()
    """
    with running(start):
        yield f"http://127.0.0.1:{port}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.timeout(280)
def test_job_is_submitted_to_a_job_server(job_server, tmp_path) -> None:
    photos = write_tree(tmp_path / "photos", per_class=3)
    for _ in range(10):  # the node's agent comes up some seconds after its job server
        job = subprocess.run(
            [
                *(
                    sys.executable,
                    "-m",
                    "ray.scripts.scripts",
                    "job",
                    "submit",
                    "--address",
                    job_server,
                    "--",
                ),
                *(sys.executable, "-m", "pipelines.build", photos, "--out", tmp_path / "job"),
                *("--encoder", "dct", "--fused", "--address", "auto", "--publish", f"file://{tmp_path}/set"),
                "--json",
            ],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "NO_COLOR": "1", "RAY_ADDRESS": ""},
        )
        if "No available agent" not in job.stdout + job.stderr:
            break
    assert job.returncode == 0, job.stdout + job.stderr
    assert (tmp_path / "set" / "_SUCCESS").is_file()
    assert (tmp_path / "set" / "train-000000.tar").read_bytes() == (
        tmp_path / "job" / "shards" / "train-000000.tar"
    ).read_bytes()


@RAY_JOBS
def test_ray_job_has_the_fields_of_its_kind(name: str) -> None:
    """Names KubeRay's v1 schema knows, at the levels it knows them; a misspelt one would be dropped in silence."""
    job = yaml.safe_load((CLUSTER / name).read_text())
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    lifetime = {
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "activeDeadlineSeconds",
        "backoffLimit",
    }
    known = {"entrypoint", "runtimeEnvYAML", "submissionMode", "rayClusterSpec", "suspend", "metadata"}
    assert spec.keys() <= lifetime | known
    assert cluster.keys() <= {
        "rayVersion",
        "authOptions",
        "headGroupSpec",
        "workerGroupSpecs",
        "enableInTreeAutoscaling",
    }
    assert cluster["headGroupSpec"].keys() <= {"rayStartParams", "template", "serviceType"}
    for group in cluster["workerGroupSpecs"]:
        counts = ("minReplicas", "replicas", "maxReplicas")
        assert group.keys() <= {"groupName", "rayStartParams", "template", "numOfHosts", *counts}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert all(type(value) is str for value in container["resources"]["limits"].values())

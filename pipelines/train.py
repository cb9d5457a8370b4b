"""The training loop on a Ray cluster: every worker of Ray Train is a rank of one `trainer train`.

    ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python -m pipelines.train --workers 8 --gpus-per-worker 1 -- \\
        /shared/build --out /shared/run --preset TF-B

Everything behind `--` is what `trainer train` takes. A worker or node that is lost is replaced, and the ranks go on
from the last checkpoint: the run must be at a URL, or in a folder that every node sees under the same path.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import typer

from hierarchy_builder import terminal
from hierarchy_builder.build.workers import RAY_ENVIRONMENT, join, start_local
from hierarchy_builder.errors import InterruptedRunError, TrainerError, UsageError
from hierarchy_builder.files.paths import a_folder
from hierarchy_builder.files.remote import is_remote
from hierarchy_builder.flags import AS_JSON, argument, option, takes
from hierarchy_builder.machine.installing import install_extras
from hierarchy_builder.terminal import print_result
from trainer.cli import app as cli
from trainer.training import checkpoint as saved
from trainer.training.mirror import run_folder

try:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
except ImportError as error:
    raise SystemExit(f"error: {error}; this job needs {install_extras('cluster')}") from None

OF_TRAINING = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}
"""Workers load torch before they answer, from a shared disk often; Ray's own 30 s are short. A rank that reserves no
GPU sees none, so that it computes where its gloo does. Set values win."""

app = typer.Typer(pretty_exceptions_show_locals=False)


@app.command()
@takes(
    arguments=argument("What `trainer train` takes: SHARDS --out RUN …", kind=list[str]),
    address=option("Ray cluster to join; without it a local Ray starts.", envvar="RAY_ADDRESS"),
    workers=option("Number of ranks.", kind=int, default=1, min=1),
    cpus_per_worker=option("CPUs that each rank reserves.", kind=float, default=1.0, min=0.1),
    gpus_per_worker=option("GPUs that each rank reserves.", kind=float, default=0.0, min=0.0),
    retries=option("How often lost ranks are replaced.", kind=int, default=3, min=0),
    as_json=AS_JSON,
)
def train(
    arguments: list[str],
    address: str | None,
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    retries: int,
    as_json: bool,
) -> None:
    """Train on the cluster at ADDRESS; prints how far the run is."""
    out = _run_folder(arguments)
    with contextlib.redirect_stdout(sys.stderr):  # refuses a wrong command here, before any worker starts
        cli.app(["train", *arguments, "--dry-run"], standalone_mode=False)
    for name, value in {**RAY_ENVIRONMENT, **OF_TRAINING}.items():
        os.environ.setdefault(name, value)
    if address is None:
        start_local(log_to_driver=True)
    else:
        join(address, log_to_driver=True)
    resources = {"CPU": cpus_per_worker} | ({"GPU": gpus_per_worker} if gpus_per_worker else {})
    trainer = TorchTrainer(
        run_rank,
        train_loop_config={"arguments": arguments},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if gpus_per_worker else "gloo"),
        run_config=ray.train.RunConfig(
            **_storage(out),
            failure_config=ray.train.FailureConfig(max_failures=retries),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainerError(f"{out}: a rank failed: {_reason(error)}") from None
    if interrupted := (result.metrics or {}).get("interrupted"):
        raise InterruptedRunError(interrupted)
    state = saved.load_state(saved.find_checkpoint(run_folder(out)))
    shown = ("step", "images_seen", "seconds", "loss")
    print_result({name: getattr(state, name) for name in shown}, as_json)


def run_rank(config: dict[str, Any]) -> None:
    """One rank, in the process group that Ray Train has opened."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the job's own output is the driver's
            cli.app(["train", *config["arguments"], "--quiet"], standalone_mode=False)
    except InterruptedRunError as error:  # no failure: all ranks stop at the same step, after a checkpoint
        ray.train.report({"interrupted": str(error)})


def _run_folder(arguments: list[str]) -> Path:
    for word, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if word.startswith("--out"):
            return a_folder(word.removeprefix("--out=") if "=" in word else value)
    raise UsageError("--out RUN is missing behind --")


def _storage(out: Path) -> dict[str, Any]:
    """Where Ray Train keeps its own notes, which all of its workers must see."""
    if not is_remote(out):
        return {"storage_path": str(out.resolve() / "ray")}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    place: Any = out / ".ray"  # no file of the run
    return {"storage_path": place.path, "storage_filesystem": PyFileSystem(FSSpecHandler(place.fs))}


def _reason(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error}
    return str(next(iter(failures.values()))).strip().splitlines()[-1]


def main() -> NoReturn:
    """Run the job and leave with the exit code of what happened."""
    terminal.run(app)


if __name__ == "__main__":
    main()

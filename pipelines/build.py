"""The whole build as one job on a Ray cluster: `hierarchy-builder build` with `--address auto` by default.

    ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python -m pipelines.build s3-or-shared-path/images --out /shared/build --encoder dinov2-reg-base

The driver can be restarted: when the same job is submitted again, it resumes after the last finished unit. `--out`
must be a folder that every node sees under the same path.
"""

from __future__ import annotations

import inspect
from typing import Any

import typer

from hierarchy_builder import terminal
from hierarchy_builder.cli.app import build

app = typer.Typer(pretty_exceptions_show_locals=False, rich_markup_mode=None)


def build_on_cluster(**options: Any) -> None:
    build(**options)


build_on_cluster.__doc__ = build.__doc__
_signature = inspect.signature(build, eval_str=True)
build_on_cluster.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=[
        option.replace(default="auto") if option.name == "address" else option
        for option in _signature.parameters.values()
    ]
)
app.command()(build_on_cluster)


if __name__ == "__main__":
    terminal.run(app, continues=True)

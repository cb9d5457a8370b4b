"""The whole build as one job on a Ray cluster: images → features → regions → shards.

    ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python -m pipelines.build s3-or-shared-path/images --out /shared/build --encoder dinov2-reg-base

The driver is restartable: submit the same job again and it goes on from the last finished unit. `--out` must be a
folder that every node sees under the same path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hierarchy_builder import terminal as console
from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.publish import publish_to
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.cli import options as opt
from hierarchy_builder.config import ExtractConfig
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.folder import BuildFolder

app = typer.Typer(pretty_exceptions_show_locals=False)


@app.command()
def build(
    images: opt.Images,
    out: opt.Out,
    encoder: opt.Encoder = None,
    weights: opt.Weights = None,
    config: opt.ConfigFile = None,
    with_images: opt.WithImages = None,
    image_px: opt.ImagePx = None,
    vocabulary: opt.Vocabulary = None,
    address: Annotated[str, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to join.")] = "auto",
    workers: opt.WorkerCount = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="GPUs a worker reserves while extracting, for example 0.5.")
    ] = None,
    class_map: opt.ClassMap = None,
    fused: opt.Fused = False,
    publish: opt.PublishTo = None,
    fresh: opt.Fresh = False,
    as_json: opt.AsJson = False,
) -> None:
    """Run every step of a build on the cluster at ADDRESS; further fields come from the --config file."""
    plan = steps.BuildPlan(
        extract=opt.resolve(ExtractConfig, "extract", {"encoder": encoder, "weights": weights}, config),
        hierarchy=opt.resolve_recipe({"recipe": None, "cuts": None}, config),
        vocabulary=opt.resolve_vocabulary(vocabulary, None, config),
        shard=opt.resolve_shard({"images": with_images, "image_px": image_px}, config),
    )
    session = steps.Session(
        workers=Workers(count=workers, address=address, gpus_per_worker=gpus_per_worker),
        reporter=Reporter(),
        fresh=fresh,
    )
    folder = BuildFolder(Path(out))
    with folder.locked():
        summaries = steps.build(folder, images, plan, session, class_map=class_map, fused=fused)
        if publish is not None:
            summaries.append(publish_to(folder, publish, session.reporter))
        console.print_stages(summaries, as_json)


if __name__ == "__main__":
    console.run(app, continues=True)

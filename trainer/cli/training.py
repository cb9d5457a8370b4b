"""The verbs `train`, `train-decoder` and `presets`: configuration from preset, file and flags, then the loop."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from hierarchy_builder.errors import UsageError
from hierarchy_builder.fields import flattened, to_mapping
from hierarchy_builder.terminal import print_cells, print_result, stderr
from trainer.cli.options import (
    PATH,
    AsJson,
    BatchSize,
    ConfigFile,
    DryRun,
    MaxSeconds,
    Quiet,
    Resume,
    Settings,
    TotalImages,
    reads,
)
from trainer.decode.config import DecoderConfig
from trainer.methods import registry
from trainer.methods.registry import (
    LATENT_FORCING,
    METHODS,
    all_presets,
    config_of,
    method_of,
    preset_of,
)
from trainer.methods.trajectory_forcing.presets import decoder_preset
from trainer.training.config import checked, with_settings


def train(
    shards: Annotated[str, typer.Argument(help="Finished shard folder, its build folder, or an fsspec URL.")],
    out: Annotated[Path, typer.Option(**PATH, help="Run folder; the same command resumes there.")],
    preset_name: Annotated[
        str | None,
        typer.Option("--preset", help="See `trainer presets`. Default: what RUN holds, else the method's."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help=f"{', '.join(METHODS)}. Default: that of the preset, or else of RUN.")
    ] = None,
    pixel_stage: Annotated[
        bool, typer.Option("--pixel-stage", help="Latent Forcing: all levels, then pixels, in one network.")
    ] = False,
    config: ConfigFile = None,
    settings: Settings = None,
    total_images: TotalImages = None,
    batch_size: BatchSize = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order, levels, times and noise.")] = None,
    max_seconds: MaxSeconds = None,
    resume: Resume = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Shards → checkpoints. Under torchrun every process is a rank."""
    from trainer.data.shards import open_index

    base = _base(preset_name, method, out, quiet)
    if pixel_stage and method_of(base) is not LATENT_FORCING:
        raise UsageError("--pixel-stage trains a network of Latent Forcing: add --method latent-forcing")
    flags = {"total_images": total_images, "batch_size": batch_size, "seed": seed, "max_seconds": max_seconds}
    given = {name: value for name, value in flags.items() if value is not None}
    in_file = flattened(_load_yaml(config)) if config else {}
    given |= {"pixel_stage": True} if pixel_stage else {}
    asked = {**in_file, **_assignments(settings or []), **given}
    index = open_index(shards)
    resolved = registry.fit_to_shards(with_settings(base, asked), index, asked)
    if dry_run:
        from trainer.training.run_folder import check_same_run, find_origin

        check_same_run(out, find_origin(out, resume), resolved, index)
        print_result(to_mapping(resolved), as_json)
        return
    _run_and_print(
        lambda: registry.train(resolved, shards, str(out), resume, quiet), resolved, as_json, quiet
    )


def train_decoder(
    shards: Annotated[str, typer.Argument(help="Shards built with --images, or their build folder or URL.")],
    out: Annotated[
        Path,
        typer.Option(
            **PATH, help="Folder of run and decoder; RUN/decoder is found by `sample` and `report`."
        ),
    ],
    size: Annotated[
        str | None, typer.Option(help="tiny, B, L or XL. Default: what the folder holds, else XL.")
    ] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    lpips: Annotated[
        Path | None,
        typer.Option(
            **reads("the folder of those weights"),
            help="Folder with the weights of a perceptual loss: vgg16 and lpips.",
        ),
    ] = None,
    gan: Annotated[
        Path | None,
        typer.Option(**reads("a file of weights"), help="Weights of DINO's ViT-S/8 for an adversarial loss."),
    ] = None,
    total_images: TotalImages = None,
    batch_size: BatchSize = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and noise.")] = None,
    max_seconds: MaxSeconds = None,
    resume: Resume = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Shards with pictures → a decoder from features to pixels, for --decoder."""
    flags = {
        "lpips_weights": lpips and str(lpips),
        "gan_weights": gan and str(gan),
        "total_images": total_images,
        "batch_size": batch_size,
        "seed": seed,
        "max_seconds": max_seconds,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    asked = {**(_load_yaml(config) if config else {}), **_assignments(settings or []), **given}
    resolved = with_settings(_decoder_base(size, out, quiet), asked)
    if dry_run:
        print_result(to_mapping(resolved), as_json)
        return
    from trainer.decode import train as room  # loads torch, which no refusal above needs

    _run_and_print(
        lambda: room.train_decoder(resolved, shards, str(out), resume, quiet), resolved, as_json, quiet
    )


def presets(as_json: AsJson = False) -> None:
    """Named configurations; with --json every field of each."""
    if as_json:
        print_result({name: to_mapping(make()) for name, make in all_presets().items()}, as_json)
        return
    rows = []
    for name, make in all_presets().items():
        config, about = make(), (inspect.getdoc(make) or "").splitlines()[0]
        shape = (config.model.width, config.model.depth, config.batch_size)
        rows.append((name, method_of(config).name, *map(str, shape), f"{config.total_images:,}", about))
    print_cells(("preset", "method", "width", "depth", "batch", "images", "about"), rows)


def _base(preset_name: str | None, method: str | None, out: Path, quiet: bool) -> Any:
    """The configuration before file and flags: the preset, or else what the run folder holds."""
    if preset_name is None and method is None:
        from trainer.training.run_folder import CONFIG, read_config  # loads torch

        if (stored := out / CONFIG).exists():
            return config_of(read_config(out)["config"], str(stored))
    config = preset_of(preset_name, method)
    if preset_name is None and not quiet:
        _say_without_cuda(f"preset {config.preset}", f"--preset {method_of(config).small_preset}")
    return config


def _decoder_base(size: str | None, out: Path, quiet: bool) -> DecoderConfig:
    """The configuration before file and flags: that of the size, or else what the folder holds."""
    if size is None:
        from trainer.training.run_folder import CONFIG, read_config  # loads torch

        if (stored := out / CONFIG).exists():
            return checked(DecoderConfig, read_config(out)["config"], str(stored))
    if size is None and not quiet:
        _say_without_cuda("size XL", "--size tiny")
    return decoder_preset(size or "XL")


def _say_without_cuda(default: str, small: str) -> None:
    """Name the small network where nobody asked for the large one, and no device is there for it."""
    import torch

    if not torch.cuda.is_available() and os.environ.get("RANK", "0") == "0":
        stderr.print(
            f"{default}, the default, is made for GPUs, and this machine has no CUDA device: {small} trains on CPU",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _run_and_print(run: Callable[[], Any], config: Any, as_json: bool, quiet: bool) -> None:
    """Train with the resolved configuration on stderr and the summary on stdout, both by the main rank."""
    is_main = os.environ.get("RANK", "0") == "0"
    if not quiet and is_main:
        text = yaml.safe_dump(to_mapping(config), sort_keys=False).rstrip()
        stderr.print(text, markup=False, highlight=False, style="dim")
    try:
        summary = run()
    except KeyboardInterrupt:
        stderr.print("stopped; the same command goes on from the last checkpoint")
        raise typer.Exit(130) from None
    if is_main:
        print_result(dataclasses.asdict(summary), as_json)


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"config file {path}: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"config file {path}: found {type(content).__name__}, expected fields by name")
    return content


def _assignments(settings: Sequence[str]) -> dict[str, Any]:
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: expected name=value, for example optim.lr=0.005")
        try:
            values[name.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UsageError(f"--set {setting}: {text!r} is no value of YAML") from None
    return values

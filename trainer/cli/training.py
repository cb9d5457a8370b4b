"""The verbs `train`, `train-decoder` and `presets`: configuration from preset, file and flags, then the loop."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import typer

from hierarchy_builder.errors import UsageError
from hierarchy_builder.fields import fields_of_file, flattened, sentences, to_mapping
from hierarchy_builder.files.remote import is_remote
from hierarchy_builder.files.untrusted.documents import parse_yaml
from hierarchy_builder.flags import OUTPUT, PLACE, REQUIRED, argument, option, switch, takes
from hierarchy_builder.terminal import print_cells, print_result, say, say_next, show_config, stderr
from trainer.calls import base_config
from trainer.cli.options import FIELDS, NEW_RUN, TRAINING, reads
from trainer.decode.config import DecoderConfig, DecoderSize
from trainer.methods import registry
from trainer.methods.registry import (
    LATENT_FORCING,
    METHODS,
    TRAJECTORY_FORCING,
    Method,
    all_presets,
    method_named,
    method_of,
)
from trainer.methods.trajectory_forcing.presets import decoder_preset
from trainer.training.config import checked, with_settings

METHOD_NAMES = "|".join(METHODS)
SHARDS = PLACE | {"kind": list[str], "metavar": "SHARDS"}
SETS = "several are read as one set: DIR DIR …, 'DIR-*', or a .txt file of one in a line."


@takes(
    shards=argument(f"Finished shard folder, its build folder, or an fsspec URL; {SETS}", **SHARDS),
    out=option("Run folder or URL; the same command resumes there.", default=REQUIRED, **NEW_RUN),
    preset_name=option(
        "Preset to start from; `trainer presets` lists them. Default: the configuration in RUN, or else what "
        "`trainer presets --suggest SHARDS` prints.",
        "--preset",
    ),
    method=option("Method to train. Default: that of the preset, or else of RUN.", metavar=METHOD_NAMES),
    pixel_stage=switch("Latent Forcing: train one network of all levels and then pixels.", "--pixel-stage"),
    **TRAINING,
)
def train(
    shards: list[str], out: Path, preset_name: str | None, method: str | None, pixel_stage: bool, **given: Any
) -> None:
    """Train a network on shards and write checkpoints; under torchrun every process is a rank."""
    from trainer.data.shards import open_index

    resume, quiet = given["resume"], given["quiet"]
    index = open_index(shards)
    base = base_config(preset_name, method, index, out, resume, given["config"] is not None, quiet)
    if pixel_stage and method_of(base) is not LATENT_FORCING:
        raise UsageError("--pixel-stage trains a network of Latent Forcing: add --method latent-forcing")
    asked = asked_fields(given, FIELDS) | ({"pixel_stage": True} if pixel_stage else {})
    resolved = registry.fit_to_shards(with_settings(base, asked), index, asked)
    if given["dry_run"]:
        from trainer.training.run_folder import check_same_run, find_origin, settled
        from trainer.training.weights import best_device

        origin = find_origin(out, resume)
        check_same_run(out, origin, resolved, index)
        print_result(to_mapping(settled(resolved, out, origin, best_device(None))), given["as_json"])
        return
    from trainer.training.mirror import named  # loads torch

    draw = commands_for(run := named(out))
    draws_pixels = index.encoder.get("decoder") or method_of(resolved) is LATENT_FORCING
    if not draws_pixels and not (out / "decoder").exists():
        draw.insert(0, ("trainer", "train-decoder", *shards, "--out", run / "decoder"))
    run_and_print(lambda: registry.train(resolved, index, str(out), resume, quiet), resolved, given, draw)


LOSSES = {
    "lpips_weights": option(
        sentences(DecoderConfig)["lpips_weights"], "--lpips", **reads("the folder of those weights")
    ),
    "gan_weights": option(sentences(DecoderConfig)["gan_weights"], "--gan", **reads("a file of weights")),
}


@takes(
    shards=argument(f"Shards built with --images, or their build folder or URL; {SETS}", **SHARDS),
    out=option(
        "Folder or URL of the run and of the decoder; `sample` and `report` find RUN/decoder by themselves.",
        default=REQUIRED,
        **NEW_RUN,
    ),
    size=option(
        "Shape of the decoder. Default: that of the run in the folder, else XL.",
        metavar="|".join(get_args(DecoderSize)),
    ),
    **(LOSSES | TRAINING),
)
def train_decoder(shards: list[str], out: Path, size: str | None, **given: Any) -> None:
    """Train a decoder from features to pixels on shards with pictures, for `--decoder` of other verbs."""
    resume, quiet = given["resume"], given["quiet"]
    given |= {name: given[name] and str(given[name]) for name in LOSSES}
    resolved = with_settings(_decoder_base(size, out, quiet), asked_fields(given, LOSSES | FIELDS))
    if given["dry_run"]:
        print_result(to_mapping(resolved), given["as_json"])
        return
    from trainer.decode import train as training  # loads torch, which no refusal above needs

    run_and_print(lambda: training.train_decoder(resolved, shards, str(out), resume, quiet), resolved, given)


@takes(
    suggest=option(
        "Print what to train on these shards with the device of this machine, and its cost; may be given several "
        "times.",
        **SHARDS,
    ),
    method=option(
        f"With --suggest: the method to train. Default: {TRAJECTORY_FORCING.name}.", metavar=METHOD_NAMES
    ),
    **OUTPUT,
)
def presets(suggest: list[str] | None, method: str | None, as_json: bool, quiet: bool) -> None:
    """List named configurations, with --json every field of each; or suggest one for your shards."""
    if suggest:
        row = TRAJECTORY_FORCING if method is None else method_named(method)
        _print_suggestion(suggest, row, as_json, quiet)
        return
    if method is not None:
        raise UsageError("--method is for --suggest SHARDS: the list holds the presets of all methods")
    if as_json:
        print_result({name: to_mapping(make()) for name, make in all_presets().items()}, as_json)
        return
    rows, texts = [], []
    for name, make in all_presets().items():
        config = make()
        shape = (config.model.width, config.model.depth, config.batch_size)
        rows.append((name, method_of(config).name, *map(str, shape), _shortly(config.total_images)))
        texts.append((name, (inspect.getdoc(make) or "").splitlines()[0]))
    print_cells(("preset", "method", "width", "depth", "batch", "images"), rows)
    print_cells(("preset", "about"), texts)


def _shortly(images: int) -> str:
    """`9,000`, `102.4 M`."""
    return f"{images:,}" if images < 1_000_000 else f"{images / 1e6:g} M"


def _print_suggestion(shards: list[str], method: Method, as_json: bool, quiet: bool) -> None:
    """What `train` would take on these shards without a preset, and what it costs."""
    if len(method.load("presets")) == 1:
        raise UsageError(
            f"{method.name} has the one preset {method.default_preset}: there is nothing to choose"
        )
    from trainer.data.shards import open_index
    from trainer.methods.machine import device_at_hand, hours_of, suggestion_for  # loads torch

    device = device_at_hand()
    index = open_index(shards)
    found = suggestion_for(method, index, device)
    hours, how = hours_of(found, device, index)
    config = found.config
    facts = {
        "preset": config.preset,
        "method": method.name,
        "reason": found.reason,
        "batch_size": config.batch_size,
        "micro_batch_size": config.micro_batch_size,
        "total_images": config.total_images,
        "epochs": round(found.epochs, 2),
        "parameters": found.parameters,
        "memory_gib": round(found.memory_bytes / 2**30, 3),
        "memory_is": "an upper estimate by the formula in trainer/methods/suggestion.py; unmeasured",
        "flops": float(f"{found.flops:.3g}"),
        "hours": float(f"{hours:.3g}"),
        "hours_are": how,
    }
    if as_json:
        print_result({**facts, "config": to_mapping(config)}, as_json)
        return
    share = "" if config.micro_batch_size is None else f", {config.micro_batch_size} at a time"
    shown = {
        "preset": f"{config.preset} ({method.name}), {found.parameters:,} parameters",
        "why": found.reason,
        "batch": f"{config.batch_size} images{share}",
        "length": f"{config.total_images:,} images, {found.epochs:.3g} epochs",
        "memory": f"{facts['memory_gib']:.3g} GiB, {facts['memory_is']}",
        "time": f"{facts['hours']:g} hours, {how}",
    }
    print_result(shown, as_json)
    flags = () if method is TRAJECTORY_FORCING else ("--method", method.name)
    is_one_folder = len(shards) == 1 and Path(shards[0]).is_dir()
    out = f"{shards[0].rstrip('/')}-run" if is_one_folder else "RUN"
    say_next(
        "train takes this preset unless --preset names another; --set changes single fields",
        [("trainer", "train", *shards, "--out", out, *flags)],
        quiet,
    )


def _decoder_base(size: str | None, out: Path, quiet: bool) -> DecoderConfig:
    """The configuration before file and flags: that of the size, or else what the folder holds, or else size XL."""
    if size is not None:
        return decoder_preset(size)
    import torch

    from trainer.training.run_folder import CONFIG, read_config  # loads torch

    if (stored := out / CONFIG).exists():
        return checked(DecoderConfig, read_config(out)["config"], str(stored))
    if not torch.cuda.is_available() and not quiet and _is_main():
        say(
            "size XL, the default, is made for GPUs, and this machine has no CUDA device: --size tiny trains on CPU"
        )
    return decoder_preset("XL")


def commands_for(run: Path) -> list[tuple[Any, ...]]:
    """Commands that draw from a run, and report on it."""
    drawn = "drawn" if is_remote(run) else run / "drawn"
    return [("trainer", "sample", run, "--labels", "0", "--out", drawn), ("trainer", "report", run)]


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def run_and_print(
    run: Callable[[], Any], config: Any, given: Mapping[str, Any], after: Sequence[Sequence[object]] = ()
) -> None:
    """Train with the resolved configuration on stderr and the summary on stdout, both by the main rank.

    given: the options of the verb. after: commands that go on from a finished run.
    """
    show_config(to_mapping(config), given["quiet"] or not _is_main())
    try:
        summary = run()
    except KeyboardInterrupt:
        stderr.print("stopped; the same command goes on from the last checkpoint")
        raise typer.Exit(130) from None
    if _is_main():
        print_result(dataclasses.asdict(summary), given["as_json"])
        say_next(f"{summary.checkpoint} holds the newest weights", after, given["quiet"])


def asked_fields(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Fields by dotted name: options of these names over --set over the file of --config."""
    options = {name: given[name] for name in names if given[name] is not None}
    in_file = flattened(fields_of_file(given["config"])) if given["config"] else {}
    return {**in_file, **_assignments(given["settings"] or []), **options}


def _assignments(settings: Sequence[str]) -> dict[str, Any]:
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: expected name=value, for example optim.lr=0.005")
        try:
            values[name.strip()] = parse_yaml(text)
        except ValueError:
            raise UsageError(f"--set {setting}: {text!r} is no value of YAML") from None
    return values

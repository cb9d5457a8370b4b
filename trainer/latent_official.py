"""Read and write checkpoints of Latent Forcing's release: a folder with config.json and model.safetensors.

The release is channels-first and counts time from noise 0 to data 1. What is turned round at this border are
weights: convolutions over patches become linear layers over [rows, columns, channels], and matrices that make
several things at once are cut into one for each. The clock is turned round inside the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint import load_tensors
from trainer.errors import MismatchError, UsageError
from trainer.latent_config import LatentModelConfig
from trainer.pixel_latent import PIXEL_CHANNELS, PixelLatentTransformer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CONFIG_NAMES = {
    "patch_px": "patch_size",
    "in_channels": "dino_in_channels",
    "num_classes": "num_classes",
    "width": "hidden_size",
    "depth": "depth",
    "num_heads": "num_heads",
    "pixel_bottleneck": "bottleneck_dim",
    "latent_bottleneck": "bottleneck_dim_dino",
    "num_class_tokens": "in_context_len",
    "class_tokens_at": "in_context_start",
    "expert_depth": "dh_depth",
    "expert_width": "dh_hidden_size",
}
"""Fields of LatentModelConfig and the release's names for them; its `input_size` is the side of a picture."""

RENAMES = [
    (r"^pixel_embedder\.", "pixel_embedder."),
    (r"^latent_embedder\.", "dino_embedder."),
    (r"_embedder\.down\.", "_embedder.proj1."),
    (r"_embedder\.up\.", "_embedder.proj2."),
    (r"^pixel_clock\.", "t_pixel_embedder."),
    (r"^latent_clocks\.0\.", "t_dino_embedder."),
    (r"^(t_\w+_embedder)\.hidden\.", r"\1.mlp.0."),
    (r"^(t_\w+_embedder)\.out\.", r"\1.mlp.2."),
    (r"^class_table\.", "y_embedder.embedding_table."),
    (r"^class_tokens$", "in_context_posemb"),
    (r"^pixel_expert\.projection\.", "dh_pixel_proj."),
    (r"^latent_expert\.projection\.", "dh_dino_proj."),
    (r"^pixel_expert\.blocks\.", "dh_blocks_pixel."),
    (r"^latent_expert\.blocks\.", "dh_blocks_dino."),
    (r"^pixel_expert\.output\.", "final_layer_pixel."),
    (r"^latent_expert\.output\.", "final_layer_dino."),
    (r"^output\.", "final_layer."),
    (r"^(final_layer\w*)\.norm\.", r"\1.norm_final."),
    (r"^(final_layer\w*)\.out\.", r"\1.linear."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
    (r"\.attention_norm\.", ".norm1."),
    (r"\.mlp_norm\.", ".norm2."),
    (r"\.attention\.([qk])_norm\.", r".attn.\1_norm."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"\.mlp\.w2\.", ".mlp.w3."),
]
"""Our parameter names → the release's, applied in order, but for those that the release keeps in one matrix."""
STACKED = [
    (r"\.attention\.([qkv])\.", ".attn.qkv.", ("q", "k", "v")),
    (r"\.mlp\.(w[13])\.", ".mlp.w12.", ("w1", "w3")),
]
"""Ours, the matrix of the release that holds it, and what lies there one below the other."""
POSITIONS = "pos_embed"


def load_latent_forcing(folder: str | Path) -> PixelLatentTransformer:
    """Read the network of a folder of the release, in evaluation mode.

    It is called as network(pixels, latents, t_pixels=, t_latents=, label=) → (pixels, latents): channels-last, and
    t = 1 is noise. Raises UsageError if the configuration is incomplete, TrainerError if the weights cannot be read,
    MismatchError if they do not fit it.
    """
    folder = Path(folder)
    model = PixelLatentTransformer(read_config(folder / CONFIG))
    given = load_tensors(folder / WEIGHTS)
    found = {name: _taken(name, given) for name in model.state_dict()}
    _check(folder / WEIGHTS, model, found, given)
    model.load_state_dict(found, assign=False)
    return model.eval()


def save_latent_forcing(model: PixelLatentTransformer, folder: str | Path) -> None:
    """Write `model` as a folder of the release. Raises UsageError for what the release has no place for."""
    c = model.config
    if c.num_canvases != 1 or c.grid[0] != c.grid[1]:
        raise UsageError(f"{c.num_canvases} canvases on a grid of {c.grid}, expected 1 on a square one")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"input_size": c.image_px[0], "in_channels": PIXEL_CHANNELS}
    config |= {theirs: getattr(c, ours) for ours, theirs in CONFIG_NAMES.items()}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        theirs, part, _ = official_name(name)
        parts.setdefault(theirs, {})[part] = tensor.detach().cpu()
    tensors = {
        name: _outward(name, torch.cat([part for _, part in sorted(found.items())]), c)
        for name, found in parts.items()
    }
    tensors[POSITIONS] = model.positions.cpu()[None]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def read_config(path: str | Path) -> LatentModelConfig:
    """The network that a configuration of the release describes. Raises UsageError if it is none."""
    try:
        given: Mapping[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        fields = {ours: int(given[theirs]) for ours, theirs in CONFIG_NAMES.items()}
        side, rest = divmod(int(given["input_size"]), fields["patch_px"])
        if rest:
            raise ValueError(f"input_size {given['input_size']} is no multiple of patch_size")
        return LatentModelConfig(grid=(side, side), **fields)  # type: ignore[arg-type]
    except (OSError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{path} is no configuration of Latent Forcing: {error!r}") from None


def official_name(name: str) -> tuple[str, int, int]:
    """The release's array that holds a parameter of ours, which part of it, and of how many, along its rows."""
    part, parts = 0, 1
    for pattern, replacement, order in STACKED:
        if match := re.search(pattern, name):
            part, parts = order.index(match[1]), len(order)
            name = re.sub(pattern, replacement, name)
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name, part, parts


def _taken(name: str, given: Mapping[str, Tensor]) -> Tensor | None:
    """Our parameter out of the release's arrays, None where they lack it."""
    theirs, part, parts = official_name(name)
    if theirs not in given:
        return None
    array = given[theirs]
    if array.ndim == 4:  # a convolution over a patch: [out, channels, rows, columns]
        array = array.permute(0, 2, 3, 1).flatten(1)
    return array.chunk(parts)[part] if parts > 1 else array


def _outward(name: str, array: Tensor, config: LatentModelConfig) -> Tensor:
    """An array as the release shapes it: embedders are convolutions."""
    if "_embedder.proj" not in name or array.ndim != 2:
        return array
    side = config.patch_px if name.startswith("pixel_embedder.proj1") else 1
    return array.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)


def _check(
    path: Path, model: PixelLatentTransformer, found: Mapping[str, Tensor | None], given: Mapping[str, Tensor]
) -> None:
    problems = []
    for name, own in model.state_dict().items():
        tensor, theirs = found[name], official_name(name)[0]
        if tensor is None:
            problems.append(f"{theirs} is missing")
        elif tensor.shape != own.shape:
            problems.append(
                f"{theirs} has shape {tuple(given[theirs].shape)}, which does not give {tuple(own.shape)}"
            )
    unknown = given.keys() - {official_name(name)[0] for name in found} - {POSITIONS}
    problems += [f"{name} has no place in the network" for name in sorted(unknown)]
    positions = given.get(POSITIONS)
    if positions is not None and not torch.allclose(positions[0].float(), model.positions, atol=1e-5):
        problems.append(f"{POSITIONS} is not the fixed embedding of a grid of {model.config.grid}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise MismatchError(f"{path} does not fit {CONFIG}: {'; '.join(problems[:3])}{more}")

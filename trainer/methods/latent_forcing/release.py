"""Reads checkpoints of the authors' release of Latent Forcing: a folder with config.json and model.safetensors.

The release is channels-first and counts time from noise 0 to data 1. This module converts the weights: convolutions
over patches become linear layers over [rows, columns, channels], and a matrix that computes several things at once is
cut into one matrix for each. The network itself converts the time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hierarchy_builder.errors import MismatchError, UsageError
from trainer.methods.latent_forcing.config import LatentModelConfig
from trainer.methods.latent_forcing.network import PIXEL_CHANNELS, PixelLatentTransformer
from trainer.training.config import checked
from trainer.training.release_files import check_weights, read_fields, read_weights

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
"""Our parameter names → the release's, applied in order; matrices that the release stacks are in STACKED."""
STACKED = [
    (r"\.attention\.([qkv])\.", ".attn.qkv.", ("q", "k", "v")),
    (r"\.mlp\.(w[13])\.", ".mlp.w12.", ("w1", "w3")),
]
"""Our matrices, the matrix of the release that stacks them, and their order in it."""
POSITIONS = "pos_embed"


def load_latent_forcing(folder: str | Path) -> PixelLatentTransformer:
    """Read the network of a folder of the release, in evaluation mode.

    Call it as network(pixels, latents, t_pixels=, t_latents=, label=) → (pixels, latents); arrays are channels-last,
    and t = 1 is noise. Raises UsageError if the configuration is incomplete, TrainerError if the weights cannot be
    read, MismatchError if they do not fit it or are not finite.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    given = read_weights(folder / WEIGHTS)
    with torch.device("meta"):
        ours = to_official(PixelLatentTransformer(config))
    expected = {name: array.shape for name, array in ours.items() if name != POSITIONS or name in given}
    check_weights(folder / WEIGHTS, given, expected)
    model = PixelLatentTransformer(config)
    _check_positions(folder / WEIGHTS, model, given)
    model.load_state_dict({name: _taken(name, given) for name in model.state_dict()})
    return model.eval()


def to_official(model: PixelLatentTransformer) -> dict[str, Tensor]:
    """Convert the weights of a network to the names and shapes of the release."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        theirs, part, _ = official_name(name)
        parts.setdefault(theirs, {})[part] = tensor.detach()
    arrays = {
        name: _outward(name, torch.cat([part for _, part in sorted(found.items())]), model.config)
        for name, found in parts.items()
    }
    return arrays | {POSITIONS: model.positions[None]}


def read_config(path: str | Path) -> LatentModelConfig:
    """Read the network that a configuration of the release describes. Raises UsageError for any other file."""
    path = Path(path)
    given = {"in_channels": PIXEL_CHANNELS} | read_fields(path)
    needed = ("input_size", "in_channels", *CONFIG_NAMES.values())
    wrong = [
        f"{name} is {given.get(name, 'missing')!r}" for name in needed if type(given.get(name)) is not int
    ]
    if wrong:
        raise UsageError(
            f"{path} is no configuration of Latent Forcing: {', '.join(wrong[:3])}; expected whole numbers"
        )
    side, rest = divmod(given["input_size"], given["patch_size"] or 1)
    if rest or given["in_channels"] != PIXEL_CHANNELS:
        raise UsageError(
            f"{path}: pictures of {given['input_size']} pixels a side and {given['in_channels']} channels, expected "
            f"a multiple of patch_size {given['patch_size']}, and {PIXEL_CHANNELS}"
        )
    fields = {ours: given[theirs] for ours, theirs in CONFIG_NAMES.items()}
    return checked(LatentModelConfig, fields | {"grid": (side, side)}, str(path))


def official_name(name: str) -> tuple[str, int, int]:
    """Return the release's array that holds one of our parameters, its part along the rows, and the number of parts."""
    part, parts = 0, 1
    for pattern, replacement, order in STACKED:
        if match := re.search(pattern, name):
            part, parts = order.index(match[1]), len(order)
            name = re.sub(pattern, replacement, name)
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name, part, parts


def _taken(name: str, given: Mapping[str, Tensor]) -> Tensor:
    """Take one of our parameters from the release's arrays."""
    theirs, part, parts = official_name(name)
    array = given[theirs]
    if array.ndim == 4:  # a convolution over a patch: [out, channels, rows, columns]
        array = array.permute(0, 2, 3, 1).flatten(1)
    return array.chunk(parts)[part]


def _outward(name: str, array: Tensor, config: LatentModelConfig) -> Tensor:
    """Shape an array as the release does, where embedders are convolutions."""
    if "_embedder.proj" not in name or array.ndim != 2:
        return array
    side = config.patch_px if name.startswith("pixel_embedder.proj1") else 1
    return array.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)


def _check_positions(path: Path, model: PixelLatentTransformer, given: Mapping[str, Tensor]) -> None:
    if POSITIONS not in given:
        return
    positions = given[POSITIONS]
    rounding = max(1e-5, torch.finfo(positions.dtype).eps)
    if not torch.allclose(positions[0].float(), model.positions, atol=rounding):
        raise MismatchError(
            f"{path}: {POSITIONS} is not the fixed embedding of a grid of {model.config.grid}"
        )

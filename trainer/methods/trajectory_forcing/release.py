"""Read and write the checkpoints of the authors' JAX release, without JAX.

A checkpoint is one msgpack map: step, params, ema_params {"500", "1000", "2000"}, opt_state. Arrays are extension
type 1 holding (shape, dtype name, bytes); larger ones are cut into chunks. Dense kernels are [in, out] there and
[out, in] here; every other array has the same shape on both sides. A file is read as a stream in which only the
requested weights are decoded, and written array by array, so memory stays near the size of one network.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import torch
from torch import Tensor

from hierarchy_builder.errors import MismatchError, UsageError
from hierarchy_builder.files.whole import atomic_file
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.networks.config import ModelConfig
from trainer.training.config import checked
from trainer.training.release_files import check_weights, read_fields

NDARRAY_EXTENSION = 1
CHUNKED = "__msgpack_chunked_array__"
AVERAGE = "ema_params/"
"""Beginning of the names of weight averages."""
CHUNK_BYTES = 2**30
"""Flax cuts arrays larger than this."""
DTYPES = ("float32", "float64", "float16", "bfloat16", "int32")

DAMAGE = (RuntimeError, msgpack.UnpackException, ValueError, TypeError, KeyError, OverflowError, MemoryError)
"""Errors that reading the bytes of another or a damaged file can raise."""

SIZES = {"B": (768, 16, 12), "L": (1024, 32, 16), "H": (1280, 48, 16)}
"""Width, depth and heads by the letter in `model_str`."""

MLP_RATIO = 8 / 3
"""Hidden width of the MLP of all released networks, relative to the width."""
PUBLISHED = (
    "The authors' checkpoints: https://huggingface.co/mervekocabas/TrajectoryForcing, their code: "
    "https://github.com/mervekocabas/TrajectoryForcing, the paper: https://arxiv.org/abs/2606.22527"
)

CONFIG_NAMES = {
    "in_channels": "in_channels",
    "num_classes": "num_classes",
    "num_levels": "num_levels",
    "width": "hidden_size",
    "depth": "depth",
    "head_depth": "aux_head_depth",
    "num_heads": "num_heads",
    "num_class_tokens": "num_class_tokens",
    "num_time_tokens": "num_time_tokens",
    "num_level_tokens": "num_level_tokens",
    "guidance": "use_cfg",
    "num_guidance_tokens": "num_cfg_tokens",
    "num_interval_tokens": "num_interval_tokens",
    "mlp_ratio": "mlp_ratio",
    "rope_theta": "rope_theta",
    "norm_eps": "norm_eps",
}
"""Fields of ModelConfig and the release's names for them."""

RENAMES = [
    (r"^(x|prev)_embedder\.", r"\1_embedder/proj/_flax_linear/"),
    (r"^fusion\.", "cond_fuse_proj/_flax_linear/"),
    (r"^class_table$", "y_embedder/embedding_table/embedding"),
    (r"^level_table$", "level_embedder/embedding_table/embedding"),
    (r"^positions$", "pos_embed"),
    (r"^time_embedder\.", "h_embedder."),
    (r"^t_min_embedder\.", "cfg_t_start_embedder."),
    (r"^t_max_embedder\.", "cfg_t_end_embedder."),
    (r"_embedder\.hidden\.", "_embedder/mlp/layers_0/_flax_linear/"),
    (r"_embedder\.out\.", "_embedder/mlp/layers_2/_flax_linear/"),
    (r"^shared_blocks\.(\d+)\.", r"shared_blocks_\1/"),
    (r"^([uv])_blocks\.(\d+)\.", r"\1_heads_\2/"),
    (r"^([uv])_norm\.", r"\1_final_layer/norm/"),
    (r"^([uv])_out\.", r"\1_final_layer/linear/_flax_linear/"),
    (r"/attention_gate$", "/attn_scale"),
    (r"/mlp_gate$", "/mlp_scale"),
    (r"/attention_norm\.", "/norm1/"),
    (r"/mlp_norm\.", "/norm2/"),
    (r"/attention\.([qkv])_norm\.", r"/attn/\1_norm/"),
    (r"/attention\.(q|k|v|out)\.", r"/attn/\1_proj/_flax_linear/"),
    (r"/mlp\.(w\d)\.", r"/mlp/\1/_flax_linear/"),
    (r"weight$", "kernel"),
]
"""Our parameter names → the release's, applied in order."""


def load_checkpoint(
    path: str | os.PathLike[str],
    config: ModelConfig | Mapping[str, Any] | str | os.PathLike[str],
    ema: int | None = 500,
) -> TrajectoryTransformer:
    """Read a checkpoint file of the release into a network, in evaluation mode.

    config: the release's fields as a mapping or JSON file, or a ModelConfig. ema: half-life in kimg of the weight
    average to take; None takes the raw weights.
    Raises UsageError if the configuration is incomplete or describes a network of another kind, MismatchError if the
    file is damaged, lacks the average, or its arrays do not fit the configuration.
    """
    sizes = config if isinstance(config, ModelConfig) else read_config(config)
    with torch.device("meta"):  # a configuration of another file may ask for any memory
        shapes = TrajectoryTransformer(sizes)
    weights = from_official(shapes, read_part(path, part_name(ema)), path)
    model = TrajectoryTransformer(sizes)
    model.load_state_dict(weights)
    return model.eval()


def from_official(
    model: TrajectoryTransformer, arrays: Mapping[str, Tensor], path: object
) -> dict[str, Tensor]:
    """Convert arrays, named by the release's paths, into weights: float32, under our names.

    Raises MismatchError unless they fit the model and are finite.
    """
    check_weights(path, arrays, official_shapes(model), _hint)
    return {name: turned(arrays[official_name(name)]).float() for name, _ in model.named_parameters()}


def official_shapes(model: TrajectoryTransformer) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter in the release, by the release's path."""
    return {official_name(name): tuple(turned(p).shape) for name, p in model.named_parameters()}


def turned(array: Tensor) -> Tensor:
    """Turn a matrix [in, out] of the release into one of ours, [out, in], or back; other arrays stay as they are."""
    return array.mT if array.ndim == 2 else array


def read_config(
    config: Mapping[str, Any] | str | os.PathLike[str], where: str = "configuration of the checkpoint"
) -> ModelConfig:
    """Read the network that a configuration of the release describes; its other fields are ignored.

    where: name of the configuration in messages, for a mapping.
    Raises UsageError if a size is missing, or if the network lacks a part that ours always has.
    """
    given = config if isinstance(config, Mapping) else read_fields(Path(config))
    where = where if isinstance(config, Mapping) else str(config)
    for switch in ("use_level_cond", "use_prev_cond", "use_token_embed"):
        if not given.get(switch, True):
            raise UsageError(
                f"{where}: {switch} is false; only networks with all conditioning inputs can be read"
            )
    if (mode := given.get("cond_token_mode", "fused")) != "fused":
        raise UsageError(f"{where}: cond_token_mode is {mode!r}; only 'fused' checkpoints can be read")
    fields: dict[str, Any] = {ours: given[theirs] for ours, theirs in CONFIG_NAMES.items() if theirs in given}
    sizes = ("width", "depth", "num_heads")
    if letter := size_letter(given):
        fields = dict(zip(sizes, SIZES[letter], strict=True)) | fields
    needed = ("in_channels", "num_classes", "num_levels", *sizes)
    missing = {CONFIG_NAMES[name] for name in needed if name not in fields} | ({"input_size"} - given.keys())
    if missing:
        raise UsageError(
            f"{where} lacks {', '.join(sorted(missing))}; give the configuration it was trained with"
        )
    fields["grid"] = (given["input_size"], given["input_size"])
    return checked(ModelConfig, fields, where)


def size_letter(given: Mapping[str, Any]) -> str | None:
    """Return B, L or H, if a configuration of the release names one of these sizes."""
    found = re.search(r"_([BLH])(_|$)", str(given.get("model_str", "")))
    return found and found[1]


def config_of(arrays: Mapping[str, Tensor], path: object) -> dict[str, Any]:
    """Read the release's configuration off the shapes of the weights, for a file that comes without config.json.

    The names are those of the release's config.json; `model_str` names B, L or H where the sizes are theirs.
    Raises MismatchError, naming what is missing, if the shapes are of no network of the release.
    """

    def size(name: str, axis: int) -> int:
        array = arrays.get(f"net/{name}")
        if array is None or not -array.ndim <= axis < array.ndim:
            raise MismatchError(
                f"{path}: {f'net/{name}'} is missing or has another form, so the sizes cannot be read from the "
                f"weights; it holds {len(arrays)} arrays, expected those of the TF-B, TF-L or TF-H release. "
                f"{PUBLISHED}"
            )
        return int(array.shape[axis])

    def blocks(kind: str) -> int:
        found = (re.match(rf"net/{kind}_(\d+)/", name) for name in arrays)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    width = size("class_tokens", -1)
    head_dim = size("u_heads_0/attn/q_norm/kernel", 0)
    hidden, guided = size("u_heads_0/mlp/w1/_flax_linear/kernel", 1), "net/omega_tokens" in arrays
    fields: dict[str, Any] = {
        "in_channels": size("x_embedder/proj/_flax_linear/kernel", 0),
        "num_classes": size("y_embedder/embedding_table/embedding", -2) - 1,
        "num_levels": size("level_embedder/embedding_table/embedding", -2) - 1,
        "hidden_size": width,
        "depth": blocks("shared_blocks") + blocks("u_heads"),
        "aux_head_depth": blocks("u_heads"),
        "num_heads": max(1, width // max(1, head_dim)),
        "use_cfg": guided,
        "mlp_ratio": MLP_RATIO if int(MLP_RATIO * width) == hidden else (hidden + 0.5) / width,
    }
    tokens = {"num_class_tokens": "class", "num_time_tokens": "time", "num_level_tokens": "level"}
    tokens |= {"num_cfg_tokens": "omega", "num_interval_tokens": "t_min"} if guided else {}
    fields |= {field: size(f"{name}_tokens", -2) for field, name in tokens.items()}
    prepended = sum(fields[field] for field in tokens) + fields.get("num_interval_tokens", 0)
    cells = size("pos_embed", -2) - prepended
    fields["input_size"] = math.isqrt(max(cells, 0))
    if fields["input_size"] ** 2 != cells or cells == 0:
        raise MismatchError(
            f"{path}: its positions leave {cells} image tokens beside {prepended} conditioning tokens, expected a "
            f"square grid. {PUBLISHED}"
        )
    for letter, sizes in SIZES.items():
        if sizes == (width, fields["depth"], fields["num_heads"]):
            fields["model_str"] = f"pmfDiT_{letter}_{fields['input_size']}"
    return fields


def write_checkpoint(path: str | os.PathLike[str], parts: Mapping[str, Any]) -> None:
    """Write a checkpoint file of the release atomically from its parts, nested maps of tensors and plain values.

    A part may be a function that returns it: it is called when the part is written, so that only one is in memory.
    """
    with atomic_file(Path(path)) as file:
        _pack(file, parts, msgpack.Packer())


def official_name(name: str) -> str:
    """Return the release's path of our parameter, such as net/shared_blocks_0/attn/q_proj/_flax_linear/kernel."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return f"net/{name}"


def official_config(config: ModelConfig) -> dict[str, Any]:
    """Return the release's configuration fields for a network, as `load_checkpoint` reads them."""
    others = {"fusion": "fused", "patch_size": 1, "start": "zeros"}
    found = {name: getattr(config, name) for name in others}
    if found != others or config.grid[0] != config.grid[1]:
        raise UsageError(
            f"grid {config.grid}, {found}: the release's format holds square grids and {others} only"
        )
    fields = dataclasses.asdict(config)
    return {"input_size": config.grid[0]} | {theirs: fields[ours] for ours, theirs in CONFIG_NAMES.items()}


def read_part(path: str | os.PathLike[str], name: str) -> Any:
    """Read one part of a checkpoint file, see `read_parts`. Raises MismatchError if the file lacks it."""
    names = []
    for found, content in read_parts(path, name.__eq__):
        if found == name:
            return content
        names.append(found)
    raise missing_part(name, names, path)


def read_parts(path: str | os.PathLike[str], wanted: Callable[[str], bool]) -> Iterator[tuple[str, Any]]:
    """Yield name and content of each part of a checkpoint file in its order: `step`, `params`, `ema_params/500`, …

    The content is a mapping of tensors by their path in the part; None for a part that is not `wanted`, which is
    skipped. Raises MismatchError if the file is damaged or not a checkpoint of the release.
    """
    with open(path, "rb") as file:
        try:
            yield from _parts(file, wanted)
        except DAMAGE as error:
            detail = str(error) or type(error).__name__
            raise MismatchError(
                f"{path} is truncated or not a checkpoint of the release, which is one msgpack file ({detail}): copy "
                f"it again. {PUBLISHED}"
            ) from None


def part_name(ema: int | str | None) -> str:
    """Return the name of the part with a weight average, or with the raw weights for None."""
    return "params" if ema is None else f"{AVERAGE}{ema}"


def missing_part(name: str, names: Iterable[str], path: object) -> MismatchError:
    """Make the error for a file that lacks a part; it lists the averages that are there. names: parts of the file."""
    there = [each.removeprefix(AVERAGE) for each in names if each.startswith(AVERAGE)]
    if name.startswith(AVERAGE) and (there or "params" in names):
        return MismatchError(
            f"{path} holds no weight average {name.removeprefix(AVERAGE)}; it holds: {', '.join(there) or 'none'} "
            "(ema=None takes the raw weights)"
        )
    what = "step" if name == "step" else "weights (params)"
    return MismatchError(f"{path} is not a checkpoint of the release: it holds no {what}")


def _parts(file: BinaryIO, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Any]]:
    size = os.fstat(file.fileno()).st_size
    most = min(size, 2**31 - 1)  # a list has at most as many entries as there are bytes
    limits = {"max_buffer_size": 0, "max_array_len": most, "max_map_len": most}
    hooks = {"ext_hook": _decode, "object_hook": _joined}
    unpacker = msgpack.Unpacker(file, raw=False, strict_map_key=False, **limits, **hooks)
    for part in _keys(unpacker):
        names = (f"{AVERAGE}{halflife}" for halflife in _keys(unpacker)) if part == "ema_params" else [part]
        for name in names:
            if wanted(name):
                content = unpacker.unpack()
                yield name, count_of(content) if name == "step" else dict(_flatten(content or {}))
                del content  # before the next part is read
            else:
                unpacker.skip()
                yield name, None
    if rest := size - unpacker.tell():
        raise ValueError(f"{rest} bytes after its end")


def count_of(value: object) -> int:
    """Convert an integer or an array of one integer to a number of steps. Raises ValueError for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if type(value) is not int or value < 0:
        raise ValueError(f"found {value!r} where a number of steps belongs")
    return value


def _keys(unpacker: msgpack.Unpacker) -> Iterator[str]:
    """Yield the keys of the next map; the caller reads the value of a key before it takes the next."""
    for _ in range(unpacker.read_map_header()):
        yield str(unpacker.unpack())


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every array under its path, joined by slashes."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}/{key}" if prefix else str(key))
    elif isinstance(tree, Tensor):
        yield prefix, tree
    else:
        raise ValueError(f"found {type(tree).__name__} where an array belongs")


def _joined(content: dict[str, Any]) -> Any:
    """Join the chunks of a large array; this happens while unpacking, and other maps stay as they are."""
    if CHUNKED not in content:
        return content
    shape, chunks = (
        [part[str(i)] for i in range(len(part))] for part in (content["shape"], content["chunks"])
    )
    return torch.cat(chunks).reshape(shape)


def _decode(code: int, data: bytes) -> Tensor:
    """Decode an array as flax writes it; this happens while unpacking, so that its bytes are not kept."""
    if code != NDARRAY_EXTENSION:
        raise ValueError(f"found extension type {code} where an array belongs")
    shape, dtype, content = msgpack.unpackb(data, raw=False)
    if dtype not in DTYPES:
        raise ValueError(f"array of type {dtype}, expected one of {', '.join(DTYPES)}")
    kind, values = getattr(torch, dtype), bytearray(memoryview(content))
    return (torch.frombuffer(values, dtype=kind) if values else torch.empty(0, dtype=kind)).reshape(shape)


def _pack(file: BinaryIO, content: Any, packer: msgpack.Packer) -> None:
    """Write nested maps array by array."""
    if callable(content):
        content = content()
    if isinstance(content, Tensor):
        content = _encode(content)
    if isinstance(content, Mapping):
        file.write(packer.pack_map_header(len(content)))
        for key, value in content.items():
            file.write(packer.pack(key))
            _pack(file, value, packer)
    else:
        file.write(packer.pack(content))


def _encode(tensor: Tensor) -> Any:
    """Encode a tensor as flax writes it, a large one as a map of chunks."""
    if tensor.nbytes > CHUNK_BYTES:
        parts = tensor.flatten().split(CHUNK_BYTES // tensor.element_size())
        return {CHUNKED: True, "shape": _numbered(tensor.shape), "chunks": _numbered(parts)}
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    content = (list(tensor.shape), str(tensor.dtype).removeprefix("torch."), data)
    return msgpack.ExtType(NDARRAY_EXTENSION, msgpack.packb(content))


def _numbered(values: Iterable[Any]) -> dict[str, Any]:
    return {str(i): value for i, value in enumerate(values)}


def to_official(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Nest CPU tensors under the release's names; values that are not tensors stay as they are."""
    tree: dict[str, Any] = {}
    for name, tensor in weights.items():
        *folders, leaf = official_name(name).split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[leaf] = turned(tensor.detach().cpu()) if isinstance(tensor, Tensor) else tensor
    return tree


def _hint(name: str, shape: tuple[int, ...]) -> str:
    """Name the field of the configuration that the shape of an array determines."""
    if name == "net/y_embedder/embedding_table/embedding" and len(shape) == 3:
        return f"the checkpoint has num_classes {shape[1] - 1}"
    if name == "net/level_embedder/embedding_table/embedding" and len(shape) == 3:
        return f"the checkpoint has num_levels {shape[1] - 1}"
    if name == "net/x_embedder/proj/_flax_linear/kernel" and len(shape) == 2:
        return f"the checkpoint has in_channels {shape[0]} and hidden_size {shape[1]}"
    return ""

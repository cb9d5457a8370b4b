"""The authors' checkpoints: parity of every network output, and what is said about damaged or foreign files."""

import json
from pathlib import Path

import msgpack
import pytest
import torch
from released import changed, golden_arrays, load, save_checkpoint, worst

from hierarchy_builder.errors import MismatchError, UsageError
from trainer.methods.trajectory_forcing.network import Guidance, TrajectoryTransformer
from trainer.methods.trajectory_forcing.release import (
    load_checkpoint,
    official_config,
    official_name,
    read_config,
    read_parts,
    write_checkpoint,
)
from trainer.networks.config import ModelConfig
from trainer.training.weights import WeightAverages


def forward_inputs(golden: Path) -> tuple[dict[str, torch.Tensor], dict]:
    arrays = golden_arrays(golden / "forward.npz")
    inputs = {name: arrays[name] for name in ("t", "r", "level", "prev")} | {"label": arrays["y"]}
    if golden.name.endswith("cfg"):
        inputs["guidance"] = Guidance(arrays["omega"], arrays["t_min"], arrays["t_max"])
    return arrays, inputs


# Tolerances of 1e-4 leave room for other summation orders; on one machine the differences are below 1e-6.


@torch.no_grad()
def test_forward_matches_the_release(golden):
    arrays, inputs = forward_inputs(golden)
    prediction = load(golden)(arrays["x"], **inputs)
    assert worst(prediction.u, arrays["u"]) < 1e-4
    assert worst(prediction.v, arrays["v"]) < 1e-4
    assert worst(prediction.x, arrays["x_pred"]) < 1e-4


@torch.no_grad()
def test_average_of_500_kimg_matches_the_release(golden):
    arrays, inputs = forward_inputs(golden)
    prediction = load(golden, ema=500)(arrays["x"], **inputs)
    assert worst(prediction.u, arrays["u_ema500"]) < 1e-4
    assert worst(prediction.x, arrays["x_pred_ema500"]) < 1e-4


def test_derivative_along_the_trajectory_matches_the_release(golden):
    arrays, inputs = forward_inputs(golden)
    model = load(golden)
    prediction, du_dt = model.forward_with_derivative(arrays["x"], arrays["v_c"], **inputs)
    assert worst(du_dt, arrays["du_dt"]) < 1e-4
    assert worst(prediction.u, arrays["u"]) < 1e-4
    assert worst(prediction.v, arrays["v"]) < 1e-4


@torch.no_grad()
def test_tangent_velocity_matches_the_release(golden):
    arrays, inputs = forward_inputs(golden)
    inputs["r"] = inputs["t"]
    if "guidance" in inputs:
        inputs["guidance"] = inputs["guidance"]._replace(t_min=torch.zeros(5), t_max=torch.ones(5))
    assert worst(load(golden)(arrays["x"], **inputs, heads="v").v, arrays["v_c"]) < 1e-4


def test_parameter_names_and_shapes_are_those_of_the_release(golden):
    shapes = json.loads((golden / "param_shapes.json").read_text())
    ours = {
        official_name(name): list(p.mT.shape if p.ndim == 2 else p.shape)
        for name, p in load(golden).named_parameters()
    }
    assert ours == shapes


def test_saved_checkpoint_reads_back_exactly(golden, tmp_path):
    model = load(golden)
    averages = WeightAverages(load(golden, ema=1000), (1000.0,))
    save_checkpoint(model, tmp_path / "checkpoint_7", averages=averages.state_dict(), step=7)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_7"]
    for ema, source in ((None, model), (1000, load(golden, ema=1000))):
        again = load_checkpoint(tmp_path / "checkpoint_7", official_config(model.config), ema=ema)
        for name, p in source.named_parameters():
            assert torch.equal(again.get_parameter(name), p), name


def test_large_arrays_are_chunked_and_joined(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.methods.trajectory_forcing.release.CHUNK_BYTES", 1000)
    model = TrajectoryTransformer(
        ModelConfig(grid=(2, 2), in_channels=3, width=16, depth=2, head_depth=1, num_heads=2)
    )
    save_checkpoint(model, tmp_path / "c")
    assert b"__msgpack_chunked_array__" in (tmp_path / "c").read_bytes()
    again = load_checkpoint(tmp_path / "c", model.config, ema=None)
    for name, p in model.named_parameters():
        assert torch.equal(again.get_parameter(name), p), name


@pytest.mark.parametrize(
    "fields",
    [
        {"grid": (1, 1), "in_channels": 1, "width": 4, "depth": 1, "head_depth": 1, "num_heads": 1},
        {"grid": (5, 5), "width": 24, "depth": 4, "head_depth": 1, "num_heads": 3, "num_levels": 2},
        {
            "grid": (3, 3),
            "num_class_tokens": 0,
            "num_time_tokens": 1,
            "num_level_tokens": 3,
            "guidance": True,
        },
        {
            "grid": (2, 2),
            "guidance": True,
            "num_guidance_tokens": 2,
            "num_interval_tokens": 1,
            "mlp_ratio": 4.0,
        },
    ],
)
def test_any_size_is_written_and_read(fields, tmp_path):
    sizes = {"in_channels": 3, "num_classes": 5, "width": 16, "depth": 3, "head_depth": 2, "num_heads": 2}
    model = TrajectoryTransformer(ModelConfig(**sizes | fields))
    average = {name: p.detach() + 1 for name, p in model.named_parameters()}
    save_checkpoint(model, tmp_path / "c", averages={"500": average})
    (tmp_path / "config.json").write_text(json.dumps(official_config(model.config)))
    again = load_checkpoint(tmp_path / "c", tmp_path / "config.json", ema=500)
    assert again.config == model.config
    for name, p in again.named_parameters():
        assert torch.equal(p, average[name]), name


def test_one_part_is_in_memory_at_a_time(tmp_path):
    asked = []

    def part(value):
        asked.append(value)
        return {"net": {"a": torch.full((2,), value)}}

    averages = {"500": lambda: part(1.0), "1000": lambda: part(2.0)}
    write_checkpoint(tmp_path / "c", {"step": 3, "params": lambda: part(0.0), "ema_params": averages})
    assert asked == [0.0, 1.0, 2.0]
    names = []
    for name, content in read_parts(tmp_path / "c", "ema_params/1000".__eq__):
        names.append(name)
        assert (content is not None) == (name == "ema_params/1000")
    assert names == ["step", "params", "ema_params/500", "ema_params/1000"]


def test_configuration_of_another_kind_is_refused(tmp_path):
    for text, message in (
        ("[1]", "found list, expected an object; expected fields by name"),
        ("{", "Expecting"),
        (None, "No such file"),
    ):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            read_config(tmp_path / ("config.json" if text is not None else "absent.json"))
    sizes = {"input_size": 4, "in_channels": 3, "num_classes": 2, "num_levels": 4}
    with pytest.raises(UsageError, match="num_heads"):
        read_config({**sizes, "hidden_size": 16, "depth": 2, "num_heads": "many"})


def test_missing_average_lists_those_there(golden):
    with pytest.raises(MismatchError, match="no weight average 750; it holds: 500, 1000, 2000"):
        load(golden, ema=750)


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.999])
def test_truncated_file_is_named(golden, tmp_path, keep):
    whole = (golden / "flax" / "checkpoint_1234").read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(MismatchError, match="cut is truncated or not a checkpoint"):
        load_checkpoint(cut, golden / "config.json", ema=2000)


def test_other_files_are_refused(golden, tmp_path):
    for content in (b"", b"not msgpack at all", b"\x81\xa4step\x07"):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(MismatchError, match="not a checkpoint of the release"):
            load_checkpoint(tmp_path / "other", golden / "config.json", ema=None)


@pytest.mark.parametrize(
    "value",
    [
        "text",
        msgpack.ExtType(1, msgpack.packb(5)),
        msgpack.ExtType(1, b"\xc1"),
        msgpack.ExtType(7, b""),
        ("ab", "float32", b"0123"),
        (None, "float32", b"0123"),
        ([1], ["float32"], b"0123"),
        ([1], "int64", b"01234567"),
        ([2], "float32", b"0123"),
        ([1], "float32", b"012"),
        ([1], "float32", 2**60),
        ([1], "float32", "text"),
        {"__msgpack_chunked_array__": True},
        {"__msgpack_chunked_array__": True, "shape": [1], "chunks": {"0": "text"}},
        {"__msgpack_chunked_array__": True, "shape": None, "chunks": None},
    ],
)
def test_values_that_are_not_arrays_are_refused(golden, tmp_path, value):
    file = changed(golden, tmp_path / "odd", value)
    with pytest.raises(MismatchError, match="odd is truncated or not a checkpoint of the release"):
        load_checkpoint(file, golden / "config.json", ema=None)


@pytest.mark.parametrize("step", [None, "five", -1, 1.5, [1], True, ([2], "int32", b"01234567")])
def test_values_that_are_not_step_counts_are_refused(golden, tmp_path, step):
    file = changed(golden, tmp_path / "odd", step, ("step",))
    with pytest.raises(MismatchError, match="where a number of steps belongs"):
        list(read_parts(file, "step".__eq__))


def test_bytes_after_the_end_are_noticed(golden, tmp_path):
    (tmp_path / "twice").write_bytes((golden / "flax" / "checkpoint_1234").read_bytes() * 2)
    with pytest.raises(MismatchError, match=r"twice is truncated or not .* bytes after its end"):
        list(read_parts(tmp_path / "twice", lambda name: False))


def test_weights_are_finite_and_become_float32(golden, tmp_path):
    kernel = load(golden).x_embedder.weight.mT.detach().contiguous()

    def file(tensor):
        data = tensor.view(torch.uint8).numpy().tobytes()
        return changed(golden, tmp_path / "c", (list(tensor.shape), str(tensor.dtype)[6:], data))

    model = load_checkpoint(file(kernel.bfloat16()), golden / "config.json", ema=None)
    assert model.x_embedder.weight.dtype == torch.float32
    assert torch.equal(model.x_embedder.weight, kernel.mT.bfloat16().float())
    for wrong, message in (
        (kernel.int(), "kernel is int32, expected floating-point numbers"),
        (kernel.clone().fill_(torch.nan), "kernel holds NaN or infinite values"),
    ):
        with pytest.raises(MismatchError, match=message):
            load_checkpoint(file(wrong), golden / "config.json", ema=None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 10**30}, "num_classes is .* at most 1,000,000"),
        ({"input_size": 10**30}, "a side of the grid is .* at most 1,024"),
        ({"depth": 10**6}, "depth is 1000000, expected above 0 and at most 1,000"),
        ({"mlp_ratio": 1e300}, "mlp_ratio is 1e.300, expected above 0"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
    ],
)
def test_sizes_that_no_network_has_are_refused(golden, fields, message):
    with pytest.raises(UsageError, match=message):
        read_config(json.loads((golden / "config.json").read_text()) | fields)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_classes", 12, "the checkpoint has num_classes 10"),
        ("num_levels", 5, "the checkpoint has num_levels 4"),
        ("in_channels", 32, "the checkpoint has in_channels (24|16) and hidden_size 64"),
        ("input_size", 7, r"net/pos_embed has shape \(1, (88|68), 64\), expected \(1, (73|81), 64\)"),
        ("depth", 5, r"net/shared_blocks_2/.* is missing"),
    ],
)
def test_wrong_configuration_says_what_the_file_holds(golden, field, value, message):
    config = json.loads((golden / "config.json").read_text()) | {field: value}
    with pytest.raises(MismatchError, match=message):
        load_checkpoint(golden / "flax" / "checkpoint_1234", config)


def test_configuration_sizes_follow_the_model_name():
    config = read_config(
        {
            "model_str": "pmfDiT_L_16",
            "input_size": 16,
            "in_channels": 768,
            "num_classes": 1000,
            "num_levels": 4,
        }
    )
    assert (config.width, config.depth, config.num_heads, config.head_depth) == (1024, 32, 16, 8)


def test_incomplete_or_foreign_configuration_is_refused():
    with pytest.raises(
        UsageError, match="lacks depth, hidden_size, in_channels, num_classes, num_heads, num_levels"
    ):
        read_config({"input_size": 16})
    with pytest.raises(UsageError, match="full_concat"):
        read_config({"cond_token_mode": "full_concat"})
    with pytest.raises(UsageError, match="use_prev_cond is false"):
        read_config({"use_prev_cond": False})

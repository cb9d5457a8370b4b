"""The public face: load, sample, decode, save; and the metrics that judge samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_pipeline import tiny_pipeline

from hierarchy_builder.canvases.dct import DctBasis
from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.fields import to_mapping
from hierarchy_builder.files.whole import sealed_text
from trainer.methods.trajectory_forcing.config import TrainConfig
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.methods.trajectory_forcing.pipeline import TrajectoryForcingPipeline
from trainer.methods.trajectory_forcing.sample import sample_levels
from trainer.metrics import regions
from trainer.metrics.class_mean import class_mean_accuracy, describe
from trainer.metrics.flatness import explained_share, two_region_variance
from trainer.networks.config import ModelConfig
from trainer.seeds import level_noise, parse_seeds
from trainer.training import checkpoint as saved
from trainer.training.config import OptimConfig
from trainer.training.optim import MuonAdam
from trainer.training.weights import WeightAverages
from trainer.trajectories.pipeline import Trajectory, TrajectoryPipeline

CLASSES = ["ant", "bee", "emu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint of a network that answers more than zero."""
    out = tmp_path_factory.mktemp("run")
    basis = DctBasis.default()
    model_config = ModelConfig(
        grid=(2, 2), in_channels=basis.width, num_classes=3, width=16, depth=2, head_depth=1, num_heads=2
    )
    torch.manual_seed(0)
    model = TrajectoryTransformer(model_config)
    for name, parameter in model.named_parameters():
        if "gate" in name or name == "u_out.weight":  # both start at 0
            torch.nn.init.normal_(parameter, std=0.3)
    averages = WeightAverages(model, (0.5, 2.0))
    for average in averages.averages.values():
        average["u_out.bias"] += 1.0
    encoder = {"name": "dct", "grid": [2, 2], "width": basis.width, "decoder": basis.spec()}
    state = saved.RunState(
        step=5,
        images_seen=40,
        config=to_mapping(TrainConfig(model=model_config, optim=OptimConfig(ema_halflives_kimg=(0.5, 2.0)))),
        shards={"encoder": encoder, "class_names": CLASSES, "config_hash": "0"},
    )
    optimizer = MuonAdam(model.named_parameters(), OptimConfig())
    saved.save_checkpoint(saved.checkpoint_folder(out, 5), state, model, averages.state_dict(), optimizer)
    return out


@pytest.fixture(scope="module")
def pipe(run: Path) -> TrajectoryPipeline:
    return TrajectoryPipeline.from_pretrained(run, device="cpu")


def test_one_label_gives_one_trajectory(pipe: TrajectoryPipeline) -> None:
    trajectory = pipe(label="bee", seed=7)
    assert trajectory.levels.shape == (4, 2, 2, 48)
    assert (trajectory.label, trajectory.class_name, trajectory.seeds) == (1, "bee", (7, 7, 7, 7))
    pictures = trajectory.decode()
    assert pictures.shape == (4, 32, 32, 3)
    assert pictures.dtype == np.uint8
    assert pictures.std() > 0


def test_image_depends_on_its_own_label_and_seed(pipe: TrajectoryPipeline) -> None:
    together = pipe(label=["bee", 0, "bee"], seed=[7, 1, 8])
    assert [t.label for t in together] == [1, 0, 1]
    # Matrix products of another batch size may round differently.
    torch.testing.assert_close(together[0].levels, pipe("bee", 7).levels, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0].levels, together[2].levels, atol=0.1)
    alike = pipe(label=["bee", "emu"], seed=7)
    assert not torch.equal(alike[0].levels, alike[1].levels)
    many = pipe(label=0, seed=range(40))
    torch.testing.assert_close(many[35].levels, pipe(0, 35).levels, atol=1e-5, rtol=1e-5)


def test_steps_change_the_sample(pipe: TrajectoryPipeline) -> None:
    assert not torch.allclose(pipe(0, 0, num_steps=3).levels, pipe(0, 0).levels)


@pytest.mark.parametrize("ema", [0.5, "2", "raw", None])
def test_weights_can_be_chosen(run: Path, pipe: TrajectoryPipeline, ema: float | str | None) -> None:
    chosen = TrajectoryPipeline.from_pretrained(run, ema=ema, device="cpu")
    is_average = ema not in ("raw", None)
    assert torch.equal(chosen.model.u_out.bias, pipe.model.u_out.bias - (0.0 if is_average else 1.0))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, "label 3, expected 0 to 2"),
        ("-1", "label -1"),
        ("bea", r"unknown class 'bea': did you mean 'bee'\? classes are ant, bee"),
    ],
)
def test_unknown_label(pipe: TrajectoryPipeline, label: int | str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe(label=label)


def test_lists_must_match(pipe: TrajectoryPipeline) -> None:
    with pytest.raises(UsageError, match="2 labels, expected 1 or 3"):
        pipe(label=[0, 1], seed=[0, 1, 2])


def test_guidance_needs_a_guided_model(pipe: TrajectoryPipeline) -> None:
    with pytest.raises(UsageError, match="guidance"):
        pipe(label=0, guidance=2.0)


def test_autoguidance_moves_away_from_the_weak_model(run: Path) -> None:
    guided = TrajectoryPipeline.from_pretrained(run, device="cpu", weak=run)
    guided.weak = TrajectoryPipeline.from_pretrained(run, ema="raw", device="cpu").model
    plain, weak = guided(1, 3).levels, TrajectoryForcingPipeline(guided.weak)(1, 3).levels
    strong = guided(1, 3, weak_scale=0.5)
    torch.testing.assert_close(strong.levels[0], plain[0] + 0.5 * (plain[0] - weak[0]), atol=1e-4, rtol=1e-4)
    assert strong.weak_scale == 0.5
    torch.testing.assert_close(strong.resume(0).levels, strong.levels, atol=1e-5, rtol=1e-5)


def test_temperature_scales_the_noise_and_stays_with_the_trajectory(
    pipe: TrajectoryPipeline, tmp_path: Path
) -> None:
    config = pipe.model.config
    noise = level_noise([3], config.num_levels, config.grid, config.in_channels)
    drawn = pipe("bee", 3, temperature=0.5)
    expected = sample_levels(pipe.model, torch.tensor([1]), 0.5 * noise)[0]
    torch.testing.assert_close(drawn.levels, expected, atol=1e-6, rtol=1e-6)
    drawn.save(tmp_path / "bee.safetensors")
    read = pipe.adopt(Trajectory.load(tmp_path / "bee.safetensors"))
    assert read.temperature == 0.5
    torch.testing.assert_close(read.resume(0).levels, drawn.levels, atol=1e-6, rtol=1e-6)
    assert torch.equal(pipe("bee", 3, temperature=0).levels, pipe("bee", 4, temperature=0).levels)
    assert torch.equal(pipe("bee", 3).levels, pipe("bee", 3, temperature=1).levels)


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf")])
def test_temperature_is_a_finite_number_of_0_or_more(pipe: TrajectoryPipeline, temperature: float) -> None:
    with pytest.raises(UsageError, match=r"temperature is .*, expected a finite number of 0 or more"):
        pipe(0, temperature=temperature)


def test_autoguidance_needs_a_weak_model_that_fits(
    run: Path, pipe: TrajectoryPipeline, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"autoguidance of strength 0\.5 needs a weak model"):
        pipe(0, weak_scale=0.5)
    other = copied(run, tmp_path / "step")
    state = json.loads((other / "state.json").read_text())
    state["config"]["model"]["num_levels"] = 5
    model = TrajectoryTransformer(ModelConfig(**{**state["config"]["model"], "grid": (2, 2)}))
    save_file({name: p.detach() for name, p in model.named_parameters()}, other / "model.safetensors")
    state["files"]["model.safetensors"] = (other / "model.safetensors").stat().st_size
    del state["checksums"]["model.safetensors"]
    state["format_version"] = 1  # in which a checksum may be absent
    (other / "state.json").write_bytes(sealed_text(state))
    with pytest.raises(MismatchError, match=r"weak model .*: model.num_levels is 5, that of .* is 4"):
        TrajectoryPipeline.from_pretrained(run, ema="raw", weak=other)


def copied(run: Path, target: Path) -> Path:
    return Path(shutil.copytree(saved.find_checkpoint(run), target))


def test_trajectory_survives_the_disk(pipe: TrajectoryPipeline, tmp_path: Path) -> None:
    trajectory = pipe(label="emu", seed=3, num_steps=2)
    trajectory.history.append({"edit": "features", "level": 1})
    trajectory.save(tmp_path / "a.safetensors")
    back = Trajectory.load(tmp_path / "a.safetensors")
    assert torch.equal(back.levels, trajectory.levels)
    for name in ("label", "class_name", "seeds", "num_steps", "guidance", "history"):
        assert getattr(back, name) == getattr(trajectory, name), name
    np.testing.assert_array_equal(back.decode(), trajectory.decode())


def test_other_files_are_not_trajectories(tmp_path: Path) -> None:
    save_file({"levels": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(TrainerError, match="is not a trajectory"):
        Trajectory.load(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("text")
    with pytest.raises(TrainerError, match="is not a trajectory"):
        Trajectory.load(tmp_path / "b.safetensors")


def test_newer_trajectory_is_refused(pipe: TrajectoryPipeline, tmp_path: Path) -> None:
    pipe(0).save(tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data.replace(b'"format_version":"2"', b'"format_version":"3"'))
    with pytest.raises(MismatchError, match="trajectory format 3"):
        Trajectory.load(tmp_path / "a.safetensors")


def test_features_without_decoder(run: Path, tmp_path: Path) -> None:
    folder = saved.find_checkpoint(run)
    copy = tmp_path / "step"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    state = json.loads((copy / "state.json").read_text())
    state["shards"]["encoder"]["decoder"] = None
    (copy / "state.json").write_bytes(sealed_text(state))
    trajectory = TrajectoryPipeline.from_pretrained(copy, device="cpu")(0)
    assert not trajectory.can_decode
    with pytest.raises(TrainerError, match="'dct' have no decoder of their own; pass decoder=FOLDER"):
        trajectory.decode()
    with pytest.raises(TrainerError, match="found no RAE decoder"):
        TrajectoryPipeline.from_pretrained(copy, decoder=tmp_path)


def test_flatness_of_known_canvases() -> None:
    generator = torch.Generator().manual_seed(0)
    two_values = torch.randn(3, 1, 1, 5, generator=generator).expand(3, 4, 4, 5).clone()
    two_values[:, 1:3, 1:3] += 2.0
    torch.testing.assert_close(explained_share(*two_region_variance(two_values)), torch.ones(3))
    torch.testing.assert_close(explained_share(*two_region_variance(torch.ones(1, 4, 4, 5))), torch.ones(1))
    line = torch.arange(16.0).view(1, 4, 4, 1)
    # Cut in the middle: 1 − (variance of 0…7) / (variance of 0…15).
    torch.testing.assert_close(explained_share(*two_region_variance(line)), torch.tensor([1 - 5.25 / 21.25]))
    torch.testing.assert_close(two_region_variance(line), (torch.tensor([5.25]), torch.tensor([21.25])))
    noise = torch.randn(8, 16, 16, 48, generator=generator)
    assert explained_share(*two_region_variance(noise)).max() < 0.05


def test_class_means_tell_classes_apart_and_noise_not() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    centres = torch.randn(4, 1, 1, 8, generator=generator)
    real = centres[labels] + 0.3 * torch.randn(400, 4, 4, 8, generator=generator)
    noise = torch.randn(400, 4, 4, 8, generator=generator)
    order = torch.randperm(400, generator=generator)
    pair = describe(real)[order], labels[order]
    same = dict(class_mean_accuracy((describe(real), labels), pair, num_classes=4))
    assert same["class_mean_accuracy"] > 0.99
    assert same["class_mean_accuracy_real"] > 0.99
    assert same["class_mean_chance"] == 0.25
    other = dict(class_mean_accuracy((describe(noise), labels), pair, num_classes=4))
    assert other["class_mean_accuracy"] < 0.4


def test_class_without_images_is_never_answered() -> None:
    descriptions = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    labels = torch.tensor([0, 0, 2, 2])
    found = dict(class_mean_accuracy((torch.tensor([[0.4]]), torch.tensor([1])), (descriptions, labels), 3))
    assert found["class_mean_accuracy"] == 0.0
    assert found["class_mean_accuracy_real"] == 1.0


@pytest.mark.parametrize("how", [{"weak_scale": float("nan")}, {"guidance": (1.0, 0.0, float("inf"))}])
def test_guidance_must_be_finite(pipe: TrajectoryPipeline, how: dict) -> None:
    with pytest.raises(UsageError, match="expected finite numbers"):
        pipe(0, **how)


def test_endless_lists_of_seeds_are_refused() -> None:
    with pytest.raises(UsageError, match="found more than 10,000,000"):
        parse_seeds("0-99999999999")
    assert parse_seeds("0-2,7") == [0, 1, 2, 7]


def test_numbers_that_are_not_finite_are_blamed_on_what_made_them() -> None:
    pipe = tiny_pipeline()
    config = pipe.model.config
    origin = {"source": "photo", "name": "ant.png", "encoder": "mine"}
    features = torch.full((*config.grid, config.in_channels), torch.nan)
    regions = torch.zeros(config.num_levels - 1, *config.grid, dtype=torch.uint8)
    with pytest.raises(
        TrainerError, match=r"features of ant\.png by the encoder 'mine' hold NaN or infinity"
    ):
        pipe.from_features(features, regions, label=0, origin=origin)
    trajectory = pipe(0, 0)
    chosen = trajectory.region(0, level=0)
    source = torch.full((config.in_channels,), 1e38)
    with pytest.raises(TrainerError, match="after an edit of features: lower the strength"):
        trajectory.edit_features(chosen, source, strength=1e3)


def test_regions_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    find = regions.extract_regions
    monkeypatch.setattr(regions, "extract_regions", lambda levels: calls.append(1) or find(levels))
    one = tiny_pipeline()(0, 0)
    one.region(0, level=0)
    one.regions_of(1)
    assert len(calls) == 1
    edited = one.edit_features(one.region(0, level=0), torch.ones(one.levels.shape[-1]))
    edited.regions()
    assert len(calls) == 2


def test_resuming_draws_the_noise_of_each_seed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    trajectory, drawn = pipe(0, 3), []
    noise = pipe._noise
    monkeypatch.setattr(pipe, "_noise", lambda seeds, how: drawn.append(list(seeds)) or noise(seeds, how))
    trajectory.resume(0)
    assert drawn == [[3]]
    drawn.clear()
    trajectory.resume(1, seeds=[8, 9])
    assert drawn == [[8], [9]]

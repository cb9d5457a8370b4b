"""Training of a decoder: what it publishes decodes raw features, and any split of a run takes the same steps."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixture_shards import GRID, add_member, change_index, reindex, write_shards
from processes import run_two
from safetensors.torch import load_file, save_file
from tiny_runs import DECODER as SMALL
from tiny_runs import assert_same_state, tensors_of
from typer.testing import CliRunner

from hierarchy_builder.errors import InterruptedRunError, MismatchError, TrainerError, UsageError
from trainer.cli.app import app
from trainer.data.shards import open_index
from trainer.data.stream import StreamPlan
from trainer.decode import train as room
from trainer.decode.adversary import Discriminator, frozen_vit
from trainer.decode.config import DecoderConfig
from trainer.decode.rae import find_decoder, load_decoder, to_uint8
from trainer.metrics.reconstruction import reconstruction
from trainer.training import checkpoint as saved
from trainer.training.log import read_metrics
from trainer.training.loop import Loop


def small(**fields: Any) -> DecoderConfig:
    return dataclasses.replace(SMALL, **fields)


@pytest.fixture(scope="module")
def shards(picture_shards: str) -> str:
    return picture_shards


@pytest.fixture(scope="module")
def whole(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 6 steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    room.train_decoder(SMALL, shards, str(out), quiet=True)
    return out


def test_decoder_learns_to_show_what_tokens_hold(shards: str, tmp_path: Path) -> None:
    config = small(total_images=320, lr=2e-3, noise=0.05, log_images=160, sample_images=320)
    summary = room.train_decoder(config, shards, str(tmp_path), quiet=True)
    scores = summary.reconstruction
    assert summary.held_out
    assert scores["psnr"] > scores["flat_psnr"] + 3
    assert scores["l1"] < 0.7 * scores["flat_l1"]
    assert (tmp_path / "samples" / "step-00000040.png").exists()
    audits = [row["reconstruction"] for row in read_metrics(tmp_path) if "reconstruction" in row]
    assert audits[-1]["psnr"] > audits[0]["psnr"] + 3


def test_published_decoder_takes_raw_features(shards: str, whole: Path) -> None:
    index = open_index(shards)
    decoder = load_decoder(whole, index.encoder)
    numbers = range(21, 24)  # the last shard, held out
    dataset = room.PictureDataset(index, StreamPlan(shard_sizes=(24,), num_levels=4, batch_size=1), (16, 16))
    batch = dataset.samples(numbers)
    made = to_uint8(decoder(batch.features.float())).numpy()
    scores = dict(reconstruction(made, batch.pictures.permute(0, 2, 3, 1).numpy()))
    summary = room.train_decoder(SMALL, shards, str(whole), quiet=True)
    # Folding the normalisation into a layer rounds otherwise, which may turn a pixel by one of 255.
    assert scores["psnr"] == pytest.approx(summary.reconstruction["psnr"], abs=0.02)
    assert scores["flat_psnr"] == summary.reconstruction["flat_psnr"]


def test_resumed_training_equals_uninterrupted(shards: str, whole: Path, tmp_path: Path) -> None:
    for _ in range(5):
        with pytest.raises(InterruptedRunError):
            room.train_decoder(small(max_seconds=1e-9), shards, str(tmp_path), quiet=True)
    room.train_decoder(SMALL, shards, str(tmp_path), quiet=True)
    assert_same_state(whole, tmp_path, 6)
    ours, theirs = (load_file(run / "model.safetensors") for run in (whole, tmp_path))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_micro_batches_take_the_same_steps(shards: str, whole: Path, tmp_path: Path) -> None:
    room.train_decoder(small(micro_batch_size=3), shards, str(tmp_path), quiet=True)
    traces = [[row["l1"] for row in read_metrics(run) if "l1" in row] for run in (whole, tmp_path)]
    assert len(traces[0]) == 6
    np.testing.assert_allclose(*traces, rtol=1e-5)


def test_bfloat16_stays_close(shards: str, whole: Path, tmp_path: Path) -> None:
    room.train_decoder(small(precision="bfloat16"), shards, str(tmp_path), quiet=True)
    traces = [[row["l1"] for row in read_metrics(run) if "l1" in row] for run in (whole, tmp_path)]
    np.testing.assert_allclose(*traces, rtol=0.05)  # 8 bits
    assert {t.dtype for t in tensors_of(tmp_path, 6).values()} == {torch.float32}


def test_held_out_shards_are_not_trained_on(shards: str, tmp_path: Path, monkeypatch: Any) -> None:
    seen: set[str] = set()
    backward = room.DecoderRun.backward

    def noting(self: Any, batch: Any, start: int, stop: int) -> Any:
        seen.update(batch.keys)
        return backward(self, batch, start, stop)

    monkeypatch.setattr(room.DecoderRun, "backward", noting)
    room.train_decoder(SMALL, shards, str(tmp_path), quiet=True)
    index = open_index(shards)
    held = room.PictureDataset(index, StreamPlan(shard_sizes=(24,), num_levels=4, batch_size=1), (16, 16))
    assert len(seen) == 21
    assert not seen & set(held.samples(range(21, 24)).keys)


def test_decoder_of_a_run_folder_is_found_and_of_another_encoder_refused(
    shards: str, whole: Path, tmp_path: Path
) -> None:
    encoder = open_index(shards).encoder
    (tmp_path / "decoder").symlink_to(whole)
    found = find_decoder(tmp_path, encoder)
    assert found is not None
    assert found(torch.zeros(2, *GRID, 3)).shape == (2, 3, 16, 16)
    with pytest.raises(MismatchError, match=r"another encoder: name 'drawn', expected 'dct'.*train-decoder"):
        find_decoder(tmp_path, {**encoder, "name": "dct"})


def test_other_configuration_is_refused(shards: str, whole: Path) -> None:
    with pytest.raises(MismatchError, match=r"noise: 0\.3 there, 0\.1 now"):
        room.train_decoder(small(noise=0.1), shards, str(whole), quiet=True)


def test_decoder_training_refuses_shards_that_do_not_fit(shards: str, tmp_path: Path) -> None:
    plain = write_shards(tmp_path / "plain")
    with pytest.raises(TrainerError, match=r"ant/image0021 holds no picture: rebuild .* --images --fresh"):
        room.train_decoder(SMALL, str(plain), str(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=r"held_out_shards is 4, .* has 4: expected fewer"):
        room.train_decoder(small(held_out_shards=4), shards, str(tmp_path / "run"), quiet=True)
    with pytest.raises(TrainerError, match="21 samples to train on, fewer than one batch of 22"):
        room.train_decoder(small(batch_size=22), shards, str(tmp_path / "run"), quiet=True)
    change_index(plain, grid=[2, 8])
    with pytest.raises(MismatchError, match="grid 2×8, RAE's decoder expects a square one"):
        room.train_decoder(SMALL, str(plain), str(tmp_path / "run"), quiet=True)


def test_unreadable_picture_is_named(tmp_path: Path) -> None:
    import tarfile

    folder = write_shards(tmp_path / "shards", num_samples=8, per_shard=4)
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as old:
            members = [(m.name, old.extractfile(m).read()) for m in old]  # type: ignore[union-attr]
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as new:
            for name, data in members:
                add_member(new, name, data)
                if name.endswith(".cls"):
                    add_member(new, name.replace(".cls", ".jpg"), b"no picture")
    reindex(folder)
    with pytest.raises(TrainerError, match=r"image0004: its picture cannot be decoded"):
        room.train_decoder(small(batch_size=4), str(folder), str(tmp_path / "run"), quiet=True)


@pytest.fixture
def small_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Weights of a ViT small enough to judge in a test; nothing else stands in."""
    torch.manual_seed(1)
    backbone = frozen_vit(size_px=16, patch_px=4, width=12, depth=2, heads=2)
    save_file(backbone.state_dict(), tmp_path / "vit.safetensors")

    def load(weights: str) -> Discriminator:
        own = frozen_vit(size_px=16, patch_px=4, width=12, depth=2, heads=2)
        own.load_state_dict(load_file(weights))
        return Discriminator(own, blocks=(0, 1))

    monkeypatch.setattr(room, "load_discriminator", load)
    return str(tmp_path / "vit.safetensors")


def test_discriminator_joins_at_its_time_and_resumes(shards: str, tmp_path: Path, small_judge: str) -> None:
    config = small(gan_weights=small_judge, discriminator_start=2 / 6, gan_start=4 / 6)
    room.train_decoder(config, shards, str(tmp_path / "whole"), quiet=True)
    rows = [row for row in read_metrics(tmp_path / "whole") if "l1" in row]
    assert [row["discriminator"] != 0 for row in rows] == [False, False, True, True, True, True]
    assert [row["adversarial"] != 0 for row in rows] == [False] * 4 + [True] * 2
    for _ in range(5):
        with pytest.raises(InterruptedRunError):
            room.train_decoder(
                dataclasses.replace(config, max_seconds=1e-9), shards, str(tmp_path / "cut"), quiet=True
            )
    room.train_decoder(config, shards, str(tmp_path / "cut"), quiet=True)
    assert_same_state(tmp_path / "whole", tmp_path / "cut", 6)
    names = saved.load_tensors(saved.checkpoint_folder(tmp_path / "whole", 6) / "model.safetensors")
    assert not [name for name in names if "cls_token" in name]  # the frozen ViT is not saved
    assert load_decoder(tmp_path / "whole").config.patch_size == 4


def test_the_discriminator_is_counted_as_it_joins_and_stays_as_it_is(
    shards: str, tmp_path: Path, small_judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(gan_weights=small_judge, discriminator_start=2 / 6, gan_start=4 / 6)
    room.train_decoder(config, shards, str(tmp_path / "plain"), quiet=True)
    counts = []
    take_step = Loop.take_step

    def counted(run: Any, batch: Any, time_is_up: bool) -> Any:
        if run.flops_per_image is None:  # as a run on CUDA does
            run._look_at_cost(batch)
        counts.append(run.flops_per_image)
        return take_step(run, batch, time_is_up)

    monkeypatch.setattr(Loop, "take_step", counted)
    room.train_decoder(config, shards, str(tmp_path / "counted"), quiet=True)
    assert counts == sorted(counts)
    assert [first == second for first, second in itertools.pairwise(counts)] == [True, False] * 2 + [True]
    assert_same_state(tmp_path / "plain", tmp_path / "counted", 6)


RANKS = """
import dataclasses, sys
sys.path.append(sys.argv[3])
from tiny_runs import DECODER
from trainer.decode.train import train_decoder
from trainer.training import distributed

distributed.BUCKET_ELEMENTS = 1000
finish = distributed.GradientSum.finish

def finished(sum_up):
    assert len(sum_up._begun) == len(sum_up._buckets) > 9  # all during the backward pass
    finish(sum_up)

distributed.GradientSum.finish = finished
train_decoder(dataclasses.replace(DECODER, micro_batch_size=2), sys.argv[1], sys.argv[2], quiet=True)
"""


def test_two_ranks_add_up_gradients_meanwhile_and_take_the_same_steps(
    shards: str, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    run_two(tmp_path / "ranks.py", shards, tmp_path / "two", Path(__file__).parents[2] / "support")
    found, expected = tensors_of(tmp_path / "two", 6), tensors_of(whole, 6)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


def test_command_trains_and_its_folder_knows_the_configuration(shards: str, tmp_path: Path) -> None:
    out = str(tmp_path / "decoder")
    settings = ["patch_size=4", "loader_workers=0", "tensorboard=false", "held_out_shards=1"]
    flags = [part for setting in settings for part in ("--set", setting)]
    command = ["train-decoder", shards, "--out", out, "--total-images", "16", "--json", "--quiet"]
    first = CliRunner().invoke(app, [*command, "--size", "tiny", "--batch-size", "8", *flags])
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["step"] == 2
    again = CliRunner().invoke(app, command)
    assert json.loads(again.stdout) == {
        **json.loads(first.stdout),
        "seconds": json.loads(again.stdout)["seconds"],
    }
    wrong = CliRunner().invoke(app, ["train-decoder", shards, "--out", out, "--set", "nois=1"])
    assert isinstance(wrong.exception, UsageError)
    assert "did you mean 'noise'?" in str(wrong.exception)
    size = CliRunner().invoke(app, ["train-decoder", shards, "--out", out, "--size", "M"])
    assert "decoder size 'M', known are tiny, B, L, XL" in str(size.exception)

"""The optimiser and the weight averages."""

import math

import pytest
import torch
from released import golden_arrays, worst
from torch import nn

from hierarchy_builder.errors import MismatchError
from trainer.methods.latent_forcing.config import LatentModelConfig, LatentOptimConfig
from trainer.methods.latent_forcing.network import PixelLatentTransformer
from trainer.methods.normalizing_trajectory.config import NormalizingOptimConfig
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.networks.config import ModelConfig
from trainer.training.config import OptimConfig
from trainer.training.optim import MuonAdam, optimizer_of, orthogonalise
from trainer.training.schedules import ema_beta
from trainer.training.weights import WeightAverages


def test_three_updates_match_the_release(golden):
    arrays = golden_arrays(golden / "muon.npz")
    paths = [name.partition("|")[2] for name in arrays if name.startswith("before|")]
    # Dense kernels lie [in, out] in the golden arrays and [out, in] here.
    turn = {
        path: (lambda a: a.mT.contiguous()) if arrays[f"before|{path}"].ndim == 2 else torch.clone
        for path in paths
    }
    parameters = {path: nn.Parameter(turn[path](arrays[f"before|{path}"])) for path in paths}
    optimiser = MuonAdam(parameters.items(), OptimConfig(lr=0.01))
    for n in range(3):
        for path, p in parameters.items():
            p.grad = turn[path](arrays[f"grad{n}|{path}"])
        optimiser.step()
    for path, p in parameters.items():
        moved = turn[path](arrays[f"after|{path}"]) - turn[path](arrays[f"before|{path}"])
        assert worst(p.detach() - turn[path](arrays[f"before|{path}"]), moved) < 1e-4, path


def test_matrices_take_muon_and_everything_else_adam():
    model = TrajectoryTransformer(
        ModelConfig(grid=(2, 2), in_channels=3, width=16, depth=2, head_depth=1, num_heads=2)
    )
    optimiser = MuonAdam(model.named_parameters(), OptimConfig())
    names = {group["rule"]: set(group["param_names"]) for group in optimiser.state_dict()["param_groups"]}
    assert {"x_embedder.weight", "fusion.weight", "u_out.weight", "shared_blocks.0.mlp.w1.weight"} <= names[
        "muon"
    ]
    assert {
        "class_table",
        "level_table",
        "positions",
        "time_tokens",
        "fusion.bias",
        "u_norm.weight",
    } <= names["adam"]
    assert sum(map(len, names.values())) == len(list(model.parameters()))


def test_the_rule_chooses_and_tables_of_embeddings_take_adam() -> None:
    model = PixelLatentTransformer(
        LatentModelConfig(
            grid=(2, 2),
            patch_px=2,
            in_channels=3,
            num_classes=2,
            width=16,
            depth=1,
            num_heads=2,
            class_tokens_at=0,
            expert_depth=0,
        )
    )
    muon = optimizer_of(model, LatentOptimConfig(rule="muon", lr=0.02, betas=(0.8, 0.9)))
    assert isinstance(muon, MuonAdam)
    assert muon.config.adam_betas == (0.8, 0.9)
    by_rule = {group["rule"]: set(group["param_names"]) for group in muon.param_groups}
    assert "class_table.weight" in by_rule["adam"]
    assert "blocks.0.modulation.weight" in by_rule["muon"]
    adamw = optimizer_of(model, NormalizingOptimConfig(weight_decay=0.25))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["weight_decay"] == 0.25
    with pytest.raises(ValueError, match=r"weight_decay is 0.0001 with rule muon, expected 0"):
        NormalizingOptimConfig(rule="muon")


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5)])
def test_matrices_stacked_together_move_as_if_alone(shape, monkeypatch):
    def moved(stacked: int) -> list[torch.Tensor]:
        monkeypatch.setattr("trainer.training.optim.STACK_ELEMENTS", stacked)
        g = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, generator=g)) for _ in range(5)]
        optimiser = MuonAdam([(str(i), p) for i, p in enumerate(parameters)], OptimConfig())
        for _ in range(3):
            for p in parameters:
                p.grad = torch.randn(shape, generator=g)
            optimiser.step()
        return [p.detach() for p in parameters]

    torch.testing.assert_close(moved(2**26), moved(1), rtol=0, atol=1e-6)


def test_orthogonalised_matrices_have_singular_values_near_one():
    singular = torch.linalg.svdvals(
        orthogonalise(torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0)))
    )
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_resumed_optimiser_continues_exactly():
    def run(steps_before_reload: int) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        parameters = [
            nn.Parameter(torch.randn(4, 6, generator=g)),
            nn.Parameter(torch.randn(1, 3, 2, generator=g)),
        ]
        optimiser = MuonAdam([("w", parameters[0]), ("p", parameters[1])], OptimConfig())
        for n in range(4):
            if n == steps_before_reload:
                state = optimiser.state_dict()
                optimiser = MuonAdam([("w", parameters[0]), ("p", parameters[1])], OptimConfig())
                optimiser.load_state_dict(state)
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=g)
            optimiser.step()
        return [p.detach() for p in parameters]

    torch.testing.assert_close(run(2), run(9), rtol=0, atol=0)


def test_parameters_without_gradient_stay():
    still, moving = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimiser = MuonAdam([("still", still), ("moving", moving)], OptimConfig())
    moving.grad = torch.eye(2)
    optimiser.step()
    assert torch.equal(still, torch.ones(2, 2))
    assert not torch.equal(moving, torch.ones(2, 2))


def test_averages_follow_their_recursion_and_come_back():
    model = nn.Linear(3, 2)
    averages = WeightAverages(model, (0.5, 2.0), ramp=0.05)
    expected = model.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            model.weight.add_(1.0)
        averages.update(model, images_seen=step * 100, batch_size=100)
        beta = ema_beta(step, 0.5, batch_size=100)
        expected = beta * expected + (1 - beta) * model.weight.detach()
    restored = WeightAverages(nn.Linear(3, 2), (0.5, 2.0))
    restored.load_state_dict(averages.state_dict())
    copy = nn.Linear(3, 2)
    with restored.lent_to(copy, 0.5):
        torch.testing.assert_close(copy.weight.detach(), expected)
    assert list(averages.state_dict()) == ["0.5", "2"]


def test_average_of_a_constant_is_the_constant():
    model = nn.Linear(3, 2)
    averages = WeightAverages(model, (500.0,))
    averages.update(model, images_seen=64, batch_size=64)
    assert torch.equal(averages.state_dict()["500"]["weight"], model.weight)
    assert math.isclose(ema_beta(10**6, 500), 0.5 ** (1024 / 500_000))


def test_foreign_averages_are_refused():
    averages = WeightAverages(nn.Linear(3, 2), (500.0,))
    with pytest.raises(MismatchError, match=r"fits another model: see .*weight"):
        averages.load_state_dict(WeightAverages(nn.Linear(4, 2), (500.0,)).state_dict())
    with pytest.raises(MismatchError, match=r"saved for \['250'\]"):
        averages.load_state_dict(WeightAverages(nn.Linear(3, 2), (250.0,)).state_dict())


def test_short_updates_of_odd_widths_are_near_those_of_float32():
    moved = []
    for short in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.zeros(9, 70))
        weight.grad = torch.randn(9, 70)
        MuonAdam([("weight", weight)], OptimConfig(), short=short).step()
        moved.append(weight.detach())
    assert 0 < (moved[1] - moved[0]).norm() / moved[0].norm() < 0.05

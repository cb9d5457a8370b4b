"""Distances, gradients and running moments against the release's numbers, autograd and worked examples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from trainer.post_training.distance import Target
from trainer.post_training.moments import Average, OnlineQueue, Queue, RunningMoments, Sums
from trainer.training.schedules import warmup_cosine

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "fd_loss" / "fd_golden.npz")
FLOOR = 0.01


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def step(target: Target, moments: RunningMoments, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Distance and gradient of FD/(FD + 0.01) by the rows of a batch."""
    weighed = moments.take(Sums.of(batch), batch)
    found = target.distance(*weighed.moments)
    rows = weighed.row_gradient(batch, found.by_mean, found.by_covariance)
    return found.value, rows / (found.value + FLOOR)


@pytest.mark.parametrize(
    ("mode", "moments", "tolerance"),
    [
        ("ema", Average(float(GOLDEN["ema_beta"]), 16), 1e-8),
        ("online", OnlineQueue(64, 16), 1e-8),
        ("snapshot", Queue(64, 16), 2e-5),
    ],
)
def test_distances_and_gradients_are_those_of_the_release(
    mode: str, moments: RunningMoments, tolerance: float
) -> None:
    target = Target.of(golden("mu_ref"), golden("sigma_ref"), "golden")
    torch.testing.assert_close(target.root, golden("sigma_ref_sqrt"), rtol=1e-9, atol=1e-9)
    moments.begin(Sums.of(golden("fill")), golden("fill"))
    for number, batch in enumerate(golden("batches")):
        value, gradient = step(target, moments, batch)
        assert float(value) == pytest.approx(float(GOLDEN[f"{mode}_fd"][number]), rel=1e-6)
        loss = float(value / (value + FLOOR))
        assert loss == pytest.approx(float(GOLDEN[f"{mode}_loss"][number]), rel=1e-6)
        assert float((gradient - golden(f"{mode}_grad")[number]).abs().max()) < tolerance
    if mode == "ema":
        torch.testing.assert_close(moments.state()["mean"], golden("ema_mu_after"), rtol=0, atol=1e-7)
        torch.testing.assert_close(moments.state()["second"], golden("ema_m2_after"), rtol=0, atol=1e-6)


def test_of_diagonal_covariances_it_is_known_by_hand() -> None:
    target = Target.of(torch.zeros(3), torch.diag(torch.tensor([4.0, 1.0, 16.0])), "by hand")
    found = target.distance(
        torch.tensor([1.0, 0.0, -2.0]).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0])).double()
    )
    assert float(found.value) == pytest.approx(8.0, abs=1e-12)


def test_equal_moments_have_no_distance_and_no_gradient() -> None:
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double()
    target = Target.of(*Sums.of(rows).moments(), "equal")
    moments = Average(0.9, 5)
    moments.begin(Sums.of(rows), rows)
    value, gradient = step(target, moments, rows)  # a batch of the same moments leaves them as they are
    assert float(value) < 1e-12
    assert float(gradient.abs().max()) * FLOOR < 1e-9


def autograd(target: Target, moments: Average, batch: Tensor) -> Tensor:
    """The gradient of FD by a batch, through eigenvalues, where autograd has one."""
    x = batch.double().requires_grad_()
    share = 1 - moments.beta
    mean = moments.beta * moments.mean + share * x.mean(dim=0)
    second = moments.beta * moments.second + share * x.T @ x / len(x)
    inner = target.root @ (second - torch.outer(mean, mean)) @ target.root
    values = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0)
    traces = torch.trace(second - torch.outer(mean, mean)) + target.trace
    distance = (mean - target.mean).square().sum() + traces - 2 * values.sqrt().sum()
    return torch.autograd.grad(distance, x)[0]


@pytest.mark.parametrize("case", ["dead reference", "dead samples", "few samples", "ordinary"])
def test_the_gradient_is_finite_in_every_case_and_autograds_where_that_is(case: str) -> None:
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(50, 6, generator=generator).double()
    fill, batch = (torch.randn(n, 6, generator=generator).double() for n in (60, 4))
    if case == "dead reference":
        real[:, 2] = 0.0
    if case == "dead samples":
        fill[:, 2] = batch[:, 2] = 0.0
    if case == "few samples":
        fill = fill[:2]
    target = Target.of(*Sums.of(real).moments(), "real")
    moments, before = Average(0.9, 6), Average(0.9, 6)
    for each in (moments, before):
        each.begin(Sums.of(fill), fill)
    weighed = moments.take(Sums.of(batch), batch)
    found = target.distance(*weighed.moments)
    gradient = weighed.row_gradient(batch, found.by_mean, found.by_covariance)
    assert gradient.isfinite().all()
    if case == "ordinary":
        torch.testing.assert_close(gradient, autograd(target, before, batch), rtol=0, atol=2e-8)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_batch_in_parts_has_the_same_gradient(size: int) -> None:
    target = Target.of(golden("mu_ref"), golden("sigma_ref"), "golden")
    batch = golden("batches")[0]

    def gradient(parts: tuple[Tensor, ...]) -> Tensor:
        moments = Average(0.9, 16)
        moments.begin(Sums.of(golden("fill")), None)
        sums = Sums.of(parts[0])
        for part in parts[1:]:
            sums = sums.plus(Sums.of(part))
        weighed = moments.take(sums, None)
        found = target.distance(*weighed.moments)
        rows = [weighed.row_gradient(part, found.by_mean, found.by_covariance) for part in parts]
        return torch.cat(rows)

    assert float((gradient(batch.split(size)) - gradient((batch,))).abs().max()) < 1e-12


def test_classes_have_moments_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, label = torch.randn(12, 3, generator=generator), torch.tensor([0, 2] * 6)
    sums = Sums.by_class(rows, label, 3)
    assert sums.number.tolist() == [6, 0, 6]
    torch.testing.assert_close(sums.second[2], Sums.of(rows[1::2]).second)
    moments, own = Average(0.5, 3, 3), Average(0.5, 3)
    moments.begin(sums)
    own.begin(Sums.of(rows[1::2]))
    batch = torch.randn(4, 3, generator=generator)
    taken = moments.take(Sums.by_class(batch, torch.tensor([2, 2, 2, 2]), 3))
    alone = own.take(Sums.of(batch))
    torch.testing.assert_close(taken.moments.covariance[2], alone.moments.covariance)
    torch.testing.assert_close(taken.moments.mean[0], sums.total[0] / 6)  # class 0 had no row


def test_a_queue_refuses_other_numbers_of_rows() -> None:
    rows = torch.zeros(4, 2)
    queue = Queue(3, 2)
    with pytest.raises(UsageError, match="4 rows to begin with, expected the 3 of the queue"):
        queue.begin(Sums.of(rows), rows)
    queue.begin(Sums.of(rows[:3]), rows[:3])
    with pytest.raises(UsageError, match="a batch of 4 rows, expected at most the 3"):
        queue.take(Sums.of(rows), rows)
    with pytest.raises(MismatchError, match="the checkpoint holds statistics"):
        queue.load(Queue(5, 2).state())


def test_statistics_that_are_none_are_refused() -> None:
    with pytest.raises(TrainerError, match=r"mean \[2\] and covariance \[3, 3\] do not fit"):
        Target.of(torch.zeros(2), torch.eye(3), "file")
    with pytest.raises(TrainerError, match="file: mean or covariance holds NaN or infinity"):
        Target.of(torch.tensor([0.0, float("nan")]), torch.eye(2), "file")
    with pytest.raises(TrainerError, match="the covariance is not symmetric"):
        Target.of(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "file")


def test_the_rate_is_that_of_the_release_at_its_three_points() -> None:
    rates = [warmup_cosine(step, 100_000, 1e-6, 0.0625, final=0.0) for step in (0, 6250, 100_000)]
    assert rates == [0.0, 1e-6, pytest.approx(0.0, abs=1e-20)]


def test_a_small_generator_moves_to_the_moments_of_its_target() -> None:
    """A second judge, which describes samples by their squares and products, sees the distance fall too."""
    generator = torch.Generator().manual_seed(0)
    target = Target.of(torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 2.0]]), "drawn")
    real = torch.randn(4000, 2, generator=generator).double() @ target.root + target.mean

    def seen_otherwise(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1]], dim=1)

    judge = Target.of(*Sums.of(seen_otherwise(real)).moments(), "held out")

    def judged(net: torch.nn.Module) -> tuple[float, float]:
        with torch.no_grad():
            x = net(torch.randn(4000, 2, generator=generator)).double()
        own, other = Sums.of(x).moments(), Sums.of(seen_otherwise(x)).moments()
        return float(target.distance(*own).value), float(judge.distance(*other).value)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    before = judged(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    moments = Average(0.9, 2)
    moments.begin(Sums.of(net(torch.randn(512, 2, generator=generator))))
    for number in range(500):
        optimizer.param_groups[0]["lr"] = warmup_cosine(number, 500, 0.01, 0.0, final=0.0)
        x = net(torch.randn(64, 2, generator=generator))
        _, rows = step(target, moments, x)
        optimizer.zero_grad()
        x.backward(rows.float())
        optimizer.step()
    after = judged(net)
    assert before[0] > 3
    assert after[0] < 0.1
    assert after[1] < before[1] / 10

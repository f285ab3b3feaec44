"""The loss against a naive re-derivation, one process against two, and what is refused."""

from __future__ import annotations

import math
import operator
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from code_worker.training.fitting.objective import (
    VIEWS,
    ContrastiveLoss,
    ViewEmbeddings,
    contrastive_loss,
    derangement,
    gather_rows,
    nce,
)
from tests.patience import LIMIT_S
from tests.rounding import SINGLE, loss_error
from tests.training.joined import JOINED_CASES, records, seeded, step
from tests.worker.harness import start

GRID = [
    (batch, width, temperature)
    for batch in (1, 2, 3, 16, 65)
    for width in (1, 5, 192)
    for temperature in (0.02, 0.1, 0.5, 2.0)
]


def naive_nce(
    queries: NDArray[np.float64], positives: NDArray[np.float64], negatives: NDArray[np.float64], temperature: float
) -> list[float]:
    """The formula, one number at a time."""

    def cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
        return float(one @ other / math.sqrt(float(one @ one) * float(other @ other)))

    losses = []
    for query, positive in zip(queries, positives, strict=True):
        wanted = math.exp(cosine(query, positive) / temperature)
        unwanted = math.fsum(math.exp(cosine(query, negative) / temperature) for negative in negatives)
        losses.append(-math.log(wanted / (wanted + unwanted)))
    return losses


def naive_loss(embeddings: Tensor, pi_real: Tensor, pi_fake: Tensor, temperature: float) -> tuple[float, float]:
    views = dict(zip(VIEWS, embeddings.double().numpy().transpose(1, 0, 2), strict=True))

    def half(label: str, other: str, permutation: Tensor) -> float:
        permuted = views[f"{label}_augmented"][permutation.numpy()]
        first = naive_nce(views[label], permuted, views[f"{other}_augmented"], temperature)
        second = naive_nce(views[f"{label}_local"], views[f"{label}_global"], views[f"{other}_global"], temperature)
        return (math.fsum(first) / len(first) + math.fsum(second) / len(second)) / 2

    return half("real", "fake", pi_real), half("fake", "real", pi_fake)


def loss_of(embeddings: Tensor, temperature: float = 0.1, *, seed: int = 0) -> ContrastiveLoss:
    generator = seeded(seed)
    return contrastive_loss(
        ViewEmbeddings.of_records(embeddings),
        permutation_real=derangement(len(embeddings), generator),
        permutation_fake=derangement(len(embeddings), generator),
        temperature=temperature,
    )


@pytest.mark.numeric
@pytest.mark.parametrize(("batch", "width", "temperature"), GRID)
def test_the_loss_is_that_of_a_naive_derivation(batch: int, width: int, temperature: float) -> None:
    embeddings = records(batch, width, seed=batch + width)
    generator = seeded(3)
    pi_real, pi_fake = derangement(batch, generator), derangement(batch, generator)
    loss = loss_of(embeddings, temperature, seed=3)
    real, fake = naive_loss(embeddings, pi_real, pi_fake, temperature)
    assert float(loss.real) == pytest.approx(real, rel=1e-10)
    assert float(loss.fake) == pytest.approx(fake, rel=1e-10)
    assert float(loss.total) == pytest.approx(real + fake, rel=1e-10)


@pytest.mark.numeric
@pytest.mark.parametrize(("batch", "width", "temperature"), [case for case in GRID if case[2] >= 0.1])
def test_single_precision_costs_no_more_than_its_rounding(batch: int, width: int, temperature: float) -> None:
    embeddings = records(batch, width, seed=batch + width, dtype=torch.float32)
    exact = float(loss_of(embeddings.double(), temperature).total)
    loss = loss_of(embeddings, temperature).total
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(exact, rel=0, abs=loss_error(batch, width, temperature, exact, SINGLE))


@pytest.mark.numeric
@pytest.mark.parametrize("negatives", [1, 2, 40])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_every_query_has_its_own_loss_against_all_negatives(negatives: int, temperature: float) -> None:
    queries, positives = torch.randn(2, 6, 9, generator=seeded(1), dtype=torch.float64).unbind()
    others = torch.randn(negatives, 9, generator=seeded(2), dtype=torch.float64)
    losses = nce(queries, positives, others, temperature)
    expected = naive_nce(queries.numpy(), positives.numpy(), others.numpy(), temperature)
    assert losses.tolist() == pytest.approx(expected, rel=1e-10)


def test_the_temperature_of_the_paper_is_the_default() -> None:
    embeddings = records(4, 8)
    assert float(loss_of(embeddings).total) == float(loss_of(embeddings, 0.1).total)
    queries, positives, negatives = embeddings[:, 0], embeddings[:, 1], embeddings[:, 2]
    assert torch.equal(nce(queries, positives, negatives), nce(queries, positives, negatives, 0.1))


@pytest.mark.numeric
def test_the_gradient_is_the_slope() -> None:
    embeddings = records(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: loss_of(values).total, (embeddings,))


def test_an_extreme_temperature_overflows_nothing() -> None:
    embeddings = records(4, 8, dtype=torch.float32).requires_grad_()
    loss = loss_of(embeddings, 1e-4).total
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert embeddings.grad is not None
    assert bool(loss.isfinite())
    assert bool(embeddings.grad.isfinite().all())


@pytest.mark.numeric
def test_a_tiny_loss_keeps_its_digits() -> None:
    query = torch.tensor([[1.0, 0.0]])
    loss = nce(query, query, -query, 0.05)
    # τ, the quotient and the difference are rounded; exponential and logarithm are right to two units each.
    assert float(loss) == pytest.approx(math.log1p(math.exp(-40)), rel=(3 * 40 + 4) * SINGLE)


@pytest.mark.numeric
def test_the_length_of_embeddings_does_not_matter() -> None:
    embeddings = records(5, 7)
    scales = 0.1 + 10 * torch.rand(5, 8, 1, generator=seeded(1), dtype=torch.float64)
    assert float(loss_of(embeddings).total) == pytest.approx(float(loss_of(embeddings * scales).total), rel=1e-12)


def test_classes_apart_cost_less_than_classes_mixed() -> None:
    embeddings = torch.zeros(6, 8, 2, dtype=torch.float64)
    embeddings[:, :4, 0] = embeddings[:, 4:, 1] = 1
    assert float(loss_of(embeddings).total) < 0.01
    embeddings[:3] = embeddings[:3].flip(-1)
    assert float(loss_of(embeddings).total) > 4


@pytest.mark.numeric
def test_half_precision_is_computed_in_single_under_autocast() -> None:
    embeddings = records(6, 16, dtype=torch.float32).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(embeddings)
        losses = nce(embeddings[:, 0], embeddings[:, 1], embeddings[:, 2])
    assert loss.total.dtype == losses.dtype == torch.float32
    exact = float(loss_of(embeddings.double()).total)
    assert float(loss.total) == pytest.approx(exact, rel=0, abs=loss_error(6, 16, 0.1, exact, SINGLE))


@pytest.mark.parametrize("n", range(2, 65))
def test_a_derangement_leaves_nothing_in_its_place(n: int) -> None:
    generator = seeded(n)
    for _ in range(40):
        permutation = derangement(n, generator)
        assert sorted(permutation.tolist()) == list(range(n))
        assert not any(map(operator.eq, permutation.tolist(), range(n)))


def test_one_record_is_its_own_partner() -> None:
    assert derangement(1, seeded(0)).tolist() == [0]
    with pytest.raises(ValueError, match="at least one element, not 0"):
        derangement(0, seeded(0))


def test_every_derangement_is_drawn_equally_often() -> None:
    generator = seeded(9)
    drawn = [tuple(derangement(4, generator).tolist()) for _ in range(3600)]
    counts = {permutation: drawn.count(permutation) for permutation in set(drawn)}
    assert len(counts) == 9
    assert max(abs(count - 400) for count in counts.values()) < 5 * math.sqrt(400)


def test_the_same_seed_permutes_alike() -> None:
    assert torch.equal(derangement(50, seeded(1)), derangement(50, seeded(1)))
    assert not torch.equal(derangement(50, seeded(1)), derangement(50, seeded(2)))


def test_views_come_apart_in_order() -> None:
    views = ViewEmbeddings.of_records(torch.arange(16.0).reshape(2, 8, 1))
    assert [getattr(views, name).flatten().tolist() for name in VIEWS] == [[i, i + 8] for i in range(8)]


@pytest.mark.parametrize("shape", [(2, 7, 4), (2, 8), (0, 8, 4), (2, 8, 0)])
def test_other_numbers_of_views_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be (\(B, 8, d\)|a matrix)"):
        ViewEmbeddings.of_records(torch.zeros(shape))


def test_views_of_different_shapes_are_refused() -> None:
    views = dict.fromkeys(VIEWS, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"fake_local must be of shape \(2, 4\), not \(3, 4\)"):
        ViewEmbeddings(**{**views, "fake_local": torch.zeros(3, 4)})


def test_shapes_that_do_not_fit_are_refused() -> None:
    rows = torch.ones(3, 4)
    for queries, positives, negatives, message in (
        (rows[0], rows[0], rows, "queries must be a matrix"),
        (rows, rows[:2], rows, r"positives must be of shape \(3, 4\)"),
        (rows, rows, rows[:0], "negatives must be a matrix with at least one row"),
        (rows, rows, rows[:, :2], r"negatives must be of shape \(3, 4\), not \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            nce(queries, positives, negatives)


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    rows = torch.ones(2, 4)
    with pytest.raises(ValueError, match="temperature must be positive"):
        nce(rows, rows, rows, temperature)
    with pytest.raises(ValueError, match="temperature must be positive"):
        loss_of(records(2, 4), temperature)


def test_a_permutation_of_another_length_is_refused() -> None:
    views = ViewEmbeddings.of_records(records(3, 4))
    good, bad = derangement(3, seeded(0)), derangement(2, seeded(0))
    with pytest.raises(ValueError, match=r"must be \(3,\), the joined batch, not \(2,\)"):
        contrastive_loss(views, permutation_real=good, permutation_fake=bad)


def test_without_a_process_group_rows_are_gathered_from_nobody() -> None:
    rows = torch.ones(2, 3)
    assert gather_rows(rows) is rows


def test_two_processes_equal_one_with_the_joined_batch(tmp_path: Path) -> None:
    with (tmp_path / "log.txt").open("ab") as log:
        command = [sys.executable, "-m", "tests.training.joined"]
        running = [start([*command, str(rank), str(tmp_path)], os.environ, log) for rank in range(2)]
    assert [process.wait(LIMIT_S) for process in running] == [0, 0], (tmp_path / "log.txt").read_text()
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [results["rows"].flatten().tolist() for results in both] == [[0, 0, 1, 1]] * 2
    for batch, temperature in JOINED_CASES:
        encoder, loss = step(batch, temperature)
        for results in both:
            assert float(results[f"loss {batch}"]) == pytest.approx(float(loss), rel=1e-12)
            for name, parameter in encoder.named_parameters():
                torch.testing.assert_close(results[f"{name} {batch}"], parameter.grad, rtol=1e-9, atol=1e-12)
    alone = [step(5, 0.1, part, gather=False)[1] for part in (slice(5), slice(5, 10))]
    assert [float(results["alone"]) for results in both] == pytest.approx([float(loss) for loss in alone], rel=1e-12)
    assert float(sum(alone)) / 2 < float(both[0]["loss 5"])  # fewer negatives

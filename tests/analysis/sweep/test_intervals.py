"""Intervals of a sweep's table: what seeds and what examples add to them."""

import dataclasses

import numpy as np
import pytest

from lora_jax.analysis.sweep import result

pytestmark = pytest.mark.once


def run_of(rank, values):
    return result.Run(rank, 1e-3, 0, 1, 1, [0.0], None, 1.0, 1, np.asarray(values, float))


def test_intervals_are_those_of_paired_draws():
    """A rank that errs on just the same examples as full fine-tuning is surely as good."""
    right = np.arange(100) % 4 != 0
    other = np.roll(right, 1)
    worse = right & (np.arange(100) % 10 != 1)
    found = result.summarize(
        {1: [run_of(1, worse)], 2: [run_of(2, other)], 4: [run_of(4, right)],
         "full": [run_of("full", right)]},
        [], reduce=lambda v: float(np.mean(v)), metric="accuracy", lower_is_better=False,
        tolerance=0.01,
    )  # fmt: skip
    rows = {row.rank: row for row in found.rows}
    assert rows[4].ratio_interval == (1.0, 1.0)
    assert rows[2].ratio_interval[0] < 0.9 < 1.1 < rows[2].ratio_interval[1]
    # An accuracy of 75 % on 100 examples: a standard error of 4.3 points.
    assert rows[4].interval == pytest.approx((0.665, 0.835), abs=0.02)
    assert found.smallest == 2 and found.smallest_interval == (2, 4)


@pytest.mark.parametrize(("lower", "expected"), [(False, 2), (True, 1)])
def test_a_tolerance_is_of_the_size_of_a_negative_score(lower, expected):
    """Such as a log-likelihood: -2.1 is within 10 % of -2."""
    scores = {1: -2.3, 2: -2.1, 4: -2.0, "full": -2.0}
    assert result._within(scores, [1, 2, 4], lower, 0.1) == expected
    assert result._within({1: -1.9, "full": -2.0}, [1], lower, 0.1) == 1


def draws_of(seeds):
    """A rank's interval, and the draws that it is of, for a list of a seed's values."""
    runs = [run_of(1, values) for values in seeds]
    found = result.summarize(
        {1: runs, "full": runs}, [], reduce=lambda v: float(np.mean(v)), metric="accuracy",
        lower_is_better=False, tolerance=0.01,
    )  # fmt: skip
    drawn = result._draws({1: seeds}, lambda v: float(np.mean(v)), 0)[1]
    return found.rows[0], drawn


def test_intervals_hold_what_seeds_and_what_examples_add():
    """Against the variance of a mean over seeds and over examples: both parts, and their sum."""
    effects = np.asarray([-0.06, -0.02, 0.02, 0.06])
    of_seeds = np.var(effects, ddof=1) / 4
    alike = np.random.default_rng(0).normal(0.8, 0.3, size=100)
    of_examples = np.var(alike) / 100
    for seeds, variance in (
        (0.8 + effects[:, None] + np.zeros(100), of_seeds),
        (np.stack([alike] * 4), of_examples),
        (alike + effects[:, None], of_seeds + of_examples),
    ):
        row, drawn = draws_of(list(seeds))
        assert np.var(drawn) == pytest.approx(variance, rel=0.1)
        assert row.score == pytest.approx(np.mean(seeds))
        wanted = row.score + 1.96 * np.sqrt(variance) * np.asarray([-1, 1])
        assert row.interval == pytest.approx(wanted, abs=0.01)
        assert row.deviation == pytest.approx(np.std(seeds.mean(axis=1), ddof=1))


def test_two_seeds_that_differ_leave_the_smallest_rank_open():
    """Each rank is 0.9 in one seed and 0.8 in the other: the means are the same, nothing more."""
    runs = {1: (0.8, 0.9), 2: (0.9, 0.8), "full": (0.9, 0.8)}
    found = result.summarize(
        {rank: [run_of(rank, [score] * 20) for score in of] for rank, of in runs.items()},
        [], reduce=lambda v: float(np.mean(v)), metric="accuracy", lower_is_better=False,
        tolerance=0.01,
    )  # fmt: skip
    rows = {row.rank: row for row in found.rows}
    assert found.smallest == 1 and found.smallest_interval == (1, 2)
    assert rows[1].ratio_interval == pytest.approx((0.8 / 0.9, 0.9 / 0.8))
    assert rows[2].ratio_interval == (1.0, 1.0)  # the seeds are paired
    assert rows[2].interval == pytest.approx((0.8, 0.9))
    assert rows[1].deviation == pytest.approx(0.1 / np.sqrt(2))


def test_no_rank_is_enough(tmp_path):
    found = result.summarize(
        {1: [run_of(1, [0.5] * 20)], "full": [run_of("full", [1.0] * 20)]},
        [], reduce=lambda v: float(np.mean(v)), metric="accuracy", lower_is_better=False,
        tolerance=0.01,
    )  # fmt: skip
    assert found.smallest is None
    assert "above the largest" in found.verdict()
    # Runs that were not timed have no place in a panel, and the figure is made all the same.
    rows = tuple(row._replace(seconds=float("nan")) for row in found.rows)
    dataclasses.replace(found, rows=rows).plot(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("lower", [False, True])
def test_a_metric_that_full_fine_tuning_does_not_move_tells_nothing(lower):
    def verdict(full):
        scores = {"base": 0.25, 1: 0.25, "full": full}
        runs = {rank: [run_of(rank, [score] * 20)] for rank, score in scores.items()}
        return result.summarize(
            runs, [], reduce=lambda v: float(np.mean(v)), metric="exact", lower_is_better=lower,
            tolerance=0.01,
        ).verdict()  # fmt: skip

    assert verdict(0.25).startswith("full fine-tuning is no better than the base (0.2500 and 0.25")
    assert "no better than the base" in verdict(0.5 if lower else 0.125)
    assert "no better" not in verdict(0.125 if lower else 0.5)

"""Percentiles with enough behind them; verdicts that are seldom wrong."""

import math

import numpy as np
import pytest

from deploykit import verify
from deploykit.errors import DataError
from deploykit.stats import MIN_ROUNDS, Latency, Ratio

COUNTS = [(1, ()), (9, ()), (10, ("p90",)), (99, ("p90",)), (100, ("p90", "p99")), (1000, ("p90", "p99", "p99_9"))]


@pytest.mark.parametrize(("count", "known"), COUNTS)
def test_a_percentile_needs_samples_beyond_it(count, known):
    found = Latency.of([0.001 * (i + 1) for i in range(count)])
    assert tuple(key for key in ("p90", "p99", "p99_9") if getattr(found, key) is not None) == known
    assert found.median == pytest.approx(np.median(np.arange(1, count + 1)))
    assert (found.min, found.runs) == (1, count)


def test_percentiles_are_numpys_in_milliseconds():
    samples = np.random.default_rng(0).lognormal(size=2000)
    found = Latency.of(list(samples))
    assert found.p99_9 == pytest.approx(1e3 * np.percentile(samples, 99.9))
    assert set(found.to_json()) == {"median", "p90", "p99", "p99_9", "min"}


@pytest.mark.parametrize("samples", [[], [0.0], [-1.0], [math.nan], [math.inf], [[1.0]]])
def test_impossible_timings_are_refused(samples):
    with pytest.raises(DataError, match="positive, finite numbers"):
        Latency.of(samples)
    with pytest.raises(DataError, match="positive, finite numbers"):
        Ratio.of([samples], [[1.0]])


def test_the_interval_is_the_sign_tests():
    # Known: for n = 10 the 2nd and 9th order statistics hold the median with 97.85 %, for n = 20 the 6th and 15th
    # with 95.86 % (David & Nagaraja, sec. 7.1).
    assert verify.median_interval(range(1, 11)) == (2, 9)
    assert verify.median_interval(range(1, 21)) == (6, 15)
    assert verify.median_interval([1, 2, 3, 4, 5]) is None
    assert verify.median_interval([6, 1, 2, 3, 4, 5]) == (1, 6)
    assert verify.median_interval([]) is None
    assert verify.median_interval([3.0], confidence=0.0) == (3.0, 3.0)


@pytest.mark.parametrize(("factor", "verdict"), [(0.5, "faster"), (2.0, "slower"), (1.0, "undecided")])
def test_the_verdict_is_said_of_a(factor, verdict):
    b = [[1.0 + 0.01 * i, 1.0, 2.0] for i in range(-5, 6)]
    a = [[factor * s * (1 + 0.01 * (-1) ** i) for s in r] for i, r in enumerate(b)]
    found = Ratio.of(a, b)
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(factor, rel=0.02)
    assert found.low <= found.ratio <= found.high
    assert (found.reason is None) == (verdict != "undecided")


def test_a_and_b_exchanged_give_the_reciprocal():
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(size=(2, 20, 5))
    there, back = Ratio.of(a, b), Ratio.of(b, a)
    assert (there.ratio, there.low, there.high) == pytest.approx((1 / back.ratio, 1 / back.high, 1 / back.low))


def test_too_few_rounds_are_undecided_with_a_reason():
    found = Ratio.of([[1.0]] * (MIN_ROUNDS - 1), [[9.0]] * (MIN_ROUNDS - 1))
    assert (found.verdict, found.low, found.high) == ("undecided", None, None)
    assert "too few" in found.reason
    assert found.to_json()["ci95"] is None
    assert Ratio.of([[1.0]] * MIN_ROUNDS, [[9.0]] * MIN_ROUNDS).verdict == "faster"


def test_rounds_must_be_pairs():
    with pytest.raises(DataError, match="2 rounds, b has 1"):
        Ratio.of([[1.0], [1.0]], [[1.0]])
    with pytest.raises(DataError, match="no rounds"):
        Ratio.of([], [])


def measured(rng, experiments, rounds, effect, modes, runs=10):
    """log ratios of A B B A rounds on a machine that drifts ±30 % a minute, bursts 3× in 5 % of the samples and has
    two speeds 15 % apart, changing by run, by round, or seldom."""
    at = np.arange(2 * rounds).reshape(1, rounds, 2)  # one second per half round
    drift = 1 + 0.3 * np.sin(2 * np.pi * at / 60 + rng.uniform(0, 2 * np.pi, (experiments, 1, 1)))
    drift = np.where((np.arange(rounds) % 2 == 1)[None, :, None], drift[..., ::-1], drift)
    times = drift[..., None] * np.exp(0.03 * rng.standard_normal((*drift.shape, runs)))
    times *= np.where(rng.random(times.shape) < 0.05, 3, 1)
    slow = {"run": rng.random(times.shape) < 0.5, "round": rng.random((*drift.shape, 1)) < 0.5}
    times *= np.where(slow.get(modes, rng.random((*drift.shape, 1)) < 0.1), 1.15, 1)
    times[:, :, 0] *= effect
    medians = np.log(np.median(times, axis=-1))
    return medians[..., 0] - medians[..., 1]


def said(logs):
    """The share of experiments called different, in either direction."""
    intervals = [verify.median_interval(row) for row in logs]
    return np.mean([high < 0 or low > 0 for low, high in intervals])


@pytest.mark.parametrize("modes", ["run", "round", "seldom"])
@pytest.mark.parametrize("rounds", [6, 20, 60])
def test_a_model_seldom_differs_from_itself(modes, rounds):
    logs = measured(np.random.default_rng(1), 1500, rounds, 1.0, modes)
    assert said(logs) <= 0.05


@pytest.mark.parametrize("modes", ["run", "round", "seldom"])
def test_a_tenth_is_found_in_sixty_rounds(modes):
    logs = measured(np.random.default_rng(2), 500, 60, 0.9, modes)
    assert said(logs) >= 0.9


def test_the_simulated_rounds_go_the_way_of_the_public_ones():
    rng = np.random.default_rng(3)
    a, b = rng.lognormal(size=(2, 9, 5))
    interval = verify.median_interval(np.log(np.median(a, axis=1) / np.median(b, axis=1)))
    found = Ratio.of(a, b)
    assert (found.low, found.high) == pytest.approx(tuple(np.exp(interval)))

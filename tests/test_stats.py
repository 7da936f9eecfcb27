"""Percentiles with enough behind them; verdicts that are seldom wrong."""

import itertools
import math

import numpy as np
import pytest
from noisy_clock import Noise, by_ranks, called, logs_of, medians_of, pipeline

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


def subsets(n: int) -> np.ndarray:
    """The sums of ranks 1, ..., n over all 2^n subsets."""
    return np.array([sum(chosen) for size in range(n + 1) for chosen in itertools.combinations(range(1, n + 1), size)])


@pytest.mark.parametrize("n", [6, 7, 9, 12])
def test_the_interval_ends_where_wilcoxons_test_does(n):
    # P(T < k) counted over all signs; the interval is that of the k-th pair means from both ends
    values = np.random.default_rng(n).standard_normal(n) + 0.3
    means = sorted((values[i] + values[j]) / 2 for i in range(n) for j in range(i + 1))
    sums = subsets(n)
    k = max(k for k in range(1, len(means) // 2 + 1) if 2 * np.mean(sums < k) <= 1 - verify.CONFIDENCE + 1e-12)
    assert verify.centre_interval(values) == pytest.approx((means[k - 1], means[-k]))
    assert verify.centre(values) == pytest.approx(np.median(means))


def test_known_intervals():
    # Hollander, Wolfe & Chicken, table A.4: for n = 10 P(T <= 8) = 0.0244, for n = 20 P(T <= 52) = 0.0242
    for n, k in ((10, 9), (20, 53)):
        means = sorted((i + j) / 2 for i in range(1, n + 1) for j in range(1, i + 1))
        assert verify.centre_interval(range(1, n + 1), confidence=0.95) == (means[k - 1], means[-k])
    assert verify.centre_interval([1, 2, 3, 4, 5]) is None
    assert verify.centre_interval([6, 1, 2, 3, 4, 5]) == (1, 6)
    assert verify.centre_interval([]) is None
    assert verify.centre_interval([3.0], confidence=0.0) == (3.0, 3.0)


def test_the_interval_follows_shift_scale_and_sign():
    values = np.random.default_rng(0).lognormal(size=21)
    low, high = verify.centre_interval(values)
    assert verify.centre_interval(3 * values - 7) == pytest.approx((3 * low - 7, 3 * high - 7))
    assert verify.centre_interval(-values) == pytest.approx((-high, -low))
    assert low < verify.centre(values) < high


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


# ------------------------------------------------------------------------------------------- on clocks that lie

BENCHMARKS = 1000
SELF, TENTH = 50, 900  # called different from itself at most; a true 10 % found at least

CLOCKS = [Noise(modes, burst) for modes in ("run", "block", "seldom") for burst in (1, 10)]
KINDS = [f"{noise.modes}-{noise.burst}" for noise in CLOCKS]


def drawn(seed, rounds, effect, noise, benchmarks=BENCHMARKS):
    return logs_of(np.random.default_rng(seed), benchmarks, rounds, effect, noise)


def test_the_committed_noise_is_what_it_says():
    medians = medians_of(np.random.default_rng(0), 200, 60, 1.1, Noise("block", 10))
    times = np.exp(medians)
    slowest, fastest = np.quantile(times, (0.999, 0.001))
    assert 0.6 < fastest < 0.75  # 0.7
    assert 3.0 < slowest < 5.0  # and 3 x 1.3 x 1.15 x 1.1
    assert np.median(medians[..., 0] - medians[..., 1]) == pytest.approx(math.log(1.1), abs=0.01)
    ends = medians_of(np.random.default_rng(0), 200, 60, 1.0, Noise("process"), np.zeros(200))
    assert np.median(np.abs(ends[:, 0].mean(axis=1) - ends[:, 30].mean(axis=1))) < 0.05  # a minute later


@pytest.mark.parametrize("noise", CLOCKS, ids=KINDS)
def test_a_model_seldom_differs_from_itself(noise):
    assert called(by_ranks(drawn(1, 60, 1.0, noise))) <= SELF


@pytest.mark.parametrize("rounds", [6, 7, 10, 20])
def test_nor_does_it_in_few_rounds(rounds):
    assert called(by_ranks(drawn(rounds, rounds, 1.0, Noise()))) <= SELF


@pytest.mark.parametrize("effect", [1.1, 1 / 1.1])
@pytest.mark.parametrize("noise", CLOCKS, ids=KINDS)
def test_a_tenth_is_found_in_sixty_rounds(noise, effect):
    assert called(by_ranks(drawn(2, 60, effect, noise, 400))) >= TENTH * 400 / BENCHMARKS


STAGES = [Noise("block", 3, 0.015), Noise("process", 1, 0.015)]


@pytest.mark.parametrize("noise", STAGES, ids=lambda noise: noise.modes)
def test_both_stages_keep_the_promise_where_processes_have_luck(noise):
    verdicts = [ratio.verdict for ratio in pipeline(np.random.default_rng(3), 600, 1.0, noise)]
    assert sum(verdict != "undecided" for verdict in verdicts) <= SELF * 600 / BENCHMARKS
    pooled = np.concatenate([drawn(seed, 10, 1.0, noise, 600) for seed in range(6)], axis=1)
    assert noise.modes != "process" or called(by_ranks(pooled)) > 2 * SELF * 600 / BENCHMARKS  # why they are needed


@pytest.mark.parametrize(("effect", "verdict"), [(1.1, "slower"), (1 / 1.1, "faster")])
def test_both_stages_find_a_tenth(effect, verdict):
    found = pipeline(np.random.default_rng(4), 200, effect, Noise("block", 3, 0.015))
    assert sum(ratio.verdict == verdict for ratio in found) >= TENTH * 200 / BENCHMARKS


def test_the_simulated_rounds_go_the_way_of_the_public_ones():
    rng = np.random.default_rng(3)
    a, b = rng.lognormal(size=(2, 9, 5))
    logs = np.log(np.median(a, axis=1) / np.median(b, axis=1))
    found = Ratio.of(a, b)
    (interval,) = by_ranks(logs[None])
    assert (found.low, found.high) == pytest.approx(tuple(np.exp(interval)))
    assert Ratio.of_logs(list(logs)) == found

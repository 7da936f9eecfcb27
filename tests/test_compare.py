"""The laws of "equivalent", both ways: every correct float32 evaluation passes, every corrupted one fails."""

import itertools
import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit import verify
from deploykit.compare import (
    Fidelity,
    Noise,
    Tolerance,
    all_passed,
    compare,
    compare_outputs,
    noise_between,
    policy_from,
)
from deploykit.errors import DataError, InputError

F32 = policy_from()
EPS = verify.EPS32


def answers(shape=(16, 10), relative=1e-6, seed=0, scale=1.0):
    """A float64 reference and a float32 answer that is off by `relative`."""
    rng = np.random.default_rng(seed)
    r = rng.standard_normal(shape) * scale
    return r, (r * (1 + relative * rng.standard_normal(shape))).astype(np.float32)


# ---- correct candidates pass -----------------------------------------------------------------------------------


def product_permuted(x, w, rng):
    p = rng.permutation(len(w))
    return x[:, p] @ w[p]


def product_blocked(x, w, rng):
    edges = np.sort(rng.integers(0, len(w) + 1, 3))
    return sum((x[:, a:b] @ w[a:b] for a, b in zip([0, *edges], [*edges, len(w)], strict=True)), x.dtype.type(0))


def product_pairwise(x, w, rng):
    return (np.ascontiguousarray(x[:, None, :] * w.T[None]).sum(-1, dtype=x.dtype)).astype(x.dtype)


def product_sequential(x, w, rng):
    return np.cumsum(x[:, None, :] * w.T[None], axis=-1, dtype=x.dtype)[..., -1]


PRODUCTS = [product_permuted, product_blocked, product_pairwise, product_sequential]


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


ENDS = {
    "linear": lambda x: x,
    "softmax": softmax,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}
HIDDEN = [lambda x: np.maximum(x, 0), np.tanh, lambda x: x / (1 + np.exp(-x))]


def random_net(rng):
    """Weights, hidden activations, end, samples and scale of a random multi-layer perceptron."""
    widths = rng.integers(3, 200, rng.integers(2, 12))
    weights = [rng.standard_normal((a, b)).astype(np.float32) for a, b in itertools.pairwise(widths)]
    weights = [w * np.float32(rng.choice([0.5, 1.0, 1.5]) / math.sqrt(len(w))) for w in weights]
    scale = 10.0 ** rng.choice([-20, -3, 0, 0, 0, 3, 15])
    x = (rng.standard_normal((rng.choice([8, 16, 32]), widths[0])) * (scale if scale < 1e3 else 1)).astype(np.float32)
    weights[-1] = weights[-1] * np.float32(scale if scale >= 1e3 else 1)
    hidden = [HIDDEN[i] for i in rng.integers(0, 2 if scale != 1 else 3, len(weights) - 1)]
    return weights, hidden, (ENDS[rng.choice(list(ENDS))] if scale == 1 else ENDS["linear"]), x


def evaluate(net, dtype, product, rng):
    weights, hidden, end, x = net
    x = x.astype(dtype)
    for w, f in zip(weights, [*hidden, end], strict=True):
        x = f(product(x, w.astype(dtype), rng))
    return x


def plain(x, w, rng):
    return x @ w


def sweep(seeds):
    """Every law's largest use: candidate's error over what is allowed, and over the original's own."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        net = random_net(rng)
        with np.errstate(all="ignore"):
            r, o = evaluate(net, np.float64, plain, rng), evaluate(net, np.float32, plain, rng)
            for product in PRODUCTS:
                yield seed, product, compare("y", r, o, evaluate(net, np.float32, product, rng), F32)


def test_a_float32_net_with_another_summation_order_passes():
    found = list(sweep(range(80)))
    assert [(seed, product.__name__, c.reason) for seed, product, c in found if not c.passed] == []
    assert max(c.noise_ratio or 0 for *_, c in found) > 0.5  # the nets do round


def test_the_original_itself_and_the_reference_pass():
    r, o = answers()
    assert compare("y", r, o, o, F32).passed
    exact = compare("y", r, o, r.astype(np.float32), F32)
    assert exact.passed
    assert compare("y", r.astype(np.float32), o, r.astype(np.float32), F32).exact


# ---- wrong candidates fail -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    own=st.sampled_from([0.0, 1e-8, 1e-7, 1e-6, 1e-4]),
    times=st.floats(10.01, 1e6),
    shape=st.sampled_from([(1, 1), (1, 50), (40, 1), (7, 3, 5)]),
    scale=st.sampled_from([1e-25, 1e-3, 1.0, 1e20]),
)
def test_more_than_ten_times_the_original_always_fails(seed, own, times, shape, scale):
    rng = np.random.default_rng(seed)
    r = rng.standard_normal(shape) * scale
    o = r * (1 + own * rng.standard_normal(shape))
    wrong = rng.standard_normal(shape)
    size = times * max(np.linalg.norm((o - r).ravel()), EPS * np.linalg.norm(r.ravel()))
    c = r + wrong * (size / np.linalg.norm(wrong.ravel()))
    assert not compare("y", r, o, c, F32).passed


def test_ten_times_the_whole_error_fails_even_where_no_single_sample_stands_out():
    r, o = answers((64, 4), 1e-6)
    c = (r + 6 * (o - r)).astype(np.float32)  # within the factors of sample (8) and element (16)
    found = compare("y", r, o, c, F32)
    assert not found.passed
    assert found.reason.startswith("whole output")
    assert "; " not in found.reason


@pytest.mark.parametrize("samples", [2, 3, 16])
def test_a_huge_sample_does_not_hide_a_wrong_small_one(samples):
    r, o = answers((samples, 10))
    r[0] *= 1e8
    o[0] *= np.float32(1e8)
    c = o.copy()
    c[1] *= np.float32(1.001)
    found = compare("y", r, o, c, F32)
    assert not found.passed
    assert found.reason.startswith("sample 1 (1 of ")
    assert found.worst_sample == 1


def test_one_ill_conditioned_sample_does_not_loosen_the_others():
    r, o = answers((8, 10))
    r[:2] *= 1e-3  # so small that the whole-output law cannot see them
    o[:2] *= np.float32(1e-3)
    o[0] *= np.float32(1.02)
    c = o.copy()
    c[1] *= np.float32(1.05)
    assert "sample 1 (1 of 8 fail)" in compare("y", r, o, c, F32).reason


def test_a_sample_that_the_original_hit_by_luck_is_measured_by_the_others():
    r, o = answers((16, 1), 1e-5)
    c = (2 * r - o).astype(np.float32)
    o[3] = r[3]
    assert compare("y", r.astype(np.float32), o, c, F32).passed


@pytest.mark.parametrize("zeros", [[2], [0, 2, 3, 4, 5]])
def test_a_sample_that_is_zero_may_err_like_a_typical_one(zeros):
    r, o = answers((8, 4))
    r[zeros] = o[zeros] = 0
    c = o.copy()
    c[2] = 1e-7
    assert compare("y", r, o, c, F32).passed
    c[2] = 1e-4
    assert not compare("y", r, o, c, F32).passed


def test_one_wrong_element_among_a_million_fails():
    r, o = answers((2, 500_000))
    c = o.copy()
    c[1, 77] += np.float32(5e-4)  # L2: 5e-4 against 7e-4 of noise
    found = compare("y", r, o, c, F32)
    assert not found.passed
    assert found.reason.startswith("worst element")
    assert (found.worst_sample, found.worst_index) == (1, (77,))


def joined(seed=0, samples=32, shape=(), scales=(1e6, 1.0, 1.0, 1.0)):
    """A reference with channels of several scales, and float32 answers: each channel errs by eps of its own size."""
    rng = np.random.default_rng(seed)
    r = rng.uniform(0.1, 1, (samples, *shape, len(scales))) * scales
    return (r, *((r * (1 + 1e-7 * rng.standard_normal(r.shape))).astype(np.float32) for _ in range(2)))


@pytest.mark.parametrize("shape", [(), (4,), (3, 5)])
@pytest.mark.parametrize("off", [1e-2, 1e-4, 1e-5])
def test_a_large_channel_does_not_hide_a_wrong_small_one(shape, off):
    r, o, c = joined(shape=shape)
    assert compare("y", r, o, c, F32).passed
    c[..., 2] *= np.float32(1 + off)
    found = compare("y", r, o, c, F32)
    assert found.reason.startswith("channel 2 (1 of 4 fail): RMS error ")
    error = np.abs(c.astype(float) - r)[..., 2]
    assert (found.worst_sample, *found.worst_index) == (*np.unravel_index(error.argmax(), error.shape), 2)


def test_the_worst_of_a_channel_is_found_in_any_batch():
    r, o, c = joined(shape=(3,))
    c[20, 1, 3] = 7.0
    judge = verify.Judge(F32)
    for rows in (slice(0, 16), slice(16, 24), slice(24, 32)):
        judge.add({"y": r[rows]}, {"y": c[rows]}, {"y": noise_between(r[rows], o[rows])}, {"y": np.float32})
    (found,) = judge.conclude()
    assert (found.worst_sample, found.worst_index) == (20, (1, 3))
    assert "candidate 7, " in found.reason


@pytest.mark.parametrize("wrong", [slice(5, 6), slice(None)])
def test_what_a_channel_fails_by_is_measured_again(wrong):
    """In one sample the original may have been lucky; where all are wrong, one that is drawn again excuses nothing."""
    r, o, c = joined()
    c[wrong, 2] *= np.float32(1 + 1e-4)
    judge = verify.Judge(F32)
    judge.add({"y": r}, {"y": c}, {"y": noise_between(r, o)}, {"y": np.float32})
    (suspect,) = judge.suspects()
    assert suspect in range(*wrong.indices(32))
    judge.remeasured([suspect], {"y": noise_between(r[[suspect]], (r * (1 + 1e-5))[[suspect]].astype(np.float32))})
    (found,) = judge.conclude()
    assert found.passed == (wrong != slice(None))


def test_what_the_whole_output_fails_by_is_measured_again():
    """A sample that is larger than all others together is one draw of the whole output's error, and may be lucky."""
    rng = np.random.default_rng(0)
    r = rng.standard_normal((64, 3))
    r[5] *= 1e5
    o, c = (r * (1 + 1e-6 * rng.standard_normal(r.shape)) for _ in range(2))
    o[5], c[5] = r[5] * (1 + 1e-6), r[5] * (1 + 6e-6)
    judge = verify.Judge(F32)
    judge.add({"y": r}, {"y": c}, {"y": noise_between(r, o)}, {"y": np.float64})
    assert judge.suspects() == [5]
    judge.remeasured([5], {"y": noise_between(r[[5]], r[[5]] * (1 + 2e-6))})
    assert judge.conclude()[0].passed


def test_an_error_that_is_everywhere_makes_half_of_the_samples_suspects():
    """So many are not measured again: `deploykit.check.SUSPECTS`."""
    rng = np.random.default_rng(0)
    r = rng.standard_normal((64, 3))
    o, c = r * (1 + 1e-6 * rng.standard_normal(r.shape)), r * (1 + 6e-6)
    judge = verify.Judge(F32)
    judge.add({"y": r}, {"y": c}, {"y": noise_between(r, o)}, {"y": np.float64})
    assert not judge.conclude()[0].passed
    assert len(judge.suspects()) > 12


@pytest.mark.parametrize("samples", [1, 2, 7, 8])
def test_few_samples_do_not_hide_a_wrong_channel(samples):
    r, o, c = joined(samples=samples)
    assert compare("y", r, o, c, F32).passed
    c[:, 1] *= np.float32(1 + 1e-3)
    assert compare("y", r, o, c, F32).reason.startswith("channel 1 (1 of 4 fail)")


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_channel_may_lie_on_any_axis(axis):
    r, o, c = (np.moveaxis(x, -1, axis) for x in joined(shape=(2, 3)))
    assert compare("y", r, o, c, F32).passed
    place = (slice(None),) * axis + (2,)
    c[place] *= np.float32(1 + 1e-4)
    found = compare("y", r, o, c, F32)
    assert found.reason.startswith("channel 2 (" if axis == 3 else f"on axis {axis}, index 2 (")
    error = np.abs(c.astype(float) - r)
    error[tuple(slice(None) if i != axis else [0, 1, 3] for i in range(4))] = 0
    assert (found.worst_sample, *found.worst_index) == np.unravel_index(error.argmax(), error.shape)


def test_channels_need_a_record_that_fits():
    r, o, c = joined()
    c[:, 1] *= np.float32(1.5)
    noise = noise_between(r, o)
    known = Noise(noise.l2, noise.max_abs)
    assert verify.judge("y", r, c, F32, known, np.float32).passed
    assert not verify.judge("y", r, c, F32, noise, np.float32).passed
    with pytest.raises(verify.RefusedError, match="3 channels, the data 4"):
        verify.judge("y", r, c, F32, Noise(noise.l2, noise.max_abs, ((0.0,) * 3,)), np.float32)


def test_a_rare_class_has_an_absolute_accuracy():
    r, o, c = joined(scales=(1.0, 1.0, 1e-9, 1e-41))
    c[:, 2] += np.float32(2e-7)  # a runtime's softmax
    c[:, 3] = 0.0  # denormal numbers made zero
    assert compare("y", r, o, c, F32).passed
    c[:, 2] += np.float32(1e-5)
    assert "channel 2" in compare("y", r, o, c, F32).reason
    tiny = [x * x.dtype.type(2.0**-110) for x in joined(scales=(1.0, 1.0, 1.0, 1e-9))]
    tiny[2][:, 3] = 0.0
    assert compare("y", *tiny, F32).passed


def test_channels_that_the_original_hit_by_luck_are_measured_by_the_others():
    rng = np.random.default_rng(0)
    r = np.zeros((8, 2000))
    r[rng.integers(0, 8, 2000), np.arange(2000)] = rng.exponential(size=2000)  # of a ReLU: one live value in each
    own, other = (r * (1 + 1e-4 * rng.standard_normal(r.shape)) for _ in range(2))
    assert compare("y", r, own, other, F32).passed


def probabilities(seed, classes=1000, samples=64):
    """Probabilities of many classes, each likely in few samples, and float32 answers whose logits err by 1e-5."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 14, (samples, classes))

    def softmax(z):
        e = np.exp(z - z.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    return softmax(logits), *(softmax(logits + 1e-5 * rng.standard_normal(logits.shape)) for _ in range(2))


@pytest.mark.parametrize("seed", range(8))
def test_a_class_that_is_likely_in_one_sample_is_measured_by_the_whole_output(seed):
    assert compare("y", *probabilities(seed), F32).passed


def test_a_wrong_class_that_is_likely_in_one_sample_is_found():
    r, o, c = probabilities(0)
    k = np.abs(r.max(axis=0) - 0.02).argmin()  # so small beside the others that no other law sees it
    found = compare("y", r, o, np.where(np.arange(1000) == k, c * (1 + 4e-4), c), F32)
    assert found.reason.startswith(f"channel {k} (1 of 1000 fail)")


def test_an_original_far_from_the_reference_is_no_yardstick():
    r, _ = answers()
    found = compare("y", r, (r * 1.1).astype(np.float32), (r * 1.05).astype(np.float32), F32)
    assert not found.passed
    assert "no yardstick" in found.reason


SHIFTS = {
    "bias": lambda o: o + np.float32(1e-4),
    "scale": lambda o: o * np.float32(1.0001),
    "class swap": lambda o: o[:, ::-1],
    "sample swap": lambda o: o[::-1],
    "zeros": np.zeros_like,
    "half": lambda o: o.astype(np.float16).astype(np.float32),
    "one nan": lambda o: np.where(np.arange(o.size).reshape(o.shape) == 5, np.float32("nan"), o),
    "one inf": lambda o: np.where(np.arange(o.size).reshape(o.shape) == 5, np.float32("inf"), o),
    "sign": lambda o: -o,
}


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS.keys())
@pytest.mark.parametrize("scale", [2.0**-100, 1.0, 2.0**100])
def test_corruption_fails_at_any_scale(shift, scale):
    r, o = answers()
    c = shift(o) * np.float32(scale)
    r, o = r * scale, o * np.float32(scale)
    found = compare("y", r, o, c, F32)
    assert not found.passed
    assert "\n" not in found.reason


DRIFTS = [
    (np.zeros((15, 10), np.float32), "shape [15, 10] instead of [16, 10]"),
    (np.zeros((16, 10), np.float64), "dtype float64 instead of float32"),
    (np.zeros((16, 10), np.int32), "dtype int32 instead of float32"),
    (np.zeros((16, 1), np.float32), "shape [16, 1] instead of [16, 10]"),
]


@pytest.mark.parametrize(("candidate", "reason"), DRIFTS)
def test_shape_and_dtype_drift_fail(candidate, reason):
    r, o = answers()
    assert compare("y", r, o, candidate, F32).reason == reason


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_an_empty_output_fails(shape):
    r = np.zeros(shape)
    found = compare("y", r, r.astype(np.float32), r.astype(np.float32), F32)
    assert not found.passed
    assert "nothing to compare" in found.reason


# ---- what cannot be judged -------------------------------------------------------------------------------------


def overflowing():
    r, o = answers((4, 3))
    r[1, 2], o[1, 2] = 1e39, np.inf  # float32 overflow: excluded
    r[2, 0], o[2, 0] = -np.inf, -np.inf  # both infinite: the pattern must be kept
    return r, o


def test_samples_that_overflow_in_the_original_are_excluded_and_counted():
    r, o = overflowing()
    c = o.copy()
    c[1] = 123
    found = compare("y", r, o, c, F32)
    assert found.passed
    assert found.excluded == 1
    assert found.samples == 4


@pytest.mark.parametrize("value", [np.inf, np.nan, 0.0])
def test_an_infinity_of_the_reference_must_be_kept(value):
    r, o = overflowing()
    o[2, 0], c = -np.inf, o.copy()
    c[2, 0] = value
    found = compare("y", r, o, c, F32)
    assert not found.passed
    assert (found.worst_sample, found.worst_index) == (2, (0,))


def test_nothing_left_to_compare_fails():
    r, o = answers((3, 2))
    assert (
        "reference disagree about NaN" in compare("y", r, np.full_like(o, np.nan), np.full_like(o, np.nan), F32).reason
    )
    gone = np.full((3, 2), np.nan)
    assert "nothing left" in compare("y", gone, gone.astype(np.float32), gone.astype(np.float32), F32).reason


EXACT = [
    (np.array([[1], [2]]), np.array([[1], [3]])),
    (np.array([True, False]), np.array([True, True])),
    (np.array(["a", "b"], object), np.array(["a", "c"], object)),
    (np.array([2**63 - 1, 0]), np.array([2**63 - 2, 0])),
]


@pytest.mark.parametrize(("right", "wrong"), EXACT)
def test_exact_kinds_must_be_equal(right, wrong):
    assert compare("y", right, right, right.copy(), F32).passed
    found = compare("y", right, right, wrong, F32)
    assert not found.passed
    assert found.mismatches == 1
    assert found.worst_sample == int(np.argmax((right != wrong).ravel()))


FLIPS = [  # samples, elements of each, flips of the original, others of the candidate, the most in one sample; right?
    (64, 1, 0, 1, 1, False),
    (64, 1, 9, 0, 0, True),
    (64, 1, 9, 1, 1, False),
    (3, 1000, 0, 1, 1, False),
    (24, 36864, 0, 2, 1, True),  # what a segmentation's argmax does on another runtime
    (24, 36864, 0, 17, 1, True),
    (24, 36864, 0, 18, 1, False),
    (24, 36864, 20, 97, 8, True),
    (24, 36864, 20, 98, 8, False),
    (4, 16384, 5, 25, 25, False),  # not in one sample
    (4, 16384, 40, 70, 70, False),  # flips of the original's own are no licence without end: at most 2**-10
    (64, 1024, 0, 5, 4, True),
    (64, 1024, 0, 5, 5, False),
]


@pytest.mark.parametrize(("samples", "elements", "own", "others", "together", "right"), FLIPS)
def test_whole_numbers_may_differ_as_rarely_as_rounding_turns_them(samples, elements, own, others, together, right):
    rng = np.random.default_rng(0)
    r = rng.integers(0, 8, (samples, elements))
    o, c = r.copy(), r.copy()
    spots = rng.permutation(elements)
    for i in range(own):  # evenly over the samples
        o[i % samples, spots[-1 - i // samples]] += 1
    for i in range(others):
        c[-1 - i // together, spots[i % together]] += 1
    found = compare("y", r, o, c, F32)
    assert found.passed is right, found.reason
    assert found.mismatches == others
    assert compare("y", r, o, o, F32).passed
    assert compare("y", r, o, c, Tolerance()).passed is (others == 0)  # a tolerance of zero is none


def test_one_flip_of_the_original_excuses_one_element_and_not_its_sample():
    r = np.zeros((2, 5000), int)
    o, c = r.copy(), r.copy()
    o[1, 7] = c[1, 7] = 3
    found = compare("y", r, o, c, F32)
    assert (found.passed, found.excluded, found.mismatches) == (True, 0, 0)
    assert "1 of 10000" in found.yardstick
    c[1, 100:200] = 3
    found = compare("y", r, o, c, F32)
    assert "100 of 10000 values differ" in found.reason
    assert "in sample 1" in found.reason
    assert (found.worst_sample, found.worst_index) == (1, (100,))


def test_the_luck_of_rare_flips_fails_less_than_one_check_in_a_hundred():
    rng = np.random.default_rng(0)
    for mean in (0.1, 0.5, 1, 2, 3, 4, 6, 10, 30):
        own, others = rng.poisson(mean, (2, 100_000))
        allowed = np.array([F32.allowed_flips(flips, 400_000) for flips in range(90)]) - 400_000 / 2**16
        assert np.mean(others > allowed[own]) < 0.011


def test_exact_samples_where_the_original_differs_are_excluded():
    r = np.array([1, 2, 3])
    o = np.array([1, 9, 3])
    assert compare("y", r, o, o, F32).excluded == 1
    assert compare("y", r, o, o, F32).passed
    assert not compare("y", r, r + 1, r + 1, F32).passed


def test_strings_of_all_kinds_compare():
    for kind in (object, "U3", "S3"):
        texts = np.array(["ab", "c"]).astype(kind)
        assert compare("y", np.array(["ab", "c"], object), np.array(["ab", "c"]), texts, F32).passed


def test_complex_outputs_are_not_judged():
    r = np.ones((2, 2), complex)
    assert "cannot be judged" in compare("y", r, None, r, F32).reason


# ---- top-1 -----------------------------------------------------------------------------------------------------


def two_classes(margin):
    r = np.tile([0.9, 0.1], (32, 1))
    r[3] = [0.5 + margin, 0.5]
    o = (r * (1 + 1e-5 * np.random.default_rng(0).standard_normal(r.shape))).astype(np.float32)
    c = o.copy()
    c[3] = [0.5, np.nextafter(np.float32(0.5), np.float32(1))]
    return compare("y", r, o, c, F32)


def test_a_top1_change_within_rounding_is_excused():
    found = two_classes(1e-6)
    assert found.passed
    assert found.top1_agreement == 31 / 32


def test_a_top1_change_beyond_rounding_fails_though_the_elements_pass():
    r, o = np.tile([0.9, 0.1], (32, 1)), None
    r[3] = [0.5 + 5e-5, 0.5 - 5e-5]
    o = (r * (1 + 4e-6 * np.where(np.arange(64).reshape(32, 2) % 2, 1, -1))).astype(np.float32)
    c = o.copy()
    c[3] = [0.5 - 1e-6, 0.5 + 1e-6]
    law = verify.POLICIES["float32"]
    others = ("factor_whole", "factor_sample", "factor_element")
    loose = verify.Policy(**{**vars(law), **dict.fromkeys(others, 1e3)})
    assert "top-1 changed" in compare("y", r, o, c, loose).reason
    assert compare("y", r, o, c, verify.Policy(**{**vars(loose), "factor_top1": 1e3})).passed


def test_ties_of_the_reference_agree_either_way():
    r = np.tile([0.5, 0.5], (4, 1))
    c = np.tile(np.array([0.5, 0.5000001], np.float32), (4, 1))
    assert compare("y", r, r.astype(np.float32), c, F32).top1_agreement == 1


def test_top1_is_for_matrices_of_two_columns_or_more():
    for shape in [(8, 1), (8,), (8, 3, 2)]:
        r, o = answers(shape)
        assert compare("y", r, o, o, F32).top1_agreement is None


# ---- metrics ---------------------------------------------------------------------------------------------------


def test_metrics_match_their_formulas():
    r, o = answers((8, 5))
    c = (r + 2 * (o - r)).astype(np.float32)
    d = c.astype(float) - r
    found = compare("y", r, o, c, F32)
    assert found.snr_db == pytest.approx(20 * np.log10(np.linalg.norm(r) / np.linalg.norm(d)))
    assert found.reference_snr_db == pytest.approx(20 * np.log10(np.linalg.norm(r) / np.linalg.norm(o - r)))
    assert found.max_abs == np.abs(d).max()
    assert found.max_rel == pytest.approx(np.abs(d / r).max())
    assert found.cosine == pytest.approx(1)
    assert found.noise_ratio == pytest.approx(2, abs=0.2)
    assert found.spread == pytest.approx(np.sqrt(r.var(axis=0).mean() / np.square(r).mean()))


def test_ulps_are_counted_in_the_candidates_own_precision():
    r = np.array([[1.0, 1.0, 3.0, 1.0, 1e-3, -2.0]])
    steps = np.array([[0, 1, 3, 100, 0, 8]])
    for dtype in (np.float32, np.float16):
        right = r.astype(dtype)
        c = (right.astype(float) + steps * np.spacing(np.abs(right)).astype(float)).astype(dtype)
        found = compare("y", right.astype(float), right, c, F32).ulp
        assert found["p50"] == pytest.approx(1, rel=0.2)
        assert 100 <= found["max"] <= 119
        assert sum(number for _, number in found["counts"]) == 6
        assert found["counts"][:2] == [[0.0, 2], [1.0, 1]]
        assert all(edge == 2.0 ** round(np.log2(edge)) for edge, _ in found["counts"][1:])


def test_the_divergence_is_of_distributions_alone():
    rng = np.random.default_rng(0)
    r = rng.dirichlet(np.ones(7), 9)
    c = rng.dirichlet(np.ones(7), 9)
    expected = (r * np.log(r / c)).sum(axis=1)
    found = compare("y", r, r.astype(np.float32), c.astype(np.float32), F32).kl
    assert found["mean"] == pytest.approx(expected.mean(), rel=1e-5)
    assert found["max"] == pytest.approx(expected.max(), rel=1e-5)
    assert compare("y", 2 * r, None, (2 * r).astype(np.float64), F32).kl is None
    gone = c.copy()
    gone[0, 3] = 0.0
    assert compare("y", r, None, gone, F32).kl["max"] is None  # a class that the candidate thinks impossible


def test_the_five_largest_classes():
    rng = np.random.default_rng(0)
    r = rng.permuted(np.tile(np.arange(20.0), (4, 1)), axis=1)
    c = r.copy()
    c[0, r[0] == 19] = 15.5  # the largest falls to the fifth place: still among them
    c[1, r[1] == 19] = 0.0
    c[2, r[2] == 0] = 30.0
    found = compare("y", r, None, c, Tolerance(atol=1e9))
    assert (found.top1_agreement, found.top5_agreement) == (0.25, 0.5)
    assert compare("y", r[:, :5], None, r[:, :5], F32).top5_agreement is None


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(1, 23), max_size=4),
    policy=st.sampled_from([F32, Tolerance(1e-7, 1e-7)]),
    scale=st.sampled_from([1e-200, 1.0, 1e200]),
    spoil=st.sampled_from([None, np.nan, np.inf, 5.0]),
)
def test_any_cut_into_batches_gives_the_same_verdict(seed, cuts, policy, scale, spoil):
    rng = np.random.default_rng(seed)
    r = rng.normal(size=(24, 3, 4)) * rng.choice([1e-3, 1.0, 1e3], (24, 1, 1)) * scale
    o = r * (1 + 1e-7 * rng.normal(size=r.shape))
    c = r * (1 + 1e-7 * rng.normal(size=r.shape))
    if spoil is not None:
        c.flat[rng.integers(c.size)] = spoil
    if seed % 3 == 0:
        o.flat[rng.integers(c.size)] = np.nan
    outputs = {"values": (r, o, c), "exact": ((r > 0), (r > 0), (c > 0)), "classes": (r[:, 0], o[:, 0], c[:, 0])}
    whole = compare_outputs(*({name: arrays[i] for name, arrays in outputs.items()} for i in range(3)), policy)
    judge = verify.Judge(policy)
    for start, stop in itertools.pairwise(sorted({0, 24, *cuts})):
        part = [{name: arrays[i][start:stop] for name, arrays in outputs.items()} for i in range(3)]
        noises = {name: noise_between(part[0][name], part[1][name]) for name in outputs}
        judge.add(part[0], part[2], noises, {name: array.dtype for name, array in part[1].items()})
    for one, other in zip(whole, judge.conclude(), strict=True):
        mine, theirs = one.to_json(), other.to_json()
        for key in ("cosine", "spread", "snr_db", "reference_snr_db", "noise_ratio"):
            assert [mine.pop(key) or 0.0] == pytest.approx([theirs.pop(key) or 0.0], rel=1e-9)
        assert mine == theirs


@pytest.mark.parametrize(("name", "bits"), [("float16", 11), ("bfloat16", 8), ("int8", 8)])
def test_a_lower_precision_is_judged_by_what_it_keeps(name, bits):
    policy = policy_from(precision=name)
    rng = np.random.default_rng(0)
    r = rng.normal(size=(50, 10))
    own = r.astype(np.float32)
    rounded = (r * (1 + 2.0**-bits * rng.uniform(-1, 1, r.shape))).astype(np.float32)
    assert compare("y", r, own, rounded, policy).passed
    assert not compare("y", r, own, rounded, F32).passed
    noise = rng.normal(size=r.shape)
    noise *= np.linalg.norm(r) / np.linalg.norm(noise)
    assert (
        "SNR" in compare("y", r, own, (r + 1.1 * noise * 10 ** (-policy.snr_db / 20)).astype(np.float32), policy).reason
    )
    one = rounded.copy()
    one[7] = -one[7]  # one sample of fifty, far below the whole
    assert "sample 7" in compare("y", 1e-3 * r, 1e-3 * own, 1e-3 * one, policy).reason


def test_answers_that_a_lower_precision_may_turn():
    policy = policy_from(precision="float16")
    r = np.tile([1.0, 0.5, 0.0], (100, 1))
    near = np.tile([1.0, 0.995, 0.0], (100, 1))
    for reference, turned, passed in ((near, 100, True), (r, 2, True), (r, 3, False)):
        c = reference.copy()
        c[:turned, :2] = c[:turned, 1::-1]
        found = compare("y", reference, None, c, Fidelity("x", policy.snr_db, -20.0, policy.top1))
        assert ("top-1 changed" in (found.reason or "")) is not passed
    labels, other = np.zeros((100, 1), int), np.zeros((100, 1), int)
    other[:2] = 1
    assert compare("y", labels, labels, other, policy).passed
    other[2] = 1
    assert not compare("y", labels, labels, other, policy).passed


def test_a_batch_that_fails_is_not_forgotten():
    judge = verify.Judge(F32)
    x = np.ones((2, 3))
    judge.add({"y": x}, {"y": x})
    judge.add({"y": x}, {"y": x[:, :2]})
    judge.add({"y": x}, {"y": x})
    (found,) = judge.conclude()
    assert (found.passed, found.reason) == (False, "shape [2, 2] instead of [2, 3]")
    assert verify.Judge(F32).conclude()[0].passed is False


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-40, 1e-30, 1.0, 1e30]))
def test_the_smallest_tolerances_are_the_smallest_that_pass(seed, scale):
    r, o = answers((4, 3), 1e-3, seed, scale)
    found = compare("y", r, o, o, F32)
    for make, value in ((lambda t: Tolerance(rtol=t), found.smallest_rtol), (Tolerance, None)):
        if value is not None:
            assert compare("y", r, o, o, make(value)).passed
            assert not compare("y", r, o, o, make(np.nextafter(value, 0) * (1 - 1e-15))).passed
    assert compare("y", r, o, o, Tolerance(atol=found.smallest_atol)).passed
    assert not compare("y", r, o, o, Tolerance(atol=float(np.nextafter(found.smallest_atol, 0)))).passed


def test_no_rtol_passes_where_a_zero_is_missed():
    r = np.array([[0.0, 1.0]])
    c = np.array([[1e-9, 1.0]], np.float32)
    found = compare("y", r, r.astype(np.float32), c, F32)
    assert found.smallest_rtol is None
    assert found.smallest_atol == pytest.approx(1e-9)
    assert found.max_rel == 0


def test_an_output_that_hardly_varies_is_flagged():
    r = np.ones((4, 3)) + 1e-9 * np.arange(4)[:, None]
    found = compare("y", r, r.astype(np.float32), r.astype(np.float32), F32)
    assert found.passed
    assert found.insensitive
    assert not compare("y", r[:1], r[:1].astype(np.float32), r[:1].astype(np.float32), F32).insensitive
    assert compare("y", np.zeros((4, 3)), None, np.zeros((4, 3)), F32).insensitive


@pytest.mark.parametrize("scale", [2.0**-900, 2.0**900])
def test_sizes_whose_squares_leave_the_range_measure_the_same(scale):
    r, o = answers()
    o = o.astype(float)
    here, there = compare("y", r, o, o, F32), compare("y", r * scale, o * scale, o * scale, F32)
    assert there.passed
    assert (there.snr_db, there.cosine, there.spread) == pytest.approx((here.snr_db, here.cosine, here.spread))


HOSTILE = [0.0, -0.0, 1.0, 1e-320, 1e-200, 1e200, 1.7e308, -1.7e308, np.inf, -np.inf, np.nan]


@settings(max_examples=300, deadline=None)
@given(
    r=st.lists(st.sampled_from(HOSTILE), min_size=6, max_size=6),
    o=st.lists(st.sampled_from(HOSTILE), min_size=6, max_size=6),
    c=st.lists(st.sampled_from(HOSTILE), min_size=6, max_size=6),
    policy=st.sampled_from([F32, Tolerance(1e-3, 1e-3)]),
    noisy=st.booleans(),
)
def test_any_values_give_strict_json_and_never_a_silent_nan(r, o, c, policy, noisy):
    r, o, c = (np.array(v).reshape(3, 2) for v in (r, o, c))
    found = compare("y", r, o if noisy else None, c, policy)
    json.dumps(found.to_json(), allow_nan=False)
    assert found.passed == (found.reason is None)
    if found.passed:
        kept = slice(None) if not noisy else [v is not None for v in noise_between(r, o).l2]
        assert np.array_equal(np.isnan(c[kept]), np.isnan(r[kept]))
        assert np.array_equal(np.isinf(c[kept]), np.isinf(r[kept]))


# ---- tolerances, no original, several outputs ------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), rtol=st.sampled_from([0, 1e-6, 1e-5]), atol=st.sampled_from([0, 1e-6, 1e-7]))
def test_a_tolerance_means_what_numpy_means(seed, rtol, atol):
    r, o = answers((3, 4), 1e-6, seed)
    assert compare("y", r, o, o, Tolerance(rtol, atol)).passed == np.allclose(o.astype(float), r, rtol, atol)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "1", True])
def test_a_tolerance_must_be_a_number(value):
    with pytest.raises(InputError, match="rtol is"):
        policy_from(rtol=value)


def test_policies_are_chosen_by_tolerance_or_precision():
    assert policy_from(rtol=1e-3) == Tolerance(1e-3, 0)
    assert policy_from(atol=1e-3) == Tolerance(0, 1e-3)
    assert policy_from(precision="float32") is verify.POLICIES["float32"]
    with pytest.raises(InputError, match="no policy for precision 'int4'"):
        policy_from(precision="int4")


def test_without_an_original_the_default_yardstick_is_stated():
    r, _ = answers()
    r = r.astype(np.float32)
    good, bad = r * np.float32(1 + 40 * EPS), r * np.float32(1 + 4000 * EPS)
    found = compare("y", r, None, good, F32)
    assert found.passed
    assert "for want of an original" in found.yardstick
    assert not compare("y", r, None, bad, F32).passed


def outputs():
    r, o = answers()
    return {"a": r, "b": r[:, :3]}, {"a": o, "b": o[:, :3]}


SETS = {
    "missing": (lambda o: {"a": o["a"]}, "b", "missing from the candidate"),
    "extra": (lambda o: {**o, "c": o["a"]}, "c", "not an output of the reference"),
    "renamed": (lambda o: {"a": o["a"], "B": o["b"]}, "b", "missing from the candidate"),
    "reordered": (lambda o: {"b": o["b"], "a": o["a"]}, "a", "moved from position 0 to 1"),
}


@pytest.mark.parametrize(("change", "name", "reason"), SETS.values(), ids=SETS.keys())
def test_the_set_of_outputs_must_be_kept(change, name, reason):
    r, o = outputs()
    assert all_passed(compare_outputs(r, o, o, F32))
    found = compare_outputs(r, o, change(o), F32)
    assert not all_passed(found)
    assert {c.name: c.reason for c in found}[name] == reason


def test_nothing_compared_fails():
    (found,) = compare_outputs({}, {}, {}, F32)
    assert not found.passed
    assert "nothing was compared" in found.reason
    assert not all_passed(())


def test_an_original_that_lacks_an_output_is_no_licence():
    r, o = outputs()
    found = compare_outputs(r, {"a": o["a"]}, o, F32)
    assert [c.passed for c in found] == [True, False]


def test_noise_survives_json_and_takes_the_largest_of_several_runs():
    r, o = overflowing()
    noise = noise_between(r, o)
    assert noise.l2[1] is None
    record = noise.to_json()
    assert Noise.from_json(json.loads(json.dumps(record, allow_nan=False))) == noise
    assert Noise.from_json({**record, "channels": record["channels"][0]}) == noise  # as bundles had it at first
    both = noise_between(r, o, np.where(np.isfinite(o), o, 0) * 2, r)
    assert both.l2[0] == pytest.approx(np.linalg.norm(2.0 * o[0] - r[0]))
    assert both.l2[1] is None
    assert both.channels[0][0] == pytest.approx(np.linalg.norm(2.0 * o[[0, 1, 3], 0] - r[[0, 1, 3], 0]))
    codes = np.arange(6).reshape(2, 3)
    noise = noise_between(
        codes, codes + np.array([[0, 1, 0], [1, 1, 1]]), codes + np.array([[0, 1, 0], [0, 0, 0]]), codes
    )
    assert (noise.l2, noise.flips) == ((0.0, None), ((1,), (0, 1, 2)))
    assert Noise.from_json(json.loads(json.dumps(noise.to_json()))) == noise


RECORDS = [
    None, {}, {"l2": [1.0]}, {"l2": [1.0], "max": []}, {"l2": [-1.0], "max": [1.0]}, {"l2": [None], "max": [1.0]},
    {"l2": ["1"], "max": ["1"]}, {"l2": [True], "max": [True]}, {"l2": 3, "max": 3},
    *({"l2": [1.0], "max": [1.0], "channels": bad} for bad in (3, [None], [-1.0], ["1"])),
    *({"l2": [1.0], "max": [1.0], "channels": bad} for bad in ([[None]], [[-1.0]], [["1"]], [3, [1.0]])),
    *({"l2": [1.0], "max": [1.0], "flips": bad} for bad in (3, [], [3], [[-1]], [[1.5]], [[True]], [[], []])),
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
def test_a_damaged_noise_record_is_refused(record):
    with pytest.raises(verify.RefusedError, match="noise record"):
        Noise.from_json(record)


def test_misuse_is_an_input_error():
    r, o = answers()
    with pytest.raises(DataError, match="output y: the original's output has shape"):
        compare("y", r, o[:3], o, F32)
    with pytest.raises(DataError, match="at least one"):
        noise_between(r)
    with pytest.raises(verify.RefusedError, match="2 samples, the data 16"):
        verify.judge("y", r, o, F32, Noise((0.0, 0.0), (0.0, 0.0)), np.float32)


def test_global_state_is_left_alone():
    before, r = (np.geterr(), np.random.get_state()[1].tolist()), np.zeros((2, 2))  # noqa: NPY002 - the state guarded
    compare("y", r, r.astype(np.float32), np.full((2, 2), np.nan, np.float32), F32)
    assert (np.geterr(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


def test_what_is_kept_of_a_batch_does_not_grow_with_the_output():
    """60 more batches of a large output leave less behind than two of its batches would take."""
    r = np.random.default_rng(0).standard_normal((2, 64, 64, 3))
    o = r.astype(np.float32)
    noise = {"y": noise_between(r, o), "z": noise_between(r > 0, o > 0)}
    judge = verify.Judge(F32)
    tracemalloc.start()
    try:
        for batch in range(61):
            judge.add({"y": r, "z": r > 0}, {"y": o, "z": o > 0}, noise)
            if batch == 0:
                before = tracemalloc.get_traced_memory()[0]
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 2 * r.nbytes
    assert judge.conclude()[0].samples == 122


def test_errors_over_what_is_allowed_have_no_holes():
    assert verify.ratios(np.array([0.0, 0.0, 1.0, 2.0]), np.array([0.0, 1.0, 0.0, 4.0])).tolist() == [
        0,
        0,
        math.inf,
        0.5,
    ]
    own, size = np.array([1.0, 9.0, math.inf, 2.0]), np.array([10.0, 10.0, 10.0, 0.0])
    assert verify.Scale.of(own, size) == verify.Scale(10.0, 0.1)
    assert verify.Scale.of(own, size, np.zeros(4, bool)) == verify.Scale(0.0, 0.0)

"""Golden data: the yardstick of a few samples is the level found on all of them."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit import verify
from deploykit.bundle import golden_count, write_golden
from deploykit.check import Reference
from deploykit.compare import Noise
from deploykit.data import Samples
from deploykit.signature import Signature, TensorSpec


def reference(errors, count=20, batch=None):
    """A reference whose original is off by ``errors[i]`` (relative) on sample i."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 4)).astype(np.float32)
    y = rng.normal(size=(count, 50))
    spec = [TensorSpec(name, (batch, *shape), "float32") for name, shape in (("x", (4,)), ("y", (50,)))]
    original = (y * (1 + np.asarray(errors)[:, None])).astype(np.float32)
    return Reference("m", Signature((spec[0],), (spec[1],)), Samples({"x": x}, "s"), {"y": y}, {"y": original}, ())


def test_a_lucky_first_sample_gets_the_level_of_all(tmp_path):
    errors = np.full(20, 1e-4)
    errors[0] = 0.0
    batch, single = write_golden(tmp_path, right := reference(errors))
    level = single["noise"]["y"]["l2"][0] / np.linalg.norm(right.outputs["y"][0])
    assert level == pytest.approx(1e-4, rel=1e-2)
    assert len(batch["noise"]["y"]["l2"]) == 20


def test_a_lucky_channel_gets_the_level_of_all(tmp_path):
    errors = np.full(20, 1e-4)
    errors[0] = 0.0
    right = reference(errors)
    batch, single = write_golden(tmp_path, right)
    own = np.linalg.norm((right.original["y"] - right.outputs["y"]), axis=0)
    np.testing.assert_allclose(batch["noise"]["y"]["channels"][0], own, rtol=1e-2)
    np.testing.assert_allclose(single["noise"]["y"]["channels"][0], own / np.sqrt(20), rtol=1e-2)


def test_one_rogue_sample_does_not_set_the_level(tmp_path):
    errors = np.full(20, 1e-6)
    errors[7] = 0.5
    _, single = write_golden(tmp_path, right := reference(errors))
    assert single["noise"]["y"]["l2"][0] / np.linalg.norm(right.outputs["y"][0]) < 1e-5


def test_a_sample_that_is_worse_keeps_its_own_noise(tmp_path):
    errors = np.full(20, 1e-6)
    errors[0] = 1e-2
    _, single = write_golden(tmp_path, right := reference(errors))
    assert single["noise"]["y"]["l2"][0] / np.linalg.norm(right.outputs["y"][0]) == pytest.approx(1e-2, rel=1e-2)


def images(count=16):
    """Answers of mixed scale, as images: a channel of a million beside one below 1."""
    rng = np.random.default_rng(0)
    right = rng.uniform(0.1, 1, (count, 6, 5, 2)) * (1e6, 1)
    own = (right * (1 + 1e-7 * rng.standard_normal(right.shape))).astype(np.float32)
    spec = [TensorSpec("x", (None, 4), "float32"), TensorSpec("y", (None, 6, 5, 2), "float32")]
    data = Samples({"x": np.zeros((count, 4), np.float32)}, "s")
    return Reference("m", Signature((spec[0],), (spec[1],)), data, {"y": right}, {"y": own}, ())


def test_golden_images_in_nchw_are_judged_channel_by_channel(tmp_path):
    """A small channel that is wrong is found beside a large one, whichever axis the file has them on."""
    right = images()
    entry = write_golden(tmp_path, right, "nchw")[0]
    name, expected = verify.read_tensor((tmp_path / entry["folder"] / "output_0.pb").read_bytes())
    assert (name, expected.shape) == ("y", (16, 2, 6, 5))
    noises = {"y": Noise.from_json(entry["noise"]["y"])}
    golden = verify.Golden("", {}, {"y": expected}, noises, "float64")
    outputs = [{"name": "y", "dtype": "float32"}]
    bundle = verify.Bundle("", {"image_axes": "NCHW"}, "", [], outputs, verify.FLOAT32, ())
    answers = right.original["y"].transpose(0, 3, 1, 2).copy()
    assert verify.all_passed(bundle.judged(golden, {"y": answers}))
    answers[:, 1] = 0.5
    (found,) = bundle.judged(golden, {"y": answers})
    assert found.reason.startswith("channel 1 (1 of 2 fail)")


def test_a_fixed_batch_has_one_golden_set_of_that_size(tmp_path):
    (only,) = write_golden(tmp_path, reference(np.full(20, 1e-6), batch=4))
    assert len(only["noise"]["y"]["l2"]) == 4
    assert golden_count(reference(np.full(50, 1e-6), count=50)) == 32

"""What disturbs a timing is seen where the system tells, and nothing is said where it does not."""

import subprocess
import sys
import time

import pytest

from deploykit import environment, noise
from deploykit.noise import Ticks, Watch

STAT = """cpu  1000 10 200 5000 30 4 6 70 500 0
cpu0 400 10 100 2500 15 2 3 30 250 0
cpu1 600 0 100 2500 15 2 3 40 250 0
intr 26376665 0 0
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_ticks_are_summed_over_the_processors_that_may_be_used():
    both, second = Ticks.of(STAT, {0, 1}, 0.01), Ticks.of(STAT, {1}, 0.01)
    assert (both.computing_s, both.stolen_s) == pytest.approx((12.2, 0.7))  # guests' time is in the user's already
    assert (second.computing_s, second.stolen_s) == pytest.approx((7.05, 0.4))


@pytest.mark.parametrize("text", ["", "intr 5 5", "cpu  1 2 3 4 5 6 7 8", "cpu0 1 2 3", "cpu7 1 1 1 1 1 1 1 1"])
def test_what_the_system_does_not_tell_is_not_guessed(text):
    assert Ticks.of(text, {0, 1}, 0.01) is None


def watched(elapsed=10.0, computing=4.0, ours=4.0, stolen=0.0) -> list[str]:
    watch = Watch()
    watch.elapsed_s, watch.computing_s, watch.ours_s, watch.stolen_s = elapsed, computing, ours, stolen
    return [doubt.code for doubt in watch.warnings(2)]


SEEN = [
    ({}, []),
    ({"computing": 5.9}, []),
    ({"computing": 6.1}, ["other_load"]),  # 0.2 of 2 processors
    ({"stolen": 0.03}, []),
    ({"stolen": 0.05}, ["steal"]),  # of 4.05 s
    ({"computing": 10.0, "stolen": 2.0}, ["other_load", "steal"]),
    ({"elapsed": 0.4, "computing": 3.0, "ours": 0.0, "stolen": 1.0}, []),  # a few ticks
]


@pytest.mark.parametrize(("numbers", "codes"), SEEN)
def test_the_limits(numbers, codes):
    assert watched(**numbers) == codes


@linux
def test_another_program_is_seen_and_our_own_is_not():
    processors = environment.cores()
    spin = "import time\nend = time.perf_counter() + 30\nwhile time.perf_counter() < end: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as other:
        watch = Watch()
        end = time.perf_counter() + 0.7
        with watch:
            while time.perf_counter() < end:
                pass
        other.kill()
    assert 0 < watch.ours_s < 0.8
    assert watch.computing_s > watch.ours_s + 0.05
    assert "other_load" in [doubt.code for doubt in watch.warnings(1)]
    watch.ours_s = watch.computing_s
    assert "other_load" not in [doubt.code for doubt in watch.warnings(processors)]


@linux
def test_a_watch_adds_up():
    watch = Watch()
    for _ in range(2):
        with watch:
            time.sleep(0.02)
    assert watch.elapsed_s >= 0.04


def test_more_work_than_processors_is_said():
    (doubt,) = noise.busy(0) or [None]
    assert doubt.to_json() == {"code": "busy", "text": doubt.text, "candidate": None}
    assert list(noise.busy(10**6)) == []


def test_the_clock_of_the_processor_is_plausible_or_unknown():
    found = noise.megahertz()
    assert found is None or 100 < found < 10_000

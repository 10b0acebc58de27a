"""Deciles of few runs, and the marks of a clock."""

import time

import pytest
import torch

from vdmini_core.evaluation.costs import latency_of
from vdmini_core.evaluation.stage_times import Clock


def test_deciles_of_few_runs_lie_between_them() -> None:
    found = latency_of([10.0, 30.0, 11.0])
    assert (found.p10_ms, found.median_ms, found.p90_ms) == pytest.approx((10.2, 11.0, 26.2))
    assert latency_of([4.0]).p90_ms == 4.0


def test_a_clock_reads_the_milliseconds_between_its_marks() -> None:
    clock = Clock(torch.device("cpu"))
    for seconds in (0.02, 0.05):
        time.sleep(seconds)
        clock.mark()
    first, second = clock.read()
    assert 20 <= first < second
    assert second >= 50

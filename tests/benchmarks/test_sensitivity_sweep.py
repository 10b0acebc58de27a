"""The benchmark of the sensitivity sweep, on a tiny pipeline and four of its units."""

from pathlib import Path

import pytest

from benchmarks.sensitivity_sweep import compare_sweeps
from tests.tiny import write_latents
from vdmini_core.pruning import sensitivity
from vdmini_core.settings import SensitivitySettings


def test_the_savings_are_of_the_same_answer(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "groups_of", lambda denoiser: (["U.2", "U.3"], ["U.3.1", "U.3.2"]))
    write_latents(tmp_path / "encode", 6, split="train")
    settings = SensitivitySettings(clips=2, steps=1, batch_size=2, calibration_clips=1)
    found = compare_sweeps(str(tiny_pipeline_folder), tmp_path / "encode", settings, 1, tmp_path / "scratch")
    assert found.clips_measured == dict.fromkeys(["U.2", "U.3", "U.3.1", "U.3.2"], 2)
    assert found.shared_forward_flops == found.stopped_forward_flops  # two clips decide nothing
    assert found.shared_forward_flops < found.naive_forward_flops
    assert found.largest_difference < 1e-5
    assert [(r.kind, r.damage, len(r.stopped)) for r in found.rankings] == [
        (kind, damage, 1) for kind in ("block", "pair") for damage in ("content", "motion")
    ]
    assert all(r.all_clips == r.stopped for r in found.rankings)

"""Stage decoder on a tiny pipeline folder: what it writes, that it is done once, and that it can be left out."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks import decoder
from tasks._stage import Context
from tests.tiny import FRAMES, write_latents
from vdmini_core.artifacts import DecoderReport, LatentManifest, Provenance, read_json, write_json
from vdmini_core.models import load_pipeline
from vdmini_core.models.verify import verify_teacher
from vdmini_core.settings import Params

SIZE = 32
SETTINGS: dict[str, Any] = {
    "method": "manual",
    "remove": ("M", "U.2.1"),
    "shares": (1.0, 1.0, 0.5),
    "clips": 1,
    "latency_runs": 1,
    "validation": {"every": 2, "clips": 2},
    "discriminator": {"warmup_steps": 0, "ramp_steps": 1, "channels": 4},
    "loop": {"max_steps": 4, "batch_size": 2, "warmup_steps": 1, "precision": "fp32", "log_every": 1},
}


class Tracker:
    """Keeps what a stage gives MLflow."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.files: list[str] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.metrics |= metrics

    def artifact(self, path: Path) -> None:
        self.files.append(path.name)

    def tags(self, tags: dict[str, str]) -> None: ...


@pytest.fixture
def project(tmp_path: Path, tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    artifacts = tmp_path / "artifacts"
    write_json(artifacts / "teacher/teacher.json", verify_teacher(str(tiny_pipeline_folder), None))
    write_latents(artifacts / "encode", 4, size=SIZE // 4, split="train")
    train = read_json(artifacts / "encode/latents.json", LatentManifest)
    write_latents(artifacts / "encode", 3, size=SIZE // 4, split="test")
    test = read_json(artifacts / "encode/latents.json", LatentManifest)
    both = {"shards": {**train.shards, **test.shards}, "counts": {**train.counts, **test.counts}}
    write_json(artifacts / "encode/latents.json", test.model_copy(update=both))
    real = torch.rand(3, 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(decoder, "real_clips", lambda context, count: real[:count])
    return tmp_path


def run(**changes: Any) -> Tracker:
    tracker: Any = Tracker()
    params = Params.model_validate(
        {"distill": {"loop": {"max_steps": 1, "batch_size": 1}}, "decoder": SETTINGS | changes}
    )
    decoder.run(Context("decoder", params, tracker, torch.device("cpu")))
    return tracker  # type: ignore[no-any-return]


def test_the_stage_writes_a_vae_that_loads_a_report_and_a_curve(project: Path, tiny_pipeline_folder: Path) -> None:
    tracker = run()
    folder = project / "artifacts/decoder"
    report = read_json(folder / "decoder.json", DecoderReport)
    assert report.plan.removed == ("M", "U.2.1")
    assert report.plan.predicted_ms is not None
    assert set(report.quality) == {"original", "pruned", "recovered"}
    assert [row.step for row in report.curve] == [0, 2, 4]
    assert {latency.runs for latency in report.latencies.values()} == {30}
    rows = json.loads((folder / "recovery.json").read_text())["rows"]
    assert [row["psnr"] for row in rows] == [row.psnr for row in report.curve]
    assert len(json.loads((folder / "history.json").read_text())["rows"]) == 4
    assert "| recovered |" in (folder / "decoder.md").read_text()
    assert tracker.files == ["decoder.md", "decoder.json"]
    assert tracker.metrics["size/decoder_parameters"] == report.plan.parameters[1]
    assert {"recovery/psnr", "train/decoder/total", "train/discriminator/total"} <= set(tracker.metrics)

    ours, stock = (
        load_file(place / "diffusion_pytorch_model.safetensors")
        for place in (folder / "vae", tiny_pipeline_folder / "vae")
    )
    assert all(torch.equal(ours[key], stock[key]) for key in stock if not key.startswith("decoder."))
    vae = load_pipeline(tiny_pipeline_folder, ("vae",)).load_part("vae", folder / "vae", "cpu")
    assert sum(p.numel() for p in vae.decoder.parameters()) == report.plan.parameters[1]


def test_a_second_run_resumes_with_the_plan_that_was_measured(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run()
    monkeypatch.setattr(decoder, "decoder_sensitivity", lambda *_, **__: pytest.fail("measured twice"))
    before = read_json(project / "artifacts/decoder/decoder.json", DecoderReport)
    (scratch,) = (path for path in (project / ".scratch/decoder").iterdir() if path.is_dir())
    os.utime(scratch, (0, 0))
    again = run()
    assert scratch.stat().st_mtime > 0  # by which a worker sees what to send
    after = read_json(project / "artifacts/decoder/decoder.json", DecoderReport)
    assert (after.plan, after.curve, after.quality) == (before.plan, before.curve, before.quality)
    assert "train/decoder/total" in first.metrics
    assert "train/decoder/total" not in again.metrics  # nothing was left to train


def test_a_decoder_that_stays_as_it_is_leaves_no_vae(project: Path) -> None:
    run(enabled=False)
    assert [path.name for path in (project / "artifacts/decoder").iterdir()] == ["decoder.json"]
    read_json(project / "artifacts/decoder/decoder.json", Provenance)

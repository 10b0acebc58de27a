"""The zoo's text-to-video U-Net from nothing to a pipeline folder, with trainings of one step."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, TextToVideoSDPipeline

from vdmini_core.artifacts import file_digest
from vdmini_core.models import TextToVideoUNet, load_pipeline
from vdmini_core.models.text import Wan
from vdmini_core.models.verify import verify_teacher
from vdmini_core.settings import EncodeSettings, LoopSettings
from vdmini_core.zoo import build
from vdmini_core.zoo.clips import ClipSet


def test_every_part_of_a_teacher_has_its_settings() -> None:
    assert {part for parts in build.PARTS.values() for part in parts} <= set(build.SETTINGS)
    assert set(build.PARTS) == {"i2v-shapes", "t2v-wan-shapes", "t2v-lcm-shapes"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of one step on two clips of 4 frames of 32 x 32, 5 of the causal VAE."""
    one_step = LoopSettings(max_steps=1, batch_size=1, precision="fp32", checkpoint_every=1)
    changed = {"SETTINGS": dict.fromkeys(build.SETTINGS, one_step), "FRAMES": 4, "TEXT_FRAMES": 5, "SIZE": 32}
    for name, value in changed.items():
        monkeypatch.setattr(build, name, value)
    render = build.render_set

    def few(count: int, seed: int, *, frames: int, size: int) -> ClipSet:
        return render(2, seed, frames=frames, size=size)

    monkeypatch.setattr(build, "render_set", few)


def built(target: Path, teacher: str, denoiser: str) -> Path:
    """The teacher's folder, made part by part, and its denoiser again from its trainings' checkpoints."""
    makers = {build.LCM_TEACHER: build.Builder.lcm_teacher, build.WAN_TEACHER: build.Builder.wan_teacher}

    def made() -> int:
        said: list[str] = []
        makers[teacher](build.Builder(target, target / "scratch", torch.device("cpu"), say=said.append))
        return len(said)

    said = {build.LCM_TEACHER: (4, 2), build.WAN_TEACHER: (3, 1)}[teacher]
    assert (made(), made()) == (said[0], 0)
    first = {file.name: file_digest(file) for file in (target / teacher / denoiser).glob("*.safetensors")}
    for file in (target / teacher / denoiser).glob("*.safetensors"):
        file.unlink()
    assert made() == said[1]
    again = {file.name: file_digest(file) for file in (target / teacher / denoiser).glob("*.safetensors")}
    assert (len(first), again) == (1, first)
    assert sum(file.stat().st_size for file in (target / teacher).rglob("*") if file.is_file()) < 10 * 2**20
    return target / teacher


def test_the_wan_teacher_is_built_part_by_part(small: None, tmp_path: Path) -> None:
    folder = built(tmp_path, build.WAN_TEACHER, "transformer")
    ours = load_pipeline(folder)
    assert isinstance(ours, Wan)
    assert ours.default_shape() == (5, 32, 32)
    assert sorted(verify_teacher(str(folder), None).parameters) == ["text_encoder", "transformer", "vae"]


def test_the_lcm_teacher_is_built_part_by_part(small: None, tmp_path: Path) -> None:
    folder = built(tmp_path, build.LCM_TEACHER, "unet")
    ours, stock = load_pipeline(folder), DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert isinstance(ours, TextToVideoUNet)
    assert isinstance(ours.scheduler, LCMScheduler)
    assert isinstance(stock, TextToVideoSDPipeline)
    assert ours.default_shape() == (4, 32, 32)
    told = ours.condition(torch.zeros(1, 3, 32, 32), ["a red circle growing"], EncodeSettings(), torch.Generator())
    expected, _ = stock.encode_prompt(["a red circle growing"], torch.device("cpu"), 1, False)
    torch.testing.assert_close(told["text"], expected, rtol=0, atol=1e-4)
    assert told["text"].shape == (1, 16, 64)
    stock.set_progress_bar_config(disable=True)
    frames = stock("a red circle growing", height=32, width=32, num_frames=2, num_inference_steps=1, output_type="pt")
    assert frames.frames.isfinite().all()
    assert sorted(verify_teacher(str(folder), None).parameters) == ["text_encoder", "unet", "vae"]

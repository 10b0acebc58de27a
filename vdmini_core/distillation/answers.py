"""The teacher's answers to a few fixed noises of every clip, kept on disk: training then does not run the teacher.

Layout: a folder for all that the answers depend on, in it a safetensors file a clip with `answers` [K, C, T, h, w],
in the type the teacher answered in. A file is written beside and renamed, so that each is whole or absent.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vdmini_core.artifacts import json_digest
from vdmini_core.data.latents import LatentCache, condition_of
from vdmini_core.diffusion.process import Process
from vdmini_core.models import Denoiser
from vdmini_core.reporting import Track, silent_track
from vdmini_core.settings import DistillSettings
from vdmini_core.training.distributed import (
    Batch,
    clips_at_a_time,
    is_main,
    process_count,
    process_index,
    wait_for_all,
)
from vdmini_core.training.loop import Interrupted


def teacher_needed(settings: DistillSettings) -> bool:
    """Whether training needs the teacher in memory, once all answers are kept: for them, or for heads."""
    heads = settings.mca_weight > 0 or settings.task == "one_step"
    return heads or (settings.teacher_draws == 0 and answer_needed(settings))


def answer_needed(settings: DistillSettings) -> bool:
    """Whether a loss reads what the teacher answers, or its features on the way."""
    return settings.icd_weight > 0 or settings.mca_weight > 0 or settings.target == "teacher"


class TeacherAnswers:
    """`settings.teacher_draws` draws of level and noise for every clip, and what the teacher answers to them.

    A draw is a function of (seed, clip, its number k). `inputs`, name -> digest, are those of the teacher's weights
    and of the latents, on which the answers depend besides.
    """

    def __init__(
        self, root: Path, data: LatentCache, process: Process, settings: DistillSettings, inputs: dict[str, str]
    ) -> None:
        self.data, self.process, self.settings = data, process, settings
        key = {
            "inputs": inputs,
            "process": process.facts(),
            "levels": [settings.sigma_mean, settings.sigma_std],
            "seed": settings.loop.seed,
            "draws": settings.teacher_draws,
            "precision": settings.loop.precision,
        }
        self.folder = root / json_digest(key)[:16]

    def draw(self, ids: list[int], shape: torch.Size, generator: torch.Generator) -> Batch:
        """For every clip one of its draws: its number `draw` [B], `sigma` [B] and `noise` [B, C, T, h, w]."""
        chosen = torch.randint(self.settings.teacher_draws, (len(ids),), generator=generator)
        draws = [self.fixed(clip, k, shape) for clip, k in zip(ids, chosen.tolist(), strict=True)]
        sigmas, noises = zip(*draws, strict=True)
        return {"draw": chosen, "sigma": torch.cat(sigmas), "noise": torch.stack(noises)}

    def fixed(self, clip: int, k: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Draw `k` of a clip: sigma [1] and noise of the latents' shape [C, T, h, w]."""
        seed = int(json_digest([self.settings.loop.seed, clip, k])[:15], 16)
        generator = torch.Generator().manual_seed(seed)
        sigma = self.process.draw(1, self.settings.sigma_mean, self.settings.sigma_std, generator)
        return sigma, torch.randn(shape, generator=generator)

    def read(self, ids: list[int], draws: Tensor) -> Tensor:
        """The teacher's answers [B, C, T, h, w] to these draws of these clips."""
        found = []
        for clip, k in zip(ids, draws.tolist(), strict=True):
            with safe_open(self._file(clip), "pt") as stream:
                found.append(stream.get_slice("answers")[k])
        return torch.stack(found)

    def missing(self) -> list[int]:
        """The clips of this process's share that have no whole file yet."""
        return [clip for clip in range(process_index(), len(self.data), process_count()) if not self._is_whole(clip)]

    def fill(
        self,
        load_teacher: Callable[[], Denoiser],
        device: torch.device,
        track: Track = silent_track,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Compute what is missing, clip by clip, each process a share; the teacher is loaded if anything is.

        Raises Interrupted where it is asked to stop; what is there by then stays.
        """
        if missing := self.missing():
            self.folder.mkdir(parents=True, exist_ok=True)
            teacher = load_teacher()
            for clip in track(missing, "teacher", len(missing)) if is_main() else missing:
                if should_stop():
                    raise Interrupted(f"stopped before clip {clip}; the same command goes on in {self.folder}")
                self._write(clip, self._answers(teacher, clip, device))
        wait_for_all()

    @torch.no_grad()
    def _answers(self, teacher: Denoiser, clip: int, device: torch.device) -> Tensor:
        """[K, C, T, h, w], computed as many at a time as training has clips, in its precision."""
        rows, size = self.data.rows([clip]), clips_at_a_time(self.settings.loop)
        x0 = rows["latents"]
        draws = [self.fixed(clip, k, x0.shape[1:]) for k in range(self.settings.teacher_draws)]
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.settings.loop.precision)
        answers = []
        for first in range(0, len(draws), size):
            sigmas, noises = zip(*draws[first : first + size], strict=True)
            sigma = torch.cat(sigmas)
            noisy = self.process.noised(x0, torch.stack(noises), sigma).to(device)
            told = {k: v.expand(len(sigma), *v.shape[1:]) for k, v in condition_of(rows, device).items()}
            with torch.autocast(device.type, half, enabled=half is not None):
                answers.append(teacher(noisy, self.process.time(sigma.to(device)), told))
        return torch.cat(answers)

    def _write(self, clip: int, answers: Tensor) -> None:
        target = self._file(clip)
        draft = target.with_name(f".{target.name}.partial")
        try:
            save_file({"answers": answers.cpu().contiguous()}, draft)
            with draft.open("rb") as stream:
                os.fsync(stream.fileno())
        except Exception:  # most likely a full disk
            draft.unlink(missing_ok=True)
            raise
        os.replace(draft, target)

    def _is_whole(self, clip: int) -> bool:
        try:
            with safe_open(self._file(clip), "pt") as stream:
                return stream.get_slice("answers").get_shape()[0] == self.settings.teacher_draws  # type: ignore[no-any-return]
        except (OSError, SafetensorError):
            return False

    def _file(self, clip: int) -> Path:
        return self.folder / f"clip-{clip:07d}.safetensors"

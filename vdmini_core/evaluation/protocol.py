"""The protocol that every result carries: only figures of one protocol may be compared."""

from pathlib import Path
from typing import Any

from vdmini_core.artifacts import file_digest
from vdmini_core.settings import DataSettings, EncodeSettings, SamplerSettings


def sampling_protocol(
    settings: SamplerSettings, data: DataSettings, encode: EncodeSettings, evaluator: Path
) -> dict[str, Any]:
    """Extractor and its digest, N, frames, fps, size, crop, sampler, steps, guidance, seed, ddof."""
    return {
        "extractor": "vdmini offline evaluator",
        "extractor_sha256": file_digest(evaluator / "evaluator.safetensors"),
        "distance": "toy Frechet, not FVD",
        "ddof": 0,
        "reference": "held-out clips through the teacher's VAE",
        "clips": settings.clips,
        "frames": data.frames,
        "fps": data.fps,
        "size": data.size,
        "crop": "short side resized, centre cropped",
        "source": data.source,
        "split": data.split,
        "sampler": "the teacher's own scheduler and noise levels",
        "steps": settings.steps,
        "precision": settings.precision,
        "guidance": "no classifier-free guidance",
        "embedded_guidance": encode.guidance,
        "condition_fps": encode.fps,
        "motion_bucket_id": encode.motion_bucket_id,
        "noise_augmentation": encode.noise_augmentation,
        "seed": settings.seed,
        "codec": "none (judged before encoding)",
    }

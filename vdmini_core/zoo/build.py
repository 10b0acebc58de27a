"""Builds the zoo from nothing: VAE, image encoder, evaluator, teacher, each with its manifest entry.

Every part is skipped if its weights are in the target folder already; the teacher's training
resumes from its checkpoints.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler
from transformers import CLIPImageProcessor

from vdmini_core.artifacts import file_digest, json_digest, write_json
from vdmini_core.evaluation.evaluator import accuracies, load_evaluator, save_evaluator
from vdmini_core.models import SVD, Denoiser, Pipeline, TransformerDenoiser, UNetDenoiser
from vdmini_core.models.loading import load_component
from vdmini_core.models.text import TextToVideoUNet, Wan
from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import EncodeSettings, LoopSettings
from vdmini_core.zoo.clips import ClipSet, render_set, to_model_range
from vdmini_core.zoo.consistency import distil_consistency, solver_levels
from vdmini_core.zoo.evaluator import CORRUPTIONS, compress, corrupt, reconstruct, train_evaluator
from vdmini_core.zoo.image_encoder import train_image_encoder
from vdmini_core.zoo.teacher import (
    LatentSet,
    closed_attention,
    encode_set,
    load_set,
    new_unet,
    save_set,
    train_teacher,
)
from vdmini_core.zoo.text_to_video import (
    CAPTIONS,
    SOLVER_STEPS,
    new_text_unet,
    new_transformer,
    write_clip,
    write_lcm_parts,
    write_umt5,
    write_wan_parts,
)
from vdmini_core.zoo.vae import new_causal_vae, new_frame_vae, new_temporal_vae, train_vae

TEACHER, WAN_TEACHER, LCM_TEACHER = "i2v-shapes", "t2v-wan-shapes", "t2v-lcm-shapes"
FRAMES, TEXT_FRAMES, SIZE = 8, 9, 64
# Clips of the four trainings and of the evaluator's test never share a seed.
VAE_SEED, ENCODER_SEED, TEACHER_SEED, TEST_SEED = 1, 1, 3, 77
EVALUATOR_SEEDS = (5, 6, 7)
TEXT_VAE_SEED, TEXT_TEACHER_SEED = 11, 12
COMPRESSED_SEED = 31

SETTINGS = {
    "vae": LoopSettings(max_steps=1300, batch_size=4, warmup_steps=50, log_every=50, ema_decay=0.99),
    "image_encoder": LoopSettings(
        max_steps=4000,
        batch_size=48,
        warmup_steps=50,
        decay_fraction=0.5,
        log_every=100,
        ema_decay=0.99,
        weight_decay=0.01,
        precision="fp32",
    ),
    "evaluator": LoopSettings(max_steps=1200, batch_size=24, warmup_steps=50, log_every=100, ema_decay=0.99),
    # The attention of the two outer stages opens late, when the deep ones have learned to carry the motion.
    "teacher_closed": LoopSettings(max_steps=4000, batch_size=4, decay_fraction=0.2, ema_decay=0.998),
    "teacher_opened": LoopSettings(seed=1, max_steps=3000, batch_size=4, decay_fraction=0.7, ema_decay=0.998),
    "teacher_refined": LoopSettings(
        seed=2, max_steps=1600, batch_size=4, warmup_steps=50, decay_fraction=0.9, ema_decay=0.998
    ),
    # Half of its clips are MPEG-4 encoded, as those of the data stage are.
    "teacher_tuned": LoopSettings(
        seed=3, max_steps=850, batch_size=4, warmup_steps=50, decay_fraction=0.9, ema_decay=0.997
    ),
    "causal_vae": LoopSettings(max_steps=1800, batch_size=2, warmup_steps=50, log_every=50, ema_decay=0.99),
    "text_encoder": LoopSettings(
        max_steps=300, batch_size=64, warmup_steps=20, log_every=50, ema_decay=0.98, precision="fp32"
    ),
    "text_teacher": LoopSettings(max_steps=5000, batch_size=4, decay_fraction=0.5, ema_decay=0.998),
    "frame_vae": LoopSettings(max_steps=1000, batch_size=4, warmup_steps=50, log_every=50, ema_decay=0.99),
    # An answer that bfloat16 rounds by 2^-8 is wrong by 0.06 in x0 at the highest level, sigma 14.6.
    "lcm_base": LoopSettings(max_steps=4000, batch_size=4, decay_fraction=0.5, ema_decay=0.998, precision="fp32"),
    # The average is also the target network of the distillation, which follows the student closely (LCM: 0.95).
    "lcm_distilled": LoopSettings(
        seed=1, max_steps=1000, batch_size=4, warmup_steps=50, decay_fraction=0.5, ema_decay=0.95, precision="fp32"
    ),
}

PARTS = {
    TEACHER: ("vae", "image_encoder", "teacher_closed", "teacher_opened", "teacher_refined", "teacher_tuned"),
    WAN_TEACHER: ("causal_vae", "text_encoder", "text_teacher"),
    LCM_TEACHER: ("frame_vae", "text_encoder", "lcm_base", "lcm_distilled"),
}
"""The trainings that make each teacher."""

# Learning rate, and how many of the outermost stages have their attention closed.
TEACHER_RUNS = {
    "teacher_closed": (1e-3, 2),
    "teacher_opened": (8e-4, 0),
    "teacher_refined": (7e-4, 0),
    "teacher_tuned": (6e-4, 0),
}
# ln(sigma) of the LCM's base: a tenth of its levels is the highest there is, from which sampling starts.
LCM_LEVELS = 0.5, 1.6
FOREGROUND_WEIGHT = 5.0


def build_zoo(
    target: Path,
    scratch: Path,
    device: torch.device,
    log: Log = silent_log,
    track: Track = silent_track,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Train what `target` lacks. About three hours on two CPU cores, minutes on a GPU."""
    teacher = target / TEACHER
    if not (teacher / "vae").is_dir():
        say("training the VAE")
        clips = render_set(4320, VAE_SEED, frames=FRAMES, size=SIZE)
        vae = train_vae(new_temporal_vae(), clips, SETTINGS["vae"], device, log, track)
        vae.half().save_pretrained(teacher / "vae")
    if not (teacher / "image_encoder").is_dir():
        say("training the image encoder")
        clips = render_set(17280, ENCODER_SEED, frames=1, size=SIZE)
        encoder = train_image_encoder(clips, SETTINGS["image_encoder"], device, log, track)
        encoder.half().save_pretrained(teacher / "image_encoder")
    if not (target / "evaluator").is_dir():
        say("training the evaluator")
        vae = load_component(AutoencoderKLTemporalDecoder, teacher / "vae").to(device)
        build_evaluator(target / "evaluator", vae, device, log, track)
    write_fixed_parts(teacher)
    if not (teacher / "unet").is_dir():
        say("training the image-to-video teacher")
        pipeline = SVD.load(teacher, ("vae", "conditioner"), device)
        data = _encoded(scratch / "i2v.safetensors", pipeline, TEACHER_SEED, FRAMES, track)
        mixed = _with_compressed(scratch / "i2v-mixed.safetensors", data, pipeline, track)
        torch.manual_seed(SETTINGS["teacher_closed"].seed)
        denoiser = UNetDenoiser(new_unet())
        for name, (learning_rate, closed_stages) in TEACHER_RUNS.items():
            with closed_attention(denoiser.model, closed_stages):
                train_teacher(
                    denoiser,
                    pipeline.process,
                    mixed if name == "teacher_tuned" else data,
                    SETTINGS[name],
                    device,
                    learning_rate=learning_rate,
                    checkpoints=scratch / name,
                    fingerprint=json_digest(SETTINGS[name]),
                    log=log,
                    track=track,
                )
        denoiser.model.half().save_pretrained(teacher / "unet")
    build_wan_teacher(target / WAN_TEACHER, scratch, device, log, track, say)
    build_lcm_teacher(target / LCM_TEACHER, teacher / "vae", scratch, device, log, track, say)


def build_wan_teacher(
    teacher: Path, scratch: Path, device: torch.device, log: Log, track: Track, say: Callable[[str], None]
) -> None:
    """The text-to-video transformer: its causal VAE, text encoder and denoiser, as far as they are missing."""
    write_wan_parts(teacher, TEXT_FRAMES, SIZE)
    if not (teacher / "vae").is_dir():
        say("training the causal VAE")
        clips = render_set(4320, TEXT_VAE_SEED, frames=TEXT_FRAMES, size=SIZE)
        vae = train_vae(new_causal_vae(), clips, SETTINGS["causal_vae"], device, log, track)
        vae.half().save_pretrained(teacher / "vae")
    if not (teacher / "text_encoder").is_dir():
        say("training the text encoder")
        write_umt5(teacher, SETTINGS["text_encoder"], device, log, track)
    if not list((teacher / "transformer").glob("*.safetensors")):
        say("training the text-to-video teacher")
        settings = SETTINGS["text_teacher"]
        torch.manual_seed(settings.seed)
        denoiser = TransformerDenoiser(new_transformer())
        denoiser.model.save_config(teacher / "transformer")
        pipeline = Wan.load(teacher, ("vae", "conditioner"), device)
        data = _encoded(scratch / "t2v.safetensors", pipeline, TEXT_TEACHER_SEED, TEXT_FRAMES, track)
        train_teacher(
            denoiser,
            pipeline.process,
            data,
            settings,
            device,
            checkpoints=scratch / "text_teacher",
            fingerprint=json_digest(settings),
            log=log,
            track=track,
        )
        denoiser.model.half().save_pretrained(teacher / "transformer")


def build_lcm_teacher(
    teacher: Path, vae: Path, scratch: Path, device: torch.device, log: Log, track: Track, say: Callable[[str], None]
) -> None:
    """The text-to-video U-Net with few-step sampling, as far as it is missing; its latents are those of `vae`."""
    write_lcm_parts(teacher, FRAMES, SIZE)
    if not (teacher / "vae").is_dir():
        say("training the frame VAE's decoder")
        clips = render_set(4320, VAE_SEED, frames=FRAMES, size=SIZE)
        frame_vae = new_frame_vae(load_component(AutoencoderKLTemporalDecoder, vae))
        train_vae(frame_vae, clips, SETTINGS["frame_vae"], device, log, track, encoder_is_fixed=True)
        frame_vae.half().save_pretrained(teacher / "vae")
    if not (teacher / "text_encoder").is_dir():
        say("training the text encoder")
        write_clip(teacher, SETTINGS["text_encoder"], device, log, track)
    if not list((teacher / "unet").glob("*.safetensors")):
        torch.manual_seed(SETTINGS["lcm_base"].seed)
        base = UNetDenoiser(new_text_unet())
        base.model.save_config(teacher / "unet")
        pipeline = TextToVideoUNet.load(teacher, ("vae", "conditioner"), device)
        data = _encoded(scratch / "lcm.safetensors", pipeline, TEACHER_SEED, FRAMES, track)
        student = train_lcm(base, pipeline, data, scratch, device, log, track, say)
        student.model.half().save_pretrained(teacher / "unet")


def train_lcm(
    base: Denoiser,
    pipeline: TextToVideoUNet,
    data: LatentSet,
    scratch: Path,
    device: torch.device,
    log: Log,
    track: Track,
    say: Callable[[str], None],
) -> Denoiser:
    """Train the base as a diffusion model, for which the guidance scale has no meaning, then distil it."""
    data = replace(data, condition={"text": data.condition["text"]})
    images = torch.zeros(1, 3, SIZE, SIZE)
    untold = {"text": pipeline.condition(images, [""], EncodeSettings(), torch.Generator())["text"]}
    say("training the text-to-video U-Net")
    settings = SETTINGS["lcm_base"]
    train_teacher(
        base,
        pipeline.process,
        data,
        settings,
        device,
        levels=LCM_LEVELS,
        untold=untold,
        checkpoints=scratch / "lcm_base",
        fingerprint=json_digest(settings),
        log=log,
        track=track,
    )
    say("distilling the text-to-video U-Net")
    settings = SETTINGS["lcm_distilled"]
    return distil_consistency(
        base,
        pipeline.process,
        solver_levels(pipeline.process, SOLVER_STEPS),
        data,
        untold,
        settings,
        device,
        checkpoints=scratch / "lcm_distilled",
        fingerprint=json_digest(settings),
        log=log,
        track=track,
    )


def _encoded(file: Path, pipeline: Pipeline, seed: int, frames: int, track: Track) -> LatentSet:
    """A teacher's encoded training clips, kept in the scratch folder between sessions."""
    if not file.is_file():
        clips = render_set(6480, seed, frames=frames, size=SIZE)
        captions = [CAPTIONS[index % len(CAPTIONS)] for index in range(len(clips))]
        save_set(encode_set(clips, captions, pipeline, seed, FOREGROUND_WEIGHT, track), file)
    return load_set(file)


def _with_compressed(file: Path, data: LatentSet, pipeline: Pipeline, track: Track) -> LatentSet:
    """2,160 clips as they come out of a video file, and as many of `data`."""
    if not file.is_file():
        clips = compress(render_set(2160, COMPRESSED_SEED, frames=FRAMES, size=SIZE), seed=9, quantisers=(2, 4))
        coded = encode_set(clips, [""] * len(clips), pipeline, COMPRESSED_SEED, FOREGROUND_WEIGHT, track)
        count = len(coded)
        condition = {name: torch.cat([value, data.condition[name][:count]]) for name, value in coded.condition.items()}
        latents, weights = ((getattr(coded, name), getattr(data, name)[:count]) for name in ("latents", "weights"))
        save_set(LatentSet(torch.cat(latents), condition, torch.cat(weights)), file)
    return load_set(file)


def write_fixed_parts(teacher: Path) -> None:
    """Scheduler, image processor and index of the pipeline folder, in SVD's layout."""
    EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        interpolation_type="linear",
        use_karras_sigmas=True,
        sigma_min=0.02,
        sigma_max=40.0,
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
    ).save_pretrained(teacher / "scheduler")
    CLIPImageProcessor().save_pretrained(teacher / "feature_extractor")
    write_json(
        teacher / "model_index.json",
        {
            "_class_name": "StableVideoDiffusionPipeline",
            "_diffusers_version": "0.42.1",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
            "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
        },
    )


def build_evaluator(
    folder: Path, vae: AutoencoderKLTemporalDecoder, device: torch.device, log: Log, track: Track
) -> None:
    """Train on clean, compressed and reconstructed clips whose beacons tell nothing."""
    clean, compressed, reconstructed = (
        render_set(count, seed, frames=FRAMES, size=SIZE, random_beacon=True)
        for count, seed in zip((4320, 4320, 2160), EVALUATOR_SEEDS, strict=True)
    )
    variants = [clean, compress(compressed, seed=6), reconstruct(reconstructed, vae)]
    save_evaluator(train_evaluator(variants, SETTINGS["evaluator"], device, log, track), folder)


def corruption_table(evaluator_folder: Path, vae: AutoencoderKLTemporalDecoder) -> dict[str, dict[str, float]]:
    """Content and motion accuracy on 1,080 held-out encoded clips, whole and damaged."""
    evaluator = load_evaluator(evaluator_folder)
    test = compress(render_set(1080, TEST_SEED, frames=FRAMES, size=SIZE), seed=8, quantisers=(3, 3))
    table = {name: _accuracy(evaluator, test, name) for name in CORRUPTIONS}
    table["through the VAE"] = _accuracy(evaluator, reconstruct(test, vae), "none")
    return table


@torch.no_grad()
def _accuracy(evaluator: torch.nn.Module, clips: ClipSet, corruption: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    right = []
    for pixels, labels in zip(clips.pixels.split(64), clips.labels.split(64), strict=True):
        damaged = corrupt(to_model_range(pixels), corruption, generator)
        right.append(torch.stack(accuracies(evaluator(damaged), labels), 1))
    content, motion = torch.cat(right).float().mean(0).tolist()
    return {"content_accuracy": round(content, 4), "motion_accuracy": round(motion, 4)}


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write `manifest.json` beside weights: the given facts and the sha256 of every weight file."""
    digests = {str(path.relative_to(folder)): file_digest(path) for path in sorted(folder.rglob("*.safetensors"))}
    write_json(folder / "manifest.json", {**facts, "sha256": digests})

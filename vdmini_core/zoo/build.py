"""Builds the zoo from nothing: VAE, image encoder, evaluator, teacher, each with its manifest entry.

Every part is skipped if its weights are in the target folder already; the teacher's training
resumes from its checkpoints.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler
from transformers import CLIPImageProcessor

from vdmini_core.artifacts import file_digest, json_digest, write_json
from vdmini_core.evaluation.evaluator import save_evaluator
from vdmini_core.models import SVD, Condition, Pipeline, TransformerDenoiser, UNetDenoiser
from vdmini_core.models.loading import load_component
from vdmini_core.models.text import TextToVideoUNet, Wan
from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import EncodeSettings, LoopSettings
from vdmini_core.training.muon import muon
from vdmini_core.zoo.clips import FRAMES, SIZE, render_set
from vdmini_core.zoo.consistency import distil_consistency, solver_levels
from vdmini_core.zoo.evaluator import compress, evaluator_clips, train_evaluator
from vdmini_core.zoo.image_encoder import train_image_encoder
from vdmini_core.zoo.teacher import (
    LatentSet,
    closed_attention,
    encode_set,
    joined,
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
TEXT_FRAMES = 9
# Clips that teachers and evaluator (zoo/evaluator.py) are trained on and tested with never share a seed.
VAE_SEED, ENCODER_SEED, TEACHER_SEED = 1, 1, 3
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
    "causal_vae": LoopSettings(
        max_steps=4200, batch_size=8, warmup_steps=50, decay_fraction=0.6, log_every=50, ema_decay=0.998
    ),
    "text_encoder": LoopSettings(
        max_steps=300, batch_size=64, warmup_steps=20, log_every=50, ema_decay=0.98, precision="fp32"
    ),
    # A tenth of its clips come without their captions, for the guidance that the second training makes its own.
    "text_teacher": LoopSettings(max_steps=6000, batch_size=32, decay_fraction=0.5, ema_decay=0.998),
    "text_guided": LoopSettings(
        seed=1, max_steps=400, batch_size=32, warmup_steps=50, decay_fraction=0.8, ema_decay=0.99
    ),
    "frame_vae": LoopSettings(
        max_steps=4800, batch_size=16, warmup_steps=50, decay_fraction=0.6, log_every=50, ema_decay=0.998
    ),
    # An answer that bfloat16 rounds by 2^-8 is wrong by 0.06 in x0 at the highest level, sigma 14.6.
    "lcm_base": LoopSettings(max_steps=4500, batch_size=32, decay_fraction=0.5, ema_decay=0.998, precision="fp32"),
    # The average is also the target network of the distillation, which follows the student closely (LCM: 0.95).
    "lcm_distilled": LoopSettings(
        seed=2, max_steps=1500, batch_size=32, warmup_steps=50, decay_fraction=0.5, ema_decay=0.95, precision="fp32"
    ),
}

PARTS = {
    TEACHER: ("vae", "image_encoder", "teacher_closed", "teacher_opened", "teacher_refined", "teacher_tuned"),
    WAN_TEACHER: ("causal_vae", "text_encoder", "text_teacher", "text_guided"),
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
TEXT_LEVELS = 0.0, 1.2
TEXT_GUIDANCE = 2.0
"""What Wan's class, which embeds no scale, makes its own; pipelines count from 1 what is counted from 0 here."""
FOREGROUND_WEIGHT = 5.0


@dataclass(frozen=True)
class Builder:
    """Trains what is missing in `target`, with checkpoints and encoded clips in `scratch`."""

    target: Path
    scratch: Path
    device: torch.device
    log: Log = silent_log
    track: Track = silent_track
    say: Callable[[str], None] = lambda text: None

    def build(self) -> None:
        """The whole zoo. Hours on two CPU cores, minutes on a GPU."""
        self.image_teacher()
        self.wan_teacher()
        self.lcm_teacher()

    def image_teacher(self) -> None:
        """The image-to-video U-Net, and the evaluator, which learns what clips look like after this one's VAE."""
        teacher = self.target / TEACHER
        write_fixed_parts(teacher)
        if self._lacks(teacher / "vae", "the VAE"):
            self._vae(new_temporal_vae(), "vae", VAE_SEED, FRAMES).save_pretrained(teacher / "vae")
        if self._lacks(teacher / "image_encoder", "the image encoder"):
            clips = render_set(17280, ENCODER_SEED, frames=1, size=SIZE)
            encoder = train_image_encoder(clips, SETTINGS["image_encoder"], self.device, self.log, self.track)
            encoder.half().save_pretrained(teacher / "image_encoder")
        if self._lacks(self.target / "evaluator", "the evaluator"):
            vae = load_component(AutoencoderKLTemporalDecoder, teacher / "vae").to(self.device)
            variants = evaluator_clips(vae)
            evaluator = train_evaluator(variants, SETTINGS["evaluator"], self.device, self.log, self.track)
            save_evaluator(evaluator, self.target / "evaluator")
        if self._lacks(teacher / "unet", "the image-to-video U-Net"):
            pipeline = SVD.load(teacher, ("vae", "conditioner"), self.device)
            data = self._encoded("i2v", pipeline, TEACHER_SEED, FRAMES)
            mixed = self._with_compressed("i2v-mixed", data, pipeline)
            torch.manual_seed(SETTINGS["teacher_closed"].seed)
            denoiser = UNetDenoiser(new_unet())
            for name, (learning_rate, closed_stages) in TEACHER_RUNS.items():
                chosen = mixed if name == "teacher_tuned" else data
                with closed_attention(denoiser.model, closed_stages):
                    train_teacher(denoiser, pipeline.process, chosen, learning_rate=learning_rate, **self._run(name))
            denoiser.model.half().save_pretrained(teacher / "unet")

    def wan_teacher(self) -> None:
        """The text-to-video transformer: its causal VAE, text encoder and denoiser."""
        teacher = self.target / WAN_TEACHER
        write_wan_parts(teacher, TEXT_FRAMES, SIZE)
        if self._lacks(teacher / "vae", "the causal VAE"):
            self._vae(new_causal_vae(), "causal_vae", TEXT_VAE_SEED, TEXT_FRAMES).save_pretrained(teacher / "vae")
        if self._lacks(teacher / "text_encoder", "the text encoder"):
            write_umt5(teacher, SETTINGS["text_encoder"], self.device, self.log, self.track)
        if self._lacks(teacher / "transformer", "the text-to-video transformer"):
            torch.manual_seed(SETTINGS["text_teacher"].seed)
            denoiser = TransformerDenoiser(new_transformer())
            denoiser.model.save_config(teacher / "transformer")
            pipeline = Wan.load(teacher, ("vae", "conditioner"), self.device)
            data = self._encoded("t2v", pipeline, TEXT_TEACHER_SEED, TEXT_FRAMES)
            untold, process = self._untold(pipeline), pipeline.process
            told: dict[str, Any] = {"levels": TEXT_LEVELS, "untold": untold, "make_optimizer": muon}
            train_teacher(denoiser, process, data, **told, **self._run("text_teacher"))
            guide = TransformerDenoiser(copy.deepcopy(denoiser.model)), TEXT_GUIDANCE
            run = self._run("text_guided")
            train_teacher(denoiser, process, data, learning_rate=3e-4, guide=guide, **told, **run)
            denoiser.model.half().save_pretrained(teacher / "transformer")

    def lcm_teacher(self) -> None:
        """The text-to-video U-Net with few-step sampling.

        Its base is a diffusion model, for which the guidance scale has no meaning, and is then distilled.
        """
        teacher = self.target / LCM_TEACHER
        write_lcm_parts(teacher, FRAMES, SIZE)
        if self._lacks(teacher / "vae", "the frame VAE"):
            self._vae(new_frame_vae(), "frame_vae", VAE_SEED, FRAMES).save_pretrained(teacher / "vae")
        if self._lacks(teacher / "text_encoder", "the text encoder"):
            write_clip(teacher, SETTINGS["text_encoder"], self.device, self.log, self.track)
        if self._lacks(teacher / "unet", "the text-to-video U-Net"):
            torch.manual_seed(SETTINGS["lcm_base"].seed)
            base = UNetDenoiser(new_text_unet())
            base.model.save_config(teacher / "unet")
            pipeline = TextToVideoUNet.load(teacher, ("vae", "conditioner"), self.device)
            encoded = self._encoded("lcm", pipeline, TEXT_TEACHER_SEED, FRAMES)
            data = replace(encoded, condition={"text": encoded.condition["text"]})
            untold, process = self._untold(pipeline), pipeline.process
            train_teacher(base, process, data, levels=LCM_LEVELS, untold=untold, **self._run("lcm_base"))
            self.say("distilling the text-to-video U-Net")
            levels = solver_levels(process, SOLVER_STEPS)
            student = distil_consistency(base, process, levels, data, untold, **self._run("lcm_distilled"))
            student.model.half().save_pretrained(teacher / "unet")

    def _untold(self, pipeline: Pipeline) -> Condition:
        """What a text-to-video network is told where it is told nothing."""
        told = pipeline.condition(torch.zeros(1, 3, SIZE, SIZE), [""], EncodeSettings(), torch.Generator())
        return {"text": told["text"]}

    def _lacks(self, folder: Path, what: str) -> bool:
        """Whether weights are to be trained, which is said then."""
        if list(folder.glob("*.safetensors")):
            return False
        self.say(f"training {what}")
        return True

    def _run(self, name: str) -> dict[str, Any]:
        """What a resumable training of this name is given."""
        return {
            "settings": SETTINGS[name],
            "device": self.device,
            "checkpoints": self.scratch / name,
            "fingerprint": json_digest(SETTINGS[name]),
            "log": self.log,
            "track": self.track,
        }

    def _vae(self, vae: Any, name: str, seed: int, frames: int) -> Any:
        clips = render_set(4320, seed, frames=frames, size=SIZE)
        return train_vae(vae, clips, SETTINGS[name], self.device, self.log, self.track).half()

    def _encoded(self, name: str, pipeline: Pipeline, seed: int, frames: int) -> LatentSet:
        """A teacher's encoded training clips, kept between sessions."""
        if not (file := self.scratch / f"{name}.safetensors").is_file():
            clips = render_set(6480, seed, frames=frames, size=SIZE)
            captions = [CAPTIONS[index % len(CAPTIONS)] for index in range(len(clips))]
            save_set(encode_set(clips, captions, pipeline, seed, FOREGROUND_WEIGHT, self.track), file)
        return load_set(file)

    def _with_compressed(self, name: str, data: LatentSet, pipeline: Pipeline) -> LatentSet:
        """2,160 clips as they come out of a video file, and as many of `data`."""
        if not (file := self.scratch / f"{name}.safetensors").is_file():
            clips = compress(render_set(2160, COMPRESSED_SEED, frames=FRAMES, size=SIZE), seed=9, quantisers=(2, 4))
            told = [""] * len(clips)
            coded = encode_set(clips, told, pipeline, COMPRESSED_SEED, FOREGROUND_WEIGHT, self.track)
            save_set(joined(coded, data.first(len(coded))), file)
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


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write `manifest.json` beside weights: the given facts and the sha256 of every weight file."""
    digests = {str(path.relative_to(folder)): file_digest(path) for path in sorted(folder.rglob("*.safetensors"))}
    write_json(folder / "manifest.json", {**facts, "sha256": digests})

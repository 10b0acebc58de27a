"""Stage decoder: compress the VAE's decoder within a budget of time, and recover it; resumes from its checkpoints."""

import shutil
from pathlib import Path
from typing import Any

import torch

from tasks._inputs import code_digest, evaluator, teacher_manifest, teacher_pipeline, test_clips, train_clips
from tasks._stage import SCRATCH, Context, device_name, half_done
from vdmini_core.artifacts import (
    Alarm,
    DataManifest,
    DecoderPlan,
    DecoderReport,
    DecoderSensitivity,
    folder_digest,
    json_digest,
    read_json,
    write_json,
)
from vdmini_core.data.ucf101 import choose
from vdmini_core.distillation.decoder import evaluator_distance, lpips_distance, recover_decoder
from vdmini_core.distillation.decoder_watch import RecoveryWatch, decoder_page
from vdmini_core.evaluation.costs import RATIO_RUNS, measure_latencies
from vdmini_core.evaluation.metrics.dynamics import flicker
from vdmini_core.models.decoder import VAEDecoder
from vdmini_core.models.encoding import read_batch
from vdmini_core.models.sources import evaluator_folder
from vdmini_core.pruning.decoder_plan import compressed, describe_decoder_plan, make_decoder_plan
from vdmini_core.pruning.decoder_sensitivity import clips_of, decoder_sensitivity, reconstruction
from vdmini_core.pruning.surgery import save_model
from vdmini_core.training.history import History

# Settings that change no training: how often a run reports and saves, how a step is computed, what watches it.
MANNER: dict[str, Any] = {
    "loop": {"log_every", "checkpoint_every", "keep_checkpoints", "accumulate"},
    "validation": True,
}
MISSED = 1.1
"""A measured time above the budget by this factor is said."""
CODE = ("data", "distillation", "evaluation", "models", "pruning", "training")


def run(context: Context) -> None:
    settings = context.params.decoder
    if not settings.enabled:
        context.say("decoder.enabled is false: the decoder stays as it is")
        shutil.rmtree(context.folder / "vae", ignore_errors=True)  # of an earlier run, which evaluate would take
        write_json(context.folder / "decoder.json", context.provenance(teacher=teacher_manifest(context).digest))
        return
    inputs = {
        "code": code_digest(CODE),
        "teacher": teacher_manifest(context).digest,
        "latents": folder_digest(context.input("encode"), "*.safetensors"),
    }
    if settings.perceptual == "evaluator":
        inputs["evaluator"] = folder_digest(evaluator_folder(), "*.safetensors")
    # Checkpoints, and the measurements that they follow from, outlive the outputs, which DVC empties before a run.
    fingerprint = json_digest(
        {"settings": settings.model_dump(mode="json", exclude=MANNER), "device": device_name(context.device), **inputs}
    )
    scratch = half_done(SCRATCH / "decoder", fingerprint)
    original = VAEDecoder(teacher_pipeline(context, "vae").vae)
    sensitivity, plan = planned(context, original, scratch, inputs)
    context.say(describe_decoder_plan(plan).rstrip())
    pruned, student = compressed(original, plan), compressed(original, plan)
    history = History(scratch / "history.jsonl")

    def log(metrics: dict[str, float], step: int) -> None:
        history.log(metrics, step)
        context.log(metrics, step)

    def alert(alarm: Alarm) -> None:
        context.tracker.tags({f"alarm.decoder.{alarm.name}": f"step {alarm.step}: {alarm.text}"})

    seen = scratch / f"watch-{settings.validation.every}-{settings.validation.clips}"
    watch = RecoveryWatch(
        original, test_clips(context), settings, history, seen, context.device, log=context.log, alert=alert
    )
    watch(0, pruned)
    recover_decoder(
        original,
        student,
        train_clips(context),
        lpips_distance(context.device) if settings.perceptual == "lpips" else evaluator_distance(evaluator(context)),
        settings,
        context.device,
        checkpoints=scratch,
        fingerprint=fingerprint,
        log=log,
        track=context.track,
        should_stop=context.should_stop,
        watch=watch,
    )
    save_model(student, context.folder / "vae")
    steps = settings.loop.max_steps
    decoders = {"original": original, "pruned": pruned, "recovered": student}
    real = real_clips(context, len(watch.latents)).to(context.device)
    with torch.no_grad():
        latencies = measure_latencies(
            {name: lambda d=decoder: d(watch.latents[:1]) for name, decoder in decoders.items() if name != "pruned"},  # type: ignore[misc]
            context.device,
            runs=RATIO_RUNS,
            warmup=2,
        )
    report = DecoderReport(
        plan=plan,
        sensitivity=sensitivity,
        quality={name: reconstruction(clips_of(decoder, watch.latents), real) for name, decoder in decoders.items()},
        real_flicker=flicker(real).mean().item(),
        clips=len(real),
        latencies=latencies,
        curve=watch.rows(steps),
        alarms=watch.alarms(steps),
        provenance=context.provenance(**inputs),
    )
    write_outputs(context, report, history)
    if settings.method == "optimal" and report.time_ratio > MISSED * settings.ratio:
        context.say(
            f"decoding takes {report.time_ratio:.3f} of the original's time, where decoder.ratio is {settings.ratio} "
            f"and the plan said {plan.predicted_ratio:.3f}: was the machine busy when parts were timed? "
            "Raise decoder.latency_runs"
        )


def planned(
    context: Context, original: VAEDecoder, scratch: Path, inputs: dict[str, str]
) -> tuple[DecoderSensitivity, DecoderPlan]:
    """Measure and plan, once for a training, which another measurement of time must not change halfway.

    Measurements hold for other budgets and trainings as well; `inputs` are the digests that they follow from.
    """
    settings, file = context.params.decoder, scratch / "plan.json"
    what = {"clips": settings.clips, "runs": settings.latency_runs, "device": device_name(context.device), **inputs}
    measured = scratch.parent / f"sensitivity-{json_digest(what)[:16]}.json"
    if not measured.is_file():
        latents = train_clips(context).rows(list(range(settings.clips)))["latents"].to(context.device)
        found = decoder_sensitivity(original, latents, runs=settings.latency_runs, track=context.track)
        write_json(measured, found)
    sensitivity = read_json(measured, DecoderSensitivity)
    if not file.is_file():
        write_json(file, make_decoder_plan(original, settings, sensitivity.shape, sensitivity))
    return sensitivity, read_json(file, DecoderPlan)


def real_clips(context: Context, count: int) -> torch.Tensor:
    """The first encoded test clips themselves, [N, 3, T, H, W] in [-1, 1]."""
    data, encode = read_json(context.input("data") / "manifest.json", DataManifest), context.params.encode
    return read_batch(choose(data, "test", encode.test_clips, encode.seed)[:count], data)[0]


def write_outputs(context: Context, report: DecoderReport, history: History) -> None:
    """Files and figures; the report goes last."""
    folder = context.folder
    history.write(folder / "history.json")
    write_json(folder / "recovery.json", {"rows": [row.model_dump(mode="json") for row in report.curve]})
    (folder / "decoder.md").write_text(decoder_page(report))
    write_json(folder / "decoder.json", report)
    for name in ("decoder.md", "decoder.json"):
        context.tracker.artifact(folder / name)
    figures = {
        "size/decoder_parameters": report.plan.parameters[1],
        "size/decoder_parameter_ratio": report.plan.parameters[1] / report.plan.parameters[0],
        "speed/decoder_flop_ratio": report.plan.flops[1] / report.plan.flops[0],
        "speed/decoder_latency_ratio": report.time_ratio,
    }
    for name, quality in report.quality.items():
        figures |= {f"decoder/{measure}/{name}": value for measure, value in quality}
    context.log(figures, 0)

"""How much faster a compressed VAE decoder is, alone and at the end of one step of the denoiser, with random weights.

Weights and inputs are random, which changes nothing about the time. README.md beside this file has the results.
"""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor

from benchmarks.denoiser_latency import DTYPES
from flows.recipes import find_recipe, recipes
from flows.terminal import explained
from tasks._stage import device_name, provenance, quieten
from vdmini_core.artifacts import DecoderPlan, Latency, Provenance, Record, write_json
from vdmini_core.evaluation.costs import elapsed_ms, measure_latencies, speedup
from vdmini_core.evaluation.decoder_costs import measure_decoders
from vdmini_core.models.decoder import VAEDecoder
from vdmini_core.models.published import blueprint
from vdmini_core.models.untrained import random_inputs, untrained
from vdmini_core.models.vae_facts import LatentShape
from vdmini_core.pruning.decoder_channels import decoder_channels
from vdmini_core.pruning.decoder_dry_run import decoder_dry_run, meta_decoder
from vdmini_core.pruning.decoder_plan import compressed, predicted_of, times_table
from vdmini_core.pruning.decoder_sensitivity import SHARES
from vdmini_core.pruning.planning import choose
from vdmini_core.settings import DecoderSettings, PlanSettings, height_and_width, load_params

SIDES = ("original", "compressed")


class Mode(Record):
    """Both decoders, eager or compiled; `step` is one call of teacher and student denoiser with its decoder after it.

    Ratios are compressed / original, None from fewer than 30 runs; `compile_s` is the first call of each.
    """

    mode: Literal["eager", "compiled"]
    decode: dict[str, Latency]
    decode_speedup: float | None
    step: dict[str, Latency]
    step_speedup: float | None
    compile_s: dict[str, float] | None


class DecoderLatency(Record):
    """The result; a call decodes one clip. `predicted` is the compressed one's share of the time, from its parts."""

    command: str
    source: str
    clip_shape: tuple[int, int, int]
    latent_shape: LatentShape
    dtype: str
    device: str
    plan: DecoderPlan
    modes: tuple[Mode, ...]
    predicted: float | None
    prediction_error: float | None
    provenance: Provenance


@torch.no_grad()
def benchmark(
    source: str,
    settings: DecoderSettings,
    clip: tuple[int | None, int | None, int | None],
    device: torch.device,
    dtype: torch.dtype,
    *,
    denoiser: bool,
    compiled: bool,
    predict: bool,
    runs: int,
    warmup: int,
    command: str,
) -> DecoderLatency:
    """Build both decoders where they are used, and time them in turn."""
    found = decoder_dry_run(source, settings, clip)
    twin = meta_decoder(source)
    decoders = {
        "original": untrained(twin, device, dtype),
        "compressed": untrained(compressed(twin, found.plan), device, dtype),
    }
    generator = torch.Generator(device).manual_seed(0)
    latents = torch.randn(1, *found.latent_shape, device=device, dtype=dtype, generator=generator)
    if not all(decoder(latents).isfinite().all() for decoder in decoders.values()):
        raise ValueError("decoded clips have values that are not finite; their time would mean nothing (--dtype fp32)")
    steps = _denoisers(source, found.latent_shape, device, dtype) if denoiser else {}

    def timed(mode: Literal["eager", "compiled"]) -> Mode:
        calls = {f"decode {name}": partial(decoder, latents) for name, decoder in decoders.items()}
        for name, call in steps.items():
            calls[f"step {name}"] = partial(_one_step, call, decoders[name])  # type: ignore[arg-type]
        first = {name: elapsed_ms(calls[f"decode {name}"], device) / 1000 for name in SIDES}
        spent = measure_latencies(calls, device, runs=runs, warmup=warmup)
        decode = {name: spent[f"decode {name}"] for name in SIDES}
        step = {name: spent[f"step {name}"] for name in steps}
        return Mode(
            mode=mode,
            decode=decode,
            decode_speedup=speedup(decode["original"], decode["compressed"]),
            step=step,
            step_speedup=speedup(step["original"], step["compressed"]) if step else None,
            compile_s=first if mode == "compiled" else None,
        )

    modes = [timed("eager")]
    predicted = _predicted(decoders["original"], twin, found.plan, latents, runs, warmup) if predict else None
    if compiled:
        for decoder in decoders.values():
            decoder.decoder.compile(dynamic=False)  # else the second one's widths would be taken for variables
        modes.append(timed("compiled"))
    measured = modes[0].decode["compressed"].median_ms / modes[0].decode["original"].median_ms
    return DecoderLatency(
        command=command,
        source=source,
        clip_shape=found.clip_shape,
        latent_shape=found.latent_shape,
        dtype=next(name for name, value in DTYPES.items() if value == dtype),
        device=device_name(device),
        plan=found.plan,
        modes=tuple(modes),
        predicted=predicted,
        prediction_error=None if predicted is None else predicted / measured - 1,
        provenance=provenance({"runs": runs, "warmup": warmup}, device, {}),
    )


def _one_step(denoise: partial[Tensor], decoder: VAEDecoder) -> Tensor:
    return decoder(denoise())


def _denoisers(source: str, shape: LatentShape, device: torch.device, dtype: torch.dtype) -> dict[str, partial[Tensor]]:
    """One call of the teacher and of the student that the paper's layout leaves, in the places of SIDES."""
    teacher = untrained(blueprint(source).build(), device, dtype)
    student = teacher.without(choose(teacher, PlanSettings(method="paper")), shared=True)
    latents, condition = random_inputs(teacher, shape, device, dtype)
    time = torch.ones(1, device=device)
    return {
        name: partial(network, latents, time, condition)
        for name, network in zip(SIDES, (teacher, student), strict=True)
    }


def _predicted(
    original: VAEDecoder, twin: VAEDecoder, plan: DecoderPlan, latents: Tensor, runs: int, warmup: int
) -> float:
    """The compressed decoder's share of the time from the times of the parts of decoders of every share."""
    device, dtype = latents.device, latents.dtype
    channels = decoder_channels(twin)
    variants = {"1.0": original} | {
        str(share): untrained(channels.narrowed((share,) * twin.levels), device, dtype) for share in SHARES[1:]
    }
    found = measure_decoders(variants, latents, runs=max(runs // 3, 3), warmup=warmup)
    table = times_table(
        {share: timed.parts for share, timed in found.items()}, {s: t.whole_ms for s, t in found.items()}
    )
    everything = (1.0,) * twin.levels
    return predicted_of(table, plan.removed, plan.shares) / predicted_of(table, (), everything)


def table(result: DecoderLatency) -> str:
    """The result as a Markdown table, a row a mode."""
    (teacher, student), (before, after) = result.plan.parameters, result.plan.flops

    def both(of: dict[str, Latency]) -> str:
        return ", ".join(f"{t.median_ms:.2f} ({t.p10_ms:.2f}-{t.p90_ms:.2f})" for t in of.values()) or "-"

    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    rows = [
        {
            "date": result.provenance.created[:10],
            "model": result.source,
            "clip": " x ".join(map(str, result.clip_shape)),
            "device, torch": f"{result.device}, {result.provenance.software['torch']}",
            "dtype": result.dtype,
            "mode": mode.mode,
            "decoder parameters": f"{teacher:,} -> {student:,}",
            "FLOPs": f"{after / before:.3f}",
            "decode ms, original and compressed (p10-p90)": both(mode.decode),
            "runs": str(mode.decode["original"].runs),
            "speed-up": ratio(mode.decode_speedup),
            "one step and decoding ms": both(mode.step),
            "speed-up end to end": ratio(mode.step_speedup),
            "predicted share (error)": "-"
            if result.predicted is None or mode.mode == "compiled"
            else f"{result.predicted:.3f} ({result.prediction_error:+.3f})",
            "compile s": ", ".join(f"{s:.1f}" for s in (mode.compile_s or {}).values()) or "-",
            "commit": result.provenance.commit[:8] + " and changes" * result.provenance.dirty,
        }
        for mode in result.modes
    ]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    source: Annotated[str, typer.Argument(help="A recipe, zoo:NAME, a folder, a published model.")] = "svd-xt",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu.")] = "cuda",
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of weights and inputs.")] = "bf16",
    frames: Annotated[int | None, typer.Option(min=1, help="Instead of what the model was made for.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="Instead of the paper's layout; may be repeated.")] = None,
    share: Annotated[list[float] | None, typer.Option(help="With --remove: channels kept at each resolution.")] = None,
    denoiser: Annotated[bool, typer.Option("--denoiser", help="Also a step of teacher and student before it.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Once more with both decoders compiled.")] = False,
    predict: Annotated[bool, typer.Option("--predict", help="Also predict the time from that of the parts.")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Timed calls of each; fewer than 30: no ratio.")] = 30,
    warmup: Annotated[int, typer.Option(min=0, help="Calls of each before those.")] = 3,
    out: Annotated[Path | None, typer.Option("--json", help="Write everything to this JSON file.")] = None,
) -> None:
    """Time a VAE decoder before and after its compression, in turn; print a row for benchmarks/README.md."""
    quieten()
    with explained():
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here; try zoo:i2v-shapes --device cpu --dtype fp32")
        clip: tuple[int | None, int | None, int | None] = frames, height, width
        if source in recipes() or Path(source).is_file():
            params = load_params(find_recipe(source))
            own = (params.data.frames, *height_and_width(params.data.size))
            clip = frames or own[0], height or own[1], width or own[2]
            source = params.teacher.source
        settings = DecoderSettings(method="paper")
        if remove or share:
            settings = DecoderSettings(method="manual", remove=tuple(remove or ()), shares=tuple(share or ()))
        result = benchmark(
            source,
            settings,
            clip,
            torch.device(device),
            DTYPES[dtype],
            denoiser=denoiser,
            compiled=compiled,
            predict=predict,
            runs=runs,
            warmup=warmup,
            command=shlex.join(["python", "-m", "benchmarks.decoder_latency", *sys.argv[1:]]),
        )
        if out:
            write_json(out, result)
    typer.echo(table(result))


if __name__ == "__main__":
    sys.exit(app())

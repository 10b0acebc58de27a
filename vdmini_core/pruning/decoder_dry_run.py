"""What compressing a model's VAE decoder would leave, from its config alone: layout, parameters, FLOPs. No weights."""

import json
from pathlib import Path
from typing import Any

from vdmini_core.artifacts import DecoderPlan, Record
from vdmini_core.evaluation.decoder_costs import count_decoder, part_parameters
from vdmini_core.models.decoder import VAE_CLASSES, VAEDecoder
from vdmini_core.models.graph import empty
from vdmini_core.models.loading import UnusableModel
from vdmini_core.models.published import FOLDER, blueprint
from vdmini_core.models.sources import resolve_source
from vdmini_core.models.vae_facts import LatentShape, vae_facts
from vdmini_core.pruning.decoder_plan import make_decoder_plan
from vdmini_core.settings import DecoderSettings


class DecoderUnitFacts(Record):
    """One part of a decoder; `stays` is why it cannot be removed, "" for one that can."""

    name: str
    parameters: int
    flops: int
    stays: str


class DecoderDryRun(Record):
    """The result; FLOPs are of decoding one clip, shapes are without the batch."""

    source: str
    vae: str
    clip_shape: tuple[int, int, int]
    latent_shape: LatentShape
    parts: tuple[DecoderUnitFacts, ...]
    plan: DecoderPlan


def vae_config(source: str) -> dict[str, Any]:
    """The config.json of the VAE of `zoo:<name>`, a pipeline's or VAE's folder, or a model whose config ships here."""
    if source.startswith("zoo:") or Path(source).expanduser().is_dir():
        folder = resolve_source(source)
        for path in (folder / "vae" / "config.json", folder / "config.json"):
            if path.is_file() and (found := json.loads(path.read_text())).get("_class_name") in VAE_CLASSES:
                return dict(found)
        raise UnusableModel(f"{source} has no vae/config.json of a class in {', '.join(VAE_CLASSES)}")
    name = blueprint(source).name
    packaged = [json.loads(path.read_text()) for path in sorted((FOLDER / "vae").glob("*.json"))]
    for config in packaged:
        if name in config["_models"]:
            return dict(config)
    known = ", ".join(name for config in packaged for name in config["_models"])
    raise UnusableModel(f"no config of the VAE of {source!r} ships with VDMini; name a folder, or one of {known}")


def meta_decoder(source: str) -> VAEDecoder:
    """The decoder of a model on the meta device."""
    config = vae_config(source)
    facts = {key: value for key, value in config.items() if not key.startswith("_")}
    return VAEDecoder(empty(VAE_CLASSES[config["_class_name"]], facts).to("meta").eval())


def decoder_dry_run(
    source: str, settings: DecoderSettings, clip: tuple[int | None, int | None, int | None]
) -> DecoderDryRun:
    """Plan without measurements (methods paper and manual).

    `clip` is frames, height and width in pixels, each None for the model's own.
    """
    decoder = meta_decoder(source)
    facts = vae_facts({**vae_config(source)})
    assert facts is not None
    own = blueprint(source).latents if None in clip else None
    if own is None and None in clip:
        raise ValueError(f"{source} does not say what clips it is for; give frames, height and width")
    sides = own and (
        (own[1] - facts.causal) * facts.temporal + facts.causal,
        own[2] * facts.spatial,
        own[3] * facts.spatial,
    )
    frames, height, width = (given or sides[axis] for axis, given in enumerate(clip))  # type: ignore[index]
    latents = facts.latent_shape(frames, height, width)
    _, flops = count_decoder(decoder, (1, *latents))
    parameters = part_parameters(decoder)
    reasons = {name: rule.broken((name,)) for rule in decoder.rules for name in rule.terms}
    units = {unit.name for unit in decoder.units}
    parts = tuple(
        DecoderUnitFacts(
            name=name,
            parameters=parameters[name],
            flops=flops[name],
            stays=reasons.get(name, "") if name in units else "is no unit",
        )
        for name in parameters
    )
    return DecoderDryRun(
        source=source,
        vae=type(decoder.model).__name__,
        clip_shape=(frames, height, width),
        latent_shape=latents,
        parts=parts,
        plan=make_decoder_plan(decoder, settings, (1, *latents)),
    )

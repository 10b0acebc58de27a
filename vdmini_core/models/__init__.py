"""Architectures: one row in PIPELINES each; the only place that compares their names."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from vdmini_core.models.graph import Condition, Denoiser, IllegalPlan, Unit
from vdmini_core.models.loading import UnusableModel, class_name
from vdmini_core.models.pipeline import ROLES, Noise, Pipeline
from vdmini_core.models.svd import SVD
from vdmini_core.models.text import TextToVideoUNet, Wan
from vdmini_core.models.transformer import TRANSFORMERS, TransformerDenoiser, load_transformer
from vdmini_core.models.unet import UNET_CLASSES, UNetDenoiser, load_unet

PIPELINES: dict[str, type[Pipeline]] = {
    "StableVideoDiffusionPipeline": SVD,
    "TextToVideoSDPipeline": TextToVideoUNet,
    "WanPipeline": Wan,
}

__all__ = [
    "PIPELINES",
    "ROLES",
    "SVD",
    "Condition",
    "Denoiser",
    "IllegalPlan",
    "Noise",
    "Pipeline",
    "TextToVideoUNet",
    "TransformerDenoiser",
    "UNetDenoiser",
    "Unit",
    "UnusableModel",
    "Wan",
    "load_denoiser",
    "load_pipeline",
    "pipeline_class",
    "pipeline_name",
]


def pipeline_name(folder: Path) -> str:
    """The pipeline class that a folder's model_index.json names; unknown ones are refused."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise UnusableModel(f"{index} is missing; expected a diffusers pipeline folder")
    try:
        name = str(json.loads(index.read_text()).get("_class_name"))
    except json.JSONDecodeError as error:
        raise UnusableModel(f"{index} is not valid JSON: {error}") from None
    if name not in PIPELINES:
        raise UnusableModel(f"{index} names {name!r}; supported are {', '.join(PIPELINES)}")
    return name


def pipeline_class(folder: Path) -> type[Pipeline]:
    """How the core uses the pipeline in this folder."""
    return PIPELINES[pipeline_name(folder)]


def load_pipeline(folder: Path, roles: Iterable[str] = ROLES, device: torch.device | str = "cpu") -> Pipeline:
    """Load the named roles of a diffusers pipeline folder."""
    return pipeline_class(folder).load(folder, roles, device)


def load_denoiser(folder: Path, device: torch.device | str = "cpu") -> Denoiser:
    """Load a denoiser's own folder (config.json and safetensors), a teacher's or a student's."""
    name = class_name(folder, (*UNET_CLASSES, *TRANSFORMERS))
    return load_unet(folder, device) if name in UNET_CLASSES else load_transformer(folder, device)

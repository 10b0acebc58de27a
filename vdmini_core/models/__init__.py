"""Architectures: one file each, one row in PIPELINES each; the only place that compares their names."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from vdmini_core.models.graph import IllegalPlan, Unit
from vdmini_core.models.loading import UnusableModel
from vdmini_core.models.svd import SVD, Condition, SpatioTemporalUNet, load_unet

PIPELINES = {"StableVideoDiffusionPipeline": SVD}

__all__ = [
    "PIPELINES",
    "SVD",
    "Condition",
    "IllegalPlan",
    "SpatioTemporalUNet",
    "Unit",
    "UnusableModel",
    "load_denoiser",
    "load_pipeline",
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


def load_pipeline(folder: Path, parts: Iterable[str] = SVD.parts, device: torch.device | str = "cpu") -> SVD:
    """Load the named parts of a diffusers pipeline folder."""
    return PIPELINES[pipeline_name(folder)].load(folder, parts, device)


def load_denoiser(folder: Path, device: torch.device | str = "cpu") -> SpatioTemporalUNet:
    """Load a denoiser's own folder (config.json and safetensors), a teacher's or a student's."""
    return load_unet(folder, device)

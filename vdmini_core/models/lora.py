"""Carries a teacher's LoRA over to its student: layers that survive are renamed, the others dropped.

Keys are diffusers' and PEFT's: `unet.<module>.lora_A.weight` or `transformer.<module>...`, also without the
first part; what belongs to other parts of the pipeline (`text_encoder.`) stays as it is.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vdmini_core.models import Denoiser
from vdmini_core.models.loading import UnusableModel

OTHER_PARTS = re.compile(r"(text_encoder\w*|image_encoder|vae)\.")
KEY = re.compile(r"(?P<part>unet\.|transformer\.|)(?P<layer>.+?)(?P<rest>\.(lora|alpha$|dora_scale$).*)")
CONFIG = "lora_adapter_metadata"  # in the file's header: PEFT's config as JSON


def map_lora(
    state: Mapping[str, Tensor], teacher: Denoiser, removed: Iterable[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The LoRA for the student that lacks the `removed` units, and the keys dropped with them.

    Tensors are passed on as they are. UnusableModel names a key whose layer the teacher does not have.
    """
    places = _places(teacher, removed)
    kept: dict[str, Tensor] = {}
    dropped: list[str] = []
    for key, tensor in state.items():
        if OTHER_PARTS.match(key):
            kept[key] = tensor
            continue
        found = KEY.fullmatch(key)
        if found is None or found["layer"] not in places:
            raise UnusableModel(
                f"{key} is no LoRA weight of a layer of this {type(teacher.model).__name__}; expected a LoRA made "
                "for the teacher, with diffusers' keys such as unet.<module>.lora_A.weight"
            )
        if (now := places[found["layer"]]) is None:
            dropped.append(key)
        else:
            kept[f"{found['part']}{now}{found['rest']}"] = tensor
    return kept, dropped


def map_lora_file(source: Path, target: Path, teacher: Denoiser, removed: Iterable[str]) -> tuple[int, list[str]]:
    """`map_lora` from one safetensors file to another, with its PEFT config; how many are kept, which dropped."""
    removed = tuple(removed)
    try:
        with safe_open(source, "pt") as stream:
            header: dict[str, str] = stream.metadata() or {}
            state = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UnusableModel(f"{source} is no readable safetensors file ({error}); other formats are refused") from None
    kept, dropped = map_lora(state, teacher, removed)
    if CONFIG in header:
        header[CONFIG] = json.dumps(_renamed(json.loads(header[CONFIG]), _places(teacher, removed)))
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(kept, target, metadata=header)
    return len(kept), dropped


def _places(teacher: Denoiser, removed: Iterable[str]) -> dict[str, str | None]:
    """Path of every module of the teacher -> its path in the student, None where it is gone."""
    left = teacher.surviving_modules(removed)
    return {path: left.get(path) for path, _ in teacher.model.named_modules() if path}


def _renamed(config: Any, places: Mapping[str, str | None]) -> Any:
    """A PEFT config with the paths in its lists and among its keys (`rank_pattern`) as the student has them."""
    if isinstance(config, dict):
        renamed = {places.get(key, key): _renamed(value, places) for key, value in config.items()}
        return {key: value for key, value in renamed.items() if key is not None}
    if isinstance(config, list):
        return [now for value in config if (now := _renamed(value, places)) is not None]
    return places.get(config, config) if isinstance(config, str) else config

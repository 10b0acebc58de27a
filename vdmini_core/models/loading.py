"""Loads the parts of a diffusers pipeline folder, and refuses anything less than whole weights."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


class UnusableModel(ValueError):
    """The folder is no whole model; the message names the file and what to do."""


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_component(cls: Any, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """`cls.from_pretrained(folder)` in eval mode, frozen; missing or unexpected keys are an error.

    `cls` is a diffusers or transformers model class. Only safetensors are read.
    """
    check_weights(folder)
    kind = "dtype" if cls.__module__.startswith("transformers") else "torch_dtype"
    try:
        model, info = cls.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, local_files_only=True, **{kind: dtype}, **options
        )
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise UnusableModel(f"{folder} cannot be loaded as {cls.__name__}: {error}") from error
    wrong = {
        key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(wrong.values()):
        shown = "; ".join(f"{len(v)} {k.replace('_', ' ')} ({', '.join(v[:3])})" for k, v in wrong.items() if v)
        raise UnusableModel(f"{folder} does not fit {cls.__name__}: {shown}; config.json and weights disagree")
    if hasattr(model, "register_to_config"):  # diffusers would save the folder's path into every copy's config
        model.register_to_config(_name_or_path="")
    return model.eval().requires_grad_(False)


def class_name(folder: Path, known: Iterable[str]) -> str:
    """The class that a model folder's config.json names; UnusableModel where it is none of `known`."""
    check_weights(folder)
    path = folder / "config.json"
    try:
        name = str(json.loads(path.read_text())["_class_name"])
    except (ValueError, KeyError) as error:
        raise UnusableModel(f"{path} is no config of a diffusers model ({error!r}); copy the whole folder") from None
    if name not in (known := tuple(known)):
        raise UnusableModel(f"{path} names the class {name!r}; expected one of {', '.join(known)}")
    return name


def check_weights(folder: Path) -> None:
    """Raise unless the folder has a config and readable, untruncated safetensors weights."""
    if not folder.is_dir():
        raise UnusableModel(f"{folder} does not exist; a diffusers pipeline folder has it")
    if not (folder / "config.json").is_file():
        raise UnusableModel(f"{folder}/config.json is missing; copy the whole folder")
    files = sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        try:
            shards = set(json.loads(indexes[0].read_text())["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise UnusableModel(f"{indexes[0]} is damaged ({error!r}); download it again") from None
        if lost := sorted(shards - {path.name for path in files}):
            raise UnusableModel(f"{folder} lacks {', '.join(lost)}, which {indexes[0].name} names; download it again")
    if not files:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise UnusableModel(
                f"{folder} has only pickled weights ({', '.join(pickles)}), which can run code when loaded; "
                "convert them to safetensors first"
            )
        raise UnusableModel(f"{folder} has no *.safetensors weight file; download it again")
    for path in files:
        try:
            with safe_open(path, "pt") as stream:
                stream.keys()
        except (SafetensorError, OSError) as error:
            raise UnusableModel(f"{path} is damaged or truncated ({error}); download it again") from error

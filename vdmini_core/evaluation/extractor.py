"""Published feature extractors as TorchScript files, which are read only after their digest was checked."""

import math
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdmini_core.artifacts import file_digest

I3D_CALL = {"rescale": True, "resize": True, "return_features": True}
"""How StyleGAN-V calls i3d_torchscript.pt: pixels of 0..255 are rescaled to -1..1 and resized to 224 x 224 inside, and
the answer is the 400 logits. Its c3d_ucf101.pt has no such arguments: 0..255 in, 101 probabilities out.
"""


class WrongWeights(ValueError):
    """A weight file that is not the one that was asked for, or no TorchScript; the message has both digests."""


@dataclass(frozen=True)
class Extractor:
    """Videos [B, 3, T, H, W] of 0..255 -> features [B, D], in float32 or what finer the file answers in."""

    module: Any
    name: str
    sha256: str
    device: torch.device
    call: dict[str, bool] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """ValueError where the answer is not one finite vector a video."""
        answer = self.module(videos.to(self.device).float(), **self.call)
        shape = tuple(answer.shape) if isinstance(answer, Tensor) else ()
        one_vector_each = len(shape) > 1 and shape[0] == len(videos) and math.prod(shape[1:]) == max(shape[1:])
        if not one_vector_each:
            raise ValueError(
                f"{self.name}: expected features [{len(videos)}, D], a vector a video, got {shape or type(answer)}"
            )
        features: Tensor = answer.flatten(1).to(torch.promote_types(answer.dtype, torch.float32)).cpu()
        if not features.isfinite().all():
            raise ValueError(f"{self.name} answered with NaN or infinity")
        return features


def load_extractor(source: str, sha256: str, cache: Path, device: torch.device | str = "cpu") -> Extractor:
    """Load the TorchScript file at a path or URL whose sha256 is this one; `cache` keeps what was downloaded."""
    path = weight_file(source, sha256, cache)
    try:
        module = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise WrongWeights(f"{path} is no TorchScript file: {' '.join(str(error).split())[:200]}") from None
    arguments = module.forward.schema.arguments[2:]  # after self and the videos
    unknown = [a.name for a in arguments if a.name not in I3D_CALL and not a.has_default_value()]
    if unknown:
        raise WrongWeights(
            f"{path} wants {', '.join(unknown)}; extractors are called with videos and {', '.join(I3D_CALL)}"
        )
    call = {a.name: I3D_CALL[a.name] for a in arguments if a.name in I3D_CALL}
    return Extractor(module, Path(source).name, sha256.lower(), torch.device(device), call)


def weight_file(source: str, sha256: str, cache: Path) -> Path:
    """The local file behind a path or a URL, its digest checked; WrongWeights tells the two apart."""
    wanted = sha256.lower()
    if len(wanted) != 64 or set(wanted) - set("0123456789abcdef"):
        raise WrongWeights(f"{sha256!r} is no sha256; expected 64 hexadecimal digits")
    remote = "://" in source
    path = cache / f"{wanted}.pt" if remote else Path(source).expanduser()
    if remote and not path.is_file():
        _download(source, path, wanted)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path or the URL of a TorchScript file")
    found = file_digest(path)
    if found != wanted:
        raise WrongWeights(f"{path} has the sha256 {found}, not {wanted}; it was not loaded")
    return path


def _download(url: str, path: Path, wanted: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".partial")
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, draft.open("wb") as stream:
            while block := answer.read(1 << 20):
                stream.write(block)
        found = file_digest(draft)
        if found != wanted:
            raise WrongWeights(f"{url} has the sha256 {found}, not {wanted}; it was not kept")
        draft.replace(path)
    except (urllib.error.URLError, TimeoutError) as error:
        raise ValueError(f"{url} cannot be downloaded: {error}") from None
    finally:
        draft.unlink(missing_ok=True)

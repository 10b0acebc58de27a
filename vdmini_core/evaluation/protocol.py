"""The protocol that every result carries: only figures of one protocol may be compared.

Numbers of one model differ by hundreds of FVD points with the frame rate, the crop, the codec or the clip count.
A protocol names all of them; its digest is what two results must have in common.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from vdmini_core.artifacts import Record, file_digest, json_digest
from vdmini_core.settings import DataSettings, EncodeSettings, SamplerSettings


class Sampling(Record):
    """How clips were generated. Seeds and prompts are part of it: teacher and student share them."""

    sampler: str
    steps: int
    guidance: str
    precision: str
    seeds: tuple[int, ...]
    prompts_sha256: str | None = None


class Protocol(Record):
    """How a number was made. None is what does not apply; `details` is what else bears on this measure.

    `clips` is N, of generated ones; `sampling` is None where the clips came without a record of it.
    """

    measure: str
    extractor: str
    extractor_sha256: str | None
    reference: str | None
    clips: int
    frames: int | None
    fps: float | None
    size: int | tuple[int, int] | None
    resize: str
    crop: str
    ddof: int | None
    codec: str
    crf: int | None
    sampling: Sampling | None
    details: dict[str, Any] = Field(default_factory=dict)

    def digest(self) -> str:
        """What two results must have in common."""
        return json_digest(self)


def sampling_protocol(
    settings: SamplerSettings, data: DataSettings, encode: EncodeSettings, evaluator: Path
) -> dict[str, Any]:
    """The protocol of stages that generate from encoded clips and judge by the offline evaluator."""
    protocol = Protocol(
        measure="toy Frechet distances and accuracies, not FVD",
        extractor="vdmini offline evaluator",
        extractor_sha256=file_digest(evaluator / "evaluator.safetensors"),
        reference="held-out clips through the teacher's VAE",
        clips=settings.clips,
        frames=data.frames,
        fps=data.fps,
        size=data.size,
        resize="short side, by area when shrinking, else cubic",
        crop="centre",
        ddof=0,
        codec="none (judged before encoding)",
        crf=None,
        sampling=Sampling(
            sampler="the teacher's own scheduler and noise levels",
            steps=settings.steps,
            guidance="no classifier-free guidance",
            precision=settings.precision,
            seeds=(settings.seed,),
        ),
        details={
            "source": data.source,
            "split": data.split,
            "embedded_guidance": encode.guidance,
            "condition_fps": encode.fps,
            "motion_bucket_id": encode.motion_bucket_id,
            "noise_augmentation": encode.noise_augmentation,
            **settings.model_dump(include={"diversity", "diversity_seeds"}),  # of stage evaluate alone
        },
    )
    return protocol.model_dump(mode="json")


class UnlikeProtocols(ValueError):
    """Two results that must not be compared; the message names what differs, and how to insist."""


class Difference(Record):
    """One number that both results have; `change` is second - first."""

    name: str
    first: float
    second: float
    change: float


class Comparison(Record):
    """Two results side by side; `despite` are the parts of the protocol in which they were allowed to differ."""

    first: str
    second: str
    protocol_digests: tuple[str, str]
    despite: tuple[str, ...]
    numbers: tuple[Difference, ...]


def compare_results(first: Path, second: Path, despite: Sequence[str] = ()) -> Comparison:
    """Put the numbers of two result files side by side.

    UnlikeProtocols where their protocols differ in anything that `despite` does not name. ValueError where a file is
    no result, or its protocol is not the one that its digest was taken of.
    """
    (a, a_protocol), (b, b_protocol) = _read_result(first), _read_result(second)
    differing = sorted(_differing(a_protocol, b_protocol))
    refused = [name for name in differing if not any(name == d or name.startswith(f"{d}.") for d in despite)]
    if refused:
        lines = [f"{name}: {_at(a_protocol, name)!r} and {_at(b_protocol, name)!r}" for name in refused]
        options = " ".join(f"--despite {name}" for name in refused)
        raise UnlikeProtocols(
            f"{first} and {second} were made by different protocols, so their numbers do not compare: "
            f"{'; '.join(lines)}. To compare them all the same, name what may differ: {options}"
        )
    mine, other = dict(_numbers(a)), dict(_numbers(b))
    shared = [name for name in mine if name in other]
    return Comparison(
        first=str(first),
        second=str(second),
        protocol_digests=(a["protocol_digest"], b["protocol_digest"]),
        despite=tuple(differing),
        numbers=tuple(
            Difference(name=name, first=mine[name], second=other[name], change=other[name] - mine[name])
            for name in shared
        ),
    )


def _read_result(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; expected the JSON file of a result") from None
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("protocol"), dict):
        raise ValueError(f"{path} has no protocol, so nothing can be compared with it; expected a result of vdmini")
    protocol: dict[str, Any] = content["protocol"]
    if content.get("protocol_digest") != json_digest(protocol):
        raise ValueError(f"{path}: the protocol is not the one of its protocol_digest; the file was changed by hand")
    return content, protocol


def _differing(a: Any, b: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the parts in which two protocols differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            if key not in a or key not in b:
                yield f"{name}{key}"
            else:
                yield from _differing(a[key], b[key], f"{name}{key}.")
    elif a != b:
        yield name.rstrip(".")


def _at(protocol: Any, name: str) -> Any:
    for key in name.split("."):
        protocol = protocol.get(key) if isinstance(protocol, dict) else None
    return protocol


def _numbers(value: Any, name: str = "") -> Iterable[tuple[str, float]]:
    """Every finite number of a result by dotted name, protocol and provenance left out; list items by their name."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float) and math.isfinite(value):
        yield name, float(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            if name or key not in ("protocol", "provenance"):
                yield from _numbers(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict) and isinstance(item.get("name"), str):
                yield from _numbers(item, f"{name}.{item['name']}")

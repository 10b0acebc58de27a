"""Results of different protocols are not compared, unless what differs is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from vdmini_core.artifacts import json_digest
from vdmini_core.evaluation.protocol import Protocol, Sampling, UnlikeProtocols, compare_results, sampling_protocol
from vdmini_core.models.sources import evaluator_folder
from vdmini_core.settings import DataSettings, EncodeSettings, SamplerSettings

PROTOCOL = Protocol(
    measure="FVD",
    extractor="i3d_torchscript.pt",
    extractor_sha256="ab" * 32,
    reference="UCF101 layout, split 1, train",
    clips=2048,
    frames=16,
    fps=None,
    size=256,
    resize="short side",
    crop="centre",
    ddof=0,
    codec="h264",
    crf=16,
    sampling=Sampling(sampler="own", steps=8, guidance="none", precision="fp32", seeds=(0,)),
    details={"start": "first"},
)


def write(path: Path, fvd: float, **changes: Any) -> Path:
    protocol = PROTOCOL.model_copy(update=changes)
    rows = [{"name": "teacher", "flops": 5}, {"name": "pruned", "flops": 3}]
    content = {"fvd": fvd, "nested": {"low": 1.0, "flag": True, "text": "x"}, "rows": rows, "gallery": [[1, 2]]}
    content |= {"protocol": protocol.model_dump(mode="json"), "protocol_digest": protocol.digest()}
    path.write_text(json.dumps(content | {"provenance": {"seconds": 7}}))
    return path


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return write(tmp_path / "a.json", 100.0)


def test_numbers_of_one_protocol_are_put_side_by_side(first: Path, tmp_path: Path) -> None:
    found = compare_results(first, write(tmp_path / "b.json", 90.0))
    changes = {row.name: (row.first, row.second, row.change) for row in found.numbers}
    assert changes["fvd"] == (100.0, 90.0, -10.0)
    assert set(changes) == {"fvd", "nested.low", "rows.teacher.flops", "rows.pruned.flops"}
    assert found.despite == ()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"extractor_sha256": "cd" * 32}, "extractor_sha256"),
        ({"clips": 256}, "clips"),
        ({"frames": 14}, "frames"),
        ({"fps": 7.0}, "fps"),
        ({"size": 128}, "size"),
        ({"crop": "none"}, "crop"),
        ({"resize": "squash"}, "resize"),
        ({"ddof": 1}, "ddof"),
        ({"codec": "mpeg4"}, "codec"),
        ({"crf": 23}, "crf"),
        ({"details": {"start": "random"}}, "details.start"),
        ({"details": {"start": "first", "more": 1}}, "details.more"),
        ({"sampling": PROTOCOL.sampling.model_copy(update={"steps": 4})}, "sampling.steps"),  # type: ignore[union-attr]
        ({"sampling": PROTOCOL.sampling.model_copy(update={"seeds": (1,)})}, "sampling.seeds"),  # type: ignore[union-attr]
        ({"sampling": None}, "sampling"),
    ],
)
def test_any_difference_is_refused_by_name_and_allowed_by_that_name(
    first: Path, tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    second = write(tmp_path / "b.json", 90.0, **change)
    with pytest.raises(
        UnlikeProtocols, match=rf"different protocols.*{name}: .*name what may differ: --despite {name}"
    ):
        compare_results(first, second)
    assert compare_results(first, second, [name]).despite == (name,)
    other = "measure"
    with pytest.raises(UnlikeProtocols):
        compare_results(first, second, [other])


def test_a_whole_section_may_be_named_and_every_other_difference_still_counts(first: Path, tmp_path: Path) -> None:
    sampling = PROTOCOL.sampling.model_copy(update={"steps": 4, "seeds": (1,)})  # type: ignore[union-attr]
    second = write(tmp_path / "b.json", 90.0, sampling=sampling)
    assert compare_results(first, second, ["sampling"]).despite == ("sampling.seeds", "sampling.steps")
    with pytest.raises(UnlikeProtocols, match="clips: 2048 and 10"):
        compare_results(first, write(tmp_path / "c.json", 90.0, clips=10, sampling=sampling), ["sampling"])


def test_a_protocol_changed_by_hand_is_noticed(first: Path, tmp_path: Path) -> None:
    content = json.loads(first.read_text())
    content["protocol"]["clips"] = 10
    (tmp_path / "b.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"b\.json: the protocol is not the one of its protocol_digest"):
        compare_results(first, tmp_path / "b.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"fvd": 1}', "has no protocol, so nothing can be compared with it"), ("[", "is not whole JSON")],
)
def test_what_is_no_result_is_not_compared(first: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        compare_results(first, tmp_path / "b.json")
    with pytest.raises(FileNotFoundError, match="expected the JSON file of a result"):
        compare_results(first, tmp_path / "none.json")


def test_stages_write_the_same_kind_of_protocol() -> None:
    settings = (SamplerSettings(clips=5, steps=3, seed=2), DataSettings(), EncodeSettings())
    found = sampling_protocol(*settings, evaluator_folder())
    protocol = Protocol.model_validate(found)
    assert protocol.digest() == json_digest(found)
    assert protocol.sampling is not None
    assert (protocol.clips, protocol.sampling.steps, protocol.sampling.seeds) == (5, 3, (2,))
    assert protocol.measure.endswith("not FVD")

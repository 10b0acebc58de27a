"""FVD and inception score of UCF101 in small, against independent computations in memory."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import entropy

from tests.evaluation.ucf_tiny import CLASSES, Classifier, Projection, save_script, write_avi, write_ucf101
from tests.tiny import PROVENANCE
from vdmini_core.data.video import read_clip
from vdmini_core.evaluation.extractor import load_extractor
from vdmini_core.evaluation.metrics.inception import inception_scores
from vdmini_core.evaluation.ucf101 import (
    FVDResult,
    conditioned_orders,
    fvd_result,
    fvd_text,
    generated_videos,
    real_videos,
    subset_distances,
    video_protocol,
)
from vdmini_core.evaluation.video_features import ClipSpec, VideoFeatures, extract_features

SPEC = ClipSpec(frames=16, size=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ucf101(tmp_path_factory.mktemp("ucf"))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    for index in range(20):
        write_avi(folder / f"{index}.avi", seed=(99, index))
    return folder


def result_of(data: Path, generated: Path, cache: Path, count: int = 20, ddof: int = 0) -> FVDResult:
    extractor = load_extractor(*save_script(cache / "i3d.pt", Projection()), cache)
    real, made = real_videos(data, 1, "train"), generated_videos(generated)
    features = [
        extract_features(side.root, side.names[:n], extractor, SPEC, cache, batch_size=3)
        for side, n in ((real, 2 * count), (made, count))
    ]
    protocol = video_protocol("FVD", extractor, SPEC, real, made, ddof)
    return fvd_result(features[0], features[1], count, ddof, protocol, PROVENANCE)


def in_memory(root: Path, names: tuple[str, ...]) -> np.ndarray:
    clips = np.stack([read_clip(root / name, frames=16, fps=None, size=32) for name in names])
    videos = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).contiguous()
    return np.asarray(Projection()(videos, rescale=True, resize=True, return_features=True).numpy())


def distance(a: np.ndarray, b: np.ndarray, ddof: int) -> float:
    """With the matrix square root that reference implementations take."""
    s, t = np.cov(a.T, ddof=ddof), np.cov(b.T, ddof=ddof)
    root = scipy.linalg.sqrtm(s @ t)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t - 2 * np.real(root)))


@pytest.mark.parametrize("ddof", [0, 1])
def test_streaming_fvd_is_that_of_all_clips_in_memory(data: Path, generated: Path, tmp_path: Path, ddof: int) -> None:
    result = result_of(data, generated, tmp_path, ddof=ddof)
    real, made = real_videos(data, 1, "train"), generated_videos(generated)
    a, b = in_memory(real.root, real.names[:20]), in_memory(made.root, made.names[:20])
    assert result.fvd == pytest.approx(distance(a, b, ddof), rel=1e-8)
    assert (result.clips, result.width) == (20, 10)
    assert result.floor is not None
    assert result.floor.clips == 12  # train has 24
    others = in_memory(real.root, real.names)
    assert result.floor.fvd == pytest.approx(distance(others[:12], others[12:24], ddof), rel=1e-6)
    assert result.floor.fvd > 0


def test_the_protocol_names_what_bears_on_the_number(data: Path, generated: Path, tmp_path: Path) -> None:
    result = result_of(data, generated, tmp_path, count=10)
    protocol = result.protocol
    assert (protocol["clips"], protocol["frames"], protocol["size"], protocol["ddof"]) == (10, 16, 32, 0)
    assert protocol["extractor"] == "i3d.pt"
    assert len(protocol["extractor_sha256"]) == 64
    assert (protocol["codec"], protocol["details"]["reference_codec"]) == ("mpeg4", "mpeg4")
    assert protocol["reference"] == "UCF101 layout, split 1, train"
    text = fvd_text(result)
    assert "at N = 10, ddof 0" in text
    assert "real against real" in text
    assert "features of width 10, not I3D's 400: comparable with nothing published" in text
    assert result.protocol_digest != result_of(data, generated, tmp_path, count=9).protocol_digest


def test_corrupt_files_are_counted_and_named(data: Path, generated: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in generated.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "7.avi").write_bytes((generated / "7.avi").read_bytes()[:1000])
    result = result_of(data, broken, tmp_path / "cache")
    assert list(result.skipped["generated"]) == ["7.avi"]
    assert (result.clips, result.skipped["real"]) == (19, {})
    assert "1 generated videos were left out:" in fvd_text(result)
    assert "7.avi" in fvd_text(result)


def test_subsets_are_disjoint_and_give_an_interval() -> None:
    g = np.random.default_rng(0)
    a, b = g.standard_normal((500, 4)), g.standard_normal((500, 4)) + 1
    found = subset_distances(a, b, ddof=0)
    assert found is not None
    assert (found.clips, len(found.values)) == (100, 5)
    assert found.values[1] == pytest.approx(distance(a[100:200], b[100:200], 0), rel=1e-9)
    assert found.low < found.mean < found.high
    assert found.low < 4 < found.high + 1
    assert subset_distances(a[:9], b[:9], ddof=0) is None


def test_the_floor_is_of_as_many_clips_where_there_are(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    real = VideoFeatures(g.standard_normal((50, 3)), ("",) * 50, {})
    made = VideoFeatures(g.standard_normal((20, 3)), ("",) * 20, {})
    extractor = load_extractor(*save_script(tmp_path / "i3d.pt", Projection()), tmp_path)
    (tmp_path / "v").mkdir()
    write_avi(tmp_path / "v" / "0.avi", seed=(0,))
    protocol = video_protocol("FVD", extractor, SPEC, None, generated_videos(tmp_path / "v"), 0)
    result = fvd_result(real, made, 2048, 0, protocol, PROVENANCE)
    assert (result.clips, result.floor and result.floor.clips) == (20, 20)
    assert result.floor is not None
    assert result.floor.fvd == pytest.approx(distance(real.values[:20], real.values[20:40], 0), rel=1e-6)


@pytest.mark.parametrize("split", [1, 2, 3])
def test_the_lists_of_every_split_are_followed(data: Path, split: int) -> None:
    train, test = (set(real_videos(data, split, part).names) for part in ("train", "test"))
    assert (len(train), len(test), train & test) == (24, 12, set())
    assert set(real_videos(data, split, "all").names) == train | test
    assert {name.split("_g")[1][:2] for name in test} == {f"{2 * split - 1:02d}", f"{2 * split:02d}"}


def test_the_order_is_seeded_and_mixes_classes(data: Path) -> None:
    names = real_videos(data, 1, "train").names
    assert names == real_videos(data, 1, "train").names
    assert names != real_videos(data, 1, "train", seed=1).names
    assert {Path(name).parent.name for name in names[:10]} == set(CLASSES)


def test_folders_without_videos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; expected a folder of videos"):
        generated_videos(tmp_path / "none")
    with pytest.raises(ValueError, match="has no videos"):
        generated_videos(tmp_path)


def test_every_real_video_orders_one_from_its_first_frame(data: Path) -> None:
    orders = conditioned_orders(data, 1, "test", None, seed=0)
    assert len(orders) == len({order.name for order in orders}) == len({order.seed for order in orders}) == 12
    assert all(order.source is not None and order.source.is_file() for order in orders)
    assert {order.prompt for order in orders} == {"apply eye makeup", "baby crawling", "yo yo"}
    assert conditioned_orders(data, 1, "test", 5, seed=0) == orders[:5]


def test_the_inception_score_is_the_exponential_of_the_mean_divergence() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(7), 60)
    scores = inception_scores(p, splits=3)
    expected = [np.exp(np.mean([entropy(row, part.mean(0)) for row in part])) for part in np.split(p, 3)]
    assert scores == pytest.approx(expected, rel=1e-12)
    sure = np.eye(5)[np.arange(50) % 5]
    assert inception_scores(sure, splits=2) == pytest.approx([5, 5])
    assert inception_scores(np.full((20, 4), 0.25), splits=10) == pytest.approx([1] * 10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((40, 3)), "rows sum to 1"),
        (np.full((40, 2), [1.5, -0.5]), "rows sum to 1"),
        (np.full((19, 2), 0.5), "10 parts of at least two clips need 20 clips, got 19"),
    ],
)
def test_what_is_no_distribution_has_no_inception_score(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inception_scores(values)


def test_a_classifier_of_videos_scores_them(generated: Path, tmp_path: Path) -> None:
    extractor = load_extractor(*save_script(tmp_path / "c3d.pt", Classifier()), tmp_path)
    names = generated_videos(generated).names
    found = extract_features(generated, names, extractor, SPEC, tmp_path)
    assert min(inception_scores(found.values, splits=10)) >= 1

"""The report page and the sensitivity plot, made from small records and tiny clips."""

import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from vdmini_core.artifacts import (
    Cost,
    CostTable,
    Estimate,
    EvaluationReport,
    EvaluationRow,
    Latency,
    Plan,
    Provenance,
    Quality,
    SensitivityReport,
    UnitScore,
)
from vdmini_core.data.video import write_video
from vdmini_core.evaluation.report import verdict, write_report
from vdmini_core.evaluation.report_rows import measures_table, waterfall
from vdmini_core.evaluation.sensitivity_plots import depth_figure, plot_depth, plot_sensitivity

PROVENANCE = Provenance(
    commit="0123456789abcdef",
    dirty=False,
    params={"evaluate": {"clips": 128}},
    params_digest="aa11",
    inputs={"plan.json": "bb22"},
    software={"torch": "2.13.0"},
    machine="two <cores>",
    created="2025-11-21T09:00:00+00:00",
)
UNITS = ("D.0.0", "D.0.1", "D.1.0", "D.1.1", "M", "U.0.0", "U.0.1", "U.1.0", "U.1.1")
BLOCKS = ("D.0", "D.1", "M", "U.0", "U.1")
REMOVED = ("D.0.1", "M", "U.0.1")
DEPTHS = {"D.0": 0, "D.1": 1, "M": 2, "U.0": 1, "U.1": 0}
VIDEOS = ("real", "teacher", "pruned", "recovered")
RECOVERY = {"content_accuracy": 0.857, "motion_accuracy": 0.754, "content_distance": 0.905, "motion_distance": -0.125}
Gallery = tuple[dict[str, str], ...]
TRAINING = [{"step": float(s), "train/student/total": 1 / (s + 1), "train/student/task": 0.5} for s in range(40)]


def quality(content: float | None, motion: float | None, far: tuple[float, float], clips: int = 128) -> Quality:
    return Quality(
        clips=clips, content_accuracy=content, motion_accuracy=motion, content_distance=far[0], motion_distance=far[1]
    )


def row(name: str, parameters: int, median_ms: float, judged: Quality) -> EvaluationRow:
    return EvaluationRow(
        name=name,
        parameters=parameters,
        flops=parameters * 1000,
        latency=Latency(median_ms=median_ms, p10_ms=median_ms - 1.5, p90_ms=median_ms + 2.25, runs=30),
        peak_memory_bytes=parameters * 64,
        quality=judged,
    )


def make_evaluation(gallery: Gallery = (), *, labelled: bool = True) -> EvaluationReport:
    def judged(content: float, motion: float, distances: tuple[float, float]) -> Quality:
        return quality(content if labelled else None, motion if labelled else None, distances)

    return EvaluationReport(
        protocol={"steps": 8, "seed": 0},
        protocol_digest="cc33",
        rows=(
            row("teacher", 4_321_000, 41.25, judged(0.969, 0.914, (0.1234, 0.2345))),
            row("pruned", 3_210_000, 31.75, judged(0.422, 0.313, (2.468, 3.579))),
            row("recovered", 3_210_000, 31.5, judged(0.891, 0.766, (0.3456, 0.4567))),
        ),
        floor=judged(0.992, 0.977, (0.0321, 0.0432)),
        parameter_reduction=0.257,
        flop_ratio=0.743,
        latency_ratio=0.764,
        recovery={name: share if labelled or "distance" in name else None for name, share in RECOVERY.items()},
        gallery=gallery,
        provenance=PROVENANCE,
    )


def make_sensitivity(*, labelled: bool = True, gates: dict[str, bool] | None = None) -> SensitivityReport:
    def score(name: str, kind: str, index: int) -> UnitScore:
        content, motion = (0.9 - 0.05 * index, 0.8 - 0.04 * index) if labelled else (None, None)
        return UnitScore(
            name=name,
            kind=kind,
            depth=DEPTHS[name if name in DEPTHS else name.rpartition(".")[0]],
            parameters=100_000 * (index + 1),
            flops=1_000_000 * (index + 1),
            latency_ms=1.5 + index / 4,
            quality=quality(content, motion, (0.2 + index / 10, 0.3 + index / 5), 24),
            content=Estimate(value=0.01 * index, low=0.008 * index, high=0.013 * index),
            motion=Estimate(value=0.1, low=0.05, high=0.2 + index),
            criteria={"magnitude": float(index)},
        )

    content, motion = (0.958, 0.917) if labelled else (None, None)
    return SensitivityReport(
        protocol={"clips": 24},
        protocol_digest="dd44",
        teacher=quality(content, motion, (0.15, 0.25), 64),
        baseline=quality(content, motion, (0.15, 0.25), 24),
        floor=quality(content, motion, (0.05, 0.06), 24),
        scores=(
            *(score(n, "block", i) for i, n in enumerate(BLOCKS)),
            *(score(n, "pair", i) for i, n in enumerate(UNITS)),
        ),
        teacher_gates={"content": True, "motion": True} if gates is None else gates,
        costs=CostTable(whole=Cost(parameters=4_321_000, flops=4_321_000_000, latency_ms=41.25), parts={}),
        provenance=PROVENANCE,
    )


def make_plan() -> Plan:
    return Plan(
        method="paper",
        removed=REMOVED,
        kept=tuple(unit for unit in UNITS if unit not in REMOVED),
        teacher_parameters=4_321_000,
        student_parameters=3_210_000,
        teacher_flops=4_321_000_000,
        student_flops=3_210_000_000,
        report_digest="ee55",
        teacher_digest="ff66",
        provenance=PROVENANCE,
    )


def make_gallery(folder: Path, caption: str = "red circle, left") -> Gallery:
    """One clip in every column: a first frame and four tiny videos of a moving square."""
    clip = np.full((8, 64, 64, 3), 40, np.uint8)
    for frame in range(8):
        clip[frame, 24:40, 4 + 6 * frame : 20 + 6 * frame] = (230, 40, 40)
    (folder / "0").mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / "0/first.png"), clip[0, :, :, ::-1])
    for name in VIDEOS:
        write_video(folder / f"0/{name}.mp4", clip, fps=7, codec="libx264", crf=18)
    return ({"first frame": "0/first.png", **{name: f"0/{name}.mp4" for name in VIDEOS}, "caption": caption},)


def page_of(
    folder: Path,
    caption: str = "red circle, left",
    *,
    labelled: bool = True,
    gates: dict[str, bool] | None = None,
    training: list[dict[str, float]] | None = TRAINING,
) -> str:
    evaluation = make_evaluation(make_gallery(folder / "clips", caption), labelled=labelled)
    sensitivity = make_sensitivity(labelled=labelled, gates=gates)
    write_report(folder / "report.html", evaluation, sensitivity, make_plan(), folder / "clips", training)
    return (folder / "report.html").read_text("utf-8")


class Elements(HTMLParser):
    """Collects every element with its attributes, and which elements were left open or closed twice."""

    VOID = ("meta", "link", "img", "input", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, f"</{tag}> closes nothing"


def test_the_report_is_one_file_that_asks_for_nothing_outside_itself(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "report.html"]
    assert not re.search(r"https?://|@import|\bfetch\(|XMLHttpRequest", page)
    for tag, attributes in Elements(page).found:
        for key in ("src", "href", "srcset", "poster", "action", "data", "xlink:href"):
            reference = attributes.get(key) or "data:"
            assert reference.startswith(("data:", "#")), f"<{tag} {key}={reference[:60]}>"
    assert all(address.startswith("#") for address in re.findall(r"url\(['\"]?([^)]*)", page))


def test_the_page_is_well_formed_and_its_ids_are_unique(tmp_path: Path) -> None:
    elements = Elements(page_of(tmp_path))
    assert elements.stack == []
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(attributes.get("scope") for tag, attributes in elements.found if tag == "th")
    assert all(attributes.get("alt") for tag, attributes in elements.found if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in elements.found if tag in ("video", "svg"))


def test_every_row_and_number_is_shown_under_its_own_name(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    for name in ("teacher", "pruned", "recovered", "real versus real"):
        assert f'role="rowheader">{name}<' in page
    numbers = "4.321 M, 3.21 M, 4.321 G, 3.21 G, 41.25 ms, [39.75–43.5], 31.75 ms, [30.25–34], 31.5 ms, [30–33.75]"
    numbers += ", 263.7 MiB, 195.9 MiB, >128<, 96.9%, 91.4%, 42.2%, 31.3%, 89.1%, 76.6%, 99.2%, 97.7%"
    numbers += ", >0.1234<, >0.2345<, >2.468<, >3.579<, >0.3456<, >0.4567<, >0.0321<, >0.0432<, >86%<, >75%<, >−12%<"
    for number in numbers.split(", "):
        assert number in page, number
    assert "oy Frechet distance (own evaluator)" in page
    assert "compares with nothing\npublished" in page
    assert "FVD" not in re.sub(r'src="data:[^"]*"', "", page)


def test_every_clip_is_embedded_whole(tmp_path: Path) -> None:
    found = Elements(page_of(tmp_path)).found
    videos = [attributes for tag, attributes in found if tag == "video" and "src" in attributes]
    assert [video["aria-label"] for video in videos] == [f"{name}, Clip 1: red circle, left" for name in VIDEOS]
    for video in videos:
        assert {"muted", "loop", "playsinline"} <= set(video)
        assert str(video["src"]).startswith("data:video/mp4;base64,")
    assert any(tag == "img" and str(attributes["src"]).startswith("data:image/png") for tag, attributes in found)


def test_text_is_escaped(tmp_path: Path) -> None:
    page = page_of(tmp_path, caption='<script>alert("x")</script> $title')
    assert "<script>alert" not in page
    assert page.count("<script") == 1
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; $title" in page
    assert "two &lt;cores&gt;" in page


def test_unknown_accuracies_are_shown_as_not_available(tmp_path: Path) -> None:
    page = page_of(tmp_path, labelled=False)
    cells = re.findall(r'data-label="(?:Content|Motion) accuracy" class=""><span>([^<]*)<', page)
    assert cells == ["n/a"] * 8
    assert "None" not in re.sub(r'src="data:[^"]*"', "", page)
    assert "n/a in content accuracy (no measured gap)" in page


def test_a_missing_clip_is_named(tmp_path: Path) -> None:
    gallery = make_gallery(tmp_path)
    (tmp_path / "0/pruned.mp4").unlink()
    target = tmp_path / "report.html"
    with pytest.raises(FileNotFoundError, match=r"0/pruned\.mp4"):
        write_report(target, make_evaluation(gallery), make_sensitivity(), make_plan(), tmp_path, None)
    assert not target.exists()


def test_a_missing_row_is_named(tmp_path: Path) -> None:
    short = make_evaluation().model_copy(update={"rows": make_evaluation().rows[:2]})
    with pytest.raises(ValueError, match="teacher, pruned; expected teacher, pruned, recovered"):
        write_report(tmp_path / "report.html", short, make_sensitivity(), make_plan(), tmp_path, None)


def test_the_verdict_says_what_the_rows_say_and_no_more() -> None:
    evaluation = make_evaluation()
    sentence = verdict(evaluation)
    assert "25.7% fewer parameters than the teacher" in sentence
    assert "0.76 times the teacher's median latency, and" in sentence
    assert "closed 86% in content accuracy" in sentence
    assert "none in motion toy Frechet distance (the gap widened by 12%)" in sentence
    slow = evaluation.rows[2].model_copy(update={"latency": evaluation.rows[0].latency})
    sentence = verdict(evaluation.model_copy(update={"rows": (*evaluation.rows[:2], slow)}))
    assert "ranges overlap, so no difference in speed is shown" in sentence


def test_a_failed_teacher_gate_is_said_plainly(tmp_path: Path) -> None:
    page = page_of(tmp_path, gates={"content": True, "motion": False})
    assert "teacher inadequate for conclusions about blocks</strong>: failed: motion." in page
    assert "teacher inadequate" not in page_of(tmp_path)


def test_removed_units_are_struck_out_in_graph_order(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert re.findall(r'<del class="pair"><span class="hidden">removed: </span>([^<]*)<', page) == list(REMOVED)
    drawing = page[page.index('<ul class="plan">') : page.index('id="sensitivity"')]
    assert tuple(re.findall(r"<strong>([^<]*)<", drawing)) == BLOCKS
    assert tuple(re.findall(r">([DU]\.\d\.\d|M)</(?:del|span)>", drawing)) == UNITS


def test_training_curves_are_left_out_where_there_are_none(tmp_path: Path) -> None:
    assert "Recovery training" not in page_of(tmp_path, training=[])
    assert "Recovery training" not in page_of(tmp_path, training=None)
    page = page_of(tmp_path)
    assert "Student: task loss" in page
    assert "Discriminator" not in page


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_sensitivity_plot_is_written_and_repeats_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / "plots" / f"sensitivity.{suffix}"
    plot_sensitivity(make_sensitivity(), target, REMOVED)
    drawn = target.read_bytes()
    assert len(drawn) > 10_000
    assert list(target.parent.iterdir()) == [target]
    plot_sensitivity(make_sensitivity(), target, REMOVED)
    assert target.read_bytes() == drawn
    if suffix == "svg":
        assert "1 - cosine to the teacher's clip" in drawn.decode()
        assert all(f">{name}<" in drawn.decode() for name in (*BLOCKS, *UNITS))


def test_a_plot_format_that_is_not_offered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"written as one of \.png, \.svg"):
        plot_sensitivity(make_sensitivity(), tmp_path / "sensitivity.gif")


def test_the_depth_plot_has_every_single_unit_once_in_both_panels(tmp_path: Path) -> None:
    report = make_sensitivity()
    left, right = depth_figure(report).axes
    markers = [line for line in left.lines if line.get_linestyle() == "None"]
    assert [len(line.get_xdata()) for line in markers] == [len(UNITS), len(UNITS)]
    (points,) = (line for line in right.lines if line.get_marker() == "D")
    single = {s.name: s.motion.value / (s.content.value + s.motion.value) for s in report.scores if s.name in UNITS}
    assert sorted(points.get_ydata()) == pytest.approx(sorted(single.values()))
    plot_depth(report, tmp_path / "depth.svg")
    assert "depth (0: outermost)" in (tmp_path / "depth.svg").read_text()


def test_time_and_further_measures_are_shown_only_where_they_were_taken() -> None:
    rows = {row.name: row for row in make_evaluation().rows}
    assert waterfall(rows) == measures_table(rows) == ""

    def timed(runs: int) -> str:
        def stages(denoiser_ms: float) -> dict[str, Latency]:
            parts = {"denoiser": denoiser_ms, "vae_decode": 100.0, "end_to_end": denoiser_ms + 100}
            return {name: Latency(median_ms=ms, p10_ms=ms, p90_ms=ms, runs=runs) for name, ms in parts.items()}

        return waterfall({name: rows[name].model_copy(update={"stages": stages(100 * len(name))}) for name in rows})

    assert "takes 1.25 times as long" in timed(30)  # (900 + 100) / (700 + 100)
    assert "times as long" not in timed(29)
    assert "--from: 0.7000; --share: 0.1000" in timed(29)  # the teacher's decoder, of the longest row's 1000 ms


def test_alarms_and_intervals_of_every_row_are_said(tmp_path: Path) -> None:
    evaluation = make_evaluation()
    found = {"content_accuracy": Estimate(value=0.891, low=0.83, high=0.94), "psnr": Estimate(value=9, low=8, high=11)}
    row = evaluation.rows[2].model_copy(update={"intervals": found, "alarms": {"flicker": "clips <flicker>"}})
    evaluation = evaluation.model_copy(update={"rows": (*evaluation.rows[:2], row)})
    write_report(tmp_path / "report.html", evaluation, make_sensitivity(), make_plan(), tmp_path, None)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<strong>recovered</strong>: clips &lt;flicker&gt;." in page
    assert "89.1% <small>[83.0–94.0%]</small>" in page
    assert '<th scope="row">PSNR, dB (higher is closer)</th><td>9 <small>[8–11]</small></td>' in page

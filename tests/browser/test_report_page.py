"""The report page in a real browser: playback, blind votes, accessibility, and nothing asked for from outside."""

import csv
import io
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.stats import binomtest

from tests.evaluation.test_report import make_evaluation, make_plan, make_sensitivity
from vdmini_core.artifacts import Estimate, EvaluationReport, Latency
from vdmini_core.data.video import write_video
from vdmini_core.evaluation.report import write_report

try:
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import Browser, Page, sync_playwright
except ImportError:
    pytest.skip("needs the optional packages: pip install vdmini[browser]", allow_module_level=True)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on PATH, such as Debian's package chromium")

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
COLOURS = {"real": (90, 90, 240), "teacher": (230, 40, 40), "pruned": (230, 200, 40), "recovered": (40, 210, 40)}
CLIPS, FRAMES, FPS = 5, 8, 8
TRICKY = 'a "red" circle, left; <b>bold</b> & 100%'
SERIOUS = ("serious", "critical")


def gallery(folder: Path) -> tuple[dict[str, str], ...]:
    """Clips of a square that moves 6 pixels a frame from x = 4 on; its colour tells the model."""
    entries = []
    for index in range(CLIPS):
        entry = {"first frame": f"first-{index}.png"}
        for model, colour in COLOURS.items():
            clip = np.full((FRAMES, 64, 64, 3), 40, np.uint8)
            for frame in range(FRAMES):
                clip[frame, 24:40, 4 + 6 * frame : 20 + 6 * frame] = colour
            entry[model] = f"{model}-{index}.mp4"
            write_video(folder / entry[model], clip, fps=FPS, codec="libx264", crf=12)
        cv2.imwrite(str(folder / f"first-{index}.png"), clip[0])
        entries.append({**entry, "caption": TRICKY if index == 0 else f"prompt {index}"})
    return tuple(entries)


def evaluation(clips: Path) -> EvaluationReport:
    """An evaluation in which every optional thing is there: intervals, paired measures, stages."""

    def around(value: float) -> Estimate:
        return Estimate(value=value, low=value - 0.03, high=value + 0.03)

    report = make_evaluation(gallery(clips))
    rows = []
    for row in report.rows:
        accuracies = {name: getattr(row.quality, name) for name in ("content_accuracy", "motion_accuracy")}
        intervals = {name: around(value) for name, value in accuracies.items()}
        if row.name != "teacher":
            intervals |= {
                "psnr": around(21.5),
                "flow_error": around(0.61),
                "motion_recall": around(0.7),
                "new_one": around(3),
            }
        alarms = {"slow_motion": "its clips move 0.62 times as much"} if row.name == "pruned" else {}
        parts = {
            "encoder": 12.0,
            "denoiser": 8 * row.latency.median_ms,
            "vae_decode": 55.0,
            "end_to_end": 71 + 8 * row.latency.median_ms,
        }
        stages = {name: Latency(median_ms=ms, p10_ms=ms - 1, p90_ms=ms + 1, runs=30) for name, ms in parts.items()}
        rows.append(row.model_copy(update={"intervals": intervals, "stages": stages, "alarms": alarms}))
    return report.model_copy(update={"rows": tuple(rows)})


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "clips").mkdir()
    training = [{"step": float(s), "train/student/total": 1 / (s + 1)} for s in range(40)]
    gates = {"content": True, "motion": False}
    write_report(
        folder / "report.html",
        evaluation(folder / "clips"),
        make_sensitivity(gates=gates),
        make_plan(),
        folder / "clips",
        training,
    )
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


ALL = "[...document.querySelectorAll('#gallery video')]"
FIRST_ROW = "[...document.querySelector('#gallery .clip').querySelectorAll('video')]"
BLIND = "[document.getElementById('left'), document.getElementById('right')]"
# Of a video, the number of the frame on the screen: the square's centre is at 11.5 + 6 x frame.
FRAME_OF = """(video) => {
  const canvas = new OffscreenCanvas(64, 64), brush = canvas.getContext("2d", { willReadFrequently: true });
  brush.drawImage(video, 0, 0, 64, 64);
  const row = brush.getImageData(0, 32, 64, 1).data;
  let sum = 0, count = 0;
  for (let x = 0; x < 64; x++) if (Math.max(row[4 * x], row[4 * x + 1], row[4 * x + 2]) > 130) { sum += x; count += 1; }
  return Math.round((sum / count - 11.5) / 6);
}"""


def wait_until(page: Page, condition: str, seconds: float = 20) -> None:
    """Wait for an expression; the page's own policy forbids `wait_for_function`, which evaluates inside of it."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"not true within {seconds} s: {condition}"
        page.wait_for_timeout(30)


def wait_for_frame(page: Page, frame: int, videos: str = ALL) -> None:
    wait_until(page, f"{videos}.every((video) => !video.seeking && ({FRAME_OF})(video) === {frame})")


@contextmanager
def opened(browser: Browser, report: Path, **surroundings: Any) -> Iterator[Page]:
    """The page from its file, without a network; afterwards nothing may have been asked for or complained about."""
    options = {"viewport": {"width": 1280, "height": 900}, **surroundings}
    context = browser.new_context(offline=True, accept_downloads=True, **options)
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    wait_until(page, f"{ALL}.every((video) => video.readyState >= 2)")
    yield page
    context.close()
    assert complaints == []
    outside = [url for url in requests if not url.startswith(("data:", "blob:")) and url != report.as_uri()]
    assert outside == []


def test_clips_play_within_one_frame_of_each_other(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        page.locator("#clips").scroll_into_view_if_needed()
        page.locator("#gallery .clip").first.scroll_into_view_if_needed()
        wait_until(page, "document.getElementById('position').value === '3'")
        samples = page.evaluate(
            f"""async () => {{
              const frameOf = {FRAME_OF}, videos = {FIRST_ROW}, samples = [], start = performance.now();
              while (performance.now() - start < 2500) {{
                await new Promise(requestAnimationFrame);
                samples.push(videos.map(frameOf));
              }}
              return samples;
            }}"""
        )
        page.locator("#play").click()
        assert page.locator("#play").inner_text() == "Play"
        shown = int(page.locator("#position").input_value())
        wait_for_frame(page, shown, FIRST_ROW)
    assert len(samples) > 20
    assert {frame for sample in samples for frame in sample} == set(range(FRAMES))  # it moves, to the end and again
    # Where the clip begins again, one video may be there a moment before another.
    apart = [min((a - b) % FRAMES, (b - a) % FRAMES) for sample in samples for a in sample for b in sample]
    assert max(apart) <= 1


def test_scrubbing_and_keys_set_all_clips_to_the_same_frame(browser: Browser, report: Path) -> None:
    with opened(browser, report, reduced_motion="reduce") as page:
        for frame in (5, 0, FRAMES - 1):
            page.locator("#position").fill(str(frame))
            wait_for_frame(page, frame)
            assert page.locator("#clock").inner_text() == f"{frame + 1} of {FRAMES}"
        page.locator("#position").press("ArrowLeft")
        wait_for_frame(page, FRAMES - 2)
        page.locator("#play").focus()
        for key, frame in (("ArrowRight", FRAMES - 1), ("ArrowRight", 0), ("ArrowLeft", FRAMES - 1)):
            page.keyboard.press(key)
            wait_for_frame(page, frame)
        page.keyboard.press(" ")
        assert page.locator("#play").inner_text() == "Pause"


def test_nothing_moves_by_itself_where_less_motion_is_wanted(browser: Browser, report: Path) -> None:
    with opened(browser, report, reduced_motion="reduce") as page:
        page.locator("#gallery .clip").first.scroll_into_view_if_needed()
        page.wait_for_timeout(400)
        wait_for_frame(page, 0)
        page.locator("#lottery button").click()
        page.wait_for_timeout(400)
        wait_for_frame(page, 0, BLIND)


def vote_all(page: Page, seed: int, keys: str) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    """Vote with the keyboard alone (L, R or D a trial); the CSV's rows, and the models seen left and right."""
    page.locator("#seed").fill(str(seed))
    page.locator("#seed").press("Enter")
    seen = []
    for number, key in enumerate(keys, 1):
        progress = page.locator("#progress").inner_text()
        assert progress.startswith(f"{number} of {CLIPS} · Clip ")
        assert progress.endswith(f"seed {seed}")
        assert page.locator("#gallery").is_hidden()
        seen.append(
            page.evaluate(
                """() => ["left", "right"].map((id) => [...document.querySelectorAll("#gallery video")]
                     .find((video) => video.src === document.getElementById(id).src).dataset.model)"""
            )
        )
        # How the blind clips are marked must not tell who is who.
        assert not page.evaluate("/teacher|recovered|student/.test(byId('booth').innerText + byId('left').ariaLabel)")
        page.keyboard.press({"L": "ArrowLeft", "R": "ArrowRight", "D": "ArrowDown"}[key])
    if len(keys) < CLIPS:
        page.locator("#end").click()
    assert page.locator("#booth").is_hidden()
    assert page.locator("#gallery").is_visible()
    with page.expect_download() as waiting:
        page.locator("#export").click()
    assert waiting.value.suggested_filename == f"votes-seed-{seed}.csv"
    text = Path(waiting.value.path()).read_bytes().decode()
    return list(csv.DictReader(io.StringIO(text, newline=""))), [tuple(pair) for pair in seen]


def test_votes_are_exported_as_they_were_given(browser: Browser, report: Path) -> None:
    keys = "LRDLR"
    with opened(browser, report) as page:
        rows, seen = vote_all(page, 7, keys)
        outcome = page.locator("#outcome").inner_text()
        again, _ = vote_all(page, 7, keys)
        orders = {tuple(row["left"] for row in vote_all(page, seed, keys)[0]) for seed in range(4)}
    assert rows == again
    assert len(orders) > 1
    captions = {"1": TRICKY, **{str(index + 1): f"prompt {index}" for index in range(1, CLIPS)}}
    assert sorted(row["clip"] for row in rows) == sorted(captions)
    for number, (row, key, (left, right)) in enumerate(zip(rows, keys, seen, strict=True), 1):
        assert {left, right} == {"teacher", "recovered"}
        preferred = {"L": left, "R": right, "D": "tie"}[key]
        assert row == {
            "seed": "7",
            "trial": str(number),
            "clip": row["clip"],
            "caption": f"Clip {row['clip']}: {captions[row['clip']]}",
            "left": left,
            "right": right,
            "vote": {"L": "left", "R": "right", "D": "tie"}[key],
            "preferred": preferred,
            "protocol": "cc33",
        }
    wins = sum(row["preferred"] == "recovered" for row in rows)
    interval = binomtest(wins, 4).proportion_ci(method="wilson")
    assert f"in {wins} of 4 decided votes: {25 * wins:.1f}%, 95% Wilson interval " in outcome
    assert f"{100 * interval.low:.1f}–{100 * interval.high:.1f}%. Ties, left out: 1." in outcome


def test_a_vote_can_end_early_and_without_a_winner(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        rows, _ = vote_all(page, 3, "DD")
        assert [row["preferred"] for row in rows] == ["tie", "tie"]
        assert "No vote was decided" in page.locator("#outcome").inner_text()


def test_the_pages_wilson_interval_is_scipys(browser: Browser, report: Path) -> None:
    cases = [(wins, trials) for trials in (1, 2, 7, 40, 500) for wins in (0, trials // 3, trials)]
    with opened(browser, report) as page:
        found = page.evaluate("(cases) => cases.map(([wins, trials]) => wilson(wins, trials))", cases)
        assert page.evaluate("wilson(0, 0)") == [0, 1]
    for (wins, trials), ours in zip(cases, found, strict=True):
        interval = binomtest(wins, trials).proportion_ci(confidence_level=0.95, method="wilson")
        assert ours == pytest.approx([interval.low, interval.high], abs=1e-12)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_no_serious_problem(browser: Browser, report: Path, scheme: Any, width: int) -> None:
    size = {"width": width, "height": 800}
    with opened(browser, report, color_scheme=scheme, viewport=size, reduced_motion="reduce") as page:
        for closed in page.locator("details").all():
            closed.evaluate("(details) => { details.open = true; }")
        before = Axe().run(page).response["violations"]
        page.locator("#lottery button").click()
        during = Axe().run(page).response["violations"]
    serious = [(found["id"], found["nodes"]) for found in before + during if found["impact"] in SERIOUS]
    assert serious == []


def test_a_phone_shows_the_page_without_scrolling_sideways(browser: Browser, report: Path) -> None:
    with opened(browser, report, viewport={"width": 360, "height": 740}, reduced_motion="reduce") as page:
        for closed in page.locator("details").all():
            closed.evaluate("(details) => { details.open = true; }")
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(overflow) == 0
        page.locator("#lottery button").click()
        assert page.evaluate(overflow) == 0
        assert page.locator("#left").bounding_box()["width"] > 120  # type: ignore[index]


def test_light_and_dark_differ_and_intervals_are_shown(browser: Browser, report: Path) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        with opened(browser, report, color_scheme=scheme, reduced_motion="reduce") as page:
            colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            text = page.locator("#results").locator("..").inner_text()
            for shown in ("96.9% [93.9–99.9%]", "76.6% [73.6–79.6%]", "21.5 [21.47–21.53]"):
                assert shown in " ".join(text.split()), shown
            bars = page.locator(".waterfall .bar").count()
            assert bars == 8
    assert len(colours) == 2

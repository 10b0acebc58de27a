"""Making a registered model again: in a real git and DVC project of three quick stages, and once with the real ones."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from flows.cli import app
from flows.processes import StageFailed
from flows.reproduce import compare, reproduce
from tasks._lineage import Lineage, Results, lineage_here, lineage_of, lineage_tags
from tasks._registry import register_model
from tasks._stage import STAGES, Context, changed_files, provenance, run_tags
from tasks._tracking import open_tracker
from tests.tasks.test_stages import PARAMS
from vdmini_core.artifacts import folder_digest
from vdmini_core.settings import load_params

ROOT = Path(__file__).parents[2]
DVC = """
stages:
  data:
    cmd: python quick.py data
    deps: [quick.py]
    params: [data]
    outs: [artifacts/data]
  distill:
    cmd: python quick.py distill
    deps: [quick.py, loss.txt, artifacts/data]
    params: [distill]
    outs: [artifacts/distill, artifacts/plan, artifacts/evaluate]
  register:
    cmd: python quick.py register
    deps: [quick.py, artifacts/distill]
    params: [register]
    outs: [artifacts/register]
"""
# Data that no run draws twice, and weights that depend on data, code, settings and the number of threads.
QUICK = """
import json, os, pathlib, sys

def write(path, text):
    path = pathlib.Path("artifacts", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

def read(path):
    return pathlib.Path(path).read_text()

if sys.argv[1] == "data":
    write("data/manifest.json", json.dumps({"digest": os.urandom(8).hex(), "clips": [1, 2]}))
if sys.argv[1] == "distill":
    if os.environ.get("QUICK_FAILS"):
        sys.exit("told to fail")
    threads = os.environ["OMP_NUM_THREADS"]
    write("distill/weights", "|".join([read("artifacts/data/manifest.json"), read("loss.txt"), threads]))
    write("distill/made.txt", os.urandom(8).hex())
    write("plan/plan.json", json.dumps({"method": "paper", "removed": ["M"]}))
    write("evaluate/metrics.json", json.dumps({"quality/content": 0.5 + int(threads) / 100, "speed/latency_ms": 9.0}))
if sys.argv[1] == "register":
    write("register/model/weights", read("artifacts/distill/weights"))
"""
URI = "models:/quick@champion"


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    try:
        yield
    finally:
        os.chdir(before)
        del os.environ["MLFLOW_TRACKING_URI"]


def dvc(folder: Path, *words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    subprocess.run([sys.executable, "-m", "dvc", *words], cwd=folder, check=True, env=environment)


def register(folder: Path, name: str) -> None:
    """What stages do around their results: runs with tags, and a version with its lineage."""
    params, cpu = load_params(folder / "params.yaml"), torch.device("cpu")
    for stage in ("data", "distill"):
        with open_tracker(stage, {}, folder / ".scratch/tracking" / stage) as tracker:
            tags = run_tags(provenance({}, cpu, {}), folder_digest(folder / "artifacts" / stage))
            tracker.tags({**tags, "vdmini.threads": "3"})
    with open_tracker("register", {}, folder / ".scratch/tracking/register") as tracker:
        context = Context("register", params, tracker, cpu)
        lineage = lineage_here(context, context.provenance())
        metrics = {"quality/content": 0.53, "speed/latency_ms": 5.0}
        register_model(
            name, "champion", folder / "artifacts/register/model", lineage_tags(lineage), metrics, tracker.run_id
        )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose model `quick` was made with three threads from a commit, and whose params.yaml is not in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name, text in {"dvc.yaml": DVC, "quick.py": QUICK, "loss.txt": "mca", ".gitignore": "/.scratch/\n"}.items():
        (folder / name).write_text(text)
    (folder / "params.yaml").write_text("distill: {loop: {max_steps: 1, batch_size: 1}}\n")
    git(folder, "init", "--quiet")
    dvc(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "start")
    (folder / "params.yaml").write_text(
        "data: {}\ndistill: {loop: {max_steps: 2, batch_size: 1}}\nregister: {}  # mine\n"
    )
    with inside(folder):
        dvc(folder, "repro", "--quiet")
        register(folder, "quick")
    return folder


@pytest.fixture
def here(checkout: Path) -> Iterator[Path]:
    with inside(checkout):
        yield checkout


def test_a_version_leads_to_commit_settings_digests_and_runs(here: Path) -> None:
    found = lineage_of(URI)
    assert found.commit == git(here, "rev-parse", "HEAD").strip()
    assert found.changed == ()
    assert found.params == (here / "params.yaml").read_text()
    assert found.dvc_lock == (here / "dvc.lock").read_text()
    assert found.results.data_digest == json.loads((here / "artifacts/data/manifest.json").read_text())["digest"]
    assert found.results.removed == ("M",)
    assert found.results.model_digest == folder_digest(here / "artifacts/register/model")
    assert found.stages is not None
    assert set(found.stages) == set(STAGES)
    assert found.stages["distill"].threads == 3
    assert len(found.stages["distill"].run_id or "") == 32
    assert found.stages["encode"].run_id is None
    assert {"results.teacher", "stages.encode.run_id"} <= set(found.missing())
    text = CliRunner().invoke(app, ["lineage", URI]).stdout
    for fact in (found.commit, "# mine", found.results.model_digest, found.stages["distill"].run_id, "missing:"):
        assert str(fact) in text
    facts = json.loads(CliRunner().invoke(app, ["lineage", URI, "--json"]).stdout)
    assert facts["metrics"]["quality/content"] == 0.53
    assert facts["missing"] == found.missing()


def test_the_same_model_is_made_again_and_the_checkout_left_alone(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From data that only DVC's cache has, with the threads of then, and going on after a failure."""
    (here / "loss.txt").write_text("of another day")
    before = (folder_digest(here / "artifacts"), (here / "dvc.lock").read_bytes(), git(here, "status", "--porcelain"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("QUICK_FAILS", "yes")
    with pytest.raises(StageFailed, match="the same command goes on from here"):
        reproduce(URI, here, tmp_path / "again", "distill", 0.05, print)
    monkeypatch.delenv("QUICK_FAILS")
    command = ["reproduce", "models:/quick/1", "--into", str(tmp_path / "again"), "--start", "distill"]
    result = CliRunner().invoke(app, command)
    (here / "loss.txt").write_text("mca")
    assert result.exit_code == 0, result.output
    assert "model_digest: same" in result.stdout
    assert "metrics: 1 of 1 equal" in result.stdout
    made = (tmp_path / "again/artifacts/distill/made.txt").read_text()
    assert made != (here / "artifacts/distill/made.txt").read_text()
    (here / "loss.txt").write_text("of another day")
    after = (folder_digest(here / "artifacts"), (here / "dvc.lock").read_bytes(), git(here, "status", "--porcelain"))
    (here / "loss.txt").write_text("mca")
    assert after == before
    other = CliRunner().invoke(app, ["reproduce", URI, "--into", str(tmp_path / "again")])
    assert other.exit_code == 2
    assert "is not a reproduction of models:/quick/1 from stage encode on" in other.stderr


def test_what_differs_is_named_and_metrics_decide(here: Path, tmp_path: Path) -> None:
    registered, metrics = lineage_of(URI), {"quality/content": 0.53, "speed/latency_ms": 5.0}
    shutil.copytree(here / "artifacts", tmp_path / "artifacts")
    (tmp_path / "artifacts/register/model/weights").write_text("others")
    found = compare(registered, metrics, tmp_path, 0.05)
    assert found.agreement == "metrics agree"
    assert "  weights differs" in found.lines
    (tmp_path / "artifacts/evaluate/metrics.json").write_text('{"quality/content": 0.4}')
    found = compare(registered, metrics, tmp_path, 0.05)
    assert found.agreement == "different"
    assert "quality/content: registered 0.53, here 0.4" in found.lines
    assert compare(Lineage(results=Results()), {}, tmp_path, 0.05).agreement == "different"


def test_code_that_was_never_committed_is_refused_by_name(here: Path, tmp_path: Path) -> None:
    (here / "loss.txt").write_text("not committed")
    try:
        assert changed_files() == ("loss.txt", "params.yaml")
        dvc(here, "repro", "--quiet")
        register(here, "uncommitted")
        assert lineage_of("models:/uncommitted/1").changed == ("loss.txt",)
    finally:
        (here / "loss.txt").write_text("mca")
    result = CliRunner().invoke(app, ["reproduce", "models:/uncommitted/1", "--into", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert "expected --start to be one of data, distill, register, got 'encode'" in result.stderr
    result = CliRunner().invoke(
        app, ["reproduce", "models:/uncommitted/1", "--into", str(tmp_path / "x"), "--start", "distill"]
    )
    assert result.exit_code == 2
    assert "does not have the loss.txt that made its results" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_version_from_before_there_was_a_lineage_says_what_its_tags_say(here: Path) -> None:
    tags = {
        "vdmini.commit": "c0ffee",
        "vdmini.params": json.dumps({"distill": {"icd_weight": 0.5}, "register_": {"name": "old"}}),
        "vdmini.removed": "M,D.1.0",
        "vdmini.digest": "d1",
    }
    register_model("old", "champion", here, tags, {})
    found = lineage_of("models:/old/1")
    assert (found.commit, found.results.removed, found.results.model_digest) == ("c0ffee", ("M", "D.1.0"), "d1")
    assert yaml.safe_load(found.params or "") == {"distill": {"icd_weight": 0.5}, "register": {"name": "old"}}
    assert {"dvc_lock", "stages", "results.protocol"} <= set(found.missing())
    assert "stages      not recorded" in CliRunner().invoke(app, ["lineage", "models:/old/1"]).stdout


@pytest.mark.slow
def test_the_real_recipe_gives_the_same_digests_on_the_same_machine(tmp_path: Path) -> None:
    """Every stage twice, on budgets of seconds: in a clone of the project, and again from its registry."""
    folder, evaluate = tmp_path / "checkout", {"clips": 2, "steps": 1, "gallery": 1, "diversity": 0, "batch_size": 2}
    git(ROOT, "clone", "--quiet", str(ROOT), str(folder))
    params = {**{name: {} for name in STAGES}, **PARAMS, "evaluate": {**evaluate, "end_to_end_runs": 1}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    environment = {**os.environ, "PYTHONPATH": str(folder), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    recipe = [sys.executable, "-m", "dvc", "repro"]
    subprocess.run(recipe, cwd=folder, check=True, env={**environment, "OMP_NUM_THREADS": "1"})
    command = [sys.executable, "-m", "flows.cli", "reproduce", "models:/vdmini@champion"]
    another = {**environment, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=folder, env=another, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
    assert "model_digest: same" in done.stdout

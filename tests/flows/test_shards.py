"""A benchmark's videos made in shards by the workers of a pool, and joined on the driver."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.deployment import deploy
from flows.order import Shard, order_of
from flows.processes import StageFailed
from flows.shards import join, sent_with
from flows.transfers import transfer
from tasks._vbench import Making, Request, generate, words_of
from tests.evaluation.vbench.stand_in import write_checkout
from tests.flows.clones import LOG, ROOT, Clones, carried_out, command, commit, serving
from tests.text_tiny import write_text_unet
from vdmini_core.artifacts import file_digest, read_json, write_json
from vdmini_core.evaluation.generation import MANIFEST, GenerationManifest

CHECKOUT, MODEL = Path(".scratch/VBench"), "artifacts/model"
STAGE = """
  model:
    cmd: cp -r {source} artifacts/model
    outs: [artifacts/model]
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_unet(tmp_path_factory.mktemp("model") / "text")


@pytest.fixture
def site(clones: Clones, source: Path, monkeypatch: pytest.MonkeyPatch) -> Clones:
    """The clones with VBench's checkout in each, and a model that a stage of the driver has made."""
    with (clones.driver / "dvc.yaml").open("a") as file:
        file.write(STAGE.format(source=source))
    for clone in (clones.driver, *clones.workers):
        write_checkout(clone / CHECKOUT, prompts=1)
    monkeypatch.chdir(clones.driver)
    command(clones.driver, sys.executable, "-m", "dvc", "repro", "-q", "model")
    commit(clones.driver)
    command(clones.driver, "git", "push", "-q", "origin", "HEAD")
    return clones


def request(out: Path) -> Request:
    return Request("t2v", CHECKOUT, out, ("scene",))


def digests(out: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in (out / "videos").iterdir()}


@pytest.fixture
def here(site: Clones) -> dict[str, str]:
    """What the driver makes itself."""
    out = site.store.parent / "here"
    # In a process of its own, as the workers': how other tests left torch in this one may show in the last bit.
    words = [*words_of(request(out), Making(MODEL, 1)), "--model", MODEL, "--out", str(out)]
    values = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "flows.cli", *words], cwd=site.driver, env=values, check=True)
    made = digests(out)
    assert len(made) == 5
    return made


@pytest.mark.slow
def test_workers_of_a_pool_make_the_videos_that_one_process_makes(
    site: Clones, here: dict[str, str], prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    deploy(site.driver)
    out = Path("made")  # which git does not ignore
    out.mkdir()
    (out / "left").touch()
    words = [*words_of(request(out), Making(MODEL, 1)), "--model", MODEL, "--out", str(out), "--pool", "gpu"]
    values = {**os.environ, "PYTHONPATH": str(ROOT)}

    def call(*more: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "flows.cli", *words, *more]
        return subprocess.run(command, cwd=site.driver, env=values, capture_output=True, text=True, check=False)

    with serving(site.workers[0], "first"):
        done = call("--shards", "2")
    assert done.returncode == 0, done.stderr
    assert "5 videos came from pool gpu" in done.stdout
    assert digests(out) == here
    assert not (site.workers[1] / MODEL).exists()
    assert (site.workers[0] / MODEL / "model_index.json").is_file()
    assert [path for path in (site.store / "vdmini").rglob("*") if path.is_file()] == []
    for clone in (site.driver, site.workers[0]):
        assert [path for path in (clone / ".scratch/videos").rglob("*") if path.is_file()] == []
    # Nothing is missing, so no worker is needed.
    assert "0 videos came" in call("--shards", "2").stdout


@pytest.mark.slow
def test_a_worker_that_takes_over_a_shard_makes_what_is_missing(site: Clones, here: dict[str, str]) -> None:
    inputs, model = sent_with(site.driver, str(site.driver / MODEL))
    assert (list(inputs), model) == ([MODEL], MODEL)
    transfer(["push", *inputs], site.driver, LOG)
    words = (*words_of(request(Path("unused")), Making(MODEL, 1)), "--model", model)
    shard = Shard(words=words, index=0, of=1, key="one", inputs=tuple(inputs))
    wanted = order_of("vbench", site.driver, None, LOG).model_copy(update={"shard": shard})
    carried_out(site.workers[0], wanted)
    store = site.store / "vdmini/one/0-of-1"
    assert digests(store) == here
    (store / "videos" / sorted(here)[0]).unlink()
    said = carried_out(site.workers[1], wanted)
    assert "goes on from 5 files of another worker" in said
    assert "1 of the 5 videos of this shard made now" in said
    assert digests(store) == here
    assert not list(store.rglob(".*"))


def test_shards_that_were_not_made_alike_are_not_joined(site: Clones, tmp_path: Path) -> None:
    first, second = tmp_path / "0-of-2", tmp_path / "1-of-2"
    generate(Request("t2v", CHECKOUT, first, ("scene",)), Making(MODEL, 1), "0/2")
    shutil.copytree(first, second)
    manifest = read_json(first / MANIFEST, GenerationManifest)
    write_json(second / MANIFEST, manifest.model_copy(update={"model": "another"}))
    with pytest.raises(StageFailed, match=r"shard 1-of-2 was made otherwise than 0-of-2"):
        join([first, second], tmp_path / "out")
    with pytest.raises(StageFailed, match=r"finished shard 2-of-2, but nothing came"):
        join([first, tmp_path / "2-of-2"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_videos_that_are_there_stay(site: Clones, tmp_path: Path) -> None:
    shard, out = tmp_path / "0-of-1", tmp_path / "out"
    generate(Request("t2v", CHECKOUT, shard, ("scene",)), Making(MODEL, 1))
    names = sorted(digests(shard))
    (out / "videos").mkdir(parents=True)
    (out / "videos" / names[0]).write_bytes(b"mine")
    assert join([shard], out) == 4
    assert sorted(digests(out)) == names
    assert (out / "videos" / names[0]).read_bytes() == b"mine"


def test_one_part_made_here_and_parts_of_a_pool_are_told_apart(clones: Clones, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clones.driver)
    words = ["vbench", "generate", "--model", "x", "--checkout", "y", "--out", "z"]
    for more, reason in ((["--pool", "gpu", "--shard", "0/2"], "give --shards"), (["--shards", "2"], "--shard i/n")):
        result = CliRunner().invoke(app, [*words, *more])
        assert (result.exit_code, reason in result.stderr) == (2, True)


def test_a_model_that_dvc_does_not_keep_is_sent_by_nobody(clones: Clones) -> None:
    for name in ("zoo:t2v-lcm-shapes", "/elsewhere/model", "owner/name"):
        assert sent_with(clones.driver, name) == ({}, name)

"""A stage handed from a driver's clone to a worker's, which share a DVC remote and a git origin and no other file."""

import shutil
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows import graph, placement, transfers
from flows.deployment import deploy
from flows.full import vdmini
from flows.graph import inputs_of, restore
from flows.order import check_out, order_of
from flows.processes import StageFailed
from flows.shared_scratch import SharedScratch, shared_scratch
from flows.transfers import TransferFailed, with_back_off
from tasks._stage import half_done
from tests.flows.clones import LOG, Clones, carried_out, command, distill_order, serving, start
from vdmini_core.artifacts import file_digest, write_json
from vdmini_core.settings import load_params

# A dvc.lock by which prune is up to date, and its result is nowhere.
LOST_INPUT = """
schema: '2.0'
stages:
  prune:
    cmd: python step.py prune source.txt
    deps: []
    outs: [{path: artifacts/prune, hash: md5, md5: 00000000000000000000000000000000.dir}]
"""


def test_a_stage_is_run_by_a_worker_and_restored_on_the_driver(clones: Clones) -> None:
    # What git does not have goes with the order: changed settings, and the lock that `repro` wrote.
    (clones.driver / "params.yaml").write_text("distill: {loop: {max_steps: 2, batch_size: 1}}\n")
    wanted = distill_order(clones)
    assert inputs_of(clones.driver, "distill") == ["artifacts/prune"]
    carried_out(clones.workers[0], wanted)
    assert (clones.workers[0] / "params.yaml").read_text() == wanted.params
    assert placement.fetch("distill", clones.driver, LOG) == "placed"
    assert (clones.driver / "artifacts/distill/out.txt").read_text() == "source prune distill"
    assert not (clones.driver / "ran-distill.scratch").exists()
    assert not (clones.workers[0] / "ran-prune.scratch").exists()
    assert command(clones.driver, sys.executable, "-m", "dvc", "status").strip().endswith("up to date.")
    assert [path for path in (clones.store / "vdmini").rglob("*") if path.is_file()] == []
    # A worker that was lost after it had sent its results is not followed by one that repeats them.
    carried_out(clones.workers[1], wanted)
    assert not (clones.workers[1] / "ran-distill.scratch").exists()


def test_a_result_that_did_not_arrive_is_an_error_and_never_run_on_the_driver(clones: Clones) -> None:
    distill_order(clones)
    ran = clones.driver / "ran-distill.scratch"
    with pytest.raises(StageFailed, match="its result was not found in the remote"):
        placement.fetch("distill", clones.driver, LOG)
    assert not ran.exists()
    assert "distill" not in (clones.driver / "dvc.lock").read_text()


def test_half_an_input_of_an_interrupted_stage_gives_way_to_the_whole_one(clones: Clones) -> None:
    wanted = distill_order(clones)
    left = clones.workers[0] / "artifacts/prune"
    left.mkdir(parents=True)
    (left / "out.txt").write_text("half")
    carried_out(clones.workers[0], wanted)
    assert (clones.workers[0] / "artifacts/distill/out.txt").read_text() == "source prune distill"


def test_a_worker_that_takes_over_goes_on_from_the_last_whole_checkpoint(clones: Clones) -> None:
    first, second = clones.workers
    (first / "pace").touch()
    wanted = distill_order(clones)
    process = start(first, wanted)
    there = "vdmini/*/one/step-2/checkpoint.json"
    while not list(clones.store.glob(there)):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    worker = psutil.Process(process.pid)
    for lost in [*worker.children(recursive=True), worker]:
        lost.kill()
    process.communicate()
    # A folder whose manifest did not arrive is no checkpoint.
    (half,) = {path.parent for path in clones.store.glob("vdmini/*/one/step-2")}
    (half / "step-9").mkdir()
    (half / "step-9" / "state.safetensors").write_text("half")
    output = carried_out(second, wanted)
    assert "goes on from" in output
    assert "starts at 0" not in output
    assert "starts at" in output
    assert not (second / ".scratch/checkpoints/one/step-9").exists()
    assert placement.fetch("distill", clones.driver, LOG) == "placed"


def test_stopping_a_worker_sends_the_checkpoint_it_leaves(clones: Clones) -> None:
    first, _ = clones.workers
    (first / "pace").touch()
    wanted = distill_order(clones)
    wanted = wanted.model_copy(update={"params": wanted.params.replace("0.2", "1000")})
    process = start(first, wanted)
    while not (first / ".scratch/checkpoints/one/step-2").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert list(clones.store.glob("vdmini/*/one/step-2/checkpoint.json"))


def test_checkpoints_are_mirrored_whole_and_old_ones_removed(clones: Clones, tmp_path: Path) -> None:
    distill_order(clones)
    shared = shared_scratch(clones.driver, "distill", load_params(clones.driver / "params.yaml"))
    assert shared is not None
    folder = clones.driver / ".scratch/checkpoints/run"
    for step in (1, 2):
        (folder / f"step-{step}").mkdir(parents=True)
        (folder / f"step-{step}" / "state.safetensors").write_text(f"state {step}")
        (folder / f"step-{step}" / "checkpoint.json").write_text("{}")
    (folder / ".step-3.partial").mkdir()
    (folder / ".step-3.partial" / "state.safetensors").write_text("half")
    (folder / "history.jsonl").write_text("{}\n")
    assert shared.push() == 4
    assert shared.push() == 0
    for name in ("state.safetensors", "checkpoint.json"):
        (folder / "step-1" / name).unlink()
    (folder / "step-1").rmdir()
    shared.push()
    # A worker that was taken for lost does not remove what its successor has sent.
    behind = SharedScratch(shared.fs, shared.base, tmp_path / "behind")
    (behind.folder / "run/step-1").mkdir(parents=True)
    (behind.folder / "run/step-1/checkpoint.json").write_text("{}")
    behind.push()
    shared.push()
    there = SharedScratch(shared.fs, shared.base, tmp_path / "elsewhere")
    assert there.pull() == 2
    found = {
        path.relative_to(there.folder / "run"): file_digest(path) for path in there.folder.rglob("*") if path.is_file()
    }
    assert found == {name: file_digest(folder / name) for name in found}
    assert {str(name) for name in found} == {"history.jsonl", "step-2/checkpoint.json", "step-2/state.safetensors"}


def test_what_a_clone_has_of_other_trainings_is_not_sent(clones: Clones) -> None:
    distill_order(clones)
    scratch = clones.driver / ".scratch/checkpoints"
    checkpoints = {run: scratch / run / "step-1/checkpoint.json" for run in ("earlier", "resumed", "new")}
    for run in ("earlier", "resumed"):
        write_json(checkpoints[run], {})
    write_json(scratch / "measured.json", {})
    shared = shared_scratch(clones.driver, "distill", load_params(clones.driver / "params.yaml"))
    assert shared is not None
    assert shared.push() == 1
    for run in ("resumed", "new"):
        assert half_done(scratch, run) == scratch / run  # as the stage does
    write_json(checkpoints["new"], {})
    assert shared.push() == 2
    assert shared.saved() == {"measured.json", "resumed/step-1/checkpoint.json", "new/step-1/checkpoint.json"}


def test_what_a_worker_could_not_get_is_refused(clones: Clones) -> None:
    (clones.driver / "step.py").write_text("# edited")
    with pytest.raises(
        ValueError, match=r"step\.py is not committed; commit and push first \(params\.yaml and dvc\.lock"
    ):
        order_of("distill", clones.driver, None, LOG)
    command(
        clones.driver, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-a", "-m", "y"
    )
    with pytest.raises(ValueError, match="is on no remote of git; push it first"):
        order_of("distill", clones.driver, None, LOG)
    command(clones.driver, "git", "push", "-q", "origin", "HEAD")
    wanted = order_of("distill", clones.driver, None, LOG)
    worker = clones.workers[0]
    (worker / "step.py").write_text("mine")
    with pytest.raises(ValueError, match=r"worker's clone, but step\.py was edited in it"):
        check_out(wanted, worker, LOG)
    command(worker, "git", "checkout", "-q", "step.py")
    check_out(wanted, worker, LOG)
    assert (worker / "step.py").read_text().endswith("# edited")


def test_inputs_that_nobody_pushed_are_not_waited_for(clones: Clones) -> None:
    wanted = order_of("distill", clones.driver, None, LOG)
    process = start(clones.workers[0], wanted)
    started = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "neither locally nor on remote" in output
    assert time.monotonic() - started < 30


def test_a_transfer_is_tried_again_and_wrong_input_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = list[float]()
    monkeypatch.setattr(transfers.time, "sleep", pauses.append)
    answers: list[str | Exception] = [TransferFailed("connection refused"), TransferFailed("503"), "done"]

    def action() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert with_back_off(action, "push", LOG) == "done"
    assert len(pauses) == 2
    assert pauses[1] > pauses[0]
    answers[:] = [TransferFailed("OSError: [Errno 28] No space left on device"), "done"]
    with pytest.raises(TransferFailed, match="No space left"):
        with_back_off(action, "push", LOG)
    answers[:] = [ValueError("wrong"), "done"]
    with pytest.raises(ValueError, match="wrong"):
        with_back_off(action, "push", LOG)
    answers[:] = [TransferFailed("connection refused")] * 100
    with pytest.raises(TransferFailed):
        with_back_off(action, "push", LOG, patience_s=0.5)


def test_what_is_up_to_date_or_in_the_cache_needs_no_worker(clones: Clones) -> None:
    assert restore("prune", clones.driver, LOG) == "skipped"
    (clones.driver / "artifacts/prune/out.txt").unlink()
    assert restore("prune", clones.driver, LOG) == "restored"
    (clones.driver / "source.txt").unlink()
    assert restore("prune", clones.driver, LOG) == "restored"  # what DVC calls pulling, be it there or not
    shutil.rmtree(clones.driver / "artifacts/prune")
    assert restore("prune", clones.driver, LOG) == "restored"


def test_what_cannot_be_restored_is_not_run_and_dvc_is_not_stopped(
    clones: Clones, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.processes.end_tree", lambda *process: pytest.fail("DVC is stopped"))
    ran = (clones.driver / "ran-distill.scratch").is_file()
    assert restore("distill", clones.driver, LOG) is None
    assert (clones.driver / "ran-distill.scratch").is_file() == ran
    assert restore("prune", clones.driver, LOG) == "skipped"


@pytest.mark.parametrize(
    ("stage", "file", "text", "message"),
    [
        ("pruned", "ignored.scratch", "", "Stage 'pruned' not found"),
        ("prune", "dvc.lock", "schema: [", "'./dvc.lock' is invalid"),
        ("prune", ".dvc/config", "[core]\nremote = moon\n", "remote 'moon' doesn't exist"),
        ("distill", "dvc.lock", LOST_INPUT, "neither locally nor on remote"),
    ],
)
def test_wrong_input_of_a_driver_is_not_tried_again(
    clones: Clones, monkeypatch: pytest.MonkeyPatch, stage: str, file: str, text: str, message: str
) -> None:
    (clones.driver / file).write_text(text)
    shutil.rmtree(clones.driver / "artifacts/prune")
    monkeypatch.setattr(transfers.time, "sleep", lambda seconds: pytest.fail("it is tried again"))
    with pytest.raises(StageFailed, match=message):
        placement.place(stage, clones.driver, None, LOG)


def test_a_storage_that_does_not_answer_a_driver_is_tried_again(
    clones: Clones, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = 'ERROR: unexpected error - Could not connect to the endpoint URL: "http://127.0.0.1:9/b/runs"'
    program = f"import sys; print({told!r}); sys.exit(255)"
    monkeypatch.setattr(graph, "repro_command", lambda name: [sys.executable, "-c", program])
    with pytest.raises(TransferFailed, match="Could not connect"):
        restore("prune", clones.driver, LOG)


@pytest.mark.slow
def test_the_flow_has_a_placed_stage_done_by_a_worker_of_the_pool(
    clones: Clones, prefect_server: str, mlflow_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deployed, ordered and carried out by Prefect itself."""
    monkeypatch.chdir(clones.driver)
    for name, value in {"PREFECT_API_URL": prefect_server, "MLFLOW_TRACKING_URI": mlflow_file}.items():
        monkeypatch.setenv(name, value)
    text = (clones.driver / "params.yaml").read_text().replace("{distill: {", "{distill: {pool: gpu, ")
    (clones.driver / "params.yaml").write_text(text)
    deploy(clones.driver)
    with serving(clones.workers[0], "first"):
        assert vdmini() == {"prune": "skipped", "distill": "placed"}
    assert (clones.workers[0] / "ran-distill.scratch").exists()
    assert not (clones.driver / "ran-distill.scratch").exists()
    assert vdmini() == {"prune": "skipped", "distill": "skipped"}

"""What a flow that is stopped, or lost, leaves of the stage that it runs, and who gets the folder after it."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from flows import run_lock, services
from flows.processes import GRACE, run_logged
from flows.shared_scratch import SharedScratch
from tasks import _stage
from tasks._stage import SAME_REQUEST_S, Context, end_on_sigterm
from vdmini_core.settings import DistillSettings, LoopSettings, Params

ROOT = Path(__file__).parents[2]
PARAMS = Params(distill=DistillSettings(loop=LoopSettings(max_steps=6, batch_size=2)))

# A training whose step takes longer than it takes a flow to tell all it started.
TRAINING = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from tasks._stage import end_on_sigterm
context = SimpleNamespace(stopping=False)
end_on_sigterm(context, after_a_checkpoint=True)
print("trains", flush=True)
while not context.stopping:
    time.sleep(0.05)
time.sleep(3)
Path("checkpoint").touch()
sys.exit(1)
"""
# As `python -m flows.order` on a worker: stopped, it stops what it runs.
ORDER = """
import logging, signal, sys
from pathlib import Path
from flows.processes import run_logged
def stop(number, frame):
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)
signal.signal(signal.SIGTERM, stop)
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
run_logged([sys.executable, "training.py"], "training", Path.cwd(), None, logging.getLogger())
"""


def test_a_training_that_is_told_twice_by_the_same_request_saves_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "training.py").write_text(TRAINING)
    values = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", ORDER],
        cwd=tmp_path,
        env=values,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as order:
        assert order.stdout is not None
        assert any("trains" in line for line in order.stdout)
        created = psutil.Process(order.pid).create_time()
        # The flow tells the order and the training, and the order, as it ends, tells the training again.
        assert services.end_tree(order.pid, created) == 2
    assert (tmp_path / "checkpoint").exists()


def test_who_asks_again_later_is_not_made_to_wait_for_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(_stage, "time", SimpleNamespace(monotonic=lambda: now[0]))
    before = signal.getsignal(signal.SIGTERM)
    context = Context("distill", PARAMS, SimpleNamespace(), torch.device("cpu"))
    try:
        end_on_sigterm(context, after_a_checkpoint=True)
        for later in (0.0, SAME_REQUEST_S - 1):
            now[0] = 100.0 + later
            signal.raise_signal(signal.SIGTERM)
            assert context.should_stop()
        now[0] = 101.0 + SAME_REQUEST_S
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_saves_nothing_ends_at_once_and_its_records_are_closed_undisturbed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_stage, "time", SimpleNamespace(monotonic=lambda: 100.0))
    before = signal.getsignal(signal.SIGTERM)
    try:
        end_on_sigterm(Context("encode", PARAMS, SimpleNamespace(), torch.device("cpu")), after_a_checkpoint=False)
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the same request, as records are closed
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_ctrl_c_ends_what_still_saves_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deaf.py").write_text(
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(300)"
    )
    with subprocess.Popen(
        [sys.executable, "deaf.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "on\n"

        def pressed(seconds: float) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(services.time, "sleep", pressed)
        with pytest.raises(KeyboardInterrupt):
            services.end_tree(child.pid, psutil.Process(child.pid).create_time())
        monkeypatch.undo()
        assert child.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize(("grace_s", "sent"), [("1", 0), ("100", 1)])
def test_the_last_checkpoint_has_a_share_of_the_time_that_the_pool_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grace_s: str, sent: int
) -> None:
    monkeypatch.setenv(GRACE, grace_s)
    arrived = list[str]()

    class Slow(SharedScratch):
        def push(self) -> int:
            time.sleep(2)
            arrived.append("checkpoint")
            return 1

    shared = Slow(None, "", tmp_path)
    with pytest.raises(SystemExit), shared.pushed(1000, logging.getLogger()):
        raise SystemExit(143)
    assert len(arrived) == sent


def test_what_does_not_end_in_its_share_of_the_time_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GRACE, "1.5")
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(300)"

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_logged([sys.executable, "-c", deaf], "deaf", tmp_path, None, logging.getLogger(), stop)
    assert time.monotonic() - started < services.STOP_GRACE_S / 2


def test_a_folder_has_one_run_at_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = "import logging, pathlib, sys, time; from flows.run_lock import hold\n"
    program += "with hold(pathlib.Path('.'), 'a run', logging.getLogger()): print('held', flush=True); time.sleep(3)"
    values = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env=values, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        told = pytest.raises(RuntimeError, match="cannot serve a worker as well; a worker needs a clone of its own")
        with told, run_lock.hold(tmp_path, "a worker", logging.getLogger()):
            pass
        with caplog.at_level(logging.WARNING), run_lock.hold(tmp_path, "a run", logging.getLogger()):
            assert other.poll() is not None or other.wait(5) == 0
    assert f"a run of process {other.pid}; waiting for its end" in caplog.text


# A flow at a stage of DVC, which waits for the file `go`.
FLOW = """
import logging, sys
from pathlib import Path
from flows.processes import GRACE, run_logged
from flows.run_lock import hold
log, root = logging.getLogger(), Path.cwd()
with hold(root, "a run", log):
    run_logged([sys.executable, "-m", "dvc", "repro", "-q", "slow"], "slow", root, None, log)
"""
SLOW = """
import os, time
from pathlib import Path
Path("pid.scratch").write_text(str(os.getpid()))
while not Path("go").exists():
    time.sleep(0.05)
Path("out").touch()
"""


def test_a_folder_stays_held_until_what_a_killed_flow_started_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "dvc.yaml").write_text(f"stages: {{slow: {{cmd: exec {sys.executable} slow.py, outs: [out]}}}}")
    (tmp_path / "slow.py").write_text(SLOW)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=tmp_path, check=True)
    flow = subprocess.Popen([sys.executable, "-c", FLOW], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    pid, deadline = tmp_path / "pid.scratch", time.monotonic() + 60
    while not (pid.is_file() and pid.read_text()):
        assert flow.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    training = psutil.Process(int(pid.read_text()))
    flow.kill()
    flow.wait()
    how = rf"process {flow.pid}, which is gone, but what it started still works: .* `kill {training.pid}`"
    with pytest.raises(RuntimeError, match=how), run_lock.hold(tmp_path, "a worker", logging.getLogger()):
        pass

    def looked(seconds: float) -> None:
        (tmp_path / "go").touch()
        time.sleep(0.1)

    monkeypatch.setattr(run_lock, "time", SimpleNamespace(monotonic=time.monotonic, sleep=looked))
    with caplog.at_level(logging.WARNING), run_lock.hold(tmp_path, "a run", logging.getLogger()):
        assert (tmp_path / "out").exists()
        assert not training.is_running()
    assert re.search(how, caplog.text)
    assert run_lock.inherited(tmp_path) == ()


def test_a_lock_that_a_killed_dvc_left_unreadable_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torn = tmp_path / ".dvc/tmp/rwlock"
    torn.parent.mkdir(parents=True)
    torn.write_text("")
    with caplog.at_level(logging.WARNING), run_lock.hold(tmp_path, "a run", logging.getLogger()):
        assert not torn.exists()
    assert "left unreadable" in caplog.text
    torn.write_text('{"read": {}, "write": {}}')
    guard = torn.with_name("rwlock.lock")
    guard.unlink(missing_ok=True)
    with run_lock.hold(tmp_path, "a run", logging.getLogger()):
        assert torn.read_text() == '{"read": {}, "write": {}}'
    assert not guard.exists()

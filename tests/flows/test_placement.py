"""Runs of a pool as a driver sees them: lost workers, failures, cancellation, a server that is away, repeated logs."""

import logging
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed, Pending, Running, Scheduled

from flows import placement
from flows.deployment import HEARTBEAT_S, SILENCE_S, lost_workers, worker_command
from flows.order import Order, Part
from flows.placement import carry_out, check_pools
from flows.processes import StageFailed
from flows.transfers import TransferFailed
from tasks._launch import launch_command
from vdmini_core.settings import Resources

LOG = logging.getLogger("test.placement")
ORDER = Order(stage="distill", commit="c0ffee", params="distill: {}", lock="")
Server = Callable[..., "FakeServer"]


class FakeServer:
    """A Prefect server whose runs pass through given states, one a look; an exception in their place is raised."""

    def __init__(self, *lives: list[Any]) -> None:
        self.lives, self.left = list(lives), dict[UUID, list[Any]]()
        self.rows = list[str]()
        self.labels, self.infrastructure_pid = {"prefect.worker.type": "process"}, "box:1"
        self.cancelled = list[UUID]()

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, order: Order, pool: str, logger: logging.Logger) -> UUID:
        id_ = uuid4()
        self.left[id_] = self.lives.pop(0)
        return id_

    def read_flow_run(self, id_: UUID) -> Any:
        states = self.left[id_]
        state = states.pop(0) if len(states) > 1 else states[0]
        if isinstance(state, BaseException):
            raise state
        return SimpleNamespace(state=state, labels=self.labels, infrastructure_pid=self.infrastructure_pid)

    def read_logs(self, about: Any, limit: int, offset: int, sort: Any) -> list[Any]:
        return [SimpleNamespace(level=logging.INFO, message=text) for text in self.rows[offset : offset + limit]]

    def set_flow_run_state(self, id_: UUID, state: State[Any], force: bool = False) -> Any:
        if state.type == Cancelling().type:
            self.cancelled.append(id_)
            state = Cancelled()
        self.left[id_] = [state]
        return SimpleNamespace(state=state)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    def make(*lives: list[Any]) -> FakeServer:
        fake = FakeServer(*lives)
        monkeypatch.setattr(placement, "get_client", lambda sync_client: fake)
        monkeypatch.setattr(placement, "submit", fake.submit)
        monkeypatch.setattr(placement, "LOOK_EVERY_S", 0.0)
        monkeypatch.setattr(placement, "FAREWELL_S", 0.1)
        return fake

    return make


def test_the_order_of_a_lost_worker_is_given_out_again(server: Server) -> None:
    fake = server([Scheduled(), Running(), Crashed(message="no heartbeat")], [Running(), Completed()])
    carry_out([ORDER], "gpu", LOG)
    assert fake.lives == []


def test_orders_are_not_given_out_for_ever(server: Server) -> None:
    fake = server(*[[Crashed(message="no heartbeat")] for _ in range(placement.LOST_WORKERS + 2)])
    with pytest.raises(StageFailed, match="distill on pool gpu: Crashed: no heartbeat"):
        carry_out([ORDER], "gpu", LOG)
    assert len(fake.lives) == 1


def test_a_worker_that_got_on_before_it_was_lost_costs_no_attempt(server: Server) -> None:
    """As runs of a training that is longer than a cluster's time limit: each leaves a checkpoint."""
    crash = [Crashed(message="no heartbeat")]
    looks = iter([0, 8, 8, 8, 16, 16, 24, None, 24])  # as it begins, and at each loss; None: no answer

    class Store:
        def saved(self) -> frozenset[str]:
            if (step := next(looks)) is None:
                raise TransferFailed("connection refused")
            return frozenset({f"one/step-{step}/checkpoint.json"})

    fake = server(*[crash] * 8, [Completed()])
    carry_out([ORDER], "gpu", LOG, Store())
    assert fake.lives == []
    fake = server(*[crash] * 5)
    looks = iter([24, 24, None, 24, 24])
    with pytest.raises(StageFailed, match="no heartbeat"):
        carry_out([ORDER], "gpu", LOG, Store())
    assert len(fake.lives) == 1


@pytest.mark.parametrize("end", [Failed(message="wrong input"), Cancelled(message="by somebody")])
def test_a_run_that_failed_or_was_cancelled_is_not_repeated_and_the_others_end(server: Server, end: State[Any]) -> None:
    fake = server([Running(), end], [Running()])
    parts = [ORDER.model_copy(update={"part": Part(index=index, of=2, round=0)}) for index in range(2)]
    with pytest.raises(StageFailed, match=rf"distill round 0 part 1 of 2 on pool gpu: {end.name}: {end.message}"):
        carry_out(parts, "gpu", LOG)
    assert len(fake.cancelled) == 1
    assert fake.lives == []


def test_a_driver_that_is_stopped_cancels_its_runs(server: Server) -> None:
    fake = server([Running(), KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        carry_out([ORDER], "gpu", LOG)
    assert len(fake.cancelled) == 1


def test_a_server_that_is_away_is_waited_for(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    fake = server([Running(), ConnectionError("refused"), ConnectionError("refused"), Running(), Completed()])
    fake.rows = [f"step {step}" for step in range(placement.LOGS_AT_ONCE + 5)]
    with caplog.at_level(logging.INFO):
        carry_out([ORDER], "gpu", LOG)
    told = [record.message for record in caplog.records]
    assert [text for text in told if text.startswith("step ")] == fake.rows
    assert sum("Prefect does not answer (refused)" in text for text in told) == 1
    assert "Prefect answers again" in told


def test_a_run_that_was_taken_and_never_starts_is_lost(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "START_PATIENCE_S", 0.0)
    server([Pending()], [Completed()])
    carry_out([ORDER], "gpu", LOG)


@pytest.mark.parametrize(("made", "ordered"), [(None, 2), ("vdmini:stage-1", 1)])
def test_a_job_that_waits_for_a_node_is_waited_for_once_it_is_made(
    server: Server, monkeypatch: pytest.MonkeyPatch, made: str | None, ordered: int
) -> None:
    monkeypatch.setattr(placement, "START_PATIENCE_S", 0.0)
    fake = server([*[Pending()] * 9, Running(), Completed()], [Completed()])
    fake.labels, fake.infrastructure_pid = {"prefect.worker.type": "kubernetes"}, made
    carry_out([ORDER], "gpu", LOG)
    assert len(fake.lives) == 2 - ordered
    assert placement.QUEUE_PATIENCE_S == 24 * 3600


def test_a_pool_without_a_deployment_is_refused_before_anything_runs(prefect_server: str) -> None:
    check_pools({})
    with pytest.raises(
        ValueError, match=r"resources\.distill\.pool is 'moon', but Prefect has no deployment stage/moon"
    ):
        check_pools({"distill": "moon"})


def test_a_run_without_heartbeats_is_crashed_and_a_worker_does_one_at_a_time() -> None:
    automation = lost_workers()
    assert automation.trigger.after == {"prefect.flow-run.heartbeat"}
    assert "prefect.flow-run.Completed" in automation.trigger.expect
    assert automation.trigger.within.total_seconds() == SILENCE_S
    command = worker_command("gpu", "one")
    assert command[command.index("--limit") + 1] == "1"


def test_a_launcher_starts_a_process_for_each_gpu() -> None:
    command = launch_command("distill", Resources(gpus=4, launcher="accelerate"), {})
    assert {"--num_processes=4", "--multi_gpu", "--num_machines=1"} <= set(command)
    assert command[-4:] == ["-m", "flows.cli", "stage", "distill"]
    assert "--cpu" in launch_command("distill", Resources(gpus=0, launcher="accelerate"), {})


def test_several_nodes_are_those_of_an_allocation() -> None:
    wanted = Resources(gpus=8, launcher="accelerate", nodes=2)
    with pytest.raises(ValueError, match=r"resources\.distill\.nodes is 2, but the SLURM allocation here has none"):
        launch_command("distill", wanted, {})
    command = launch_command("distill", wanted, {"SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "node7"})
    assert command[:3] == ["srun", "--nodes=2", "--ntasks-per-node=1"]
    assert "--num_processes=16" in command[-1]
    assert "--machine_rank=$SLURM_NODEID" in command[-1]
    assert "--main_process_ip=node7" in command[-1]


def test_an_order_that_is_still_carried_out_is_joined_and_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    id_, asked, given = uuid4(), list[Any](), list[str]()

    class Client(FakeServer):
        def read_flow_runs(self, flow_run_filter: Any) -> list[Any]:
            asked.append(flow_run_filter.tags.all_)
            return [SimpleNamespace(id=id_, name="distill")] if len(asked) < 3 else []

    def run_deployment(name: str, tags: list[str], **rest: object) -> Any:
        given.append(name)
        return SimpleNamespace(id=uuid4())

    monkeypatch.setattr(placement, "get_client", lambda sync_client: Client())
    monkeypatch.setattr(placement, "run_deployment", run_deployment)
    assert placement.submit(ORDER, "gpu", LOG) == id_
    # Another driver's run in MLflow makes no other order; other settings do.
    assert placement.submit(ORDER.model_copy(update={"parent_run_id": "other"}), "gpu", LOG) == id_
    assert placement.submit(ORDER.model_copy(update={"params": "distill: {keep: best}"}), "gpu", LOG) != id_
    assert given == ["stage/gpu"]
    assert asked[0] == asked[1] != asked[2]


def test_every_flow_of_a_checkout_beats_before_it_is_taken_for_lost() -> None:
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "prefect.toml").read_text())
    assert settings["flows"]["heartbeat_frequency"] == HEARTBEAT_S < SILENCE_S / 2
    assert f"PREFECT_FLOWS_HEARTBEAT_FREQUENCY={HEARTBEAT_S}\n" in (root / "deploy/Dockerfile").read_text()

"""A stage on a work pool, as its driver sees it: inputs out, an order to a worker, results back.

The driver never runs such a stage itself. A run whose worker is lost (CRASHED) is ordered again, up to LOST_WORKERS
times without anything new to go on from; one that failed is not, because the same input would fail again.
"""

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import LogSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling, Crashed

from flows.graph import Result, inputs_of, restore
from flows.order import Order, Part, order_of
from flows.processes import Logger, StageFailed
from flows.shared_scratch import SharedScratch, shared_scratch
from flows.transfers import TransferFailed, transfer, with_back_off
from vdmini_core.artifacts import json_digest
from vdmini_core.settings import load_params

FLOW = "stage"
LIVING = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING)
LOST_WORKERS = 3  # of one order since the last checkpoint that it sent, before it is given up
LOOK_EVERY_S = 2.0
START_PATIENCE_S = 600.0  # of a run that a worker took but does not start: it is lost without a heartbeat
QUEUE_PATIENCE_S = 86400.0  # of one that is a job of a cluster, which may wait for a node: no sign of it until it runs
FAREWELL_S = 15.0
LOGS_AT_ONCE = 200


def check_pools(placed: Mapping[str, str]) -> None:
    """ValueError for a stage on a pool that has no deployment; asks Prefect only if a stage is placed at all."""
    if not placed:
        return
    with get_client(sync_client=True) as client:
        known = {d.name for d in client.read_deployments() if client.read_flow(d.flow_id).name == FLOW}
    for stage, pool in placed.items():
        if pool not in known:
            raise ValueError(
                f"resources.{stage}.pool is {pool!r}, but Prefect has no deployment {FLOW}/{pool}; there are "
                f"{', '.join(sorted(known)) or 'none'}. `vdmini deploy` creates those of prefect.yaml on the server of "
                "PREFECT_API_URL"
            )


def place(name: str, root: Path, parent_run_id: str | None, logger: Logger) -> Result:
    """Bring a stage up to date by a worker of its pool, unless it already is or its result can be restored.

    Raises ValueError where a worker could not run the same, StageFailed where the stage fails or is cancelled.
    """
    if (found := with_back_off(lambda: restore(name, root, logger), f"restoring {name}", logger)) is not None:
        return found
    params = load_params(root / "params.yaml")
    resources = params.resources_of(name)
    order = order_of(name, root, parent_run_id, logger)
    if inputs := inputs_of(root, name):
        transfer(["push", *inputs], root, logger)
    shared = with_back_off(lambda: shared_scratch(root, name, params), "opening the remote", logger)
    if resources.parts > 1:
        rounds = -(-params.sensitivity.clips // params.sensitivity.batch_size)
        for round_ in range(rounds):
            parts = [Part(index=index, of=resources.parts, round=round_) for index in range(resources.parts)]
            carry_out([order.model_copy(update={"part": part}) for part in parts], resources.pool, logger, shared)
    carry_out([order], resources.pool, logger, shared)
    return fetch(name, root, logger)


def fetch(name: str, root: Path, logger: Logger) -> Result:
    """Restore what a worker has sent, or StageFailed: running the stage here is not what was asked for."""
    found = with_back_off(lambda: restore(name, root, logger), f"fetching {name}", logger)
    if found != "restored":
        raise StageFailed(
            f"a worker finished {name!r}, but its result was not found in the remote ({found or 'not there'}); "
            "does the worker use the same DVC remote, and are all outputs of the stage cached by DVC?"
        )
    try:
        shared = shared_scratch(root, name, load_params(root / "params.yaml"))
        if shared is not None:
            shared.clear()
    except TransferFailed as error:
        logger.warning("checkpoints stay in the remote: %s", error)
    return "placed"


def carry_out(orders: list[Order], pool: str, logger: Logger, shared: SharedScratch | None = None) -> None:
    """Have orders carried out, side by side; whatever stops us cancels them.

    Orders of lost workers are given out again; `shared` tells which of these got on, None where a stage keeps nothing.
    Raises StageFailed when one fails or is cancelled.
    """
    with get_client(sync_client=True) as client:
        watch, runs = Watch(client, logger), dict[UUID, Given]()
        try:
            saved = saved_in(shared)
            for order in orders:
                runs[submit(order, pool, logger)] = Given(order, saved)
            while runs:
                time.sleep(LOOK_EVERY_S)
                for id_, given in list(runs.items()):
                    state = watch.look(id_)
                    if state is None or not state.is_final():
                        continue
                    del runs[id_]
                    again = given.after_loss(saved_in(shared)) if state.is_crashed() else given
                    name = title(given.order)
                    if state.is_crashed() and again.lost <= LOST_WORKERS:
                        logger.warning("the worker of %s was lost (%s); ordered again", name, state.message)
                        runs[submit(given.order, pool, logger)] = again
                    elif not state.is_completed():
                        raise StageFailed(f"{name} on pool {pool}: {state.name}: {state.message}")
        except BaseException:
            cancel(client, runs, logger)
            raise


@dataclass(frozen=True)
class Given:
    """An order that was given out, what its stage had saved by then, and how many workers were lost since that grew."""

    order: Order
    saved: frozenset[str]
    lost: int = 0

    def after_loss(self, saved: frozenset[str]) -> "Given":
        """The same order, given out again."""
        got_on = not saved <= self.saved
        return Given(self.order, self.saved | saved, 1 if got_on else self.lost + 1)


def saved_in(shared: SharedScratch | None) -> frozenset[str]:
    """What another worker could go on from; nothing while the remote does not answer, which is then no progress."""
    with contextlib.suppress(TransferFailed):
        return frozenset() if shared is None else shared.saved()
    return frozenset()


def title(order: Order) -> str:
    """An order's name for people."""
    if order.shard is not None:
        return f"{order.stage} shard {order.shard.index + 1} of {order.shard.of}"
    part = order.part
    return order.stage if part is None else f"{order.stage} round {part.round} part {part.index + 1} of {part.of}"


def submit(order: Order, pool: str, logger: Logger) -> UUID:
    """Give an order to a pool; the run's id. The same order that is still being carried out is not given again.

    Raises ValueError if there is no pool of that name.
    """
    tag = f"order-{json_digest(order.model_dump(mode='json', exclude={'parent_run_id'}))[:16]}"
    living = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[tag]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(LIVING))),
    )
    with get_client(sync_client=True) as client:
        if runs := client.read_flow_runs(flow_run_filter=living):
            logger.info("%s is already ordered, by run %s", title(order), runs[0].name)
            return UUID(str(runs[0].id))
    try:
        run: Any = run_deployment(
            f"{FLOW}/{pool}",
            parameters={"order": order.model_dump(mode="json", exclude_none=True)},
            timeout=0,
            flow_run_name=title(order),
            tags=[tag],
        )
    except ObjectNotFound:
        raise ValueError(
            f"Prefect has no deployment {FLOW}/{pool}; `vdmini deploy` creates those of prefect.yaml"
        ) from None
    logger.info("%s is ordered from pool %s", title(order), pool)
    return UUID(str(run.id))


class Watch:
    """Looks at runs of workers: their states, and their logs, which it repeats here."""

    def __init__(self, client: SyncPrefectClient, logger: Logger) -> None:
        self.client, self.logger = client, logger
        self._logs: dict[UUID, int] = {}
        self._since: dict[UUID, tuple[str, float]] = {}
        self._silent = False

    def look(self, id_: UUID) -> State[Any] | None:
        """The state of a run, or None while the server does not answer: the worker goes on meanwhile."""
        try:
            run = self.client.read_flow_run(id_)
            self._repeat_logs(id_)
        except ObjectNotFound:
            raise StageFailed(f"run {id_} was deleted in Prefect") from None
        except Exception as error:  # its kind depends on how the server is gone
            if not self._silent:
                self.logger.warning("Prefect does not answer (%s); waiting for it", str(error)[:200])
            self._silent = True
            return None
        if self._silent:
            self.logger.info("Prefect answers again")
            self._silent = False
        return None if run.state is None else self._started_in_time(id_, run.state, start_patience_s(run))

    def _repeat_logs(self, id_: UUID) -> None:
        about = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[id_]))
        while True:
            seen = self._logs.get(id_, 0)
            rows = self.client.read_logs(about, limit=LOGS_AT_ONCE, offset=seen, sort=LogSort.TIMESTAMP_ASC)
            for row in rows:
                self.logger.log(row.level, "%s", row.message)
            self._logs[id_] = seen + len(rows)
            if len(rows) < LOGS_AT_ONCE:
                return

    def _started_in_time(self, id_: UUID, state: State[Any], patience_s: float) -> State[Any]:
        name, since = self._since.get(id_, ("", 0.0))
        if state.name != name:
            self._since[id_] = (str(state.name), time.monotonic())
            self.logger.info("%s", f"run {str(id_)[:8]} is {state.name}")
        elif state.type == StateType.PENDING and time.monotonic() - since > patience_s:
            text = f"taken by a worker {patience_s:.0f} s ago, and not started"
            return self.client.set_flow_run_state(id_, Crashed(message=text), force=True).state or state
        return state


def start_patience_s(run: FlowRun) -> float:
    """How long a run may be pending.

    A worker that is lost before it made a cluster's job leaves nothing to wait for; its own host has no queue.
    """
    type_ = run.labels.get("prefect.worker.type", "process")
    is_job = run.infrastructure_pid is not None and type_ not in ("process", "docker")
    return QUEUE_PATIENCE_S if is_job else START_PATIENCE_S


def cancel(client: SyncPrefectClient, runs: Iterable[UUID], logger: Logger) -> None:
    """Cancel runs, and wait for their end a little."""
    left = set(runs)
    for id_ in left:
        logger.warning("cancelling run %s of the pool", str(id_)[:8])
        with contextlib.suppress(Exception):  # a server that is gone does not keep us from ending
            client.set_flow_run_state(id_, Cancelling())
    deadline = time.monotonic() + FAREWELL_S
    while left and time.monotonic() < deadline:
        time.sleep(0.5)
        with contextlib.suppress(Exception):
            left = {id_ for id_ in left if not (client.read_flow_run(id_).state or Cancelling()).is_final()}

"""What scenarios ask of servers and processes: logs, metrics, spans of time, who is alive, and to cancel."""

import itertools
import json
from pathlib import Path
from typing import Any
from uuid import UUID

from benchmarks.cluster.site import Site


def scores(site: Site) -> list[Any]:
    """What was measured of each unit; its latency is a clock's."""
    report = json.loads((site.driver.folder / "artifacts/sensitivity/report.json").read_text())
    return [{name: each[name] for name in ("name", "content", "motion", "quality")} for each in report["scores"]]


def worker_spans(runs: list[Any]) -> dict[str, list[tuple[Any, Any]]]:
    """Worker -> start and end of its runs; Prefect's log of a run says which worker took it."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    found: dict[str, list[tuple[Any, Any]]] = {}
    with get_client(sync_client=True) as client:
        for each in runs:
            rows = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[each.id])), limit=20)
            takes = [row.message for row in rows if row.message.startswith("Worker '")]
            found.setdefault(takes[0].split("'")[1], []).append((each.start_time, each.end_time))
    return found


def overlap(spans: list[tuple[Any, Any]]) -> bool:
    """Whether one began before another ended."""
    ordered = sorted(spans)
    return any(later[0] < earlier[1] for earlier, later in itertools.pairwise(ordered))


def log_text(ids: list[UUID]) -> str:
    """What these runs logged."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    with get_client(sync_client=True) as client:
        rows, offset = [], 0
        while found := client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=ids)), limit=200, offset=offset):
            rows += found
            offset += len(found)
    return "\n".join(row.message for row in rows)


def cancel(id_: UUID) -> None:
    """What the UI's button does."""
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(id_, Cancelling())


def training_pids(folder: Path) -> list[int]:
    """Processes of `vdmini stage distill` in a clone."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        line = process.info["cmdline"] or []
        if process.info["cwd"] == str(folder) and "stage" in line and "distill" in line and "python" in line[0]:
            found.append(process.pid)
    assert found, "no training process found"
    return found


def alive(pids: list[int]) -> bool:
    """Whether one of them is left."""
    import psutil

    return any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def mlflow_steps(site: Site) -> tuple[str, list[int]]:
    """How MLflow says the newest distillation ended, and the steps of which it has the loss."""
    program = (
        "import json; from mlflow import MlflowClient; c = MlflowClient(); "
        "e = c.get_experiment_by_name('vdmini').experiment_id; "
        "r = c.search_runs([e], \"tags.`vdmini.stage` = 'distill'\", order_by=['attributes.start_time DESC'])[0]; "
        "h = c.get_metric_history(r.info.run_id, 'train/student/total'); "
        "print(json.dumps([r.info.status, sorted({m.step for m in h})]))"
    )
    status, steps = json.loads(site.driver.call("-c", program).strip().splitlines()[-1])
    return status, steps

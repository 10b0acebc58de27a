"""What Prefect is told of this project: work pools, the deployments of prefect.yaml, and what to do about lost workers.

`python -m flows.deployment` tells the server of PREFECT_API_URL.
"""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import yaml
from prefect.automations import AutomationCore
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.utilities.asyncutils import run_coro_as_sync
from prefect.workers.process import ProcessWorker

from flows.remote import CLONE

HEARTBEAT_S = 30  # the least that Prefect allows
SILENCE_S = 90  # three heartbeats
AUTOMATION = "vdmini: lost workers"


def deploy(root: Path) -> None:
    """Create what is missing on the server, and deploy prefect.yaml; pools that exist are left as they are.

    Raises RuntimeError with the last lines of `prefect deploy` where that fails.
    """
    deployments = yaml.safe_load((root / "prefect.yaml").read_text())["deployments"]
    with get_client(sync_client=True) as client:
        for pool in sorted({each["work_pool"]["name"] for each in deployments}):
            try:
                client.read_work_pool(pool)
            except ObjectNotFound:
                # The command line would ask the internet for this template.
                template = ProcessWorker.get_default_base_job_template()
                client.create_work_pool(WorkPoolCreate(name=pool, type="process", base_job_template=template))
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise RuntimeError(f"`prefect deploy --all` failed; its last lines:\n{last}")
    run_coro_as_sync(_watch_workers())


def lost_workers() -> AutomationCore:
    """Runs whose heartbeats stop are CRASHED; the driver then orders them again."""
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    return AutomationCore(
        name=AUTOMATION,
        description=f"A run without a heartbeat for {SILENCE_S} s is crashed: its worker is gone.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ends},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENCE_S),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=f"no heartbeat for {SILENCE_S} s: worker lost")],
    )


async def _watch_workers() -> None:
    async with get_client() as client:
        for automation in await client.read_automations_by_name(AUTOMATION):
            await client.delete_automation(automation.id)
        await client.create_automation(lost_workers())


def worker_environment(root: Path) -> dict[str, str]:
    """What a worker's process has in addition: where it works, and how often its runs say that they live."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {CLONE: str(root), "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S), "PATH": path}


def worker_command(pool: str, name: str) -> list[str]:
    """A worker that does one run at a time."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name, "--type", "process"]
    return [*command, "--limit", "1", "--install-policy", "never"]


if __name__ == "__main__":
    deploy(Path.cwd())

"""Flow "stage", deployed as stage/gpu: what a worker does with an order, in a clone of its own."""

import os
import sys
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from flows.order import Order, check_out
from flows.processes import run_logged
from flows.run_lock import hold
from vdmini_core.artifacts import write_json

CLONE = "VDMINI_CLONE"


def enter_clone() -> dict[str, str]:
    """Prefect's pull step: work in the clone in which `vdmini worker` was started."""
    folder = os.environ.get(CLONE)
    if folder is None:
        raise RuntimeError(
            f"{CLONE} is not set: start workers with `vdmini worker`, or set it in the pool's job template"
        )
    os.chdir(folder)
    return {"directory": folder}


@flow(name="stage", log_prints=True)
def stage(order: dict[str, Any]) -> None:
    """Carry out an `Order`; see flows/order.py."""
    wanted, root, logger = Order.model_validate(order), Path.cwd(), get_run_logger()
    with hold(root, "a worker", logger):
        check_out(wanted, root, logger)
        file = root / ".scratch" / "order.json"
        write_json(file, wanted)
        command = [sys.executable, "-m", "flows.order", str(file)]
        run_logged(command, f"the order of {wanted.stage!r}", root, wanted.parent_run_id, logger)

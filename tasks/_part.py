"""A part of stage sensitivity's units, on one of several machines: `python -m tasks._part sensitivity PART`."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from tasks._stage import SCRATCH, Context, end_on_sigterm, processes, quieten, resources_explained
from tasks._tracking import open_tracker
from tasks.sensitivity import measure_part
from vdmini_core.settings import load_params


def run_part(stage: str, part: dict[str, Any]) -> None:
    """Measure a part, {"round", "index", "of"}, in the working directory."""
    if stage != "sensitivity":
        raise ValueError(f"stage {stage} has no parts; sensitivity has")
    params = load_params(Path("params.yaml"))
    quieten()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    name = f"sensitivity-{part['round']}-{part['index']}"
    with processes(stage) as (device, main), open_tracker(name, part, SCRATCH / "tracking" / name) as tracker:
        context = Context(stage, params, tracker, device, main)
        end_on_sigterm(context, after_a_checkpoint=False)
        with resources_explained(context):
            units = measure_part(context, part["round"], part["index"], part["of"])
        context.say(f"measured in round {part['round']}: {', '.join(units) or 'nothing, all is decided'}")


if __name__ == "__main__":
    run_part(sys.argv[1], json.loads(sys.argv[2]))

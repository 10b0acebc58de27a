"""A stage in several processes: replaces this process by `accelerate launch` where params.yaml says so."""

import os
import sys
from collections.abc import Mapping

from vdmini_core.settings import Resources

LAUNCHED = "VDMINI_LAUNCHED"  # a single process of a launcher has no other sign of it


def launch(stage: str, resources: Resources) -> None:
    """Become the launcher, unless the stage needs none or this process was launched; then return."""
    if resources.launcher == "none" or "WORLD_SIZE" in os.environ or LAUNCHED in os.environ:
        return
    command = launch_command(stage, resources, os.environ)
    os.environ[LAUNCHED] = "1"
    os.execvp(command[0], command)


def launch_command(stage: str, resources: Resources, environment: Mapping[str, str]) -> list[str]:
    """`accelerate launch` of a stage, on every node of a SLURM allocation if there are several.

    Raises ValueError for several nodes without an allocation of as many.
    """
    processes = max(resources.gpus, 1) * resources.nodes
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={processes}"]
    command += [f"--num_machines={resources.nodes}", "--mixed_precision=no", "--dynamo_backend=no"]
    command += ["--cpu"] if resources.gpus == 0 else ["--multi_gpu"] if processes > 1 else []
    program = ["-m", "flows.cli", "stage", stage]
    if resources.nodes == 1:
        return [*command, "--main_process_port=0", *program]
    there = environment.get("SLURM_JOB_NUM_NODES", "none")
    if there != str(resources.nodes):
        raise ValueError(
            f"resources.{stage}.nodes is {resources.nodes}, but the SLURM allocation here has {there} "
            "(SLURM_JOB_NUM_NODES); ask for as many in the pool's job, or change nodes"
        )
    # The node that runs this line is the first of the allocation, as SLURM starts batch scripts.
    command += [f"--main_process_ip={environment['SLURMD_NODENAME']}", "--main_process_port=29500"]
    inner = " ".join([*command, "--machine_rank=$SLURM_NODEID", *program])
    return ["srun", f"--nodes={resources.nodes}", "--ntasks-per-node=1", "bash", "-c", f"exec {inner}"]

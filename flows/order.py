"""A stage that is to be done elsewhere: what a driver says of it, and how a worker carries it out.

`python -m flows.order FILE` carries out the order in a JSON file, in a clone that is at the order's commit: the code
that does the work is then that commit's, whatever the worker was started with.
"""

import logging
import shutil
import signal
import sys
from pathlib import Path

from flows.graph import inputs_of, repro_command, results_of
from flows.processes import Logger, run_logged
from flows.shared_scratch import shared_scratch, shared_videos
from flows.transfers import git, transfer, with_back_off
from vdmini_core.artifacts import Record, read_json
from vdmini_core.settings import Resources, load_params

CARRIED = ("params.yaml", "dvc.lock")
"""Files that may differ from the commit; their texts go with the order."""


class Part(Record):
    """One of several runs that share the units of a round of sensitivity."""

    index: int
    of: int
    round: int


class Shard(Record):
    """One of several runs that share the videos of a benchmark; `vdmini` with these words makes them.

    `key` names all shards together, `inputs` are DVC's outputs that are read.
    """

    words: tuple[str, ...]
    index: int
    of: int
    key: str
    inputs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder of its videos, below that of all shards."""
        return f"{self.index}-of-{self.of}"


class Order(Record):
    """A stage, a part of one or a shard of videos, at a commit with the texts of `CARRIED`; no secret is part of it."""

    stage: str
    commit: str
    params: str
    lock: str
    parent_run_id: str | None = None
    part: Part | None = None
    shard: Shard | None = None


def order_of(stage: str, root: Path, parent_run_id: str | None, logger: Logger, besides: Path | None = None) -> Order:
    """The order for a stage as it is in the driver's folder.

    Raises ValueError where files other than `CARRIED` differ from the commit, or no remote of git has it: a worker
    could not run the same. What lies in the folder `besides` is no input.
    """
    words = ["status", "--porcelain", "--", "."]
    if besides is not None and besides.resolve().is_relative_to(root.resolve()):
        words.append(f":(exclude){besides.resolve().relative_to(root.resolve()).as_posix()}")
    dirty = [line[3:] for line in git(root, *words).splitlines() if line[3:] not in CARRIED]
    if dirty:
        raise ValueError(
            f"{stage} is placed on another machine, which works from a commit, but {', '.join(dirty[:5])} "
            f"{'is' if len(dirty) == 1 else 'are'} not committed; commit and push first "
            f"({' and '.join(CARRIED)} may differ)"
        )
    commit = git(root, "rev-parse", "HEAD")
    if not git(root, "remote"):
        raise ValueError(f"{stage} is placed on another machine, but git has no remote from which it gets the code")
    with_back_off(lambda: git(root, "fetch", "--quiet", "--all"), "git fetch", logger)
    if not git(root, "for-each-ref", "--contains", commit, "refs/remotes"):
        raise ValueError(
            f"{stage} is placed on another machine, but commit {commit[:12]} is on no remote of git; "
            "push it first: git push"
        )
    lock = root / "dvc.lock"
    return Order(
        stage=stage,
        commit=commit,
        params=(root / "params.yaml").read_text(),
        lock=lock.read_text() if lock.is_file() else "",
        parent_run_id=parent_run_id,
    )


def check_out(order: Order, root: Path, logger: Logger) -> None:
    """Bring a worker's clone to the order's commit and texts.

    Raises ValueError where somebody has changed files in it, which would be lost.
    """
    changed = git(root, "status", "--porcelain", "--untracked-files=no").splitlines()
    if mine := [line[3:] for line in changed if line[3:] not in CARRIED]:
        raise ValueError(f"{root} is a worker's clone, but {', '.join(mine[:5])} was edited in it; commit or undo that")
    if order.commit not in git(root, "rev-parse", "HEAD"):
        with_back_off(lambda: git(root, "fetch", "--quiet", "--all"), "git fetch", logger)
    git(root, "checkout", "--quiet", "--force", "--detach", order.commit)
    (root / "params.yaml").write_text(order.params)
    if order.lock:
        (root / "dvc.lock").write_text(order.lock)
    else:
        (root / "dvc.lock").unlink(missing_ok=True)


def carry_out(order: Order, root: Path, logger: Logger) -> None:
    """Fetch the inputs, run the stage, the part or the shard, send its results: data first, so that one is whole."""
    if order.shard is not None:
        _make_shard(order.shard, root, logger)
        return
    params = load_params(root / "params.yaml")
    if inputs := inputs_of(root, order.stage):
        transfer(["pull", "--force", *inputs], root, logger)  # over what an interrupted stage left here half-written
    shared = with_back_off(lambda: shared_scratch(root, order.stage, params), "opening the remote", logger)
    if shared is None:
        _run(order, root, logger)
    else:
        came = with_back_off(shared.pull, "fetching checkpoints", logger)
        if came:
            logger.info("goes on from %d files of another worker", came)
        with shared.pushed(params.resources_of(order.stage).push_checkpoints_s, logger):
            _run(order, root, logger)
    if order.part is not None:
        assert shared is not None
        with_back_off(shared.push, "sending the part", logger)
        return
    transfer(["push", order.stage], root, logger)
    transfer(["push", "--run-cache", order.stage], root, logger)


def _make_shard(shard: Shard, root: Path, logger: Logger) -> None:
    if shard.inputs:
        transfer(["pull", "--force", *shard.inputs], root, logger)
    shared = with_back_off(lambda: shared_videos(root, shard.key, shard.name), "opening the remote", logger)
    if came := with_back_off(shared.pull, "fetching videos", logger):
        logger.info("goes on from %d files of another worker", came)
    command = [sys.executable, "-m", "flows.cli", *shard.words, "--out", str(shared.folder)]
    command += ["--shard", f"{shard.index}/{shard.of}"]
    with shared.pushed(Resources().push_checkpoints_s, logger):
        run_logged(command, f"shard {shard.index + 1} of {shard.of}", root, None, logger)
    with_back_off(shared.push, "sending the videos", logger)
    shutil.rmtree(shared.folder)


def _run(order: Order, root: Path, logger: Logger) -> None:
    name = f"stage {order.stage!r}"
    if order.part is None:
        # --pull: a run that was lost after its results were sent is not repeated.
        command = [*repro_command(order.stage), "--pull"]
        run_logged(command, name, root, order.parent_run_id, logger, results_of(order.stage, lambda result: None))
    else:
        command = [sys.executable, "-m", "tasks._part", order.stage, order.part.model_dump_json()]
        run_logged(command, f"a part of {name}", root, order.parent_run_id, logger)


def main(file: Path) -> None:
    """Carry out the order in `file`, in the working directory; SIGTERM stops it with all it started."""

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the last checkpoint is being sent
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for noisy in ("botocore", "aiobotocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        carry_out(read_json(file, Order), Path.cwd(), logging.getLogger("vdmini.order"))
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        sys.exit(f"vdmini: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

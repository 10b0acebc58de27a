"""A benchmark's videos made by several workers of a pool, each a shard in a folder of its own; the driver joins them.

Videos go through the storage of the DVC remote, below `vdmini/<key>/<shard>/`, as half-done work of stages does. The
key is the digest of what is asked for and of the model, so the same command goes on where it was.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from flows.graph import lock_digest
from flows.order import Shard, order_of
from flows.placement import carry_out
from flows.processes import Logger
from flows.shared_scratch import shared_videos
from flows.transfers import transfer, with_back_off
from vdmini_core.artifacts import json_digest, read_json
from vdmini_core.evaluation.generation import MANIFEST, GenerationManifest, claim_folder


def make_on_pool(
    words: Sequence[str], model: str, out: Path, root: Path, pool: str, shards: int, logger: Logger
) -> int:
    """Have `vdmini <words> --model <model>` carried out in shards by a pool, and join their videos in `out`; how many.

    What DVC keeps of the model is sent first; anything else that the words name has to be on the workers.
    Raises ValueError where a worker could not do the same or `out` was begun otherwise, StageFailed if a shard fails.
    """
    inputs = outputs_with(root, model)
    words = (*words, "--model", model)
    made_by = {name: lock_digest(root, stage) for name, stage in inputs.items()}
    key = json_digest({"words": list(words), "inputs": made_by})[:32]
    order = order_of(words[0], root, None, logger)
    if inputs:
        transfer(["push", *inputs], root, logger)
    shared = with_back_off(lambda: shared_videos(root, key), "opening the remote", logger)
    of_each = [Shard(words=words, index=index, of=shards, key=key, inputs=tuple(inputs)) for index in range(shards)]
    carry_out([order.model_copy(update={"shard": shard}) for shard in of_each], pool, logger, shared)
    with_back_off(shared.pull, "fetching the videos", logger)
    made = join([shared.folder / shard.name for shard in of_each], out)
    with_back_off(shared.clear, "removing the videos from the remote", logger)
    shutil.rmtree(shared.folder)
    return made


def join(folders: Sequence[Path], out: Path) -> int:
    """Move the videos of several folders into one; ValueError where they were not made alike."""
    made = 0
    for folder in folders:
        claim_folder(out, read_json(folder / MANIFEST, GenerationManifest))
        videos = folder / "videos"
        for video in sorted(path for path in videos.rglob("*") if path.is_file()):
            target = out / "videos" / video.relative_to(videos)
            target.parent.mkdir(parents=True, exist_ok=True)
            video.replace(target)
            made += 1
    return made


def outputs_with(root: Path, model: str) -> dict[str, str]:
    """DVC's output in which a model's folder lies, and the stage that makes it; none for a model from elsewhere."""
    from dvc.repo import Repo

    folder = root / ("artifacts/teacher" if model == "teacher" else model)
    with Repo(str(root)) as repo:
        outs = {out.def_path: (Path(out.fs_path), stage.name) for stage in repo.index.stages for out in stage.outs}
    return {name: stage for name, (path, stage) in outs.items() if path == folder or path in folder.parents}

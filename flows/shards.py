"""A benchmark's videos made by several workers of a pool, each a shard in a folder of its own; the driver joins them.

Videos go through the storage of the DVC remote, below `vdmini/<key>/<shard>/`, as half-done work of stages does. The
key is the digest of what is asked for, of the code and of the model, so the same command goes on where it was.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from flows.order import Shard, order_of
from flows.placement import carry_out
from flows.processes import Logger, StageFailed
from flows.run_lock import hold
from flows.shared_scratch import shared_videos
from flows.transfers import TransferFailed, transfer, with_back_off
from tasks._generate import model_folder
from vdmini_core.artifacts import folder_digest, json_digest, read_json
from vdmini_core.evaluation.generation import MANIFEST, GenerationManifest, claim_folder


def make_on_pool(
    words: Sequence[str],
    model: str,
    out: Path,
    root: Path,
    *,
    pool: str,
    shards: int,
    missing: Callable[[], int],
    logger: Logger,
) -> int:
    """Have `vdmini <words> --model <model>` carried out in shards by a pool, and join their videos in `out`; how many.

    What DVC keeps of the model is sent first; anything else that the words name has to be on the workers. `missing`
    counts the videos that `out` still lacks. Raises ValueError where a worker could not do the same or `out` was begun
    otherwise, StageFailed if a shard fails or its videos do not arrive.
    """
    with hold(root, "a run", logger):
        inputs, model = sent_with(root, model)
        words = (*words, "--model", model)
        order = order_of(words[0], root, None, logger, besides=out)
        content = folder_digest(Path(model)) if Path(model).is_dir() else None
        key = json_digest({"words": list(words), "inputs": inputs, "content": content, "commit": order.commit})[:32]
        if inputs:
            transfer(["push", *inputs], root, logger)
        shared = with_back_off(lambda: shared_videos(root, key), "opening the remote", logger)
        of_each = [Shard(words=words, index=index, of=shards, key=key, inputs=tuple(inputs)) for index in range(shards)]
        carry_out([order.model_copy(update={"shard": shard}) for shard in of_each], pool, logger, shared)
        with_back_off(shared.pull, "fetching the videos", logger)
        made = join([shared.folder / shard.name for shard in of_each], out)
        if left := missing():
            raise StageFailed(
                f"all shards are done, and {left} videos are missing: have the workers the same checkout?"
            )
        shutil.rmtree(shared.folder)
        try:
            shared.clear()
        except TransferFailed as error:
            logger.warning("the videos stay in the remote as well: %s", error)
        return made


def join(folders: Sequence[Path], out: Path) -> int:
    """Move the videos of several folders into one, where those that are there stay; how many were moved.

    Raises StageFailed where a folder is not there or was made otherwise than the first, ValueError where `out` was.
    """
    if absent := [folder.name for folder in folders if not (folder / MANIFEST).is_file()]:
        raise StageFailed(
            f"workers finished shard {', '.join(absent)}, but nothing came; do they use the same DVC remote?"
        )
    manifests = [read_json(folder / MANIFEST, GenerationManifest) for folder in folders]
    if other := [folder.name for folder, made in zip(folders, manifests, strict=True) if made != manifests[0]]:
        raise StageFailed(
            f"shard {', '.join(other)} was made otherwise than {folders[0].name}: have the workers the same model?"
        )
    claim_folder(out, manifests[0])
    moved = 0
    for videos in (folder / "videos" for folder in folders):
        for video in sorted(path for path in videos.rglob("*") if path.is_file()):
            target = out / "videos" / video.relative_to(videos)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(video, target)
                moved += 1
    return moved


def sent_with(root: Path, model: str) -> tuple[dict[str, str], str]:
    """DVC's output in which a model's folder lies, with its digest, and what workers have to call the model.

    A registered version is a folder of this project. A model from elsewhere is in no output and keeps its name.
    """
    from dvc.repo import Repo

    folder = model_folder(model) if model.startswith("models:/") else Path(model)
    folder = (root / folder).resolve()
    with Repo(str(root)) as repo:
        outs = [(Path(out.fs_path).resolve(), out) for stage in repo.index.stages for out in stage.outs]
        found = {out.def_path: str(out.hash_info.value) for path, out in outs if path in (folder, *folder.parents)}
    return (found, folder.relative_to(root.resolve()).as_posix()) if found else ({}, model)

"""Stage data: find the clips, or write the synthetic ones, and list what is usable."""

import shutil
from pathlib import Path

from tasks._stage import Context
from vdmini_core.artifacts import write_json
from vdmini_core.data.ucf101 import index_clips, write_synthetic


def run(context: Context) -> None:
    settings = context.params.data
    root = Path(settings.source).expanduser()
    if settings.source == "synthetic":
        root = context.folder / "videos"
        shutil.rmtree(root, ignore_errors=True)
        write_synthetic(root, settings, context.track)
    manifest = index_clips(root, settings, context.track)
    write_json(context.folder / "manifest.json", manifest)
    context.log({"data/clips": len(manifest.clips), "data/skipped": len(manifest.skipped)}, 0)

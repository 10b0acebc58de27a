"""HTML of the report's clips, embedded so that the page needs no other file."""

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

from vdmini_core.data.video import frames_and_fps

MEDIA_TYPES = {".png": "image/png", ".mp4": "video/mp4"}


def gallery_row(index: int, entry: Mapping[str, str], clips: Path) -> str:
    """One figure of an entry's media side by side; a file that is missing raises FileNotFoundError.

    Videos carry what the page's script needs: `data-model`, `data-frames`, `data-fps`.
    """
    caption = f"Clip {index}" + (f": {entry['caption']}" if "caption" in entry else "")
    tracks = "".join(
        f"<figure>{_medium(clips / name, column, f'{column}, {caption}')}"
        f"<figcaption>{escape(column)}</figcaption></figure>"
        for column, name in entry.items()
        if column != "caption"
    )
    return f'<figure class="clip"><figcaption>{escape(caption)}</figcaption><div class="tracks">{tracks}</div></figure>'


def _medium(path: Path, column: str, text: str) -> str:
    source = data_uri(path)
    if source.startswith("data:image"):
        return f'<img src="{source}" alt="{escape(text)}">'
    frames, fps = frames_and_fps(path)
    facts = f'data-model="{escape(column)}" data-frames="{frames}" data-fps="{fps:g}"'
    return (
        f'<video src="{source}" aria-label="{escape(text)}" {facts} '
        'muted loop playsinline controls preload="auto"></video>'
    )


def data_uri(path: Path) -> str:
    """A file's bytes as a data URI; ValueError for a kind that the page does not show."""
    if path.suffix not in MEDIA_TYPES:
        raise ValueError(f"{path} cannot be embedded; the gallery takes {', '.join(MEDIA_TYPES)}")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is in the evaluation's gallery but does not exist; run the evaluate stage again"
        )
    return f"data:{MEDIA_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"

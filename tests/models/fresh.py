"""Reloads saved students in a process that has stock diffusers and nothing of this project."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

STOCK = """
import json, sys
from pathlib import Path
import diffusers, torch
for folder in sorted(Path(sys.argv[1]).iterdir()):
    cls = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
    model, info = cls.from_pretrained(folder, output_loading_info=True, use_safetensors=True)
    wrong = [info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs") if info[key]]
    call = torch.load(folder / "call.pt", weights_only=True)
    with torch.no_grad():
        answer = model.eval()(*call["args"], **call["keywords"])[0]
    worst = (answer - call["answer"]).abs().max().item()
    print(json.dumps([folder.name, cls.__name__, wrong, worst]))
    assert not any(name.startswith("vdmini") for name in sys.modules)
"""


def stock_answers(root: Path) -> dict[str, list[Any]]:
    """Of every folder in `root`: its class, what was wrong with loading it, and the largest difference.

    Beside the model lies call.pt: `args` and `keywords` of a call and its `answer`.
    """
    done = subprocess.run([sys.executable, "-c", STOCK, root], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    return {case: found for case, *found in map(json.loads, done.stdout.splitlines())}

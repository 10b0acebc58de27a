"""A small VBench checkout whose evaluate.py behaves as the official one does, or fails in the ways it can."""

import json
from pathlib import Path

from vdmini_core.evaluation.vbench.scores import DIMENSIONS

SCRIPT = """
import argparse, json, os, subprocess, sys, time
parser = argparse.ArgumentParser()
for option in ("--output_path", "--full_json_dir", "--videos_path", "--ratio"):
    parser.add_argument(option)
parser.add_argument("--dimension", nargs="+")
args = parser.parse_args()
here = os.path.dirname(os.path.abspath(__file__))
dimension = args.dimension[0]
modes = json.load(open(os.path.join(here, "modes.json")))
mode = modes.get(dimension, "good")
with open(os.path.join(here, "calls.txt"), "a") as calls:
    calls.write(dimension + "\\n")
print("evaluating", dimension, flush=True)
if mode == "fail":
    raise RuntimeError("CUDA is not available")
if mode == "hang":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", here])
    time.sleep(600)
if mode == "silent":
    sys.exit(0)
listed = []
names = os.listdir(args.videos_path)
for prompt in json.load(open(args.full_json_dir)):
    for index in range(5):
        name = prompt["prompt_en"] + "-" + str(index) + ".mp4"
        if dimension in prompt["dimension"] and name in names:
            own = 0.5 + 0.01 * index + 0.02 * int(prompt["prompt_en"][-1])
            listed.append({"video_path": os.path.join(args.videos_path, name), "video_results": own})
if mode == "some videos":
    listed = listed[:-1]
value = float("nan") if mode == "nan" else sum(v["video_results"] for v in listed) / len(listed)
text = json.dumps({"another" if mode == "other dimension" else dimension: [value, listed]})
if mode == "cut":
    text = text[: len(text) // 2]
os.makedirs(args.output_path, exist_ok=True)
open(os.path.join(args.output_path, "results_2026-01-01-00:00:00_eval_results.json"), "w").write(text)
if mode == "late failure":
    sys.exit(3)
"""


def write_checkout(folder: Path, prompts: int = 3, suite: str = "t2v") -> Path:
    """`prompts` prompts of each dimension; as in the real lists, several dimensions share theirs."""
    lists = {"subject_consistency": "subject", "dynamic_degree": "subject", "motion_smoothness": "subject"}
    lists |= {"aesthetic_quality": "overall", "imaging_quality": "overall", "overall_consistency": "overall"}
    by_prompt: dict[str, list[str]] = {}
    for dimension in DIMENSIONS[suite]:
        for index in range(prompts):
            by_prompt.setdefault(f"a {lists.get(dimension, dimension)}, no. {index}", []).append(dimension)
    entries = [{"prompt_en": prompt, "dimension": names} for prompt, names in by_prompt.items()]
    if suite == "i2v":
        entries = [{**entry, "image_name": f"{entry['prompt_en']}.jpg", "image_type": "plant"} for entry in entries]
    part, script = ("vbench", "evaluate.py") if suite == "t2v" else ("vbench2_beta_i2v", "evaluate_i2v.py")
    info = "VBench_full_info.json" if suite == "t2v" else "vbench2_i2v_full_info.json"
    (folder / part).mkdir(parents=True)
    (folder / part / info).write_text(json.dumps(entries))
    (folder / script).write_text(SCRIPT)
    set_modes(folder)
    return folder


def set_modes(checkout: Path, **modes: str) -> None:
    """How the stand-in treats each dimension from now on; `good` unless named."""
    (checkout / "modes.json").write_text(json.dumps(modes))


def calls(checkout: Path) -> list[str]:
    """The dimensions that were evaluated so far, in order."""
    path = checkout / "calls.txt"
    return path.read_text().split() if path.is_file() else []

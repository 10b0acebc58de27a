"""What `vdmini zoo` does: train the built-in models, with their manifests."""

import subprocess
from pathlib import Path

import torch
from tqdm import tqdm

from vdmini_core.zoo.build import PARTS, SETTINGS, TEACHER, Builder, write_manifest
from vdmini_core.zoo.evaluator import corruption_table


def build(out: Path) -> None:
    """Train into `out` (layout of vdmini_core/zoo/weights) and measure the evaluator."""
    from diffusers import AutoencoderKLTemporalDecoder

    from vdmini_core.models.loading import load_component

    def log(metrics: dict[str, float], step: int) -> None:
        if step % 100 == 0:
            shown = ", ".join(f"{name.removeprefix('train/')} {value:.4f}" for name, value in metrics.items())
            tqdm.write(f"step {step}: {shown}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    Builder(out, Path(".scratch/zoo"), device, log, lambda i, d, t=None: iter(tqdm(i, d, t)), tqdm.write).build()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    facts = {"command": "vdmini zoo", "commit": commit}
    settings = {part: values.model_dump(mode="json") for part, values in SETTINGS.items()}
    for teacher, parts in PARTS.items():
        write_manifest(out / teacher, {**facts, "settings": {part: settings[part] for part in parts}})
    vae = load_component(AutoencoderKLTemporalDecoder, out / TEACHER / "vae")
    table = corruption_table(out / "evaluator", vae)
    write_manifest(out / "evaluator", {**facts, "settings": settings["evaluator"], "corruption_table": table})

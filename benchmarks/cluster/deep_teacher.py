"""A teacher of more units than the built-in one has: its parts, and an untrained U-Net with more layers a stage.

`python -m benchmarks.cluster.deep_teacher FOLDER` writes the same bytes wherever it is called.
"""

import shutil
import sys
from pathlib import Path

import torch
from diffusers import UNetSpatioTemporalConditionModel

from vdmini_core.models.sources import ZOO

LAYERS = 6  # 53 blocks; the built-in teacher's two make 21


def write_deep_teacher(folder: Path) -> None:
    """A pipeline folder of the built-in teacher's class; what is there is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ZOO / "i2v-shapes", folder)
    config = UNetSpatioTemporalConditionModel.load_config(folder / "unet")
    shutil.rmtree(folder / "unet")
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel.from_config({**config, "layers_per_block": LAYERS})
    unet.half().save_pretrained(folder / "unet")


if __name__ == "__main__":
    write_deep_teacher(Path(sys.argv[1]))

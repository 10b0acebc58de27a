"""UCF101 in small: its exact layout with real avi files, and extractors as TorchScript files."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vdmini_core.artifacts import file_digest
from vdmini_core.data.video import write_video

CLASSES = ("ApplyEyeMakeup", "BabyCrawling", "YoYo")
FRAMES = 20


def write_ucf101(root: Path, groups: int = 6, clips: int = 2, classes: tuple[str, ...] = CLASSES) -> Path:
    """`classes` x `groups` x `clips` files of 48 x 36 and 20 frames; groups 1 and 2 are the test clips of split 1."""
    names = []
    for label, name in enumerate(classes, 1):
        for group in range(1, groups + 1):
            for clip in range(1, clips + 1):
                path = f"{name}/v_{name}_g{group:02d}_c{clip:02d}.avi"
                write_avi(root / "UCF-101" / path, seed=(label, group, clip))
                names.append((path, label, group))
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{n} {name}\n" for n, name in enumerate(classes, 1)))
    for split in (1, 2, 3):
        test = (2 * split - 1, 2 * split)
        train = [f"{path} {label}\n" for path, label, group in names if group not in test]
        (lists / f"trainlist0{split}.txt").write_text("".join(train))
        (lists / f"testlist0{split}.txt").write_text("".join(f"{p}\n" for p, _, group in names if group in test))
    return root


def write_avi(path: Path, seed: tuple[int, ...], frames: int = FRAMES, height: int = 36, width: int = 48) -> None:
    """A coloured wave that moves."""
    g = np.random.default_rng(seed)
    x, y, t = np.meshgrid(np.arange(width), np.arange(height), np.arange(frames), indexing="xy")
    a, b, c = g.uniform(0.05, 0.4, 3)
    phases = g.uniform(0, 6.28, 3)
    waves = [np.sin(a * x + b * y + c * t + phase) for phase in phases]
    clip = (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8).transpose(2, 0, 1, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, clip, fps=25, codec="mpeg4", crf=3)


class Projection(nn.Module):
    """I3D's interface, StyleGAN-V's edition, over a random projection of small frames, in float64."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        weight = torch.randn(3 * 8 * 8 * 2, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.register_buffer("weight", weight / 20)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        x = x.double()
        if rescale:
            x = 2 * x / 255 - 1
        if resize:
            x = nn.functional.interpolate(x, [x.shape[2], 8, 8], mode="trilinear", align_corners=False)
        moved = (x[:, :, 1:] - x[:, :, :-1]).abs().mean(2)
        features = torch.cat([x.mean(2).flatten(1), moved.flatten(1)], 1) @ self.weight
        if return_features:
            return features
        return features.softmax(1)


class Classifier(Projection):
    """C3D's interface: 0..255 in, probabilities out."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(2 * x.double() / 255 - 1, [x.shape[2], 8, 8], mode="trilinear")
        moved = (x[:, :, 1:] - x[:, :, :-1]).abs().mean(2)
        return (torch.cat([x.mean(2).flatten(1), moved.flatten(1)], 1) @ self.weight).softmax(1)


def save_script(path: Path, module: nn.Module) -> tuple[str, str]:
    """Write a module as TorchScript; its path and sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.script(module.eval()).save(str(path))
    return str(path), file_digest(path)

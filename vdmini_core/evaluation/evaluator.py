"""The offline evaluator: a content branch that sees single frames, a motion branch that sees the clip.

Both are small classifiers of the synthetic labels. Content is what a single frame shows: the
shape, its colour, and the beacon behind it. Their heads give content and motion accuracy, their pooled features
give the toy Frechet distances (never to be called FVD: the features are not I3D's, and the numbers compare
with nothing published).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vdmini_core.data.synthetic import COLOURS, MOTIONS, SHAPES

FEATURES = 64
GRID = 3


@dataclass(frozen=True)
class Judgement:
    """What the evaluator says of B clips: content of single frames [B, T, 64], features [B, 64], logits per label."""

    frames: Tensor
    content: Tensor
    motion: Tensor
    shape_logits: Tensor
    colour_logits: Tensor
    beacon_logits: Tensor
    motion_logits: Tensor


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
    return nn.Sequential(conv, nn.GroupNorm(8, outputs), nn.SiLU())


def _clip_convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv3d(inputs, outputs, (3, kernel, kernel), (1, stride, stride), (1, kernel // 2, kernel // 2))
    return nn.Sequential(conv, nn.GroupNorm(8, outputs), nn.SiLU())


class Evaluator(nn.Module):
    """Judges clips [B, 3, T, H, W] in [-1, 1]; trained at 64 x 64 pixels and 8 frames."""

    def __init__(self) -> None:
        super().__init__()
        self.content = nn.Sequential(
            _convolution(3, 16, 5, 2),
            _convolution(16, 32, 3, 2),
            _convolution(32, 48, 3, 2),
            _convolution(48, FEATURES, 3, 1),
        )
        # Strongest answers on a coarse grid: a beacon is known by its place.
        self.scene = nn.Sequential(
            nn.AdaptiveMaxPool2d(GRID), nn.Flatten(), nn.Linear(FEATURES * GRID**2, FEATURES), nn.SiLU()
        )
        self.motion = nn.Sequential(
            _clip_convolution(3, 16, 5, 2),
            _clip_convolution(16, 24, 3, 2),
            _clip_convolution(24, 32, 3, 2),
            _clip_convolution(32, FEATURES, 3, 1),
        )
        self.shape_head = nn.Linear(FEATURES, len(SHAPES))
        self.colour_head = nn.Linear(FEATURES, len(COLOURS))
        self.beacon_head = nn.Linear(FEATURES, len(MOTIONS))
        self.motion_head = nn.Linear(FEATURES, len(MOTIONS))

    def forward(self, clips: Tensor) -> Judgement:
        batch, _, frames = clips.shape[:3]
        singles = clips.transpose(1, 2).flatten(0, 1)
        of_frames = self.scene(self.content(singles)).unflatten(0, (batch, frames))
        content = of_frames.mean(1)
        # The clip's mean frame carries the content; what is left is what moved.
        motion = self.motion(clips - clips.mean(2, keepdim=True)).amax((-2, -1)).mean(-1)
        return Judgement(
            of_frames,
            content,
            motion,
            self.shape_head(content),
            self.colour_head(content),
            self.beacon_head(content),
            self.motion_head(motion),
        )


def accuracies(judgement: Judgement, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Per clip: content right (shape, colour and beacon, all three), motion right; bool [B] each, labels [B, 3].

    The beacon should announce the motion that the clip is labelled with.
    """
    shape, colour, motion = labels.unbind(1)
    content = judgement.shape_logits.argmax(1) == shape
    content &= judgement.colour_logits.argmax(1) == colour
    content &= judgement.beacon_logits.argmax(1) == motion
    return content, judgement.motion_logits.argmax(1) == motion


def save_evaluator(evaluator: Evaluator, folder: Path) -> None:
    """Write `evaluator.safetensors` in float16 with a config that names what it was trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half().contiguous() for name, value in evaluator.state_dict().items()}
    save_file(tensors, folder / "evaluator.safetensors")
    config = {"class": "Evaluator", "frames": 8, "size": 64}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_evaluator(folder: Path, device: torch.device | str = "cpu") -> Evaluator:
    """Load the evaluator in float32, frozen."""
    evaluator = Evaluator()
    tensors = {name: value.float() for name, value in load_file(folder / "evaluator.safetensors").items()}
    evaluator.load_state_dict(tensors)
    return evaluator.to(device).eval().requires_grad_(False)

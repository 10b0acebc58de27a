"""Trains an encoder to name what a clip shows: the task that stands in for CLIP's and T5's own trainings."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdmini_core.data.synthetic import COLOURS, MOTIONS, SHAPES
from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import LoopSettings
from vdmini_core.training.distributed import Batch, State
from vdmini_core.training.loop import train
from vdmini_core.training.player import Player

SIZES = {"shape": len(SHAPES), "colour": len(COLOURS), "motion": len(MOTIONS)}


def train_labels(
    encoder: nn.Module,
    embed: Callable[[State], Tensor],
    width: int,
    inputs: Callable[[Tensor, torch.Generator], State],
    labels: Tensor,
    settings: LoopSettings,
    device: torch.device,
    log: Log = silent_log,
    track: Track = silent_track,
) -> None:
    """Name shape, colour and motion by a linear head each; in place, ends with the averaged encoder, without heads.

    `inputs` gives the tensors of chosen samples [B], `embed` what the encoder makes of them, [B, width]; `labels`
    [N, 3] is the truth.
    """
    heads = nn.ModuleList(nn.Linear(width, size) for size in SIZES.values())
    model = nn.ModuleDict({"encoder": encoder, "heads": heads}).to(device)

    def batch_of(step: int, generator: torch.Generator) -> Batch:
        g = torch.Generator().manual_seed(settings.seed * 7919 + step)
        ids = torch.randint(len(labels), (settings.batch_size,), generator=g)
        return {"ids": ids.tolist(), **inputs(ids, generator), "labels": labels[ids]}

    def prepare(batch: Batch, step: int) -> State:
        return {name: value.to(device) for name, value in batch.items() if name != "ids"}

    def loss(state: State) -> dict[str, Tensor]:
        embedding = embed(state)
        logits = [head(embedding).float() for head in heads]
        truth = state["labels"].unbind(1)
        terms = [F.cross_entropy(answer, true) for answer, true in zip(logits, truth, strict=True)]
        right = [(answer.argmax(1) == true).float().mean() for answer, true in zip(logits, truth, strict=True)]
        accuracies = {f"{name}_accuracy": share for name, share in zip(SIZES, right, strict=True)}
        return {"total": terms[0] + terms[1] + terms[2], **accuracies}

    player = Player("encoder", model, loss, 1e-3)
    train([player], batch_of, prepare, settings, device=device, log=log, track=track)
    player.finish()

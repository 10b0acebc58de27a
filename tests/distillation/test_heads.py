"""The discriminator's heads by themselves."""

import torch

from vdmini_core.distillation.heads import Discriminator


def test_features_with_their_channels_last_are_read_as_others_are() -> None:
    """As a transformer's tokens come; torch's GroupNorm ends the process in its backward pass of such an input."""
    torch.manual_seed(0)
    heads = Discriminator([160])
    tokens = torch.randn(2, 9, 4, 4, 160).permute(0, 4, 1, 2, 3)
    noise = torch.zeros(2)

    def gradients(features: torch.Tensor) -> list[torch.Tensor]:
        heads.zero_grad()
        sum(logits.square().mean() for logits in heads([features], noise)).backward()  # type: ignore[union-attr]
        return [weight.grad.clone() for weight in heads.parameters() if weight.grad is not None]

    for last, plain in zip(gradients(tokens), gradients(tokens.contiguous()), strict=True):
        torch.testing.assert_close(last, plain)

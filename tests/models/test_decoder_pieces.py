"""Decoding in pieces is decoding at once, with less of the clip in memory."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from tests.models.tiny_vaes import CAUSAL, CLASSES, FRAME, TEMPORAL, latents_of, new_decoder
from vdmini_core.models.decoder import VAEDecoder
from vdmini_core.models.decoder_pieces import BEFORE, Reach, decoded_in_pieces, reach_of, spans


def compressed(name: str) -> VAEDecoder:
    """With a small reach, so that pieces are smaller than the clip."""
    decoder = new_decoder(name)
    stay = {TEMPORAL: "U.1.0", FRAME: "U.1.0", CAUSAL: "U.0.0"}[name]
    return decoder.without([unit for unit in decoder.removable if unit != stay])


def largest_activation(decoder: VAEDecoder, call: Callable[[], object]) -> int:
    """Elements of the largest output of a layer of the up blocks or after them, during the call."""
    sizes = [0]
    hooks = [
        layer.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
        for path, layer in decoder.decoder.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)) and path.split(".")[0] not in BEFORE
    ]
    call()
    for hook in hooks:
        hook.remove()
    return max(sizes)


def test_an_axis_is_covered_once_and_the_halo_ends_at_the_edge() -> None:
    found = spans(10, 4, 3)
    assert [(s.core, s.core_end) for s in found] == [(0, 4), (4, 8), (8, 10)]
    assert [(s.first, s.last) for s in found] == [(0, 7), (1, 10), (5, 10)]
    assert [(s.first, s.last) for s in spans(10, None, 3)] == [(0, 10)]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "compressed"])
@pytest.mark.parametrize("name", CLASSES)
def test_tiles_equal_the_whole(name: str, whole: bool) -> None:
    decoder = new_decoder(name) if whole else compressed(name)
    latents = latents_of(frames=2, side=9 if whole else 12)
    at_once = decoder(latents)
    torch.testing.assert_close(decoded_in_pieces(decoder, latents, tile=6), at_once, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", [TEMPORAL, FRAME])
def test_frames_some_at_a_time_equal_the_whole(name: str) -> None:
    decoder, latents = compressed(name), latents_of(frames=14, side=3, batch=2)
    assert 2 * reach_of(decoder).frames < 14
    at_once = decoder(latents)
    torch.testing.assert_close(decoded_in_pieces(decoder, latents, frames=3), at_once, rtol=0, atol=2e-5)
    if name == FRAME:  # its norms look at single frames
        one_pass = decoded_in_pieces(decoder, latents, frames=3, exact=False)
        torch.testing.assert_close(one_pass, at_once, rtol=0, atol=2e-5)


def test_statistics_of_pieces_alone_are_nearly_equal() -> None:
    decoder, latents = compressed(TEMPORAL), latents_of(frames=16, side=12)
    at_once = decoder(latents)
    nearly = decoded_in_pieces(decoder, latents, frames=8, tile=6, exact=False)
    error = (nearly - at_once).abs().mean() / at_once.abs().mean()
    assert 1e-4 < error < 0.3


def test_a_halo_that_is_too_small_shows() -> None:
    decoder, latents = compressed(CAUSAL), latents_of(frames=2, side=20)
    near = decoded_in_pieces(decoder, latents, tile=8, halo=Reach(0, 0))
    assert (near - decoder(latents)).abs().max() > 1e-2


@pytest.mark.parametrize("name", CLASSES)
def test_the_largest_activation_does_not_grow_with_the_clip(name: str) -> None:
    decoder = compressed(name)

    def most(frames: int, side: int) -> tuple[int, int]:
        latents = latents_of(frames, side)
        halo = Reach(1, 1)
        in_pieces = partial(decoded_in_pieces, decoder, latents, frames=2, tile=4, halo=halo, exact=False)
        return largest_activation(decoder, in_pieces), largest_activation(decoder, lambda: decoder(latents))

    (small, _), (large, at_once) = most(6, 12), most(8, 16)
    assert large == small < at_once / 2

"""Decodes a clip in pieces, tile by tile and some frames at a time, so that memory does not grow with its size.

Layers up to the mid block, whose attention sees a whole frame, run at once: they work at the latents' resolution. The
up blocks run piece by piece, each with as many latents and frames around it as its layers reach (halo), which are cut
off again. What is left to differ from decoding at once are GroupNorms, whose statistics are of a whole frame, and in
SVD's temporal layers of the whole clip. With `exact` they are: every norm is reached once on all pieces before any
piece goes beyond it, which costs a pass up to there. Else pieces have their own statistics: one pass, nearly equal.
Wan's norms have no statistics over places and its causal layers keep what they need of earlier frames, so one pass is
exact.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from vdmini_core.models.decoder import VAEDecoder, unscaled
from vdmini_core.models.graph import answering, first_argument

BEFORE = ("conv_in", "mid_block")


@dataclass(frozen=True)
class Span:
    """Latents `first` to `last` (excluded) of one axis, of which those from `core` to `core_end` are wanted."""

    first: int
    last: int
    core: int
    core_end: int


@dataclass(frozen=True)
class Reach:
    """How many latents around a place the up blocks look at: frames, and pixels of the latents."""

    frames: int
    pixels: int


def reach_of(decoder: VAEDecoder) -> Reach:
    """The up blocks' receptive field to one side, from their convolutions; an upper bound."""
    pixels, frames = 0.0, 0
    for path, layer in decoder.decoder.named_modules():
        if path.split(".")[0] in BEFORE or not isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            continue
        kernel = layer.kernel_size
        pixels += kernel[-1] // 2 / 2 ** decoder.level_of(path)
        frames += kernel[0] // 2 if isinstance(layer, nn.Conv3d) else 0
    return Reach(frames, int(pixels) + 1)


def spans(size: int, step: int | None, halo: int) -> list[Span]:
    """An axis in pieces of `step` with `halo` around each; all of it for None."""
    step = step or size
    starts = range(0, size, step)
    ends = [min(start + step, size) for start in starts]
    return [Span(max(a - halo, 0), min(b + halo, size), a, b) for a, b in zip(starts, ends, strict=True)]


@torch.no_grad()
def decoded_in_pieces(
    decoder: VAEDecoder,
    latents: Tensor,
    *,
    frames: int | None = None,
    tile: int | None = None,
    halo: Reach | None = None,
    exact: bool = True,
) -> Tensor:
    """Latents [B, C, T', h, w] -> clips [B, 3, T, H, W] as the decoder answers them, at most a piece at a time.

    A piece is `frames` latents long and `tile` latents wide and high, None for all. `halo` is `reach_of(decoder)`;
    smaller ones are quicker and only nearly equal. A causal decoder takes one latent frame at a time in any case.
    """
    return torch.cat([_Pieces(decoder, clip, frames, tile, halo, exact).decoded() for clip in latents.split(1)])


class _Pieces:
    """One clip, its hidden state after the mid block, and the statistics of norms as far as they are known."""

    def __init__(
        self,
        decoder: VAEDecoder,
        latents: Tensor,
        frames: int | None,
        tile: int | None,
        halo: Reach | None,
        exact: bool,
    ) -> None:
        halo = halo or reach_of(decoder)
        self.decoder, self.exact = decoder, exact
        self.hidden = _before(decoder, latents)
        length, height, width = self.hidden.shape[2:]
        in_time = spans(length, None if decoder.row.causal else frames, halo.frames)
        self.pieces = list(product(in_time, spans(height, tile, halo.pixels), spans(width, tile, halo.pixels)))
        self.norms = [m for m in decoder.decoder.modules() if isinstance(m, nn.GroupNorm)]
        self.known: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.sums: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = {}
        self.current = self.pieces[0]

    def decoded(self) -> Tensor:
        """The clip [1, 3, T, H, W]."""
        if len(self.pieces) == 1:
            return self._run(self.pieces[0])
        while self.exact and self._next_statistics():
            pass
        clip: Tensor | None = None
        for piece in self.pieces:
            part = self._run(piece)
            times, rows, columns = piece
            scale = part.shape[-1] // (columns.last - columns.first)
            if clip is None:
                length, height, width = self.hidden.shape[2:]
                length = part.shape[2] if self.decoder.row.causal else length
                clip = part.new_empty(*part.shape[:2], length, height * scale, width * scale)
            when = slice(None) if self.decoder.row.causal else slice(times.core, times.core_end)
            high, wide = (slice(span.core * scale, span.core_end * scale) for span in (rows, columns))
            clip[..., when, high, wide] = part[(..., *self._core(part))]
        assert clip is not None
        return clip

    def _core(self, part: Tensor) -> tuple[slice, slice, slice]:
        """Where the wanted places of the current piece lie in what was computed of it, [..., T, H, W]."""
        times, *sides = self.current
        scale = part.shape[-1] // (sides[1].last - sides[1].first)
        causal = self.decoder.row.causal  # never cut in time, where it may have more frames than latents
        when = slice(None) if causal else slice(times.core - times.first, times.core_end - times.first)
        rows, columns = (slice((s.core - s.first) * scale, (s.core_end - s.first) * scale) for s in sides)
        return when, rows, columns

    def _run(self, piece: tuple[Span, Span, Span]) -> Tensor:
        """A piece with its halo through the up blocks."""
        self.current = piece
        t, y, x = piece
        part = self.hidden[:, :, t.first : t.last, y.first : y.last, x.first : x.last]
        with _after(self.decoder), ExitStack() as stack:
            for norm in self.norms if self.exact and len(self.pieces) > 1 else ():
                stack.enter_context(answering(norm, partial(self._normalised, norm)))
            return self.decoder.row.decode(self.decoder.model, part)

    def _next_statistics(self) -> bool:
        """Take the next norm's statistics over all pieces; False when all are known."""
        for piece in self.pieces:
            try:
                self._run(piece)
            except _Reached:
                continue
            return False
        ((norm, (total, squares, count)),) = self.sums.items()
        mean = total / count
        self.known[norm] = mean, (squares / count - mean**2).clamp_min(0)
        self.sums.clear()
        return True

    def _normalised(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """The norm with the clip's statistics; where they are not known yet, adds the piece's part and stops.

        x is [T, C, h, w], each frame with statistics of its own, or [1, C, T, h, w], with one for all frames.
        """
        singles = x.transpose(0, 1)[None] if x.ndim == 4 else x
        t = self.current[0]
        if norm not in self.known:
            groups = singles.double().unflatten(1, (norm.num_groups, -1))
            core = groups[(..., *self._core(groups))]
            over = (0, 2, 4, 5) if x.ndim == 4 else (0, 2, 3, 4, 5)
            found = [value.sum(over, keepdim=True)[0, :, 0] for value in (core, core**2, torch.ones_like(core))]
            if x.ndim == 4:  # by frames of the clip
                whole = [value.new_zeros(len(value), self.hidden.shape[2], 1, 1) for value in found]
                for value, part in zip(whole, found, strict=True):
                    value[:, t.core : t.core_end] = part
                found = whole
            before = self.sums.get(norm)
            self.sums[norm] = tuple(a + b for a, b in zip(before, found, strict=True)) if before else tuple(found)  # type: ignore[assignment]
            raise _Reached
        mean, variance = self.known[norm]
        if x.ndim == 4:
            mean, variance = mean[:, t.first : t.last], variance[:, t.first : t.last]
        mean, scale = mean[None, :, None], (variance + norm.eps).rsqrt()[None, :, None]
        out = ((singles.unflatten(1, (norm.num_groups, -1)) - mean) * scale).flatten(1, 2).to(x.dtype)
        shape = (1, -1, 1, 1, 1)
        out = out * norm.weight.view(shape) + norm.bias.view(shape)
        return out[0].transpose(0, 1) if x.ndim == 4 else out  # type: ignore[no-any-return]


class _Reached(Exception):
    """A norm whose statistics are not known was reached."""


def _before(decoder: VAEDecoder, latents: Tensor) -> Tensor:
    """The hidden state [1, C, T', h, w] that enters the up blocks; a causal decoder's, of all frames at once."""
    network, model = decoder.decoder, decoder.model
    found: list[Tensor] = []

    def stop(x: Tensor, *args: Any, **named: Any) -> Tensor:
        found.append(x)
        raise _Reached

    own = unscaled(model, latents)
    if decoder.row.causal:
        return network.mid_block(network.conv_in(model.post_quant_conv(own)))  # type: ignore[no-any-return]
    try:
        with answering(network.up_blocks[0], stop):
            decoder.row.decode(model, own)
    except _Reached:
        pass
    return found[0].transpose(0, 1)[None]


@contextmanager
def _after(decoder: VAEDecoder) -> Iterator[None]:
    """Within the context the decoder takes the hidden state that enters the up blocks in place of latents."""
    with ExitStack() as stack:
        for name in BEFORE:
            stack.enter_context(answering(getattr(decoder.decoder, name), first_argument))
        if getattr(decoder.model, "post_quant_conv", None) is not None:
            stack.enter_context(answering(decoder.model.post_quant_conv, first_argument))
        yield

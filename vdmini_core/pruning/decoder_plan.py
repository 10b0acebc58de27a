"""Which units of a VAE decoder go, and what share of channels stays at each resolution, within a budget of time.

One integer programme (pruning/integer_programme.py) decides both. Channels of a resolution are cut into slabs, from all
to the least share that was timed; a slab goes after those above it. A unit's time at the least share goes with the
unit, what a slab adds to it with either of the two: a product of two decisions, which is a variable of its own that is
kept exactly where both are. An upsampler reads at one resolution and writes at the next; its time is taken to be the
product of what each side contributes. Damages add up, as in every plan here; those of channels count `channel_weight`,
because training recovers them sooner than missing layers (docs/decoder.md has the trial).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise, product

from vdmini_core.artifacts import DecoderPlan, DecoderSensitivity
from vdmini_core.evaluation.decoder_costs import INPUT, OUTPUT, count_decoder, decoder_parameters
from vdmini_core.models import IllegalPlan
from vdmini_core.models.decoder import VAEDecoder
from vdmini_core.models.removal import Rule
from vdmini_core.pruning.decoder_channels import decoder_channels, shares_for
from vdmini_core.pruning.decoder_sensitivity import SHARES
from vdmini_core.pruning.integer_programme import Expense, Graph, least_damage
from vdmini_core.settings import DecoderSettings

PAPER_PARAMETERS = 39.17 / 63.58
"""What the paper leaves of SVD's decoder (appendix A)."""
Choice = tuple[list[str], list[float]]
"""Units that go, and the share of channels of each resolution"""
REST = "rest"
LEAST = len(SHARES) - 1


def level_of_part(name: str, levels: int) -> int:
    """The resolution that a part works at; an upsampler's input."""
    if name in (OUTPUT, REST):
        return levels - 1
    return 0 if name in (INPUT, "M") else int(name.split(".")[1])


def times_of(found: DecoderSensitivity) -> dict[str, list[float]]:
    """The table of a sensitivity, see `times_table`."""
    parts = {str(share): {part.name: part.time_ms[str(share)] for part in found.parts} for share in SHARES}
    return times_table(parts, found.whole_ms)


def times_table(parts: Mapping[str, Mapping[str, float]], whole: Mapping[str, float]) -> dict[str, list[float]]:
    """Part -> milliseconds at each of SHARES, never more for fewer channels; `rest` is what no part has.

    From the times of each share's parts and of whole calls.
    """
    table = {name: [parts[str(share)][name] for share in SHARES] for name in parts[str(SHARES[0])]}
    table[REST] = [max(whole[str(share)] - sum(parts[str(share)].values()), 0.0) for share in SHARES]
    for times in table.values():
        for index in range(1, len(times)):
            times[index] = min(times[index], times[index - 1])
    return table


def predicted_ms(found: DecoderSensitivity, removed: Sequence[str], shares: Sequence[float]) -> float:
    """Time of decoding one clip without units, with these shares of channels."""
    return predicted_of(times_of(found), removed, shares)


def predicted_of(table: Mapping[str, Sequence[float]], removed: Sequence[str], shares: Sequence[float]) -> float:
    """The same from a table of times; between the shares that were timed it is interpolated."""
    total, levels = 0.0, len(shares)
    for name, times in table.items():
        if name in removed:
            continue
        level = level_of_part(name, levels)
        own = interpolated(times, shares[level])
        total += own if not name.endswith(".up") else (own * interpolated(times, shares[level + 1])) ** 0.5
    return total


def interpolated(times: Sequence[float], share: float) -> float:
    """A part's time at a share of channels, linear between those of SHARES and to nothing below them."""
    points = [*zip(SHARES, times, strict=True), (0.0, 0.0)]
    for (high, at_high), (low, at_low) in pairwise(points):
        if share >= low:
            return at_low + (at_high - at_low) * (share - low) / (high - low)
    raise IllegalPlan(f"a share of channels is {share}; expected above 0 and at most 1")


def optimal(decoder: VAEDecoder, settings: DecoderSettings, found: DecoderSensitivity | None) -> Choice:
    """The units that go and the shares that stay, of least damage within `ratio` of the original's time."""
    if found is None:
        raise IllegalPlan("decoder.method optimal needs measured damages and times; here use paper or manual")
    programme = _Slabs(decoder, found, settings.channel_weight)
    graph = Graph(tuple(programme.damage), tuple(programme.rules))
    expense = Expense("decoding time", programme.whole, programme.cost)
    gone = set(least_damage(graph, programme.damage, expense, settings.ratio))
    shares = [
        SHARES[sum(slab_name(level, step) in gone for step in range(1, LEAST + 1))] for level in range(decoder.levels)
    ]
    return [name for name in decoder.removable if name in gone], shares


def slab_name(level: int, step: int) -> str:
    """The channels of a resolution between two neighbouring shares; step 1 lies between all and the next share."""
    return f"channels {level}, {SHARES[step]}"


class _Slabs:
    """The programme's variables with their damages and costs, and its rules."""

    def __init__(self, decoder: VAEDecoder, found: DecoderSensitivity, channel_weight: float) -> None:
        self.levels, self.channel_weight = decoder.levels, channel_weight
        self.damage: dict[str, float] = {}
        self.cost: dict[str, float] = {}
        self.rules: list[Rule] = []
        times = times_of(found)
        for part in found.parts:
            if part.name in decoder.removable:
                assert part.damage is not None
                self._variable(part.name, part.damage)
        for level in range(self.levels):
            self._channels(level, found)
        for name, of in times.items():
            level = level_of_part(name, self.levels)
            if name.endswith(".up"):
                self._upsampler(name, level, [time**0.5 for time in of])
            elif name in self.damage:
                self.cost[name] += of[LEAST]
                for step, more in self._steps(of):
                    self._both(name, slab_name(level, step), more)
            else:
                for step, more in self._steps(of):
                    self.cost[slab_name(level, step)] += more
        self.whole = sum(of[0] for of in times.values())

    def _variable(self, name: str, damage: float) -> None:
        self.damage[name], self.cost[name] = damage, 0.0

    @staticmethod
    def _steps(of: Sequence[float]) -> Iterator[tuple[int, float]]:
        """What each slab adds."""
        return ((step, of[step - 1] - of[step]) for step in range(1, LEAST + 1))

    def _channels(self, level: int, found: DecoderSensitivity) -> None:
        """The slabs of a resolution; each adds its damage to that of those above it."""
        before = 0.0
        for step in range(1, LEAST + 1):
            score = next(s for s in found.channels if (s.level, s.share) == (level, SHARES[step]))
            self._variable(slab_name(level, step), self.channel_weight * max(score.damage - before, 0.0))
            before = max(score.damage, before)
            if step > 1:
                order = {slab_name(level, step): 1, slab_name(level, step - 1): -1}
                self.rules.append(Rule(order, 0, 1, lambda removed: "takes channels out of order"))

    def _both(self, one: str, other: str, cost: float) -> None:
        """A variable that is kept exactly where both others are."""
        name = f"{one} & {other}"
        self._variable(name, 0.0)
        self.cost[name] = cost

        def broken(removed: object) -> str:
            return f"separates {name} from its parts"

        self.rules.append(Rule({name: 1, one: -1, other: -1}, -1, 1, broken))
        self.rules += [Rule({part: 1, name: -1}, 0, 1, broken) for part in (one, other)]

    def _upsampler(self, name: str, level: int, roots: Sequence[float]) -> None:
        """Time is the product of the roots at the share of its inputs and at that of its outputs."""
        for side in (level, level + 1):
            for step, more in self._steps(roots):
                self.cost[slab_name(side, step)] += roots[LEAST] * more
        for (a, more_a), (b, more_b) in product(self._steps(roots), self._steps(roots)):
            self._both(slab_name(level, a), slab_name(level + 1, b), more_a * more_b)


def paper(decoder: VAEDecoder, settings: DecoderSettings, found: DecoderSensitivity | None) -> Choice:
    """No mid block, one layer in the last block, then channels, most at the pixels' resolution, to .616 of the size."""
    last = f"U.{decoder.levels - 1}"
    removed = [name for name in decoder.removable if name == "M" or name.startswith(f"{last}.")]
    if len(removed) > 1 and not [u for u in decoder.units if u.block == last and u.name not in removed]:
        removed.remove(f"{last}.0")  # where all of the block's layers could go, the first stays as in the paper
    size = round(PAPER_PARAMETERS * decoder_parameters(decoder))
    return removed, list(shares_for(decoder_channels(decoder.on_meta().without(removed)), size))


def manual(decoder: VAEDecoder, settings: DecoderSettings, found: DecoderSensitivity | None) -> Choice:
    """Exactly `decoder.remove` and `decoder.shares`."""
    return list(decoder.check(settings.remove)), list(settings.shares or (1.0,) * decoder.levels)


Method = Callable[[VAEDecoder, DecoderSettings, DecoderSensitivity | None], Choice]
METHODS: dict[str, Method] = {"optimal": optimal, "paper": paper, "manual": manual}


def make_decoder_plan(
    decoder: VAEDecoder, settings: DecoderSettings, shape: Sequence[int], found: DecoderSensitivity | None = None
) -> DecoderPlan:
    """Choose, and count on the meta device what is left; IllegalPlan with the reason where nothing fits.

    `shape` of the latents [B, C, T', h, w] that FLOPs are counted for; without a sensitivity no time is predicted.
    """
    twin = decoder.on_meta()
    removed, shares = METHODS[settings.method](twin, settings, found)
    small = decoder_channels(twin.without(removed)).narrowed(shares)
    before, after = (count_decoder(one, tuple(shape))[0] for one in (twin, small))
    everything = (1.0,) * len(shares)
    return DecoderPlan(
        method=settings.method,
        removed=tuple(removed),
        shares=tuple(shares),
        layout=(twin.layout(), small.layout()),
        parameters=(decoder_parameters(twin), decoder_parameters(small)),
        flops=(before, after),
        predicted_ms=None
        if found is None
        else (predicted_ms(found, (), everything), predicted_ms(found, removed, shares)),
    )


def compressed(decoder: VAEDecoder, plan: DecoderPlan) -> VAEDecoder:
    """The decoder that the plan leaves, weights inherited."""
    return decoder_channels(decoder.without(plan.removed)).narrowed(plan.shares)


def describe_decoder_plan(plan: DecoderPlan) -> str:
    """The plan as a few lines of markdown."""
    (teacher, student), (before, after) = plan.parameters, plan.flops
    lines = [
        f"Decoder plan `{plan.method}`: {teacher:,} -> {student:,} parameters ({1 - student / teacher:.1%} fewer), "
        f"{before / 1e9:,.1f} -> {after / 1e9:,.1f} GFLOPs a clip ({after / before:.3f})",
        "",
        f"- removed: {', '.join(plan.removed) or 'nothing'}",
        f"- channels kept, from latents to pixels: {', '.join(f'{share:.3g}' for share in plan.shares)}",
        f"- layout: {plan.layout[0]}",
        f"- left: {plan.layout[1]}",
    ]
    if plan.predicted_ms is not None:
        whole, left = plan.predicted_ms
        lines.append(f"- predicted: {whole:.2f} -> {left:.2f} ms a clip ({left / whole:.3f})")
    return "\n".join(lines) + "\n"

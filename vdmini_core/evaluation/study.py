"""Studies: networks trained or pruned in several ways, judged alike; means over seeds, paired differences, ranking.

A study has arms. An arm is a way to get a pruned student and the losses it is trained with; it is trained once a seed.
Arms share the seeds, and with them the clips, noise levels and noise of every step, so differences are taken seed by
seed. The paper (arXiv 2411.18375, Tables 3 and 4) trained every arm once.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field
from scipy.stats import kendalltau, spearmanr
from scipy.stats import t as student_t

from vdmini_core.artifacts import Plan, Provenance, Quality, Record
from vdmini_core.evaluation.quality import score
from vdmini_core.settings import DistillSettings, Settings

TEACHER = "teacher"
MEASURES = {
    "content_accuracy": "content accuracy",
    "motion_accuracy": "motion accuracy",
    "content_distance": "content distance",
    "motion_distance": "motion distance",
}
LEVEL = 0.95
STAGE, UNITS = "prune", "units"
"""Methods of an arm besides those of pruning/baselines.py: the student of stage prune, and one without `removed`."""


class Arm(Settings):
    """A way to get a student, and whether the ICD and the MCA loss train it, with the weights of params.yaml."""

    name: str
    method: str = STAGE
    removed: tuple[str, ...] = Field((), description="method units")
    icd: bool = True
    mca: bool = True
    predicted: float | None = Field(None, description="damage that a planner expects; less is better")


LOSSES = (
    Arm(name="task", icd=False, mca=False),
    Arm(name="task+icd", mca=False),
    Arm(name="task+mca", icd=False),
    Arm(name="task+icd+mca"),
)
"""The ablation of the losses, on the one student of stage prune."""
PAPER = Arm(name="paper", method="paper")
CONTROLS = tuple(
    Arm(name=name, method=name) for name in ("uniform", "random", "magnitude", "depgraph-l2", "depgraph-taylor")
)


class Candidate(Record):
    """A plan that may be worth a training: what it removes, and the damage that its planner predicts, if it does."""

    name: str
    removed: tuple[str, ...]
    predicted: float | None = None


class Candidates(Record):
    """Plans for the same budget, the best first."""

    plans: tuple[Candidate, ...] = Field(min_length=1)


def comparison_arms(plan: Plan, further: Sequence[Candidate] = ()) -> tuple[Arm, ...]:
    """The paper's layout, the current run's plan if its method is another, `further` plans, and the baselines.

    The baselines are those of the paper's Table 3.
    """
    own = () if plan.method in {arm.name for arm in (PAPER, *CONTROLS)} else (_as_it_is(plan.method, plan.removed),)
    return PAPER, *own, *(_as_it_is(each.name, each.removed) for each in further), *CONTROLS


def _as_it_is(name: str, removed: tuple[str, ...]) -> Arm:
    return Arm(name=name, method=UNITS, removed=removed)


def probe_arms(candidates: Candidates, top: int) -> tuple[Arm, ...]:
    """The paper's layout and the first `top` candidates, those with its name left out."""
    chosen = [plan for plan in candidates.plans if plan.name != PAPER.name][:top]
    return PAPER, *(
        Arm(name=plan.name, method=UNITS, removed=plan.removed, predicted=plan.predicted) for plan in chosen
    )


@dataclass(frozen=True)
class Part:
    """One network to judge: an arm's after a training, or before any (`seed` None); without an arm the teacher."""

    arm: Arm | None
    seed: int | None

    @property
    def label(self) -> str:
        """The arm's name, or what an untrained network is called."""
        if self.arm is None:
            return TEACHER
        if self.seed is not None:
            return self.arm.name
        return "pruned" if self.arm.method == STAGE else f"{self.arm.name}-pruned"


class Study(Settings):
    """What is compared and how large it is; everything else is that of params.yaml. The first arm is the base."""

    kind: Literal["ablation", "comparison", "probe"]
    arms: tuple[Arm, ...] = Field(min_length=1)
    seeds: int = Field(3, ge=1, description="trainings of every arm; the first seed is distill.loop.seed")
    steps: int = Field(gt=0, description="of every training")
    clips: int = Field(gt=1, description="on which every student is judged")

    def parts(self, first_seed: int) -> dict[str, Part]:
        """Every row by its name: the untrained networks first, then the arms of one seed after the other."""
        untrained = [Part(None, None), *(Part(arm, None) for arm in self.arms)]
        found = {part.label: part for part in untrained}
        for seed in range(first_seed, first_seed + self.seeds):
            found |= {f"{arm.name}-seed{seed}": Part(arm, seed) for arm in self.arms}
        return found

    def check(self, settings: DistillSettings) -> None:
        """ValueError where two arms would be the same, or an arm's settings do not go together."""
        if len({arm.name for arm in self.arms}) < len(self.arms):
            raise ValueError(f"names of arms have to differ: {', '.join(arm.name for arm in self.arms)}")
        for name, used in (("icd_weight", {a.icd for a in self.arms}), ("mca_weight", {a.mca for a in self.arms})):
            if len(used) > 1 and getattr(settings, name) == 0:
                raise ValueError(
                    f"distill.{name} is 0 in params.yaml, so arms with and without this loss would be the same; set it "
                    "to the weight that is to be compared with 0"
                )
        for arm in self.arms:
            self.arm_settings(settings, arm, settings.loop.seed)

    def arm_settings(self, settings: DistillSettings, arm: Arm, seed: int) -> DistillSettings:
        """The settings of one training: `settings` but for its length, its seed and the losses the arm is without.

        Raises pydantic's ValidationError, a ValueError, where those do not go together.
        """
        return DistillSettings.model_validate(
            {
                **settings.model_dump(),
                "loop": {**settings.loop.model_dump(), "seed": seed, "max_steps": self.steps},
                "icd_weight": settings.icd_weight if arm.icd else 0.0,
                "mca_weight": settings.mca_weight if arm.mca else 0.0,
            }
        )


class StudyRow(Record):
    """One judged network; `seed` is None and `steps` 0 where nothing was trained.

    `fingerprint` names everything the row depends on: another one means that it has to be made again.
    """

    arm: str
    seed: int | None
    steps: int
    parameters: int
    quality: Quality
    protocol: dict[str, Any]
    protocol_digest: str
    fingerprint: str
    provenance: Provenance


class Interval(Record):
    """A mean over seeds with its two-sided 95% t-interval, None for one seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


class ArmResult(Record):
    """What an arm reaches, and by how much that differs from the base, by measure; {} for the base itself.

    `parameters` is a mean, rounded: arms may have another student each seed.
    """

    arm: str
    parameters: int
    means: dict[str, Interval]
    differences: dict[str, Interval]


class StudyReport(Record):
    """The result; measures that the clips have no labels for are left out. `references` are the untrained networks."""

    study: dict[str, Any]
    protocol: dict[str, Any]
    protocol_digest: str
    references: dict[str, Quality]
    arms: tuple[ArmResult, ...]
    rows: tuple[StudyRow, ...]
    provenance: Provenance


def interval(values: Sequence[float]) -> Interval:
    """Mean and mean +- t_{.975, n - 1} s / sqrt(n), s the sample standard deviation."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean=mean, low=None, high=None, seeds=len(values))
    quantile = float(student_t.ppf((1 + LEVEL) / 2, len(values) - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean=mean, low=mean - half, high=mean + half, seeds=len(values))


def study_report(rows: Sequence[StudyRow], study: Study, provenance: Provenance) -> StudyReport:
    """Put the rows together; ValueError where they were not judged alike."""
    first = rows[0]
    for row in rows:
        if row.protocol_digest != first.protocol_digest:
            raise ValueError(
                f"the row of {row.arm}, seed {row.seed}, was judged by another protocol than that of {first.arm}; "
                f"run the {study.kind} again"
            )
    found = {(row.arm, row.seed): row for row in rows}
    seeds = sorted({row.seed for row in rows if row.seed is not None})
    measures = [name for name in MEASURES if all(getattr(row.quality, name) is not None for row in rows)]
    base = study.arms[0].name

    def of_seeds(arm: str, measure: str) -> list[float]:
        return [float(getattr(found[arm, seed].quality, measure)) for seed in seeds]

    def differences(arm: str, measure: str) -> list[float]:
        return [a - b for a, b in zip(of_seeds(arm, measure), of_seeds(base, measure), strict=True)]

    return StudyReport(
        study=study.model_dump(mode="json"),
        protocol=first.protocol,
        protocol_digest=first.protocol_digest,
        references={row.arm: row.quality for row in rows if row.seed is None},
        arms=tuple(
            ArmResult(
                arm=name,
                parameters=round(statistics.mean(found[name, seed].parameters for seed in seeds)),
                means={measure: interval(of_seeds(name, measure)) for measure in measures},
                differences={} if name == base else {m: interval(differences(name, m)) for m in measures},
            )
            for name in (arm.name for arm in study.arms)
        ),
        rows=tuple(rows),
        provenance=provenance,
    )


def study_metrics(report: StudyReport) -> dict[str, float]:
    """The means and the differences of the arms, for a tracker; MLflow takes no + in a name."""
    found: dict[str, float] = {}
    for arm in report.arms:
        name = arm.arm.replace("+", "-")
        for kind, values in (("mean", arm.means), ("difference", arm.differences)):
            found |= {f"{report.study['kind']}/{measure}/{kind}/{name}": v.mean for measure, v in values.items()}
    return found


class Agreement(Record):
    """Rank correlations of two orders of the same plans, 1 for the same order; None where there is none to compare."""

    kendall: float | None
    spearman: float | None
    plans: int


class Ranked(Record):
    """One plan before and after its recovery: the damage that was predicted, and the scores of what it generates."""

    name: str
    removed: tuple[str, ...]
    predicted: float | None
    pruned: float
    recovered: float


class Ranking(Record):
    """The plans of a probe, the best after recovery first, and whether that was to be seen before.

    Scores are those by which a validation chooses weights; a higher one is better.
    """

    plans: tuple[Ranked, ...]
    predicted_against_recovered: Agreement
    pruned_against_recovered: Agreement
    winner: str
    steps: int


def rank(report: StudyReport, removed: Mapping[str, tuple[str, ...]]) -> Ranking:
    """Order the plans of a probe by what they score after recovery, a mean over seeds; of equals the first listed.

    `removed` are the units that every arm is without.
    """
    teacher, study = report.references[TEACHER], Study.model_validate(report.study)
    plans = []
    for arm in study.arms:
        recovered = [score(row.quality, teacher) for row in report.rows if row.arm == arm.name]
        plans.append(
            Ranked(
                name=arm.name,
                removed=removed[arm.name],
                predicted=arm.predicted,
                pruned=score(report.references[Part(arm, None).label], teacher),
                recovered=statistics.mean(recovered),
            )
        )
    plans.sort(key=lambda plan: -plan.recovered)
    foreseen = [(-plan.predicted, plan.recovered) for plan in plans if plan.predicted is not None]
    return Ranking(
        plans=tuple(plans),
        predicted_against_recovered=agreement(foreseen),
        pruned_against_recovered=agreement([(plan.pruned, plan.recovered) for plan in plans]),
        winner=plans[0].name,
        steps=study.steps,
    )


def agreement(pairs: Sequence[tuple[float, float]]) -> Agreement:
    """Kendall's tau-b and Spearman's rho of pairs, in both of which more is better."""
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if len(set(first)) < 2 or len(set(second)) < 2:
        return Agreement(kendall=None, spearman=None, plans=len(pairs))
    return Agreement(
        kendall=float(kendalltau(first, second).statistic),
        spearman=float(spearmanr(first, second).statistic),
        plans=len(pairs),
    )

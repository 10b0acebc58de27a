"""The plan of the house: one name a stage, everywhere; and DVC is told of all the code that makes a result."""

import ast
from collections.abc import Iterator
from pathlib import Path

import yaml

from flows.shared_scratch import SCRATCH
from tasks._stage import STAGES, params_of
from vdmini_core.artifacts import RecoveryRow, ValidationRow
from vdmini_core.evaluation.plots import CURVES
from vdmini_core.models.sources import evaluator_folder
from vdmini_core.settings import load_params

ROOT = Path(__file__).parent.parent
RECIPE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
NO_RESULT = {
    "tasks/_tracking.py": "tells MLflow what happened",
    "tasks/_journal.py": "keeps what MLflow is told",
    "vdmini_core/reporting.py": "hands on progress and numbers to who shows them",
    "vdmini_core/evaluation/compare.py": "evaluate's and register's own; trainings take from it a picture's colours",
}
"""Modules that an import alone makes no dependency of a stage, and why: an edit there must not train anew."""


def test_modules_stages_and_sections_have_the_same_names_in_the_same_order() -> None:
    modules = {path.stem for path in (ROOT / "tasks").glob("*.py") if not path.stem.startswith("_")}
    assert modules == set(STAGES)
    assert tuple(RECIPE) == STAGES
    assert tuple(yaml.safe_load((ROOT / "params.yaml").read_text())) == (*STAGES, "resources")


def test_every_stage_has_its_settings() -> None:
    params = load_params(ROOT / "params.yaml")
    assert all(params_of(params, name) is not None for name in STAGES)


def test_every_stage_runs_its_own_module_with_its_own_section() -> None:
    for name, stage in RECIPE.items():
        assert stage["cmd"] == f"vdmini stage {name}"
        assert stage["params"] == [name]
        assert f"tasks/{name}.py" in stage["deps"]


def test_stages_depend_on_earlier_stages_only() -> None:
    for position, stage in enumerate(RECIPE.values()):
        inputs = {Path(dep).parts[1] for dep in stage["deps"] if dep.startswith("artifacts/")}
        assert inputs <= set(STAGES[:position])


def test_every_code_dependency_exists() -> None:
    code = {dep for stage in RECIPE.values() for dep in stage["deps"] if not dep.startswith("artifacts/")}
    assert [dep for dep in sorted(code) if not (ROOT / dep).exists()] == []


def test_dvc_is_told_of_all_the_code_that_a_stage_imports() -> None:
    lacking = {
        f"{name}: {module.relative_to(ROOT)}"
        for name, stage in RECIPE.items()
        for module in imported_by(ROOT / f"tasks/{name}.py")
        if module.stat().st_size and not _is_told(module, stage["deps"])
    }
    assert sorted(lacking) == []
    for name in ("evaluate", "register"):
        assert _is_told(ROOT / "vdmini_core/evaluation/compare.py", RECIPE[name]["deps"])


def test_imports_are_found_wherever_they_stand() -> None:
    found = {str(module.relative_to(ROOT)) for module in imported_by(ROOT / "tasks/distill.py")}
    assert {"vdmini_core/settings.py", "vdmini_core/data/latents.py", "vdmini_core/pruning/surgery.py"} <= found
    (lazy,) = {module for name, module in _imports(ROOT / "tasks/_lineage.py") if name == "tasks._stage"}
    assert lazy == ROOT / "tasks/_stage.py"  # inside a function
    assert not found & set(NO_RESULT)


def test_stages_that_judge_clips_depend_on_the_evaluators_weights() -> None:
    weights = evaluator_folder()
    for name, stage in RECIPE.items():
        own = {ROOT / f"tasks/{name}.py", *imported_by(ROOT / f"tasks/{name}.py")} - {ROOT / "tasks/_inputs.py"}
        text = "\n".join(module.read_text() for module in own if module.parent == ROOT / "tasks")
        if "evaluator(context)" in text or "protocol(context" in text:
            assert _is_told(weights, stage["deps"]), name


def test_stages_whose_scratch_goes_to_other_workers_mark_the_folder_that_they_work_in() -> None:
    assert [name for name in SCRATCH if "half_done(" not in (ROOT / f"tasks/{name}.py").read_text()] == []


def imported_by(module: Path) -> set[Path]:
    """All modules of the project that a module imports, itself or through others, at its head or in a function."""
    found, left = set[Path](), {module}
    while left:
        found |= left
        left = {other for each in left for _, other in _imports(each)} - found
        left = {other for other in left if str(other.relative_to(ROOT)) not in NO_RESULT}
    return found


def _imports(module: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of what a module imports of the project, without what is for types alone."""
    tree = ast.parse(module.read_text())
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    typing = {id(inner) for guard in guards for node in guard.body for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        base = [] if isinstance(node, ast.Import) else [node.module or ""]
        assert not getattr(node, "level", 0), f"{module} imports relatively, which this does not follow"
        for name in [*base, *(".".join([*base, alias.name]) for alias in node.names)]:
            parts = name.split(".")
            for length in range(1, len(parts) + 1) if parts[0] in ("tasks", "vdmini_core") else ():
                place = ROOT.joinpath(*parts[:length])
                for file in (place.with_suffix(".py"), place / "__init__.py"):
                    if file.is_file():
                        yield ".".join(parts[:length]), file


def _is_told(path: Path, deps: list[str]) -> bool:
    return any(ROOT / dep in (path, *path.parents) for dep in deps)


def test_plots_have_the_names_of_mlflows_metrics() -> None:
    """Trainings log losses under the names in history.json, validations a row's fields behind a name of their own."""
    logged = {f"validation/{field}": field for field in ValidationRow.model_fields} | {name: name for name in CURVES}
    logged |= {f"recovery/{field}": field for field in RecoveryRow.model_fields}
    logged |= {"train/decoder/total": "train/decoder/total"}
    plots = {
        name: plot for entry in yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"] for name, plot in entry.items()
    }
    assert set(CURVES) <= set(plots)
    for name, plot in plots.items():
        assert list(plot["y"].values()) == [logged[name]]

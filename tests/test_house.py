"""The plan of the house: one name a stage, everywhere."""

from pathlib import Path

import yaml

from tasks._stage import STAGES, params_of
from vdmini_core.artifacts import RecoveryRow, ValidationRow
from vdmini_core.evaluation.plots import CURVES
from vdmini_core.settings import load_params

ROOT = Path(__file__).parent.parent
RECIPE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


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

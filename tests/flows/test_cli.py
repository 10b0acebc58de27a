"""The command line: what a user reads when something is wrong, and that help needs no heavy imports."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def replace(project: Path, old: str, new: str) -> None:
    text = (project / "params.yaml").read_text()
    assert old in text
    (project / "params.yaml").write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("  icd_weight: 0.1", "  icd_wieght: 0.1", "unknown key 'distill.icd_wieght'"),
        ("    max_steps: ", "    max_steps: many # ", "distill.loop.max_steps"),
        ("method: paper", "method: magic", "plan.method"),
    ],
)
def test_wrong_params_are_one_paragraph_and_exit_code_2(project: Path, old: str, new: str, told: str) -> None:
    replace(project, old, new)
    result = CliRunner().invoke(app, ["run"])
    assert result.exit_code == 2
    assert "params.yaml" in result.stderr
    assert told in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["stage", "nothing"], "the stages are data, teacher"),
        (["upload", "params.yaml"], "params.yaml is not the journal of a run"),
        (["generate", "--model", "zoo:none", "--image", "x.png", "--out", "y.mp4"], "zoo:i2v-shapes"),
    ],
)
def test_wrong_arguments_name_what_there_is(project: Path, command: list[str], told: str) -> None:
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert told in result.stderr


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ([], "method optimal needs a budget; set ratio"),
        (
            ["--latency-ratio", ".6"],
            "artifacts/sensitivity/report.json does not exist; `vdmini run --target sensitivity`",
        ),
        (["--latency-ratio", ".6", "--flop-ratio", ".5"], "give one of --latency-ratio, --parameter-ratio"),
        (["--flop-ratio", "1.5"], "plan: ratio: Input should be less than or equal to 1, got 1.5"),
        (["--flop-ratio", ".5", "--method", "best"], "plan: method: Input should be 'paper', 'optimal'"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(project: Path, command: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["plan", *command])
    assert result.exit_code == 2
    assert told in result.stderr


def test_settings_explains_every_section(project: Path) -> None:
    output = CliRunner().invoke(app, ["settings"]).stdout
    for key in ("data.source", "distill.loop.max_steps", "register.min_motion_recovery"):
        assert key in output


def test_help_loads_neither_torch_nor_prefect() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from flows.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "assert not {'torch', 'prefect', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

"""Recipes, dry runs and units on the command line: published models' figures from their configs alone."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from typer.testing import CliRunner

from flows.cli import app
from flows.recipes import OWN, headline
from tasks._stage import STAGES
from vdmini_core.models.published import blueprint
from vdmini_core.settings import height_and_width, load_params

RECIPES = {path.stem: path for path in sorted(OWN.glob("*.yaml"))}
BUILT_IN = {"i2v-shapes", "t2v-lcm-shapes", "t2v-wan-shapes"}
every_recipe = pytest.mark.parametrize("name", RECIPES)
FIGURES = {
    "svd-xt": (1_524_623_082, 939_884_186),
    "t2v-turbo-v2": (1_411_397_700, 814_764_420),
    "hunyuan-video": (12_821_012_544, 10_328_952_896),
    "wan-2.1-14b": (14_288_491_584, 11_477_337_152),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def vdmini(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_there_is_a_recipe_for_these_models() -> None:
    models = {
        "svd-xt",
        "t2v-turbo-v2",
        "hunyuan-video",
        "wan-2.1-1.3b",
        "wan-2.1-14b",
        "wan-2.2-ti2v-5b",
        "cogvideox-2b",
    }
    assert set(RECIPES) == models | BUILT_IN


@every_recipe
def test_a_recipe_is_valid_and_its_clips_fit_its_model(name: str) -> None:
    params = load_params(RECIPES[name])
    assert tuple(yaml.safe_load(RECIPES[name].read_text())) == STAGES
    vae = blueprint(params.teacher.source).vae
    assert vae is not None
    assert vae.latent_shape(params.data.frames, *height_and_width(params.data.size))
    assert (params.distill.icd_weight, params.distill.mca_weight) == (0.1, 1.0)
    assert params.evaluate.clips <= params.encode.test_clips


def test_without_a_name_every_recipe_is_one_line(folder: Path) -> None:
    lines = vdmini("recipe").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(line.endswith(headline(RECIPES[line.split()[0]])) and len(line) < 140 for line in lines)


@every_recipe
def test_a_recipe_becomes_params_yaml(folder: Path, name: str) -> None:
    result = vdmini("recipe", name)
    assert result.exit_code == 0
    assert (folder / "params.yaml").read_text() == RECIPES[name].read_text()
    assert f"vdmini dry-run {name}" in result.stdout
    assert ("teacher.revision" in result.stdout) == (name not in BUILT_IN)
    assert [path.name for path in folder.iterdir()] == ["params.yaml"]


def test_what_git_could_not_bring_back_is_not_overwritten(folder: Path) -> None:
    params = folder / "params.yaml"
    params.write_text("mine: 1\n")
    git(folder, "init", "--quiet")

    def refused() -> bool:
        before, result = params.read_text(), vdmini("recipe", "svd-xt")
        assert result.exit_code in (0, 2)
        assert (result.exit_code == 2) == (params.read_text() == before) == ("--force" in result.stderr)
        return bool(result.exit_code)

    assert refused()  # not in git at all
    git(folder, "add", "params.yaml")
    assert refused()  # no commit yet
    git(folder, "commit", "--message", "start")
    params.write_text("mine: 2\n")
    assert refused()
    git(folder, "commit", "--all", "--message", "changed")
    assert not refused()
    assert vdmini("recipe", "wan-2.1-14b").exit_code == 2
    assert vdmini("recipe", "wan-2.1-14b", "--force").exit_code == 0
    assert params.read_text() == RECIPES["wan-2.1-14b"].read_text()


def test_a_params_yaml_outside_git_is_not_overwritten(folder: Path) -> None:
    (folder / "params.yaml").write_text("mine: 1\n")
    assert vdmini("recipe", "svd-xt").exit_code == 2
    assert (folder / "params.yaml").read_text() == "mine: 1\n"


def test_the_working_directorys_recipes_come_first_and_are_validated(folder: Path) -> None:
    own = folder / "recipes" / "svd-xt.yaml"
    own.parent.mkdir()
    own.write_text("# Mine\ndistill: {loop: {max_steps: 1, batch_size: 1}}\n")
    assert "svd-xt           Mine" in vdmini("recipe").stdout
    assert vdmini("recipe", "svd-xt").exit_code == 0
    assert (folder / "params.yaml").read_text().startswith("# Mine")
    own.write_text("distil: {}\n")
    result = vdmini("recipe", "svd-xt", "--force")
    assert result.exit_code == 2
    assert "unknown key 'distil'" in result.stderr
    assert (folder / "params.yaml").read_text().startswith("# Mine")


@pytest.mark.parametrize("command", ["recipe", "dry-run"])
def test_an_unknown_recipe_is_refused_with_the_list(folder: Path, command: str) -> None:
    result = vdmini(command, "sora")
    assert result.exit_code == 2
    assert "there is no recipe 'sora' and no such file; the recipes are cogvideox-2b" in result.stderr


@pytest.mark.parametrize("name", FIGURES)
def test_a_dry_run_gives_the_published_models_figures(name: str) -> None:
    result = vdmini("dry-run", name, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    before, after = FIGURES[name]
    assert (found["teacher_parameters"], found["student_parameters"]) == (before, after)
    assert found["parameter_ratio"] == pytest.approx(after / before)
    assert found["flop_ratio"] == pytest.approx(found["student_flops"] / found["teacher_flops"])
    assert found["reference_parameters"] == (1_413_653_060 if name == "t2v-turbo-v2" else None)
    units = [unit["name"] for unit in found["units"]]
    assert sorted(found["plan"]["kept"] + found["plan"]["removed"]) == sorted(units)
    if found["plan"]["method"] == "uniform":
        assert len(found["plan"]["removed"]) == 0.2 * len(units)
    assert sum(unit["flops"] for unit in found["units"]) < found["teacher_flops"]
    for stage in ("sensitivity", "distillation"):
        assert found["memory_bytes"][stage] == sum(found["memory_parts"][stage].values())
        assert found["memory_parts"][stage]["teacher_weights"] == 4 * before
    assert found["memory_bytes"]["distillation"] > 4 * (before + 5 * after)
    assert found["assumptions"]


def test_a_dry_run_reads_as_text_too() -> None:
    text = vdmini("dry-run", "i2v-shapes").stdout
    assert "5,970,890 -> 3,687,130 (38.25% fewer)" in text
    assert "D.0.1  D.0        0" in text
    assert "with U.3.1" in text
    assert "memory      distillation: " in text


def test_a_dry_run_of_a_file_says_what_does_not_fit(folder: Path) -> None:
    text = RECIPES["wan-2.1-1.3b"].read_text()
    (folder / "mine.yaml").write_text(text.replace("frames: 81", "frames: 80"))
    result = vdmini("dry-run", "mine.yaml", "--json")
    assert result.exit_code == 2
    assert "make them 77 or 81 (data.frames)" in result.stderr
    (folder / "mine.yaml").write_text(text.replace("method: uniform", "method: paper"))
    assert "plan.method paper is a layout of U-Nets" in vdmini("dry-run", "mine.yaml").stderr


def test_units_of_the_built_in_teacher_are_a_json_list() -> None:
    result = vdmini("units", "zoo:i2v-shapes", "--json")
    units = {unit["name"]: unit for unit in json.loads(result.stdout)}
    assert len(units) == 21
    fields = ["name", "block", "depth", "parameters", "flops", "removable_with"]
    assert all(list(unit) == fields for unit in units.values())
    assert units["D.0.1"]["removable_with"] == [["U.3.1"]]
    assert units["D.1.0"]["removable_with"] == []
    assert units["M"]["removable_with"] == [[]]
    assert sum(unit["parameters"] for unit in units.values()) < 5_970_890
    assert all(unit["flops"] > 0 for unit in units.values())
    assert "4 x 8 x 16 x 16" in result.stderr
    assert len({line.find("D.") for line in vdmini("units", "zoo:i2v-shapes").stdout.splitlines()[1:9]}) == 1


def test_units_of_a_hub_id_need_its_config_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {key: value for key, value in blueprint("wan-2.1-1.3b").config.items() if key[0] != "_" or "class" in key}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def download(source: str, path: str) -> str:
        if path != "transformer/config.json":
            raise EntryNotFoundError(f"no {path} in {source}")
        return str(tmp_path / "config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    units = json.loads(vdmini("units", "someone/some-wan", "--json").stdout)
    assert [unit["name"] for unit in units] == [f"block.{index}" for index in range(30)]
    assert {unit["flops"] for unit in units} == {None}


def test_units_of_a_hub_id_without_network_is_one_paragraph(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(source: str, path: str) -> str:
        raise LocalEntryNotFoundError("The hub was not reached. More about that.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    result = vdmini("units", "someone/some-wan", "--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "cannot be fetched from the hub (The hub was not reached.)" in result.stderr
    assert "svd-xt" in result.stderr


def test_units_of_nothing_known_are_refused_with_the_list() -> None:
    result = vdmini("units", "sora")
    assert result.exit_code == 2
    assert "svd-xt" in result.stderr
    assert "zoo:i2v-shapes" in result.stderr

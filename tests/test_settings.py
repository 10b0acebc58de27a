"""params.yaml: the repository's own loads, and every mistake is one line with file and key."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from vdmini_core.settings import LOCAL, Params, load_params

ROOT = Path(__file__).parent.parent
MINIMAL = "distill: {loop: {max_steps: 1, batch_size: 1}}\n"


def error_of(folder: Path, text: str) -> str:
    file = folder / "params.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"params\.yaml") as caught:
        load_params(file)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(file))
    return message


def test_the_repositorys_params_load_and_state_what_they_say() -> None:
    params = load_params(ROOT / "params.yaml")
    written = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert params.distill.loop.max_steps == written["distill"]["loop"]["max_steps"]
    assert params.register_.name == written["register"]["name"]


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(MINIMAL)
    params = load_params(tmp_path / "params.yaml")
    assert params.data.source == "synthetic"
    assert params.plan.method == "paper"


def test_a_stage_runs_here_unless_it_is_placed(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(MINIMAL + "resources: {distill: {pool: gpu, gpus: 4}}\n")
    params = load_params(tmp_path / "params.yaml")
    assert params.resources_of("distill").pool == "gpu"
    assert params.resources_of("evaluate").pool == LOCAL


def test_settings_are_frozen() -> None:
    params = load_params(ROOT / "params.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        params.data.size = 32


def test_the_schema_names_every_section_of_the_file() -> None:
    written = yaml.safe_load((ROOT / "params.yaml").read_text())
    known = {field.alias or name for name, field in Params.model_fields.items()}
    assert set(written) == known


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "data: {sorce: x}\n", "unknown key 'data.sorce'"),
        (MINIMAL + "distil: {}\n", "unknown key 'distil'"),
        ("data: {}\n", "missing key 'distill'"),
        ("distill: {loop: {max_steps: 1}}\n", "missing key 'distill.loop.batch_size'"),
        (MINIMAL + "encode: {train_clips: many}\n", "encode.train_clips: Input should be a valid integer"),
        (MINIMAL + "encode: {train_clips: 1e3}\n", "got '1e3'"),
        (MINIMAL + "encode: {train_clips: 0}\n", "encode.train_clips: Input should be greater than 0, got 0"),
        (MINIMAL + "data: {size: 60}\n", "data.size: Input should be a multiple of 8, got 60"),
        (MINIMAL + "data: {size: [576, 1020]}\n", "data.size: Input should be a multiple of 8, got [576, 1020]"),
        (MINIMAL + "data: {size: [64]}\n", "data.size: Input should be one side, or [height, width]"),
        (MINIMAL + "data: {size: 0}\n", "data.size: Input should be greater than 0, got 0"),
        (
            MINIMAL + "plan: {method: magic}\n",
            "plan.method: Input should be 'paper', 'optimal', 'uniform', 'random' or 'manual', got 'magic'",
        ),
        (
            "distill: {task: magic, loop: {max_steps: 1, batch_size: 1}}\n",
            "distill.task: Input should be 'denoising', 'consistency' or 'one_step', got 'magic'",
        ),
        (
            "distill: {keep: best, loop: {max_steps: 1, batch_size: 1}}\n",
            "Input should be 'last' unless validation.every is above 0 and at most loop.max_steps, got 'best'",
        ),
        (
            "distill: {keep: best, validation: {every: 5}, loop: {max_steps: 4, batch_size: 1}}\n",
            "distill.keep: Input should be 'last' unless",
        ),
        (
            "distill: {keep: best, validation: {every: -1}, loop: {max_steps: 4, batch_size: 1}}\n",
            "distill.validation.every: Input should be greater than or equal to 0, got -1",
        ),
        (MINIMAL + "evaluate: {latency_runs: 3}\n", "evaluate.latency_runs: Input should be greater than or equal to"),
        (MINIMAL + "resources: {decode: {}}\n", "resources: there is no stage decode; there are data, teacher, encode"),
        (MINIMAL + "resources: {distill: {pol: gpu}}\n", "unknown key 'resources.distill.pol'"),
        (MINIMAL + "resources: {plan: {launcher: accelerate}}\n", "resources: only distill runs in several processes"),
        (MINIMAL + "resources: {distill: {nodes: 2}}\n", "resources: several nodes need a launcher"),
        (MINIMAL + "resources: {sensitivity: {parts: 2}}\n", "resources: only sensitivity, on a pool, has parts"),
        (
            MINIMAL + "resources: {register: {pool: gpu}}\n",
            "set register.pool to local. Pools are for data, teacher, encode, sensitivity, plan, prune, distill, "
            "decoder, evaluate",
        ),
        ("- a list\n", "(whole file): "),
        ("", "(whole file): "),
    ],
)
def test_a_mistake_is_one_line_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    assert message in error_of(tmp_path, text)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            "task: one_step, target: teacher",
            "distill: task one_step does not read target teacher; set target to data, or task to denoising",
        ),
        (
            "task: consistency, teacher_draws: 2",
            "distill: teacher_draws keeps answers of the teacher, which task consistency with target data does not "
            "read; set teacher_draws to 0, or task to denoising and target to teacher",
        ),
        (
            "target: teacher, teacher_draws: 2",
            "distill: teacher_draws saves nothing with icd_weight 0.1, for which the teacher runs in every step; set "
            "one of the two to 0",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(tmp_path: Path, keys: str, message: str) -> None:
    error = error_of(tmp_path, f"distill: {{{keys}, loop: {{max_steps: 1, batch_size: 1}}}}\n")
    assert error.endswith(message)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = error_of(tmp_path, "data: {sorce: x, size: big}\n")
    assert "unknown key 'data.sorce'" in message
    assert "data.size: " in message
    assert "missing key 'distill'" in message


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("data: [unclosed\n")
    with pytest.raises(ValueError, match=r"params\.yaml is not valid YAML"):
        load_params(file)


def test_a_missing_file_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; run vdmini from the project's root"):
        load_params(tmp_path / "params.yaml")


def test_a_number_that_yaml_reads_as_text_is_the_number(tmp_path: Path) -> None:
    # YAML 1.1 takes 1e-4 for a string; written so it must not become another value.
    (tmp_path / "params.yaml").write_text("distill: {learning_rate: 1e-4, loop: {max_steps: 1, batch_size: 1}}\n")
    assert load_params(tmp_path / "params.yaml").distill.learning_rate == 1e-4


def test_text_where_a_number_belongs_gets_a_hint_about_yaml(tmp_path: Path) -> None:
    message = error_of(tmp_path, "distill: {learning_rate: 1e-4x, loop: {max_steps: 1, batch_size: 1}}\n")
    assert "distill.learning_rate: Input should be a valid number" in message
    assert "write 1.0e-4" in message

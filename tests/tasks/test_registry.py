"""The model registry, against a real sqlite file."""

from functools import partialmethod
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks._registry import model_tags, register_model, resolve_model
from tasks._tracking import open_tracker


def test_a_registered_folder_is_found_by_alias_and_by_version(
    store: MlflowClient, database: Path, tmp_path: Path
) -> None:
    students = [database / "students" / name for name in ("first", "second")]
    for student in students:
        student.mkdir(parents=True)
    with open_tracker("register", {}, tmp_path) as tracker:
        first = register_model("round-trip", "champion", students[0], {"vdmini.digest": "d1"}, {}, tracker.run_id)
    assert resolve_model("models:/round-trip@champion") == students[0]
    second = register_model("round-trip", "champion", students[1], {"vdmini.digest": "d2"}, {"quality/content": 0.5})
    assert (first, second) == (1, 2)
    assert resolve_model("models:/round-trip@champion") == students[1]
    assert resolve_model("models:/round-trip/1") == students[0]
    tags = model_tags("models:/round-trip@champion")
    assert tags["vdmini.digest"] == "d2"
    assert tags["metric.quality/content"] == "0.5"
    assert tags["vdmini.folder"] == "students/second"
    students[1].rmdir()
    with pytest.raises(FileNotFoundError, match="dvc checkout"):
        resolve_model("models:/round-trip@champion")


def test_what_is_not_registered_is_answered_with_what_is(store: MlflowClient, tmp_path: Path) -> None:
    register_model("known", "champion", tmp_path, {}, {})
    with pytest.raises(LookupError, match=r"no model 'nobody'.*known"):
        resolve_model("models:/nobody@champion")
    with pytest.raises(LookupError, match="aliases champion; versions 1"):
        resolve_model("models:/known/9")
    with pytest.raises(ValueError, match="expected models:/<name>@<alias>"):
        resolve_model("known@champion")


def test_a_model_is_found_behind_as_many_as_one_answer_holds(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "the-last", "the-last"):
        register_model(name, "champion", tmp_path, {}, {})
    for search in ("search_registered_models", "search_model_versions"):
        monkeypatch.setattr(MlflowClient, search, partialmethod(getattr(MlflowClient, search), max_results=1))
    for uri in ("models:/the-last/1", "models:/the-last@champion"):
        assert resolve_model(uri) == tmp_path


def test_a_dead_registry_says_how_to_start_it(dead_server: None, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="vdmini up"):
        register_model("student", "champion", tmp_path, {}, {})
    with pytest.raises(ConnectionError, match="vdmini up"):
        resolve_model("models:/student@champion")

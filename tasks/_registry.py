"""The model registry: versions that point at a folder and carry its digest, not copies of weights.

A version's source is a small JSON pointer in the registering run; the weights stay in the project,
where DVC keeps them. Unlike tracking, a registry that cannot be reached is an error: being asked
for a model, or to publish one, and doing nothing would be a lie.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tasks._tracking import EXPERIMENT, MlflowException, connect, project_root, tracking_uri

FOLDER_TAG = "vdmini.folder"
DIGEST_TAG = "vdmini.digest"
OUTPUTS_TAG = "vdmini.outputs"


@contextmanager
def _registry() -> Iterator[Any]:
    """A client of the registry; what MLflow raises becomes one ConnectionError that says what to do."""
    uri = tracking_uri()
    try:
        yield connect(uri)
    except MlflowException as error:
        raise ConnectionError(
            f"expected a model registry at {uri}, got: {' '.join(str(error).split())[:300]}; "
            "start it with `vdmini up`, or unset MLFLOW_TRACKING_URI to use the project's mlflow.db"
        ) from error


def register_model(
    name: str,
    alias: str,
    source_folder: Path,
    tags: dict[str, str],
    metrics: dict[str, float],
    run_id: str | None = None,
) -> int:
    """Add a version of `name` that points at `source_folder`, move `alias` to it, return its number.

    Put the folder's sha256 into `tags` as "vdmini.digest": a later run may overwrite the folder, and
    the digest is how a reader notices. Metrics become version tags "metric.<name>". `run_id` is the
    registering run (`tracker.run_id`); an MLflow *server* requires it, a sqlite file does not.
    """
    if not source_folder.is_dir():
        raise FileNotFoundError(f"{source_folder} is not a folder; register a stage's output folder")
    if run_id is None and tracking_uri().startswith("http"):
        raise ConnectionError(
            f"expected a run on {tracking_uri()} to register from, got none: the server did not answer, or "
            "refused, when the stage began; start it with `vdmini up`, or set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD for one with accounts, and run the stage again, or unset MLFLOW_TRACKING_URI"
        )
    folder, root = source_folder.resolve(), project_root().resolve()
    place = folder.relative_to(root) if folder.is_relative_to(root) else folder
    facts = {**tags, FOLDER_TAG: str(place)} | {f"metric.{key}": repr(float(value)) for key, value in metrics.items()}
    with _registry() as client:
        source = folder.as_uri()
        if run_id is not None:
            with tempfile.TemporaryDirectory() as scratch:
                pointer = Path(scratch) / "pointer.json"
                pointer.write_text(json.dumps(facts, indent=1) + "\n")
                client.log_artifact(run_id, str(pointer), "model")
            source = f"{client.get_run(run_id).info.artifact_uri}/model"
        if not client.search_registered_models(filter_string=f"name = '{name}'"):
            client.create_registered_model(name, description="Pointers to folders of this project, with digests.")
        version = client.create_model_version(name, source=source, run_id=run_id, tags=facts).version
        client.set_registered_model_alias(name, alias, str(version))
        return int(version)


def find_version(uri: str) -> Any:
    """The version that `models:/<name>@<alias>` or `models:/<name>/<version>` names: its name, version, tags.

    Raises ValueError for another form, LookupError (listing what there is) for an unknown version.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if match is None:
        raise ValueError(f"expected models:/<name>@<alias> or models:/<name>/<version>, got {uri!r}")
    name, alias, number = match.groups()
    with _registry() as client:
        models = {model.name: model for model in _all_pages(client.search_registered_models)}
        if name not in models:
            raise LookupError(f"{uri}: no model {name!r} at {tracking_uri()}; there are: {_names(models)}")
        found = _all_pages(partial(client.search_model_versions, f"name = '{name}'"))
        versions = {str(version.version): version for version in found}
        aliases = {key: str(value) for key, value in (models[name].aliases or {}).items()}
        wanted = aliases.get(alias) if alias else number
        if wanted not in versions:
            known = f"aliases {_names(aliases)}; versions {_names(versions)}"
            raise LookupError(f"{uri}: no such version at {tracking_uri()}; {name!r} has {known}")
        return versions[wanted]


def _all_pages(search: Callable[..., Any]) -> Iterator[Any]:
    """What a search of MLflow's finds, of which an answer holds a page only."""
    token: str | None = None
    while True:
        page = search(page_token=token)
        yield from page
        if not (token := page.token):
            return


def model_tags(uri: str) -> dict[str, str]:
    """The tags of a version; raises as `find_version` does."""
    return dict(find_version(uri).tags)


def run_with_outputs(stage: str, outputs: str) -> tuple[str | None, dict[str, str]]:
    """The newest finished run of a stage whose outputs have this digest, and its tags; None if there is none."""
    with _registry() as client:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return None, {}
        wanted = f"tags.`vdmini.stage` = '{stage}' and tags.`{OUTPUTS_TAG}` = '{outputs}'"
        newest = ["attributes.start_time DESC"]
        runs = client.search_runs([experiment.experiment_id], filter_string=wanted, max_results=1, order_by=newest)
        return (runs[0].info.run_id, dict(runs[0].data.tags)) if runs else (None, {})


def resolve_model(uri: str) -> Path:
    """The local folder of a registered version; compare its content with `model_tags(uri)["vdmini.digest"]`.

    Raises FileNotFoundError if the folder is gone, ValueError and LookupError as `model_tags` does.
    """
    tags = model_tags(uri)
    if FOLDER_TAG not in tags:
        raise ValueError(f"{uri} has no tag {FOLDER_TAG!r}: it was not registered by this project's register stage")
    folder = project_root() / tags[FOLDER_TAG]
    if not folder.is_dir():
        raise FileNotFoundError(f"{uri} points at {folder}, which does not exist here; `dvc checkout` or `dvc pull` it")
    return folder


def _names(values: dict[str, Any]) -> str:
    return ", ".join(sorted(values)) or "(none)"

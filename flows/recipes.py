"""Ready-made params.yaml files: recipes/<name>.yaml of the working directory, then of the project itself."""

import shutil
import subprocess
from pathlib import Path

from vdmini_core.settings import Params, load_params

OWN = Path(__file__).parent.parent / "recipes"


def recipes() -> dict[str, Path]:
    """Every recipe by name."""
    found = {path.stem: path for folder in (OWN, Path.cwd() / "recipes") for path in folder.glob("*.yaml")}
    return dict(sorted(found.items()))


def headline(recipe: Path) -> str:
    """The comment in a recipe's first line."""
    return recipe.read_text().partition("\n")[0].lstrip("# ")


def find_recipe(name: str) -> Path:
    """The file of a recipe's name, or of a path to any params file; ValueError lists the recipes."""
    known = recipes()
    if name in known:
        return known[name]
    if not Path(name).is_file():
        raise ValueError(f"there is no recipe {name!r} and no such file; the recipes are {', '.join(known) or 'none'}")
    return Path(name)


def adopt_recipe(name: str, target: Path, *, force: bool) -> Params:
    """Copy a recipe to `target`, params.yaml, and return what it says.

    Unless forced, what git could not bring back is not overwritten: ValueError.
    """
    recipe = find_recipe(name)
    params = load_params(recipe)
    if target.is_file() and not force and target.read_text() != recipe.read_text() and not committed(target):
        raise ValueError(f"{target.name} has changes that are not committed in git; commit them, or give --force")
    draft = target.with_name(f".{target.name}.partial")
    shutil.copyfile(recipe, draft)
    draft.replace(target)
    return params


def committed(file: Path) -> bool:
    """Whether git has exactly this content of the file in its last commit."""
    commands = (["ls-files", "--error-unmatch", file.name], ["diff", "--quiet", "HEAD", "--", file.name])
    try:
        runs = [subprocess.run(["git", *command], cwd=file.parent, capture_output=True) for command in commands]
    except OSError:
        return False
    return all(run.returncode == 0 for run in runs)


def next_steps(name: str, params: Params) -> list[str]:
    """What a user has to do before `vdmini run`, in order."""
    steps = []
    if not params.teacher.source.startswith("zoo:") and not Path(params.teacher.source).expanduser().is_dir():
        have = f"set teacher.source to your copy of {params.teacher.source}"
        pin = "" if params.teacher.revision else ", or teacher.revision to a commit of it on the hub"
        steps.append(have + pin)
    if params.data.source != "synthetic" and not Path(params.data.source).expanduser().is_dir():
        steps.append(f"set data.source to your clips ({params.data.source} is not there)")
    steps.append(f"see what it costs: vdmini dry-run {name}; after changes: vdmini dry-run params.yaml")
    return [*steps, "vdmini run"]

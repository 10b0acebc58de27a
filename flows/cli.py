"""The command line `vdmini`; Prefect, MLflow and torch are imported only by the command that needs them."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows import measure
from flows.cli_cluster import cluster
from flows.cli_registry import registry
from flows.cli_studies import studies
from flows.decoder_command import decoder
from flows.plan_command import plan
from flows.terminal import LOOK, RUN, explained, flow_explained, prepare_flow

SERVICES, MEASURE = "Services on this machine", "Measure what is there"

app = typer.Typer(
    name="vdmini",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Makes a video diffusion model smaller and faster without losing its content or its motion.

Run it in the project's root. Settings are in params.yaml (`vdmini settings` explains every key);
`vdmini run` brings every stage up to date and prints the comparison. `vdmini up` starts local
servers on which you can watch runs (Prefect) and compare them (MLflow); it is not needed to run.""",
)


@app.command(rich_help_panel=RUN)
def recipe(
    name: Annotated[str | None, typer.Argument(help="The recipe to use; without one all are listed.")] = None,
    force: Annotated[bool, typer.Option(help="Overwrite a params.yaml that git does not have.")] = False,
) -> None:
    """List the recipes, ready settings for published models, or make one of them params.yaml.

    Recipes are the files of recipes/ here, and those of VDMini.
    """
    with explained():
        from flows.recipes import adopt_recipe, headline, next_steps, recipes

        if name is None:
            known = recipes()
            for key, path in known.items():
                typer.echo(f"{key:{max(map(len, known))}}  {headline(path)}")
            return
        params = adopt_recipe(name, Path.cwd() / "params.yaml", force=force)
    typer.echo(f"params.yaml is now the recipe {name}; next:")
    for number, step in enumerate(next_steps(name, params), 1):
        typer.echo(f"  {number}. {step}")


@app.command(rich_help_panel=RUN)
def run(
    target: Annotated[str | None, typer.Option(help="Stop after this stage; it and what it needs are run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
) -> None:
    """Run every stage that is out of date, here and now, in DVC's order.

    Unchanged stages are skipped; stages whose result is in DVC's cache are restored. The run is shown
    on the servers of `vdmini up` if they run, and needs none. Ctrl-C stops the running stage; training
    resumes from its last checkpoint. Exit codes: 0 done, 1 a stage failed, 2 wrong settings.
    """
    root = Path.cwd()
    with explained():
        prepare_flow(root)
        from flows.full import headline_metrics, vdmini
        from flows.graph import stage_graph

        stage_graph(root, target)  # an unknown target is reported before Prefect starts
    with flow_explained(), explained():
        stages = vdmini(target)
    folder = root / "artifacts" / "evaluate"
    summary, report = folder / "summary.md", folder / "report.html"
    evaluated = "evaluate" in stages
    if as_json:
        metrics = headline_metrics(folder / "metrics.json") if evaluated else {}
        facts = {"stages": stages, "metrics": metrics, "report": str(report) if report.is_file() else None}
        typer.echo(json.dumps(facts, indent=1))
        return
    typer.echo("\n".join(f"{name:14}{result}" for name, result in stages.items()))
    if evaluated and summary.is_file():
        typer.echo("\n" + summary.read_text().rstrip())
    if evaluated and report.is_file():
        typer.echo(f"\nreport: {report}")


@app.command(rich_help_panel=RUN)
def stage(name: Annotated[str, typer.Argument(help="A stage of dvc.yaml, such as `sensitivity`.")]) -> None:
    """Run one stage's code directly; this is the command in dvc.yaml.

    It does not ask whether the stage is up to date and records nothing in dvc.lock: use
    `vdmini run --target NAME` or `dvc repro NAME` for that.
    """
    with explained():
        from tasks._launch import launch
        from vdmini_core.settings import load_params

        launch(name, load_params(Path("params.yaml")).resources_of(name))
        from tasks._stage import run_stage

        run_stage(name)


app.add_typer(studies)
app.add_typer(registry)


@app.command(rich_help_panel=RUN)
def upload(
    journals: Annotated[list[Path], typer.Argument(help="unsent-*.jsonl files of .scratch/tracking.", exists=True)],
) -> None:
    """Send to MLflow what a dead server did not take; the stage's warning names the file."""
    with explained():
        from tasks._tracking import upload_journal

        for journal in journals:
            typer.echo(f"{journal}: run {upload_journal(journal)}")


@app.command(rich_help_panel=RUN)
def generate(
    model: Annotated[str, typer.Option(help="models:/NAME@ALIAS, a pipeline folder, `teacher`, or zoo:NAME.")],
    out: Annotated[Path, typer.Option(help="The mp4 to write.")],
    image: Annotated[Path | None, typer.Option(help="Image to video: the first frame, any image file.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to video: what the clip shows.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 8,
    frames: Annotated[int | None, typer.Option(min=2, help="Length; the model's own by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    tile: Annotated[int | None, typer.Option(min=1, help="Decode in tiles of so many latents a side.")] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="Decode so many latent frames at a time.")] = None,
) -> None:
    """Make a clip that continues an image, or of a prompt, with a registered student or the teacher.

    Whether a model takes --image or --prompt is its own nature; the other one is refused.

    Example: `vdmini generate --model models:/vdmini@champion --image first.png --out clip.mp4`
    """
    with explained():
        from tasks._generate import generate as make

        make(model, image, out, prompt=prompt, frames=frames, steps=steps, seed=seed, tile=tile, chunk=chunk)
    typer.echo(out)


@app.command(rich_help_panel=RUN)
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="model.ckpt, unet_mg.pt, unet_no_mg.pt, or such in safetensors.")],
    out: Annotated[Path, typer.Argument(help="The pipeline folder to write; new or empty.")],
    config: Annotated[Path | None, typer.Option(help="The U-Net's yaml or JSON; VideoCrafter2's by default.")] = None,
    fps: Annotated[int, typer.Option(min=1, help="Frames per second; becomes part of the weights.")] = 8,
) -> None:
    """Make a diffusers pipeline folder of a VideoCrafter2 or T2V-Turbo-v2 checkpoint.

    Only the U-Net is converted; what has to be put beside it is printed. Pickles are read without running code.
    """
    with explained():
        from vdmini_core.models.videocrafter import COMPANIONS, COMPANIONS_SOURCE, convert_checkpoint

        convert_checkpoint(checkpoint, out, config, fps)
    typer.echo(f"{out} has the U-Net and the scheduler; put beside them, from {COMPANIONS_SOURCE}:")
    for name, (library, kind, meaning) in COMPANIONS.items():
        typer.echo(f"  {name + '/':15}{meaning} ({library}' {kind})")


@app.command(rich_help_panel=RUN)
def lora(
    weights: Annotated[Path, typer.Argument(help="A LoRA made for the teacher: safetensors, diffusers' keys.")],
    out: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    plan: Annotated[Path, typer.Option(help="What was removed.")] = Path("artifacts/plan/plan.json"),
    teacher: Annotated[str, typer.Option(help="A pipeline folder, `teacher`, or zoo:NAME.")] = "teacher",
) -> None:
    """Make a teacher's LoRA one for the student: layers that are left are renamed, the others dropped.

    What is dropped is listed. Nothing is trained.
    """
    with explained():
        from tasks._lora import convert as make

        kept, dropped = make(weights, out, plan, teacher)
    typer.echo(f"{out} has {kept} weights; {len(dropped)} belong to removed blocks:")
    typer.echo("\n".join(f"  {name}" for name in dropped) or "  none")


@app.command(rich_help_panel=RUN)
def zoo(
    out: Annotated[Path, typer.Option(help="Folder for the weights; parts that are there are kept.")] = Path("zoo-new"),
) -> None:
    """Train the built-in teacher, VAE, image encoder and evaluator from nothing.

    They ship with the project, so nobody has to. Takes about 80 minutes on two CPU cores; the teacher's
    training resumes from its checkpoints in .scratch/zoo.
    """
    from tasks._zoo import build

    build(out)


@app.command(rich_help_panel=SERVICES)
def up(
    prefect_port: Annotated[int, typer.Option(help="Port of the Prefect server.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow server.")] = 5000,
) -> None:
    """Start a Prefect server, a worker and an MLflow server, and deploy the flow.

    They listen on this machine only and keep everything in this folder. Logs and records are in
    .scratch/services/. Services that already run are left as they are.
    """
    from flows import services

    root = Path.cwd()
    with explained():
        try:
            services.up(root, prefect_port, mlflow_port, say=typer.echo)
        except RuntimeError as error:
            typer.echo(f"vdmini: {error}", err=True)
            raise typer.Exit(1) from None
    typer.echo(
        "\nstart a run:  prefect deployment run vdmini/full      (in this folder)"
        f"\nelsewhere:    export PREFECT_API_URL=http://{services.HOST}:{prefect_port}/api"
        "\nstop all:     vdmini down"
    )


@app.command(rich_help_panel=SERVICES)
def down() -> None:
    """Stop what `vdmini up` started, and nothing else; a run in progress is cancelled."""
    from flows import services

    services.down(Path.cwd(), say=typer.echo)
    typer.echo("no service of this project is running")


@app.command(rich_help_panel=LOOK)
def dry_run(
    name: Annotated[str, typer.Argument(help="A recipe, or the path of a params file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
) -> None:
    """Say what a recipe would remove, save and need in memory, from the model's config alone.

    Needs neither weights nor data nor an accelerator, and takes seconds.
    """
    with explained():
        from flows.recipes import find_recipe
        from tasks._dry_run import dry_run_of, dry_run_text

        result = dry_run_of(find_recipe(name))
    typer.echo(result.model_dump_json(indent=1) if as_json else dry_run_text(result))


@app.command(rich_help_panel=LOOK)
def units(
    source: Annotated[
        str, typer.Argument(help="zoo:NAME, a pipeline's or denoiser's folder, a recipe's model, a hub id.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list on stdout.")] = False,
) -> None:
    """List the units of a model that can be removed, what they cost, and what has to go with them.

    Reads the model's config only. Of a hub id that is fetched, unless it ships with VDMini.
    """
    with explained():
        from tasks._dry_run import unit_table, units_and_note

        found, note = units_and_note(source)
    typer.echo(note, err=True)
    typer.echo(json.dumps([unit.model_dump() for unit in found], indent=1) if as_json else unit_table(found))


app.command(rich_help_panel=LOOK)(explained()(plan))
app.add_typer(cluster)
app.command(rich_help_panel=LOOK)(explained()(decoder))


@app.command(rich_help_panel=LOOK)
def report(
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Print where the report of the last evaluation is."""
    path = Path.cwd() / "artifacts" / "evaluate" / "report.html"
    with explained():
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; `vdmini run` writes it")
    typer.echo(str(path))
    if show:
        import webbrowser

        webbrowser.open(path.as_uri())


@app.command(rich_help_panel=LOOK)
def settings() -> None:
    """List every key of params.yaml: its type and limits, its default, what it means."""
    from flows.setting_list import setting_rows
    from vdmini_core.settings import Params

    rows = list(setting_rows(Params, ""))
    widths = [max(len(row[column]) for row in rows if len(row) > 1) for column in range(3)]
    for row in rows:
        if len(row) == 1:
            typer.echo(f"\n{row[0]}")
            continue
        *cells, meaning = row
        columns = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        typer.echo("  ".join(["", *columns, meaning]).rstrip())


for command in (measure.frechet, measure.fvd, measure.ucf101, measure.compare):
    app.command(rich_help_panel=MEASURE)(command)
app.command("is", rich_help_panel=MEASURE)(measure.inception)
app.add_typer(measure.vbench, name="vbench", rich_help_panel=MEASURE)


if __name__ == "__main__":
    sys.exit(app())

"""`vdmini decoder`: its options, and what it prints."""

from pathlib import Path
from typing import Annotated

import typer


def decoder(
    source: Annotated[str, typer.Argument(help="A recipe, zoo:NAME, a pipeline's or VAE's folder, a published model.")],
    remove: Annotated[list[str] | None, typer.Option(help="Instead of the paper's layout; may be repeated.")] = None,
    share: Annotated[
        list[float] | None, typer.Option(help="With --remove: channels kept, one a resolution from latents to pixels.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Instead of the clips that the model is for.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
) -> None:
    """Say what compressing a model's VAE decoder would leave: layout, parameters, FLOPs.

    Reads configs only and takes seconds. The plan is the paper's (no mid block, one layer in the last block, .616 of
    the parameters), or what --remove and --share say. A plan within a budget of time needs measurements: stage decoder.
    """
    from flows.recipes import recipes
    from tasks._dry_run import decoder_dry_run_text
    from tasks._stage import quieten
    from vdmini_core.pruning.decoder_dry_run import decoder_dry_run
    from vdmini_core.settings import DecoderSettings, height_and_width, load_params

    quieten()
    clip: tuple[int | None, int | None, int | None] = frames, height, width
    if source in recipes() or Path(source).is_file():
        from flows.recipes import find_recipe

        params = load_params(find_recipe(source))
        own = (params.data.frames, *height_and_width(params.data.size))
        clip = frames or own[0], height or own[1], width or own[2]
        source = params.teacher.source
    settings = DecoderSettings(method="paper")
    if remove or share:
        settings = DecoderSettings(method="manual", remove=tuple(remove or ()), shares=tuple(share or ()))
    result = decoder_dry_run(source, settings, clip)
    typer.echo(result.model_dump_json(indent=1) if as_json else decoder_dry_run_text(result))

"""What a user reads when a command cannot do what it was asked."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def explained() -> Iterator[None]:
    """What the user can mend, as one paragraph on stderr and exit code 2 instead of a traceback."""
    try:
        yield
    except (ValueError, LookupError, OSError, MemoryError) as error:
        typer.echo(f"vdmini: {error}", err=True)
        raise typer.Exit(2) from None

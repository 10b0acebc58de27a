"""Subclasses of stock diffusers models that are built without some of their units or channels, from config alone."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from vdmini_core.models.narrow import Widths, narrow


def student_class(stock: type[Any], name: str, module: str, delete: Callable[[Any, set[str]], None]) -> type[Any]:
    """The stock class with two more arguments, which are kept in config.json; `name` lives in `module`.

    `removed_units` are the units that it is built without (`delete(model, names)` takes them out), `widths` what of
    the rest is narrower (models/narrow.py). It saves and reloads as any diffusers model does.
    """

    def __init__(
        self: Any, *args: Any, removed_units: Iterable[str] = (), widths: Widths | None = None, **kwargs: Any
    ) -> None:
        stock.__init__(self, *args, **kwargs)
        self.register_to_config(removed_units=sorted(removed_units))
        delete(self, set(removed_units))
        if widths:
            self.register_to_config(widths={path: list(sizes) for path, sizes in widths.items()})
            narrow(self, widths)

    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [
        inspect.Parameter(name, keyword, default=default) for name, default in (("removed_units", ()), ("widths", None))
    ]
    signature = inspect.signature(stock.__init__)
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *own])  # type: ignore[attr-defined]
    doc = f"{stock.__name__} without some of its units or channels."
    body = {"__init__": __init__, "__doc__": doc, "__module__": module}
    return type(name, (stock,), body)

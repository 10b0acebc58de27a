"""Settings as rows for a reader: key, type and limits, default, meaning."""

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def setting_rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, ...]]:
    """Key, type, default and meaning of each setting; a one-element row opens a section."""
    sections = list[tuple[str, type[BaseModel]]]()
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        annotation: Any = field.annotation
        if get_origin(annotation) is dict:  # sections by the name of a stage
            sections.append((f"{key}.STAGE", get_args(annotation)[1]))
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            sections.append((key, annotation))
        else:
            yield key, type_text(field), default_text(field), field.description or ""
    for key, section in sections:
        yield (f"{key}: {' '.join((section.__doc__ or '').split())}",)
        yield from setting_rows(section, f"{key}.")


def type_text(field: FieldInfo) -> str:
    """A setting's type as a reader writes it, with its limits: `float, >= 0, < 1`."""
    annotation: Any = field.annotation
    if get_origin(annotation) is Literal:
        text = " | ".join(str(choice) for choice in get_args(annotation))
    elif isinstance(annotation, type) and not get_args(annotation):
        text = annotation.__name__
    else:
        text = str(annotation)
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "a multiple of"}
    limits = [
        f"{sign} {getattr(rule, word)}"
        for rule in field.metadata
        for word, sign in signs.items()
        if hasattr(rule, word)
    ]
    return ", ".join([text, *limits])


def default_text(field: FieldInfo) -> str:
    """The default as YAML writes it, or `required`."""
    if field.is_required():
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return json.dumps(value) if value is not None else "null"

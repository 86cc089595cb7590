"""Options that belong together, written once: a dataclass whose fields are options of every command that takes it."""

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer.models import OptionInfo


def bundled(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as typer reads it: each parameter of a dataclass is replaced by an option for each of its fields.

    The options of a dataclass stand under its attribute `panel` in `--help`. Their defaults are the fields', or those of the instance that
    is the parameter's default.

    Raises:
        TypeError: two options of the same name.
    """
    hints = get_type_hints(command, include_extras=True)
    bundles: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if is_dataclass(kind):
            bundles[name] = kind
            parameters += _options(kind, parameter.default)
        else:
            parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
    names = [parameter.name for parameter in parameters]
    for name in names:
        if names.count(name) > 1:
            raise TypeError(f"options of a command must have names of their own, {name!r} comes twice")

    def expanded(**given: Any) -> None:
        made = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            for name, kind in bundles.items()
        }
        command(**made, **given)

    described: Any = expanded
    described.__signature__ = inspect.Signature(parameters)
    described.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    described.__name__, described.__doc__ = command.__name__, command.__doc__
    return expanded


def _options(kind: Any, given: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    options = []
    for field in fields(kind):
        default = field.default if given is inspect.Parameter.empty else getattr(given, field.name)
        options.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is MISSING else default,
                annotation=_in_panel(hints[field.name], getattr(kind, "panel", None)),
            )
        )
    return options


def _in_panel(annotation: Any, panel: str | None) -> Any:
    """The annotation of an option, which stands in `panel` of the help page."""
    if get_origin(annotation) is not Annotated:
        return annotation
    kind, *notes = get_args(annotation)
    placed = [copy(item) for item in notes]
    for item in placed:
        if isinstance(item, OptionInfo):
            item.rich_help_panel = panel
    return Annotated[kind, *placed]

"""Turns the fields of a dataclass into the options of a command, so that each option is written once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from lvm.cli.arguments import as_utf8, json_object, named_dir
from models.recipe import DataSet, Option

Command = Callable[..., None]
Complete = Callable[[str], Any]

# how the text of an option becomes the value of a field
READERS: Mapping[Any, Callable[[str], Any]] = {str: as_utf8, DataSet: named_dir, Mapping[str, Any]: json_object}


def options_from(kind: type[Any], completions: Mapping[str, Complete]) -> Callable[[Command], Command]:
    """Return a decorator for a command whose first parameter is an instance of the dataclass `kind`.

    The decorated command has an option for each field that is annotated with an `Option`, also in the dataclasses
    within `kind`, and then the other parameters of the function. A shell completes the option of a field with the
    function in `completions`.
    """

    def decorate(command: Command) -> Command:
        _, *others = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [*_parameters(kind, completions), *(each.replace(kind=Parameter.KEYWORD_ONLY) for each in others)]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(_build(kind, given), **{each.name: given[each.name] for each in others})

        run.__dict__["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _parameters(kind: type[Any], completions: Mapping[str, Complete]) -> Iterator[Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint = hints[field.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _parameters(hint, completions)
        elif get_origin(hint) is Annotated:
            base, option = get_args(hint)
            default = "{}" if field.default_factory is dict else field.default
            yield _parameter(field.name, base, option, default, completions.get(field.name))


def _parameter(name: str, hint: Any, option: Option, default: Any, complete: Complete | None) -> Parameter:
    flag = option.flag or f"--{name.replace('_', '-')}"
    declare = typer.Argument if option.is_argument else functools.partial(typer.Option, flag)
    info = declare(help=option.help, min=option.min, max=option.max, metavar=option.metavar, autocompletion=complete)
    annotation: Any = Annotated[_type_for_typer(hint), info]
    # an option that may be repeated has no default of its own
    default = {MISSING: Parameter.empty, (): None}.get(default, default)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _type_for_typer(hint: Any) -> Any:
    if get_origin(hint) is tuple:
        return list[str] | None
    return str if hint in READERS else hint


def _build(kind: type[Any], given: Mapping[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and is_dataclass(hint):
            values[name] = _build(hint, given)
        elif given.get(name) is not None:
            values[name] = _read(hint, given[name])
    return kind(**values)


def _read(hint: Any, value: Any) -> Any:
    if get_origin(hint) is tuple:
        return tuple(READERS[get_args(hint)[0]](each) for each in value)
    return READERS[hint](value) if hint in READERS else value

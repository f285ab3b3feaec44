"""Checks of how a head is made of its options, and whether it keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, get_args, get_origin

from pydantic import ValidationError

from code_worker.heads import Head, fit_head, options_problem
from code_worker.stops import raise_if_stop
from code_worker.testing.files import load_again
from code_worker.testing.subject import NotConformingError, Subject, largest_difference, raised

__all__ = ["OPTION_CHECKS", "check_creation"]


def check_creation(subject: Subject) -> None:
    """A head is made of a mapping of its options, and of none: then each has a default."""
    options: object = subject.head_class.Options
    if not (isinstance(options, type) and issubclass(options, Head.Options)):
        raise NotConformingError(
            "Options that are derived from Head.Options",
            f"{subject.head_class.__qualname__}.Options is not",
            "write `class Options(Head.Options):` in the head's class, and its options as fields with defaults",
        )
    _make(subject, {}, "give every field of Options a default: a refit that is told nothing makes the head of none")
    _make(subject, subject.options, "give values that the fields of Options take")


def _make(subject: Subject, options: Mapping[str, Any], fix: str) -> None:
    try:
        made: object = getattr(subject.head_class(options), "options", None)
    except ValidationError as error:
        raise NotConformingError(f"a head of the options {dict(options)}", options_problem(error), fix) from None
    except (Exception, SystemExit) as error:
        raise_if_stop(error)
        raise NotConformingError(
            "__init__ makes a head of a mapping of its options",
            f"in __init__: {raised(error, subject.head_class)}",
            "write no __init__, or one that takes `options=None` alone and calls super().__init__(options)",
        ) from error
    if not isinstance(made, subject.head_class.Options):
        raise NotConformingError(
            "a head with its options as `self.options`",
            f"{type(made).__name__} after __init__",
            "call super().__init__(options) in __init__",
        )


def check_options_after_load(subject: Subject) -> None:
    """`load` keeps the options that it is given: tried with one that is not the default, where one can be derived."""
    for number, changed in enumerate(_other_options(subject)):
        directory = subject.directory / f"options-{number}"
        directory.mkdir()
        try:
            head = fit_head(subject.head_class(changed), subject.train, subject.train_labels)
            head.save(directory)
            before = head.score(subject.embeddings)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - nobody said that the head must take this value
            raise_if_stop(error)
            continue
        loaded = load_again(subject, directory, head)
        after = loaded.score(subject.embeddings)
        if loaded.options != head.options or before.tobytes() != after.tobytes():
            raise NotConformingError(
                f"the same head after load, with the options {changed}",
                f"options {loaded.options.model_dump(mode='json')}, and scores up to "
                f"{largest_difference(before, after):.2g} apart",
                "begin load with `head = cls(options)`, and save what depends on them",
            )
        return


def _other_options(subject: Subject) -> Iterator[dict[str, Any]]:
    """The options with one of them changed, of those that the fields take."""
    model, now = subject.head_class.Options, subject.head.options
    for name, field in model.model_fields.items():
        value = getattr(now, name)
        for candidate in _candidates(field.annotation, value):
            changed = {**subject.options, name: candidate}
            try:
                differs = model.model_validate(changed) != now
            except ValidationError:
                continue
            if differs:
                yield changed


def _candidates(annotation: Any, value: object) -> Iterator[object]:
    """Values near the present one, of the types that can be counted or listed."""
    if get_origin(annotation) is Literal:
        yield from (choice for choice in get_args(annotation) if choice != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1)
    elif isinstance(value, float):
        yield from (value * 2, value / 2, value + 0.25)


OPTION_CHECKS: Final = (check_options_after_load,)

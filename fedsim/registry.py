"""Classes by name: what a configuration, a message or a ledger calls by a word, in the package or outside it."""

import dataclasses
import importlib
import sys
import types
import typing
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

from fedsim.errors import InvalidInput

T = TypeVar("T")
C = TypeVar("C", bound="Choice")


class NotImported(InvalidInput):
    """A name of somebody's own module, where naming it does not import it."""


def import_module(field: str, module: str, name: str) -> None:
    """Import somebody's own module.

    Args:
        field: The option or field that names it, for errors.
        module: The module.
        name: What was given there.

    Raises:
        InvalidInput: With what importing it said.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        hint = f"Importing it said: {error}. Its folder must be on PYTHONPATH, on workers too."
        raise InvalidInput(field, name, "of a module that can be imported", hint) from error
    except InvalidInput:
        raise
    except Exception as error:
        hint = f"Importing it said: {type(error).__name__}: {error}."
        raise InvalidInput(field, name, "of a module that can be imported", hint) from error


class Registry(Generic[T]):
    """Classes of one kind, each under its own name.

    A class outside the package is called "module:name". The module's name travels with it, in plans, messages and
    ledgers, so that whoever reads it can import the module and find the class, on Ray workers too.

    Args:
        field: The option or field that names such a class, for errors.
        attribute: The class attribute that holds a class's own name.
        imports: Whether naming a class imports its module. Not where names come from files that anybody may have
            written: the module must have been imported before.
    """

    def __init__(self, field: str, attribute: str = "name", *, imports: bool = True) -> None:
        self._field, self._attribute, self._imports = field, attribute, imports
        self._classes: dict[str, type[T]] = {}

    def register(self, cls: type[T]) -> type[T]:
        """Decorate a class with this to make it known by its name.

        Raises:
            InvalidInput: Another class has that name already.
        """
        name = self._called(cls)
        known = self._classes.get(name)
        # The same class defined again (a module reloaded, a notebook cell run twice) takes the place of the former.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InvalidInput(self._field, name, "a name that no other class has", f"{known.__qualname__} has it.")
        self._classes[name] = cls
        return cls

    def name_of(self, cls: type[T]) -> str:
        """What a class is called wherever it travels: its own name, after its module and a colon outside the package.

        Raises:
            InvalidInput: The class is of the program itself. `__main__` is another module in every process, so nobody
                who reads the name could find it.
        """
        name = self._called(cls)
        if cls.__module__ == "__main__":
            hint = f"Move {cls.__qualname__} into a module of its own and name it module:name."
            raise InvalidInput(self._field, name, "of a module that other processes can import", hint)
        return name

    def named(self, name: str) -> type[T]:
        """The class of a name; the module of "module:name" is imported first.

        Raises:
            InvalidInput: There is no such module, or no class registered under the name.
            NotImported: The module has yet to be imported, where this registry does not.
        """
        module = name.partition(":")[0] if ":" in name else ""
        if module and name not in self._classes and self._imports:
            import_module(self._field, module, name)
        if name not in self._classes:
            allowed = "one of " + ", ".join(self._classes)
            if module and module not in sys.modules:
                hint = f"The module {module} must be imported first: add --modules {module}."
                raise NotImported(self._field, name, allowed, hint)
            own = "A class of your own is named module:name."
            hint = f"The module {module} registers no such class." if module else own
            raise InvalidInput(self._field, name, allowed, hint)
        return self._classes[name]

    def _called(self, cls: type[T]) -> str:
        own: str = getattr(cls, self._attribute)
        return own if cls.__module__.split(".")[0] == "fedsim" else f"{cls.__module__}:{own}"

    def __iter__(self) -> Iterator[str]:
        """The names known so far, in the order of registration."""
        return iter(self._classes)

    def items(self) -> list[tuple[str, type[T]]]:
        """Names and classes known so far."""
        return list(self._classes.items())


@dataclass(frozen=True, kw_only=True)
class Choice(ABC):
    """A part of a plan that a name stands for: a frozen dataclass, whose fields are its options.

    Options are numbers, texts or truth values, described by `field(metadata={"help": …})` and refused in
    `__post_init__` where they make no sense.

    Attributes:
        name: Its own name.
        summary: One line for help texts.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @classmethod
    def options(cls) -> dict[str, str]:
        """What can be set: names, and what each means."""
        return {field.name.replace("_", "-"): str(field.metadata.get("help", "")) for field in dataclasses.fields(cls)}

    @classmethod
    def of_options(cls, options: Mapping[str, str]) -> Self:
        """The choice with options given as text, by names as in `options()`.

        Raises:
            InvalidInput: A value of the wrong type, or one that makes no sense.
        """
        hints = typing.get_type_hints(cls)
        names = {name: name.replace("-", "_") for name in options}
        return cls(**{names[name]: _typed(name, text, hints[names[name]]) for name, text in options.items()})

    @classmethod
    def check_options(cls, options: Mapping[str, str]) -> None:
        """Refuse what of_options would refuse, without reading any file.

        Raises:
            InvalidInput: Names the option.
        """
        cls.of_options(options)


class Choices(Registry[C]):
    """Choices by name, with their options: as text from a configuration, as JSON values in plans."""

    def build(self, name: str, options: Sequence[str] = ()) -> C:
        """The choice of a name, with options written "name=value".

        Raises:
            InvalidInput: For an unknown name, an option that the choice has not, or a value that it cannot take.
        """
        kind = self.named(name)
        return kind.of_options(self._pairs(kind, options))

    def check(self, name: str, options: Sequence[str]) -> type[C]:
        """The class of a name, once its options are known to be right; reads no file.

        Raises:
            InvalidInput: As build.
        """
        kind = self.named(name)
        kind.check_options(self._pairs(kind, options))
        return kind

    def values_of(self, choice: C) -> dict[str, Any]:
        """Name and options as JSON values."""
        return {"name": self.name_of(type(choice)), **dataclasses.asdict(choice)}

    def from_values(self, values: Mapping[str, Any]) -> C:
        """The choice that values_of described.

        Raises:
            InvalidInput: For an unknown name, or a value out of range.
        """
        kind = self.named(values["name"])
        given = {name: value for name, value in values.items() if name != "name"}
        if not set(given) <= {field.name for field in dataclasses.fields(kind)}:
            raise InvalidInput(self._field, sorted(given), f"options of {kind.name}: {', '.join(kind.options())}")
        return kind(**given)

    def _pairs(self, kind: type[C], options: Sequence[str]) -> dict[str, str]:
        field, pairs, known = f"{self._field}-options", {}, kind.options()
        for option in options:
            name, equals, value = option.partition("=")
            if not (equals and name):
                raise InvalidInput(field, option, "of the form name=value")
            if name not in known:
                raise InvalidInput(field, name, f"an option of {kind.name}: {', '.join(known) or 'it has none'}")
            pairs[name] = value
        return pairs


def _typed(name: str, text: str, hint: Any) -> Any:
    """An option's text as the field's type: a number, a text, or true or false."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise InvalidInput(name, text, "true or false")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError:
        raise InvalidInput(name, text, f"of type {hint.__name__}") from None

"""Tables of options: they check themselves, and know which of their options were given."""

from types import NoneType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeVar,
    get_args,
    get_origin,
)

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from ptv2_fast.tasks.hints import hint

GIVEN = "given"  # among options: the names of those that were given; absent: all were

# Types of options, and what messages call their values.
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63), "an integer"]
Count = Annotated[int, Field(ge=1, lt=2**63), "an integer >= 1"]
CountOrZero = Annotated[int, Field(ge=0, lt=2**63), "an integer >= 0"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), "a number > 0"]
NotNegative = Annotated[float, Field(ge=0), "a number >= 0"]
BelowOne = Annotated[float, Field(ge=0, lt=1), "a number in [0, 1)"]

_WORDS = {str: "text", bool: "true or false", int: "an integer", float: "a number"}

_Table = TypeVar("_Table", bound="OptionTable")


def option(default: Any, help: str, *, aliases: tuple[str, ...] = ()) -> Any:
    """An option with its help text and further names."""
    names = AliasChoices(*aliases) if aliases else None
    return Field(default, description=help, validation_alias=names)


class Kind(NamedTuple):
    """The values that an option may have.

    Attributes:
        type: str, bool, int or float.
        choices: all of them; () = not listed.
        is_optional: whether None is one.
        expected: what messages call them.
    """

    type: type
    choices: tuple[str, ...]
    is_optional: bool
    expected: str


class OptionTable(BaseModel):
    """Base of the tables of options; None is the value of an option that is not set.

    Raises:
        ValueError: naming the option, what was expected and what was given.
    """

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", populate_by_name=True, loc_by_alias=False
    )
    # Those whose default follows from other options.
    dependent: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(self._in_words(error)) from None
        given = self.model_fields_set
        given.difference_update([name for name in given if getattr(self, name) is None])
        self.check()

    def check(self) -> None:
        """Fill in what follows from other options, and check what must go together.

        Raises:
            ValueError: for what does not.
        """

    @property
    def given(self) -> list[str]:
        """The options that were given, in their order; the others have their defaults."""
        return [name for name in type(self).model_fields if name in self.model_fields_set]

    @classmethod
    def of(cls: type[_Table], options: dict[str, Any]) -> _Table:
        """The options of this table among others; GIVEN tells those that were given.

        The defaults of the others may be those of another version, or of another task: their values
        stay, but for those that follow from other options.

        Raises:
            ValueError: for a bad value.
        """
        given = options.get(GIVEN, options)
        stay = {*cls.model_fields} - (cls.dependent - {*given})
        table = cls(**{name: value for name, value in options.items() if name in stay})
        table.model_fields_set.intersection_update(given)
        return table

    def changed(self: _Table, **changes: Any) -> _Table:
        """The table with some options given anew.

        Raises:
            ValueError: for a bad value.
        """
        return self.of({**self.model_dump(), **changes, GIVEN: [*self.given, *changes]})

    @classmethod
    def names(cls) -> dict[str, str]:
        """The option that each name and alias stands for."""
        return {name: own for own in cls.model_fields for name in (own, *cls.aliases(own))}

    @classmethod
    def aliases(cls, name: str) -> list[str]:
        """The further names of an option."""
        alias = cls.model_fields[name].validation_alias
        return [str(word) for word in alias.choices] if isinstance(alias, AliasChoices) else []

    @classmethod
    def kind(cls, name: str) -> Kind:
        """The values that an option may have."""
        annotation = cls.__annotations__[name]
        is_optional = NoneType in get_args(annotation)
        if is_optional:
            (annotation,) = (part for part in get_args(annotation) if part is not NoneType)
        words, choices = None, ()
        if get_origin(annotation) is Annotated:
            annotation, *_, words = get_args(annotation)
        if get_origin(annotation) is Literal:
            annotation, choices = str, get_args(annotation)
            words = f"one of {choices}"
        expected = ("None or " if is_optional else "") + (words or _WORDS[annotation])
        return Kind(annotation, choices, is_optional, expected)

    def require(self, condition: bool, name: str, expected: str) -> None:
        """Raise a ValueError that names the option unless the condition holds."""
        if not condition:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r:.100}")

    def set_defaults(self, values: dict[str, Any]) -> None:
        """Give options that were not given the defaults that follow from others; not checked."""
        self.__dict__.update(values)

    @classmethod
    def _in_words(cls, error: ValidationError) -> str:
        first = error.errors(include_url=False)[0]
        name, value = str(first["loc"][0]), first["input"]
        if first["type"] == "extra_forbidden":
            return f"{name}: no such option{hint(name, cls.names())}"
        if type(value) is int and value.bit_length() > 63:
            return f"{name}: expected an integer of 64 bits, got a larger one"
        return f"{name}: expected {cls.kind(name).expected}, got {value!r:.100}"

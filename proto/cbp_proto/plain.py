"""Spec messages to plain dictionaries and back, read off the message descriptors.

Plain form is what people write: enum values lose their prefix and case (`ACTIVATION_RELU` is "relu"), a field that is
not set is left out, and a message with a `oneof kind` becomes the chosen message plus a "kind" entry. A text that
stands where a message with a `kind` enum is expected names that kind: `loss="mse"` is `loss={"kind": "mse"}`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

MessageT = TypeVar("MessageT", bound=Message)

_KIND = "kind"
_WANTED = {
    FieldDescriptor.TYPE_INT32: "a whole number that 32 bits hold",
    FieldDescriptor.TYPE_INT64: "a whole number that 64 bits hold",
    FieldDescriptor.TYPE_DOUBLE: "a number",
    FieldDescriptor.TYPE_BOOL: "true or false",
    FieldDescriptor.TYPE_STRING: "a text that UTF-8 can hold",
}


class PlainError(ValueError):
    """A plain value that its message cannot hold.

    Attributes:
        field: dotted path of the value, such as `network.hidden[1]`.
        description: what is wrong and what would be right.
    """

    def __init__(self, field: str, description: str) -> None:
        super().__init__(field, description)
        self.field = field
        self.description = description

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


def from_plain(plain: Mapping[str, Any], message_type: type[MessageT]) -> MessageT:
    """The message of `message_type` that `plain` describes; entries that are None are left unset.

    Raises:
        PlainError: unknown field or enum value, or a value of the wrong type.
    """
    message = message_type()
    _fill(message, plain, path="")
    return message


def to_plain(message: Message) -> dict[str, Any]:
    """The plain form of `message`, holding only the fields that are set."""
    plain: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.containing_oneof is not None and field.containing_oneof.name == _KIND:
            plain.update({_KIND: field.name}, **to_plain(value))
        elif _is_map(field):
            plain[field.name] = dict(value)
        elif field.is_repeated:
            plain[field.name] = [_value_to_plain(field, item) for item in value]
        else:
            plain[field.name] = _value_to_plain(field, value)
    return plain


def shown(value: object, longest: int = 60) -> str:
    """A value as an error may repeat it: on one line, and clipped."""
    if not isinstance(value, str | bytes | bool | int | float | None):
        return f"a value of type {type(value).__name__}"
    try:  # a text of millions of characters is clipped before its representation is made, not after
        text = repr(value[: longest + 1] if isinstance(value, str | bytes) else value)
    except ValueError:  # an integer of thousands of digits
        text = "a very large number"
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _value_to_plain(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return to_plain(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return str(value) if known is None else known.name.removeprefix(_enum_prefix(field.enum_type)).lower()
    return value


def _fill(message: Message, plain: Any, path: str) -> None:
    descriptor = cast(Descriptor, message.DESCRIPTOR)
    if isinstance(plain, str) and _KIND in descriptor.fields_by_name:
        plain = {_KIND: plain}
    if not isinstance(plain, Mapping):
        raise PlainError(path or descriptor.name, f"must be a mapping, not {type(plain).__name__}")
    entries = dict(plain)
    if _KIND in descriptor.oneofs_by_name:
        choices = [field.name for field in descriptor.oneofs_by_name[_KIND].fields]
        kind = entries.pop(_KIND, None)
        if kind not in choices:
            raise PlainError(_join(path, _KIND), f"must be one of {', '.join(choices)}, not {shown(kind)}")
        chosen = getattr(message, kind)
        chosen.SetInParent()
        _fill(chosen, entries, path)
        return
    fields = {field.name: field for field in descriptor.fields}
    for name, value in entries.items():
        field = fields.get(name)
        if field is None:
            raise PlainError(_join(path, name), f"is not a field here; there are {', '.join(fields)}")
        if value is not None:
            _set(message, field, value, _join(path, name))


def _set(message: Message, field: FieldDescriptor, value: Any, path: str) -> None:
    try:
        if _is_map(field):
            getattr(message, field.name).update({str(key): item for key, item in dict(value).items()})
        elif field.is_repeated and field.message_type is not None:
            for place, item in enumerate([value] if isinstance(value, str | Mapping) else value):
                _fill(getattr(message, field.name).add(), item, f"{path}[{place}]")
        elif field.is_repeated:
            items = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
            convert = str if field.type == FieldDescriptor.TYPE_STRING else _same
            getattr(message, field.name).extend(convert(item) for item in items)
        elif field.message_type is not None:
            child = getattr(message, field.name)
            child.SetInParent()
            _fill(child, value, path)
        elif field.enum_type is not None:
            setattr(message, field.name, _enum_number(field.enum_type, value, path))
        else:
            setattr(message, field.name, value)
    except PlainError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise PlainError(path, f"{shown(value)} does not fit; it must be {_wanted(field)}") from error


def _enum_number(enum: EnumDescriptor, value: Any, path: str) -> int:
    prefix = _enum_prefix(enum)
    names = {item.name.removeprefix(prefix).lower(): item.number for item in enum.values if item.number != 0}
    if not isinstance(value, str) or value not in names:
        raise PlainError(path, f"must be one of {', '.join(names)}, not {shown(value)}")
    return names[value]


def _wanted(field: FieldDescriptor) -> str:
    """What a field takes, in the words of those who write it."""
    if _is_map(field):
        return "a mapping from names to numbers"
    one = _WANTED.get(field.type, "a mapping")
    return f"a list, each {one}" if field.is_repeated else one


def _enum_prefix(enum: EnumDescriptor) -> str:
    return enum.values_by_number[0].name.removesuffix("UNSPECIFIED")


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _join(path: str, name: object) -> str:
    text = name if isinstance(name, str) and name.isprintable() and len(name) <= 60 else shown(name)
    return f"{path}.{text}" if path else text


def _same(value: Any) -> Any:
    return value

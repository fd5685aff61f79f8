"""What the records of a specification are made of: numbers that are checked, and errors that name the field."""

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from cbp.errors import FieldViolation, SpecError, shown

_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
_LEAST_FLOAT32 = 2.0**-149


def _refuse_text_and_bool(value: object) -> object:
    """Numbers arrive as numbers: "1e-4" or true where a rate belongs is a mistake upstream, not a notation."""
    if isinstance(value, bool | str | bytes):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


def _refuse_float32_overflow(value: object) -> object:
    """Settings are float32 in a step; one that becomes infinite there would make every parameter NaN."""
    if isinstance(value, int | float) and _LARGEST_FLOAT32 < abs(value) < math.inf:
        raise PydanticCustomError("float32_overflow", "Input should be finite in float32")
    return value


def _refuse_float32_underflow(value: float) -> float:
    """What must not be 0 must not become 0 in a step, either."""
    if value < _LEAST_FLOAT32:
        raise PydanticCustomError("float32_underflow", "Input should be greater than 0 in float32")
    return value


Whole = Annotated[int, BeforeValidator(_refuse_text_and_bool), Field(le=2**63 - 1)]
"""As large as tensors and messages hold."""
Real = Annotated[
    float,
    BeforeValidator(_refuse_float32_overflow),
    BeforeValidator(_refuse_text_and_bool),
    Field(allow_inf_nan=False),
]
Positive = Annotated[Real, Field(gt=0), AfterValidator(_refuse_float32_underflow)]
Width = Annotated[Whole, Field(ge=1)]
Rate = Annotated[Real, Field(ge=0, le=1)]
Share = Annotated[Positive, Field(le=1)]
Decay = Annotated[Real, Field(ge=0, lt=1)]


def _violations(error: ValidationError) -> list[FieldViolation]:
    found = []
    for details in error.errors(include_url=False):
        if details["type"] == _FIELD_VIOLATION:
            context = details["ctx"]
            found.append(FieldViolation(context["field"], context["description"]))
        else:
            found.append(FieldViolation(_dotted_path(details), _description(details)))
    return found


def _dotted_path(details: ErrorDetails) -> str:
    path, below_union = "", False
    for part in details["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part == "[key]":
            continue
        elif not below_union and part in _UNION_TAGS.get(re.sub(r"\[\d+\]", "", path), ()):
            below_union = True  # pydantic puts the tag of a union into the path; the user never wrote it there
        else:
            path += f".{part}" if path else part
    if details["type"] in _TAG_ERRORS:
        path += ".kind"
    return path or "spec"


def _description(details: ErrorDetails) -> str:
    if details["type"] == "missing":
        return "Field required"
    if details["type"] == "extra_forbidden":
        return "Unknown field; remove it or correct its spelling"
    if details["type"] in _TAG_ERRORS:
        union = str(details["loc"][0]) if details["loc"] else ""
        return f"Expected one of {', '.join(_UNION_TAGS[union])}"
    return f"{details['msg']}; got {shown(details['input'])}"


_FIELD_VIOLATION = "field_violation"
_TAG_ERRORS = frozenset({"union_tag_invalid", "union_tag_not_found"})
#: By the union's field, without places in lists.
_UNION_TAGS = {
    "methods": (
        "l2_init",
        "shrink_and_perturb",
        "redo",
        "self_normalized_resets",
        "upgd",
        "selective_weight_reinitialization",
    ),
    "network": ("mlp", "linear", "convnet", "resnet", "transformer", "registered"),
    "optimizer": ("sgd", "rmsprop", "adam", "adamw"),
}


def contradiction(field: str, description: str) -> PydanticCustomError:
    """An error found only by looking at several fields together; it names the one to change."""
    context = {"field": field, "description": description}
    return PydanticCustomError(_FIELD_VIOLATION, "{field}: {description}", context)


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise SpecError(_violations(error)) from None

    # Without this mark pydantic would build nested records through the __init__ above, and their errors would
    # leave the outer validation without the path that leads to them.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

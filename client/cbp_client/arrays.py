"""Arrays as users have them, of numpy, torch, pandas, JAX, or nested lists, as numpy arrays of numbers."""

import sys
from numbers import Number
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbp_client.arguments import invalid
from cbp_client.errors import InvalidArgument
from cbp_proto.plain import shown


def numbers(argument: str, values: Any) -> NDArray[np.generic]:
    """The values as an array of booleans, integers or floats.

    Tensors of torch may require gradients, be on any device, and have types that numpy lacks: bfloat16 becomes float32,
    which holds the same numbers.

    Raises:
        InvalidArgument: they are something else, or some are missing.
    """
    array = values if type(values) is np.ndarray else _array(argument, values)
    if array.dtype.kind in "biuf":
        return array
    if array.dtype.name == "bfloat16":  # numpy's, as JAX and ml_dtypes register it
        return array.astype(np.float32)
    raise _refused(argument, _problem(array))


def _array(argument: str, values: Any) -> NDArray[Any]:
    if _masked(values):
        raise _refused(argument, "has masked values; fill them, such as with filled(0.0), or leave their examples out")
    try:
        return np.asarray(_without_tensors(values))
    except Exception as error:  # ragged nesting, or whatever the conversion of somebody's own type raises
        raise _refused(argument, f"is not an array of numbers: {' '.join(str(error).split())}") from error


def _masked(values: Any) -> bool:
    """Whether anything is masked, which numpy would take with the number behind the mask."""
    if isinstance(values, np.ma.MaskedArray):
        return bool(np.ma.is_masked(values))
    if not isinstance(values, list | tuple):
        return False
    kinds = set(map(type, values))  # of a row of numbers at the speed of C
    return any(issubclass(kind, np.ma.MaskedArray | list | tuple) for kind in kinds) and any(map(_masked, values))


def _without_tensors(values: Any) -> Any:
    torch: Any = sys.modules.get("torch")  # whoever has a tensor has imported it
    if torch is None:
        return values
    if isinstance(values, list | tuple):
        return [_of_tensor(torch, item) if isinstance(item, torch.Tensor) else item for item in values]
    return _of_tensor(torch, values) if isinstance(values, torch.Tensor) else values


def _of_tensor(torch: Any, tensor: Any) -> NDArray[np.generic]:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        tensor = tensor.to(torch.float32)
    array: NDArray[np.generic] = tensor.numpy()
    return array


def _problem(array: NDArray[np.generic]) -> str:
    if array.dtype.kind != "O":
        return f"must be numbers, not {array.dtype}"
    if not array.ndim:
        return f"must be an array of numbers, not {shown(array.item())}"
    for place, item in np.ndenumerate(array):
        if not isinstance(item, Number) or isinstance(item, complex):
            where = "".join(f"[{index}]" for index in place)
            return (
                f"must be numbers, but {where} is {shown(item)}; fill in what is missing, and encode what is no number"
            )
    return "must be numbers, not Python objects; convert them, such as with astype('float32')"


def _refused(argument: str, description: str) -> InvalidArgument:
    return invalid(argument, description, reason="INVALID_BATCH")

"""What a network takes, counted from its record: nothing is built."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NetworkProfile:
    """Counts of one network."""

    parameters: int
    multiplications: int
    """For one example, forwards; about, and at least as many as parameters."""
    activation_values: int
    """Values of all layers but the last, for one example; about."""
    hidden_units: tuple[int, ...]
    """Per group of units that can be reset: `hidden_0`, `hidden_1`, …"""


class Tally:
    """Adds a network's layers up, as an example goes through them."""

    def __init__(self) -> None:
        self._parameters = self._multiplications = self._values = 0

    def linear(self, into: int, out: int, positions: int = 1, *, bias: bool = True) -> None:
        """A linear layer, or a convolution of `into` = channels · pixels of the kernel, at so many positions."""
        self._parameters += (into + bias) * out
        self._multiplications += into * out * positions
        self._values += out * positions

    def table(self, rows: int, width: int, lookups: int) -> None:
        """An embedding of so many rows, in which so many are looked up."""
        self._parameters += rows * width
        self._values += lookups * width

    def normalization(self, features: int, positions: int = 1) -> None:
        """A scale and a shift for each feature."""
        self._parameters += 2 * features
        self._values += features * positions

    def product(self, multiplications: int, values: int) -> None:
        """Of what has no parameters."""
        self._multiplications += multiplications
        self._values += values

    def parameters(self, count: int) -> None:
        """Those of their own that no layer has."""
        self._parameters += count

    def values(self, count: int) -> None:
        """What activations, poolings and other layers without parameters give."""
        self._values += count

    def profile(self, hidden_units: tuple[int, ...], outputs: int) -> NetworkProfile:
        return NetworkProfile(
            parameters=self._parameters,
            multiplications=max(self._multiplications, self._parameters),
            activation_values=max(self._values - outputs, 0),
            hidden_units=hidden_units,
        )

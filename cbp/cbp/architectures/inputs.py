"""What stands between features as they come and a network: running normalisation, and codes for categories.

Shapes: N examples, I features, F of them quantities, D values after encoding, W the width of a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cbp.spec.network_spec import LARGEST_WHOLE, CategoricalColumn, InputSpec

_EPSILON = 1e-8
_LARGEST = 10.0
"""Standard deviations; what is further away is cut off: a feature that has hardly varied so far would make it huge."""


class RunningNormalization(nn.Module):
    """Brings features to mean 0 and variance 1, by the mean and variance of the examples seen in training.

    In training mode the examples of a pass count before they are normalised. Statistics are merged batch by batch
    (Chan, Golub & LeVeque 1983); once they are of `window` examples, older ones fade.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, features: int, axis: int, window: int) -> None:
        """The features lie along `axis`, counted from the left; 0 is that of the examples."""
        super().__init__()
        self._axis, self._window = axis, window
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.zeros(features))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, values: Tensor) -> Tensor:
        if self.training:
            self._observe(values)
        shape = [1] * values.dim()
        shape[self._axis] = len(self.mean)
        scale = torch.rsqrt(self.variance + _EPSILON).view(shape)
        return ((values - self.mean.view(shape)) * scale).clamp(-_LARGEST, _LARGEST)

    @torch.no_grad()
    def _observe(self, values: Tensor) -> None:
        others = [axis for axis in range(values.dim()) if axis != self._axis]
        variance, mean = torch.var_mean(values, dim=others, correction=0)
        share = len(values) / (self.count + len(values)).to(torch.float32)
        apart = mean - self.mean
        self.mean.add_(apart * share)
        self.variance.add_((variance - self.variance) * share + apart.square() * (share * (1.0 - share)))
        self.count.add_(len(values)).clamp_(max=self._window)


class _Category(nn.Module):
    """One column's categories: [N] values to [N] rows of a table."""

    def __init__(self, column: CategoricalColumn) -> None:
        super().__init__()
        self.column, self._buckets, self.rows = column.column, column.hash_buckets, column.categories

    def forward(self, features: Tensor) -> Tensor:
        values = features[:, self.column].to(torch.int64)
        return _mixed(values + LARGEST_WHOLE) % self._buckets if self._buckets else values


def _mixed(values: Tensor) -> Tensor:
    """32 bits that all depend on all bits of whole numbers from 0 on: the last steps of MurmurHash3."""
    values = ((values ^ values >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    values = ((values ^ values >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return values ^ values >> 16


class _Quantities(nn.Module):
    """[N, F] normalised quantities among [N, I] features."""

    places: Tensor

    def __init__(self, in_features: int, inputs: InputSpec) -> None:
        super().__init__()
        categories = {column.column for column in inputs.columns}
        places = [place for place in range(in_features) if place not in categories]
        self.register_buffer("places", torch.tensor(places, dtype=torch.int64), persistent=False)
        self.count = len(places)
        self.normalization = running_normalization(inputs, len(places), axis=1)

    def forward(self, features: Tensor) -> Tensor:
        normalized: Tensor = self.normalization(features.index_select(1, self.places))
        return normalized


class EncodedColumns(nn.Module):
    """[N, D]: quantities, and behind them the code of each category."""

    def __init__(self, in_features: int, inputs: InputSpec) -> None:
        super().__init__()
        self.quantities = _Quantities(in_features, inputs)
        self.categories = nn.ModuleList([_Category(column) for column in inputs.columns])
        self.codes = nn.ModuleList([_code(column) for column in inputs.columns])

    def forward(self, features: Tensor) -> Tensor:
        codes = [code(category(features)) for category, code in zip(self.categories, self.codes, strict=True)]
        return torch.cat([self.quantities(features), *codes], dim=1)


class _OneHot(nn.Module):
    def __init__(self, categories: int) -> None:
        super().__init__()
        self._categories = categories

    def forward(self, rows: Tensor) -> Tensor:
        return functional.one_hot(rows, self._categories).to(torch.float32)


def _code(column: CategoricalColumn) -> nn.Module:
    return nn.Embedding(column.categories, column.dimension) if column.dimension else _OneHot(column.categories)


class ColumnTokens(nn.Module):
    """[N, I, W]: each quantity times a learnt vector plus another, and a learnt vector for each category."""

    def __init__(self, in_features: int, inputs: InputSpec, width: int) -> None:
        super().__init__()
        self.quantities = _Quantities(in_features, inputs)
        self.directions = nn.Embedding(max(self.quantities.count, 1), width)
        self.offsets = nn.Embedding(max(self.quantities.count, 1), width)
        self.categories = nn.ModuleList([_Category(column) for column in inputs.columns])
        self.codes = nn.ModuleList([nn.Embedding(column.categories, width) for column in inputs.columns])

    def forward(self, features: Tensor) -> Tensor:
        codes = [code(category(features)) for category, code in zip(self.categories, self.codes, strict=True)]
        count = self.quantities.count
        if count:
            values = self.quantities(features).unsqueeze(2)
            codes = [*(values * self.directions.weight + self.offsets.weight).unbind(1), *codes]
        return torch.stack(codes, dim=1)


class EmbeddedTokens(nn.Module):
    """[N, T, W] of [N, T] whole numbers."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(tokens.to(torch.int64))
        return embedded


def running_normalization(inputs: InputSpec, features: int, axis: int) -> nn.Module:
    """Of features along an axis; leaves them as they are if that is asked for."""
    return RunningNormalization(features, axis, inputs.window) if inputs.normalize else nn.Identity()


def tabular_inputs(in_features: int, inputs: InputSpec) -> nn.Module:
    """[N, D] of [N, I]."""
    return EncodedColumns(in_features, inputs) if inputs.columns else running_normalization(inputs, in_features, axis=1)


def all_inputs(parts: Sequence[nn.Module]) -> nn.Module:
    """One after another."""
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)

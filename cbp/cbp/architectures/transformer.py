"""A transformer encoder.

Attention is written out: fused kernels add up gradients in whatever order threads come, and replays would differ.

Shapes: N examples, T tokens, W width, H heads.
"""

from math import sqrt

import torch
from torch import Tensor, nn

from cbp.activations import NONLINEARITIES
from cbp.spec.network_spec import TransformerSpec


class _Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017), every token with every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self._scale = 1.0 / sqrt(width // heads)
        self.queries, self.keys, self.values = (nn.Linear(width, width) for _ in range(3))
        self.shares = nn.Softmax(dim=-1)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        queries, keys, values = (
            layer(tokens).unflatten(2, (self._heads, -1)).transpose(1, 2)
            for layer in (self.queries, self.keys, self.values)
        )
        shares = self.shares(torch.matmul(queries, keys.transpose(2, 3)) * self._scale)
        attended: Tensor = self.output(torch.matmul(shares, values).transpose(1, 2).flatten(2))
        return attended


class _Block(nn.Module):
    """Attention and feed-forward layers, each behind a layer normalisation and added to what came in."""

    def __init__(self, network: TransformerSpec) -> None:
        super().__init__()
        width = network.width
        self.attention_normalization = nn.LayerNorm(width)
        self.attention = _Attention(width, network.heads)
        self.normalization = nn.LayerNorm(width)
        self.expansion = nn.Linear(width, network.feed_forward)
        self.activation = NONLINEARITIES[network.activation].module()
        self.contraction = nn.Linear(network.feed_forward, width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.attention_normalization(tokens))
        added: Tensor = tokens + self.contraction(self.activation(self.expansion(self.normalization(tokens))))
        return added


class TransformerEncoder(nn.Module):
    """[N, T, W] tokens to [N, C]."""

    def __init__(self, network: TransformerSpec) -> None:
        super().__init__()
        # Columns have vectors of their own already.
        places = torch.zeros(network.length, network.width) if network.length else None
        self.positions = None if places is None else nn.Parameter(places)
        self.blocks = nn.Sequential(*(_Block(network) for _ in range(network.depth)))
        self.normalization = nn.LayerNorm(network.width)
        self.output = nn.Linear(network.width, network.out_features)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.positions is not None:
            tokens = tokens + self.positions
        outputs: Tensor = self.output(torch.mean(self.normalization(self.blocks(tokens)), dim=1))
        return outputs

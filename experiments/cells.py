"""A cell of an experiment's table: one learner's settings on one stream, and how often and how long it is run."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Literal

from cbp import LearnerSpec
from experiments.streams import Stream

Mask = tuple[int, ...]
"""Hidden layers in which units are reset, counted from 0."""

_PROTOCOL_VERSION = 1
"""Part of every cell's key: to be raised when streams or measurements change, lest old runs are mixed with new ones."""

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_NUMBERS = ("one", "two", "three")


def masks(depth: int) -> dict[str, Mask]:
    """The masks of the thesis for so many hidden layers (1 to 8), by name. Shallow networks have some by two names;
    the usual one comes first."""
    every = tuple(range(depth))
    named: dict[str, Mask] = {"all": every, "none": ()}
    named |= {f"only {_ORDINALS[layer]}": (layer,) for layer in every}
    named |= {f"first {_NUMBERS[count - 1]}": every[:count] for count in (2, 3)}
    named["all but first"] = every[1:]
    named |= {f"all but first {_NUMBERS[count - 1]}": every[count:] for count in (2, 3)}
    named["alternating"] = every[::2]
    return named


def mask_name(mask: Mask, depth: int) -> str:
    """The name under which `masks` has it; the layers, counted from 1, if it has none."""
    for name, named in masks(depth).items():
        if named == mask:
            return name
    return "layers " + ", ".join(str(layer + 1) for layer in mask)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One entry of a table. By default the thesis's setting: five layers of 100 ReLU, SGD, `contribution`."""

    stream: Stream
    hidden: tuple[int, ...] = (100,) * 5
    activation: str = "relu"
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.005
    weight_decay: float = 0.0
    mask: Mask
    utility: str = "contribution"
    replacement_rate: float = 1e-4
    maturity_threshold: int = 100
    bias_compensation: bool = False
    seeds: int
    """Runs, with the seeds from 0 on. A seed decides the stream, the first weights and the redraws, so that runs of
    one seed in different cells can be compared in pairs."""
    tasks: int
    """Of each run."""

    @property
    def mask_name(self) -> str:
        return mask_name(self.mask, len(self.hidden))

    @property
    def steps(self) -> int:
        """Of one run; a step takes one example."""
        return self.tasks * self.stream.examples

    @property
    def parameter_count(self) -> int:
        """Weights and biases."""
        widths = (self.stream.features, *self.hidden, self.stream.outputs)
        return sum((into + 1) * out for into, out in pairwise(widths))

    @property
    def sample_every(self) -> int:
        """Tasks between two plasticity samples, at least 20,000 steps apart: one costs as much as hundreds of steps."""
        return max(1, -(-20_000 // self.stream.examples))

    @property
    def key(self) -> str:
        """Identifies what a run computes, whatever its length and the number of seeds."""
        plain = self.to_plain()
        del plain["seeds"], plain["tasks"]
        text = json.dumps([_PROTOCOL_VERSION, plain], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def learner_spec(self, seed: int) -> LearnerSpec:
        """Of the learner that this cell is about. The runner takes plasticity samples itself."""
        optimizer = {"kind": self.optimizer, "lr": self.lr, "weight_decay": self.weight_decay}
        resets = {
            "layers": list(self.mask) or "none",
            "replacement_rate": self.replacement_rate,
            "maturity_threshold": self.maturity_threshold,
            "utility": self.utility,
            "bias_compensation": self.bias_compensation,
        }
        return LearnerSpec.parse(
            {
                "network": {
                    "in_features": self.stream.features,
                    "hidden": list(self.hidden),
                    "out_features": self.stream.outputs,
                    "activation": self.activation,
                },
                "loss": "mse" if self.stream.is_regression else "cross_entropy",
                "optimizer": optimizer,
                "batch_size": 1,
                "seed": seed,
                "resets": resets,
                "monitoring": {"interval": 0},
            }
        )

    def to_plain(self) -> dict[str, Any]:
        """One flat record of text, numbers and lists of numbers, from which `from_plain` makes the cell again."""
        plain = asdict(self)
        stream = plain.pop("stream")
        return {"stream": stream["kind"], "images": stream["images"], "examples": stream["examples"]} | {
            name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Cell":
        values = {field.name: plain[field.name] for field in fields(cls) if field.name != "stream"}
        values |= {name: tuple(values[name]) for name in ("hidden", "mask")}
        stream = Stream(kind=plain["stream"], images=plain["images"], examples=plain["examples"])
        return cls(stream=stream, **values)

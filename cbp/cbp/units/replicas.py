"""Replicas of a module in several processes, as `DistributedDataParallel` keeps them: one step's activations are spread
over them, and what is concluded from these must be the same everywhere."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as processes

from cbp.units.draws import UniformGenerator
from cbp.units.unit_groups import Grouping, Replicas


class ProcessReplicas(Replicas):
    """Those of a process group. All take their steps together, and each step costs two or three small reductions.

    As gradients are, means are taken over processes, whichever has how many examples.

    Args:
        may_rest: whether groups may take part in one process and not in another, as where a head is chosen.
    """

    def __init__(self, group: processes.ProcessGroup, *, may_rest: bool) -> None:
        self._group = group
        self._may_rest = may_rest
        self._share: Tensor | float = 1.0 / group.size()

    def resting(self, here: Sequence[int], grouping: Grouping) -> tuple[int, ...]:
        if not self._may_rest:
            return tuple(here)
        taking_part = torch.ones(len(grouping.groups), device=grouping.device)
        taking_part[list(here)] = 0.0
        total = taking_part.clone()
        processes.all_reduce(total, group=self._group)
        share = torch.where(total > 0, taking_part / total.clamp_min(1.0), 1.0 / self._group.size())
        sizes = [group.units * len(group.readings) for group in grouping.groups]
        self._share = share.repeat_interleave(torch.tensor(sizes, device=grouping.device))
        return tuple(index for index, count in enumerate(total.tolist()) if not count)

    def mean(self, values: Tensor) -> Tensor:
        shared = values * self._share
        processes.all_reduce(shared, group=self._group)
        return shared


def draw_alike(generator: UniformGenerator, group: processes.ProcessGroup, device: torch.device) -> None:
    """Lets the generators of all processes go on from the state of the first one's."""
    state = generator.get_state().to(device)
    processes.broadcast(state, group=group, group_src=0)
    generator.set_state(state.cpu())

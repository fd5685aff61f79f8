"""Replicas that `DistributedDataParallel` keeps equal stay equal under resets; a process per replica, over loopback."""

import os
from pathlib import Path

import torch
from torch import distributed, nn
from torch import multiprocessing as processes
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from cbp import ContinualBackprop, HiddenUnits, ReDo, SelfNormalizedResets

RANKS = 2


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.joint, self.heads = nn.Linear(8, 24), nn.ModuleList(nn.Linear(24, 3) for _ in range(2))

    def forward(self, x: torch.Tensor, head: int = 0) -> torch.Tensor:
        return self.heads[head](torch.relu(self.joint(x)))


def replica(rank: int, rendezvous: str, results: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    named = [HiddenUnits(producers="joint", activation="relu", consumers=["heads.0", "heads.1"])]
    found = {}
    for name in ("cbp", "redo", "snr", "alone", "heads"):
        torch.manual_seed(0)
        module: nn.Module = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
        if name == "heads":
            module = Heads()
        wrapped = DistributedDataParallel(module, find_unused_parameters=name == "heads")
        optimizer = SGD(module.parameters(), lr=0.05)
        resets: ContinualBackprop | ReDo | SelfNormalizedResets
        if name == "redo":
            resets = ReDo(module, optimizer, interval=10, dormant_threshold=0.6, seed=rank)
        elif name == "snr":
            resets = SelfNormalizedResets(module, optimizer, longest_silence=2, seed=rank)
        else:
            units = named if name == "heads" else None
            resets = ContinualBackprop(
                module, optimizer, replacement_rate=0.02, maturity_threshold=5, seed=rank, units=units
            )
        given = torch.Generator().manual_seed(rank)
        for step in range(40):
            optimizer.zero_grad()
            x = torch.randn(1 + rank, 8, generator=given) + rank
            through = module if name == "alone" else wrapped
            output = through(x, (step + rank) % 2) if name == "heads" else through(x)
            output.square().mean().backward()
            optimizer.step()
            resets.step()
        found[name] = [value.detach().clone() for value in module.state_dict().values()], resets.replacements
    torch.save(found, Path(results) / f"{rank}.pt")
    os._exit(0)  # not through gloo's own end, which now and then aborts, with torch alone as well


def test_replicas_stay_equal(tmp_path: Path) -> None:
    processes.spawn(replica, (str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=RANKS)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    for name in ("cbp", "redo", "snr", "heads"):
        (values, replaced), (others, replaced_there) = one[name], other[name]
        assert replaced == replaced_there, name
        assert sum(replaced.values()) > 0, name
        for mine, theirs in zip(values, others, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=name)
    # Whoever does not go through the wrapper has a learner of its own in each process, and nobody waits for anybody.
    assert not torch.equal(one["alone"][0][0], other["alone"][0][0])

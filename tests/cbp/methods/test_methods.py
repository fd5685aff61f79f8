"""What every method against loss of plasticity, and every combination that makes sense, has in common."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from architectures import PlainConv, PreNormMlp, images, rows
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from cbp import (
    CbpError,
    L2InitSpec,
    MethodSpec,
    PlasticityMethod,
    ReDoSpec,
    ResetSpec,
    SelectiveWeightReinitializationSpec,
    SelfNormalizedResetsSpec,
    ShrinkAndPerturbSpec,
    SnapshotError,
    SpecError,
    UpgdSpec,
    make_methods,
)
from cbp.units.activation_taps import ActivationTaps
from cbp.units.discovery import discover_units

CBP = ResetSpec(replacement_rate=0.1, maturity_threshold=3, decay_rate=0.9)
L2_INIT = L2InitSpec(strength=0.1)
SHRINK_AND_PERTURB = ShrinkAndPerturbSpec(shrink=0.95, perturb=0.1, interval=3)
REDO = ReDoSpec(interval=4, dormant_threshold=0.5)
SNR = SelfNormalizedResetsSpec(rejection_level=0.4, longest_silence=6)
UPGD = UpgdSpec(noise=0.1, decay_rate=0.9)
SWR = SelectiveWeightReinitializationSpec(replacement_rate=0.03, interval=2, decay_rate=0.5)

METHODS: dict[str, tuple[ResetSpec | None, tuple[MethodSpec, ...]]] = {
    "cbp": (CBP, ()),
    "l2_init": (None, (L2_INIT,)),
    "shrink_and_perturb": (None, (SHRINK_AND_PERTURB,)),
    "redo": (None, (REDO,)),
    "self_normalized_resets": (None, (SNR,)),
    "upgd": (None, (UPGD,)),
    "selective_weight_reinitialization": (None, (SWR,)),
    "cbp_l2_init": (CBP, (L2_INIT,)),
    "cbp_shrink_and_perturb": (CBP, (SHRINK_AND_PERTURB,)),
    "redo_l2_init_shrink_and_perturb": (None, (REDO, L2_INIT, SHRINK_AND_PERTURB)),
    "selective_weight_reinitialization_l2_init": (None, (SWR, L2_INIT)),
}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, rows),
    "convnet": (PlainConv, images),
    "pre_norm_residual": (PreNormMlp, rows),
}


@dataclass
class Run:
    module: nn.Module
    optimizer: Optimizer
    methods: list[PlasticityMethod]

    @classmethod
    def of(cls, method: str, network: str = "mlp", *, seed: int = 0, adam: bool = False) -> "Run":
        torch.manual_seed(0)
        module = NETWORKS[network][0]()
        with torch.no_grad():
            for layer in module.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):  # a unit that hardly does anything
                    layer.weight[0], layer.bias[0] = 0.0, -0.03  # type: ignore[index]
        optimizer: Optimizer = SGD(module.parameters(), lr=0.05)
        if adam:
            optimizer = Adam(module.parameters(), lr=0.01)
        resets, specs = METHODS[method]
        return cls(module, optimizer, make_methods(specs, module, optimizer, resets=resets, seed=seed))

    def learn(self, batches: Iterator[Tensor] | list[Tensor], steps: int) -> None:
        for _, batch in zip(range(steps), batches, strict=False):
            self.optimizer.zero_grad()
            (self.module(batch) - 1).square().mean().backward()
            self.optimizer.step()
            for method in self.methods:
                method.step()

    def numbers(self) -> list[Tensor]:
        """Of all state there is."""
        found = [*self.module.state_dict().values()]
        found += list(_tensors([self.optimizer.state_dict(), [method.state_dict() for method in self.methods]]))
        return [tensor.clone() for tensor in found]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, int | float):
        yield torch.tensor(value)
    elif isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors(entry)


def batches(network: str, seed: int = 1) -> Iterator[Tensor]:
    torch.manual_seed(seed)
    while True:
        yield NETWORKS[network][1]()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_in_a_loop_of_mixed_precision_all_that_is_kept_stays_float32(method: str, network: str) -> None:
    run = Run.of(method, network, adam=method != "upgd")
    with torch.autocast("cpu", torch.bfloat16):
        assert run.module(next(batches(network))).dtype == torch.bfloat16
    for _, batch in zip(range(20), batches(network), strict=False):
        run.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (run.module(batch).float() - 1).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()
        for one in run.methods:
            one.step()
    assert not any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in run.numbers())
    if method in ("cbp", "redo", "self_normalized_resets"):
        assert sum(run.methods[0].replacements.values()) > 0  # type: ignore[attr-defined]


def test_activations_of_mixed_precision_are_averaged_in_float32() -> None:
    module = mlp()
    optimizer = SGD(module.parameters(), lr=0.1)
    taps = ActivationTaps(discover_units(module, lambda _parameter: True, "kaiming").taps, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = module(rows())
    outputs.sum().backward()
    optimizer.step()
    gathered = [activations for passes in taps.take() for activations in passes]
    assert [activations.dtype for activations in gathered] == [torch.float32] * 2
    for activations in gathered:
        assert torch.equal(activations, activations.bfloat16().float())  # in which they had been computed


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


methods = pytest.mark.parametrize("method", METHODS)
networks = pytest.mark.parametrize("network", NETWORKS)


@methods
@networks
def test_it_acts(method: str, network: str) -> None:
    run, plain = Run.of(method, network), Run.of(method, network)
    for one in plain.methods:
        one.remove()
    plain.methods = []
    run.learn(batches(network), 13)
    plain.learn(batches(network), 13)
    assert not same(list(run.module.parameters()), list(plain.module.parameters()))
    assert all(torch.isfinite(parameter).all() for parameter in run.module.parameters())


@methods
@networks
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_saved_and_loaded_it_goes_on_bit_for_bit(method: str, network: str, adam: bool) -> None:
    if adam and method == "upgd":
        pytest.skip("for plain gradients")
    stream = batches(network)
    run = Run.of(method, network, seed=7, adam=adam)
    run.learn(stream, 9)
    saved = copy.deepcopy(
        [run.module.state_dict(), run.optimizer.state_dict(), [method.state_dict() for method in run.methods]]
    )
    rest = [next(stream) for _ in range(11)]
    run.learn(rest, 11)

    twin = Run.of(method, network, seed=8, adam=adam)
    twin.learn(batches(network, seed=2), 2)
    twin.module.load_state_dict(saved[0])
    twin.optimizer.load_state_dict(saved[1])
    for one, state in zip(twin.methods, saved[2], strict=True):
        one.load_state_dict(state)
    twin.learn(rest, 11)
    assert same(run.numbers(), twin.numbers())


@methods
def test_a_seed_decides_everything(method: str) -> None:
    runs = [Run.of(method, seed=seed) for seed in (3, 3, 4)]
    for run in runs:
        run.learn(batches("mlp"), 15)
    assert same(runs[0].numbers(), runs[1].numbers())
    if method != "l2_init":
        assert not same(runs[0].numbers(), runs[2].numbers())


@methods
@networks
def test_the_batch_size_may_change(method: str, network: str) -> None:
    run = Run.of(method, network)
    stream = batches(network)
    run.learn([next(stream)[:size] for size in (6, 2, 1, 5, 3, 1, 6)], 7)
    assert all(torch.isfinite(parameter).all() for parameter in run.module.parameters())


@methods
@networks
def test_passes_that_are_not_learned_from_change_nothing(method: str, network: str) -> None:
    run, undisturbed = Run.of(method, network), Run.of(method, network)
    for batch in [next(batches(network, seed)) for seed in range(9)]:
        run.module.eval()
        run.module(batch + 3)
        run.module(batch).sum().backward()
        run.module.train()
        with torch.no_grad():
            run.module(batch)
        run.module(batch * 2)
        run.learn([batch], 1)
        undisturbed.learn([batch], 1)
    assert same(run.numbers(), undisturbed.numbers())


@methods
def test_nothing_is_registered_in_the_module(method: str) -> None:
    torch.manual_seed(0)
    plain = mlp()
    run = Run.of(method)
    run.learn(batches("mlp"), 7)
    assert list(run.module.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in run.module.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert len(list(run.module.modules())) == len(list(plain.modules()))
    assert all(len(group["params"]) == len(list(plain.parameters())) for group in run.optimizer.param_groups)


@methods
@networks
def test_removed_it_does_nothing_any_more(method: str, network: str) -> None:
    run, plain = Run.of(method, network), Run.of(method, network)
    for one in (*run.methods, *plain.methods):
        one.remove()
    run.methods = []
    plain = Run(plain.module, SGD(plain.module.parameters(), lr=0.05), [])
    run.learn(batches(network), 9)
    plain.learn(batches(network), 9)
    assert same(list(run.module.parameters()), list(plain.module.parameters()))


@methods
def test_float64_is_learned_from_or_refused(method: str) -> None:
    """Units are reset in float32 only."""
    torch.manual_seed(0)
    module = mlp().double()
    optimizer = SGD(module.parameters(), lr=0.05)
    resets, specs = METHODS[method]
    if resets is not None or REDO in specs or SNR in specs:
        with pytest.raises(SpecError, match=r"torch\.float64; only float32 parameters are reset"):
            make_methods(specs, module, optimizer, resets=resets)
        return
    run = Run(module, optimizer, make_methods(specs, module, optimizer, resets=resets))
    run.learn([next(batches("mlp")).double() for _ in range(9)], 9)
    assert all(parameter.dtype == torch.float64 for parameter in module.parameters())
    twin = make_methods(specs, module, optimizer, resets=resets)
    for one, other in zip(twin, run.methods, strict=True):
        one.load_state_dict(other.state_dict())
        assert same(list(_tensors(one.state_dict())), list(_tensors(other.state_dict())))


@pytest.mark.gpu
@methods
@networks
def test_its_state_follows_the_module_to_another_device(method: str, network: str) -> None:
    run = Run.of(method, network)
    stream = batches(network)
    run.learn(stream, 7)
    run.module.cuda()
    run.learn([next(stream).cuda() for _ in range(7)], 7)
    run.module.cpu()
    run.learn(stream, 7)
    assert all(torch.isfinite(parameter).all() for parameter in run.module.parameters())


@methods
def test_a_state_of_another_network_is_refused_and_changes_nothing(method: str) -> None:
    run = Run.of(method)
    run.learn(batches("mlp"), 9)
    before = run.numbers()
    strangers = Run.of(method, "convnet").methods
    for one, stranger in zip(run.methods, strangers, strict=True):
        for state in (stranger.state_dict(), {}, dict.fromkeys(one.state_dict())):
            with pytest.raises(SnapshotError):
                one.load_state_dict(state)
    assert same(run.numbers(), before)


@pytest.mark.parametrize("method", ["cbp", "redo", "self_normalized_resets"])
def test_methods_that_reset_units_tell_of_them(method: str) -> None:
    run = Run.of(method)
    run.learn(batches("mlp"), 21)
    [resets] = run.methods
    table = resets.explain()  # type: ignore[attr-defined]
    assert [line.split()[0] for line in table.splitlines()] == ["group", "hidden_0", "hidden_1", "-"]
    replacements = resets.replacements  # type: ignore[attr-defined]
    assert list(replacements) == ["hidden_0", "hidden_1"]
    assert sum(replacements.values()) > 0
    resets.remove()
    run.module(next(batches("mlp"))).sum().backward()
    with pytest.raises(CbpError, match="forward pass in training mode"):
        resets.step()


def test_resets_that_reset_nothing_are_no_method() -> None:
    module = mlp()
    optimizer = SGD(module.parameters(), lr=0.1)
    for resets in (None, ResetSpec(layers="none"), ResetSpec(replacement_rate=0)):
        assert make_methods([], module, optimizer, resets=resets) == []


@pytest.mark.parametrize(
    ("resets", "specs", "says"),
    [
        (CBP, (REDO,), r"methods\[0\]\.kind: redo decides itself"),
        (CBP, (L2_INIT, SNR), r"methods\[1\]\.kind: self_normalized_resets decides itself"),
        (CBP, (SWR,), r"methods\[0\]\.kind: .* reset units or weights, not both"),
        (CBP, (UPGD,), r"methods\[0\]\.kind: upgd is a whole update rule"),
        (None, (REDO, SNR), r"methods\[1\]\.kind: redo resets units already"),
        (None, (L2_INIT, L2_INIT), r"methods\[1\]\.kind: l2_init is there already"),
    ],
)
def test_what_does_not_go_together_is_refused(
    resets: ResetSpec | None, specs: tuple[MethodSpec, ...], says: str
) -> None:
    module = mlp()
    optimizer = SGD(module.parameters(), lr=0.1)
    with pytest.raises(SpecError, match=says):
        make_methods(specs, module, optimizer, resets=resets)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("method", ["l2_init", "upgd"])
def test_closures_are_refused(method: str) -> None:
    """Their gradients would be made after the method has looked at them."""
    run = Run.of(method)

    def closure() -> float:
        loss = run.module(next(batches("mlp"))).sum()
        loss.backward()
        return float(loss)

    with pytest.raises(CbpError, match="call backward"):
        run.optimizer.step(closure)
    with pytest.raises(CbpError, match="call backward"):
        run.optimizer.step(closure=closure)


@methods
def test_an_optimizer_of_other_parameters_is_refused(method: str) -> None:
    resets, specs = METHODS[method]
    with pytest.raises(SpecError):
        make_methods(specs, mlp(), SGD(mlp().parameters(), lr=0.1), resets=resets)


@pytest.mark.parametrize(
    ("optimizer_type", "resets", "specs"),
    [
        (torch.optim.Rprop, None, (L2_INIT, REDO)),
        (torch.optim.Rprop, CBP, (L2_INIT,)),
        (Adam, ResetSpec(layers=("hidden_7",)), (L2_INIT,)),
        (Adam, None, (UPGD,)),
    ],
)
def test_what_is_refused_leaves_no_hooks(
    optimizer_type: Callable[[Any], Optimizer], resets: ResetSpec | None, specs: tuple[MethodSpec, ...]
) -> None:
    module = mlp()
    optimizer = optimizer_type(module.parameters())
    with pytest.raises(SpecError):
        make_methods(specs, module, optimizer, resets=resets)
    assert not any(layer._forward_hooks for layer in module.modules())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks

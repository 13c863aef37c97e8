"""Optimisers by name: their numbers, their memory, their states, and a step without a loss."""

import io
import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import remax.optimisers
from remax.compilation import check_compiler
from remax.config import OptimiserOptions, SFTConfig
from remax.errors import UserError
from remax.guards.finite import NotFinite
from remax.learner import Learner
from remax.logs import hush
from remax.optimisers import check_optimiser, make_optimizer
from remax.stages.common import trainer_arguments
from tiny_models import tiny_model

ALL = ["adamw_torch_fused", "adamw_torch", "adamw_torch_8bit", "adafactor"]


@pytest.fixture
def eager() -> Iterator[None]:
    """torchao compiles its step for every shape of weights, which takes a minute; its mathematics do not need it."""
    with torch.compiler.set_stance("force_eager"):
        yield


def network(dtype: torch.dtype = torch.float32, width: int = 64) -> nn.Module:
    """A matrix of 8 x width^2 / 8 and a vector of width weights."""
    torch.manual_seed(0)
    return nn.Linear(width, width).to(dtype)


def step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seed: int) -> None:
    """Takes a step with gradients, and stochastic rounding, of this seed."""
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
    optimizer.step()


def after_steps(args: OptimiserOptions, num_steps: int = 5) -> list[Tensor]:
    model = network()
    optimizer, parameters = make_optimizer(model, args), list(model.parameters())
    for seed in range(num_steps):
        step(optimizer, parameters, seed)
    return [p.detach() for p in parameters]


# Numbers --------------------------------------------------------------------------------------------------------------


def literal_adamw(args: OptimiserOptions, num_steps: int = 5) -> list[Tensor]:
    """AdamW as Loshchilov and Hutter write it (arXiv 1711.05101, Algorithm 2), float64."""
    weights = [p.detach().double() for p in network().parameters()]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    beta1, beta2 = args.adam_beta1, args.adam_beta2
    for t in range(1, num_steps + 1):
        torch.manual_seed(t - 1)
        for i, weight in enumerate(weights):
            gradient = torch.randn(weight.shape).double()
            first[i] = beta1 * first[i] + (1 - beta1) * gradient
            second[i] = beta2 * second[i] + (1 - beta2) * gradient**2
            direction = first[i] / (1 - beta1**t) / ((second[i] / (1 - beta2**t)).sqrt() + args.adam_epsilon)
            decay = args.weight_decay if weight.ndim >= 2 else 0.0
            weights[i] = weight - args.learning_rate * (direction + decay * weight)
    return weights


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_adamw_is_the_formula_fused_or_not(optim: Any) -> None:
    args = OptimiserOptions(optim=optim, learning_rate=1e-2, weight_decay=0.3, adam_beta2=0.95)
    torch.testing.assert_close([w.double() for w in after_steps(args)], literal_adamw(args), rtol=2e-6, atol=1e-7)


def test_the_default_is_fused() -> None:
    assert make_optimizer(network(), OptimiserOptions()).param_groups[0]["fused"] is True
    # False would also switch off torch's kernels over lists of tensors, which it chooses by itself on a GPU.
    assert make_optimizer(network(), OptimiserOptions(optim="adamw_torch")).param_groups[0]["fused"] is None


def test_8bit_adamw_stays_close_to_the_formula(eager: None) -> None:
    args = OptimiserOptions(optim="adamw_torch_8bit", learning_rate=1e-2, weight_decay=0.3, adam_beta2=0.95)
    for ours, exact, start in zip(after_steps(args), literal_adamw(args), network().parameters(), strict=True):
        moved, exactly = ours.double() - start.detach(), exact - start.detach()
        assert (moved - exactly).norm() < 0.05 * exactly.norm(), "eight bits are a few percent"


def test_adafactor_takes_the_rate_as_it_is() -> None:
    """Shazeer and Stern, arXiv 1804.04235, Algorithm 4 without relative steps, the first step."""
    args = OptimiserOptions(optim="adafactor", learning_rate=1e-2)
    matrix, vector = after_steps(args, num_steps=1)
    torch.manual_seed(0)
    gradient = torch.randn(64, 64).double()
    square = gradient**2
    second = torch.outer(square.mean(1), square.mean(0)) / square.mean()
    update = gradient / second.sqrt()
    update /= max(1.0, update.square().mean().sqrt().item())
    signs = torch.randn(64).sign()
    start = [p.detach() for p in network().parameters()]
    torch.testing.assert_close(matrix.double(), start[0].double() - 1e-2 * update, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(vector, start[1] - 1e-2 * signs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optim", ALL)
def test_matrices_decay_and_vectors_do_not(optim: Any, eager: None) -> None:
    model = network()
    matrix, vector = (p.detach().clone() for p in model.parameters())
    optimizer = make_optimizer(model, OptimiserOptions(optim=optim, learning_rate=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), matrix * (1 - 0.1 * 0.5), rtol=1e-6, atol=0)
    assert torch.equal(model.bias, vector)


@pytest.mark.parametrize("optim", ALL)
def test_frozen_weights_are_left_out(optim: Any) -> None:
    model = network()
    model.weight.requires_grad_(False)
    groups = make_optimizer(model, OptimiserOptions(optim=optim)).param_groups
    assert [p for group in groups for p in group["params"]] == [model.bias]


# Stochastic rounding --------------------------------------------------------------------------------------------------


def mean_movement(optim: Any, dtype: torch.dtype, num_steps: int = 20) -> tuple[Tensor, float]:
    """Returns how far weights of 0.02 and -0.02 moved in the mean under gradients of 1 and -1, [sign, gradient], and
    the share that moved."""
    weight = nn.Parameter(torch.tensor([0.02, -0.02]).repeat_interleave(2).repeat(2**15).to(dtype))
    start = weight.detach().clone()
    optimizer = make_optimizer(nn.ParameterList([weight]), OptimiserOptions(optim=optim, learning_rate=1e-6))
    torch.manual_seed(0)
    for _ in range(num_steps):
        weight.grad = torch.tensor([1.0, -1.0]).repeat(2**16).to(dtype)
        optimizer.step()
    moved = (weight.detach() - start).double()
    return moved.view(-1, 2, 2).mean(0), (moved != 0).double().mean().item()


def test_small_updates_of_bfloat16_weights_arrive_in_the_mean_with_8bit_alone(eager: None) -> None:
    exact, share = mean_movement("adamw_torch", torch.float32)
    torch.testing.assert_close(exact, torch.tensor([[-2e-5, 2e-5]] * 2).double(), rtol=1e-2, atol=0)
    assert share == 1
    vanished, share = mean_movement("adamw_torch", torch.bfloat16)
    assert share == 0
    assert not vanished.any()
    rounded, share = mean_movement("adamw_torch_8bit", torch.bfloat16)
    assert 0.05 < share < 0.3, "a last digit is 1.2e-4 or 6.1e-5: few weights move, but by a whole digit"
    # The standard error of each mean is 1.5%.
    torch.testing.assert_close(rounded, exact, rtol=0.06, atol=0)


# Memory ---------------------------------------------------------------------------------------------------------------


def num_bytes(tensor: Tensor) -> int:
    inner = getattr(tensor, "tensor_attrs", None)
    return sum(getattr(tensor, name).nbytes for name in inner) if inner else tensor.nbytes


def bytes_per_weight(optim: Any, dtype: torch.dtype) -> float:
    """Returns bytes of weights, gradients and states of a Llama of 1.3 million weights, per weight."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    model = tiny_model("llama", **sizes, vocab_size=1024).to(dtype)
    optimizer = make_optimizer(model, OptimiserOptions(optim=optim))
    parameters = list(model.parameters())
    step(optimizer, parameters, seed=0)
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    total = sum(map(num_bytes, [*parameters, *(p.grad for p in parameters if p.grad is not None), *states]))
    return total / sum(p.numel() for p in parameters)


def test_bytes_per_weight(eager: None) -> None:
    assert bytes_per_weight("adamw_torch_fused", torch.float32) == pytest.approx(16, abs=0.01)
    assert bytes_per_weight("adamw_torch_fused", torch.bfloat16) == pytest.approx(8, abs=0.01)
    assert bytes_per_weight("adafactor", torch.float32) == pytest.approx(8, abs=0.1)
    # Two states of a byte, and a float32 scale for 256 of them each.
    assert bytes_per_weight("adamw_torch_8bit", torch.bfloat16) == pytest.approx(2 + 2 + 2 * (1 + 4 / 256), abs=0.06)


class LargestResult(TorchDispatchMode):
    """Notes the most bytes that one operation allocates."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func._schema.is_mutable:
            self.num_bytes = max(self.num_bytes, result.nbytes)
        return result


def test_clipping_copies_no_gradient() -> None:
    model = network(torch.bfloat16, width=512)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with LargestResult() as largest:
        norm = Accelerator().clip_grad_norm_(model.parameters(), 1.0)
    assert float(norm) == pytest.approx(math.sqrt(512 * 513), rel=1e-2)
    assert model.weight.grad.float().mean().item() == pytest.approx(1 / math.sqrt(512 * 513), rel=1e-2)
    assert largest.num_bytes <= 64


# States ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", ALL)
def test_training_goes_on_exactly_from_a_saved_state(optim: Any, dtype: torch.dtype, eager: None) -> None:
    args = OptimiserOptions(optim=optim, learning_rate=1e-2, weight_decay=0.1)
    model = network(dtype)
    optimizer, parameters = make_optimizer(model, args), list(model.parameters())
    for seed in range(3):
        step(optimizer, parameters, seed)
    file = io.BytesIO()
    torch.save({"weights": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for seed in range(3, 6):
        step(optimizer, parameters, seed)

    resumed = network(dtype)
    again = make_optimizer(resumed, args)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["weights"])
    again.load_state_dict(saved["optimizer"])
    for seed in range(3, 6):
        step(again, list(resumed.parameters()), seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


# A step ---------------------------------------------------------------------------------------------------------------


def learner(optim: Any, **settings: Any) -> tuple[nn.Module, Learner]:
    model = network()
    args = OptimiserOptions(optim=optim, learning_rate=1e-2, weight_decay=0.1, **settings)
    return model, Learner(model, args, Accelerator(), max_steps=10, rate_flag="learning_rate")


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("optim", ALL)
def test_a_step_without_a_loss_is_the_step_of_a_loss_of_zero(optim: Any, max_grad_norm: float, eager: None) -> None:
    inputs = torch.randn(4, 64)
    models = []
    for zero in (True, False):
        model, taught = learner(optim, max_grad_norm=max_grad_norm)
        taught.update([taught.network(inputs).square().sum()], 1)
        before = model.weight.detach().clone()
        losses = [0.0 * taught.network(inputs).sum()] if zero else []
        assert taught.update(losses, len(losses)) == 0.0
        assert not torch.equal(before, model.weight), "momentum and decay go on"
        assert all(p.grad is None for p in model.parameters())
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_rate_of_8bit_follows_the_schedule_through_accelerate(eager: None) -> None:
    _, taught = learner("adamw_torch_8bit", warmup_steps=2)
    rates = []
    for _ in range(4):
        rates.append(taught.learning_rate)
        assert float(taught.optimizer.param_groups[0]["lr"]) == pytest.approx(rates[-1])
        taught.update([taught.network(torch.ones(1, 64)).sum()], 1)
        taught.scheduler.step()
    assert rates == pytest.approx([0, 5e-3, 1e-2, 1e-2 * 7 / 8])


def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    model, taught = learner("adamw_torch_fused")
    before = model.weight.detach().clone()
    with pytest.raises(NotFinite, match="the loss is not finite"):
        taught.update([math.inf * taught.network(torch.ones(1, 64)).sum()], 1)
    assert torch.equal(before, model.weight)


# What is not there ----------------------------------------------------------------------------------------------------


def test_missing_torchao_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remax.optimisers, "find_spec", lambda name: None)
    check_optimiser(OptimiserOptions())
    with pytest.raises(UserError, match=r"--optim is adamw_torch_8bit.* pip install \"remax-rlhf\[quantization\]\""):
        check_optimiser(OptimiserOptions(optim="adamw_torch_8bit"))
    with pytest.raises(UserError, match="torchao, which is not installed"):
        trainer_arguments(TrainingArguments, SFTConfig(optim="adamw_torch_8bit", report_to=[]))


def test_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_optimiser(OptimiserOptions())
    with pytest.raises(UserError, match=r"--optim is adamw_torch_8bit: .*no C\+\+ compiler no-such-compiler"):
        check_optimiser(OptimiserOptions(optim="adamw_torch_8bit"))


def test_weights_without_a_fused_kernel_are_refused() -> None:
    model = network().to("meta")
    make_optimizer(model, OptimiserOptions(optim="adamw_torch"))
    with pytest.raises(UserError, match=r"no such kernel for torch\.float32 weights on meta; set --optim adamw_torch"):
        make_optimizer(model, OptimiserOptions())


def test_only_the_noise_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    hush()
    hush()
    logger = logging.getLogger("torchao")
    logger.warning("Failed to load %s", "_C_cutlass_90a.abi3.so")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    assert len(logger.filters) == 1


# The stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ALL)
def test_stages_get_the_same_optimiser_from_transformers(optim: Any, tmp_path: Any) -> None:
    config = SFTConfig(optim=optim, output_dir=str(tmp_path / "out"), report_to=[])
    arguments = trainer_arguments(TrainingArguments, config)
    model = network()
    theirs, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    ours = make_optimizer(model, config)
    assert isinstance(ours, theirs)
    theirs = theirs([{"params": [model.weight]}], **settings)
    for name in ("fused", "betas", "eps", "scale_parameter", "relative_step"):
        assert theirs.defaults.get(name) == ours.defaults.get(name)
    rounds_stochastically = [bool(getattr(made, "bf16_stochastic_round", False)) for made in (theirs, ours)]
    assert rounds_stochastically == [optim == "adamw_torch_8bit"] * 2
    assert float(theirs.param_groups[0]["lr"]) == pytest.approx(config.learning_rate)


@pytest.mark.slow
def test_8bit_as_torchao_compiles_it() -> None:
    try:
        check_compiler("", instead="")
    except UserError as error:
        pytest.skip(f"torchao compiles its step: {error}")
    args = OptimiserOptions(optim="adamw_torch_8bit", learning_rate=1e-2, weight_decay=0.3, adam_beta2=0.95)
    compiled = after_steps(args)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(compiled, after_steps(args), rtol=1e-5, atol=1e-6)
    rounded, _ = mean_movement("adamw_torch_8bit", torch.bfloat16)
    exact, _ = mean_movement("adamw_torch", torch.float32)
    torch.testing.assert_close(rounded, exact, rtol=0.06, atol=0)

"""The accounting of one method, in a process of its own: two steps of training, watched.

The first step is watched with hooks on the models and on autograd, which change no number; the second one runs without
them, so that its peaks are those of training.
"""

import contextlib
import math
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from remax.compare import predict
from remax.compare.hyperparameters import added_hyperparameters
from remax.compare.predict import Call
from remax.compare.spec import Run
from remax.config import CompareInputs
from remax.errors import UserError
from remax.logprobs import CompletionScorer
from remax.meters import PhaseMeter
from remax.methods import PPO
from remax.plan import formulas
from remax.plan.networks import Counts, head
from remax.progress import PlainLines
from remax.rewards.named import named_rewards
from remax.trainer import ReMaxTrainer

_count: Any = sdpa_flop_count
_count_backward: Any = sdpa_backward_flop_count
UNKNOWN_OPERATIONS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: _count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: _count_backward(gradient, q, k, v)
    ),
    # The head adds up its gradient in place.
    torch.ops.aten.addmm_: lambda added, left, right, **_: 2 * left[0] * left[1] * right[1],
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # Weights that a rollout has packed, [out, in].
    UNKNOWN_OPERATIONS[torch.ops.mkldnn._linear_pointwise] = lambda x, w, *_, **__: 2 * math.prod(x) * w[0]
"""Operations that torch's counter does not know by itself."""


def measure_run(inputs: CompareInputs, planned: Run, log: Path) -> dict[str, Any]:
    """Returns what two steps of a method take, measured and predicted; what training says goes to the log.

    Raises:
        UserError: something cannot be used.
    """
    rewards = named_rewards(inputs, planned.args.reward_timeout_seconds)
    with (
        log.open("w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        TemporaryDirectory() as folder,
    ):
        trainer = ReMaxTrainer(
            inputs.model,
            rewards,
            replace(planned.args, output_dir=folder, eval_steps=0, max_steps=max(2, planned.args.max_steps)),
            train_dataset=inputs.train_dataset,
            view=PlainLines(),
        )
        return measure(trainer)


def measure(trainer: ReMaxTrainer) -> dict[str, Any]:
    """Returns what two steps of a new trainer take; bytes and floating-point operations throughout.

    Raises:
        UserError: no completion of the first step has a reward.
    """
    watch = Watch(trainer)
    trainer.meter = watch
    with watch.hooks():
        record = trainer.step(trainer.order.batch(1), 1)
    if not record.trained.any():
        raise UserError("the rewards gave no number for any completion of the first step: there is nothing to measure.")
    static = watch.static_bytes()
    trainer.meter = plain = Transients(trainer.accelerator.device)
    trainer.step(trainer.order.batch(2), 2)
    counts = {name: network.counts for name, network in predict.measured_networks(trainer).items()}
    return {
        "method": trainer.args.method,
        "hyperparameters": added_hyperparameters(trainer.args),
        "parameters": {name: own.parameters for name, own in counts.items()},
        "trained": {name: own.trained for name, own in counts.items() if own.trained},
        "step": {
            "prompts": trainer.args.batch_size,
            "samples": len(record.rollout.samples),
            "greedy": len(record.rollout.greedy),
            "tokens": sum(len(c.token_ids) for c in record.rollout.samples + record.rollout.greedy),
        },
        "static": _beside(static, formulas.static_bytes(counts, trainer.args)),
        "gradients_at_once": watch.gradients_at_once,
        "equal_size_theory": formulas.equal_size_bytes(counts, trainer.args),
        "device": trainer.accelerator.device.type,
        "phases": _phases(trainer, watch, plain),
        "flops": _flops(watch, counts, trainer),
    }


def _phases(trainer: ReMaxTrainer, watch: "Watch", plain: "Transients") -> dict[str, Any]:
    predicted = predict.phase_bytes(trainer, watch.calls)
    return {
        phase: {
            **_beside(measured, predicted[phase]),
            "made": plain.made[phase],
            "peak": plain.peak_bytes[phase],
            "seconds": plain.seconds[phase],
        }
        for phase, measured in watch.phase_bytes().items()
    }


def _flops(watch: "Watch", counts: Mapping[str, Counts], trainer: ReMaxTrainer) -> dict[str, Any]:
    flops: dict[str, Any] = _beside(
        watch.flops, predict.flops(watch.calls, counts, recompute=trainer.args.gradient_checkpointing)
    )
    flops["total"] = {kind: sum(own[kind] for own in flops.values()) for kind in ("measured", "predicted")}
    if watch.experience_flops is not None:
        epochs = trainer.args.num_ppo_epochs
        per_epoch = (watch.flops["update"] - watch.experience_flops) / epochs
        flops["epochs"] = {"set": epochs, "once": flops["total"]["measured"] - epochs * per_epoch, "each": per_epoch}
    return flops


def _beside(measured: Mapping[str, float], predicted: Mapping[str, float]) -> dict[str, dict[str, float]]:
    assert list(measured) == list(predicted), (list(measured), list(predicted))
    return {name: {"measured": value, "predicted": predicted[name]} for name, value in measured.items()}


class Watch(PhaseMeter):
    """Measures what a step takes: what the networks' hooks see, operations, and what autograd keeps."""

    def __init__(self, trainer: ReMaxTrainer) -> None:
        super().__init__(trainer.accelerator.device)
        self.trainer = trainer
        self.phase = ""
        self.calls: list[Call] = []
        self.flops: dict[str, int] = {}
        self.experience_flops: int | None = None
        self.logits: dict[str, int] = defaultdict(int)
        self.largest_cache = 0
        self.gradients: dict[str, int] = {}
        self.gradients_at_once = 0
        parameters = (p for network in predict.networks(trainer).values() for p in network.parameters())
        self.saved = SavedTensors(parameters)
        self.reward_bytes = 0

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Watches a phase."""
        self.phase = phase
        transients = LiveTensors() if phase == "reward" else contextlib.nullcontext()
        self.counter = FlopCounterMode(display=False, custom_mapping=UNKNOWN_OPERATIONS)
        vars(self.counter)["mod_tracker"] = _OneModule()
        with super().measure(phase), self.saved, transients, self.counter:
            yield
        self.flops[phase] = self.counter.get_total_flops()
        if isinstance(transients, LiveTensors):
            self.reward_bytes = transients.peak

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Watches the networks and the optimisers of the trainer."""
        trainer, handles = self.trainer, []
        networks = predict.networks(trainer)
        handles.append(trainer.parts.policy.register_forward_hook(self._on_decode, with_kwargs=True))
        handles.append(trainer.policy.network.register_forward_hook(self._on_scorer("policy")))
        if trainer.parts.reference is not None:
            self._watch_reference(trainer.parts.reference)
        for name, network in networks.items():
            if name.startswith("reward"):
                handles.append(network.register_forward_hook(self._on_reward(name), with_kwargs=True))
        heads = {id(own): own for own in map(head, networks.values()) if own is not None}
        handles += [own.register_forward_hook(self._on_head) for own in heads.values()]
        for optimizer in self.optimizers().values():
            handles.append(optimizer.register_step_pre_hook(self._on_update))
        if isinstance(trainer.method, PPO):
            handles.append(trainer.method.critic.network.register_forward_hook(self._on_scorer("value")))
            self._watch_experience(trainer.method)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            vars(trainer.method).pop("experience", None)
            if trainer.parts.reference is not None:
                vars(trainer.parts.reference).pop("logprobs", None)

    def static_bytes(self) -> dict[str, int]:
        """Returns what weights, gradients and optimiser states take between two steps."""
        seen: set[int] = set()
        networks = predict.networks(self.trainer)
        weights = {f"weights/{name}": num_bytes(own.parameters(), seen) for name, own in networks.items()}
        states = {
            f"optimiser/{name}": num_bytes(_tensors(list(optimizer.state.values())), seen)
            for name, optimizer in self.optimizers().items()
        }
        return weights | {f"gradients/{name}": value for name, value in self.gradients.items()} | states

    def phase_bytes(self) -> dict[str, dict[str, int]]:
        """Returns the largest sizes of what the phases hold."""
        return {
            "rollout": {"kv_cache": self.largest_cache, "logits": self.logits["rollout"]},
            "reward": {"activations": self.reward_bytes},
            "reference": {"logits": self.logits["reference"]},
            "update": {"activations": self.saved.peak, "logits": self.logits["update"]},
        }

    def optimizers(self) -> dict[str, Any]:
        """Returns torch's optimisers inside those that Accelerate prepared."""
        learners = {"policy": self.trainer.policy}
        if isinstance(self.trainer.method, PPO):
            learners["value"] = self.trainer.method.critic
        return {name: getattr(own.optimizer, "optimizer", own.optimizer) for name, own in learners.items()}

    def _on_decode(self, module: Any, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            return
        rows, length = kwargs["input_ids"].shape
        self.calls.append(Call("policy", self.phase, rows, length, rows, trained=False))
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
        # Their storages: the engine makes room for the tokens to come.
        storages = {_address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
        self.largest_cache = max(self.largest_cache, sum(storages.values()))

    def _on_scorer(self, name: str) -> Any:
        def hook(module: Any, args: Any, outputs: Any) -> None:
            rows, length = args[0].input_ids.shape
            num_outputs = int(args[0].completion_mask.sum())
            self.calls.append(Call(name, self.phase, rows, length, num_outputs, trained=torch.is_grad_enabled()))
            if len(args) > 2 and args[2] is not None:  # The exact KL, which reads the reference's states.
                self.calls.append(Call("reference", self.phase, rows, length, num_outputs, trained=False))

        return hook

    def _on_reward(self, name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
            rows, length = kwargs["input_ids"].shape
            self.calls.append(Call(name, self.phase, rows, length, 0, trained=False))

        return hook

    def _on_head(self, module: Any, args: Any, outputs: Tensor) -> None:
        self.logits[self.phase] = max(self.logits[self.phase], num_bytes([outputs]))

    def _on_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        networks = predict.networks(self.trainer)
        alive = {
            name: num_bytes(p.grad for p in networks[name].parameters() if p.grad is not None)
            for name in self.optimizers()
        }
        self.gradients = {name: max(value, self.gradients.get(name, 0)) for name, value in alive.items()}
        self.gradients_at_once = max(self.gradients_at_once, sum(alive.values()))

    def _watch_reference(self, reference: CompletionScorer) -> None:
        logprobs, hook = reference.logprobs, self._on_scorer("reference")

        def seen(*args: Any) -> Tensor:
            hook(reference, args, None)
            return logprobs(*args)

        vars(reference)["logprobs"] = seen

    def _watch_experience(self, method: PPO) -> None:
        experience = method.experience

        def counted(*args: Any) -> Any:
            result = experience(*args)
            self.experience_flops = self.counter.get_total_flops()
            return result

        vars(method)["experience"] = counted


class Transients(PhaseMeter):
    """Measures time and peaks as training does and, on any device, the tensors that a phase makes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.made: dict[str, int] = {}

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Measures a phase."""
        with super().measure(phase), LiveTensors() as live:
            yield
        self.made[phase] = live.peak


class _OneModule:
    """Takes the place of what tells torch's counter in which module an operation is: all together are wanted.

    torch's own cannot stand a module inside an autograd function, which the language-model head is.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...
    def __exit__(self, *error: Any) -> None: ...


class SavedTensors:
    """What autograd keeps for the backward pass: the peak of its bytes, parameters left out.

    With gradient checkpointing these are the inputs of the layers; what is recomputed is not seen.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self.peak = self.total = 0
        self.uses: dict[int, int] = defaultdict(int)

    def __enter__(self) -> None:
        self.context = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)
        self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)

    def _pack(self, tensor: Tensor) -> "_Held":
        # Detached: an output that autograd keeps would keep the graph that keeps it.
        held, storage = _Held(tensor.detach()), tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.parameters:
            self.total += size if self.uses[key] == 0 else 0
            self.uses[key] += 1
            self.peak = max(self.peak, self.total)
            weakref.finalize(held, self._release, key, size)
        return held

    def _release(self, key: int, size: int) -> None:
        self.uses[key] -= 1
        self.total -= size if self.uses[key] == 0 else 0


class _Held:
    """A tensor that autograd keeps; its end is the end of that."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The peak bytes of the tensors that are made inside and still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.total = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts the memory that is new in what it returns."""
        result = func(*args, **(kwargs or {}))
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            address, size = _address(tensor), _size(tensor)
            if address not in given and address not in self.known:
                self.known.add(address)
                self.total += size
                owner = tensor if tensor.is_mkldnn else tensor.untyped_storage()
                weakref.finalize(owner, self._release, address, size)
        self.peak = max(self.peak, self.total)
        return result

    def _release(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.total -= size


def _address(tensor: Tensor) -> int:
    """Returns what tells tensors in different memory apart; weights that oneDNN has packed show no memory."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


def _size(tensor: Tensor) -> int:
    """Returns the bytes of the memory that a tensor lies in."""
    return tensor.numel() * tensor.element_size() if tensor.is_mkldnn else tensor.untyped_storage().nbytes()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def num_bytes(tensors: Iterable[Tensor], seen: set[int] | None = None) -> int:
    """Returns the bytes of the tensors that are not in `seen` yet, each address once."""
    seen = set() if seen is None else seen
    total = 0
    for tensor in tensors:
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.numel() * tensor.element_size()
    return total

"""The command: from configs and settings to a plan, in tables and as JSON."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from remax.config import PlanConfig, PlanInputs, ReMaxConfig
from remax.errors import UserError
from remax.plan.device import Memory, memory_of
from remax.plan.formulas import is_half
from remax.plan.network import Transfer, transfers
from remax.plan.networks import Network, measure_networks, networks_of_configs, read_config
from remax.plan.phases import Peak, Workload, as_record, largest, of_vllm, predict
from remax.plan.proposals import Proposal, cheapest, levers, single_changes, with_method
from remax.plan.ratios import Ratio, ratios
from remax.plan.sharding import Split
from remax.recording import write_json
from remax.untrusted import shown

MORE_THAN_WEIGHTS = 1.2
"""What is proposed for vLLM, over its weights: it needs a cache of keys and values too."""


@dataclass(frozen=True)
class Plan:
    """What a run will take, whether it fits and what would."""

    inputs: PlanInputs
    args: ReMaxConfig
    memory: Memory
    work: Workload
    parameters: dict[str, int]
    """By network."""
    peaks: dict[str, Peak]
    methods: dict[str, Peak]
    """The largest peak of the same run with ReMax and with PPO."""
    network: list[Transfer]
    """What a step moves between the devices."""
    single: list[Proposal]
    proposal: Proposal | None
    split: Split

    @cached_property
    def ratios(self) -> list[Ratio]:
        """ReMax against PPO by size of the model; computed only if it is shown."""
        return ratios(self.args, self.work, self.split)

    @property
    def fits(self) -> bool:
        """Whether the peak leaves free what has to be."""
        return largest(self.peaks).total <= self.memory.usable

    def record(self) -> dict[str, Any]:
        """Returns it as --output_file has it; bytes throughout."""
        return {
            "inputs": asdict(self.inputs),
            "settings": asdict(self.args),
            "device": {"name": self.memory.name, "memory": self.memory.total, "usable": self.memory.usable},
            "step": asdict(self.work),
            "parameters": self.parameters,
            "phases": as_record(self.peaks),
            "peak": largest(self.peaks).total,
            "fits": self.fits,
            "methods": {name: peak.total for name, peak in self.methods.items()},
            "network": [transfer.record() for transfer in self.network],
            "single_changes": [_proposal_record(own) for own in self.single],
            "proposal": None if self.proposal is None else _proposal_record(self.proposal),
            "ratios": [
                {
                    "model": own.name,
                    "parameters": own.parameters,
                    "remax": asdict(own.remax),
                    "ppo": asdict(own.ppo),
                    "static_ratio": own.static,
                    "peak_ratio": own.peak,
                }
                for own in self.ratios
            ],
        }


def _proposal_record(own: Proposal) -> dict[str, Any]:
    return {"changes": own.changes, "peak": own.peak.total, "fits": own.fits, "price": own.price}


def run_plan(inputs: PlanInputs, args: PlanConfig) -> Plan:
    """Makes the plan, prints it and, with an output_file, writes it down.

    Raises:
        UserError: a config cannot be read, settings do not go together, or the file cannot be written.
    """
    from remax.plan.report import print_plan

    plan = make_plan(inputs, args)
    print_plan(plan)
    if args.output_file:
        path = Path(args.output_file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, plan.record())
        except OSError as error:
            raise UserError(
                f"--output_file is {shown(path)}: it cannot be written ({error.strerror}); set another path."
            ) from None
    return plan


def make_plan(inputs: PlanInputs, args: ReMaxConfig) -> Plan:
    """Returns the plan of a run.

    Raises:
        UserError: a config cannot be read, or settings do not go together.
    """
    policy = read_config(inputs.model, flag="--model")
    reward = read_config(inputs.reward_model, flag="--reward_model") if inputs.reward_model else None
    if reward is None and not inputs.reward_funcs and not inputs.reward_url:
        reward = policy
    gold = read_config(inputs.gold_reward_model, flag="--gold_reward_model") if inputs.gold_reward_model else None
    value = read_config(args.value_model, flag="--value_model") if args.value_model else None
    work = _work(inputs, args, policy)
    memory, split = memory_of(inputs), Split(inputs.sharding, inputs.num_devices)
    built: dict[tuple[Any, ...], Mapping[str, Network]] = {}

    def networks(own: ReMaxConfig) -> Mapping[str, Network]:
        """Returns the networks of a run with these settings; they depend on few of them."""
        key = (own.method, own.use_peft, own.needs_reference)
        if key not in built:
            of_value = value if own.method == "ppo" else None
            built[key] = measure_networks(networks_of_configs(policy, reward, own, of_value, gold), own)
        return built[key]

    def peaks_of(own: ReMaxConfig) -> dict[str, Peak]:
        return predict(networks(own), own, work, memory.device, split)

    _check_vllm(networks(args)["policy"], args, memory)
    peaks, on_gpu = peaks_of(args), memory.device.kind == "cuda"
    fits = largest(peaks).total <= memory.usable
    others = {name: args if name == args.method else with_method(args, name) for name in ("remax", "ppo")}
    single, proposal = [], None
    if not fits:
        found = levers(args, work, has_reward_model=reward is not None, on_gpu=on_gpu)
        single = single_changes(args, found, peaks_of, usable=memory.usable)
        proposal = cheapest(args, found, peaks_of, usable=memory.usable)
    return Plan(
        inputs=inputs,
        args=args,
        memory=memory,
        work=work,
        parameters={name: network.counts.parameters for name, network in networks(args).items()},
        peaks=peaks,
        methods={name: largest(peaks_of(own)) for name, own in others.items() if own is not None},
        network=transfers(networks(args), args, work, split),
        single=single,
        proposal=proposal,
        split=split,
    )


def _check_vllm(policy: Network, args: ReMaxConfig, memory: Memory) -> None:
    """Raises UserError if a colocated vLLM would not have the memory for its own copy of the weights."""
    share = of_vllm(args, memory.device)
    weights = policy.counts.parameters * (2 if is_half(args) else 4)
    if share and weights >= share:
        enough = math.ceil(100 * weights / memory.total * MORE_THAN_WEIGHTS) / 100
        instead = f"--vllm_gpu_memory_utilization {enough}" if enough <= 1 else "--rollout_engine embedded"
        raise UserError(
            f"--vllm_gpu_memory_utilization is {args.vllm_gpu_memory_utilization}: that is {share / 2**30:.1f} GiB, in "
            f"which vLLM's copy of the policy ({weights / 2**30:.1f} GiB) does not fit; set {instead}."
        )


def _work(inputs: PlanInputs, args: ReMaxConfig, policy: Any) -> Workload:
    limit = getattr(policy.get_text_config(), "max_position_embeddings", None)
    longest = args.max_prompt_length if not limit else min(args.max_prompt_length, limit - args.max_completion_length)
    prompt_length = inputs.prompt_length or max(1, longest)
    if prompt_length > args.max_prompt_length:
        raise UserError(
            f"--prompt_length is {prompt_length}: --max_prompt_length {args.max_prompt_length} lets no such prompt in; "
            f"set {args.max_prompt_length} or less, or a larger --max_prompt_length."
        )
    if limit and prompt_length + args.max_completion_length > limit:
        room = limit - args.max_completion_length
        instead = f"--prompt_length {room} or less" if room > 0 else f"a smaller --max_completion_length than {limit}"
        raise UserError(
            f"--max_completion_length is {args.max_completion_length}: with prompts of {prompt_length} tokens that is "
            f"more than the model's context of {limit}; set {instead}."
        )
    if args.batch_size < inputs.num_devices:
        raise UserError(
            f"--num_devices is {inputs.num_devices}: a step has only {args.batch_size} prompts, so some would have "
            f"none; set --batch_size {inputs.num_devices} or more."
        )
    return Workload(math.ceil(args.batch_size / inputs.num_devices), prompt_length, args.max_completion_length)

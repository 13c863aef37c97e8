"""What a run loads: prompts, rewards, the policy and its reference, and how completions are sampled."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from remax import data, models
from remax.config import (
    ModelOptions,
    OptimiserOptions,
    PrecisionOptions,
    PromptOptions,
    ReMaxConfig,
    SamplingOptions,
)
from remax.config.groups import Placement
from remax.errors import UserError
from remax.interfaces import Prompt, RewardFunction, Sampling
from remax.logprobs import CompletionScorer
from remax.placement import Placed
from remax.rewards import CallableReward, ProgrammedReward, RewardModel, require_chat_template
from remax.rewards.isolation import IsolatedReward

NEUTRAL_GENERATION = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
"""Settings of a checkpoint's generation_config that would change the distribution, and where they do not."""


def load_prompts(source: Any, split: str, tokenizer: Any, args: PromptOptions, *, flag: str) -> list[Prompt]:
    """Returns the tokenised prompts of a dataset, a file or a hub name; says how many were too long."""
    if source is None:
        raise UserError(f"{flag} is not set: there are no prompts; set a file, a hub name or a dataset.")
    dataset = data.load_records(source, split, flag=flag) if isinstance(source, str) else source
    data.check_columns(dataset, ["prompt"], flag=flag, purpose="the prompts to complete")
    prompts, num_overlong = data.prepare_prompts(
        dataset,
        tokenizer,
        max_prompt_length=args.max_prompt_length,
        overlong=args.overlong_prompts,
        system_prompt=args.system_prompt,
        flag=flag,
    )
    if num_overlong:
        done = "dropped" if args.overlong_prompts == "filter" else "cut"
        print(f"{flag}: {num_overlong} prompts are longer than {args.max_prompt_length} tokens and were {done}.")
    return prompts


def load_rewards(
    rewards: Sequence[Any],
    tokenizers: Any,
    batch_size: int,
    device: torch.device,
    *,
    conversational: bool,
    placement: Placement = "resident",
    sharded: bool = False,
    timeout_seconds: float = 0.0,
    seed: int = 0,
    flag: str = "--reward_model",
) -> list[RewardFunction]:
    """Returns one RewardFunction per entry: a name or model becomes a RewardModel, a callable a CallableReward.

    sharded: Components.shard_frozen brings what is loaded here to the device, which may not hold a whole model.
    timeout_seconds: of a call of an async function. seed: of the random numbers of functions in their own processes.

    Raises:
        UserError: a reward model cannot be used; for conversational prompts, also if it has no chat template.
    """
    tokenizers = tokenizers if isinstance(tokenizers, list | tuple) else [tokenizers] * len(rewards)
    if len(tokenizers) != len(rewards):
        raise UserError(
            f"reward_processing_classes has {len(tokenizers)} entries: there are {len(rewards)} rewards; pass one for "
            "each, None for functions."
        )
    loaded: list[RewardFunction] = []
    for reward, tokenizer in zip(rewards, tokenizers, strict=True):
        if isinstance(reward, str | nn.Module):
            name = reward if isinstance(reward, str) else name_of(reward)
            tokenizer = tokenizer or models.load_tokenizer(name, flag=flag)
            if conversational:
                require_chat_template(tokenizer, flag=flag)
            model = models.load_reward_model(reward, flag=flag) if isinstance(reward, str) else reward
            if getattr(model.config, "num_labels", 0) != 1 or hasattr(model, "lm_head"):
                raise UserError(
                    f"reward_funcs has a {type(model).__name__}: that is no reward model, which has one label; pass a "
                    "sequence classification model with one label, or a function."
                )
            short = Path(name).parent.name if Path(name).name == "model" else Path(name).name
            loaded.append(
                RewardModel(
                    model,
                    tokenizer,
                    name=short or "reward_model",
                    batch_size=batch_size,
                    device=None if sharded and placement == "resident" and isinstance(reward, str) else device,
                    placement=placement,
                    own=isinstance(reward, str),
                )
            )
        elif isinstance(reward, ProgrammedReward | RewardModel):
            if isinstance(reward, IsolatedReward):
                reward.seed = seed
            loaded.append(reward)
        else:
            loaded.append(CallableReward(reward, timeout_seconds=timeout_seconds))
    return loaded


def is_conversational(prompts: Sequence[Prompt]) -> bool:
    return not isinstance(prompts[0].content, str)


def load_policy(model: Any, args: ModelOptions, peft_config: Any = None) -> Any:
    """Returns the policy without dropout, in training mode only where gradient checkpointing needs that."""
    policy = model
    rounds = isinstance(args, OptimiserOptions) and args.optim == "adamw_torch_8bit"
    if args.dtype == "bfloat16" and not (args.use_peft or peft_config is not None or rounds):
        print(
            "--dtype bfloat16 trains weights of three digits: small updates vanish; --bf16 keeps float32 weights, "
            "and --optim adamw_torch_8bit rounds so that they count on average."
        )
    if isinstance(model, str):
        base_options = replace(args, use_peft=False) if peft_config is not None else args
        policy = models.load_policy(model, base_options, flag="--model")
    elif args.use_peft and peft_config is None and not isinstance(model, PeftModel):
        policy = models.add_adapter(model, args)
    if peft_config is not None:
        policy = get_peft_model(policy, peft_config)
    models.disable_dropout(policy)
    policy.train(args.gradient_checkpointing)
    if args.gradient_checkpointing:
        models.recompute_activations(policy)
    return policy


def load_reference(policy: Any) -> CompletionScorer:
    """Returns the policy as it is now: with a new adapter, itself with the adapter off; else a frozen copy."""
    if isinstance(policy, PeftModel) and models.adapter_is_new(policy):
        return CompletionScorer(policy, adapters=False)
    return CompletionScorer(models.copy_as_reference(policy))


def place_reference(
    reference: CompletionScorer | None, policy: Any, args: ReMaxConfig, device: torch.device, *, sharded: bool
) -> Placed | None:
    """Returns where the reference is between the phases that use it; None without one of its own.

    sharded: as in `load_rewards`.

    Raises:
        UserError: it should leave the device, but is the policy itself.
    """
    if reference is None:
        return None
    if reference.model is not policy:
        waits = sharded and args.reference_placement == "resident"
        return Placed(reference.model, None if waits else device, args.reference_placement)
    if args.reference_placement == "offload":
        raise UserError(
            "--reference_placement is offload: with a new adapter the reference is the policy with the adapter off, so "
            "there is nothing to move; leave it out."
        )
    return None


def load_other_reference(name: str, args: PrecisionOptions, policy: Any) -> CompletionScorer:
    """Returns another model than the policy as the reference, on the policy's device.

    Raises:
        UserError: it cannot be loaded, or has another vocabulary.
    """
    options = ModelOptions(dtype=args.dtype, attn_implementation=args.attn_implementation)
    model = models.load_policy(name, options, flag="--ref_model").to(policy.device).eval()
    if model.config.get_text_config().vocab_size != policy.config.get_text_config().vocab_size:
        raise UserError(
            f"--ref_model is {name}: its vocabulary is not that of --model {policy.name_or_path}, so no KL between "
            "them exists; set the model that training started from."
        )
    return CompletionScorer(model.requires_grad_(False))


def sampling_of(args: SamplingOptions, policy: Any, tokenizer: Any) -> Sampling:
    """Returns the sampling settings: all from our config, only the EOS ids from the checkpoint's generation config."""
    generation_config = policy.generation_config
    ignored = [
        f"{name}={getattr(generation_config, name)}"
        for name, neutral in NEUTRAL_GENERATION.items()
        if getattr(generation_config, name, None) not in (None, neutral)
    ]
    if ignored:
        print(f"The checkpoint's generation_config is ignored ({', '.join(ignored)}); sampling follows the flags.")
    return Sampling(
        max_completion_length=args.max_completion_length,
        eos_token_ids=data.eos_token_ids(generation_config, tokenizer),
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
    )


def check_context(model: Any, prompts: Sequence[Prompt], max_completion_length: int, *, of: str = "the model") -> None:
    """Raises UserError if the longest prompt and completion do not fit in a model's context together."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if limit and longest + max_completion_length > limit:
        raise UserError(
            f"--max_completion_length is {max_completion_length}: with the longest prompt of {longest} tokens that is "
            f"more than {of}'s context of {limit}; set --max_completion_length {limit - longest} or less, or a "
            "smaller --max_prompt_length."
        )


def name_of(model: Any) -> str:
    return str(model.config._name_or_path)

"""Where implementations are chosen: from settings and names to the objects that the loop works with.

Cheap checks come first: whatever can be wrong with datasets, tokenizers and reward functions is found before a model is
loaded.
"""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import nn

from remax import data, models
from remax.compilation import check_compiler
from remax.components import Components
from remax.config import (
    EvaluateConfig,
    EvaluateInputs,
    ModelOptions,
    OptimiserOptions,
    PrecisionOptions,
    PromptOptions,
    ReMaxConfig,
    SamplingOptions,
    ScoringOptions,
)
from remax.config.groups import Placement
from remax.critic import check_value_model
from remax.errors import UserError
from remax.guards.memory import MemoryGuard
from remax.interfaces import Prompt, RewardFunction, RolloutEngine, Sampling
from remax.logprobs import CompletionScorer
from remax.optimisers import check_optimiser
from remax.placement import Placed
from remax.processes import ALONE, Processes, make_accelerator
from remax.rewards import CallableReward, ProgrammedReward, RewardModel, require_chat_template, resolve_weights
from remax.rewards.isolation import IsolatedReward
from remax.rewards.named import wait_until_ready
from remax.rollout.choice import check_vllm, make_engine, make_vllm_engine
from remax.rollout.embedded import EmbeddedEngine
from remax.rollout.gathered import GatheredEngine
from remax.sharding import shards_weights

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


def assemble(
    args: ReMaxConfig,
    *,
    model: Any,
    reward_funcs: Any,
    train_dataset: Any,
    eval_dataset: Any = None,
    processing_class: Any = None,
    reward_processing_classes: Any = None,
    peft_config: Any = None,
    rollout_engine: Callable[[Any], RolloutEngine] | None = None,
    processes: Processes = ALONE,
) -> Components:
    """Returns what training needs; the arguments are those of ReMaxTrainer.

    processes: those that train together.

    Raises:
        UserError: something cannot be used.
    """
    check_processes(args, processes)
    rewards, weights, tokenizer, model_name = check_cheaply(args, model, reward_funcs, processing_class)
    prompts = load_prompts(train_dataset, args.dataset_split, tokenizer, args, flag="--train_dataset")
    if len(prompts) < args.batch_size:
        raise UserError(
            f"--batch_size is {args.batch_size}: --train_dataset has only {len(prompts)} usable prompts, which do not "
            f"fill one step; set --batch_size {len(prompts)} or less, or give more prompts."
        )
    eval_prompts = []
    if args.eval_steps and eval_dataset is None:
        raise UserError(
            f"--eval_steps is {args.eval_steps}: without --eval_dataset there is nothing to evaluate on; set both."
        )
    if eval_dataset is not None:
        eval_prompts = load_prompts(eval_dataset, args.eval_split, tokenizer, args, flag="--eval_dataset")
        eval_prompts = eval_prompts[: args.num_eval_prompts]

    accelerator = make_accelerator(args.bf16, args.report_to, args.output_dir, processes=processes)
    reward_functions = load_rewards(
        rewards,
        reward_processing_classes,
        args.reward_batch_size,
        accelerator.device,
        conversational=_conversational(prompts),
        placement=args.reward_placement,
        timeout_seconds=args.reward_timeout_seconds,
        seed=args.seed,
    )
    sharded = shards_weights(accelerator)
    if sharded:
        check_sharding(args)
    policy = load_policy(model, args, peft_config)
    if not sharded:  # There a device may not hold all of it; what is sharded is put there part by part.
        policy.to(accelerator.device)
    check_context(policy, [*prompts, *eval_prompts], args.max_completion_length)
    reference = load_reference(policy) if args.needs_reference else None
    return Components(
        accelerator=accelerator,
        policy=policy,
        reference=reference,
        reference_placed=place_reference(reference, policy, args, accelerator.device),
        tokenizer=tokenizer,
        engine=training_engine(policy, tokenizer, args, accelerator, rollout_engine, processes),
        reward_functions=reward_functions,
        reward_weights=weights,
        sampling=sampling_of(args, policy, tokenizer),
        prompts=prompts,
        eval_prompts=eval_prompts,
        model_name=model_name,
        rollout_batch_size=args.rollout_batch_size,
        processes=processes,
        memory=MemoryGuard(redoes=processes.num == 1),
    )


def check_processes(args: ReMaxConfig, processes: Processes) -> None:
    """Raises UserError if the settings cannot be shared by that many processes."""
    if args.batch_size < processes.num:
        raise UserError(
            f"--batch_size is {args.batch_size}: {processes.num} processes share the prompts of a step, so some would "
            f"have none; set --batch_size {processes.num} or more, or start fewer processes."
        )


def check_sharding(args: ReMaxConfig) -> None:
    """Raises UserError if the settings need weights that each process has all of."""
    wanted = {
        "--rollout_engine is paged": (args.rollout_engine == "paged", "--rollout_engine embedded"),
        "--optim is adamw_torch_8bit": (args.optim == "adamw_torch_8bit", "another one, such as adamw_torch"),
        f"--kl_estimator is {args.kl_estimator}": (args.needs_exact_kl, "--kl_estimator k2"),
    }
    for setting, (is_set, instead) in wanted.items():
        if is_set:
            raise UserError(
                f"{setting}: each process would need all weights, and here they are sharded; set {instead}, or start "
                "the processes with ddp."
            )


def assemble_evaluation(inputs: EvaluateInputs, reward_funcs: Any, args: EvaluateConfig) -> Components:
    """Returns what `remax evaluate` needs: no training prompts, and inputs.ref_model as the reference of the KL.

    Raises:
        UserError: something cannot be used.
    """
    if inputs.ref_model is not None:
        models.check_model_exists(inputs.ref_model, flag="--ref_model")
    rewards, weights, tokenizer, model_name = check_cheaply(args, inputs.model, reward_funcs, None)
    prompts = load_prompts(inputs.eval_dataset, inputs.eval_split, tokenizer, args, flag="--eval_dataset")
    prompts = prompts[: args.num_eval_prompts]
    accelerator = make_accelerator(args.bf16)
    reward_functions = load_rewards(
        rewards,
        None,
        args.reward_batch_size,
        accelerator.device,
        conversational=_conversational(prompts),
        timeout_seconds=args.reward_timeout_seconds,
        seed=args.seed,
    )
    options = ModelOptions(dtype=args.dtype, attn_implementation=args.attn_implementation)
    policy = load_policy(inputs.model, options).to(accelerator.device)
    check_context(policy, prompts, args.max_completion_length)
    reference = None
    if inputs.ref_model is not None:
        reference = load_other_reference(inputs.ref_model, args, policy)
    return Components(
        accelerator=accelerator,
        policy=policy,
        reference=reference,
        reference_placed=None,
        tokenizer=tokenizer,
        engine=choose_engine(policy, tokenizer, args, args.bf16),
        reward_functions=reward_functions,
        reward_weights=weights,
        sampling=sampling_of(args, policy, tokenizer),
        prompts=[],
        eval_prompts=prompts,
        model_name=model_name,
        rollout_batch_size=args.rollout_batch_size,
    )


def check_cheaply(
    args: ScoringOptions, model: Any, reward_funcs: Any, tokenizer: Any
) -> tuple[list[Any], list[float], Any, str]:
    """Returns rewards, their weights, the policy's tokenizer and its name, having checked all that is cheap.

    Raises:
        UserError: a model is not there, has no usable tokenizer, or, for PPO, a value model reads other tokens.
    """
    rewards = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if isinstance(args, ReMaxConfig):
        check_optimiser(args)
        if args.torch_compile:
            check_compiler("--torch_compile is true", instead="--torch_compile false")
        if args.reward_placement == "offload" and not any(isinstance(r, str | nn.Module) for r in rewards):
            raise UserError(
                "--reward_placement is offload: no reward is a model, so there is nothing to move; leave it out, or "
                "set --reward_model."
            )
    weights = resolve_weights(args.reward_weights, len(rewards))
    for reward in rewards:
        if isinstance(reward, str):
            models.check_model_exists(reward, flag="--reward_model")
    wait_until_ready(rewards)
    if isinstance(model, str):
        models.check_model_exists(model, flag="--model")
    model_name = model if isinstance(model, str) else _name_of(model)
    tokenizer = tokenizer or models.load_tokenizer(model_name, flag="--model")
    data.check_tokenizer(tokenizer, flag="--model")
    if isinstance(args, ReMaxConfig) and args.rollout_engine == "vllm":
        check_vllm(args, model)
    if isinstance(args, ReMaxConfig) and args.method == "ppo":
        check_value_model(args, tokenizer, rewards)
    return rewards, weights, tokenizer, model_name


def _name_of(model: Any) -> str:
    return str(model.config._name_or_path)


def training_engine(
    policy: Any,
    tokenizer: Any,
    args: ReMaxConfig,
    accelerator: Accelerator,
    make: Callable[[Any], RolloutEngine] | None = None,
    processes: Processes = ALONE,
) -> RolloutEngine:
    """Returns the engine that draws a training's completions: that of make or, without it, of --rollout_engine.

    Raises:
        UserError: it cannot be used here.
    """
    if args.rollout_engine == "vllm" and make is None:
        return _vllm_engine(policy, args, processes)
    if not shards_weights(accelerator):
        return make(policy) if make else choose_engine(policy, tokenizer, args, args.bf16)
    def embedded(model: Any) -> RolloutEngine:
        return EmbeddedEngine(model, pad_token_id=tokenizer.pad_token_id, max_rows=args.rollout_batch_size)

    print("Rollout engine: embedded, with weights that are gathered for each rollout.")
    return GatheredEngine(policy, make or embedded, accelerator.device, half=args.bf16)


def _vllm_engine(policy: Any, args: ReMaxConfig, processes: Processes) -> RolloutEngine:
    return make_vllm_engine(
        policy,
        args,
        run_id=processes.gather(uuid.uuid4().hex)[0],
        sends=processes.is_main,
        num_processes=processes.num,
        together=processes.together,
    )


def choose_engine(policy: Any, tokenizer: Any, args: ScoringOptions, bf16: bool) -> RolloutEngine:
    """Returns the engine of --rollout_engine, having said which it is and why.

    Raises:
        UserError: it cannot be used here.
    """
    if args.rollout_engine == "vllm":
        assert isinstance(args, ReMaxConfig)
        return _vllm_engine(policy, args, ALONE)
    engine, reason = make_engine(
        args.rollout_engine,
        policy,
        pad_token_id=tokenizer.pad_token_id,
        max_rows=args.rollout_batch_size,
        bf16=bf16,
    )
    print(f"Rollout engine: {reason}.")
    return engine


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
    timeout_seconds: float = 0.0,
    seed: int = 0,
    flag: str = "--reward_model",
) -> list[RewardFunction]:
    """Returns one RewardFunction per entry: a name or model becomes a RewardModel, a callable a CallableReward.

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
            name = reward if isinstance(reward, str) else _name_of(reward)
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
                    device=device,
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


def _conversational(prompts: Sequence[Prompt]) -> bool:
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
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy


def load_reference(policy: Any) -> CompletionScorer:
    """Returns the policy as it is now: with a new adapter, itself with the adapter off; else a frozen copy."""
    if isinstance(policy, PeftModel) and models.adapter_is_new(policy):
        return CompletionScorer(policy, adapters=False)
    return CompletionScorer(models.copy_as_reference(policy))


def place_reference(
    reference: CompletionScorer | None, policy: Any, args: ReMaxConfig, device: torch.device
) -> Placed | None:
    """Returns where the reference is between the phases that use it; None without one of its own.

    Raises:
        UserError: it should leave the device, but is the policy itself.
    """
    if reference is None:
        return None
    if reference.model is not policy:
        return Placed(reference.model, device, args.reference_placement)
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

"""Where implementations are chosen: from settings and names to the objects that the loop works with.

Cheap checks come first: whatever can be wrong with datasets, tokenizers and reward functions is found before a model is
loaded.
"""

import uuid
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn

from remax import data, models
from remax.compilation import check_compiler
from remax.components import Components
from remax.config import (
    EvaluateConfig,
    EvaluateInputs,
    ModelOptions,
    ReMaxConfig,
    ScoringOptions,
)
from remax.critic import check_value_model
from remax.errors import UserError
from remax.guards.memory import MemoryGuard
from remax.interfaces import RolloutEngine
from remax.loading import (
    check_context,
    is_conversational,
    load_other_reference,
    load_policy,
    load_prompts,
    load_reference,
    load_rewards,
    name_of,
    place_reference,
    sampling_of,
)
from remax.optimisers import check_optimiser
from remax.processes import ALONE, Processes, make_accelerator
from remax.rewards import resolve_weights
from remax.rewards.named import wait_until_ready
from remax.rollout.choice import check_vllm, make_engine, make_vllm_engine
from remax.rollout.embedded import EmbeddedEngine
from remax.rollout.gathered import GatheredEngine
from remax.sharding import shards_weights


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

    accelerator = make_accelerator(args.bf16, args.output_dir, processes=processes)
    sharded = shards_weights(accelerator)
    reward_functions = load_rewards(
        rewards,
        reward_processing_classes,
        args.reward_batch_size,
        accelerator.device,
        conversational=is_conversational(prompts),
        placement=args.reward_placement,
        sharded=sharded,
        timeout_seconds=args.reward_timeout_seconds,
        seed=args.seed,
    )
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
        reference_placed=place_reference(reference, policy, args, accelerator.device, sharded=sharded),
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
    matrices = args.optim in ("adamw_torch_8bit", "adafactor")
    wanted = {
        "--rollout_engine is paged": (args.rollout_engine == "paged", "--rollout_engine embedded"),
        f"--optim is {args.optim}": (matrices, "another one, such as adamw_torch"),
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
        conversational=is_conversational(prompts),
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
    model_name = model if isinstance(model, str) else name_of(model)
    tokenizer = tokenizer or models.load_tokenizer(model_name, flag="--model")
    data.check_tokenizer(tokenizer, flag="--model")
    if isinstance(args, ReMaxConfig) and args.rollout_engine == "vllm":
        check_vllm(args, model)
    if isinstance(args, ReMaxConfig) and args.method == "ppo":
        check_value_model(args, tokenizer, rewards)
    return rewards, weights, tokenizer, model_name


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
        return _vllm_engine(policy, args, accelerator.device, processes)
    if not shards_weights(accelerator):
        return make(policy) if make else choose_engine(policy, tokenizer, args, args.bf16)

    def embedded(model: Any) -> RolloutEngine:
        return EmbeddedEngine(model, pad_token_id=tokenizer.pad_token_id, max_rows=args.rollout_batch_size)

    print("Rollout engine: embedded, with weights that are gathered for each rollout.")
    return GatheredEngine(policy, make or embedded, accelerator.device, half=args.bf16)


def _vllm_engine(policy: Any, args: ReMaxConfig, device: Any, processes: Processes) -> RolloutEngine:
    return make_vllm_engine(
        policy,
        args,
        device,
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
        return _vllm_engine(policy, args, policy.device, ALONE)
    engine, reason = make_engine(
        args.rollout_engine,
        policy,
        pad_token_id=tokenizer.pad_token_id,
        max_rows=args.rollout_batch_size,
        bf16=bf16,
    )
    print(f"Rollout engine: {reason}.")
    return engine

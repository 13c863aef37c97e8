"""What checks look at. Everything is loaded when the first check asks for it, and only once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from accelerate import Accelerator
from peft import PeftConfig
from transformers import GenerationConfig

from remax import assembly, data, loading, models
from remax.components import Components, Rewards
from remax.config import DoctorOptions, PlanInputs, ReMaxConfig, TrainInputs
from remax.data.records import check_format
from remax.doctor.findings import Unavailable
from remax.errors import UserError
from remax.interfaces import Prompt, RewardFunction, Rollout
from remax.plan.command import Plan, make_plan
from remax.plan.networks import read_config
from remax.processes import make_accelerator
from remax.rewards import resolve_weights
from remax.rewards.named import wait_until_ready

T = TypeVar("T")
SAMPLES = 2
"""Sampled completions per prompt of the trial rollout: the fewest that also show what differs within a prompt."""
TRIAL_STEP = -2
"""Keys the sampling noise of the trial: never that of a training step or an evaluation."""
LONGEST_TRIED = 16
"""How many of the longest texts are tokenised to know the longest prompt without reading all of them."""


class Part(Generic[T]):
    """A value that is made when it is first asked for. If that fails, whoever asks later gets Unavailable."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self.make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, context: Any, owner: type) -> T:
        if self.name in context.failed:
            raise Unavailable(f"not looked at: it needs the {self.name.replace('_', ' ')}, which could not be had")
        try:
            value = self.make(context)
        except Exception:
            context.failed.add(self.name)
            raise
        vars(context)[self.name] = value  # found before this descriptor from now on
        return value


class Context:
    """A set-up, as the flags of `remax train` describe it."""

    def __init__(
        self, inputs: TrainInputs, args: ReMaxConfig, options: DoctorOptions, load_rewards: Callable[[], list[Any]]
    ) -> None:
        """load_rewards: returns the rewards as ReMaxTrainer takes them."""
        self.inputs, self.args, self.options, self.load_rewards = inputs, args, options, load_rewards
        self.failed: set[str] = set()

    # The policy without its weights

    @Part
    def base_model(self) -> str:
        """The model whose config counts: for an adapter, its base."""
        name = self.inputs.model
        models.check_model_exists(name, flag="--model")
        if (Path(name) / models.ADAPTER_CONFIG).is_file() and not (Path(name) / "config.json").exists():
            return str(PeftConfig.from_pretrained(name).base_model_name_or_path)
        return name

    @Part
    def config(self) -> Any:
        """The policy's config."""
        return read_config(self.base_model, flag="--model")

    @Part
    def generation_config(self) -> Any:
        """What the loaded policy will have as its generation config."""
        config = self.config
        try:
            return GenerationConfig.from_pretrained(self.base_model)
        except OSError:  # there is none; transformers then makes it from the config
            return GenerationConfig.from_model_config(config)

    @Part
    def tokenizer(self) -> Any:
        """The policy's tokenizer, as training uses it."""
        models.check_model_exists(self.inputs.model, flag="--model")
        tokenizer = models.load_tokenizer(self.inputs.model, flag="--model")
        data.check_tokenizer(tokenizer, flag="--model")
        return tokenizer

    @Part
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends a completion."""
        return data.eos_token_ids(self.generation_config, self.tokenizer)

    @Part
    def context_length(self) -> int | None:
        """Positions that the policy has."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    # Data

    @Part
    def train_dataset(self) -> Any:
        """The rows of --train_dataset."""
        return _rows(self.inputs.train_dataset, self.args.dataset_split, flag="--train_dataset")

    @Part
    def eval_dataset(self) -> Any:
        """The rows of --eval_dataset, as many as are used; None without one."""
        if self.inputs.eval_dataset is None:
            return None
        dataset = _rows(self.inputs.eval_dataset, self.args.eval_split, flag="--eval_dataset")
        return dataset.select(range(min(len(dataset), self.args.num_eval_prompts)))

    @Part
    def prompt_contents(self) -> list[Any]:
        """Column prompt of --train_dataset."""
        return list(self.train_dataset.with_format(None)["prompt"])

    @Part
    def eval_contents(self) -> list[Any]:
        """Column prompt of --eval_dataset; empty without one."""
        return [] if self.eval_dataset is None else list(self.eval_dataset.with_format(None)["prompt"])

    @Part
    def conversational(self) -> bool:
        """Whether prompts are messages."""
        return check_format(self.prompt_contents, column="prompt", flag="--train_dataset") == "conversational"

    @Part
    def prompts(self) -> tuple[list[Prompt], int]:
        """The training prompts, and how many were too long."""
        return self._prepared(self.train_dataset, "--train_dataset")

    @Part
    def longest_prompt(self) -> int:
        """Tokens of the longest training prompt; of those with the most characters, so that it is known at once."""
        sizes = [len(str(content)) for content in self.prompt_contents]
        longest = sorted(range(len(sizes)), key=lambda row: -sizes[row])[:LONGEST_TRIED]
        try:
            prompts, num_overlong = self._prepared(self.train_dataset.select(longest), "--train_dataset")
        except UserError:  # none of them fits: a shorter one fills what is allowed
            return self.args.max_prompt_length
        return self.args.max_prompt_length if num_overlong else max(len(prompt.token_ids) for prompt in prompts)

    def _prepared(self, dataset: Any, flag: str) -> tuple[list[Prompt], int]:
        return data.prepare_prompts(
            dataset,
            self.tokenizer,
            max_prompt_length=self.args.max_prompt_length,
            overlong=self.args.overlong_prompts,
            system_prompt=self.args.system_prompt,
            flag=flag,
        )

    @Part
    def pairs(self) -> Any:
        """The first rows of --pairs that prefer something; None without them."""
        if self.options.pairs is None:
            return None
        dataset = data.load_records(self.options.pairs, self.args.eval_split, flag="--pairs")
        return data.load_preferences(dataset.select(range(min(len(dataset), self.options.num_pairs))), flag="--pairs")[
            0
        ]

    # Memory

    @Part
    def plan(self) -> Plan:
        """What `remax plan` says of the run."""
        prompt_length = self.longest_prompt
        if self.context_length:  # what does not fit together is refused elsewhere
            prompt_length = max(1, min(prompt_length, self.context_length - self.args.max_completion_length))
        inputs = PlanInputs(
            model=self.base_model,
            reward_model=self.inputs.reward_model,
            reward_funcs=self.inputs.reward_funcs,
            reward_url=self.inputs.reward_url,
            gold_reward_model=self.inputs.gold_reward_model,
            prompt_length=prompt_length,
        )
        return make_plan(inputs, self.args)

    # What takes time

    @Part
    def accelerator(self) -> Accelerator:
        """Device and precision."""
        return make_accelerator(self.args.bf16)

    @Part
    def rewards(self) -> list[Any]:
        """The rewards as ReMaxTrainer takes them: names of models, and functions."""
        rewards = self.load_rewards()
        if self.inputs.reward_model:
            models.check_model_exists(self.inputs.reward_model, flag="--reward_model")
        resolve_weights(self.args.reward_weights, len(rewards))
        wait_until_ready(rewards)
        return rewards

    @Part
    def reward_tokenizer(self) -> Any:
        """The tokenizer of --reward_model; None without one."""
        name = self.inputs.reward_model
        return models.load_tokenizer(name, flag="--reward_model") if name else None

    @Part
    def reward_config(self) -> Any:
        """The config of --reward_model; None without one."""
        name = self.inputs.reward_model
        return read_config(name, flag="--reward_model") if name else None

    @Part
    def reward_functions(self) -> list[RewardFunction]:
        """The rewards, ready to score."""
        return loading.load_rewards(
            self.rewards,
            None,
            self.args.reward_batch_size,
            self.accelerator.device,
            conversational=self.conversational,
            placement=self.args.reward_placement,
            timeout_seconds=self.args.reward_timeout_seconds,
            seed=self.args.seed,
        )

    @Part
    def policy(self) -> Any:
        """The policy, on its device."""
        models.check_model_exists(self.inputs.model, flag="--model")
        return loading.load_policy(self.inputs.model, self.args).to(self.accelerator.device)

    @Part
    def components(self) -> Components:
        """What rolls out and scores; a reference is not needed for that."""
        prompts = self.prompts[0][: self.options.num_prompts]
        rewards = self.reward_functions
        loading.check_context(self.policy, prompts, self.args.max_completion_length)
        return Components(
            accelerator=self.accelerator,
            policy=self.policy,
            reference=None,
            reference_placed=None,
            tokenizer=self.tokenizer,
            engine=assembly.choose_engine(self.policy, self.tokenizer, self.args, self.args.bf16),
            reward_functions=rewards,
            reward_weights=resolve_weights(self.args.reward_weights, len(rewards)),
            sampling=loading.sampling_of(self.args, self.policy, self.tokenizer),
            prompts=prompts,
            eval_prompts=[],
            model_name=self.inputs.model,
        )

    @Part
    def rollout(self) -> Rollout:
        """SAMPLES sampled and one greedy completion of the first prompts."""
        parts = self.components
        return parts.roll_out(parts.prompts, num_samples=SAMPLES, greedy=True, seed=self.args.seed, step=TRIAL_STEP)

    @Part
    def trial_rewards(self) -> Rewards:
        """The rewards of that rollout."""
        return self.components.score(self.rollout)


def _rows(source: str, split: str, *, flag: str) -> Any:
    dataset = data.load_records(source, split, flag=flag)
    data.check_columns(dataset, ["prompt"], flag=flag, purpose="the prompts to complete")
    return dataset

"""The ReMax loop: Algorithm 1 of Li et al. (arXiv 2310.10505) on Accelerate."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, get_scheduler, set_seed

from remax import estimators, models
from remax.assembly import assemble
from remax.batching import PromptOrder, collate, split_by_tokens
from remax.config import OptimiserOptions, ReMaxConfig
from remax.errors import UserError
from remax.evaluate import Evaluation, evaluate_policy
from remax.interfaces import Prompt, RolloutEngine
from remax.logprobs import CompletionScorer
from remax.metrics import StepRecord, completion_records, step_metrics
from remax.objective import remax_loss
from remax.progress import View, default_view
from remax.recording import RunFolder

SHOWN_OF_SETTINGS = (
    *("train_dataset", "reward_model", "reward_funcs", "batch_size", "learning_rate", "beta", "kl_mode"),
    *("max_completion_length", "temperature", "top_p", "top_k", "seed"),
)
"""What the model card lists; config.yaml has everything."""
SHOWN_OF_EVALUATION = ("reward", "reward/greedy", "kl", "completions/mean_length")


class ReMaxTrainer:
    """Trains a policy with ReMax. The constructor's arguments are those of TRL's GRPOTrainer and RLOOTrainer."""

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: ReMaxConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        peft_config: Any = None,
        *,
        rollout_engine: Callable[[Any], RolloutEngine] | None = None,
        view: View | None = None,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Checks everything, then loads the models.

        Args:
            model: the policy, a causal language model: hub name, folder or loaded model. The reference of the KL is a
                copy of it as given or, with an adapter, the same model with the adapter off.
            reward_funcs: one reward or a list of them: a function f(prompts, completions, completion_ids, **columns)
                -> list[float | None], sync or async, or a sequence classification model with one label, loaded or by
                name.
            args: all settings.
            train_dataset: prompts: a datasets.Dataset with a column "prompt", texts or messages; or a file or hub name.
            eval_dataset: held-out prompts, likewise.
            processing_class: the policy's tokenizer, by default the one beside the model.
            reward_processing_classes: tokenizers of the reward models; None for functions and for a model's own.
            callbacks: transformers.TrainerCallback objects; they get this trainer's ReMaxConfig as args, and
                on_evaluate gets the Evaluation as evaluation.
            peft_config: a peft config, instead of the LoRA settings in args.
            rollout_engine: makes the engine that draws completions from the policy; by default the embedded one.
            view: shows the progress; by default a panel in a terminal and plain lines elsewhere.
            run_config: what config.yaml records; by default args.

        Raises:
            UserError: a setting, dataset, model or reward cannot be used; nothing was written.
        """
        self.args = args or ReMaxConfig()
        self.folder = RunFolder(self.args.output_dir)
        set_seed(self.args.seed)
        self.parts = parts = assemble(
            self.args,
            model=model,
            reward_funcs=reward_funcs,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            peft_config=peft_config,
            rollout_engine=rollout_engine,
        )
        self.order = PromptOrder(parts.prompts, self.args.batch_size, self.args.seed)
        self.max_steps = self.args.max_steps
        if self.max_steps == -1:
            self.max_steps = math.ceil(self.args.num_train_epochs * self.order.steps_per_epoch)
        optimizer = adamw(parts.policy, self.args)
        self.lr_scheduler = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup_steps(self.args, self.max_steps),
            num_training_steps=self.max_steps,
        )
        self.accelerator = parts.accelerator
        self.policy, self.optimizer = self.accelerator.prepare(CompletionScorer(parts.policy), optimizer)
        self.view = view or default_view()
        self.run_config = run_config or {"model": parts.model_name, **dataclasses.asdict(self.args)}
        self.callbacks = list(callbacks or [])
        self.state = TrainerState(max_steps=self.max_steps, logging_steps=self.args.logging_steps, log_history=[])
        self.control = TrainerControl()
        parts.show_state(self.state)
        self.timings: dict[str, float] = {}
        self._notify("on_init_end")

    # The algorithm ----------------------------------------------------------------------------------------------------

    def step(self, prompts: Sequence[Prompt], step: int) -> StepRecord:
        """Takes one step of Algorithm 1 on these prompts."""
        args = self.args
        with self._timed("rollout"):
            rollout = self.parts.roll_out(prompts, num_samples=args.num_generations, seed=args.seed, step=step)
        with self._timed("reward"):
            rewards = self.parts.score(rollout)
        advantages = estimators.advantages(rewards.sampled, rewards.baselines, args.reward_clip, args.reward_clip_mode)
        record = StepRecord(rollout, rewards, advantages)
        with self._timed("update"):
            self.update(record)
        return record

    def update(self, record: StepRecord) -> None:
        """Takes one gradient step on the samples that have both rewards, and completes the record."""
        samples, args = record.rollout.samples, self.args
        rows = record.trained.nonzero().flatten().tolist()
        num_tokens = sum(len(samples[row].token_ids) for row in rows)
        denominator = estimators.denominator(args.loss_aggregation, len(rows), num_tokens)
        lengths = [len(samples[row].prompt.token_ids) + len(samples[row].token_ids) for row in rows]
        for group in split_by_tokens(lengths, args.micro_batch_tokens):
            chosen = [rows[i] for i in group]
            batch = collate(
                [samples[row] for row in chosen], self.parts.tokenizer.pad_token_id, self.accelerator.device
            )
            advantages = record.advantages[chosen].to(self.accelerator.device)
            with self.accelerator.autocast():
                result = remax_loss(
                    self.policy, self.parts.reference, batch, advantages, self.parts.sampling, args, denominator
                )
            self.accelerator.backward(result.loss)
            record.add(chosen, result)
        limit = args.max_grad_norm or math.inf
        parameters = [p for p in self.parts.policy.parameters() if p.requires_grad]
        record.grad_norm = float(self.accelerator.clip_grad_norm_(parameters, limit)) if rows else 0.0
        if not math.isfinite(record.grad_norm):
            raise UserError(
                f"--learning_rate is {args.learning_rate}: the gradient of step {self.state.global_step + 1} is not "
                "finite, and a step with it would destroy the weights; set a lower rate, or more --warmup_steps."
            )
        record.learning_rate = self.lr_scheduler.get_last_lr()[0]
        if rows:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.lr_scheduler.step()

    # The run ----------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Trains, fills the run's folder and returns the metrics of the last step.

        Raises:
            UserError: a reward function cannot be used, or the gradient is not finite. Whatever goes wrong before the
                first step is done, nothing stays written.
        """
        self.folder.create(self.run_config)
        metrics: dict[str, float] = {}
        try:
            self.accelerator.init_trackers("tensorboard", config=_scalars(self.run_config))
            self._notify("on_train_begin")
            self._evaluate()
            self.view.start(self.max_steps)
            for step in range(1, self.max_steps + 1):
                metrics = self._recorded_step(step)
                if self.args.eval_steps and step % self.args.eval_steps == 0 and step < self.max_steps:
                    self._evaluate()
                if self.control.should_training_stop:
                    break
            self._evaluate()
            self.save_model(self.folder.model)
            self._notify("on_train_end")
        except BaseException:
            self._close()
            if self.state.global_step == 0:
                self.folder.discard()
            raise
        self._close()
        return metrics

    def _close(self) -> None:
        self.view.stop()
        self.accelerator.end_training()

    def evaluate(self) -> Evaluation:
        """Returns how the policy does on the evaluation prompts: one sample each, and greedy."""
        return evaluate_policy(
            self.parts,
            self.parts.eval_prompts,
            num_samples=1,
            seed=self.args.seed,
            prompts_at_once=self.args.batch_size,
            max_tokens=self.args.micro_batch_tokens,
        )

    def save_model(self, folder: Path) -> None:
        """Writes the policy in Hugging Face format, adapters merged, with its tokenizer and a model card."""
        models.save_model(
            self.parts.policy, self.parts.tokenizer, folder, eos_token_ids=self.parts.sampling.eos_token_ids
        )
        name, settings = self.parts.model_name, self.run_config
        shown = {key: settings[key] for key in SHOWN_OF_SETTINGS if settings.get(key) not in (None, [])}
        lines = [
            f"`{name}` trained for {self.state.global_step} steps with ReMax (REINFORCE with the reward of the greedy "
            "completion as baseline, [arXiv 2310.10505](https://arxiv.org/abs/2310.10505)) by "
            f"remax. Rewards: {', '.join(function.name for function in self.parts.reward_functions)}.",
            "",
            "| setting | value |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in shown.items()),
        ]
        self.folder.write_model_card(folder, base_model=name, title="Model after ReMax", lines=lines)

    def _recorded_step(self, step: int) -> dict[str, float]:
        started = time.perf_counter()
        self.timings.clear()
        self._notify("on_step_begin")
        record = self.step(self.order.batch(step), step)
        if step == 1 and not record.trained.any():
            names = ", ".join(function.name for function in self.parts.reward_functions)
            raise UserError(
                f"the rewards ({names}) gave no number for any completion of the first step: there is nothing to learn "
                "from; correct the reward function (its error is in the warning above)."
            )
        seconds = time.perf_counter() - started
        metrics = {
            "step": step,
            "epoch": step / self.order.steps_per_epoch,
            **step_metrics(record),
            **{f"time/{phase}": value for phase, value in self.timings.items()},
            "time/step": seconds,
            "tokens_per_second": sum(len(c.token_ids) for c in record.rollout.samples + record.rollout.greedy)
            / seconds,
            "num_processes": self.accelerator.num_processes,
        }
        self.folder.append("metrics.jsonl", [metrics])
        if self.args.log_completions:
            self.folder.append("completions.jsonl", completion_records(record, step))
        self.state.global_step, self.state.epoch = step, metrics["epoch"]
        self._notify("on_step_end")
        self._log(metrics)
        if step % self.args.logging_steps == 0 or step == self.max_steps:
            self.view.update(metrics, record.rollout.samples[0])
        return metrics

    def _evaluate(self) -> None:
        """Evaluates, if there are prompts for it, and keeps the best weights."""
        if not self.parts.eval_prompts:
            return
        step = self.state.global_step
        evaluation = self.evaluate()
        metrics = {f"eval/{name}": value for name, value in evaluation.means().items()}
        self.folder.append("eval.jsonl", [{"step": step, **metrics}])
        shown = (f"{name} {metrics[f'eval/{name}']:.3g}" for name in SHOWN_OF_EVALUATION if f"eval/{name}" in metrics)
        self.view.note(f"evaluation after step {step}: {'  '.join(shown)}")
        self._log(metrics)
        self._notify("on_evaluate", metrics=metrics, evaluation=evaluation)
        wanted = self.args.metric_for_best_model
        if wanted.removeprefix("eval/") not in evaluation.values or not wanted.startswith("eval/"):
            raise UserError(
                f"--metric_for_best_model is {wanted}: evaluations do not measure that, so no model would be the best; "
                f"set one of {', '.join(metrics)}."
            )
        metric = metrics.get(wanted)
        if metric is not None and (self.state.best_metric is None or metric > self.state.best_metric):
            self.state.best_metric, self.state.best_global_step = metric, step
            if self.args.save_best_model and step > 0:
                self.save_model(self.folder.best_model)

    def _log(self, metrics: Mapping[str, float]) -> None:
        self.accelerator.log(dict(metrics), step=self.state.global_step)
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        self._notify("on_log", logs=dict(metrics))

    def _notify(self, event: str, **kwargs: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(
                self.args,
                self.state,
                self.control,
                model=self.parts.policy,
                processing_class=self.parts.tokenizer,
                optimizer=self.optimizer,
                lr_scheduler=self.lr_scheduler,
                **kwargs,
            )

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.timings[phase] = self.timings.get(phase, 0.0) + time.perf_counter() - started


def adamw(model: Any, args: OptimiserOptions) -> torch.optim.Optimizer:
    """Returns AdamW over the trainable weights; biases and norms (vectors) do not decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
    )


def warmup_steps(args: OptimiserOptions, max_steps: int) -> int:
    """Returns the steps of warm-up; a setting below 1 is a fraction of the run."""
    return math.ceil(args.warmup_steps * max_steps) if args.warmup_steps < 1 else int(args.warmup_steps)


def _scalars(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with everything that a tracker cannot take as a hyper-parameter turned into text."""
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in config.items()}

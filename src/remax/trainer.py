"""The loop: Algorithm 1 of Li et al. (arXiv 2310.10505) on Accelerate, with the method that was chosen."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, set_seed

from remax.assembly import assemble
from remax.batching import PromptOrder
from remax.callbacks import checked_callbacks
from remax.cards import policy_card
from remax.checkpoint.session import Session
from remax.checkpoint.state import fingerprints
from remax.compilation import compile_layers
from remax.components import Components
from remax.config import ReMaxConfig
from remax.errors import GuardStop, Interrupted, UserError
from remax.evaluate import Evaluation, check_gold, evaluate_policy, load_gold
from remax.guards.watch import Guards
from remax.hub import find_destination, push
from remax.interfaces import Prompt, RolloutEngine
from remax.launch import check_launcher
from remax.learner import Learner
from remax.logprobs import CompletionScorer
from remax.meters import PhaseMeter
from remax.methods import PPO, make_method, make_value_model
from remax.metrics import StepRecord, completion_records, step_metrics
from remax.plan import base_bytes, describe_peaks
from remax.plan.device import free_main_memory
from remax.processes import join_processes
from remax.progress import NoView, View, default_view
from remax.provenance import record_start
from remax.recording import RunFolder
from remax.saving import save_model
from remax.trackers import Trackers

SHOWN_OF_EVALUATION = ("reward", "reward/greedy", "gold", "kl", "completions/mean_length")


class ReMaxTrainer:
    """Trains a policy with ReMax, or the method of args.method, under otherwise equal conditions.

    The constructor's arguments are those of TRL's GRPOTrainer and RLOOTrainer.
    """

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
        gold_reward_funcs: Any = None,
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
            gold_reward_funcs: like reward_funcs; they judge evaluations, and training never sees them.

        Raises:
            UserError: a setting, dataset, model or reward cannot be used; nothing was written.
        """
        self.args = args or ReMaxConfig()
        check_launcher(self.args)
        self.callbacks = checked_callbacks(callbacks)
        self.processes = processes = join_processes()
        self.folder = processes.together(
            lambda: RunFolder(self.args.output_dir, resumes=self.args.resume != "none", writes=processes.is_main)
        )
        compared = run_config or dataclasses.asdict(self.args)
        self.session = Session(self.folder, self.args, compared, free_memory=free_main_memory, processes=self.processes)
        self.destination = processes.on_main(lambda: find_destination(self.args, self.folder.path))
        self.trackers = processes.together(
            lambda: Trackers(self.args, self.folder, say=lambda line: self.view.note(line))
        )
        set_seed(self.args.seed)
        gold = gold_reward_funcs if isinstance(gold_reward_funcs, list | tuple) else [gold_reward_funcs]
        gold = [function for function in gold if function is not None]
        given = [model, *(reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs])]
        self.base_bytes = base_bytes(PartialState().device, given)

        def make_parts() -> Components:
            check_gold(gold)
            parts = assemble(
                self.args,
                model=model,
                reward_funcs=reward_funcs,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                peft_config=peft_config,
                rollout_engine=rollout_engine,
                processes=processes,
            )
            if gold and parts.eval_prompts:
                parts.gold_functions = load_gold(gold, parts, self.args.reward_batch_size)
            # As the policy is whole still: a value model may be a copy of it.
            self.value_model = make_value_model(parts, self.args)
            return parts

        self.parts = parts = processes.together(make_parts)
        self._make_method()
        processes.together(lambda: self.session.check_same(fingerprints(self)))
        if self.args.bf16:  # PPO's value model has copied the reward model's float32 weights by now.
            parts.hold_frozen_in_bfloat16()
        parts.shard_frozen(self.policy.module)
        self.run_config = run_config or {"model": parts.model_name, **dataclasses.asdict(self.args)}
        self.view = view or (default_view() if processes.is_main else NoView())
        self._make_records()
        self._notify("on_init_end")

    def _make_method(self) -> None:
        """Makes what learns, and the order of its prompts."""
        parts = self.parts
        self.order = PromptOrder(parts.prompts, self.args.batch_size, self.args.seed)
        self.max_steps = self.args.max_steps
        if self.max_steps == -1:
            self.max_steps = math.ceil(self.args.num_train_epochs * self.order.steps_per_epoch)
        self.accelerator = parts.accelerator
        if self.args.torch_compile:
            compile_layers(parts.policy)
        self.policy = Learner(
            CompletionScorer(parts.policy),
            self.args,
            parts.accelerator,
            max_steps=self.max_steps,
            rate_flag="learning_rate",
        )
        self.method = make_method(parts, self.args, self.policy, self.value_model, max_steps=self.max_steps)

    def _make_records(self) -> None:
        """Makes what counts, watches and tells."""
        self.meter = PhaseMeter(self.accelerator.device)
        self.num_tokens = 0
        self.save_final_model = True
        self.guards = Guards(
            self.args, self.parts, self.method, self.folder.path, self.run_config, lambda: self.last_checkpoint
        )
        self.state = TrainerState(max_steps=self.max_steps, logging_steps=self.args.logging_steps, log_history=[])
        self.control = TrainerControl()
        self.parts.show_state(self.state)

    # The algorithm ----------------------------------------------------------------------------------------------------

    def step(self, prompts: Sequence[Prompt], step: int) -> StepRecord:
        """Takes one step of Algorithm 1 on these prompts."""
        args, method = self.args, self.method
        with self.meter.measure("rollout"):
            greedy = method.greedy_wanted(prompts)
            rollout = self.parts.roll_out(
                prompts, num_samples=args.num_generations, greedy=greedy, seed=args.seed, step=step
            )
        with self.meter.measure("reward"), self.parts.begin_reference(rollout, args) as reference:
            rewards = self.parts.score(rollout)
            self.parts.require_rewards(rewards, args.max_missing_rewards, first=step == 1)
        with self.meter.measure("reference"):
            ref_logprobs = reference()
        record = StepRecord(rollout, rewards, method.credit(rollout, rewards), ref_logprobs, step)
        record.learning_rate = self.policy.learning_rate
        with self.meter.measure("update"):
            method.update(record)
            self.policy.scheduler.step()
            self.parts.policy_version += 1
        return record

    # The run ----------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Trains, fills the run's folder and returns the metrics of the last step.

        With args.resume it goes on from a checkpoint of the run in the folder; if that run has ended, nothing is done.

        Raises:
            UserError: a reward function cannot be used, or something could not be written. Whatever goes wrong before
                the first step is done, nothing stays written.
            GuardStop: a guard stopped the run, whose state is saved.
            Interrupted: Ctrl-C or SIGTERM came; the step was finished, the state is saved.
            PushFailed: all is done and written, but args.push_to_hub did not work.
        """
        if self.session.finished:
            self.view.note(f"The run in {self.folder.path} is finished: nothing is left to do.")
            self._push()
            return self.session.last_metrics()
        self.session.begin(self.run_config)
        try:
            metrics = self.session.restore(self)
            step, number = self.state.global_step, self.accelerator.num_processes
            self.processes.on_main(lambda: record_start(self.folder, step, num_processes=number))
            self.processes.on_main(self._start_trackers)
            self._notify("on_train_begin")
            self.session.restore_generators()
            if not self._is_evaluated:  # At the beginning, or since a guard stopped the run while it was.
                self._evaluate()
            if self._ended:
                self.view.note(f"All of {self.max_steps} steps are done: nothing is left to train.")
            self.view.start(self.max_steps, self.state.global_step)
            while not self._ended:
                metrics = self._recorded_step(self.state.global_step + 1)
                if self._evaluation_is_due:
                    self._evaluate()
                self.guards.stop_if_needed()
                self.session.after_step(self, ended=self._ended)
            if self.save_final_model:
                self.save_model(self.folder.model)
            self.session.check_saved()
            self.view.note(self._describe_memory())
            self._notify("on_train_end")
        except BaseException as error:
            try:
                if isinstance(error, GuardStop) and self.state.global_step > 0:
                    self.session.save_before_stop(self, ended=self._ended)
            finally:
                # A second Ctrl-C does not wait for a checkpoint that is being written.
                at_once = isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted)
                self._close(error, at_once=at_once)
            if self.state.global_step == 0:
                self.folder.discard()
            raise
        self._close()
        self._push()
        return metrics

    @property
    def _ended(self) -> bool:
        return self.state.global_step >= self.max_steps or bool(self.control.should_training_stop)

    @property
    def _evaluation_is_due(self) -> bool:
        step = self.state.global_step
        return step == 0 or self._ended or bool(self.args.eval_steps and step % self.args.eval_steps == 0)

    @property
    def _is_evaluated(self) -> bool:
        """Whether nothing is left to evaluate after the last step."""
        steps = {line["step"] for line in self.folder.read("eval.jsonl")}
        return not self._evaluation_is_due or self.state.global_step in steps

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint of the run, which may have to be waited for."""
        self.session.writer.wait()
        return self.session.last_checkpoint()

    def _close(self, error: BaseException | None = None, *, at_once: bool = False) -> None:
        try:
            self.view.stop()
            self.trackers.finish(error)
        finally:
            self.session.end(at_once=at_once)

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
        rewards = [function.name for function in self.parts.reward_functions]
        card = policy_card(
            self.parts.model_name,
            self.args.method,
            rewards,
            self.run_config,
            self.state.global_step,
            curve=self.folder.read("metrics.jsonl"),
            evaluations=self.folder.read("eval.jsonl"),
        )
        stops = self.parts.sampling.eos_token_ids
        save_model(
            self.parts.policy,
            self.parts.tokenizer,
            folder,
            eos_token_ids=stops,
            card=card,
            on_main=lambda write: self.processes.on_main(lambda: self._write(folder.name, write)),
            is_main=self.processes.is_main,
        )

    def _push(self) -> None:
        """Uploads the final model, if that is wanted. The other processes do not wait: it may take an hour."""
        if self.destination is None or not self.save_final_model or not self.processes.is_main:
            return
        message = f"Model after {self.max_steps} steps with {self.args.method}"
        address = push(self.folder.model, self.destination, message=message)
        self.view.note(f"The model is at {address}.")

    def _start_trackers(self) -> None:
        step = self.state.global_step
        self.trackers.start(self.accelerator, self.run_config, step=step, max_steps=self.max_steps)

    def _write(self, name: str, write: Callable[[], None]) -> None:
        with self.folder.writing(name):
            write()

    def _describe_memory(self) -> str:
        value_model = self.method.critic.module if isinstance(self.method, PPO) else None
        return describe_peaks(
            self.parts, self.args, self.meter.run_peak_bytes, base_bytes=self.base_bytes, value_model=value_model
        )

    def _recorded_step(self, step: int) -> dict[str, float]:
        started = time.perf_counter()
        self.meter.clear()
        self._notify("on_step_begin")
        record = self._whole_step(step)
        if step == 1 and not (record.trained.any() or record.skipped):
            names = ", ".join(function.name for function in self.parts.reward_functions)
            raise UserError(
                f"the rewards ({names}) gave no number for any completion of the first step: there is nothing to learn "
                "from; correct the reward function (what went wrong in it, if anything did, is in a warning above)."
            )
        seconds = time.perf_counter() - started
        num_tokens = sum(len(c.token_ids) for c in record.rollout.samples + record.rollout.greedy)
        self.num_tokens += num_tokens
        metrics = {
            "step": step,
            "epoch": step / self.order.steps_per_epoch,
            **step_metrics(record),
            **self.guards.count(record),
            **self.meter.metrics(),
            "time/step": seconds,
            "num_tokens": self.num_tokens,
            "tokens_per_second": num_tokens / seconds,
            "num_processes": self.accelerator.num_processes,
        }
        self.folder.append("metrics.jsonl", [metrics])
        if self.args.log_completions:
            self.folder.append("completions.jsonl", completion_records(record, step))
        self.state.global_step, self.state.epoch = step, metrics["epoch"]
        self._notify("on_step_end", num_tokens=self.num_tokens)
        measured = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._log(measured)
        if self.args.log_completions:
            self.trackers.log_completions(lambda: completion_records(record, step), step)
        if step % self.args.logging_steps == 0 or step == self.max_steps:
            self.view.update(measured, record.rollout.samples[0])
        self._tell(self.guards.after_step(record, metrics))
        self._agree_on_end()
        return metrics

    def _agree_on_end(self) -> None:
        """Lets a callback that stops the training in one process stop it in all."""
        self.control.should_training_stop = any(self.processes.gather(bool(self.control.should_training_stop)))

    def _whole_step(self, step: int) -> StepRecord:
        """Takes a step; if a guard stops the run in the middle of it, the method forgets that it began."""
        before = self.method.state_dict()
        try:
            return self.step(self.order.batch(step), step)
        except GuardStop:
            self.method.load_state_dict(before)
            self._tell(self.guards.take_news(step))
            raise

    def _tell(self, news: Sequence[Mapping[str, Any]]) -> None:
        """Records and shows what the guards have to say."""
        if news:
            self.folder.append("alarms.jsonl", news)
        for line in news:
            self.view.note(self.guards.said(line))

    def _evaluate(self) -> None:
        """Evaluates, if there are prompts for it, and keeps the best weights."""
        if not self.parts.eval_prompts:
            return
        step = self.state.global_step
        evaluation = self.evaluate()
        metrics = {f"eval/{name}": value for name, value in evaluation.means().items()}
        if self.args.log_completions:
            self.folder.append("eval_completions.jsonl", evaluation.records(step))
        self.folder.append("eval.jsonl", [{"step": step, **metrics}])
        shown = (f"{name} {metrics[f'eval/{name}']:.3g}" for name in SHOWN_OF_EVALUATION if f"eval/{name}" in metrics)
        self.view.note(f"evaluation after step {step}: {'  '.join(shown)}")
        self._log(metrics)
        self._notify("on_evaluate", metrics=metrics, evaluation=evaluation)
        self._agree_on_end()
        self._tell(self.guards.after_evaluation(step, evaluation))
        wanted = self.args.metric_for_best_model
        if wanted.removeprefix("eval/") not in evaluation.values or not wanted.startswith("eval/"):
            raise UserError(
                f"--metric_for_best_model is {wanted}: evaluations do not measure that, so no model would be the best; "
                f"set one of {', '.join(metrics)}."
            )
        metric = evaluation.deciding(wanted.removeprefix("eval/"), self.args.max_missing_rewards)
        if metric is not None and (self.state.best_metric is None or metric > self.state.best_metric):
            self.state.best_metric, self.state.best_global_step = metric, step
            if self.args.save_best_model and step > 0:
                self.save_model(self.folder.best_model)

    def _log(self, metrics: Mapping[str, float]) -> None:
        self.trackers.log(metrics, self.state.global_step)
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
                optimizer=self.policy.optimizer,
                lr_scheduler=self.policy.scheduler,
                **kwargs,
            )

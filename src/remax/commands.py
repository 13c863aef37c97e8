"""What every command does, as a function of its settings; heavy imports happen inside, so help and errors are quick."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remax import config
from remax.demo.settings import DemoConfig
from remax.errors import GuardStop, Interrupted
from remax.options import Options


@dataclass(frozen=True)
class Command:
    """One command of the command line."""

    summary: str
    example: str
    settings: tuple[type[Options], ...]
    run: Callable[..., None]
    """Called with one instance of every settings class."""
    positional: tuple[str, ...] = ()
    """The flags whose values may stand first, without them, in this order."""

    def flags(self, arguments: Sequence[str]) -> list[str]:
        """Returns the arguments with the flags that may be left out."""
        plain = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))[: len(self.positional)]
        named = [part for name, value in zip(self.positional, plain, strict=False) for part in (f"--{name}", value)]
        return [*named, *arguments[len(plain) :]]


def run_train(inputs: config.TrainInputs, args: config.ReMaxConfig, options: config.LaunchOptions) -> None:
    """`remax train`"""
    from remax.launch import launch, starts_others
    from remax.recording import RunFolder
    from remax.rewards.named import named_gold_rewards, named_rewards, wait_until_ready

    # A folder that is taken is found before the imports that take seconds.
    RunFolder(args.output_dir, resumes=args.resume != "none")
    if starts_others(options):
        raise SystemExit(launch(options, sys.argv[1:]))
    rewards = named_rewards(inputs, args.reward_timeout_seconds)
    gold_rewards = named_gold_rewards(inputs, args.reward_timeout_seconds)

    from remax.doctor import quick_warnings
    from remax.hub import PushFailed
    from remax.processes import leave_processes
    from remax.rollout.vllm.engine import VLLMEngine
    from remax.trainer import ReMaxTrainer

    wait_until_ready([*rewards, *gold_rewards])  # before a tokenizer and data are read
    for line in quick_warnings(inputs, args):
        print(line)
    trainer = ReMaxTrainer(
        inputs.model,
        rewards,
        args,
        train_dataset=inputs.train_dataset,
        eval_dataset=inputs.eval_dataset,
        gold_reward_funcs=gold_rewards,
        run_config={**dataclasses.asdict(inputs), **dataclasses.asdict(args)},
    )
    try:
        trainer.train()
    except (GuardStop, Interrupted, PushFailed):  # Of a run that was stopped the report is wanted most.
        if trainer.processes.is_main:
            _report(trainer.folder)
        raise
    if isinstance(trainer.parts.engine, VLLMEngine):  # It has groups among the processes, which end with theirs.
        trainer.parts.engine.close()
    leave_processes()
    print(f"The trained model is in {trainer.folder.model}.")
    if trainer.processes.is_main:
        _report(trainer.folder)


def _report(folder: Any) -> None:
    """Leaves report.html in the folder of a training that has just ended, unless nothing of it is left."""
    from remax.report.command import report_after_training

    if folder.writes and folder.path.exists():
        print(report_after_training(folder.path))


def run_sft(inputs: config.StageInputs, args: config.SFTConfig, options: config.LaunchOptions) -> None:
    """`remax sft`"""
    from remax.stages.sft import run_sft

    _run_stage(run_sft, inputs, args, options)


def run_reward(inputs: config.StageInputs, args: config.RewardConfig, options: config.LaunchOptions) -> None:
    """`remax reward`"""
    from remax.stages.reward import run_reward

    _run_stage(run_reward, inputs, args, options)


def run_dpo(inputs: config.StageInputs, args: config.DPOConfig, options: config.LaunchOptions) -> None:
    """`remax dpo`"""
    from remax.stages.dpo import run_dpo

    _run_stage(run_dpo, inputs, args, options)


def _run_stage(
    stage: Callable[..., Any],
    inputs: config.StageInputs,
    args: config.SFTConfig | config.RewardConfig | config.DPOConfig,
    options: config.LaunchOptions,
) -> None:
    from remax.launch import check_replicates, launch, starts_others
    from remax.recording import RunFolder

    RunFolder(args.output_dir, resumes=args.resume != "none")
    if starts_others(options):
        check_replicates(options)
        raise SystemExit(launch(options, sys.argv[1:]))

    from remax.data import load_records
    from remax.models import check_model_exists
    from remax.processes import leave_processes

    check_model_exists(inputs.model, flag="--model")
    train_dataset = load_records(inputs.train_dataset, args.dataset_split, flag="--train_dataset")
    eval_dataset = inputs.eval_dataset and load_records(inputs.eval_dataset, args.eval_split, flag="--eval_dataset")
    run_config = {**dataclasses.asdict(inputs), **dataclasses.asdict(args)}
    stage(args, inputs.model, train_dataset, eval_dataset, run_config=run_config)
    leave_processes()


def run_evaluate(inputs: config.EvaluateInputs, args: config.EvaluateConfig) -> None:
    """`remax evaluate`"""
    from remax.recording import RunFolder
    from remax.rewards.named import named_rewards

    folder = RunFolder(args.output_dir) if args.output_dir else None
    rewards = named_rewards(inputs, args.reward_timeout_seconds)

    from remax.evaluate import evaluate_checkpoint

    evaluate_checkpoint(inputs, rewards, args, folder)


def run_lab(inputs: config.LabInputs, args: config.LabConfig) -> None:
    """`remax lab`"""
    from remax.recording import RunFolder
    from remax.rewards.named import named_rewards

    folder = RunFolder(args.output_dir)
    rewards = named_rewards(inputs, args.reward_timeout_seconds)

    from remax.lab.experiment import run_lab

    run_lab(inputs, rewards, args, folder)


def run_chat(inputs: config.ChatInputs, args: config.ChatConfig) -> None:
    """`remax chat`"""
    from remax.chat import chat

    chat(inputs.model, args)


def run_compare(inputs: config.CompareInputs, args: config.CompareConfig) -> None:
    """`remax compare`"""
    from remax.compare.runner import run_comparison

    run_comparison(inputs, args, ["remax", *sys.argv[1:]])


def run_winrate(inputs: config.WinrateInputs, args: config.WinrateConfig) -> None:
    """`remax winrate`"""
    from remax.winrate.command import run_winrate

    run_winrate(inputs, args)


def run_plan(inputs: config.PlanInputs, args: config.PlanConfig, unused: config.UnusedInputs) -> None:
    """`remax plan`"""
    # What a training imports: on a CPU, the size of this process is where its memory starts.
    import remax.trainer  # noqa: F401
    from remax.plan.command import run_plan

    run_plan(inputs, args)


def run_doctor(
    inputs: config.TrainInputs, options: config.DoctorOptions, args: config.ReMaxConfig, launch: config.LaunchOptions
) -> None:
    """`remax doctor`"""
    from remax.launch import check_launch

    check_launch(launch)
    # What a training imports: on a CPU, the size of this process is where its memory starts.
    import remax.trainer  # noqa: F401
    from remax.doctor.command import run_doctor
    from remax.rewards.named import named_rewards

    rewards = functools.partial(named_rewards, inputs, args.reward_timeout_seconds)
    findings = run_doctor(inputs, args, options, load_rewards=rewards)
    if any(finding.status == "fail" for finding in findings):
        raise SystemExit(2)  # The table has said it all.


def run_serve_reward(inputs: config.ServeInputs, args: config.ServeConfig) -> None:
    """`remax serve-reward`"""
    from remax.rewards import resolve_weights
    from remax.rewards.named import named_function, wait_until_ready
    from remax.rewards.server import RewardServer, scorer, serve

    rewards: list[Any] = [inputs.model] if inputs.model else []
    rewards += [named_function(spec, args.reward_timeout_seconds) for spec in inputs.reward_funcs]
    weights = resolve_weights(args.reward_weights, len(rewards))
    functions: list[Any] = []
    # It listens before the imports that take seconds: a port that is taken is found early, and clients may wait.
    server = RewardServer(scorer(functions, weights), args.host, args.port)

    wait_until_ready(rewards)
    if inputs.model:
        from remax.loading import load_rewards
        from remax.models import check_model_exists
        from remax.processes import make_accelerator

        check_model_exists(inputs.model, flag="--model")
        device = make_accelerator(False).device
        rewards = load_rewards(rewards, None, args.reward_batch_size, device, conversational=False, flag="--model")
    functions += rewards
    serve(server)


def run_serve_vllm(inputs: config.ServeVLLMInputs, args: config.ServeVLLMConfig) -> None:
    """`remax serve-vllm`"""
    from remax.rollout.vllm.local import require_vllm
    from remax.rollout.vllm.server import run_server

    require_vllm("remax serve-vllm")
    run_server(inputs.model, args)


def run_report(args: config.ReportConfig) -> None:
    """`remax report`"""
    from remax.report.command import run_report

    run_report(args)


def run_replay(args: config.ReplayConfig) -> None:
    """`remax replay`"""
    from remax.guards.replay import run_replay

    run_replay(args)


def run_init(args: config.InitConfig) -> None:
    """`remax init`"""
    from remax.starter import run_init

    run_init(args)


def run_completion(args: config.CompletionConfig) -> None:
    """`remax completion`"""
    from remax.completion import script

    print(script(args.shell, COMMANDS), end="")


def run_demo(args: DemoConfig) -> None:
    """`remax demo`"""
    from remax.demo.pipeline import run_demo
    from remax.report.command import report_after_training

    run_demo(args)
    print(report_after_training(Path(args.output_dir) / "remax"))


COMMANDS = {
    "sft": Command(
        "Fine-tune a language model on texts or prompts with completions.",
        "--model M --train_dataset FILE --output_dir OUT [settings]",
        (config.StageInputs, config.SFTConfig, config.LaunchOptions),
        run_sft,
    ),
    "reward": Command(
        "Train a reward model on pairs of a chosen and a rejected text.",
        "--model M --train_dataset FILE --eval_dataset FILE --output_dir OUT [settings]",
        (config.StageInputs, config.RewardConfig, config.LaunchOptions),
        run_reward,
    ),
    "train": Command(
        "Train a policy with ReMax, or another method, against a reward model or functions.",
        "--model M --reward_model R --train_dataset FILE --output_dir OUT [--accelerate_config fsdp2] [settings]",
        (config.TrainInputs, config.ReMaxConfig, config.LaunchOptions),
        run_train,
    ),
    "dpo": Command(
        "Train a policy on pairs of a chosen and a rejected text, without a reward model (DPO).",
        "--model M --train_dataset FILE --eval_dataset FILE --output_dir OUT [settings]",
        (config.StageInputs, config.DPOConfig, config.LaunchOptions),
        run_dpo,
    ),
    "evaluate": Command(
        "Measure reward, KL, length and perplexity of a policy on held-out prompts.",
        "--model M --reward_model R --eval_dataset FILE [settings]",
        (config.EvaluateInputs, config.EvaluateConfig),
        run_evaluate,
    ),
    "compare": Command(
        "Compare methods over seeds under one budget of prompts, tokens or seconds.",
        "--config compare.yaml --output_dir OUT [settings]",
        (config.CompareInputs, config.CompareConfig),
        run_compare,
    ),
    "winrate": Command(
        "Judge two checkpoints, or two files of outputs, pair by pair: how often the one is better than the other.",
        "A B [--eval_dataset FILE] [--reward_model R | --judge_url URL --judge_model J] [settings]",
        (config.WinrateInputs, config.WinrateConfig),
        run_winrate,
        positional=("a", "b"),
    ),
    "plan": Command(
        "Predict a training's peak memory from configs alone: whether it fits, and what would.",
        "--model M [--device_memory 80GB] [settings], or --config run.yaml, a file for `remax train`",
        (config.PlanInputs, config.PlanConfig, config.UnusedInputs),
        run_plan,
    ),
    "lab": Command(
        "Measure the variance, signal and cost of every method's gradient at a checkpoint.",
        "--model M --reward_model R --train_dataset FILE --output_dir OUT [settings]",
        (config.LabInputs, config.LabConfig),
        run_lab,
    ),
    "serve-reward": Command(
        "Serve a reward model, or reward functions, to trainings with --reward_url.",
        "MODEL [--reward_funcs FILE.py:FUNCTION] [--port 8000] [settings]",
        (config.ServeInputs, config.ServeConfig),
        run_serve_reward,
        positional=("model",),
    ),
    "serve-vllm": Command(
        "Serve vLLM to trainings with --rollout_engine vllm --vllm_mode server.",
        "MODEL [--port 8000] [settings]",
        (config.ServeVLLMInputs, config.ServeVLLMConfig),
        run_serve_vllm,
        positional=("model",),
    ),
    "chat": Command(
        "Talk to a checkpoint in the terminal.",
        "--model M [settings]",
        (config.ChatInputs, config.ChatConfig),
        run_chat,
    ),
    "doctor": Command(
        "Check a training's set-up before hours are spent: tokenizer, data, rewards, a small rollout, disk, memory.",
        "--model M --reward_model R --train_dataset FILE [--pairs FILE] [settings]",
        (config.TrainInputs, config.DoctorOptions, config.ReMaxConfig, config.LaunchOptions),
        run_doctor,
    ),
    "report": Command(
        "Show what a training did on one page, while it runs or after; several are drawn over each other.",
        "OUT [OUT2 ...] [--output_file FILE.html]",
        (config.ReportConfig,),
        run_report,
        positional=("runs",),
    ),
    "replay": Command(
        "Take a skipped update apart: which rows, tokens and weights are not finite.",
        "OUT/dumps/step-000007 [--model M]",
        (config.ReplayConfig,),
        run_replay,
        positional=("dump",),
    ),
    "init": Command(
        "Write a commented YAML file to start a training from, of one of several recipes.",
        "RECIPE [--output run.yaml]",
        (config.InitConfig,),
        run_init,
        positional=("recipe",),
    ),
    "completion": Command(
        "Print a script that completes commands, flags and their values in a shell.",
        "bash|zsh|fish",
        (config.CompletionConfig,),
        run_completion,
        positional=("shell",),
    ),
    "demo": Command(
        "Run the whole pipeline on a small world of stories, offline, in about two minutes.",
        "[settings]",
        (DemoConfig,),
        run_demo,
    ),
}

"""What TRL's GRPOTrainer takes, ReMaxTrainer takes unchanged: the same functions, reward models and datasets."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainerCallback,
    TrainerControl,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig

from remax import ReMaxConfig, ReMaxTrainer
from remax.config import TrainInputs
from remax.errors import UserError
from toy_tokenizers import CHATML, EOS, PAD, VOCAB_SIZE, toy_tokenizer
from toy_training import Silent, make_trainer, policy, read

STANDARD = [{"prompt": text, "answer": text[::-1], "rank": row} for row, text in enumerate(("ab", "cd", "ef", "gh"))]
CHAT = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
DATASETS = {
    "prompts": STANDARD,
    "conversations": [{"prompt": CHAT, "answer": "x", "rank": row} for row in range(4)],
    "prompts with completions": [{**row, "completion": " yes"} for row in STANDARD],
    "conversations with completions": [
        {"prompt": CHAT, "completion": [{"role": "assistant", "content": "yes"}], "answer": "x", "rank": row}
        for row in range(4)
    ],
}


def kind(value: Any) -> Any:
    """Returns what a value is, down to the items of lists and the keys of messages."""
    if isinstance(value, list):
        return [kind(item) for item in value[:1]]
    if isinstance(value, dict):
        return {name: kind(item) for name, item in value.items()}
    return "function" if callable(value) else type(value).__name__


class Functions:
    """Reward functions as TRL's users write them; `seen` has what each was called with."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, Any]] = {}

    def functions(self) -> list[Callable[..., Any]]:
        def everything(**kwargs: Any) -> list[float]:
            self.seen["everything"] = kwargs
            return [float(len(ids)) for ids in kwargs["completion_ids"]]

        async def asynchronous(prompts: Any, completions: Any, answer: Any, **kwargs: Any) -> list[float]:
            self.seen["asynchronous"] = {"prompts": prompts, "completions": completions, "answer": answer, **kwargs}
            return [0.5] * len(prompts)

        def sometimes(
            completions: Any, rank: Any, log_metric: Any, log_extra: Any, **kwargs: Any
        ) -> list[float | None]:
            self.seen["sometimes"] = {"completions": completions, "rank": rank, **kwargs}
            log_metric("mean_rank", sum(rank) / len(rank))
            log_extra("doubled", [2 * number for number in rank])
            return [None if number % 2 else 1.0 for number in rank]

        def later(completions: Any, trainer_state: Any, **kwargs: Any) -> list[float]:
            self.seen["later"] = {"completions": completions, "trainer_state": trainer_state, **kwargs}
            return [float(trainer_state.global_step >= 0)] * len(completions)

        return [everything, asynchronous, sometimes, later]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rewards") / "judge"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB_SIZE, pad_token_id=PAD, eos_token_id=EOS, num_labels=1, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    toy_tokenizer(chat_template=CHATML).save_pretrained(folder)
    return str(folder)


COMMON = {"max_completion_length": 6, "temperature": 0.9, "beta": 0.0, "learning_rate": 1e-3, "max_steps": 1}


def constructor(reward_funcs: Any, rows: Any) -> dict[str, Any]:
    """Returns the arguments that both trainers get."""
    return {
        "model": policy(),
        "reward_funcs": reward_funcs,
        "train_dataset": Dataset.from_list(rows),
        "processing_class": toy_tokenizer(chat_template=CHATML),
    }


@pytest.mark.parametrize("name", DATASETS)
def test_the_same_functions_get_the_same_arguments(name: str, reward_model: str, tmp_path: Path) -> None:
    of_trl, ours = Functions(), Functions()
    own = {"output_dir": str(tmp_path / "trl"), "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    batches = {"per_device_train_batch_size": 4, "num_generations": 2, "use_cpu": True, "bf16": False}
    arguments = GRPOConfig(**COMMON, **own, **batches)
    GRPOTrainer(args=arguments, **constructor([*of_trl.functions(), reward_model], DATASETS[name])).train()

    args = ReMaxConfig(**COMMON, output_dir=str(tmp_path / "ours"), report_to="none", batch_size=4)
    ReMaxTrainer(args=args, **constructor([*ours.functions(), reward_model], DATASETS[name]), view=Silent()).train()

    assert set(ours.seen) == set(of_trl.seen) == {"everything", "asynchronous", "sometimes", "later"}
    for function, given in of_trl.seen.items():
        assert kind(ours.seen[function]) == kind(given), function
    everything = ours.seen["everything"]
    assert "completion" not in everything
    assert set(map(len, (everything[column] for column in ("prompts", "answer", "rank")))) == {8}
    by_rank = {row["rank"]: row for row in DATASETS[name]}
    for prompt, answer, rank in zip(everything["prompts"], everything["answer"], everything["rank"], strict=True):
        assert (prompt, answer) == (by_rank[rank]["prompt"], by_rank[rank]["answer"])

    (metrics,) = read(tmp_path / "ours" / "metrics.jsonl")
    assert metrics["mean_rank"] == 1.5
    assert metrics["rewards/asynchronous/mean"] == 0.5
    assert metrics["rewards/sometimes/mean"] == 1.0, "None does not count"
    assert metrics["rewards/judge/mean"] is not None
    for completion in read(tmp_path / "ours" / "completions.jsonl"):
        assert completion["doubled"] == 2 * by_rank[completion["doubled"] // 2]["rank"]


def test_every_setting_of_trl_is_taken_or_refused_with_advice() -> None:
    known = {field.name for cls in (ReMaxConfig, TrainInputs) for field in dataclasses.fields(cls)}
    own = {f.name for cls in (GRPOConfig, RLOOConfig) for f in dataclasses.fields(cls)}
    inherited = {
        f.name for cls in GRPOConfig.__mro__[2:] if dataclasses.is_dataclass(cls) for f in dataclasses.fields(cls)
    }
    silent = []
    for name in sorted((own - inherited - known) | MATTER):
        with pytest.raises(UserError) as caught:
            ReMaxConfig(**{name: 1})
        if not re.search("here it is|for it here", str(caught.value)):
            silent.append(name)
    assert set(silent) <= WITHOUT_COUNTERPART


MATTER = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "eval_strategy", "save_strategy", "deepspeed"),
    *("hub_token", "resume_from_checkpoint", "load_best_model_at_end", "fsdp", "fp16", "use_liger_kernel"),
}
"""Settings of transformers that TRL's examples set, and that are called otherwise here."""
WITHOUT_COUNTERPART = {
    *("entropy_coef", "entropy_coef_delta", "entropy_coef_max", "entropy_coef_min", "entropy_target"),
    *("use_adaptive_entropy", "top_entropy_quantile", "use_bias_correction_kl", "multi_objective_aggregation"),
    *("importance_sampling_level", "off_policy_mask_threshold", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *("sapo_temperature_neg", "sapo_temperature_pos"),
    *("vespo_k_neg", "vespo_k_pos", "vespo_lambda_neg", "vespo_lambda_pos"),
    *("cache_implementation", "chat_template_kwargs", "ds3_gather_for_generation", "pad_to_multiple_of"),
    *("log_completions_hub_repo", "log_multimodal", "max_tool_calling_iterations", "router_aux_loss_coef"),
    *("transformers_continuous_batching_config", "vllm_group_port", "vllm_importance_sampling_clip_min"),
    *("vllm_importance_sampling_mode", "vllm_model_impl", "vllm_structured_outputs_regex"),
}
"""Settings of TRL for what is not here: they are refused too."""


def test_a_callback_can_be_a_class_or_an_object(tmp_path: Path) -> None:
    steps = []

    class Counts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    make_trainer(tmp_path / "out", callbacks=[Counts, Counts()]).train()
    assert steps == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("callback", "expected"),
    [(EarlyStoppingCallback(), r"has an EarlyStoppingCallback: .*docs/from-trl\.md"), (print, "is no transformers.Tr")],
)
def test_callbacks_that_could_not_work_are_refused(callback: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        make_trainer(tmp_path / "out", callbacks=[callback])
    assert not (tmp_path / "out").exists()


def test_the_early_stop_of_the_documentation_stops(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "from-trl.md").read_text()
    (block,) = [part.split("```")[0] for part in page.split("```python\n")[1:] if "on_evaluate" in part]
    names: dict[str, Any] = {}
    exec(block, names)
    rewards = iter([0.1, 0.5, 0.4, 0.5, 0.9])
    callback, control = names["EarlyStop"](patience=2), TrainerControl()
    stopped = []
    for reward in rewards:
        callback.on_evaluate(None, None, control, metrics={"eval/reward": reward})
        stopped.append(control.should_training_stop)
    assert stopped == [False, False, False, True, True]
    dataset = Dataset.from_list(STANDARD)
    callback = names["EarlyStop"](patience=1)
    trainer = make_trainer(
        tmp_path, lambda completions, **_: [1.0] * len(completions), callbacks=[callback], max_steps=9, eval_steps=1,
        eval_dataset=dataset,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1, "as good as at the start is not better"

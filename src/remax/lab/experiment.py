"""One experiment, from settings to results."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import set_seed

from remax import models
from remax.assembly import assemble
from remax.batching import PromptOrder
from remax.components import Components
from remax.config import LabConfig, LabInputs, ReMaxConfig
from remax.errors import UserError
from remax.lab import report
from remax.lab.measurement import measure
from remax.lab.plot import draw
from remax.loading import load_other_reference
from remax.recording import RunFolder


def run_lab(inputs: LabInputs, reward_funcs: Sequence[Any], args: LabConfig, folder: RunFolder) -> dict[str, Any]:
    """Returns, prints and writes (lab.json, lab.png) what the gradients of all methods are like at a checkpoint.

    Raises:
        UserError: a setting, model, dataset or reward cannot be used; nothing stays written.
    """
    started = time.perf_counter()
    set_seed(args.seed)
    trainings = {entry: args.training(entry, dataset_split=inputs.dataset_split) for entry in args.methods}
    parts = assemble_lab(inputs, reward_funcs, args, trainings)
    settings = {**dataclasses.asdict(inputs), **dataclasses.asdict(args)}
    folder.create(settings)
    try:
        measurement = measure(
            parts,
            trainings,
            PromptOrder(parts.prompts, args.batch_size, args.seed).batch(1),
            num_gradients=args.num_gradients,
            reward_offset=args.reward_offset,
            seed=args.seed,
            folder=folder.path,
        )
        results = report.as_json(measurement, settings, seconds=time.perf_counter() - started)
        report.write(results, folder.path)
    except BaseException:
        folder.discard()
        raise
    report.print_tables(results)
    draw(results, folder.path / "lab.png")
    print(f"All figures are in {folder.path / 'lab.json'}, a picture of them in {folder.path / 'lab.png'}.")
    return results


def assemble_lab(
    inputs: LabInputs, reward_funcs: Sequence[Any], args: LabConfig, trainings: Mapping[str, ReMaxConfig]
) -> Components:
    """Returns what the experiment needs, as a training would have it.

    Where the checkpoint is its own reference and not truncated, every log-ratio is 0 and no reference is loaded.

    Raises:
        UserError: something cannot be used.
    """
    hardest = next((training for training in trainings.values() if training.method == "ppo"), None)
    training = hardest or next(iter(trainings.values()))
    if inputs.ref_model is not None:
        models.check_model_exists(inputs.ref_model, flag="--ref_model")
        if not training.needs_reference:
            raise UserError(
                f"--ref_model is {inputs.ref_model}: with --beta {args.beta} and --kl_mode {args.kl_mode} there is no "
                "KL to it; leave it out, or set a positive --beta and another --kl_mode."
            )
    if inputs.ref_model is not None or not (args.top_p < 1 or args.top_k > 0):
        training = dataclasses.replace(training, kl_mode="none")
    parts = assemble(training, model=inputs.model, reward_funcs=reward_funcs, train_dataset=inputs.train_dataset)
    if inputs.ref_model is not None:
        parts.reference = load_other_reference(inputs.ref_model, args, parts.policy)
    return parts

"""Which examples each process trains on: a step has the same ones on any number of processes, in any micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from remax.processes import ALONE, Processes

Pick = tuple[int, bool]
"""The number of an example, and whether it counts."""
STUB = 2
"""Tokens of what stands for an example that does not count: as few as give the policy something to predict."""
MEANS = (
    *("logps/chosen", "logps/rejected"),
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
)
"""The metrics of TRL's DPO that are means over pairs, and 0 for pairs that do not count."""


class MicroBatches(Sampler[list[Pick]]):
    """The micro-batches of one process in an epoch.

    A step takes the next batch_size examples of the epoch's order, fewer at its end. Each process gets some of them, as
    many as the others: TRL gathers tensors that are of one shape everywhere. Who has one less gets the step's last one
    again, which does not count.
    """

    def __init__(
        self, num_examples: int, batch_size: int, micro_batch_size: int, seed: int, processes: Processes = ALONE
    ) -> None:
        """micro_batch_size: most examples of a micro-batch; 0 for no limit."""
        self.num_examples, self.batch_size, self.seed, self.processes = num_examples, batch_size, seed, processes
        self.epoch = 0
        self.micro_batch_size, self.per_step = division(batch_size, micro_batch_size, processes.num)

    @property
    def num_steps(self) -> int:
        """The steps of an epoch."""
        return -(-self.num_examples // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Goes to the order of another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        steps, rest = divmod(self.num_examples, self.batch_size)
        return steps * self.per_step + self._num_in(rest)

    def __iter__(self) -> Iterator[list[Pick]]:
        # The order of Accelerate's SeedableRandomSampler, which transformers takes in one process.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(self.num_examples, generator=generator).tolist()
        for start in range(0, self.num_examples, self.batch_size):
            yield from self._of_step(order[start : start + self.batch_size])

    def _of_step(self, batch: Sequence[int]) -> Iterator[list[Pick]]:
        share, size = -(-len(batch) // self.processes.num), self.micro_batch_size
        own = [(index, True) for index in self.processes.part(batch)]
        own += [(batch[-1], False)] * (share - len(own))
        yield from (own[start : start + size] for start in range(0, share, size))

    def _num_in(self, number: int) -> int:
        """Returns the micro-batches of a step of so many examples."""
        share = -(-number // self.processes.num)
        return -(-share // self.micro_batch_size)


def division(batch_size: int, micro_batch_size: int, num_processes: int) -> tuple[int, int]:
    """Returns the most examples in a micro-batch, and the micro-batches of a process in a whole step."""
    share = -(-batch_size // num_processes)
    size = min(micro_batch_size or share, share)
    return size, -(-share // size)


class _Picked(Dataset[tuple[Any, bool]]):
    """The rows of a dataset, with whether they count."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, picks: Sequence[Pick]) -> list[tuple[Any, bool]]:
        rows = self.rows.__getitems__([index for index, _ in picks])
        return [(row, counts) for row, (_, counts) in zip(rows, picks, strict=True)]


class Loader(DataLoader[Any]):
    """Loads the micro-batches of a process; not to be divided by Accelerate again."""

    def __init__(self, rows: Any, batches: MicroBatches, collate: Callable[[list[Any], list[bool]], Any]) -> None:
        """collate: from rows, and whether they count, to a micro-batch."""
        super().__init__(
            _Picked(rows),
            batch_sampler=batches,
            collate_fn=lambda picked: collate([row for row, _ in picked], [counts for _, counts in picked]),
            pin_memory=torch.cuda.is_available(),
        )
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Goes to the order of another epoch; transformers calls it."""
        self.batches.set_epoch(epoch)


class TogetherMixin:
    """A trainer of TRL's whose steps do not depend on the number of processes; to stand in front of its class."""

    batches: MicroBatches

    def get_train_dataloader(self) -> Loader:
        """Returns this process' micro-batches."""
        trainer: Any = self
        return Loader(trainer.train_dataset, self.batches, self.collate_counting)

    def collate_counting(self, rows: list[Any], counts: list[bool]) -> Any:
        """Returns a micro-batch to whose loss only those rows contribute that count."""
        raise NotImplementedError

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Leaves the rows as they are: they are token ids already.

        TRL's own preparation puts a second EOS behind texts whose tokenizer adds one.
        """
        return dataset


class PairsMixin(TogetherMixin):
    """Likewise of TRL's trainers on pairs, whose loss is a mean over them.

    Subclasses see to it that a pair that does not count adds nothing to the loss.
    """

    loss_is_scaled_for_ga = True

    def collate_counting(self, rows: list[Any], counts: list[bool]) -> Any:
        trainer: Any = self
        return {**trainer.data_collator(rows), "counts": torch.tensor(counts)}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Returns the micro-batches of this process' step, and the number of pairs in the whole step."""
        trainer: Any = self
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        number = sum(batch["counts"].sum() for batch in samples)
        return samples, trainer.accelerator.gather(torch.as_tensor(number).to(device)).sum()

    def share_of(self, total: Any, counts: Any, num_pairs: Any) -> Any:
        """Returns what the sum of losses of this micro-batch adds to the loss of the step, a mean over its pairs.

        TRL's metrics of the micro-batch get the same weight.
        """
        trainer: Any = self
        num_processes = trainer.accelerator.num_processes  # DDP takes the mean over them, where the sum is wanted.
        for name in MEANS:
            if values := trainer._metrics["train"].get(name):
                # TRL takes the mean over micro-batches; pairs that do not count have 0.
                weight = len(counts) * num_processes * trainer.current_gradient_accumulation_steps / num_pairs
                values[-1] *= float(weight)
        return total * num_processes / num_pairs

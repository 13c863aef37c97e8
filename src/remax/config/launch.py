"""Settings of starting a training in several processes."""

from dataclasses import dataclass

from remax.options import Options


@dataclass(frozen=True)
class LaunchOptions(Options):
    """Several processes"""

    accelerate_config: str | None = None
    """Starts the training in several processes: ddp, fsdp2, zero2 or zero3 for a config that comes with remax, or the
    path of an Accelerate config; `remax sft`, `reward` and `dpo` take ddp, or a file like it. Leave it out under
    `torchrun` and `accelerate launch`, which start them themselves."""
    num_processes: int | None = None
    """Processes that --accelerate_config starts; by default what its file says, else one for each GPU, or one."""

    def _check(self) -> None:
        if self.num_processes is None:
            return
        self._require(self.num_processes >= 1, "num_processes", "nothing would be started", "1 or more")
        self._require(
            self.accelerate_config is not None,
            "num_processes",
            "without --accelerate_config one process trains, and no other is started",
            "--accelerate_config ddp too",
        )

"""Settings of checkpoints, which every training command shares."""

from dataclasses import dataclass

from remax.options import Options


@dataclass(frozen=True)
class CheckpointOptions(Options):
    """Checkpoints"""

    save_steps: int = 100
    """Steps between two checkpoints in OUT/checkpoints; 0 for none but the last one (at the end, at Ctrl-C or SIGTERM),
    -1 for none at all."""
    save_total_limit: int = 2
    """How many checkpoints are kept: the newest ones and, among them, the one with the best evaluation; 1 keeps two if
    an older one is the best."""
    resume: str = "none"
    """none, auto (go on with the run in --output_dir if it holds one, else begin), or the path of a checkpoint of that
    run."""
    allow_config_change: bool = False
    """Go on although other settings, another model or other data are given than those that the run has."""

    def _check(self) -> None:
        self._require(self.save_steps >= -1, "save_steps", "no interval is negative", "a number of steps, 0 or -1")
        self._require(self.save_total_limit > 0, "save_total_limit", "no checkpoint would be left", "1 or more")
        self._require(bool(self.resume.strip()), "resume", "nothing is named", "none, auto or a checkpoint's path")
        self._require(
            self.resume == "none" or self.save_steps >= 0,
            "save_steps",
            "a run without checkpoints cannot be resumed",
            "0 or more, or leave --resume out",
        )

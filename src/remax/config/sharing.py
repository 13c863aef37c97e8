"""Settings of what a training shares with others: its metrics with trackers, its model with the Hugging Face hub."""

import re
from dataclasses import dataclass

from remax.options import Options

PROJECT = re.compile(r"[\w .-]{1,100}")
"""What every tracker takes as a project's name."""
HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class SharingOptions(Options):
    """Trackers and the Hugging Face hub"""

    project: str | None = None
    """Project (MLflow: experiment) that trackers put the run in; by default WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or
    TRACKIO_PROJECT of the environment, each for its tracker, or else remax."""
    run_name: str | None = None
    """What trackers call the run; by default as the folder of --output_dir."""
    push_to_hub: bool = False
    """Upload OUT/model with its card to the Hugging Face hub when the run is finished. The token is the one of `hf auth
    login` or of the environment variable HF_TOKEN."""
    hub_model_id: str | None = None
    """Repository to push to, as user/name or name; by default as the folder of --output_dir."""
    hub_private_repo: bool = False
    """Make a new repository private; by default that is up to the owner's settings."""
    hub_revision: str | None = None
    """Branch to push to; it is made if it is not there. By default main."""

    def _check(self) -> None:
        self._require(
            self.project is None or PROJECT.fullmatch(self.project) is not None,
            "project",
            "not every tracker takes it as a name",
            "letters, digits, spaces, ., - and _, 100 at most",
        )
        self._require(
            self.run_name is None or (self.run_name.isprintable() and 0 < len(self.run_name.strip()) <= 128),
            "run_name",
            "no tracker could show it",
            "a name of one line, 128 characters at most",
        )
        for name in ("hub_model_id", "hub_private_repo", "hub_revision"):
            self._require(self.push_to_hub or not getattr(self, name), name, "nothing is pushed", "--push_to_hub too")
        named = self.hub_model_id
        self._require(
            named is None
            or (HUB_NAME.fullmatch(named) is not None and not re.search(r"--|\.\.|[.-](/|$)|\.git$", named)),
            "hub_model_id",
            "the hub has no such names",
            "name or user/name of letters, digits, ., - and _",
        )

"""The device, the precision and the trackers of a run, from Accelerate."""

from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers

from remax.errors import UserError


def make_accelerator(bf16: bool, report_to: Sequence[str] = (), output_dir: str | None = None) -> Accelerator:
    """Returns the device, precision and trackers of a run.

    Raises:
        UserError: a tracker is not installed, or several processes were started.
    """
    trackers = [name for name in report_to if name != "none"]
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in trackers:
        if name not in available:
            raise UserError(
                f"--report_to is {name}: that is no tracker that is installed here, so nothing would be tracked; "
                f"set {' or '.join(available)}, or none."
            )
    # The precision of a former run in this process would be kept otherwise; transformers' Trainer does the same.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no", log_with=trackers or None, project_dir=output_dir
    )
    if accelerator.num_processes > 1:
        raise UserError(
            f"{accelerator.num_processes} processes were started: each would train alone and write over the others; "
            "start one process."
        )
    return accelerator

"""What `remax train` checks by itself: all that needs no model, in well under a second."""

from remax.config import DoctorOptions, ReMaxConfig, TrainInputs
from remax.doctor.context import Context
from remax.doctor.findings import Finding, Unavailable, crashed
from remax.doctor.machine import check_disk_space, check_memory
from remax.doctor.prompts import check_duplicates, check_leakage
from remax.doctor.tokenizer import check_chat_template, check_eos
from remax.errors import UserError

QUICK_CHECKS = (check_eos, check_chat_template, check_duplicates, check_leakage, check_disk_space, check_memory)


def quick_warnings(inputs: TrainInputs, args: ReMaxConfig) -> list[str]:
    """Returns one line for everything that looks wrong; refuses nothing.

    What cannot be read is left out: training refuses it with a sentence of its own.
    """
    context = Context(inputs, args, DoctorOptions(), load_rewards=list)
    found: list[Finding] = []
    for check in QUICK_CHECKS:
        try:
            found += check(context)
        except (UserError, Unavailable):
            continue
        except Exception as error:  # a check that is wrong must not stop a training that is right
            found.append(crashed(check, error))
    shown = [finding for finding in found if finding.status in ("warn", "fail")]
    return [f"doctor: {own.check}: {own.finding}; {own.fix}." for own in shown]

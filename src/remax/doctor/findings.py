"""What a check finds, and how a check is run so that its own fault is a finding too."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from remax.errors import UserError
from remax.models import short_reason
from remax.untrusted import printable

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """One row of the table. Its texts are on one line and safe to print, whatever data and models put into them."""

    check: str
    status: Status
    """skip: not looked at, and why; it says nothing about the set-up."""
    finding: str
    """What was seen, with its number."""
    fix: str = ""
    """What to do about it; empty if nothing."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, " ".join(printable(getattr(self, field.name)).split()))


Check = Callable[[Any], list[Finding]]
"""From a Context to findings; raises UserError for what `remax train` refuses."""


class Unavailable(Exception):
    """What a check looks at could not be loaded; an earlier finding says why."""


def judged(check: str, finding: str, fix: str, *, fail: bool = False, warn: bool = False) -> Finding:
    """Returns a finding that fails, warns or passes; the fix is dropped where nothing is wrong."""
    status: Status = "fail" if fail else "warn" if warn else "pass"
    return Finding(check, status, finding, fix if fail or warn else "")


def run_check(check: Check, context: Any) -> list[Finding]:
    """Returns what a check finds. What it raises becomes a finding, so that the next checks go on."""
    try:
        return check(context)
    except Unavailable as error:
        return [Finding(name_of(check), "skip", str(error))]
    except UserError as error:
        finding, _, fix = str(error).rpartition("; ")
        return [Finding(name_of(check), "fail", finding, fix.removesuffix("."))]
    except Exception as error:
        return [crashed(check, error)]


def crashed(check: Check, error: Exception) -> Finding:
    """Returns the finding for a check that came to no end."""
    return Finding(
        name_of(check),
        "fail",
        f"the check itself failed: {type(error).__name__}: {short_reason(error)}",
        "correct what the message names, since training may fail in the same place",
    )


def name_of(check: Check) -> str:
    """Returns how a check is called in the table."""
    words = check.__name__.removeprefix("check_").split("_")
    return " ".join(word.upper() if word in ("eos", "bos") else word for word in words)


def counts(findings: Iterable[Finding]) -> dict[Status, int]:
    """Returns how many findings there are of each status."""
    found: dict[Status, int] = {"pass": 0, "warn": 0, "fail": 0, "skip": 0}
    for finding in findings:
        found[finding.status] += 1
    return found

"""Settings of `remax report`."""

from dataclasses import dataclass

from remax.errors import UserError
from remax.options import Options


@dataclass(frozen=True)
class ReportConfig(Options):
    """Report"""

    runs: list[str]
    """Folders of one or more `remax train` runs, which may still be going on; several are drawn over each other. They
    may stand without the flag: `remax report OUT OUT2`."""
    output_file: str | None = None
    """The page to write; by default report.html in the run's folder, for several runs report-of-several.html in the
    first one's."""

    def _check(self) -> None:
        if not self.runs:
            raise UserError("--runs is empty: there is nothing to report; set the --output_dir of a `remax train`.")

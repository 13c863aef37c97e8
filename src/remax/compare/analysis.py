"""The analysis of a comparison, from the folders of its runs to the report."""

from pathlib import Path
from typing import Any

from remax.compare.page import write_page
from remax.compare.plots import plot
from remax.compare.results import collect


def analyse(folder: Path) -> dict[str, Any]:
    """Returns the results of the runs that are finished; writes results.json, plots/ and report.html in the folder.

    Raises:
        UserError: the folder holds no comparison, or a file in it is damaged.
    """
    results = collect(folder)
    write_page(results, plot(folder, results), folder / "report.html")
    return results

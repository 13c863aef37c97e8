"""`remax report`: from folders to a file, whoever asks for it."""

from collections.abc import Sequence
from pathlib import Path

from remax.config import ReportConfig
from remax.errors import UserError
from remax.report.drawing import NUM_COLOURS
from remax.report.page import page
from remax.report.reading import read_runs
from remax.untrusted import shown

ALONE, TOGETHER = "report.html", "report-of-several.html"


def run_report(args: ReportConfig) -> Path:
    """Writes the report, says where and how large it is, and returns its path.

    Raises:
        UserError: a folder holds no run or a damaged one, or the page cannot be written.
    """
    if len(args.runs) > NUM_COLOURS:
        raise UserError(
            f"--runs names {len(args.runs)} runs: there are colours for {NUM_COLOURS}, and more lines cannot be told "
            "apart; report fewer at once, or let `remax compare` average over seeds."
        )
    path = write_report(args.runs, args.output_file)
    print(f"The report is {shown(path)} ({path.stat().st_size / 1e6:.1f} MB).")
    return path


def write_report(folders: Sequence[str], output_file: str | None = None) -> Path:
    """Writes the report of the runs in these folders, all of it or nothing, and returns its path.

    Raises:
        UserError: see `run_report`.
    """
    path = Path(output_file) if output_file else Path(folders[0]) / (ALONE if len(folders) == 1 else TOGETHER)
    if path.is_dir():
        raise UserError(f"--output_file is {path}: that is a folder; set the path of a file, such as {path / ALONE}.")
    text = page(read_runs(folders))
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True) if partial.parent.is_dir() else None
        raise UserError(
            f"--output_file is {path}: it cannot be written ({error.strerror}); set another path."
        ) from None
    return path


def report_after_training(folder: Path) -> str:
    """Writes the report of a training that has just ended and returns one line about it, whatever goes wrong."""
    try:
        path = write_report([str(folder)])
    except Exception as error:  # The training is done and saved: nothing here may undo that.
        return f"The report could not be made ({shown(error)}); `remax report {folder}` tries again."
    return f"The report is {path}."

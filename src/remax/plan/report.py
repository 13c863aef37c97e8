"""A plan as tables for the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from remax.plan.command import Plan
from remax.plan.network import received
from remax.plan.phases import largest, of_vllm
from remax.plan.proposals import Proposal
from remax.untrusted import printable

GIB = 2**30
WIDTH = 120


def gib(size: float) -> str:
    """Returns bytes as GiB, with three digits."""
    value = size / GIB
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Prints the peak of every phase, whether it fits, what would, the network's part, and both methods side by
    side."""
    console = console or Console(width=max(Console().width, WIDTH))
    for line in _heading(plan):
        console.print(Text(printable(line)))
    _print_table(console, "Peak memory by phase, GiB", _phases(plan))
    console.print()
    for line in _verdict(plan):
        console.print(Text(line))
    if plan.single:
        _print_table(console, "Each change alone, at its most, the cheapest first", _changes(plan.single))
    if plan.network:
        title = f"Network per step, GiB: each device receives {gib(received(plan.network))}, and sends as much"
        _print_table(console, title, _network(plan))
    if plan.ratios:
        title = "ReMax and PPO by size: this step with Llama-like models, all networks of one size, on GPUs, GiB"
        _print_table(console, title, _ratios(plan))


def _print_table(console: Console, title: str, table: Table) -> None:
    console.print()
    console.print(Text(title, style="bold"))
    console.print(table)


def _heading(plan: Plan) -> list[str]:
    args, work, inputs = plan.args, plan.work, plan.inputs
    sizes = ", ".join(f"{name} {_parameters(count)}" for name, count in plan.parameters.items())
    precision = f"{args.dtype} weights" + (", bf16 passes" if args.bf16 else "")
    lines = [
        f"{args.method} on {plan.memory.name}: {sizes} parameters; {precision}; {args.optim}.",
        f"A step on one device: {work.prompts} prompts of {work.prompt_length} tokens, completions of "
        f"{work.completion_length}.",
    ]
    if inputs.num_devices > 1:
        lines.append(
            f"All {inputs.num_devices} devices together take the {plan.args.batch_size} prompts of --batch_size; what "
            f"they split is that of `--accelerate_config {inputs.sharding}`."
        )
    if args.rollout_engine == "vllm":
        lines.append(_vllm(plan))
    return lines


def _vllm(plan: Plan) -> str:
    args, share = plan.args, of_vllm(plan.args, plan.memory.device)
    if args.vllm_mode == "server":
        return "vLLM: the memory of its server is not counted; GPUs that train cannot be the server's too."
    if not share:
        return "vLLM: what it takes of a CPU's memory is not known and not counted."
    when = "all the time" if args.vllm_enable_sleep_mode is False else "in rollouts, and nothing between them"
    return f"vLLM: {gib(share)} GiB of each device {when} (--vllm_gpu_memory_utilization)."


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _phases(plan: Plan) -> Table:
    table = _table()
    table.add_column("phase")
    columns = ("libraries", "weights", "optimiser", "gradients", "own", "total")
    for column in columns:
        table.add_column("its own" if column == "own" else column, justify="right")
    table.add_column("at")
    for phase, peak in plan.peaks.items():
        table.add_row(phase, *(gib(getattr(peak, column)) for column in columns), peak.moment)
    return table


def _verdict(plan: Plan) -> list[str]:
    peak, memory = largest(plan.peaks), plan.memory
    kept = f"of {gib(memory.total)} GiB, {gib(memory.total - memory.usable)} are kept free"
    lines = [
        f"It {'fits' if plan.fits else 'does not fit'}: {gib(peak.total)} GiB at the peak ({peak.phase}: "
        f"{peak.moment}); {kept}."
    ]
    for name, other in plan.methods.items():
        if name != plan.args.method:
            fits = "fits" if other.total <= memory.usable else "does not fit"
            lines.append(f"The same run with --method {name} {fits}: {gib(other.total)} GiB.")
    if plan.proposal is not None:
        lines.append(
            f"The cheapest change that fits: {plan.proposal.flags} ({gib(plan.proposal.peak.total)} GiB; price: "
            f"{plan.proposal.price})."
        )
    elif not plan.fits:
        lines.append("No combination of the changes below fits.")
    return lines


def _changes(proposals: list[Proposal]) -> Table:
    table = _table()
    table.add_column("change")
    table.add_column("GiB", justify="right")
    table.add_column("fits")
    table.add_column("price")
    for own in proposals:
        table.add_row(own.flags, gib(own.peak.total), "yes" if own.fits else "no", own.price)
    return table


def _network(plan: Plan) -> Table:
    table = _table()
    for column in ("phase", "what", "how"):
        table.add_column(column)
    for column in ("whole", "times", "received"):
        table.add_column(column, justify="right")
    for own in plan.network:
        size, moved = (gib(value) if value >= GIB / 100 else "<0.01" for value in (own.size, own.received))
        table.add_row(own.phase, own.what, own.collective, size, str(own.times), moved)
    return table


def _ratios(plan: Plan) -> Table:
    table = _table()
    for column in ("model", "ReMax peak", "static", "PPO peak", "static", "PPO / ReMax peak", "static"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for own in plan.ratios:
        sizes = [gib(size) for method in (own.remax, own.ppo) for size in (method.peak, method.static)]
        table.add_row(own.name, *sizes, f"{own.peak:.2f}", f"{own.static:.2f}")
    return table


def _table() -> Table:
    return Table(box=None, padding=(0, 2, 0, 0))

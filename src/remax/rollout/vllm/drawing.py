"""One thread that owns a server's vLLM: the rows of all clients join one batch, and weights wait until it is empty."""

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from remax.rollout.vllm.engine import Drawn, Request
from remax.rollout.vllm.local import LocalVLLM, drawn, requests


class OtherWeights(Exception):
    """A request wants weights that are not held; the message says which are."""


@dataclass
class _Job:
    """One client's request: its rows, as far as they are drawn."""

    request: Request
    result: "Future[list[Drawn]]"
    places: dict[str, int] = field(default_factory=dict)
    """Row by the name that vLLM knows it under."""
    drawn: dict[int, Drawn] = field(default_factory=dict)


class Drawing:
    """Draws in the thread that calls `run`; the other methods are for other threads."""

    def __init__(self, local: LocalVLLM) -> None:
        self._local, self._engine = local, local.llm.llm_engine
        # Simple: `stop` may be called by a signal's handler, in the middle of a `get`.
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: list[_Job] = []
        self._loads: list[tuple[str, str, Future[None]]] = []
        self._holds, self._num_jobs = local.holds(), 0
        self._began: float | None = None

    @property
    def holds(self) -> str:
        """The stamp of the weights that are held."""
        return self._holds

    @property
    def busy_seconds(self) -> float:
        """How long vLLM has been at what it does now: one step of all rows, or taking weights."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def draw(self, request: Request) -> list[Drawn]:
        """Returns one result per row; waits for it.

        Raises:
            OtherWeights: they were not drawn with the weights that the request wants.
            ValueError: vLLM cannot draw such rows.
        """
        result: Future[list[Drawn]] = Future()
        self._inbox.put(lambda: self._begin(_Job(request, result)))
        return result.result()

    def load(self, folder: str, stamp: str) -> None:
        """Takes the weights of a folder of safetensors files, once all rows are drawn."""
        result: Future[None] = Future()
        self._inbox.put(lambda: self._loads.append((folder, stamp, result)))
        result.result()

    def stop(self) -> None:
        """Ends `run`."""
        self._inbox.put(None)

    def run(self) -> None:
        """Works until `stop`. If vLLM breaks, everybody who waits is told, and the error leaves this method."""
        try:
            while self._receive():
                self._began = time.monotonic()
                if self._jobs:
                    self._step()
                elif self._loads:
                    self._take()
                self._began = None
        except BaseException as error:
            for job in self._jobs:
                job.result.set_exception(RuntimeError(f"vLLM broke: {error}"))
            for _, _, result in self._loads:
                result.set_exception(RuntimeError(f"vLLM broke: {error}"))
            raise

    def _receive(self) -> bool:
        """Takes what came in, waiting for it if nothing else is to be done; returns whether to go on."""
        idle = not (self._jobs or self._loads)
        while True:
            try:
                work = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if work is None:
                return False
            work()
            idle = False

    def _begin(self, job: _Job) -> None:
        if job.request.stamp != self._holds or self._loads:
            job.result.set_exception(OtherWeights(f"it holds {self._holds or 'those it was started with'}"))
            return
        self._num_jobs += 1
        try:
            for place, (prompt, params) in enumerate(zip(*requests(job.request), strict=True)):
                name = f"{self._num_jobs}-{place}"
                self._engine.add_request(name, prompt, params)
                job.places[name] = place
        except ValueError as error:  # a prompt that is too long, a token that does not exist
            self._engine.abort_request(list(job.places))
            job.result.set_exception(error)
            return
        self._jobs.append(job)

    def _step(self) -> None:
        for output in self._engine.step():
            for job in self._jobs:
                if output.finished and output.request_id in job.places:
                    job.drawn[job.places[output.request_id]] = drawn(output)
        for job in [job for job in self._jobs if len(job.drawn) == len(job.places)]:
            self._jobs.remove(job)
            job.result.set_result([job.drawn[place] for place in range(len(job.drawn))])
        if self._jobs and not self._engine.has_unfinished_requests():
            raise RuntimeError("it lost rows that it had to draw")

    def _take(self) -> None:
        folder, stamp, result = self._loads.pop(0)
        self._holds = ""
        try:
            self._local.load_files(folder, stamp)
        except Exception as error:
            result.set_exception(error)
        else:
            self._holds = stamp
            result.set_result(None)

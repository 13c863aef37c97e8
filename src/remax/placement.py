"""Where a frozen model's weights are: on the device all the time, or there only while they are used."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from remax.config.groups import Placement


class Placed:
    """A frozen model with the place where its weights rest between the phases that use it.

    resident: they stay on the device. offload: they rest in the CPU's memory and are copied to the device for a phase.
    Nothing is copied back, since nothing trains them: the copies are dropped, and the tensors at rest take their place.
    """

    def __init__(
        self, model: nn.Module, device: torch.device | str | None = None, placement: Placement = "resident"
    ) -> None:
        """Brings the model to where it rests. device: None leaves a resident model where it is."""
        assert device is not None or placement == "resident", "offloading from nowhere"
        self.model = model
        self.device = None if device is None else torch.device(device)
        self.placement = placement
        self._copied = False
        if placement == "offload":
            self._replace(lambda data: data.cpu())
        elif device is not None:
            model.to(device)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """While this is open, the model can be used on the device; what is in it by then is what is copied.

        It may be opened again inside, without effect. All work has to be queued on the stream that was current when it
        was opened: at the end, the copies' memory is free for what comes next on that stream.
        """
        if self.placement == "resident" or self._copied:
            yield
            return
        # Here and not in the constructor: weights may have been cast meanwhile, and pinned memory is never given back.
        self._replace(self._pinned)
        at_rest = [(tensor, tensor.data) for tensor in self._tensors()]
        self._copied = True
        try:
            self._replace(self._copy)
            yield
        finally:
            for tensor, data in at_rest:
                tensor.data = data
            # What forward itself made on the device (RoPE variants recompute their frequencies) rests as well.
            self._replace(lambda data: data.cpu())
            self._copied = False

    def _copy(self, data: Tensor) -> Tensor:
        """Returns the tensor on the device; the copy runs beside the CPU if the tensor is in pinned memory."""
        return data.to(self.device, non_blocking=True)

    def _pinned(self, data: Tensor) -> Tensor:
        """Returns the tensor in memory that CUDA copies from without waiting; elsewhere there is no such memory."""
        assert self.device is not None
        return data if self.device.type != "cuda" or data.is_pinned() else data.pin_memory()

    def _tensors(self) -> list[Tensor]:
        """Returns each parameter and each buffer once, however many names it has."""
        return list(chain(self.model.parameters(), self.model.buffers()))

    def _replace(self, moved: Callable[[Tensor], Tensor]) -> None:
        """Puts others in place of the data of all tensors; data that tensors share stay shared."""
        # A tensor that is made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            others: dict[object, Tensor] = {}
            for tensor in self._tensors():
                data = tensor.data
                place = (data.data_ptr(), data.dtype, data.shape, data.stride())
                if place not in others:
                    others[place] = moved(data)
                tensor.data = others[place]

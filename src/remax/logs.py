"""Messages of other libraries that tell a user nothing."""

import logging

NOISE = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "register_constant() on Enum subclasses",
}
"""Logger: what its messages say. transformers imports torchao, wherever it is installed, for quantised models; torchao
then names each of its CUDA kernels that this machine cannot load, and makes a call that torch will drop one day."""


def hush() -> None:
    """Drops these messages. To be called before transformers is imported; needs the standard library alone."""
    for name, text in NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(text))


class _Without(logging.Filter):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()

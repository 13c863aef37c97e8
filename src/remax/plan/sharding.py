"""What one of several devices holds of weights, gradients and optimiser states.

Mixed precision is that of the ZeRO paper (Rajbhandari et al., arXiv 1910.02054): 2 bytes of weight, 2 of gradient and
12 of states (the float32 weight and two averages) per parameter; stage 2 splits the last 14, stage 3 all 16. FSDP2
holds float32 weights and gradients instead, which are 16 bytes again, and splits what is frozen too.
"""

from dataclasses import dataclass, replace

from remax.config import ReMaxConfig
from remax.config.plan import Sharding
from remax.plan import formulas
from remax.plan.formulas import Block
from remax.plan.networks import Counts, Network

MASTER_BYTES = 4
"""The float32 weight that --bf16 trains where the working copy is in bfloat16."""


@dataclass(frozen=True)
class Split:
    """How many devices there are and what they split."""

    sharding: Sharding = "none"
    devices: int = 1

    def weights(self, name: str, own: Counts, args: ReMaxConfig) -> int:
        """Returns the bytes of a network's weights on one device, between the passes."""
        whole = formulas.weight_bytes(name, own, args)
        if self.splits(own):
            return whole // self.devices
        return 2 * own.parameters if self._has_working_copy(own, args) else whole

    def gradients(self, own: Counts, args: ReMaxConfig) -> list[Block]:
        """Returns the gradients of a network on one device; DDP reduces them in buckets of the same size."""
        blocks = formulas.gradients(own, args)
        if self.sharding == "ddp":
            return [Block(2, block.size) for block in blocks]
        half = 2 if self._has_working_copy(own, args) else 1
        return [Block(block.number, block.size // half // self._parts) for block in blocks]

    def states(self, own: Counts, args: ReMaxConfig) -> int:
        """Returns the bytes of the optimiser's states on one device."""
        masters = MASTER_BYTES * own.trained if self._has_working_copy(own, args) else 0
        return (formulas.state_bytes(own, args) + masters) // self._parts

    def gathered(self, network: Network, args: ReMaxConfig) -> list[Block]:
        """Returns the whole weights that are there while a pass goes through a network: a layer's and the next one's.

        The embedding or head, where that is larger.
        """
        if not self.splits(network.counts):
            return []
        own, size = network.counts, 2 if formulas.is_half(args) else 4
        layer = own.linear // max(1, network.widths.layers)
        return [Block(1, size * max(2 * layer, own.head, own.embedding))]

    def whole(self, network: Network, args: ReMaxConfig) -> list[Block]:
        """Returns the whole weights that every device has for the time of a rollout, where it holds a part otherwise.

        Linear layers in the type of the passes; the rest, and a head that is the embedding, in that of the parts.
        """
        if not self.splits(network.counts):
            return []
        own, size = network.counts, 2 if formulas.is_half(args) else 4
        has_own_head = own.parameters - own.linear >= own.embedding + own.head
        linear = own.linear + own.head * has_own_head
        return [Block(1, size * linear + formulas.weight_size(args) * (own.parameters - linear))]

    def held_size(self, args: ReMaxConfig) -> int:
        """Returns the bytes of a weight of which every device holds some: those of a copy in bfloat16 with ZeRO-3."""
        return 2 if self.sharding == "zero3" and formulas.casts_weights(args) else formulas.weight_size(args)

    def passes(self, args: ReMaxConfig) -> ReMaxConfig:
        """Returns the settings as activations see them: with a working copy in bfloat16 there is nothing to cast."""
        splits = self.sharding not in ("none", "ddp")
        return replace(args, dtype="bfloat16", bf16=False) if splits and formulas.casts_weights(args) else args

    def splits(self, own: Counts) -> bool:
        """Whether a device holds only a part of each weight of a network; DeepSpeed splits only what it trains."""
        return self.sharding == "fsdp2" or (self.sharding == "zero3" and own.trained > 0)

    @property
    def _parts(self) -> int:
        return self.devices if self.sharding in ("zero2", "zero3", "fsdp2") else 1

    def _has_working_copy(self, own: Counts, args: ReMaxConfig) -> bool:
        return self.sharding == "zero2" and formulas.casts_weights(args) and own.trained > 0

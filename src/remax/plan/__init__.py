"""`remax plan`: what a run will take, before anything is loaded.

networks.py   networks in numbers, from configs alone or from models
formulas.py   bytes of weights, states, caches and activations
sharding.py   what one of several devices holds
network.py    what they send each other
phases.py     the peak of every phase
device.py     the memory of a machine
proposals.py  the cheapest change that fits
ratios.py     ReMax against PPO by size
command.py    the command, and report.py its tables
after.py      what `remax train` says at its end
"""

from remax.plan.after import describe_peaks, predict_peaks
from remax.plan.device import base_bytes
from remax.plan.networks import networks_of

__all__ = ["base_bytes", "describe_peaks", "networks_of", "predict_peaks"]

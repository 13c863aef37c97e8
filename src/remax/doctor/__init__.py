"""`remax doctor`: a set-up is checked before hours are spent on it.

findings.py    what a check finds, and how a check is run so that its fault is a finding too
context.py     what checks look at, loaded when the first of them needs it
machine.py     versions, devices, disk space, memory
tokenizer.py   the policy's tokenizer: what ends a completion, the chat template
prompts.py     lengths, repetitions, leakage
reward.py      reward models: pairs, padding, where the scalar is read, length
rollout.py     a small rollout: EOS, rewards, signal, log-probabilities
command.py     the command and its table
quick.py       the part that `remax train` runs by itself
"""

from remax.doctor.quick import quick_warnings

__all__ = ["quick_warnings"]

"""The parts of benchmarks/gpu.py.

shapes.py    real shapes, what decoding and training them take, datasheets
device.py    the GPU, and its stand-in on a CPU
session.py   the clock, the measurements, the results on disk
verdicts.py  what is aimed at
training.py  random models, prompts, trainers
speed.py     decoding against bandwidth, updates against arithmetic
memory.py    what fits under a cap
compare.py   ReMax beside REINFORCE, PPO and TRL
"""

"""Time and memory of a training step on a CPU: beside other libraries, beside its floor, and how both grow.

python -m benchmarks.speed
"""

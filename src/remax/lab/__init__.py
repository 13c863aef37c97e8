"""The estimator laboratory, `remax lab`: how noisy each method's gradient is at one checkpoint, and at what cost.

gradients.py   rollouts that all methods share, and the gradients that they make of them
statistics.py  variance, signal and cosine from the gradients' inner products, with intervals
measurement.py one method after the other, without and with the reward offset
report.py      the figures as lab.json and as tables
plot.py        the figures as lab.png
experiment.py  from settings to results
"""

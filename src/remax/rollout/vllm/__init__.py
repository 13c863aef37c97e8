"""Rollouts by vLLM, in this process or on a server.

engine.py    the RolloutEngine: rows, seeds and versions of the weights; knows nothing of vLLM itself
local.py     vLLM in this process; the only file that imports it
worker.py    what runs inside vLLM's workers: takes weights
client.py    vLLM on a server, over HTTP
server.py    that server: `remax serve-vllm`
"""

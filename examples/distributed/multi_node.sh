#!/bin/bash
# One node's share of a training on several nodes: run it on each of them, with the flags of `remax train`.
#
#   NUM_NODES=2 NODE_RANK=0 HEAD_NODE=10.0.0.1 GPUS_PER_NODE=8 bash multi_node.sh --config run.yaml --output_dir /shared/run
#
# NUM_NODES      how many nodes take part
# NODE_RANK      which of them this is, from 0; node 0 is the head node
# HEAD_NODE      name or address under which the others reach node 0
# GPUS_PER_NODE  processes on this node, one per GPU
# CONFIG         ddp, fsdp2, zero2 or zero3: how the training is divided (fsdp2)
# PORT           on the head node, free and open to the other nodes (29500)
# PID_FILE       where the launcher's process id is written, if anywhere: SIGTERM to it ends the run after the step
#
# --config, data and --output_dir must be paths that all nodes see.
set -euo pipefail

: "${NUM_NODES:?}" "${NODE_RANK:?}" "${HEAD_NODE:?}" "${GPUS_PER_NODE:?}"

shipped='import sys; from importlib.resources import files; print(files("remax") / "accelerate_configs" / sys.argv[1])'
config=$(python -c "$shipped" "${CONFIG:-fsdp2}.yaml")

# A training that is told to stop finishes its step and saves; the launcher would kill it after 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}

if [[ -n ${PID_FILE:-} ]]; then
    echo $$ > "$PID_FILE"  # `exec` keeps it.
fi
exec accelerate launch \
    --config_file "$config" \
    --num_machines "$NUM_NODES" \
    --num_processes "$((NUM_NODES * GPUS_PER_NODE))" \
    --machine_rank "$NODE_RANK" \
    --main_process_ip "$HEAD_NODE" \
    --main_process_port "${PORT:-29500}" \
    --module remax train "$@"

#!/usr/bin/env bash
# Train under Slurm. Submit from the project's root; flags of sbatch stand before the script, those of train.py after:
#
#   sbatch --gpus-per-node=4 --cpus-per-task=32 --time=8:00:00 scripts/slurm.sh --experiment_name NAME [--flag ...]
#
# Two minutes before the time is over Slurm sends USR1 to this script. The run saves and stops, and the job is queued
# again under its id; the same command continues the run. A run that is done or has failed is not queued again, nor is
# one that was cancelled: it saves, and the same sbatch continues it. `scancel --batch --signal=USR1 JOB` does by hand
# what the end of the time does. In a job array %a stands for the number of the task: --experiment_name NAME-%a.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -uo pipefail

refuse() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

check_number() { # name, value
    [[ -n $2 && $2 != *[!0123456789]* ]] || refuse "$1 is no number: $(printf '%q' "$2")"
}

# A signal that is trapped ends `wait`, not the process that is waited for.
wait_for() {
    local code=0
    while true; do
        wait "$1"
        code=$?
        kill -0 "$1" 2>/dev/null || return "$code"
    done
}

# The training processes get the signal, not their launcher: it would leave one process behind, and kill several after
# 30 seconds, saved or not. While it still starts there is none; then this tries again.
# shellcheck disable=SC2329 # declare -f brings it to the nodes, as the next one
stop_training() {
    trap '' USR1 TERM
    until pkill -TERM -P "$launcher" -f scripts/train.py || ! kill -0 "$launcher" 2>/dev/null; do
        sleep 0.5
    done
}

# What srun does on each node. USR1 is ignored by the launcher: some clusters send it to all processes of a step.
# shellcheck disable=SC2329
train_on_node() {
    (trap '' USR1 && exec accelerate launch --machine_rank "$SLURM_NODEID" "$@") &
    launcher=$!
    trap stop_training USR1 TERM
    wait_for "$launcher"
}

[[ -n ${SLURM_JOB_ID+set} ]] || refuse "this is no Slurm job: sbatch scripts/slurm.sh --experiment_name NAME"
[[ -f scripts/train.py ]] || refuse "there is no scripts/train.py in $PWD: submit from the project's root"
check_number SLURM_JOB_ID "$SLURM_JOB_ID"
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID+set} ]]; then
    check_number SLURM_ARRAY_JOB_ID "$SLURM_ARRAY_JOB_ID"
    check_number SLURM_ARRAY_TASK_ID "${SLURM_ARRAY_TASK_ID-}"
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    set -- "${@//%a/$SLURM_ARRAY_TASK_ID}"
fi

run=$(python -c '
import sys
from configs.arguments import parse
config = parse(sys.argv[1:])
if config.experiment_name and config.resume == "auto":
    print(f"{config.output_dir}/{config.experiment_name}")
' "$@") || exit 2
[[ -n $run ]] || refuse "give --experiment_name NAME and no --resume: a job that is queued again finds its run by name"

nodes=${SLURM_JOB_NUM_NODES:-1}
check_number SLURM_JOB_NUM_NODES "$nodes"
if ((nodes == 1)); then
    launch=(--main_process_port 0) # any free one: jobs may share the node
else
    [[ -n ${SLURM_GPUS_ON_NODE:-} ]] || refuse "several nodes need GPUs: sbatch --nodes=$nodes --gpus-per-node=N ..."
    check_number SLURM_GPUS_ON_NODE "$SLURM_GPUS_ON_NODE"
    read -r first_node < <(scontrol show hostnames "${SLURM_JOB_NODELIST-}") || refuse "scontrol names no nodes"
    launch=(
        --multi_gpu --num_machines "$nodes" --num_processes "$((nodes * SLURM_GPUS_ON_NODE))"
        --main_process_ip "$first_node" --main_process_port "$((20000 + 10#$SLURM_JOB_ID % 10000))"
    )
fi

# No node is killed because another has ended: it may still be saving. A node that hangs is, after ten minutes.
step=(srun --export=ALL --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=600)
# srun does not take it over from sbatch
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
# this file lies on the first node only, so that srun brings the functions
on_node="$(declare -f wait_for stop_training train_on_node); train_on_node \"\$@\""

asked_to_requeue='' cancelled=''
"${step[@]}" bash -c "$on_node" train_on_node "${launch[@]}" scripts/train.py "$@" &
srun=$!
# srun passes USR1 on to its tasks; of TERM it would kill them at once
trap 'asked_to_requeue=1; kill -USR1 "$srun"' USR1
trap 'cancelled=1; kill -USR1 "$srun"' TERM
wait_for "$srun"
code=$?
trap '' USR1 TERM

# The launcher's exit code is 1 for whatever is not 0; status.json tells how the run ended.
state=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$run/status.json" 2>/dev/null)
[[ $state == preempted ]] || exit "$code"
if [[ -n $asked_to_requeue && -z $cancelled ]]; then
    if scontrol requeue "$job"; then
        printf 'queued again as job %s: %s is saved and will go on\n' "$job" "$run"
        exit 0
    fi
    printf 'error: scontrol does not queue job %s again\n' "$job" >&2
fi
printf 'stopped and saved; continue with\n  sbatch scripts/slurm.sh%s\n' "$(printf ' %q' "$@")"
exit 75

#!/usr/bin/env bash
# Runs a verb on GPU nodes under Slurm: one process a GPU, put back into the queue when preempted or out of time.
#
#   launch/slurm.sh --name=N --nodes=2 --gpus=8 --time=24:00:00 -- \
#       .venv/bin/python -m proreflow_jax.distill --config=configs/sd15.py
#
#   --name        of the job (proreflow); run again while a job of this name is queued or runs, this changes nothing
#   --nodes       how many (1)
#   --gpus        GPUs, and so processes, of each node (8)
#   --time        limit, in Slurm's form; two minutes before it the verb saves and the job queues again
#   --partition --account   as the cluster wants them
#   --restarts    how often the job goes back into the queue (100)
#   --dry-run     print the batch script and the command, run none
#
# Each flag also from the environment, --some-flag as LAUNCH_SOME_FLAG. Run it from the top of the checkout, on a folder that
# all nodes see; runs/ lies there. Process 0 writes N-JOBID-0.log; follow it with tail -F, end the job with scancel. Under Slurm
# jax gives process i of a node the i-th GPU, therefore one process a GPU. A stopped verb (75) goes back into the
# queue, a finished one (0) and a failed one do not.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

batch_script() {
  cat <<SCRIPT
#!/usr/bin/env bash
#SBATCH --job-name=$NAME
#SBATCH --output=$NAME-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=$GPUS
#SBATCH --gpus-per-node=$GPUS
#SBATCH --dependency=singleton
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
${TIME:+#SBATCH --time=$TIME
}${PARTITION:+#SBATCH --partition=$PARTITION
}${ACCOUNT:+#SBATCH --account=$ACCOUNT
}set -uo pipefail
first=\$(scontrol show hostnames "\$SLURM_JOB_NODELIST" | head -n 1)
export JAX_COORDINATOR_ADDRESS=\$first:\$((61440 + SLURM_JOB_ID % 4096)) JAX_NUM_PROCESSES=\$SLURM_NTASKS

# SIGTERM comes before the time limit and before a preemption; srun hands it to every process. Where one is stopped all stop,
# and save together: the first to end must not end the others.
srun --kill-on-bad-exit=0 --open-mode=append --output=$NAME-%j-%t.log \\
  bash -c 'export JAX_PROCESS_ID=\$SLURM_PROCID; exec launch/verb.sh "\$@"' verb $(quote "${WORDS[@]}") &
srun=\$!
trap 'asked=1; kill -TERM "\$srun"' TERM
while :; do
  code=0 asked=
  wait "\$srun" || code=\$?
  [[ -n \$asked ]] || break
done

if ((code == $STOPPED && \${SLURM_RESTART_COUNT:-0} < $RESTARTS)); then
  echo "stopped, not finished: back into the queue"
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
SCRIPT
}

parse "name nodes gpus time partition account restarts" "" "$@"
: "${NAME:=proreflow}" "${NODES:=1}" "${GPUS:=8}" "${RESTARTS:=100}"
((${#ARGUMENTS[@]} == 0)) || die "${ARGUMENTS[0]}: the command goes after --"
need_words && need_tool sbatch
whole_number --nodes "$NODES" && whole_number --gpus "$GPUS" && whole_number --restarts "$RESTARTS"
if [[ -n $DRY_RUN ]]; then
  batch_script
elif [[ -n $(squeue --me --noheader "--name=$NAME" --format=%i) ]]; then
  say "$NAME is queued or runs already" && exit 0
fi
run sbatch < <(batch_script)

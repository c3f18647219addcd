#!/usr/bin/env bash
# Runs a verb on plain hosts, one process each, over ssh: GPU machines without a scheduler.
#
#   launch/hosts.sh --hosts=a,b --folder=/nfs/proreflow_jax -- \
#       .venv/bin/python -m proreflow_jax.distill --config=configs/sd15.py
#
#   --hosts     as ssh knows them; the first one coordinates and must be reachable by this name from the others
#   --folder    this checkout on every host; if it is not a shared folder, give --config.root=FOLDER_ALL_SEE in the words
#   --port      where the first host listens (8476)
#   --logs      local folder for process-0.log, ... (pod-logs); process 0 is shown, too
#   --grace     seconds between SIGTERM and SIGKILL for the other connections when one has failed (10)
#   --dry-run   print the commands, run none
#
# Each flag also from the environment, --some-flag as LAUNCH_SOME_FLAG. A process uses all GPUs of its host. Ctrl-C, SIGTERM or
# a lost connection reach the verb as SIGTERM: it saves. Exit codes: launch/verb.sh. ssh must not ask (keys, known hosts).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse "hosts folder port logs grace" "" "$@"
: "${PORT:=8476}" "${LOGS:=pod-logs}" "${GRACE:=10}"
((${#ARGUMENTS[@]} == 0)) || die "${ARGUMENTS[0]}: the command goes after --"
need hosts folder
need_words
IFS=, read -ra host <<<"$HOSTS"

run mkdir -p "$LOGS"
for i in "${!host[@]}"; do
  in_job="JAX_COORDINATOR_ADDRESS=${host[0]#*@}:$PORT JAX_NUM_PROCESSES=${#host[@]} JAX_PROCESS_ID=$i"
  # -tt: the verb hears of it when the connection ends
  launch_process "$LOGS/process-$i.log" ssh -tt -oBatchMode=yes -oServerAliveInterval=15 "${host[i]}" \
    "cd $(quote "$FOLDER") && $in_job launch/verb.sh $(quote "${WORDS[@]}")"
done
[[ -n $DRY_RUN ]] || await_processes "$LOGS/process-0.log"

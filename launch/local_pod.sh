#!/usr/bin/env bash
# Runs a verb as N processes on this machine: the very command of a pod, for trying it out.
#
#   launch/local_pod.sh -n 2 [-d 4] -- python -m proreflow_jax.distill --config=configs/digits.py
#
#   -n, --processes   how many (2)
#   -d, --devices     devices of each process (1), as XLA makes them on a CPU
#   --logs            folder for process-0.log, process-1.log, ... (pod-logs); process 0 is shown, too
#   --grace           seconds between SIGTERM and SIGKILL for the others when one has failed (10)
#   --dry-run         print the commands, run none
#
# Each flag also from the environment, --some-flag as LAUNCH_SOME_FLAG. JAX_PLATFORMS is cpu, and NPROC (XLA's threads) the larger
# of cores and all devices, unless they are set. Ctrl-C and SIGTERM go to every process. The exit code is that of the first process
# that failed, and the others end with it.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

long=()
while (($#)); do # short flags
  case $1 in
    -n) long+=(--processes) ;;
    -d) long+=(--devices) ;;
    --) long+=("$@") && break ;;
    *) long+=("$1") ;;
  esac
  shift
done
parse "processes devices logs grace" "" ${long[@]+"${long[@]}"}
: "${PROCESSES:=2}" "${DEVICES:=1}" "${LOGS:=pod-logs}" "${GRACE:=10}"
((${#ARGUMENTS[@]} == 0)) || die "${ARGUMENTS[0]}: the command goes after --"
need_words
whole_number --processes "$PROCESSES" && whole_number --devices "$DEVICES"

run mkdir -p "$LOGS"
threads=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # XLA cuts sums by threads: as many as one process would have
((threads >= PROCESSES * DEVICES)) || threads=$((PROCESSES * DEVICES))
port=PORT
[[ -n $DRY_RUN ]] || port=$(free_port)
for ((i = 0; i < PROCESSES; i++)); do
  in_job=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$PROCESSES" "JAX_PROCESS_ID=$i")
  in_job+=("JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" "NPROC=${NPROC:-$threads}")
  in_job+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES")
  launch_process "$LOGS/process-$i.log" env "${in_job[@]}" "${WORDS[@]}"
done
[[ -n $DRY_RUN ]] || await_processes "$LOGS/process-0.log"

#!/usr/bin/env bash
# Runs a verb on a Cloud TPU slice: asked for by queued resource, watched, replaced when preempted, brought home, deleted.
#
#   launch/tpu_vm.sh all --project=P --zone=Z --name=N --slice=v5e:4x4 --spot --bucket=gs://B --confirm=N -- \
#       python -m proreflow_jax.distill --config=configs/sd15.py
#
# Commands; each may be run again and goes on where it was:
#   create    ask for the slice and wait until it is ACTIVE
#   setup     copy this checkout (tracked files and new ones, no ignored ones) to every worker, make a venv with jax[tpu]
#   run       start the words after -- on every worker, detached: they go on when you go offline
#   follow    show worker 0's log to the end; with the words after -- also replace a preempted slice and start them again
#   collect   bring home all of the runs but pairs and checkpoints, and worker 0's log
#   delete    delete the slice
#   all       create, setup, run, follow, collect and, with --confirm, delete
#
# Flags; each also from the environment, --some-flag as LAUNCH_SOME_FLAG, but --confirm:
#   --project --zone    Google Cloud's
#   --name              of the queued resource and its TPU
#   --slice             as for the verb plan: v5e:4x4, v6e:2x4, v5p:2x2x2, v4:2x2x2
#   --slices            how many of them work together (1)
#   --spot              cheaper, may be taken away at any time; without it on demand
#   --bucket            gs://B or gs://B/folder: runs lie below it, in runs/ (adds --config.root to the words)
#   --out               local folder for collect (collected)
#   --confirm=NAME      permits to delete: at the end, and what is left of a preempted slice so that a new one can be had
#   --restarts          how often a slice is replaced or a stopped verb started again (100)
#   --runtime           the TPU's software, if not the usual one for its kind
#   --hf-token-file     file with a Hugging Face token, copied to the workers; never shown
#   --poll --settle     seconds between looks (30); looks at the slice before a failure is believed (6)
#   --dry-run           print the commands, run none
#
# How it ends: exit 0 finished; 1 the verb failed or the slice cannot be had; 2 wrong input; 75 stopped in between, the same
# command goes on; 130 you stopped watching.

# shellcheck disable=SC2153 # parse sets NAME, SLICE, ...
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

tpus() { run gcloud compute tpus "$@" "--zone=$ZONE" "--project=$PROJECT"; }
first_worker() { tpus tpu-vm ssh "${NODES[0]}" --worker=0 --ssh-flag=-oServerAliveInterval=15 "--command=$1"; }
every_worker() { for node in "${NODES[@]}"; do tpus tpu-vm ssh "$node" --worker=all "--command=$1" || return; done; }
copy_to_workers() { for node in "${NODES[@]}"; do tpus tpu-vm scp "$1" "$node:$2" --worker=all || return; done; }

# What the slice is: ABSENT, WAITING, ACTIVE, LOST (taken away), FAILED, or UNKNOWN when Google does not answer.
state() {
  local said node
  said=$(answer queued-resources state.state "$NAME")
  case $said in
    ACTIVE) ;;
    SUSPENDING | SUSPENDED) echo LOST && return ;;
    ABSENT | FAILED | UNKNOWN) echo "$said" && return ;;
    *) echo WAITING && return ;; # CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, DELETING
  esac
  for node in "${NODES[@]}"; do
    said=$(answer tpu-vm state "$node")
    case $said in
      READY) ;;
      PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING | ABSENT) echo LOST && return ;;
      UNKNOWN) echo UNKNOWN && return ;;
      *) echo WAITING && return ;; # CREATING, STARTING, RESTARTING, REPAIRING, REIMAGING
    esac
  done
  echo ACTIVE
}

answer() { # KIND FIELD NAME
  if gcloud compute tpus "$1" describe "$3" "--zone=$ZONE" "--project=$PROJECT" "--format=value($2)" 2>"$SCRATCH/error"; then
    return
  elif grep -q NOT_FOUND "$SCRATCH/error"; then
    echo ABSENT
  else
    cat "$SCRATCH/error" >&2 && echo UNKNOWN
  fi
}

request() {
  local kind=$FAMILY-$CHIPS runtime count=("--node-id=$NAME")
  case $FAMILY in
    v5e) kind=v5litepod-$CHIPS runtime=v2-alpha-tpuv5-lite ;;
    v6e) runtime=v2-alpha-tpuv6e ;;
    v5p) kind=v5p-$((2 * CHIPS)) runtime=v2-alpha-tpuv5 ;; # v4 and v5p count cores, two a chip
    v4) kind=v4-$((2 * CHIPS)) runtime=tpu-ubuntu2204-base ;;
  esac
  ((SLICES == 1)) || count=("--node-count=$SLICES" "--node-prefix=$NAME")
  tpus queued-resources create "$NAME" "--accelerator-type=$kind" "--runtime-version=${RUNTIME:-$runtime}" \
    "${count[@]}" ${SPOT:+--spot}
}

create() {
  if [[ -n $DRY_RUN ]]; then
    request && tpus queued-resources describe "$NAME" '--format=value(state.state)' && return
  fi
  local now before='' asked='' unknown=0
  while now=$(state) && [[ $now != ACTIVE ]]; do
    [[ $now == "$before" ]] || say "$NAME: $now"
    before=$now
    case $now in
      ABSENT) request || fail "$NAME: cannot be asked for, see above" && asked=1 ;;
      FAILED) [[ -z $asked ]] || fail "$NAME: $(answer queued-resources state.failedData.error.message "$NAME")" && replace ;;
      LOST) replace ;;
      UNKNOWN) ((++unknown < 10)) || stop "$NAME: no answer from Google Cloud; run the same command again to go on" ;;
    esac
    wait_a_while
  done
  say "$NAME: ACTIVE; it costs money until it is deleted"
}

setup() {
  run pack_checkout "$SCRATCH/proreflow.tar.gz" &&
    copy_to_workers "$SCRATCH/proreflow.tar.gz" proreflow.tar.gz &&
    copy_to_workers "$HERE/tpu_worker.sh" tpu_worker.sh &&
    { [[ -z $HF_TOKEN_FILE ]] || copy_to_workers "$HF_TOKEN_FILE" proreflow.token; } &&
    every_worker 'bash tpu_worker.sh setup'
}

pack_checkout() {
  (cd "$HERE/.." && git ls-files -z --cached --others --exclude-standard --exclude='*.env' | sort -zu |
    tar -czf "$1" --null --files-from=-)
}

start() { every_worker "bash tpu_worker.sh start -- $(quote "${WORDS[@]}")"; }

# Until the words run: a machine may not answer yet, or be taken away in the middle.
bring_up() {
  local tries code
  for ((tries = 0; tries < 5; tries++)); do
    create
    code=0 && setup && start && return || code=$?
    ((code != 2)) || exit 2
    wait_a_while
  done
  fail "$NAME: cannot be set up, see above"
}

follow() {
  local code now look
  while :; do
    code=0 && first_worker 'bash tpu_worker.sh follow' || code=$?
    ((code != 0)) || { note "$NAME: finished" && return; }
    ((code != WRONG_INPUT)) || fail "$NAME: the verb does not like its input, see above"
    # Where a slice is taken away, the verb stops or fails first and the slice's state says so a little later.
    for ((look = 0; look < SETTLE; look++)); do
      now=$(state)
      if [[ $now != ACTIVE && $now != UNKNOWN ]] || ((code != STOPPED && code != FAILED)); then break; fi
      wait_a_while
    done
    if [[ $now == ABSENT ]]; then
      fail "$NAME: was deleted"
    elif [[ $now == LOST || $now == FAILED || $now == WAITING ]]; then
      say "$NAME: preempted or under repair"
    elif ((code == FAILED)); then
      fail "$NAME: the verb failed, see above"
    elif ((code == STOPPED)); then
      count_restart && say "$NAME: the verb was stopped, starting it again"
    else
      say "$NAME: connection lost, trying again" && wait_a_while && continue
    fi
    ((${#WORDS[@]})) || stop "$NAME: to go on, follow with the words after --"
    bring_up
  done
}

count_restart() { ((RESTARTED++ < RESTARTS)) || fail "$NAME: started again $RESTARTS times already (--restarts)"; }

# The queued resource of a slice that was taken away keeps its name; its machines are gone already.
replace() {
  [[ -n $CONFIRM ]] || stop "$NAME: taken away; to have a new one run this again with --confirm=$NAME"
  count_restart && delete
}

delete() {
  [[ $CONFIRM == "$NAME" ]] || die "nothing is deleted unless its name is typed: --confirm=$NAME"
  if [[ -z $DRY_RUN && $(state) == ABSENT ]]; then say "$NAME: there is none" && return; fi
  tpus queued-resources delete "$NAME" --force --quiet || fail "$NAME: not deleted, see above; IT COSTS MONEY"
  note "$NAME: deleted"
}

collect() {
  run mkdir -p "$OUT"
  tpus tpu-vm scp "${NODES[0]}:proreflow-run.log" "$OUT/$NAME.log" --worker=0 || say "$NAME: no log to bring home"
  if [[ $ROOT == gs://* ]]; then collect_bucket && return; fi
  first_worker "bash tpu_worker.sh pack $(quote "$ROOT")" &&
    tpus tpu-vm scp "${NODES[0]}:proreflow-collected.tar.gz" "$OUT/" --worker=0 &&
    run tar -xzf "$OUT/proreflow-collected.tar.gz" -C "$OUT" && run rm "$OUT/proreflow-collected.tar.gz" &&
    note "collected into $OUT"
}

# After a failure a slice is deleted only if its runs lie elsewhere.
all() {
  local code=0
  [[ -n $CONFIRM || -z $SPOT ]] || say "without --confirm=$NAME a preempted slice is not replaced, nor is it deleted at the end"
  (bring_up && follow) || code=$?
  ((code != STOPPED && code != 2)) || exit "$code"
  collect || { say "$NAME: not all was brought home" && code=1; }
  if [[ -n $CONFIRM && ($code == 0 || $ROOT == gs://*) ]]; then
    delete
  else
    note "$NAME goes on and costs money; to end that: delete --project=$PROJECT --zone=$ZONE --name=$NAME --confirm=$NAME"
  fi
  exit "$code"
}

parse "project zone name slice slices bucket out confirm restarts runtime hf-token-file poll settle" spot "$@"
: "${SLICES:=1}" "${OUT:=collected}" "${RESTARTS:=100}" "${POLL:=30}" "${SETTLE:=6}"
COMMAND=${ARGUMENTS[0]:-nothing} RESTARTED=0 WRONG_INPUT=64 FAILED=70 FAMILY='' CHIPS=0
case $COMMAND in
  create | setup | collect | delete | follow) ;;
  run | all) need_words ;;
  *) die "$COMMAND is no command of this script; --help lists them" ;;
esac
((${#ARGUMENTS[@]} == 1)) || die "${ARGUMENTS[1]}: one command at a time, and the verb's words after --"
need project zone name && need_tool gcloud
whole_number --slices "$SLICES" && whole_number --restarts "$RESTARTS" && whole_number --settle "$SETTLE"
[[ -z $CONFIRM || $CONFIRM == "$NAME" ]] || die "--confirm=$CONFIRM is not --name=$NAME: type the name of what may be deleted"
place_runs
if [[ $COMMAND == create || $COMMAND == all || ($COMMAND == follow && ${#WORDS[@]} -gt 0) ]]; then
  need slice && read_slice "$SLICE"
fi
if [[ $COMMAND == all || $COMMAND == run ]]; then
  [[ -z $SPOT || $ROOT == gs://* ]] || die "--spot without --bucket: a preemption would take the run away with the machine"
fi
NODES=("$NAME")
((SLICES == 1)) || mapfile -t NODES < <(seq -f "$NAME-%g" 0 $((SLICES - 1)))
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
trap 'say "stopped watching; what runs on $NAME goes on and costs money: follow it again, or delete it" && exit 130' INT TERM
if [[ $COMMAND == run ]]; then start; else "$COMMAND"; fi

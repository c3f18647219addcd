#!/usr/bin/env bash
# The part of tpu_vm.sh that runs on each worker of the slice, as ~/tpu_worker.sh; nobody calls it by hand.
#
#   tpu_worker.sh setup             unpack ~/proreflow.tar.gz, make ~/proreflow/.venv; nothing to do if it is there
#   tpu_worker.sh start -- WORDS    run the words, detached from the connection
#   tpu_worker.sh follow            show the log until the end; exit 0 finished, 75 stopped, 64 wrong input, 70 failed: codes
#                                   that gcloud and ssh do not give of themselves
#   tpu_worker.sh pack FOLDER       ~/proreflow-collected.tar.gz of FOLDER without pairs and checkpoints
set -euo pipefail
cd "$HOME"
RUN=$HOME/proreflow-run
LOG=$RUN.log LOCK=$RUN.lock OUTCOME=$RUN.outcome COMMAND=$RUN.command
PYTHON=3.12 # the machine's own, 3.10, is too old for jax
PORT=8482   # the port that jax itself would take

metadata() {
  curl -sf -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
tpu_env() { metadata tpu-env | sed -n "s/^$1: *'\{0,1\}\([^']*\)'\{0,1\}\$/\1/p"; }
running() { [[ -e $LOCK ]] && ! flock --nonblock "$LOCK" true; }

setup() {
  if [[ -f proreflow.token ]]; then
    mkdir -p .cache/huggingface && mv proreflow.token .cache/huggingface/token && chmod 600 .cache/huggingface/token
  fi
  echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null || true # jax asks for it from v5e on
  local sum
  sum=$(sha256sum <proreflow.tar.gz)
  if [[ -f proreflow/.setup && $(<proreflow/.setup) == "$sum" ]] || running; then return; fi
  mkdir -p proreflow && tar -xzf proreflow.tar.gz -C proreflow
  python3 -m pip install --quiet --user uv || python3 -m pip install --quiet --user --break-system-packages uv
  [[ -x proreflow/.venv/bin/python ]] || .local/bin/uv venv --quiet --python "$PYTHON" proreflow/.venv
  .local/bin/uv pip install --quiet --python proreflow/.venv/bin/python -e './proreflow[tpu]'
  echo "$sum" >proreflow/.setup
}

# jax finds its fellows in the same metadata; the verbs join a job only if these three variables name it.
join_job() {
  local endpoints workers number slices slice first
  endpoints=$(metadata worker-network-endpoints)
  number=$(metadata agent-worker-number)
  IFS=, read -ra workers <<<"$endpoints"
  slices=$(tpu_env MEGASCALE_NUM_SLICES) slice=$(tpu_env MEGASCALE_SLICE_ID) first=$(tpu_env MEGASCALE_COORDINATOR_ADDRESS)
  first=${first:-${workers[0]##*:}} # an entry is an address, or name:id:address
  export JAX_COORDINATOR_ADDRESS=${first%%:*}:$PORT
  export JAX_NUM_PROCESSES=$((${#workers[@]} * ${slices:-1}))
  export JAX_PROCESS_ID=$((number + ${#workers[@]} * ${slice:-0}))
}

start() {
  exec 9>"$LOCK"
  if ! flock --nonblock 9; then
    [[ $(<"$COMMAND") == "$*" ]] && echo "is running" && return
    echo "tpu_worker.sh: another command is running here: $(<"$COMMAND")" >&2 && exit 2
  fi
  join_job
  rm -f "$OUTCOME" && printf '%s' "$*" >"$COMMAND"
  if [[ -f $LOG ]]; then mv "$LOG" "$LOG.before"; fi
  touch "$LOG"
  cd proreflow && export PATH="$PWD/.venv/bin:$PATH" VERB_LOG=$LOG
  # The lock is open in the detached shell and its children: it is held as long as one of them lives.
  # shellcheck disable=SC2016 # the inner shell expands it
  setsid nohup bash -c 'code=0; launch/verb.sh "$@" || code=$?; echo "$code" >"$0"' "$OUTCOME" "$@" </dev/null >/dev/null 2>&1 &
  echo "$!" >"$LOCK.pid"
}

follow() {
  [[ -f $LOG ]] || exit 75
  if running; then tail -n 20 -s 0.5 -f --pid="$(<"$LOCK.pid")" "$LOG"; else tail -n 20 "$LOG"; fi
  local code=75 # no outcome: the machine was restarted under the verb
  [[ ! -f $OUTCOME ]] || code=$(<"$OUTCOME")
  case $code in
    0 | 75) exit "$code" ;;
    2) exit 64 ;;
    *) echo "the verb ended with exit code $code" && exit 70 ;;
  esac
}

pack() {
  cd proreflow && mkdir -p "$1"
  tar -czf "$HOME/proreflow-collected.tar.gz" --exclude=pairs --exclude=checkpoints -C "$1" .
}

case ${1:-} in
  setup) setup ;;
  start) shift 2 && start "$@" ;;
  follow) follow ;;
  pack) pack "$2" ;;
  --help | -h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" ;;
  *) echo "tpu_worker.sh: ${1:-nothing} is no command of this script; --help lists them" >&2 && exit 2 ;;
esac

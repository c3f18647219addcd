# shellcheck shell=bash disable=SC2034 # what seems unused here is used by the scripts
# What the launch scripts share; sourced, not run. Needs bash 4.4 and GNU coreutils.
#
# --help prints a script's first comment. Every flag --some-flag=value may also come from the environment as
# LAUNCH_SOME_FLAG, but --confirm: a name that permits deleting is typed. Exit codes are the verbs': 0 done, 1 failed,
# 2 wrong input, 130 interrupted; and 75: stopped in between, the same command goes on.
STOPPED=75
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
ME=${0##*/}

say() { printf '%s\n' "$ME: $*" >&2; }
note() { [[ -n $DRY_RUN ]] || say "$*"; }
die() { say "$*" && exit 2; }
fail() { say "$*" && exit 1; }
stop() { say "$*" && exit "$STOPPED"; }

help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# parse "VALUES" "SWITCHES" "$@": --flag=v, --flag v and --switch set FLAG and SWITCH; what follows -- becomes WORDS, the
# rest ARGUMENTS.
parse() {
  local values=" $1 dry-run " switches=" $2 dry-run " name variable given
  shift 2
  WORDS=() ARGUMENTS=()
  for name in $values $switches; do
    variable=${name//-/_} && given=LAUNCH_${variable^^}
    [[ $name == confirm ]] && given=NEVER_FROM_THE_ENVIRONMENT
    printf -v "${variable^^}" '%s' "${!given:-}"
  done
  while (($#)); do
    case $1 in
      --) shift && WORDS=("$@") && return ;;
      --help | -h) help && exit 0 ;;
      --*) ;;
      -*) die "$1 is no flag of this script; --help lists them" ;;
      *) ARGUMENTS+=("$1") && shift && continue ;;
    esac
    name=${1#--} && name=${name%%=*} && variable=${name//-/_}
    if [[ $switches == *" $name "* && $1 != *=* ]]; then
      given=1
    elif [[ $switches == *" $name "* || $values != *" $name "* ]]; then
      die "$1 is no flag of this script; --help lists them"
    elif [[ $1 == *=* ]]; then
      given=${1#*=}
    else
      (($# > 1)) || die "--$name needs a value"
      given=$2 && shift
    fi
    printf -v "${variable^^}" '%s' "$given" && shift
  done
}

# need FLAG...: these must be given.
need() {
  local name variable
  for name; do
    variable=${name//-/_} && variable=${variable^^}
    [[ -n ${!variable} ]] || die "--$name is missing (or LAUNCH_$variable in the environment)"
  done
}

need_words() { ((${#WORDS[@]})) || die "what shall run? Say it after --: -- python -m proreflow_jax.distill --config=..."; }

need_tool() { [[ -n $DRY_RUN ]] || command -v "$1" >/dev/null || die "$1 is not installed here; --dry-run works without it"; }

whole_number() { [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1=$2 must be a whole number >= 1"; }

# The words so that a shell reads them as they are.
quote() {
  local word quoted=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    quoted+=" $word"
  done
  printf '%s' "${quoted:1}"
}

# run COMMAND...: runs it, or with --dry-run prints it.
run() {
  if [[ -n $DRY_RUN ]]; then
    quote "$@" && echo
  else
    "$@"
  fi
}

wait_a_while() { [[ -n $DRY_RUN ]] || sleep "$POLL"; }

# Where runs lie: --bucket adds --config.root to WORDS; a --config.root among WORDS stays. Sets ROOT.
place_runs() {
  local word
  ROOT=
  for word in "${WORDS[@]}"; do [[ $word == --config.root=* ]] && ROOT=${word#*=}; done
  [[ -z $ROOT || -z $BUCKET ]] || die "--bucket=$BUCKET and --config.root=$ROOT both say where runs lie: leave one out"
  if [[ -n $BUCKET ]]; then
    BUCKET=gs://${BUCKET#gs://} && ROOT=${BUCKET%/}/runs
    ((${#WORDS[@]})) && WORDS+=("--config.root=$ROOT")
  fi
  ROOT=${ROOT:-runs}
}

# All of the runs on a bucket but pairs and checkpoints, into --out; what is there already is not fetched again.
collect_bucket() {
  run mkdir -p "$OUT" || return
  run gcloud storage rsync --recursive '--exclude=(.*/)?(pairs|checkpoints)/.*' "$ROOT" "$OUT" \
    ${PROJECT:+"--project=$PROJECT"} || return
  note "collected into $OUT"
}

# v5e:4x4, the name that the verb `plan` takes too -> FAMILY TOPOLOGY CHIPS
read_slice() {
  [[ $1 =~ ^((v5e|v6e):[0-9]+x[0-9]+|(v4|v5p):[0-9]+x[0-9]+x[0-9]+)$ ]] ||
    die "--slice=$1 must look like v5e:4x4, v6e:2x4, v5p:2x2x2 or v4:2x2x2"
  FAMILY=${1%:*} TOPOLOGY=${1#*:}
  CHIPS=$((${TOPOLOGY//x/*}))
}

# Shows a growing log until process $2 has ended. Signals to the whole group do not end it sooner.
show_log() { (trap '' INT TERM HUP && exec tail -n +1 -s 0.2 -f --pid="$2" "$1"); }

# launch_process LOG COMMAND...: in a process group of its own, so that signals go where we send them. Ctrl-C and SIGTERM go
# to all.
RUNNING=() SIGNAL=
launch_process() {
  if [[ -n $DRY_RUN ]]; then
    echo "$(quote "${@:2}") >$(quote "$1") 2>&1 &" && return
  fi
  trap 'SIGNAL=INT && signal_all INT "${RUNNING[@]}"' INT
  trap 'SIGNAL=TERM && signal_all TERM "${RUNNING[@]}"' TERM HUP
  set -m
  : >"$1" # it is shown at once, before the process may have opened it
  "${@:2}" >"$1" 2>&1 </dev/null &
  RUNNING+=($!)
  set +m
}

# await_processes LOG: shows the log of the first while they run. Exits with the code of the first that fails; the others then
# get SIGTERM (but for a signal that was passed on to all), and GRACE seconds later SIGKILL. Needs bash 5.1.
await_processes() {
  local code=0 status ended shown killer=''
  [[ -z $SIGNAL ]] || signal_all "$SIGNAL" "${RUNNING[@]}" # it came while some were not there yet
  show_log "$1" "${RUNNING[0]}" &
  shown=$!
  while ((${#RUNNING[@]})); do
    ended='' status=0
    wait -n -p ended "${RUNNING[@]}" || status=$?
    [[ -n ${ended:-} ]] || continue # a signal was passed on
    mapfile -t RUNNING < <(printf '%s\n' "${RUNNING[@]}" | grep -vx "$ended")
    if ((status && status != STOPPED && !code && ${#RUNNING[@]})); then # where one was stopped all stop, and save together
      if [[ -z $SIGNAL ]]; then # else all have been told to end, and a second signal would cut short what they do then
        say "process $ended failed with exit code $status; ending the others"
        signal_all TERM "${RUNNING[@]}"
      fi
      set -m
      (sleep "$GRACE" && signal_all KILL "${RUNNING[@]}") >/dev/null 2>&1 &
      killer=$!
      set +m
    fi
    ((code)) || code=$status
  done
  [[ -z $killer ]] || { signal_all KILL "$killer" && wait "$killer"; } 2>/dev/null || true # bash would tell of its end
  wait "$shown" || true
  exit "$code"
}

# What a process has started is its own affair until SIGKILL: a verb's decoding workers must not die under its save.
signal_all() {
  local process group=
  [[ $1 != KILL ]] || group=-
  for process in "${@:2}"; do kill -s "$1" -- "$group$process" 2>/dev/null || true; done
}

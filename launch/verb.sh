#!/usr/bin/env bash
# Runs a verb so that every way to stop it lets it save, and passes on its exit code.
#
#   launch/verb.sh python -m proreflow_jax.distill --config=...
#
# A verb that gets SIGTERM (that is how spot machines and Slurm take a machine away) saves and exits with 75, at once where
# nothing is unsaved; a verb that dies of it before it listens becomes 75 too. So:
# 0 finished, 75 stopped in between, anything else is the verb's own code: 1 failed, 2 wrong input, 130 interrupted.
# SIGTERM, Ctrl-C and a lost connection reach the verb as SIGTERM. VERB_LOG=FILE: write there, not to the terminal.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
[[ ${1:-} != --help && ${1:-} != -h ]] || { help && exit 0; }
(($#)) || die "what shall run? Give a command"
if [[ $1 == --dry-run ]]; then shift && quote "$@" && echo && exit 0; fi
[[ $1 != -* ]] || die "$1 is no flag of this script; --help lists them"

log=${VERB_LOG:-$(mktemp)} verb='' asked=''
trap 'asked=1; [[ -z $verb ]] || kill -TERM "$verb" 2>/dev/null || true' TERM INT HUP
(trap '' HUP && exec "$@") >"$log" 2>&1 &
verb=$!
[[ -z $asked ]] || kill -TERM "$verb" || true
if [[ -z ${VERB_LOG:-} ]]; then show_log "$log" "$verb" & fi

while :; do
  code=0 asked=
  wait "$verb" || code=$?
  [[ -n $asked ]] || break # otherwise a signal has interrupted the wait
done
[[ $code != 143 ]] || code=$STOPPED # 128 + SIGTERM
wait
[[ -n ${VERB_LOG:-} ]] || rm -f "$log"
exit "$code"

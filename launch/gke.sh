#!/usr/bin/env bash
# Runs a verb on TPU node pools of a GKE cluster, as a JobSet: started again when preempted, brought home, deleted.
#
#   launch/gke.sh all --name=N --slice=v5e:4x4 --spot --bucket=gs://B --image=REGION-docker.pkg.dev/P/R/proreflow \
#       --confirm=N -- python -m proreflow_jax.distill --config=configs/sd15.py
#
# Commands; each may be run again and goes on where it was:
#   image     docker build and push launch/Dockerfile as --image
#   run       kubectl apply launch/jobset.yaml with the words after -- in it
#   follow    show the first pod's log, through restarts, to the end
#   collect   bring home all of the runs but pairs and checkpoints
#   delete    delete the JobSet; node pools that do not scale down by themselves stay
#   all       run, follow, collect and, with --confirm, delete
#
# Flags; each also from the environment, --some-flag as LAUNCH_SOME_FLAG, but --confirm:
#   --name --namespace   of the JobSet (namespace: default)
#   --slice              as for the verb plan: v5e:4x4, v6e:2x4, v5p:2x2x2, v4:2x2x2; a node pool of this shape must exist
#   --slices             how many of them work together (1)
#   --chips-per-host     of the pool's machine type: 8 for ct5lp-hightpu-8t and ct6e-standard-8t (4, or all of a smaller slice)
#   --spot               only on spot nodes
#   --image              container image
#   --bucket             gs://B or gs://B/folder: runs lie below it, in runs/ (adds --config.root to the words)
#   --project            Google Cloud's, where the bucket is not in gcloud's usual project
#   --service-account    Kubernetes' account of the pods, allowed to write to the bucket (default)
#   --out                local folder for collect (collected)
#   --confirm=NAME       permits to delete
#   --restarts           how often the JobSet starts again (100)
#   --poll               seconds between looks (15)
#   --dry-run            print the manifest and the commands, run none
#
# kubectl must point to the cluster: gcloud container clusters get-credentials CLUSTER --location=L. The same by XPK:
#   xpk workload create --cluster=CLUSTER --workload=N --tpu-type=v5litepod-16 --num-slices=1 --max-restarts=100 \
#     --restart-on-exit-codes=75 --docker-image=IMAGE \
#     --command="launch/verb.sh python -m proreflow_jax.distill ... --config.root=gs://B/runs"
#
# A stopped verb exits with 75: the pod fails and the JobSet starts again. Exit codes here: 0 finished, 1 failed, 2 wrong input, 75 no answer from the cluster, 130 you stopped watching.

# shellcheck disable=SC2153 # parse sets NAME, SLICE, ...
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

kube() { run kubectl "--namespace=$NAMESPACE" "$@"; }

manifest() {
  local accelerator hosts chips word command='"launch/verb.sh"' text name
  case $FAMILY in
    v5e) accelerator=tpu-v5-lite-podslice ;;
    *) accelerator=tpu-$FAMILY-slice ;;
  esac
  [[ $FAMILY != v4 ]] || accelerator=tpu-v4-podslice
  chips=${CHIPS_PER_HOST:-$((CHIPS < 4 ? CHIPS : 4))}
  ((CHIPS % chips == 0)) || die "--chips-per-host=$chips does not divide the $CHIPS chips of --slice=$SLICE"
  hosts=$((CHIPS / chips))
  for word in "${WORDS[@]}"; do command+=", $(json "$word")"; done
  text=$(<"$HERE/jobset.yaml")
  if [[ -n $SPOT ]]; then text=${text// # @SPOT@/}; else text=$(sed '/# @SPOT@$/d' <<<"$text"); fi
  for name in NAME NAMESPACE RESTARTS SLICES SERVICE_ACCOUNT TOPOLOGY IMAGE; do text=${text//@$name@/"${!name}"}; done
  text=${text//@ACCELERATOR@/$accelerator} text=${text//@HOSTS@/$hosts} text=${text//@CHIPS@/$chips}
  printf '%s\n' "${text//@COMMAND@/"[$command]"}"
}

json() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"} text=${text//$'\n'/\\n}
  printf '"%s"' "${text//$'\t'/\\t}"
}

image() {
  run docker build --tag "$IMAGE" --file "$HERE/Dockerfile" "$HERE/.."
  run docker push "$IMAGE"
}

start() {
  local text
  text=$(manifest)
  if [[ -n $DRY_RUN ]]; then printf '%s\n' "$text"; fi
  kube apply --filename=- <<<"$text" || fail "$NAME: not applied, see above; if it was another command's, delete it first"
}

# Completed, Failed, Running (or waiting for its nodes), ABSENT, or UNKNOWN when the cluster does not answer.
state() {
  local said
  local path='jsonpath={.status.terminalState}'
  if said=$(kubectl "--namespace=$NAMESPACE" get jobset "$NAME" "--output=$path" 2>"$SCRATCH/error"); then
    echo "${said:-Running}"
  elif grep -q NotFound "$SCRATCH/error"; then
    echo ABSENT
  else
    cat "$SCRATCH/error" >&2 && echo UNKNOWN
  fi
}

first_pod_log() {
  local set=jobset.sigs.k8s.io
  kube logs --follow --tail=100 --pod-running-timeout=1m \
    --selector="$set/jobset-name=$NAME,$set/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

follow() {
  [[ -z $DRY_RUN ]] || { first_pod_log && return; }
  local now unknown=0
  while :; do
    now=$(state)
    case $now in
      Completed) say "$NAME: finished" && return ;;
      Failed) first_pod_log || true && fail "$NAME: failed: kubectl describe jobset $NAME says why" ;;
      ABSENT) fail "$NAME: there is none" ;;
      UNKNOWN) ((++unknown < 10)) || stop "$NAME: no answer from the cluster; run the same command again to go on" ;;
      *) first_pod_log || true ;; # no pod yet, or between two
    esac
    wait_a_while
  done
}

collect() {
  [[ $ROOT == gs://* ]] || die "the pods' disks are gone with them: runs can be collected from a --bucket only"
  collect_bucket
}

delete() {
  [[ $CONFIRM == "$NAME" ]] || die "nothing is deleted unless its name is typed: --confirm=$NAME"
  kube delete jobset "$NAME" --ignore-not-found && note "$NAME: deleted"
}

all() {
  local code=0
  start
  (follow) || code=$?
  ((code != STOPPED)) || exit "$code"
  collect || code=1
  if [[ -n $CONFIRM ]]; then delete; else note "the JobSet is still there; to end that: delete --name=$NAME --confirm=$NAME"; fi
  exit "$code"
}

parse "name namespace slice slices chips-per-host image bucket project service-account out confirm restarts poll" spot "$@"
: "${NAMESPACE:=default}" "${SLICES:=1}" "${SERVICE_ACCOUNT:=default}" "${OUT:=collected}" "${RESTARTS:=100}" "${POLL:=15}"
COMMAND=${ARGUMENTS[0]:-nothing}
place_runs
case $COMMAND in
  image) need image && need_tool docker ;;
  run | all) need name slice image && need_words && read_slice "$SLICE" ;;
  follow | collect | delete) need name ;;
  *) die "$COMMAND is no command of this script; --help lists them" ;;
esac
((${#ARGUMENTS[@]} == 1)) || die "${ARGUMENTS[1]}: one command at a time, and the verb's words after --"
[[ $COMMAND == image || $COMMAND == collect ]] || need_tool kubectl
[[ $COMMAND != collect && $COMMAND != all ]] || need_tool gcloud
[[ $ROOT == gs://* || ($COMMAND != run && $COMMAND != all) ]] || die "--bucket is missing: a pod's disk is gone when it ends"
[[ -z $CONFIRM || $CONFIRM == "$NAME" ]] || die "--confirm=$CONFIRM is not --name=$NAME: type the name of what may be deleted"
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
trap 'say "stopped watching; $NAME goes on: follow it again, or delete it" && exit 130' INT TERM
if [[ $COMMAND == run ]]; then start; else "$COMMAND"; fi

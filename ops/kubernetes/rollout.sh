#!/bin/sh
# Brings a customer to what its overlay says: first the settings, the database's schema and the topics; when those are
# done, the processes. If a step before fails, the processes of the release before go on untouched.
#
#   ops/kubernetes/rollout.sh ocean            # KUBECTL and TIMEOUT (600s) may be set
set -eu
: "${KUBECTL:=kubectl}" "${TIMEOUT:=600s}"
[ $# = 1 ] || { echo "usage: $0 CUSTOMER" >&2; exit 2; }
overlay=$(dirname "$0")/overlays/$1
[ -f "$overlay/kustomization.yaml" ] || { echo "$0: there is no overlay $overlay" >&2; exit 2; }
namespace=$(sed -n 's/^namespace: *//p' "$overlay/kustomization.yaml")
processes='api,ingest,dispatch,maintain'

# Those of the objects of a kind.
names() {
    sed -n "/^kind: $1\$/,/^---\$/ s/^  name: //p" "$manifests"
}

# All of it renders, or nothing is begun.
manifests=$(mktemp)
trap 'rm -f "$manifests"' EXIT
$KUBECTL kustomize "$overlay" >"$manifests"

# A Job cannot be changed: those of the release before make room.
$KUBECTL delete job migrate topics --namespace "$namespace" --ignore-not-found --wait
$KUBECTL apply -f "$manifests" -l "app.kubernetes.io/component notin ($processes)"
for job in $(names Job); do
    if ! $KUBECTL wait --namespace "$namespace" --for=condition=Complete --timeout="$TIMEOUT" "job/$job"; then
        echo "$0: job $job did not complete; nothing else was changed. Its log:" >&2
        $KUBECTL logs --namespace "$namespace" --tail=20 "job/$job" >&2 || true
        exit 1
    fi
done
$KUBECTL apply -f "$manifests" -l "app.kubernetes.io/component in ($processes)"
for deployment in $(names Deployment); do
    $KUBECTL rollout status --namespace "$namespace" --timeout="$TIMEOUT" "deployment/$deployment"
done

#!/usr/bin/env bash
# Brings one customer to an image, tests it by orchestrator smoke, and goes back to the image before if that fails.
#
#   .github/deploy.sh ocean ghcr.io/example/scheduled-event-orchestrator@sha256:… https://receiver.example/smoke
#
# ORCHESTRATOR_API_KEY is a key of the customer with the scopes read and submit. kubectl, kustomize and orchestrator are
# in PATH. The database stays migrated: programs of the version before work on it.
set -euo pipefail
[ $# = 3 ] || { echo "usage: $0 CUSTOMER IMAGE@DIGEST RECEIVER" >&2; exit 2; }
customer=$1 image=$2 receiver=$3
cd "$(dirname "${BASH_SOURCE[0]}")/.."
overlay=ops/kubernetes/overlays/$customer
[ -f "$overlay/kustomization.yaml" ] || { echo "$0: there is no overlay $overlay" >&2; exit 2; }
namespace=$(sed -n 's/^namespace: *//p' "$overlay/kustomization.yaml")

go_back() {
    echo "$0: $customer: $1; going back to the release before" >&2
    local deployment
    for deployment in $(kubectl get deployments --namespace "$namespace" --output name); do
        kubectl rollout undo --namespace "$namespace" "$deployment" || true
    done
    for deployment in $(kubectl get deployments --namespace "$namespace" --output name); do
        kubectl rollout status --namespace "$namespace" --timeout=600s "$deployment" || true
    done
    exit 1
}

(cd "$overlay" && kustomize edit set image "scheduled-event-orchestrator=$image")
# A failed migration has changed nothing, and the processes of the release before go on; then there is nothing to undo.
before=$(kubectl get deployments --namespace "$namespace" --output 'jsonpath={.items[*].metadata.generation}')
if ! ops/kubernetes/rollout.sh "$customer"; then
    after=$(kubectl get deployments --namespace "$namespace" --output 'jsonpath={.items[*].metadata.generation}')
    [ "$before" != "$after" ] || { echo "$0: $customer: nothing was rolled out" >&2; exit 1; }
    go_back "the rollout failed"
fi

# The ports by name: a customer's SERVER_PORT is its own affair.
kubectl port-forward --namespace "$namespace" deployment/api 18080:http 19080:management >/dev/null &
forward=$!
trap 'kill "$forward" 2>/dev/null || true' EXIT
for _ in {1..30}; do
    ! curl --silent --fail --max-time 2 --output /dev/null http://127.0.0.1:19080/ready || break
    sleep 1
done
orchestrator smoke http://127.0.0.1:18080 --management-url http://127.0.0.1:19080 --destination "$receiver" --timeout 60 \
    || go_back "the smoke test failed"

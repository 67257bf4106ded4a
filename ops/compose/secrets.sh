#!/bin/bash
# Makes what is secret in an installation by docker-compose.yml, each in the volume of those who may read it: the
# passwords of the database, the key that signs webhooks, and a certificate for the load balancer. What is there stays;
# the certificate is renewed in its last 30 days. `docker compose down --volumes` forgets all, and the databases.
set -euo pipefail
cd "${1:-/secrets}"

# Writes standard input under the name, all or nothing. Those who read it are other users.
keep() {
    # One that was left behind may not be written to, not even by root without capabilities.
    rm -f "$1.new"
    cat >"$1.new"
    chmod 0444 "$1.new"
    mv -f "$1.new" "$1"
}

for name in postgres orchestrator ocean air; do
    [ -s "$name/database_password" ] || openssl rand -hex 24 | keep "$name/database_password"
    [ "$name" = postgres ] || [ -s "$name/webhook_secrets" ] ||
        echo "whsec_$(openssl rand -base64 32)" | keep "$name/webhook_secrets"
done

if ! openssl x509 -in nginx/tls.crt -noout -checkend 2592000 >/dev/null 2>&1; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj /CN=localhost \
        -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout nginx/key.made -out nginx/crt.made 2>/dev/null
    keep nginx/tls.key <nginx/key.made
    keep nginx/tls.crt <nginx/crt.made
    rm nginx/key.made nginx/crt.made
fi

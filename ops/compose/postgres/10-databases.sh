#!/bin/bash
# Runs once, in a new volume. Each deployment gets a database, owned by a user who may do nothing else on the server.
set -euo pipefail

# The schema's roles belong to the whole server. When they exist, an ordinary user can migrate.
psql --no-psqlrc --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres <<'SQL'
create role orchestrator_submit;
create role orchestrator_dispatch;
create role orchestrator_ingest;
create role orchestrator_ops;
create role orchestrator_read;
SQL

create() {
    psql --no-psqlrc --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres --set user="$1" --set database="$2" <<SQL
\\set password \`cat /run/secrets/$1/database_password\`
create role :"user" login password :'password';
create database :"database" owner :"user";
revoke all on database :"database" from public;
SQL
}
create orchestrator orchestrator
create ocean ocean_events_db
create air air_events_db

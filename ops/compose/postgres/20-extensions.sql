-- Runs once, in a new volume, after 10-databases.sh. ops/pg_cron.sql and ops/pg_partman.sql put them to use.
\set ON_ERROR_STOP on

\connect orchestrator
create extension pg_cron;
grant usage on schema cron to orchestrator;
grant execute on function cron.schedule_in_database to orchestrator;
create schema partman authorization orchestrator;
create extension pg_partman schema partman;
grant all on all tables in schema partman to orchestrator;
grant execute on all functions in schema partman to orchestrator;
grant execute on all procedures in schema partman to orchestrator;

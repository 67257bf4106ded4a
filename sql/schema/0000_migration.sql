-- Where migrations are recorded. Applied before every migration, so it must stay safe to repeat.

create schema if not exists orchestrator;
comment on schema orchestrator is 'Scheduled event orchestrator: events that are delivered when they are due';
create table if not exists orchestrator.migration
( file text primary key
, checksum text not null
, applied_at timestamptz not null default clock_timestamp()
);
comment on table orchestrator.migration is 'Files of sql/ as last applied to this database';
comment on column orchestrator.migration.file is 'Path below sql/';
comment on column orchestrator.migration.checksum is 'SHA-256 of its text';
comment on column orchestrator.migration.applied_at is 'When it was last applied';

-- Backups that were made, as the scripts in ops/backup record them.

create table orchestrator.backup_run
( run bigint generated always as identity primary key
, kind text not null constraint backup_run_kind check (kind in ('logical', 'base', 'verify'))
, cluster bigint
, started_at timestamptz not null
, finished_at timestamptz not null
, bytes bigint constraint backup_run_bytes check (bytes >= 0)
, location text
, problem text
, constraint backup_run_times check (finished_at >= started_at)
);
create index backup_run_newest on orchestrator.backup_run (kind, finished_at);
comment on table orchestrator.backup_run is
  'Backups and verifications, failed ones too: the last 100 of each kind, and the last one that succeeded';
comment on column orchestrator.backup_run.run is 'Number of the row';
comment on column orchestrator.backup_run.kind is
  'logical: a dump; base: a physical backup, full or incremental; verify: a check of what is kept';
comment on column orchestrator.backup_run.cluster is
  'System identifier of the cluster that was backed up; null: its owner may not read it';
comment on column orchestrator.backup_run.started_at is 'When it began: a restored dump has the data of then';
comment on column orchestrator.backup_run.finished_at is 'When it had been verified, or had failed';
comment on column orchestrator.backup_run.bytes is 'Its size on disk; null: it failed, or its size is unknown';
comment on column orchestrator.backup_run.location is 'Where it is kept; null: it failed';
comment on column orchestrator.backup_run.problem is 'Why it failed; null: it succeeded';

-- The life of the data: the horizon, expiry, rescheduling, retention, statistics in detail, and floors. Alters big tables
-- without reading or rewriting them, so that a full database is migrated in milliseconds.

alter table orchestrator.event
  add column expires_at timestamptz,
  add column predecessor uuid;
alter table orchestrator.event add constraint event_expires_at_check check (expires_at > scheduled_at) not valid;
comment on column orchestrator.event.expires_at is 'No attempt begins from then on: it ends as expired; null: never';
comment on column orchestrator.event.predecessor is 'The event that was rescheduled to become this one; null: none';

create table orchestrator.horizon (like orchestrator.event including all
, ended_at timestamptz
, ended_as text check (ended_as in ('cancelled', 'rescheduled'))
, successor uuid
, check ((ended_at is null) = (ended_as is null))
);
comment on table orchestrator.horizon is 'Events due after the last day that has a partition, and events of such days that ended there. run_maintenance() moves them into event (and timer, or outcome) once their day has one, weeks before they are due';
comment on column orchestrator.horizon.ended_at is 'When it was cancelled or rescheduled; null: it is still to be delivered';
comment on column orchestrator.horizon.ended_as is 'cancelled or rescheduled; null: neither';
comment on column orchestrator.horizon.successor is 'The event it was rescheduled to';

alter table orchestrator.outcome add column successor uuid;
alter table orchestrator.outcome drop constraint outcome_result_check;
alter table orchestrator.outcome add constraint outcome_result_check
  check (result in ('delivered', 'retried', 'dead', 'cancelled', 'redriven', 'rescheduled', 'expired')) not valid;
comment on column orchestrator.outcome.result is 'delivered, dead, cancelled, rescheduled and expired end the event; retried and redriven: another attempt follows';
comment on column orchestrator.outcome.successor is 'rescheduled: the event that took its place';
comment on table orchestrator.outcome is 'What happened, append-only: one row for each attempt, and one for whatever else ended the event or revived it; partitioned like event';

-- Timers of before have neither source nor retrying: their events are counted without a source.
alter table orchestrator.timer
  add column source bigint,
  add column retrying boolean,
  add column expires_at timestamptz;
create index timer_expires on orchestrator.timer (expires_at) where expires_at is not null;
comment on column orchestrator.timer.source is 'Hash of event.source, for statistic; null: submitted before there was this column';
comment on column orchestrator.timer.retrying is 'Whether an attempt has failed, or the event was redriven; null: no';
comment on column orchestrator.timer.expires_at is 'event.expires_at';
comment on column orchestrator.timer.lane is 'lane.lane; below 0, -1 - lane: waits behind an earlier event of its ordering key';

update orchestrator.timer t
set lane = -1 - coalesce(own.lane, (t.destination & 63)::integer)
from (select t.event_id from orchestrator.timer t where t.lane = -1) w
left join lateral (select l.lane from orchestrator.timer t join orchestrator.lane l on l.hash = t.destination where t.event_id = w.event_id) own on true
where t.event_id = w.event_id;

alter table orchestrator.lane add column floor timestamptz not null default '-infinity';
comment on column orchestrator.lane.floor is 'Own lanes: no timer of it is due before; claims look from there on, see raise_floors(). That of shared lanes is in control.floors';

alter table orchestrator.control
  add column floors timestamptz[] not null default array_fill('-infinity'::timestamptz, array[64]) check (cardinality(floors) = 64 and array_position(floors, null) is null),
  add column own_floor timestamptz not null default '-infinity',
  add column floors_at timestamptz not null default '-infinity',
  add column marked_at timestamptz,
  add column marked_writers text[],
  add column horizon_at timestamptz not null default '-infinity',
  add column retention_days integer default 7 check (retention_days >= 1),
  add column partition_days_ahead integer not null default 30 check (partition_days_ahead between 1 and 400),
  add column max_schedule_ahead_days integer not null default 400 check (max_schedule_ahead_days between 1 and 36500),
  add column archive boolean not null default false,
  add column partitioned_by text not null default 'maintenance' check (partitioned_by in ('maintenance', 'pg_partman'));
-- Nothing was ever dropped so far.
update orchestrator.control set retention_days = null where exists (select from orchestrator.event);
comment on column orchestrator.control.floors is 'Of each shared lane, from 0 on: no timer of it is due before. One row, not a column of lane: while a snapshot is held elsewhere each version of a row that is updated every second is read by each claim';
comment on column orchestrator.control.own_floor is 'No timer of any own lane is due before';
comment on column orchestrator.control.floors_at is 'When the floors were last raised; claims ignore them when it is later than now: the clock was set back';
comment on column orchestrator.control.marked_at is 'Floors will be raised up to this time, once marked_writers have ended: whoever began to write after it writes nothing due before';
comment on column orchestrator.control.marked_writers is 'Virtual transactions that were writing timers at marked_at';
comment on column orchestrator.control.horizon_at is 'No event due before it is in horizon: submissions of such events need not look there';
comment on column orchestrator.control.retention_days is 'Days that a finished event is kept after the day it was scheduled for (CLEANUP_RETENTION_DAYS); null: nobody has said since the database was upgraded, and nothing is dropped';
comment on column orchestrator.control.partition_days_ahead is 'Days ahead that partitions are made for (PARTITION_DAYS_AHEAD); later events wait in horizon';
comment on column orchestrator.control.max_schedule_ahead_days is 'Furthest that events can be scheduled (MAX_SCHEDULE_AHEAD_DAYS)';
comment on column orchestrator.control.archive is 'Whether a partition must be archived before it is dropped (ARCHIVE_DIRECTORY)';
comment on column orchestrator.control.partitioned_by is 'Who makes partitions ahead: maintenance, or pg_partman by ops/pg_partman.sql';

-- Its first columns stay as they are: a call that was waiting while this was applied goes on by the old text of its function.
alter table orchestrator.statistic
  add column source bigint,
  add column destination bigint,
  add column source_label text,
  add column destination_label text;
alter table orchestrator.statistic set (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
comment on table orchestrator.statistic is 'Counts as appended deltas, so that no hot row is updated; run_maintenance() folds them into statistic_folded';
comment on column orchestrator.statistic.name is 'accepted, duplicate, rejected, delivered, retried, dead, cancelled, redriven, rescheduled, expired, purged; retrying: changes of the number of events that are';
comment on column orchestrator.statistic.source is 'Hash of event.source; null: unknown';
comment on column orchestrator.statistic.destination is 'Hash of destination_name(); null: unknown';
comment on column orchestrator.statistic.source_label is 'accepted, duplicate: event.source, from which statistic_label learns the hash';
comment on column orchestrator.statistic.destination_label is 'accepted, duplicate: destination_name()';

create table orchestrator.statistic_label
( hash bigint primary key
, label text not null
);
comment on table orchestrator.statistic_label is 'Sources and destinations by their hashes, for folding';
comment on column orchestrator.statistic_label.hash is 'hashtextextended(label, 0)';
comment on column orchestrator.statistic_label.label is 'event.source or destination_name()';

create table orchestrator.statistic_folded
( minute timestamptz not null
, name text not null
, source text not null
, destination text not null
, value bigint not null
, primary key (minute, name, source, destination)
);
comment on table orchestrator.statistic_folded is 'Counts by minute, source and destination for three hours, then by hour; past retention by day alone. What is not folded yet is in statistic; see statistics_by()';
comment on column orchestrator.statistic_folded.minute is 'Start of the minute, hour or day it happened in';
comment on column orchestrator.statistic_folded.name is 'statistic.name';
comment on column orchestrator.statistic_folded.source is 'event.source; empty: not known any more';
comment on column orchestrator.statistic_folded.destination is 'destination_name(); empty: not known any more; *: beyond the 1,000 most frequent pairs of source and destination of its time';
comment on column orchestrator.statistic_folded.value is 'How many';

create table orchestrator.retired_partition
( name text primary key
, detached_at timestamptz not null
, archived_at timestamptz
);
comment on table orchestrator.retired_partition is 'Partitions past retention, detached: tables of their own until they are archived, where that is wanted, and dropped an hour later';
comment on column orchestrator.retired_partition.name is 'Name of the table';
comment on column orchestrator.retired_partition.detached_at is 'When it was detached';
comment on column orchestrator.retired_partition.archived_at is 'When it was archived; null: not yet';

create table orchestrator.maintenance_run
( run bigint generated always as identity primary key
, started_at timestamptz not null
, took interval not null
, did jsonb not null
, problems jsonb not null
);
create index maintenance_run_started_at on orchestrator.maintenance_run (started_at);
comment on table orchestrator.maintenance_run is 'What each run_maintenance() did; kept for retention_days';
comment on column orchestrator.maintenance_run.run is 'Its number';
comment on column orchestrator.maintenance_run.started_at is 'When it began';
comment on column orchestrator.maintenance_run.took is 'How long it took';
comment on column orchestrator.maintenance_run.did is 'How many of what: partitions_created, horizon_moved, events_expired and so on';
comment on column orchestrator.maintenance_run.problems is 'Steps that failed and were rolled back, by themselves: an array of step and problem';

-- Their signatures change; functions/ makes them anew. A new database has none of them yet.
drop function if exists orchestrator.claim_due_events(integer, integer, interval, interval, integer[], integer);
drop function if exists orchestrator.schedule_event(text, jsonb, timestamptz, text, text, integer, jsonb, text, text, text, integer, interval);
drop function if exists orchestrator.check_submission(timestamptz, text, text, text, text, json, integer, text, text, smallint, interval, timestamptz, timestamptz);
drop function if exists orchestrator.list_dead_letters(integer, timestamptz, uuid);
drop function if exists orchestrator.run_maintenance(integer, integer);
drop function if exists orchestrator.bury_lost(tid[]);

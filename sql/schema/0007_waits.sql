-- Waits: what somebody wants noted while another session's open transaction has the row where it belongs.

create table orchestrator.control_note
( note bigint generated always as identity primary key
, noted_at timestamptz not null
, kind text not null check (kind in ('pause', 'resume', 'close_breaker', 'reroute', 'priorities'))
, name text
, priorities smallint[]
);
comment on table orchestrator.control_note is 'Changes of control, and of lanes, that hold already and are carried over as soon as nobody has the row locked. Append-only: nobody waits to write it, and nearly always it is empty';
comment on column orchestrator.control_note.note is 'Its number: the later one decides';
comment on column orchestrator.control_note.noted_at is 'When it was made';
comment on column orchestrator.control_note.kind is 'pause, resume, close_breaker: what an operator asked for; reroute: destinations changed lanes; priorities: some that events have';
comment on column orchestrator.control_note.name is 'destination_name() that is paused, resumed or closed; null: everything, or none';
comment on column orchestrator.control_note.priorities is 'priorities: which';

create table orchestrator.submission_aside
( aside bigint generated always as identity primary key
, topic text not null
, partition integer not null
, "offset" bigint not null
, since timestamptz not null
, id uuid not null
, scheduled_at timestamptz not null
, source text not null
, external_job_id text
, delivery_type text not null
, destination text
, payload json not null
, headers json
, max_retries integer not null
, retry_policy text
, ordering_key text
, priority smallint
, spread interval
, expires_at timestamptz
, key bytea
, value bytea
);
comment on table orchestrator.submission_aside is 'Records of the submission topic that could not be kept because another session had a transaction open with an event of the same id. Kept as soon as that ends, by ingesters and run_maintenance(); until then they are neither events nor rejects';
comment on column orchestrator.submission_aside.aside is 'Its number';
comment on column orchestrator.submission_aside.topic is 'Where it was read from';
comment on column orchestrator.submission_aside.partition is 'Partition of the topic';
comment on column orchestrator.submission_aside."offset" is 'Offset in the partition';
comment on column orchestrator.submission_aside.since is 'When it was set aside';
comment on column orchestrator.submission_aside.id is 'event.id';
comment on column orchestrator.submission_aside.scheduled_at is 'event.scheduled_at';
comment on column orchestrator.submission_aside.source is 'event.source';
comment on column orchestrator.submission_aside.external_job_id is 'event.external_job_id';
comment on column orchestrator.submission_aside.delivery_type is 'event.delivery_type';
comment on column orchestrator.submission_aside.destination is 'event.destination';
comment on column orchestrator.submission_aside.payload is 'event.payload';
comment on column orchestrator.submission_aside.headers is 'event.headers';
comment on column orchestrator.submission_aside.max_retries is 'event.max_retries';
comment on column orchestrator.submission_aside.retry_policy is 'event.retry_policy';
comment on column orchestrator.submission_aside.ordering_key is 'event.ordering_key';
comment on column orchestrator.submission_aside.priority is 'event.priority';
comment on column orchestrator.submission_aside.spread is 'event.spread';
comment on column orchestrator.submission_aside.expires_at is 'event.expires_at';
comment on column orchestrator.submission_aside.key is 'Key of the record, as it came';
comment on column orchestrator.submission_aside.value is 'Value of the record, as it came';

create type orchestrator.lock_holder as
( pid integer
, username text
, application_name text
, state text
, since timestamptz
, query text
, blocks integer
);
comment on type orchestrator.lock_holder is 'A session whose open transaction others wait for, or may: see lock_holders()';

-- Its signature changes; functions/ makes it anew. A new database has none of it yet.
drop function if exists orchestrator.sort_out(tid[], boolean, boolean, integer[]);

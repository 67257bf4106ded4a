-- Tables of the orchestrator. An event is immutable; its timer is the one narrow row that changes while it lives;
-- its outcomes are an append-only log. See sql/README.md for the map.

create table orchestrator.retry_policy
( name text primary key check (name ~ '^[a-z0-9_-]{1,63}$')
, initial_delay interval not null default '1 s' check (initial_delay between '0 s' and '1 year')
, multiplier double precision not null default 2.0 check (multiplier >= 1 and multiplier <= 100)
, max_delay interval not null default '1 hour' check (max_delay > '0 s' and max_delay <= '1 year')
, jitter double precision not null default 1.0 check (jitter between 0 and 1)
, schedule interval[] check (cardinality(schedule) > 0 and array_position(schedule, null) is null and '0 s' <= all (schedule) and '1 year' >= all (schedule))
);
comment on table orchestrator.retry_policy is 'How long a failed attempt waits for the next one';
comment on column orchestrator.retry_policy.name is 'What an event names in retry_policy; ''default'' serves events that name none';
comment on column orchestrator.retry_policy.initial_delay is 'Delay after the first failed attempt, before jitter';
comment on column orchestrator.retry_policy.multiplier is 'Factor from one delay to the next';
comment on column orchestrator.retry_policy.max_delay is 'Upper bound of a delay that is computed, and of what a Retry-After may ask for';
comment on column orchestrator.retry_policy.jitter is 'Share of the delay that is random: 0 none, 1 full jitter';
comment on column orchestrator.retry_policy.schedule is 'Explicit delays, one for each failed attempt, the last repeating; replaces initial_delay and multiplier';
insert into orchestrator.retry_policy (name) values ('default');

create table orchestrator.lane
( lane integer primary key
);
comment on table orchestrator.lane is 'Queues that share every claim fairly; a destination always falls into the same lane';
comment on column orchestrator.lane.lane is '0 to 63: shared lanes, chosen by a hash of the destination''s host';
insert into orchestrator.lane select generate_series(0, 63);

create table orchestrator.worker
( worker integer generated always as identity primary key
, name text not null
, started_at timestamptz not null default clock_timestamp()
);
comment on table orchestrator.worker is 'Processes that have claimed events; a restarted process is a new worker';
comment on column orchestrator.worker.worker is 'Number that timer and outcome refer to; 0 is whoever claims by hand';
comment on column orchestrator.worker.name is 'Host, process id and deployment, for a human';
comment on column orchestrator.worker.started_at is 'When it registered';
insert into orchestrator.worker (worker, name) overriding system value values (0, 'by hand');

create table orchestrator.event
( id uuid not null
, scheduled_at timestamptz not null
, created_at timestamptz not null
, max_retries smallint not null check (max_retries between 0 and 100)
, source text not null check (length(source) between 1 and 200)
, external_job_id text check (length(external_job_id) between 1 and 200)
, delivery_type text not null check (delivery_type = 'HTTP')
, destination text not null check (length(destination) <= 2048 and destination ~ '^https?://[^/]')
, retry_policy text check (retry_policy ~ '^[a-z0-9_-]{1,63}$')
, headers json check (json_typeof(headers) = 'object')
, payload json not null
, primary key (id, scheduled_at)
) partition by range (scheduled_at);
-- A hash: a third of the size and the WAL of the text, which may have 200 characters.
create index event_external_job_id on orchestrator.event (hashtextextended(external_job_id, 0)) where external_job_id is not null;
comment on table orchestrator.event is 'What was asked for. Never updated; partitioned by UTC day of scheduled_at; retention drops whole days';
comment on column orchestrator.event.id is 'UUID laid out as version 7 (RFC 9562): milliseconds of scheduled_at, then a hash of (source, external_job_id, scheduled_at), see event_id(); random without an external_job_id. It is the idempotency key';
comment on column orchestrator.event.scheduled_at is 'When it is due, to the microsecond';
comment on column orchestrator.event.created_at is 'When it was accepted';
comment on column orchestrator.event.max_retries is 'Attempts after the first, 0 to 100';
comment on column orchestrator.event.source is 'The system that submitted it, 1 to 200 characters';
comment on column orchestrator.event.external_job_id is 'The client''s own name for it, 1 to 200 characters; null: none';
comment on column orchestrator.event.delivery_type is 'HTTP';
comment on column orchestrator.event.destination is 'URL that receives the payload by POST';
comment on column orchestrator.event.retry_policy is 'Row of retry_policy; null: ''default''';
comment on column orchestrator.event.headers is 'Extra request headers, an object of strings; null: none';
comment on column orchestrator.event.payload is 'Delivered byte for byte; json, not jsonb, keeps the client''s bytes and costs half';

create table orchestrator.timer
( event_id uuid primary key
, scheduled_at timestamptz not null
, due_at timestamptz not null
, lane integer not null
, max_attempts smallint not null
, attempt smallint not null
, worker integer
, lease_until timestamptz
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
create index timer_lane_due on orchestrator.timer (lane, due_at);
comment on table orchestrator.timer is 'The next thing to do to a live event, one narrow row; gone when the event is finished. A lease changes no indexed column and half of each page is kept free, so a claim is a heap-only update: 150 bytes of WAL and two index entries less an event than moving due_at';
comment on column orchestrator.timer.event_id is 'event.id';
comment on column orchestrator.timer.scheduled_at is 'event.scheduled_at: finds the partition';
comment on column orchestrator.timer.due_at is 'When the next attempt is, or was, due; never before the event was accepted';
comment on column orchestrator.timer.lane is 'lane.lane';
comment on column orchestrator.timer.max_attempts is 'Leases after which a failure is final: max_retries + 1, and one more for each that was handed back unused';
comment on column orchestrator.timer.attempt is 'Leases given so far. It only grows, and names the lease: finishing with any other number does nothing';
comment on column orchestrator.timer.worker is 'Who was given the lease; null: nobody';
comment on column orchestrator.timer.lease_until is 'Until when nobody else may claim it; null: not leased. A lease that has run out needs no repair: the event is simply due';

create table orchestrator.outcome
( event_id uuid not null
, scheduled_at timestamptz not null
, due_at timestamptz
, started_at timestamptz
, finished_at timestamptz not null
, worker integer
, attempt smallint not null
, status_code smallint
, result text not null check (result in ('delivered', 'retried', 'dead', 'cancelled'))
, error text
, response text
) partition by range (scheduled_at);
create index outcome_event_id on orchestrator.outcome (event_id);
comment on table orchestrator.outcome is 'What happened, append-only: one row for each attempt, and one for a cancel; partitioned like event';
comment on column orchestrator.outcome.event_id is 'event.id';
comment on column orchestrator.outcome.scheduled_at is 'event.scheduled_at: finds the partition';
comment on column orchestrator.outcome.due_at is 'When this attempt was due; lateness is started_at - due_at';
comment on column orchestrator.outcome.started_at is 'When the attempt began, by the database''s clock; null: none was made';
comment on column orchestrator.outcome.finished_at is 'When its result was known, by the database''s clock';
comment on column orchestrator.outcome.worker is 'worker.worker';
comment on column orchestrator.outcome.attempt is 'timer.attempt of the lease';
comment on column orchestrator.outcome.status_code is 'HTTP status; null: no response';
comment on column orchestrator.outcome.result is 'delivered, dead and cancelled end the event; retried: another attempt follows';
comment on column orchestrator.outcome.error is 'Why it failed';
comment on column orchestrator.outcome.response is 'Start of the response to a failed attempt, at most 1024 characters';

create table orchestrator.dead_letter
( event_id uuid primary key
, scheduled_at timestamptz not null
, died_at timestamptz not null
, attempts smallint not null
, reason text not null
);
create index dead_letter_died_at on orchestrator.dead_letter (died_at, event_id);
comment on table orchestrator.dead_letter is 'Events that ran out of attempts, or failed for good';
comment on column orchestrator.dead_letter.event_id is 'event.id';
comment on column orchestrator.dead_letter.scheduled_at is 'event.scheduled_at: finds the partition';
comment on column orchestrator.dead_letter.died_at is 'When it was buried';
comment on column orchestrator.dead_letter.attempts is 'Number of the last attempt';
comment on column orchestrator.dead_letter.reason is 'What the last attempt failed with';

create table orchestrator.statistic
( minute timestamptz not null
, name text not null
, value bigint not null
);
comment on table orchestrator.statistic is 'Counts as appended deltas, so that no hot row is updated; run_maintenance() folds them to a row a minute and name';
comment on column orchestrator.statistic.minute is 'The minute it happened in';
comment on column orchestrator.statistic.name is 'accepted, duplicate, delivered, retried, dead, cancelled';
comment on column orchestrator.statistic.value is 'How many, to be summed';

create table orchestrator.api_key
( name text primary key check (name ~ '^[A-Za-z0-9._-]{1,63}$')
, key_hash bytea not null unique check (length(key_hash) = 32)
, scopes text[] not null check (scopes <@ array['read', 'submit', 'admin'] and cardinality(scopes) > 0)
, created_at timestamptz not null default clock_timestamp()
);
comment on table orchestrator.api_key is 'Keys of the HTTP API';
comment on column orchestrator.api_key.name is 'Who uses it';
comment on column orchestrator.api_key.key_hash is 'SHA-256 of the key (256 random bits, so an unsalted hash cannot be searched)';
comment on column orchestrator.api_key.scopes is 'read, submit, admin (everything)';
comment on column orchestrator.api_key.created_at is 'When it was made';

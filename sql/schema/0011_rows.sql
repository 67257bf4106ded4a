-- Rows that functions hand on to one another: the steps of a claim, of a finish, and of a submission.

create type orchestrator.queue as
( lane integer
, priority smallint
, floor timestamptz
, until timestamptz
, cap integer
);
comment on type orchestrator.queue is 'A lane from which a claim takes timers, at the priority that comes next there';
comment on column orchestrator.queue.lane is 'lane.lane';
comment on column orchestrator.queue.priority is 'timer.priority of the timers to take';
comment on column orchestrator.queue.floor is 'No timer of the lane is due earlier';
comment on column orchestrator.queue.until is 'Timers due later are left';
comment on column orchestrator.queue.cap is 'How many timers the lane may still give; null: any number';

create type orchestrator.lane_limit as
( lane integer
, allowed integer
, kind text
, bounded boolean
);
comment on type orchestrator.lane_limit is 'What a claim may take from a lane that it has locked';
comment on column orchestrator.lane_limit.lane is 'lane.lane';
comment on column orchestrator.lane_limit.allowed is 'How many leases the claim may give; null: any number';
comment on column orchestrator.lane_limit.kind is 'The limit that decides: rate or parallel; null: none does';
comment on column orchestrator.lane_limit.bounded is 'Whether each lease takes one of max_parallel slots';

create type orchestrator.leased as
( event_id uuid
, scheduled_at timestamptz
, due_at timestamptz
, attempt smallint
, lane integer
, start_at timestamptz
, lease_until timestamptz
, options json
, waited json
);
comment on type orchestrator.leased is 'A lease that a claim has given; see claim_due_events()';
comment on column orchestrator.leased.event_id is 'event.id';
comment on column orchestrator.leased.scheduled_at is 'event.scheduled_at: finds the partition';
comment on column orchestrator.leased.due_at is 'When the attempt was due';
comment on column orchestrator.leased.attempt is 'timer.attempt: names the lease';
comment on column orchestrator.leased.lane is 'The lane that the timer was in';
comment on column orchestrator.leased.start_at is 'When the attempt may start: due_at, or later under a rate';
comment on column orchestrator.leased.lease_until is 'When the lease runs out';
comment on column orchestrator.leased.options is
  'What a dispatcher must know to deliver it, see book_slots(); null: nothing special';
comment on column orchestrator.leased.waited is
  'Why it begins late, see wait_causes(); null: it does not, or nothing held it back';

create type orchestrator.finished_event as
( event_id uuid
, scheduled_at timestamptz
, result text
, due_at timestamptz
, claimed_at double precision
);
comment on type orchestrator.finished_event is
  'An event whose attempt has been recorded: delivered, retried (then due_at is when next) or dead';
comment on column orchestrator.finished_event.event_id is 'event.id';
comment on column orchestrator.finished_event.scheduled_at is 'event.scheduled_at: finds the partition';
comment on column orchestrator.finished_event.result is 'outcome.result: delivered, retried or dead';
comment on column orchestrator.finished_event.due_at is 'retried: when the next attempt is due; null: there is none';
comment on column orchestrator.finished_event.claimed_at is
  'When the attempt was claimed, in seconds since 1970; null: unknown';

create type orchestrator.lane_result as
( lane integer
, event_id uuid
, succeeded boolean
, status_code integer
, started_at double precision
, finished_at double precision
);
comment on type orchestrator.lane_result is 'The result of one attempt, as the circuit breaker of a lane counts it';
comment on column orchestrator.lane_result.lane is 'lane.lane';
comment on column orchestrator.lane_result.event_id is
  'event.id: finds the name of a destination that has no dedicated lane';
comment on column orchestrator.lane_result.succeeded is
  'Whether the circuit breaker counts it as a success: delivered and fail, as the destination works; not retry';
comment on column orchestrator.lane_result.status_code is 'HTTP status; null: no response';
comment on column orchestrator.lane_result.started_at is
  'When the attempt began, in seconds since 1970; null: no attempt was made';
comment on column orchestrator.lane_result.finished_at is 'When its result was known, in seconds since 1970';

create type orchestrator.submitted as (n integer, id uuid, result text, field text, reason text);
comment on type orchestrator.submitted is
  'A staged submission that became no new event: duplicate, or refused with field and reason';
comment on column orchestrator.submitted.n is 'Number of the submission: n of pg_temp.submission';
comment on column orchestrator.submitted.id is 'event.id: for a refused submission the id that it was submitted with';
comment on column orchestrator.submitted.result is 'duplicate or refused';
comment on column orchestrator.submitted.field is 'refused: the field that breaks a rule; null: none';
comment on column orchestrator.submitted.reason is 'refused: the rule that it breaks; null: none';

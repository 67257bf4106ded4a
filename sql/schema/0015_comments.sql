-- What the columns of types hold that functions hand on to one another, or answer.

comment on column orchestrator.finished_event.event_id is 'event.id';
comment on column orchestrator.finished_event.scheduled_at is 'event.scheduled_at: finds the partition';
comment on column orchestrator.finished_event.result is 'outcome.result: delivered, retried or dead';
comment on column orchestrator.finished_event.due_at is 'retried: when the next attempt is due; null: there is none';
comment on column orchestrator.finished_event.claimed_at is
  'When the attempt was claimed, in seconds since 1970; null: unknown';

comment on column orchestrator.lane_result.lane is 'lane.lane';
comment on column orchestrator.lane_result.event_id is
  'event.id: finds the name of a destination that has no dedicated lane';
comment on column orchestrator.lane_result.succeeded is
  'Whether the circuit breaker counts it as a success: delivered and fail, as the destination works; not retry';
comment on column orchestrator.lane_result.status_code is 'HTTP status; null: no response';
comment on column orchestrator.lane_result.started_at is
  'When the attempt began, in seconds since 1970; null: no attempt was made';
comment on column orchestrator.lane_result.finished_at is 'When its result was known, in seconds since 1970';

comment on column orchestrator.lock_holder.pid is 'Process id of the session; null: a prepared transaction';
comment on column orchestrator.lock_holder.username is 'The role that has logged in, or has prepared the transaction';
comment on column orchestrator.lock_holder.application_name is
  'application_name of the session; null: a prepared transaction';
comment on column orchestrator.lock_holder.state is
  'State of the session, as in pg_stat_activity, or prepared; null: the reader may not see it';
comment on column orchestrator.lock_holder.since is
  'When its transaction began, or was prepared; null: it is in none, or the reader may not see it';
comment on column orchestrator.lock_holder.query is
  'Its last query, without its literals and cut to 200 characters, or the name of a prepared transaction';
comment on column orchestrator.lock_holder.blocks is 'How many sessions wait for it';

comment on column orchestrator.submitted.n is 'Number of the submission: n of pg_temp.submission';
comment on column orchestrator.submitted.id is 'event.id: for a refused submission the id that it was submitted with';
comment on column orchestrator.submitted.result is 'duplicate or refused';
comment on column orchestrator.submitted.field is 'refused: the field that breaks a rule; null: none';
comment on column orchestrator.submitted.reason is 'refused: the rule that it breaks; null: none';

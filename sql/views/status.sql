-- Views for people: every event, its state, what happened to it, and the dead letters. Applied after
-- functions, and dropped first, so that columns may change.

drop view if exists orchestrator.event_status;
drop view if exists orchestrator.stored_event;
create view orchestrator.stored_event as
select e.id, e.scheduled_at, e.created_at, e.max_retries, e.source, e.external_job_id, e.delivery_type, e.destination
  , e.retry_policy, e.headers, e.payload
  , e.ordering_key, e.priority, e.spread, e.expires_at, e.predecessor, e.correlation_id, e.traceparent
  , false as beyond, null::timestamptz as ended_at, null::text as ended_as, null::uuid as successor
from orchestrator.event e
union all
select h.id, h.scheduled_at, h.created_at, h.max_retries, h.source, h.external_job_id, h.delivery_type, h.destination
  , h.retry_policy, h.headers, h.payload
  , h.ordering_key, h.priority, h.spread, h.expires_at, h.predecessor, h.correlation_id, h.traceparent
  , true, h.ended_at, h.ended_as, h.successor
from orchestrator.horizon h;
comment on view orchestrator.stored_event is 'Every event, wherever it is kept: event and horizon';
comment on column orchestrator.stored_event.beyond is 'Whether it is in horizon';

-- Joined with event, so that the planner may begin with the id of one event, or with whole days.
drop view if exists orchestrator.outcomes;
create view orchestrator.outcomes as
select o.event_id, o.scheduled_at, o.due_at, o.claimed_at, o.started_at, o.finished_at, o.worker
  , o.attempt, o.status_code, o.result, o.error, o.response, o.waited, o.successor
from orchestrator.outcome o
union all
select o.event_id, e.scheduled_at, o.due_at, o.claimed_at, o.started_at, o.finished_at, o.worker
  , o.attempt, o.status_code, o.result, o.error, o.response, o.waited, o.successor
from orchestrator.event e
join (
  orchestrator.delivered_batch b cross join lateral orchestrator.batch_outcomes(b) o)
  on o.event_id = e.id and orchestrator.batch_holds(e.id, b.scheduled_at, b.first_id, b.last_id, b.ids)
union all
select h.id, h.scheduled_at, null, null, null, h.ended_at, null
  , 0, null, h.ended_as, null, null, null, h.successor
from orchestrator.horizon h
where h.ended_at is not null;
comment on view orchestrator.outcomes is
  'What happened to events, wherever it is kept: outcome, delivered_batch and horizon';

create view orchestrator.event_status as
select e.id, e.source, e.external_job_id, e.scheduled_at, e.delivery_type, e.destination, e.ordering_key, e.payload
  , e.headers, e.max_retries, e.retry_policy
  , coalesce(e.priority, 0) as priority, e.spread, e.expires_at, e.correlation_id, e.traceparent, e.predecessor
  , e.created_at
  , case
      when t.lease_until > orchestrator.now() then 'in_flight'
      -- Timers older than version 4 do not say it themselves.
      when t.retrying
        or t.event_id is not null and t.source is null and o.result in ('retried', 'redriven') then 'retrying'
      when t.event_id is not null then 'scheduled'
      when d.event_id is not null then d.result
      when o.result in ('delivered', 'dead', 'cancelled', 'rescheduled', 'expired') then o.result
      when e.beyond then coalesce(e.ended_as, 'scheduled')
      else 'lost'
    end as status
  , coalesce(t.attempt, o.attempt, d.attempt, 0) as attempt
  , case
      when e.beyond and e.ended_at is null
        then e.scheduled_at + coalesce(orchestrator.spread_shift(e.id, e.spread), '0 s')
      else t.due_at end as due_at
  , case when t.lease_until > orchestrator.now() then t.lease_until end as lease_until
  , case when t.lease_until > orchestrator.now() then t.worker end as worker
  , coalesce(o.finished_at, d.finished_at, e.ended_at) as last_finished_at
  , coalesce(o.status_code, d.status_code) as last_status_code, o.error as last_error
  , coalesce(o.successor, e.successor) as successor
from orchestrator.stored_event e
left join orchestrator.timer t on t.event_id = e.id
left join lateral (
  -- By attempt: the times in it are a worker's, and its clock may differ. What ended it otherwise has the
  -- number of the last attempt.
  select *
  from orchestrator.outcome o
  where o.event_id = e.id and o.scheduled_at = e.scheduled_at
  order by o.attempt desc
    , array_position(array['cancelled', 'rescheduled', 'expired', 'delivered', 'dead', 'redriven', 'retried'], o.result)
  limit 1) o on true
left join (
  orchestrator.delivered_batch b cross join lateral orchestrator.batch_outcomes(b) d)
  on d.event_id = e.id and orchestrator.batch_holds(e.id, b.scheduled_at, b.first_id, b.last_id, b.ids);
comment on view orchestrator.event_status is
  'Every event with its state: scheduled, in_flight, retrying, delivered, dead, cancelled, rescheduled or expired '
  '(lost would be a fault of this system)';
comment on column orchestrator.event_status.status is
  'Derived from timer and the last outcome. retrying: an attempt has failed, or it was redriven, and another follows';
comment on column orchestrator.event_status.due_at is
  'When the next attempt is, or the one in flight was, due; null when finished';
comment on column orchestrator.event_status.lease_until is 'When the attempt in flight is given up';
comment on column orchestrator.event_status.last_finished_at is
  'When the last attempt ended, or the event was ended otherwise';
comment on column orchestrator.event_status.last_status_code is 'HTTP status of the last attempt that has ended';
comment on column orchestrator.event_status.last_error is 'Why the last attempt that has ended failed';
comment on column orchestrator.event_status.successor is 'rescheduled: the event that took its place';

drop view if exists orchestrator.dead_letters;
create view orchestrator.dead_letters as
select d.event_id as id, d.died_at, d.attempts, d.reason
  , e.source, e.external_job_id, e.scheduled_at, e.delivery_type, e.destination
  , orchestrator.destination_name(e.delivery_type, e.destination) as destination_name
from orchestrator.dead_letter d
left join orchestrator.event e on e.id = d.event_id and e.scheduled_at = d.scheduled_at;
comment on view orchestrator.dead_letters is 'Dead letters with what they were to deliver, and where';
comment on column orchestrator.dead_letters.destination_name is
  'destination_name() of it: what limits and statistics go by';

-- Views for people: the state of every event, and the dead letters. Applied after functions, and dropped first, so that columns may change.

drop view if exists orchestrator.event_status;
create view orchestrator.event_status as
select e.id, e.source, e.external_job_id, e.scheduled_at, e.delivery_type, e.destination, e.ordering_key, e.payload, e.headers, e.max_retries, e.retry_policy
  , coalesce(e.priority, 0) as priority, e.spread, e.created_at
  , case
      when t.lease_until > orchestrator.now() then 'in_flight'
      when t.attempt = 0 then 'scheduled'
      when t.event_id is not null then 'retrying'
      when o.result in ('delivered', 'dead', 'cancelled') then o.result
      else 'lost'
    end as status
  , coalesce(t.attempt, o.attempt, 0) as attempt
  , t.due_at
  , case when t.lease_until > orchestrator.now() then t.lease_until end as lease_until
  , case when t.lease_until > orchestrator.now() then t.worker end as worker
  , o.finished_at as last_finished_at, o.status_code as last_status_code, o.error as last_error
from orchestrator.event e
left join orchestrator.timer t on t.event_id = e.id
left join lateral (
  -- By attempt: the times in it are a worker's, and its clock may differ. A cancel has the number of the last attempt.
  select * from orchestrator.outcome o
  where o.event_id = e.id and o.scheduled_at = e.scheduled_at
  order by o.attempt desc, array_position(array['cancelled', 'delivered', 'dead', 'redriven', 'retried'], o.result)
  limit 1) o on true;
comment on view orchestrator.event_status is
  'Every event with its state: scheduled, in_flight, retrying, delivered, dead or cancelled (lost would be a fault of this system)';
comment on column orchestrator.event_status.status is 'Derived from timer and the last outcome';
comment on column orchestrator.event_status.due_at is 'When the next attempt is, or the one in flight was, due; null when finished';
comment on column orchestrator.event_status.lease_until is 'When the attempt in flight is given up';
comment on column orchestrator.event_status.last_finished_at is 'When the last attempt ended, or the event was cancelled';
comment on column orchestrator.event_status.last_status_code is 'HTTP status of the last attempt that has ended';
comment on column orchestrator.event_status.last_error is 'Why the last attempt that has ended failed';

drop view if exists orchestrator.dead_letters;
create view orchestrator.dead_letters as
select d.event_id as id, d.died_at, d.attempts, d.reason, e.source, e.external_job_id, e.scheduled_at, e.delivery_type, e.destination
from orchestrator.dead_letter d
left join orchestrator.event e on e.id = d.event_id and e.scheduled_at = d.scheduled_at;
comment on view orchestrator.dead_letters is 'Dead letters with what they were to deliver, and where';

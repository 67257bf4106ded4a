-- When an idle dispatcher claims next, besides next_due_at(). Called once a poll by each that has nothing
-- to do.

-- It looks at the first timer of each queue alone: what a killed dispatcher has left is older than what
-- others have claimed since.
create or replace function orchestrator.next_lease_end() returns timestamptz
language sql volatile security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
  select min(t.lease_until)
  from orchestrator.queue_floors() q
  cross join lateral (
    select f.lease_until from orchestrator.timer f
    where f.lane = q.lane and f.priority = q.priority and f.due_at >= q.floor
    order by f.due_at limit 1) t
  where (select c.paused_at is null from orchestrator.control_now() c)
$$;
comment on function orchestrator.next_lease_end() is
  'When the first lease ends of those events that are the first of their lane and priority; null: none of them is '
  'leased';

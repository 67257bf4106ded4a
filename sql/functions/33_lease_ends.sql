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
  from orchestrator.control_now() c
  cross join unnest(c.priorities) as p (priority)
  cross join orchestrator.lane l
  cross join lateral (
    select f.lease_until from orchestrator.timer f
    where f.lane = l.lane and f.priority = p.priority
      and f.due_at >= coalesce((orchestrator.floors(c, orchestrator.now()))[l.lane + 1], '-infinity')
    order by f.due_at limit 1) t
  where c.paused_at is null
$$;
comment on function orchestrator.next_lease_end() is
  'When the first lease ends of those events that are the first of their lane and priority; null: none of them is '
  'leased';

-- Events that end without another attempt: those that have expired, and those that lost every worker that
-- took them.

-- The caller has the timers locked, and may have lanes, so this must not wait: events whose ordering key
-- another session has locked are left to the next claim.
create or replace function orchestrator.end_without_attempt(p_at tid[]) returns bigint
language plpgsql security definer
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_ids uuid[];
  v_scheduled timestamptz[];
  v_orderings bigint[];
begin
  with ended as (
    delete from orchestrator.timer t
    where t.ctid = any (p_at)
      and (t.ordering is null or pg_try_advisory_xact_lock(
        hashtext('orchestrator.ordering'), orchestrator.ordering_lock_number(t.ordering)))
    returning t.event_id, t.scheduled_at, t.due_at, coalesce(t.attempt, 0) as attempt, t.worker, t.lane, t.ordering
      , t.source, t.destination, t.retrying, case when t.expires_at <= v_now then 'expired' else 'dead' end as result
  ), outcomes as (
    insert into orchestrator.outcome
      (event_id, scheduled_at, due_at, finished_at, worker, attempt, result, error)
    select e.event_id, e.scheduled_at, e.due_at, v_now, case e.result when 'dead' then e.worker end, e.attempt, e.result
      , case e.result when 'dead' then orchestrator.lost_lease() end
    from ended e
  ), dead_letters as (
    insert into orchestrator.dead_letter (event_id, scheduled_at, died_at, attempts, reason, blocks)
    select e.event_id, e.scheduled_at, v_now, e.attempt, orchestrator.lost_lease()
      , orchestrator.blocked_by_death(e.event_id, e.scheduled_at, e.lane, e.ordering)
    from ended e where e.result = 'dead'
  ), counts as (
    -- By result, source and destination; and those that were retrying are so no more.
    insert into orchestrator.statistic (minute, name, source, destination, value)
    select date_trunc('minute', v_now), c.name, e.source, e.destination, c.value
    from (
      select e.result, e.source, case when e.source is not null then e.destination end as destination
        , count(*) as ended, count(*) filter (where e.retrying) as retrying
      from ended e group by 1, 2, 3) e
    cross join lateral (values (e.result, e.ended), ('retrying', -e.retrying)) as c (name, value)
    where c.value <> 0
  )
  select array_agg(e.event_id), array_agg(e.scheduled_at), array_agg(e.ordering) filter (where e.ordering is not null)
  into v_ids, v_scheduled, v_orderings from ended e;
  perform orchestrator.announce_finished(v_ids, v_scheduled);
  if v_orderings is not null then
    perform orchestrator.advance_ordering(v_orderings);
  end if;
  return coalesce(cardinality(v_ids), 0);
end $$;
comment on function orchestrator.end_without_attempt(tid[]) is
  'Ends events that have expired, and those that lost every worker that took them. Returns how many';

create or replace function orchestrator.expire_events(p_limit integer default 10000) returns bigint
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
declare
  v_now constant timestamptz := orchestrator.now();
begin
  return orchestrator.end_without_attempt(array(
    select t.ctid from orchestrator.timer t
    where t.expires_at <= v_now and orchestrator.is_free(t.lease_until, v_now)
    order by t.expires_at
    limit p_limit
    for update skip locked));
end $$;
comment on function orchestrator.expire_events(integer) is
  'Ends expired events that no claim meets: behind a pause, a limit, a retry or another event of their ordering key. '
  'Returns how many';

create or replace function orchestrator.lost_lease() returns text
language sql immutable parallel safe
return 'its leases ran out time after time: every worker vanished, whether one of them delivered is unknown';
comment on function orchestrator.lost_lease() is 'The reason of a dead letter whose workers never answered';

-- A worker that is killed loses leases on many events that it had not begun to deliver: none of them may die
-- of that.
create or replace function orchestrator.max_lost_leases() returns integer
language sql immutable parallel safe
return 5;
comment on function orchestrator.max_lost_leases() is
  'How many leases may run out unanswered beyond max_attempts. Then the event is dead: it may be killing its workers';

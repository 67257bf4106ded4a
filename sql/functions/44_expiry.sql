-- Events that end without another attempt: expired ones, and those whose workers vanished time after time.

-- The caller has the timers locked, and may have lanes: it must not wait. Those whose ordering key another has are left for the next claim.
create or replace function orchestrator.end_without_attempt(p_at tid[]) returns bigint
language plpgsql security definer set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_ids uuid[];
  v_scheduled timestamptz[];
  v_orderings bigint[];
begin
  with buried as (
    delete from orchestrator.timer t
    where t.ctid = any (p_at)
      and (t.ordering is null or pg_try_advisory_xact_lock(hashtext('orchestrator.ordering'), orchestrator.ordering_bucket(t.ordering)))
    returning t.event_id, t.scheduled_at, t.due_at, t.attempt, t.worker, t.lane, t.ordering, t.source, t.destination, t.retrying
      , case when t.expires_at <= v_now then 'expired' else 'dead' end as result
  ), logged as (
    insert into orchestrator.outcome (event_id, scheduled_at, due_at, finished_at, worker, attempt, result, error)
    select b.event_id, b.scheduled_at, b.due_at, v_now, case b.result when 'dead' then b.worker end, b.attempt, b.result, case b.result when 'dead' then orchestrator.lost_lease() end from buried b
  ), mourned as (
    insert into orchestrator.dead_letter (event_id, scheduled_at, died_at, attempts, reason, blocks)
    select b.event_id, b.scheduled_at, v_now, b.attempt, orchestrator.lost_lease(), orchestrator.blocked_by_death(b.event_id, b.scheduled_at, b.lane, b.ordering)
    from buried b where b.result = 'dead'
  ), counted as (
    insert into orchestrator.statistic (minute, name, source, destination, value)
    select date_trunc('minute', v_now), c.name, b.source, b.destination, c.value
    from (select b.result, b.source, case when b.source is not null then b.destination end as destination, count(*) as ended, count(*) filter (where b.retrying) as retrying
          from buried b group by 1, 2, 3) b
    cross join lateral (values (b.result, b.ended), ('retrying', -b.retrying)) as c (name, value)
    where c.value <> 0
  )
  select array_agg(b.event_id), array_agg(b.scheduled_at), array_agg(b.ordering) filter (where b.ordering is not null)
  into v_ids, v_scheduled, v_orderings from buried b;
  perform orchestrator.announce_finished(v_ids, v_scheduled);
  if v_orderings is not null then
    perform orchestrator.advance_ordering(v_orderings);
  end if;
  return coalesce(cardinality(v_ids), 0);
end $$;
comment on function orchestrator.end_without_attempt(tid[]) is 'Ends events that have expired, and those whose workers vanished time after time. Returns how many';

create or replace function orchestrator.expire_events(p_limit integer default 10000) returns bigint
language plpgsql security definer set search_path = orchestrator, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off as $$
declare
  v_now constant timestamptz := orchestrator.now();
begin
  return orchestrator.end_without_attempt(array(
    select t.ctid from orchestrator.timer t
    where t.expires_at <= v_now and (t.lease_until is null or t.lease_until <= v_now)
    order by t.expires_at
    limit p_limit
    for update skip locked));
end $$;
comment on function orchestrator.expire_events(integer) is 'Ends events that have expired where no claim comes across them: behind a pause, a limit, a retry or another of their ordering key. Returns how many';

create or replace function orchestrator.lost_lease() returns text
language sql immutable parallel safe
return 'its leases ran out time after time: every worker vanished, whether one of them delivered is unknown';
comment on function orchestrator.lost_lease() is 'Why an event dies whose workers never answered';

-- A worker that is killed loses leases on many events that it had not begun to deliver: none of them may die of that.
create or replace function orchestrator.max_lost_leases() returns integer
language sql immutable parallel safe
return 5;
comment on function orchestrator.max_lost_leases() is
  'Leases given beyond max_attempts when earlier ones ran out unanswered; after that an event that may be killing its workers is buried';

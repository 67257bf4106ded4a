-- Ordering keys: events of one key are delivered one at a time, by scheduled_at. Only the first live event of
-- a key can be claimed. A claim that finds another event of the key in lane n moves it to lane -1 - n, where
-- it waits (reroute_or_park(), 32_rerouting.sql). Whoever ends or delays the first event lets the next one in
-- (advance_ordering()). Called by claims, finishes and maintenance.

create or replace function orchestrator.ordering_lock_number(p_ordering bigint) returns integer
language sql immutable parallel safe
return (p_ordering & 255)::integer;
comment on function orchestrator.ordering_lock_number(bigint) is
  'Number of the advisory lock of an ordering key: one of 256, so that a batch takes few locks';

create or replace function orchestrator.ordering_held(
  p_ordering bigint, p_event_id uuid, p_scheduled_at timestamptz, p_now timestamptz)
returns boolean
language sql stable
return exists (
    select from orchestrator.timer b
    where b.ordering = p_ordering and (b.scheduled_at, b.event_id) < (p_scheduled_at, p_event_id))
  or exists (
    select from orchestrator.timer b
    where b.busy = p_ordering and b.lease_until > p_now and b.event_id <> p_event_id)
  or exists (select from orchestrator.dead_letter d where d.blocks = p_ordering);
comment on function orchestrator.ordering_held(bigint, uuid, timestamptz, timestamptz) is
  'Whether an event must wait: for an earlier live event of its key, for one under way, or for a dead one that blocks';

create or replace function orchestrator.advance_ordering(p_orderings bigint[]) returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_heads tid[];
  v_first timestamptz;
begin
  perform pg_advisory_xact_lock(hashtext('orchestrator.ordering'), b.lock_number)
  from (
    select distinct orchestrator.ordering_lock_number(o) as lock_number from unnest(p_orderings) o
    where o is not null order by 1) b;

  -- The first event of each key, where it waits and nothing blocks it any more.
  v_heads := array(
    select h.at
    from (select distinct o as ordering from unnest(p_orderings) o where o is not null) k
    cross join lateral (
      select t.ctid as at, t.event_id, t.scheduled_at, t.lane from orchestrator.timer t
      where t.ordering = k.ordering
      order by t.scheduled_at, t.event_id
      limit 1) h
    where h.lane < 0 and not orchestrator.ordering_held(k.ordering, h.event_id, h.scheduled_at, v_now));

  with claimable as (
    update orchestrator.timer t
    set lane = orchestrator.lane_for((
      select orchestrator.destination_name(e.delivery_type, e.destination) from orchestrator.event e
      where e.id = t.event_id and e.scheduled_at = t.scheduled_at))
    -- Whoever has a timer locked is about to end it, and then comes here. Negated, lane is not looked up in
    -- an index.
    where t.ctid = any (array(
      select s.ctid from orchestrator.timer s
      where s.ctid = any (v_heads) and -s.lane > 0
      for update skip locked))
    returning t.due_at
  )
  select min(c.due_at) into v_first from claimable c;
  perform orchestrator.tell_due(v_first);
end $$;
comment on function orchestrator.advance_ordering(bigint[]) is
  'Makes the first waiting event of each ordering key claimable, where nothing blocks it any more';

create or replace function orchestrator.advance_all_orderings() returns bigint
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
  v_orderings constant bigint[] := array(
    select o.ordering from (select distinct t.ordering from orchestrator.timer t where t.lane < 0) o
    where pg_try_advisory_xact_lock(hashtext('orchestrator.ordering'), orchestrator.ordering_lock_number(o.ordering)));
  v_others constant bigint[] := array(
    select distinct t.ordering from orchestrator.timer t where t.lane < 0 and t.ordering <> all (v_orderings));
begin
  perform orchestrator.advance_ordering(v_orderings) where v_orderings <> '{}';
  if v_others <> '{}' then
    begin
      perform orchestrator.advance_ordering(v_others);
    exception when lock_not_available then
      perform set_config('orchestrator.problem'
      , format('%s ordering keys are left out, because another session has locked them', cardinality(v_others)), true);
    end;
  end if;
  return cardinality(v_orderings || v_others);
end $$;
comment on function orchestrator.advance_all_orderings() is
  'advance_ordering() of all keys, except those that another session has locked. '
  'Returns how many keys have events that wait';

create or replace function orchestrator.blocked_by_death(
  p_event_id uuid, p_scheduled_at timestamptz, p_lane integer, p_ordering bigint)
returns bigint
language sql stable security definer
set search_path = orchestrator, pg_temp as $$
  select p_ordering
  where p_ordering is not null and (
    select r.dead_blocks from orchestrator.retry_policy r
    where r.name in (orchestrator.retry_policy_of(p_event_id, p_scheduled_at, p_lane), 'default')
    order by r.name = 'default'
    limit 1)
$$;
comment on function orchestrator.blocked_by_death(uuid, timestamptz, integer, bigint) is
  'The ordering key that an event blocks once it is dead, if its retry policy says so; else null';

create or replace function orchestrator.blocking_event(p_ordering bigint, p_event_id uuid, p_scheduled_at timestamptz)
returns uuid
language sql volatile security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off as $$
  select b.event_id
  from (
    (select d.event_id, 1 as place from orchestrator.dead_letter d
     where d.blocks = p_ordering
     order by d.scheduled_at, d.event_id limit 1)
    union all
    (select t.event_id, 2 from orchestrator.timer t
     where t.ordering = p_ordering and (t.scheduled_at, t.event_id) < (p_scheduled_at, p_event_id)
     order by t.scheduled_at, t.event_id limit 1)
    union all
    (select t.event_id, 3 from orchestrator.timer t
     where t.busy = p_ordering and t.lease_until > orchestrator.now() and t.event_id <> p_event_id limit 1)) b
  order by b.place
  limit 1
$$;
comment on function orchestrator.blocking_event(bigint, uuid, timestamptz) is
  'The event that another of its ordering key waits for: a dead one that blocks, else the first live one, else one '
  'under way. '
  'Null: none';

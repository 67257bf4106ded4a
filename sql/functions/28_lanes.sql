-- Lanes: which one a destination's timers wait in, its breaker, and the order of events that share a key.
-- Used by submission, claims, finishes and operators. Locks, in this order everywhere: timers by event id, ordering keys by
-- bucket, destinations that are made or deleted by the advisory lock of their name, old destinations, lanes by number. Nobody waits for
-- the row of control, see 26_control.sql. A claim waits a moment for lanes, and for nothing else.

create or replace function orchestrator.is_pattern(p_name text) returns boolean
language sql immutable parallel safe
return strpos(p_name, '*') > 0;
comment on function orchestrator.is_pattern(text) is 'Whether a destination''s name stands for all names that match it';

create or replace function orchestrator.matches(p_name text, p_pattern text) returns boolean
language sql immutable parallel safe
return p_name like replace(replace(replace(replace(p_pattern, '\', '\\'), '%', '\%'), '_', '\_'), '*', '%');
comment on function orchestrator.matches(text, text) is 'Whether a name matches a pattern, in which * stands for any characters';

create or replace function orchestrator.pattern_lane(p_name text) returns integer
language sql stable security definer set search_path = orchestrator, pg_temp as $$
  select l.lane from orchestrator.lane l
  where l.name is not null and l.hash is null and orchestrator.matches(p_name, l.name)
  order by length(replace(l.name, '*', '')) desc, l.name
  limit 1
$$;
comment on function orchestrator.pattern_lane(text) is 'Lane of the pattern that a name belongs to: the one with most characters besides *, then the first by name; null: none';

create or replace function orchestrator.lane_for(p_name text) returns integer
language sql stable security definer set search_path = orchestrator, pg_temp as $$
  select coalesce((select l.lane from orchestrator.lane l where l.hash = hashtextextended(p_name, 0)), orchestrator.pattern_lane(p_name)
    , (hashtextextended(p_name, 0) & 63)::integer)
$$;
comment on function orchestrator.lane_for(text) is 'Lane of a destination by its name: its own, that of a pattern, or a shared one';

create or replace function orchestrator.hold_lane(p_lane integer) returns void
language sql security definer set search_path = orchestrator, pg_temp
as $$ select pg_notify('orchestrator_due', 'hold ' || coalesce(p_lane::text, '*')) $$;
comment on function orchestrator.hold_lane(integer) is 'Has dispatchers hand back what they hold of a lane and have not begun; null: of all lanes. A hint: they see it at their next claim all the same';

create or replace function orchestrator.watched_at_most() returns integer
language sql immutable parallel safe
return 1000;
comment on function orchestrator.watched_at_most() is 'Destinations that get a lane of their own for failing, without being configured; each costs every claim a look';

create or replace function orchestrator.own_lanes(p_names text[], p_configured boolean) returns table (name text, lane integer)
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_made integer;
begin
  -- Whoever watches one that fails must not wait for an operator.
  p_names := array(
    select n.name from (select distinct n as name from unnest(p_names) n order by 1) n
    where p_configured or exists (select from orchestrator.destination d where d.name = n.name)
      or pg_try_advisory_xact_lock(hashtext('orchestrator.destination'), hashtext(n.name)));
  perform pg_advisory_xact_lock(hashtext('orchestrator.destination'), hashtext(n)) from unnest(p_names) n where p_configured;
  -- What a pattern matches is one destination from now on.
  perform orchestrator.forget_destination(d.name)
  from (select d.name from orchestrator.destination d join unnest(p_names) as n (name) on orchestrator.is_pattern(n.name) and orchestrator.matches(d.name, n.name)
        where p_configured and not d.configured order by d.name) d;
  with made as (
    insert into orchestrator.destination (name, configured, changed_at)
    select n.name, p_configured, v_now
    from (select distinct n as name from unnest(p_names) n) n
    where not exists (select from orchestrator.destination d where d.name = n.name)
      and (p_configured or orchestrator.pattern_lane(n.name) is null
           and (select count(*) from orchestrator.destination d where not d.configured) < orchestrator.watched_at_most())
    order by n.name
    on conflict do nothing
    returning name
  ), laned as (
    insert into orchestrator.lane (lane, name, hash)
    select nextval('orchestrator.lane_number'), m.name, case when not orchestrator.is_pattern(m.name) then hashtextextended(m.name, 0) end
    from made m
    returning 1
  )
  select count(*) into v_made from laned;
  if v_made > 0 then
    perform orchestrator.note_control('reroute');
  end if;
  if p_configured then
    update orchestrator.destination d set configured = true where d.name = any (p_names) and not d.configured;
  end if;
  return query
  select n.name, coalesce(l.lane, orchestrator.pattern_lane(n.name))
  from unnest(p_names) as n (name) left join orchestrator.lane l on l.name = n.name;
end $$;
comment on function orchestrator.own_lanes(text[], boolean) is
  'Gives destinations lanes of their own, unless they have one; claims move the timers that wait elsewhere. Lane null: too many misbehave already, or (then it is left out) another session is about to make or delete it';

create or replace function orchestrator.own_lane(p_name text, p_configured boolean) returns integer
language sql security definer set search_path = orchestrator, pg_temp
as $$ select o.lane from orchestrator.own_lanes(array[p_name], p_configured) o $$;
comment on function orchestrator.own_lane(text, boolean) is 'Gives a destination a lane of its own, unless it has one. Null: too many misbehave already';

create or replace function orchestrator.forget_destination(p_name text) returns boolean
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
declare
  v_lane integer;
begin
  select l.lane into v_lane from orchestrator.lane l where l.name = p_name;
  if v_lane is null then
    return false;
  end if;
  perform pg_advisory_xact_lock(hashtext('orchestrator.destination'), hashtext(p_name));
  perform orchestrator.note_control('reroute');
  delete from orchestrator.destination d where d.name = p_name;
  if not found then
    return false;
  end if;
  update orchestrator.lane l
  set name = null, hash = null, limited = false, paused_at = null, next_slot_at = null, parallel_now = null, held_by = null
    , breaker = 'closed', open_until = '-infinity', openings = 0, failures = 0, window_at = null
  where l.lane = v_lane;
  perform orchestrator.tell_due(orchestrator.now());
  return true;
end $$;
comment on function orchestrator.forget_destination(text) is
  'Takes a destination''s configuration and limits away; its timers move at claim to the lanes where they belong then. False: there is no such destination';

-- Breakers

-- Locks the lanes in order, and only those whose state may change: the successes of a healthy destination write nothing.
-- finish_free_events() has it leave out those that another session has: a result is worth more than its count.
create or replace function orchestrator.note_results(
  p_lanes integer[], p_delivered boolean[], p_status_codes integer[], p_started_at double precision[], p_finished_at double precision[])
returns void
language plpgsql security definer set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_locked integer[];
  v_opened integer[];
  v_closed boolean;
begin
  if current_setting('orchestrator.wait', true) = 'off' then
    v_locked := array(
      select l.lane from orchestrator.lane l
      where l.lane = any (p_lanes) and l.name is not null
        and (l.failures > 0 or l.window_at is not null or l.breaker <> 'closed' or l.parallel_now is not null or false = any (p_delivered))
      order by l.lane
      for update skip locked);
  else
    v_locked := array(
      select l.lane from orchestrator.lane l
      where l.lane = any (p_lanes) and l.name is not null
        and (l.failures > 0 or l.window_at is not null or l.breaker <> 'closed' or l.parallel_now is not null or false = any (p_delivered))
      order by l.lane
      for update);
  end if;
  if v_locked = '{}' then
    return;
  end if;
  with result as (
    select l.lane, r.delivered, r.status_code, r.finished_at
      , max(r.finished_at) filter (where r.delivered) over (partition by l.lane) as last_delivered_at
    from unnest(p_lanes, p_delivered, p_status_codes, p_started_at, p_finished_at) as r (lane, delivered, status_code, started_at, finished_at)
    cross join lateral (select l.* from orchestrator.lane l where l.lane = r.lane limit 1) l
    -- What began before the breaker opened says nothing about its try. A worker's idea of the time may be a little early.
    where l.lane = any (v_locked) and (l.breaker = 'closed' or l.breaker = 'half_open' and coalesce(to_timestamp(r.started_at), v_now) >= l.tried_at - interval '10 ms')
  ), batch as (
    select r.lane, count(*)::integer as attempts, (count(*) filter (where not r.delivered))::integer as failed
      , (count(*) filter (where not r.delivered and r.finished_at > r.last_delivered_at is not false))::integer as trailing
      , count(*) filter (where not r.delivered and coalesce(r.status_code, 503) in (408, 429, 503, 504)) > 0 as throttled
    from result r
    group by r.lane
  ), counted as (
    select l.lane, l.breaker, l.openings, l.parallel_now, l.throttled_at, b.throttled,
       b.attempts - b.failed as delivered, b.failed, d.adaptive, d.max_parallel
      , d.breaker_failures, d.breaker_ratio, d.breaker_minimum, d.breaker_cooldown, d.breaker_max_cooldown
      , case when b.trailing < b.attempts then b.trailing else l.failures + b.failed end as failures
      , w.fresh
      , case when not w.fresh then l.window_at when b.failed > 0 then v_now end as window_at
      , case when not w.fresh then l.window_attempts + b.attempts when b.failed > 0 then b.attempts else 0 end as window_attempts
      , case when w.fresh then b.failed else l.window_failures + b.failed end as window_failures
    from batch b
    cross join lateral (select l.* from orchestrator.lane l where l.lane = b.lane limit 1) l
    cross join lateral (select d.* from orchestrator.destination d where d.name = l.name limit 1) d
    cross join lateral (select l.window_at is null or l.window_at not between v_now - d.breaker_window and v_now as fresh) w
  ), decided as (
    select c.*
      , c.breaker = 'half_open' and c.delivered > 0 as closes
      , case c.breaker
          when 'half_open' then c.delivered = 0
          else coalesce(c.failures >= c.breaker_failures, false)
            or coalesce(c.window_attempts >= c.breaker_minimum and c.window_failures >= c.breaker_ratio * c.window_attempts, false)
        end and c.failed > 0 as opens
    from counted c
  ), noted as (
    update orchestrator.lane l
    set failures = case when d.opens or d.closes then 0 else d.failures end
      , failed_at = case when d.failed > 0 then v_now else l.failed_at end
      , window_at = case when not d.opens and not d.closes then d.window_at end
      , window_attempts = case when d.opens or d.closes then 0 else d.window_attempts end
      , window_failures = case when d.opens or d.closes then 0 else d.window_failures end
      , breaker = case when d.opens then 'open' when d.closes then 'closed' else d.breaker end
      , openings = case when d.opens then least(d.openings + 1, 30) when d.closes then 0 else d.openings end
      , open_until = case when d.opens then v_now + least(d.breaker_cooldown * power(2, d.openings), d.breaker_max_cooldown)
                          when d.closes then '-infinity' else l.open_until end
      , opened_at = case when d.opens and d.breaker = 'closed' then v_now else l.opened_at end
      , closed_at = case when d.closes then v_now else l.closed_at end
      , parallel_now = case
          when not d.adaptive then null
          when d.throttled and d.throttled_at > v_now - interval '1 s' and d.throttled_at <= v_now then d.parallel_now
          when d.throttled then greatest(1, 0.7 * coalesce(d.parallel_now, d.max_parallel))
          else nullif(least(d.max_parallel, d.parallel_now + d.delivered / d.parallel_now), d.max_parallel) end
      , throttled_at = case
          when d.adaptive and d.throttled and (d.throttled_at > v_now - interval '1 s' and d.throttled_at <= v_now) is not true then v_now
          else l.throttled_at end
    from decided d
    where l.lane = d.lane
    returning l.lane, l.hash, d.opens, d.closes
  )
  -- What dispatchers were given before it had a lane of its own, they know by the shared one.
  select array_agg(n.lane) filter (where n.opens) || array_agg((n.hash & 63)::integer) filter (where n.opens and n.hash is not null), bool_or(n.closes)
  into v_opened, v_closed
  from noted n;
  perform orchestrator.hold_lane(o.lane) from unnest(v_opened) as o (lane);
  if v_closed then
    perform orchestrator.tell_due(v_now);
  end if;
end $$;
comment on function orchestrator.note_results(integer[], boolean[], integer[], double precision[], double precision[]) is
  'Counts results of own lanes, one array element each, and opens and closes their breakers; lowers and raises the bound of adaptive ones';

create or replace function orchestrator.watch_lanes(p_lanes integer[], p_event_ids uuid[]) returns integer[]
language plpgsql security definer set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan set enable_nestloop = off set enable_mergejoin = off set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_names text[];
begin
  v_names := array(
    select case when r.lane < 64 then (
      select orchestrator.destination_name(e.delivery_type, e.destination) from orchestrator.event e
      where e.id = r.event_id and e.scheduled_at >= uuid_extract_timestamp(r.event_id) and e.scheduled_at < uuid_extract_timestamp(r.event_id) + interval '1 ms' limit 1) end
    from unnest(p_lanes, p_event_ids) with ordinality as r (lane, event_id, n) order by r.n);
  return array(
    select coalesce(o.lane, r.lane) from unnest(p_lanes, v_names) with ordinality as r (lane, name, n)
    left join (select distinct o.name, o.lane from orchestrator.own_lanes(array(select distinct n from unnest(v_names) n where n is not null), false) o) o on o.name = r.name
    order by r.n);
end $$;
comment on function orchestrator.watch_lanes(integer[], uuid[]) is
  'Gives the destinations of events that failed in shared lanes lanes of their own, for their breakers; answers the lanes by which to count, one for each event';

-- Ordering keys. Only the first live event of a key is in a lane that claims look at; claims put the others of lane n into lane -1 - n
-- when they come across them, and whoever ends or puts off the first one lets the next one in.

create or replace function orchestrator.ordering_bucket(p_ordering bigint) returns integer
language sql immutable parallel safe
return (p_ordering & 255)::integer;
comment on function orchestrator.ordering_bucket(bigint) is 'Number of the advisory lock of an ordering key: few locks, however many keys a batch has';

create or replace function orchestrator.ordering_held(p_ordering bigint, p_event_id uuid, p_scheduled_at timestamptz, p_now timestamptz) returns boolean
language sql stable
return exists (select from orchestrator.timer b where b.ordering = p_ordering and (b.scheduled_at, b.event_id) < (p_scheduled_at, p_event_id))
  or exists (select from orchestrator.timer b where b.busy = p_ordering and b.lease_until > p_now and b.event_id <> p_event_id)
  or exists (select from orchestrator.dead_letter d where d.blocks = p_ordering);
comment on function orchestrator.ordering_held(bigint, uuid, timestamptz, timestamptz) is
  'Whether an event must wait: for an earlier live one of its key, for one under way, or for a dead one that blocks';

create or replace function orchestrator.advance_ordering(p_orderings bigint[]) returns void
language plpgsql security definer set search_path = orchestrator, pg_temp
set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_heads tid[];
  v_first timestamptz;
begin
  perform pg_advisory_xact_lock(hashtext('orchestrator.ordering'), b.bucket)
  from (select distinct orchestrator.ordering_bucket(o) as bucket from unnest(p_orderings) o where o is not null order by 1) b;
  v_heads := array(
    select h.at from (select distinct o as ordering from unnest(p_orderings) o where o is not null) k
    cross join lateral (
      select t.ctid as at, t.event_id, t.scheduled_at, t.lane from orchestrator.timer t
      where t.ordering = k.ordering order by t.scheduled_at, t.event_id limit 1) h
    where h.lane < 0 and not orchestrator.ordering_held(k.ordering, h.event_id, h.scheduled_at, v_now));
  with armed as (
    update orchestrator.timer t
    set lane = orchestrator.lane_for((
      select orchestrator.destination_name(e.delivery_type, e.destination) from orchestrator.event e where e.id = t.event_id and e.scheduled_at = t.scheduled_at))
    -- Whoever has it locked is about to end it, and comes here then. Negated, lane is not looked up in an index.
    where t.ctid = any (array(select s.ctid from orchestrator.timer s where s.ctid = any (v_heads) and -s.lane > 0 for update skip locked))
    returning t.due_at
  )
  select min(a.due_at) into v_first from armed a;
  perform orchestrator.tell_due(v_first);
end $$;
comment on function orchestrator.advance_ordering(bigint[]) is 'Lets the first waiting event of each ordering key be claimed, where nothing holds it any more';

-- The caller has the rows locked. Never waits: keys whose lock another has are left for the next claim.
create or replace function orchestrator.sort_out(p_at tid[], p_rerouted boolean, p_bounded boolean, p_skip integer[]
, out ready tid[], out changed boolean, out locked bigint, out buckets integer[])
language plpgsql security definer set search_path = orchestrator, pg_temp
set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_patterns constant boolean := exists (select from orchestrator.lane l where l.name is not null and l.hash is null);
  v_ordered tid[];
  v_parked bigint[];
  v_moved bigint := 0;
begin
  ready := p_at;
  if p_rerouted then
    with placed as materialized (
      select t.ctid as at, t.lane, coalesce(own.lane
        , case when v_patterns then (
            select orchestrator.pattern_lane(orchestrator.destination_name(e.delivery_type, e.destination))
            from orchestrator.event e where e.id = t.event_id and e.scheduled_at = t.scheduled_at) end
        , (t.destination & 63)::integer) as right_lane
      from orchestrator.timer t left join lateral (select l.lane from orchestrator.lane l where l.hash = t.destination limit 1) own on true
      where t.ctid = any (p_at)
    ), moved as (
      update orchestrator.timer t
      set lane = (select p.right_lane from placed p where p.at = t.ctid)
      where t.ctid = any (array(select p.at from placed p where p.lane <> p.right_lane))
      returning t.ctid as at, t.lane
    ), free as (
      select m.at from moved m
      left join lateral (select l.* from orchestrator.lane l where l.lane = m.lane limit 1) l on true
      where m.lane < 64 or m.lane <> all (p_skip) and not l.limited and not p_bounded and l.breaker = 'closed' and l.paused_at is null
    )
    select array(select p.at from placed p where p.lane = p.right_lane) || array(select f.at from free f)
      , (select count(*) from moved) - (select count(*) from free)
    into ready, v_moved;
  end if;
  -- What was submitted before its destination was given a spread.
  with given as materialized (
    select t.ctid as at, t.* from orchestrator.timer t where t.ctid = any (ready)
  ), late as materialized (
    select t.at, t.scheduled_at + orchestrator.spread_shift(t.event_id, d.spread) as due_at
    from given t
    cross join lateral (
      select d.spread from orchestrator.lane l join orchestrator.destination d on d.name = l.name where l.lane = t.lane and d.spread is not null limit 1) d
    cross join lateral (select e.spread from orchestrator.event e where e.id = t.event_id and e.scheduled_at = t.scheduled_at limit 1) e
    where t.attempt = 0 and e.spread is null
      and t.due_at < t.scheduled_at + orchestrator.spread_shift(t.event_id, d.spread)
  ), put_off as (
    update orchestrator.timer t
    set due_at = (select l.due_at from late l where l.at = t.ctid)
    where t.ctid = any (array(select l.at from late l))
    returning 1
  )
  select array(select r from unnest(ready) r where r <> all (array(select l.at from late l))), v_moved + (select count(*) from put_off) into ready, v_moved;
  changed := v_moved > 0;
  -- Fenced off: where a stale statistic says that the index of ordering keys is empty, the planner would read all of it.
  with keyed as materialized (select t.ctid as at, t.ordering from orchestrator.timer t where t.ctid = any (ready)
  ), tried as materialized (
    select k.at, orchestrator.ordering_bucket(k.ordering) as bucket
      , pg_try_advisory_xact_lock(hashtext('orchestrator.ordering'), orchestrator.ordering_bucket(k.ordering)) as had
    from keyed k where k.ordering is not null
  )
  select array(select k.at from keyed k where k.ordering is null), array(select t.at from tried t where t.had)
    , (select count(*) from tried t where not t.had), array(select distinct t.bucket from tried t where not t.had)
  into ready, v_ordered, locked, buckets;
  if v_ordered <> '{}' then
    -- A new statement, and so a new snapshot: it sees what those did who had the locks before.
    with parked as (
      update orchestrator.timer t
      set lane = -1 - t.lane
      where t.ctid = any (v_ordered) and orchestrator.ordering_held(t.ordering, t.event_id, t.scheduled_at, v_now)
      returning old.ctid as at, t.ordering
    )
    select ready || array(select o from unnest(v_ordered) o where o <> all (array(select p.at from parked p))), array(select p.ordering from parked p)
    into ready, v_parked;
    if v_parked <> '{}' then
      perform orchestrator.advance_ordering(v_parked);
    end if;
  end if;
end $$;
comment on function orchestrator.sort_out(tid[], boolean, boolean, integer[]) is
  'Of due timers that a claim has locked: moves those in a wrong lane (which it may lease all the same, unless that lane has limits or is to be skipped; p_bounded: all own lanes have limits), puts off those whose destination was spread since, and parks those that wait for their ordering key. Answers which may be leased, whether others became due elsewhere, and how many wait because another session has the lock of their ordering key, and which locks';

-- Limits. A claim locks the lanes that have any, reads what they allow, leases, and books what it took, all in one transaction:
-- any number of claims obey a limit together. What is under way is counted from the timers themselves, so no counter can go wrong.

create or replace function orchestrator.limited_ahead() returns interval
language sql immutable parallel safe
return interval '50 ms';
comment on function orchestrator.limited_ahead() is 'How long before they are due events are claimed that take a slot of a bound or a rate: a slot is not to be spent on one while another could have it sooner';

create or replace function orchestrator.next_slot(p_next_slot_at timestamptz, p_now timestamptz, p_gap interval, p_burst integer) returns timestamptz
language sql immutable parallel safe
return case when p_next_slot_at <= p_now + interval '11 s' + (p_burst + 1) * p_gap then p_next_slot_at end;
comment on function orchestrator.next_slot(timestamptz, timestamptz, interval, integer) is
  'lane.next_slot_at, if claims can have booked as far as that; null, and so anew, when the clock was set back since';

-- Locks in order of lane; what it then reads, it reads in a new snapshot. A lane that an open transaction has gives nothing: another claim
-- has it for milliseconds, which are waited for, but not any more once three claims of this session in turn have failed to get it.
create or replace function orchestrator.lane_limits(
  p_queues integer[], p_limited integer[], p_now timestamptz, p_until timestamptz, p_max_parallel integer,
  out caps integer[], out untils timestamptz[], out lanes integer[], out allowed integer[], out kinds text[], out bounded integer[], out spread integer[], out again_at timestamptz)
language plpgsql security definer set search_path = orchestrator, pg_temp set enable_hashjoin = on set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_patience constant text := current_setting('lock_timeout');
  v_locked integer[] := array(select l.lane from orchestrator.lane l where l.lane = any (p_limited) order by l.lane for update skip locked);
begin
  if not p_limited <@ v_locked and coalesce(current_setting('orchestrator.locked_out', true), '') in ('', '0', '1', '2') then
    begin
      perform set_config('lock_timeout', '50ms', true);
      perform from orchestrator.lane l where l.lane = any (p_limited) and l.lane <> all (v_locked) order by l.lane for update;
      v_locked := p_limited;
      perform set_config('lock_timeout', v_patience, true);
    exception when lock_not_available then null;
    end;
  end if;
  with bound as (
    select l.*, d.rate_per_second, d.burst, d.spread, orchestrator.lane_open(l, p_now) as is_open
      , case when l.name is not null then least(coalesce(d.max_parallel, p_max_parallel), floor(l.parallel_now))::integer end as bound
      , make_interval(secs => 1 / d.rate_per_second) as gap
    from orchestrator.lane l left join orchestrator.destination d on d.name = l.name
    where l.lane = any (v_locked)
  ), free as (
    select b.*
      , least(p_until, p_now + case when b.bound is null then interval '10 s' else orchestrator.limited_ahead() end) as slots_until
      , case when b.bound is not null then greatest(0, b.bound
          - (select count(*) from orchestrator.timer t where t.slot = b.lane and t.lease_until > p_now))::integer end as free
      , greatest(p_now, orchestrator.next_slot(b.next_slot_at, p_now, b.gap, b.burst)) - (b.burst - 1) * b.gap as first_slot_at
    from bound b
  ), slots as (
    select f.*, greatest(0, least(1000000, 1 + floor((extract(epoch from f.slots_until - f.first_slot_at) + 1e-6) / extract(epoch from f.gap))))::integer as slots
    from free f
  ), limits as materialized (
    select s.lane, s.bound, s.spread, s.slots_until, s.first_slot_at + s.slots * s.gap as next_slot_at
      , case when s.bound is null and s.gap is null then p_until else least(p_until, p_now + orchestrator.limited_ahead()) end as until
      , case when s.is_open then least(case when s.breaker <> 'closed' then 1 end, s.free, s.slots) else 0 end as allowed
      , case when s.slots < coalesce(s.free, s.slots + 1) then 'rate' when s.free is not null then 'parallel' end as kind
    from slots s
  )
  select array_agg(case when l.lane is not null then l.allowed when q.lane = any (p_limited) then 0 end order by q.n), array_agg(coalesce(l.until, p_until) order by q.n)
    , array_agg(l.lane order by q.n) filter (where l.lane is not null and q.first), array_agg(l.allowed order by q.n) filter (where l.lane is not null and q.first)
    , array_agg(l.kind order by q.n) filter (where l.lane is not null and q.first), array_agg(l.lane) filter (where l.bound is not null and q.first)
    , array_agg(l.lane) filter (where l.spread is not null and q.first)
    , min(least(
        case when l.kind = 'rate' then greatest(p_now, l.next_slot_at - (l.slots_until - p_now) / 2) end
      , case when l.until < p_until then (
          select t.due_at - orchestrator.limited_ahead() from orchestrator.control_now() c cross join unnest(c.priorities) as p (priority)
          cross join lateral (
            select t.due_at from orchestrator.timer t
            where t.lane = l.lane and t.priority = p.priority and t.due_at > l.until and t.due_at <= p_until order by t.due_at limit 1) t
          order by 1 limit 1) end))
  into caps, untils, lanes, allowed, kinds, bounded, spread, again_at
  from (select u.lane, u.n, row_number() over (partition by u.lane order by u.n) = 1 as first from unnest(p_queues) with ordinality as u (lane, n)) q
  left join limits l on l.lane = q.lane;
end $$;
comment on function orchestrator.lane_limits(integer[], integer[], timestamptz, timestamptz, integer) is
  'Locks limited lanes and says how many events a claim may take and due until when, for each queue given (caps, untils; null: any number), and for each limited lane that no other session has locked: allowed, the limit that decides (rate or parallel), and which give slots of a bound or are spread; again_at: when a rate has more to give, or events of a bound become due';

create or replace function orchestrator.is_limited(p_destination orchestrator.destination) returns boolean
language sql immutable
return num_nonnulls(p_destination.rate_per_second, p_destination.max_parallel, p_destination.spread, p_destination.timeout
  , p_destination.signing_secret, p_destination.secret_headers) > 0;
comment on function orchestrator.is_limited(orchestrator.destination) is 'Whether claims must look at a destination''s row, not at its lane alone';

create or replace function orchestrator.lane_open(p_lane orchestrator.lane, p_now timestamptz) returns boolean
language sql immutable
-- A time in the future: the clock was set back.
return p_lane.paused_at is null and (p_lane.open_until <= p_now or coalesce(greatest(p_lane.opened_at, p_lane.tried_at) > p_now, false));
comment on function orchestrator.lane_open(orchestrator.lane, timestamptz) is 'Whether claims may take from a lane: not paused, and its breaker lets at least a try through';

-- GCRA in closed form: the i-th theoretical arrival time is i·T + max(TAT, max over j ≤ i of (x_j - (j-1)·T)), x being when each may start at the earliest.
create or replace function orchestrator.take_slots(
  p_ids uuid[], p_due_at timestamptz[], p_lanes integer[], p_limited integer[], p_allowed integer[], p_kinds text[],
  p_bounded integer[], p_now timestamptz, p_lease_until timestamptz, p_lease interval,
  out start_at timestamptz[], out lease_until timestamptz[], out options json[], out waited json[])
language plpgsql security definer set search_path = orchestrator, pg_temp set enable_hashjoin = on set enable_seqscan = off set enable_bitmapscan = off as $$
begin
  with option as materialized (
    select l.lane, json_strip_nulls(json_build_object('rate', nullif(d.rate_per_second is not null, false), 'bound', nullif(b.lane is not null, false)
      , 'timeout_s', extract(epoch from d.timeout), 'signing_secret', d.signing_secret, 'secret_headers', d.secret_headers)) as options
    from unnest(p_limited) as u (lane)
    join orchestrator.lane l on l.lane = u.lane
    join orchestrator.destination d on d.name = l.name
    left join unnest(p_bounded) as b (lane) on b.lane = l.lane
    where b.lane is not null or d.rate_per_second is not null or d.timeout is not null or d.signing_secret is not null or d.secret_headers is not null
  ), leased as materialized (
    select c.n, c.id, c.due_at, c.lane, l.next_slot_at, l.held_by, l.last_paused_at, l.resumed_at, l.opened_at, l.closed_at, l.breaker, d.timeout, o.options
      , make_interval(secs => 1 / d.rate_per_second) as gap, d.burst, greatest(c.due_at, p_now) as earliest
      , row_number() over (partition by c.lane order by c.n) as i
    from unnest(p_ids, p_due_at, p_lanes) with ordinality as c (id, due_at, lane, n)
    join orchestrator.lane l on l.lane = c.lane and l.lane = any (p_limited)
    left join orchestrator.destination d on d.name = l.name
    left join option o on o.lane = c.lane
  ), arrival as (
    select c.*, c.i * c.gap + greatest(
        orchestrator.next_slot(c.next_slot_at, p_now, c.gap, c.burst)
      , max(c.earliest - (c.i - 1) * c.gap) over (partition by c.lane order by c.i)) as tat
    from leased c
  ), slot as materialized (
    select a.*, s.start_at, greatest(p_lease_until, s.start_at + greatest(p_lease, a.timeout + interval '5 s')) as lease_until
    from arrival a
    cross join lateral (select case when a.gap is null then a.due_at else greatest(a.earliest, a.tat - a.burst * a.gap) end as start_at) s
  ), booked as (
    update orchestrator.lane l
    set next_slot_at = coalesce(s.tat, l.next_slot_at)
      , held_by = case when coalesce(s.leases, 0) >= k.allowed then k.kind end
      , breaker = case when l.breaker <> 'closed' and s.leases > 0 then 'half_open' else l.breaker end
      , tried_at = case when l.breaker <> 'closed' and s.leases > 0 then p_now else l.tried_at end
      , open_until = case when l.breaker <> 'closed' and s.leases > 0 then s.lease_until else l.open_until end
    from unnest(p_limited, p_allowed, p_kinds) as k (lane, allowed, kind)
    left join (select s.lane, max(s.tat) as tat, max(s.lease_until) as lease_until, count(*) as leases from slot s group by s.lane) s on s.lane = k.lane
    where l.lane = k.lane
      and (s.leases > 0 and (s.tat is not null or l.breaker <> 'closed')
           or l.held_by is distinct from case when coalesce(s.leases, 0) >= k.allowed then k.kind end)
  ), prolonged as (
    update orchestrator.timer t
    set lease_until = (select s.lease_until from slot s where s.id = t.event_id)
    where t.event_id = any (array(select s.id from slot s where s.lease_until > p_lease_until))
  ), why as (
    select s.n, orchestrator.waits(s.due_at, greatest(s.start_at, p_now)
      , s.last_paused_at, s.resumed_at, s.opened_at, case when s.closed_at >= s.opened_at then s.closed_at else p_now end
      , case when s.gap is not null and (s.start_at > p_now or s.held_by = 'rate') then 'rate' else s.held_by end) as waited
    from slot s
    where greatest(s.start_at, p_now) >= s.due_at + interval '1 ms'
      and (s.held_by is not null or s.start_at > p_now or s.resumed_at > s.due_at or s.closed_at > s.due_at or s.breaker <> 'closed')
  )
  select array_agg(s.start_at order by n), array_agg(s.lease_until order by n), array_agg(s.options order by n), array_agg(w.waited order by n)
  into start_at, lease_until, options, waited
  from generate_subscripts(p_ids, 1) n left join slot s using (n) left join why w using (n);
end $$;
comment on function orchestrator.take_slots(uuid[], timestamptz[], integer[], integer[], integer[], text[], integer[], timestamptz, timestamptz, interval) is
  'Books leases, one array element each, with the lanes they came from; answers nulls for those not of limited lanes: when each may start under its rate, until when it is leased, why it waited, and what a dispatcher must know to deliver it: rate and bound (true: its start and its result count at once), timeout_s, signing_secret, secret_headers; null: nothing special';

create or replace function orchestrator.caps_left(p_lanes integer[], p_caps integer[], p_asked integer[], p_given bigint[]) returns integer[]
language sql stable set search_path = orchestrator, pg_temp set enable_hashjoin = on as $$
  select array_agg((q.cap - coalesce(g.given, 0))::integer order by q.n)
  from unnest(p_lanes, p_caps) with ordinality as q (lane, cap, n)
  left join (select p_lanes[a.n] as lane, sum(a.given) as given from unnest(p_asked, p_given) as a (n, given) group by 1) g on g.lane = q.lane
$$;
comment on function orchestrator.caps_left(integer[], integer[], integer[], bigint[]) is 'What each queue may still give after those asked have given; queues of one lane share its cap';

create or replace function orchestrator.waits(
  p_due_at timestamptz, p_begins_at timestamptz, p_paused_at timestamptz, p_resumed_at timestamptz, p_opened_at timestamptz, p_closed_at timestamptz, p_held_by text)
returns json
language sql immutable parallel safe as $$
  select case when pause + breaker + rest > 0 then json_strip_nulls(json_build_object(
      'rate', case when p_held_by = 'rate' then nullif(rest, 0) end, 'parallel', case when p_held_by = 'parallel' then nullif(rest, 0) end
    , 'breaker', nullif(breaker, 0), 'pause', nullif(pause, 0))) end
  from (
    select pause, breaker, case when p_held_by is null then 0 else greatest(0, total - pause - breaker) end as rest
    from (values (
      (extract(epoch from p_begins_at - p_due_at) * 1000)::integer
    , greatest(0, (extract(epoch from least(p_begins_at, p_resumed_at) - greatest(p_due_at, p_paused_at)) * 1000)::integer) * (p_paused_at is not null)::integer
    , greatest(0, (extract(epoch from least(p_begins_at, p_closed_at) - greatest(p_due_at, p_opened_at)) * 1000)::integer) * (p_opened_at is not null)::integer
    )) as t (total, pause, breaker)) parts
$$;
comment on function orchestrator.waits(timestamptz, timestamptz, timestamptz, timestamptz, timestamptz, timestamptz, text) is
  'Milliseconds that an event waited from due to begin, by cause: the last pause and the last opening of the breaker as far as they overlap, the rest by the limit that held its lane back; null: by none';

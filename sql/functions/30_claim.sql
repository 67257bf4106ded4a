-- Claiming: due timers become leased ones. Called by dispatchers, or by hand: select * from orchestrator.claim_due_events(10).

create or replace function orchestrator.register_worker(p_name text) returns integer
language sql security definer set search_path = orchestrator, pg_temp
as $$ insert into orchestrator.worker (name) values (left(p_name, 200)) returning worker $$;
comment on function orchestrator.register_worker(text) is 'Makes a worker number for one process; never used again by another';

-- Locks timers with skip locked, so it never waits. Each round shares what is left of the batch equally among the lanes that
-- gave all they were asked for in the round before (nothing, where the batch is smaller than their number). Attempt grows with
-- the lease, which fences every earlier holder.
-- Rows are changed by ctid = any (array): a tenth less work than a join with them, and it leaves the planner no choice of plan.
-- Plans are pinned: left alone, the planner hashes a scan of every partition of event for each claim (18,000 events/s against
-- 49,000 with nested loops on the same data), and reads timer by a bitmap, which limit cannot stop early.
-- Events that were overdue when they came are all due at that moment; their ids, which begin with scheduled_at, keep their order.
-- The bounds on scheduled_at let the executor leave out all other partitions when it starts.
create or replace function orchestrator.claim_due_events(
  p_batch integer, p_worker integer default 0, p_lease interval default '60 s', p_lookahead interval default '0 s')
returns table (event_id uuid, attempt smallint, due_at timestamptz, lease_until timestamptz, scheduled_at timestamptz, source text
  , external_job_id text, delivery_type text, destination text, ordering_key text, headers json, payload json)
language plpgsql security definer set search_path = orchestrator, pg_temp rows 100
set plan_cache_mode = force_generic_plan set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off
set enable_bitmapscan = off set jit = off as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_until constant timestamptz := v_now + p_lookahead;
  v_lease_until constant timestamptz := v_until + p_lease;
  v_lanes integer[];
  v_left integer := p_batch;
  v_got bigint;
  v_ids uuid[]; v_all_ids uuid[] := '{}';
  v_scheduled timestamptz[]; v_all_scheduled timestamptz[] := '{}';
  v_due timestamptz[]; v_all_due timestamptz[] := '{}';
  v_attempts smallint[]; v_all_attempts smallint[] := '{}';
  v_dead uuid[]; v_dead_scheduled timestamptz[];
begin
  if p_batch is null or p_batch not between 1 and 10000 then
    raise exception 'p_batch: expected 1 to 10000, got %', p_batch using errcode = 'invalid_parameter_value';
  end if;
  if p_lease is null or p_lookahead is null or p_lease <= '0 s' or p_lookahead < '0 s' then
    raise exception 'p_lease, p_lookahead: expected a positive lease and a lookahead of 0 or more, got % and %', p_lease, p_lookahead using errcode = 'invalid_parameter_value';
  end if;
  v_lanes := array(
    select l.lane from orchestrator.lane l
    cross join lateral (select from orchestrator.timer t where t.lane = l.lane and t.due_at <= v_until limit 1) t
    order by random());
  while v_left > 0 and cardinality(v_lanes) > 0 loop
    with picked as materialized (
      select l.lane, l.share, p.*
      from (select u.lane, v_left / cardinality(v_lanes) + (u.n <= v_left % cardinality(v_lanes))::integer as share
            from unnest(v_lanes) with ordinality as u (lane, n)) l
      cross join lateral (
        select t.ctid as at, t.attempt, t.max_attempts
        from orchestrator.timer t
        where t.lane = l.lane and t.due_at <= v_until and (t.lease_until is null or t.lease_until <= v_now)
        order by t.due_at
        limit l.share
        for update skip locked) p
    ), leased as (
      update orchestrator.timer t
      set lease_until = v_lease_until, worker = p_worker, attempt = t.attempt + 1
      where t.ctid = any (array(select p.at from picked p where p.attempt < p.max_attempts + orchestrator.lost_leases_borne()))
      returning t.event_id, t.scheduled_at, t.due_at, t.attempt
    ), buried as (
      delete from orchestrator.timer t
      where t.ctid = any (array(select p.at from picked p where p.attempt >= p.max_attempts + orchestrator.lost_leases_borne()))
      returning t.event_id, t.scheduled_at, t.due_at, t.attempt, t.worker
    ), logged as (
      insert into orchestrator.outcome (event_id, scheduled_at, due_at, finished_at, worker, attempt, result, error)
      select b.event_id, b.scheduled_at, b.due_at, v_now, b.worker, b.attempt, 'dead', orchestrator.lost_lease() from buried b
    ), mourned as (
      insert into orchestrator.dead_letter (event_id, scheduled_at, died_at, attempts, reason)
      select b.event_id, b.scheduled_at, v_now, b.attempt, orchestrator.lost_lease() from buried b
    ), counted as (
      insert into orchestrator.statistic
      select date_trunc('minute', v_now), 'dead', count(*) from buried having count(*) > 0
    )
    select count(*), array_agg(l.event_id), array_agg(l.scheduled_at), array_agg(l.due_at), array_agg(l.attempt)
      , v_lanes[v_left + 1:] || array(select p.lane from picked p group by p.lane, p.share having count(*) = p.share)
      , (select array_agg(b.event_id) from buried b), (select array_agg(b.scheduled_at) from buried b)
    into v_got, v_ids, v_scheduled, v_due, v_attempts, v_lanes, v_dead, v_dead_scheduled
    from (select * from leased order by due_at, event_id) l;
    if v_dead is not null then
      perform orchestrator.announce_finished(v_dead, v_dead_scheduled);
    end if;
    v_left := v_left - v_got;
    v_all_ids := v_all_ids || v_ids; v_all_scheduled := v_all_scheduled || v_scheduled;
    v_all_due := v_all_due || v_due; v_all_attempts := v_all_attempts || v_attempts;
  end loop;
  return query
  select e.id, l.attempt, l.due_at, v_lease_until, e.scheduled_at, e.source, e.external_job_id, e.delivery_type, e.destination, e.ordering_key, e.headers, e.payload
  from unnest(v_all_ids, v_all_scheduled, v_all_due, v_all_attempts) as l (event_id, scheduled_at, due_at, attempt)
  join orchestrator.event e on e.id = l.event_id and e.scheduled_at = l.scheduled_at
    and e.scheduled_at >= (select min(s) from unnest(v_all_scheduled) s) and e.scheduled_at <= (select max(s) from unnest(v_all_scheduled) s);
end $$;
comment on function orchestrator.claim_due_events(integer, integer, interval, interval) is
  'Leases up to p_batch events that are due within p_lookahead to p_worker, shared fairly among lanes; lease_until is when they become due again unless finished or released. Finish each with its attempt number, not before its due_at has come';

create or replace function orchestrator.lost_lease() returns text
language sql immutable parallel safe
return 'its leases ran out time after time: every worker vanished, whether one of them delivered is unknown';
comment on function orchestrator.lost_lease() is 'Why an event dies whose workers never answered';

-- A worker that is killed loses leases on many events that it had not begun to deliver: none of them may die of that.
create or replace function orchestrator.lost_leases_borne() returns integer
language sql immutable parallel safe
return 5;
comment on function orchestrator.lost_leases_borne() is
  'Leases given beyond max_attempts when earlier ones ran out unanswered; after that an event that may be killing its workers is buried';

create or replace function orchestrator.next_due_at() returns timestamptz
language sql volatile security definer set search_path = orchestrator, pg_temp
set enable_seqscan = off set enable_bitmapscan = off as $$
  select min(t.due_at) from orchestrator.lane l
  cross join lateral (
    select t.due_at from orchestrator.timer t
    where t.lane = l.lane and (t.lease_until is null or t.lease_until <= orchestrator.now())
    order by t.due_at limit 1) t
$$;
comment on function orchestrator.next_due_at() is 'When the next event that nobody holds is due; null when none is waiting';

-- What will be due when, compared with what each destination can take. Called by operators.
--
-- A fluid model: a destination takes rate_per_second from the moment it lets attempts begin, and what it
-- cannot take waits. Let W be the events due so far less the attempts that its rate allowed so far: then
-- the backlog is W - min(0, least W so far). So only the buckets in which something falls due need to be
-- looked at.

create or replace function orchestrator.attempts_allowed(
  p_rate double precision, p_opens_at timestamptz, p_at timestamptz) returns double precision
language sql immutable parallel safe
return p_rate * greatest(0, extract(epoch from p_at - p_opens_at))::double precision;
comment on function orchestrator.attempts_allowed(double precision, timestamptz, timestamptz) is
  'Attempts that a rate allows from p_opens_at (infinity: never) to p_at';

create or replace function orchestrator.backlog_left(
  p_waiting double precision, p_rate double precision, p_opens_at timestamptz,
  p_since timestamptz, p_at timestamptz) returns double precision
language sql immutable parallel safe
return case
  when p_waiting = 0 then 0
  when p_rate is not null then greatest(0, p_waiting
    - (orchestrator.attempts_allowed(p_rate, p_opens_at, p_at)
      - orchestrator.attempts_allowed(p_rate, p_opens_at, p_since)))
  when p_at <= p_opens_at then p_waiting
  else 0
end;
comment on function orchestrator.backlog_left(
  double precision, double precision, timestamptz, timestamptz, timestamptz) is
  'What is left at p_at of a backlog that was p_waiting at p_since, if nothing is added to it';

create or replace function orchestrator.check_forecast(p_bucket interval, p_until interval) returns void
language plpgsql immutable
set search_path = orchestrator, pg_temp
as $$
begin
  if p_bucket is null or p_bucket not between '1 s' and '1 day' then
    raise exception 'bucket: expected 1 s to 1 day, got %', coalesce(p_bucket::text, 'null')
      using errcode = 'invalid_parameter_value';
  end if;
  if p_until is null or p_until <= '0 s' or p_until > '7 days' then
    raise exception 'until: expected more than 0 and at most 7 days, got %', coalesce(p_until::text, 'null')
      using errcode = 'invalid_parameter_value';
  end if;
  if extract(epoch from p_until) > 10080 * extract(epoch from p_bucket) then
    raise exception 'bucket: expected at most 10080 of them, got % in %', p_bucket, p_until
      using errcode = 'invalid_parameter_value';
  end if;
end $$;
comment on function orchestrator.check_forecast(interval, interval) is
  'Refuses a bucket or a time span that a forecast cannot have';

-- Two scans of timer, and one event for each host in it, for its name.
create or replace function orchestrator.due_by_bucket(
  p_now timestamptz, p_first timestamptz, p_end timestamptz, p_bucket interval, p_destination text)
returns table (destination text, bucket_at timestamptz, due bigint)
language sql volatile security definer
set search_path = orchestrator, pg_temp
set jit = off
as $$
  with host as materialized (
    select t.destination as hash, any_value(t.event_id) as event_id
    from orchestrator.timer t
    where t.due_at < p_end
    group by t.destination
  ), governed as materialized (
    -- The name that each host is governed by: its own, that of the most specific pattern, or what its
    -- events say.
    select h.hash, g.name, d.spread
    from host h
    cross join lateral orchestrator.destination_of(h.event_id) named
    left join orchestrator.lane own on own.hash = h.hash
    left join lateral (
      select p.name from orchestrator.lane p
      where own.name is null and p.name is not null and p.hash is null and orchestrator.matches(named.name, p.name)
      order by length(replace(p.name, '*', '')) desc, p.name
      limit 1) pattern on true
    cross join lateral (select coalesce(own.name, pattern.name, named.name) as name) g
    left join orchestrator.destination d on d.name = g.name
    where p_destination is null or g.name = p_destination
  )
  select g.name, date_bin(p_bucket, greatest(f.due_at, p_now), p_first), count(*)
  from orchestrator.timer t
  join governed g on g.hash = t.destination
  -- A claim will put off what was submitted before its destination was given a spread.
  cross join lateral (
    select case
      when g.spread is not null and coalesce(t.attempt, 0) = 0 and t.due_at = t.scheduled_at
      then t.due_at + orchestrator.spread_shift(t.event_id, g.spread)
      else t.due_at
    end as due_at) f
  where t.due_at < p_end and f.due_at < p_end and orchestrator.is_free(t.lease_until, p_now)
  group by 1, 2
$$;
comment on function orchestrator.due_by_bucket(timestamptz, timestamptz, timestamptz, interval, text) is
  'Unclaimed events due before p_end, by destination and bucket. The bucket at p_first has what is overdue';

-- The columns: events due in the bucket; how many of them and of the backlog start in it; how many its
-- rate allows (null: it has no rate; max_parallel may limit it all the same); the backlog at its end;
-- how many of those due in it are late then; and when that backlog will have drained (null: nothing is
-- left, or it stands still).
create or replace function orchestrator.backlog_forecast(
  p_bucket interval default '1 min', p_until interval default '1 hour', p_destination text default null)
returns table (
  destination text, bucket_at timestamptz, due bigint, starts bigint, capacity double precision,
  backlog bigint, late bigint, drained_at timestamptz)
language plpgsql volatile security definer
set search_path = orchestrator, pg_temp
set jit = off
as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_paused constant boolean := (select c.paused_at is not null from orchestrator.control_now() c);
  v_name text;
  v_bucket interval;
  v_first timestamptz;
  v_end timestamptz;
begin
  perform orchestrator.check_forecast(p_bucket, p_until);
  if p_destination is not null then
    v_name := coalesce(orchestrator.destination_for(p_destination), orchestrator.as_destination(p_destination));
  end if;
  v_bucket := make_interval(secs => extract(epoch from p_bucket)::double precision);
  v_first := date_bin(v_bucket, v_now, '2000-01-01 00:00:00+00');
  v_end := date_bin(v_bucket, v_now + p_until - interval '1 us', '2000-01-01 00:00:00+00') + v_bucket;
  return query
  with arriving as (
    -- Buckets in which something falls due, and from when on its destination lets attempts begin.
    select f.destination as name, f.bucket_at, f.due
      , f.bucket_at + v_bucket as ends_at, d.rate_per_second as rate, o.opens_at
      , sum(f.due) over so_far::double precision as due_so_far
      , coalesce(lead(f.bucket_at) over so_far, v_end) as next_at
    from orchestrator.due_by_bucket(v_now, v_first, v_end, v_bucket, v_name) f
    left join orchestrator.destination d on d.name = f.destination
    left join orchestrator.lane l on l.name = f.destination
    cross join lateral (
      select case
        when v_paused or l.paused_at is not null then 'infinity'
        when l.breaker <> 'closed' then greatest(l.open_until, v_now)
        else v_now
      end as opens_at) o
    window so_far as (partition by f.destination order by f.bucket_at)
  ), backlogged as (
    -- The backlog at the end of each, by the model above: w.before and w.after are its W.
    select t.*
      , case
          when t.rate is not null
          then w.after - least(0, w.after, min(w.before) over (partition by t.name order by t.bucket_at))
          when t.ends_at <= t.opens_at then t.due_so_far
          else 0
        end as waiting
    from arriving t
    cross join lateral (
      select t.due_so_far - t.due - orchestrator.attempts_allowed(t.rate, t.opens_at, t.bucket_at) as before
        , t.due_so_far - orchestrator.attempts_allowed(t.rate, t.opens_at, t.ends_at) as after) w
  ), chained as (
    -- The backlog that the bucket before left, and when this one's will have drained.
    select r.*
      , coalesce(lag(r.waiting) over in_order, 0) as waiting_before
      , lag(r.ends_at) over in_order as ended_before
      , case
          when r.waiting = 0 then r.ends_at
          when r.rate is null or not isfinite(r.opens_at) then r.opens_at
          when r.waiting / r.rate > 1e9 then 'infinity'
          else greatest(r.ends_at, r.opens_at) + make_interval(secs => r.waiting / r.rate)
        end as drains_at
    from backlogged r
    window in_order as (partition by r.name order by r.bucket_at)
  ), bucket as (
    -- With the buckets after each in which what it left begins.
    select c.name, b.at, c.rate, c.opens_at, c.drains_at
      , case when b.at = c.bucket_at then c.due else 0 end as due
      -- Whole events: the next one begins as soon as a part of its time has come.
      , floor(case
          when b.at = c.bucket_at
          then orchestrator.backlog_left(c.waiting_before, c.rate, c.opens_at, c.ended_before, b.at)
          else orchestrator.backlog_left(c.waiting, c.rate, c.opens_at, c.ends_at, b.at)
        end + 1e-6)::bigint as found
      , floor(orchestrator.backlog_left(c.waiting, c.rate, c.opens_at, c.ends_at, b.at + v_bucket)
        + 1e-6)::bigint as backlog
    from chained c
    cross join lateral generate_series(c.bucket_at
      , least(c.next_at - interval '1 us', case
          when isfinite(c.opens_at) then greatest(c.ends_at - interval '1 us', c.drains_at)
          else c.bucket_at
        end)
      , v_bucket) b (at)
  )
  select b.name, b.at, b.due, b.found + b.due - b.backlog
    , case
        when b.rate is not null then round((
          orchestrator.attempts_allowed(b.rate, b.opens_at, b.at + v_bucket)
          - orchestrator.attempts_allowed(b.rate, b.opens_at, b.at))::numeric, 6)::double precision
        when b.at + v_bucket <= b.opens_at then 0
      end
    , b.backlog, least(b.due, b.backlog)
    , case when b.backlog > 0 and isfinite(b.drains_at) then b.drains_at end
  from bucket b
  where b.due > 0 or b.found > b.backlog
  order by b.name, b.at;
end $$;
comment on function orchestrator.backlog_forecast(interval, interval, text) is
  'What falls due, starts and waits in each of the next buckets, by destination; a pattern counts as one. '
  'The first has what is overdue; buckets in which nothing is due or starts are left out';

create or replace function orchestrator.forecast(
  p_bucket interval default '1 min', p_until interval default '1 hour', p_destination text default null,
  p_limit integer default 100) returns json
language sql volatile security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
as $$
  with bucket as materialized (
    select b.* from orchestrator.backlog_forecast(p_bucket, p_until, p_destination) b
  ), total as materialized (
    -- Sums of each destination.
    select b.destination as name, sum(b.due) as due, sum(b.late) as late
      , max(b.due) as peak_due, max(b.backlog) as peak_backlog, max(b.drained_at) as drained_at
      , (array_agg(b.bucket_at order by b.due desc, b.bucket_at))[1] as peak_at
      , (array_agg(b.backlog order by b.bucket_at desc))[1] as left_over
      , min(b.bucket_at) filter (where b.late > 0) as late_from
      , max(b.bucket_at) filter (where b.late > 0) + p_bucket as late_until
      , max(b.drained_at - b.bucket_at - p_bucket) as latest
      , json_agg(json_build_object(
            'at', b.bucket_at, 'due', b.due, 'starts', b.starts, 'capacity', b.capacity
          , 'backlog', b.backlog, 'late', b.late, 'drained_at', b.drained_at) order by b.bucket_at) as buckets
    from bucket b
    group by b.destination
  ), ranked as materialized (
    select t.*, row_number() over (order by t.late desc, t.peak_backlog desc, t.due desc, t.name) as place
    from total t
  ), overall as materialized (
    select b.bucket_at, sum(b.due) as due, sum(b.starts) as starts from bucket b group by b.bucket_at
  )
  select json_build_object(
    'at', n.now, 'bucket_seconds', extract(epoch from p_bucket)::double precision
  , 'until', n.now + p_until, 'paused_at', n.paused_at
  , 'due', coalesce((select sum(e.due) from overall e), 0)
  , 'late', coalesce((select sum(t.late) from total t), 0)
  , 'peak_at', (select e.bucket_at from overall e order by e.due desc, e.bucket_at limit 1)
  , 'peak_due', coalesce((select max(e.due) from overall e), 0)
  , 'buckets', coalesce((
      select json_agg(json_build_object('at', e.bucket_at, 'due', e.due, 'starts', e.starts) order by e.bucket_at)
      from overall e), '[]')
  , 'destinations', coalesce((
      select json_agg(json_build_object(
          'name', r.name, 'rate_per_second', d.rate_per_second, 'max_parallel', d.max_parallel
        , 'state', case
            when n.paused_at is not null or l.paused_at is not null then 'paused'
            when l.breaker <> 'closed' then 'breaker_' || l.breaker
            else 'ok'
          end
        , 'due', r.due, 'late', r.late, 'late_from', r.late_from, 'late_until', r.late_until
        , 'latest_seconds', extract(epoch from r.latest)::double precision
        , 'peak_at', r.peak_at, 'peak_due', r.peak_due, 'peak_backlog', r.peak_backlog
        , 'left_over', r.left_over, 'drained_at', r.drained_at
        , 'buckets', r.buckets) order by r.place)
      from ranked r
      left join orchestrator.destination d on d.name = r.name
      left join orchestrator.lane l on l.name = r.name
      where r.place <= p_limit), '[]')
  , 'others', (select count(*) from ranked r where r.place > p_limit))
  from (select orchestrator.now() as now, c.paused_at from orchestrator.control_now() c) n
$$;
comment on function orchestrator.forecast(interval, interval, text, integer) is
  'backlog_forecast() with its sums, for the p_limit destinations that have most late events; others: how many more '
  'there are. It tells when most is due, and when each backlog will have drained';

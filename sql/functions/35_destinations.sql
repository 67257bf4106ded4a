-- Destinations as operators see them: their settings, pauses and breakers. Called from psql, the CLI and the
-- API. A change holds from the next claim on; attempts under way are left alone.
--
-- Each function locks the name and the row of the destination first, then its lane, as 28_dedicated_lanes.sql
-- says: two sessions that configure one destination wait for one another, and do not deadlock.

-- Scans timer once, and looks up one event for each host in it. A scan of all events would cost a hundred
-- times as much.
create or replace function orchestrator.count_waiting(p_name text) returns bigint
language plpgsql stable security definer
set search_path = orchestrator, pg_temp as $$
declare
  v_now constant timestamptz := orchestrator.now();
begin
  -- A claim that carries a note over has no time to count, and nobody reads the answer.
  if current_setting('orchestrator.folding', true) = 'on' then
    return null;
  end if;
  if not orchestrator.is_pattern(p_name) then
    return (
      select count(*) from orchestrator.timer t
      where t.destination = hashtextextended(p_name, 0) and orchestrator.is_free(t.lease_until, v_now));
  end if;
  return (
    select coalesce(sum(h.waiting), 0)
    from (
      select t.destination, count(*) as waiting, any_value(t.event_id) as event_id
      from orchestrator.timer t
      where orchestrator.is_free(t.lease_until, v_now)
      group by t.destination) h
    cross join lateral orchestrator.destination_of(h.event_id) e
    where orchestrator.matches(e.name, p_name)
      and (select l.name from orchestrator.lane l where l.lane = orchestrator.lane_for(e.name)) = p_name);
end $$;
comment on function orchestrator.count_waiting(text) is
  'Events that wait for a destination, due or not, and that are not leased. Null within fold_destination()';

-- Messages never quote the values: a secret may stand there by mistake.
create or replace function orchestrator.check_secrets(p_name text, p_signing_secret text, p_secret_headers jsonb)
returns text
language sql immutable parallel safe as $$
  select case
    when p_signing_secret !~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$' or p_signing_secret ^@ 'whsec_'
      then 'signing_secret: expected the name of a secret, a file of SECRETS_DIRECTORY: '
        '1 to 100 letters, digits, dots, underscores and hyphens'
    when orchestrator.check_headers(p_secret_headers) is not null
      then 'secret_headers: ' || orchestrator.check_headers(p_secret_headers)
    when exists (
      select from jsonb_each_text(p_secret_headers) h where h.value !~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$')
      then (
        select format('secret_headers: expected for %s the name of a secret, a file of SECRETS_DIRECTORY: '
          '1 to 100 letters, digits, dots, underscores and hyphens', min(h.key))
        from jsonb_each_text(p_secret_headers) h where h.value !~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$')
    when p_name ^@ 'kafka:' and p_signing_secret is not null
      then 'signing_secret: expected none for a topic: only webhooks are signed'
    when p_name ^@ 'kafka:' and p_secret_headers <> '{}'
      then 'secret_headers: expected none for a topic: they are headers of webhooks'
  end
$$;
comment on function orchestrator.check_secrets(text, text, jsonb) is
  'Why these cannot be the secrets of a destination; null: they can';

-- A row that has only what is asked for. Zero turns a breaker's rule off.
create or replace function orchestrator.check_settings(p_asked orchestrator.destination) returns text
language sql stable
set search_path = orchestrator, pg_temp as $$
  select case
    when not (a.rate_per_second > 0 and a.rate_per_second <= 100000)
      then format('rate_per_second: expected more than 0 and at most 100000, got %s', a.rate_per_second)
    when a.rate_per_second < 1e-6
      then format('rate_per_second: expected at least 0.000001, one in eleven days, got %s', a.rate_per_second)
    when a.burst not between 1 and 1000000 then format('burst: expected 1 to 1000000, got %s', a.burst)
    when a.max_parallel not between 1 and 100000
      then format('max_parallel: expected 1 to 100000, got %s', a.max_parallel)
    when a.timeout not between '0.1 s' and '10 min' then format('timeout: expected 0.1 s to 10 min, got %s', a.timeout)
    when a.retry_policy is not null
      and not exists (select from orchestrator.retry_policy r where r.name = a.retry_policy)
      then format('retry_policy: there is no policy named %s; see table orchestrator.retry_policy'
        , left(a.retry_policy, 63))
    when not (a.spread > '0 s' and a.spread <= '7 days')
      then format('spread: expected more than 0 and at most 7 days, got %s', a.spread)
    when a.breaker_failures not between 0 and 1000000
      then format('breaker_failures: expected 0 (not by that) to 1000000, got %s', a.breaker_failures)
    when not (a.breaker_ratio >= 0 and a.breaker_ratio <= 1)
      then format('breaker_ratio: expected 0 (not by that) to 1, got %s', a.breaker_ratio)
    when a.breaker_minimum not between 1 and 1000000
      then format('breaker_minimum: expected 1 to 1000000, got %s', a.breaker_minimum)
    when a.breaker_window not between '1 s' and '1 hour'
      then format('breaker_window: expected 1 s to 1 hour, got %s', a.breaker_window)
    when a.breaker_cooldown not between '0.1 s' and '1 hour'
      then format('breaker_cooldown: expected 0.1 s to 1 hour, got %s', a.breaker_cooldown)
    when a.breaker_max_cooldown not between '0.1 s' and '1 day'
      then format('breaker_max_cooldown: expected 0.1 s to 1 day, got %s', a.breaker_max_cooldown)
  end
  from (select p_asked.*) a
$$;
comment on function orchestrator.check_settings(orchestrator.destination) is
  'Which of these settings of a destination is out of its range, and what was expected; null: none is';

create or replace function orchestrator.check_together(p_wanted orchestrator.destination) returns text
language sql stable
set search_path = orchestrator, pg_temp as $$
  select case
    when w.adaptive and w.max_parallel is null
      then 'adaptive: expected max_parallel with it, the most that it may find'
    when w.burst / w.rate_per_second > 2592000
      then format('burst: expected no more than 30 days of the rate, got %s', w.burst)
    when w.breaker_cooldown > w.breaker_max_cooldown
      then format('breaker_cooldown: expected at most breaker_max_cooldown, got %s', w.breaker_cooldown)
  end
  from (select p_wanted.*) w
$$;
comment on function orchestrator.check_together(orchestrator.destination) is
  'Which settings of a destination contradict each other; null: none do';

create or replace function orchestrator.destination_defaults() returns orchestrator.destination
language plpgsql stable
set search_path = orchestrator, pg_temp as $$
declare
  v_defaults orchestrator.destination;
begin
  execute (
    select 'select ' || string_agg(coalesce(pg_get_expr(d.adbin, d.adrelid), 'null'), ', ' order by a.attnum)
    from pg_attribute a
    left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
    where a.attrelid = 'orchestrator.destination'::regclass and a.attnum > 0 and not a.attisdropped)
  into v_defaults;
  return v_defaults;
end $$;
comment on function orchestrator.destination_defaults() is
  'The settings of a new destination: the defaults of the columns of its table';

create or replace function orchestrator.with_settings(
  p_destination orchestrator.destination, p_given jsonb, p_clear text[])
returns orchestrator.destination
language plpgsql stable
set search_path = orchestrator, pg_temp as $$
begin
  p_destination := jsonb_populate_record(p_destination, (
      select coalesce(jsonb_object_agg(d.key, d.value), '{}')
      from jsonb_each(to_jsonb(orchestrator.destination_defaults())) d
      where d.key = any (p_clear)) || p_given);
  p_destination.breaker_failures := nullif(p_destination.breaker_failures, 0);
  p_destination.breaker_ratio := nullif(p_destination.breaker_ratio, 0);
  p_destination.secret_headers := (
    select jsonb_object_agg(lower(h.key collate "C"), h.value) from jsonb_each(p_destination.secret_headers) h);
  return p_destination;
end $$;
comment on function orchestrator.with_settings(orchestrator.destination, jsonb, text[]) is
  'A destination with the given settings, and with defaults for those that p_clear names';

create or replace function orchestrator.store_destination(p_destination orchestrator.destination) returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
begin
  update orchestrator.destination d
  set (name, configured, rate_per_second, burst, max_parallel, adaptive, timeout, retry_policy, signing_secret
    , secret_headers, spread, breaker_failures, breaker_ratio, breaker_minimum, breaker_window, breaker_cooldown
    , breaker_max_cooldown, changed_at)
    = (select p_destination.*)
  where d.name = p_destination.name;
end $$;
comment on function orchestrator.store_destination(orchestrator.destination) is
  'Replaces the settings of a destination, which the caller has locked';

create or replace function orchestrator.configuration_note(
  p_name text, p_destination orchestrator.destination, p_lane orchestrator.lane, p_waiting bigint)
returns text
language sql stable
set search_path = orchestrator, pg_temp as $$
  select concat_ws('; '
  , 'it holds from the next claim on, and attempts under way are left alone'
  , case when lower(p_name collate "C") ~ '^https?://[^/?#]+[/?#].'
      then 'it holds for all of the host: paths have no limits of their own' end
  , case when p_waiting = 0 then 'no event waits that it would hold for at present' end
  , case when d.burst > 1 and d.rate_per_second is null then 'burst does nothing without rate_per_second' end
  , case when u.under_way > d.max_parallel
      then format('%s attempts are under way: the next starts when fewer than %s are', u.under_way, d.max_parallel) end
  , case when l.paused_at is not null then 'it is paused' end
  , case when l.breaker <> 'closed' then format('its breaker is %s', replace(l.breaker, '_', ' ')) end
  , case when (select c.paused_at from orchestrator.control_now() c) is not null then 'everything is paused' end)
  from (select p_destination.*) d
  cross join (select p_lane.*) l
  cross join lateral (
    select count(*) as under_way from orchestrator.timer t
    where t.slot = l.lane and t.lease_until > orchestrator.now()) u
$$;
comment on function orchestrator.configuration_note(
  text, orchestrator.destination, orchestrator.lane, bigint) is
  'What configure_destination() says of the settings that are now in force';

create or replace function orchestrator.configure_destination(
  p_name text,
  p_rate_per_second double precision default null,
  p_burst integer default null,
  p_max_parallel integer default null,
  p_adaptive boolean default null,
  p_timeout interval default null,
  p_retry_policy text default null,
  p_signing_secret text default null,
  p_secret_headers jsonb default null,
  p_spread interval default null,
  p_breaker_failures integer default null,  -- 0: not by that; as p_breaker_ratio
  p_breaker_ratio double precision default null,
  p_breaker_minimum integer default null,
  p_breaker_window interval default null,
  p_breaker_cooldown interval default null,
  p_breaker_max_cooldown interval default null,
  p_clear text[] default '{}')
returns table (
  name text,
  lane integer,
  rate_per_second double precision,
  burst integer,
  max_parallel integer,
  adaptive boolean,
  timeout interval,
  retry_policy text,
  signing_secret text,
  secret_headers jsonb,
  spread interval,
  breaker_failures integer,
  breaker_ratio double precision,
  breaker_minimum integer,
  breaker_window interval,
  breaker_cooldown interval,
  breaker_max_cooldown interval,
  waiting bigint,
  overlaps text[],
  note text)
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  -- Named here, and from then on only by these keys, which are columns of table destination.
  v_settings constant json := json_build_object(
    'rate_per_second', p_rate_per_second, 'burst', p_burst, 'max_parallel', p_max_parallel, 'adaptive', p_adaptive
  , 'timeout', p_timeout, 'retry_policy', p_retry_policy, 'signing_secret', p_signing_secret
  , 'secret_headers', p_secret_headers, 'spread', p_spread
  , 'breaker_failures', p_breaker_failures, 'breaker_ratio', p_breaker_ratio, 'breaker_minimum', p_breaker_minimum
  , 'breaker_window', p_breaker_window, 'breaker_cooldown', p_breaker_cooldown
  , 'breaker_max_cooldown', p_breaker_max_cooldown);
  v_names constant text[] := array(select json_object_keys(v_settings));
  v_given constant jsonb := (
    select coalesce(jsonb_object_agg(s.key, s.value), '{}') from jsonb_each(v_settings::jsonb) s
    where s.value <> 'null');
  v_now constant timestamptz := orchestrator.now();
  v_name constant text := orchestrator.as_destination(p_name);
  v_lane integer;
  v_before orchestrator.destination;
  v_after orchestrator.destination;
  v_state orchestrator.lane;
  v_waiting bigint;
  v_problem text;
begin
  -- What can be refused without a look at the destination, before it is made or locked.
  v_problem := case
    when cardinality(p_clear) > 100
      then format('p_clear: expected names of settings, got %s of them', cardinality(p_clear))
    when p_clear is null or not p_clear <@ v_names
      then format('p_clear: expected names of settings (%s), got %s'
        , array_to_string(v_names, ', '), left(p_clear::text, 200))
    when v_given ?| p_clear
      then (select format('%s: given, and in p_clear: leave one of them out', min(c)) from unnest(p_clear) c
            where v_given ? c)
    else coalesce(
      orchestrator.check_settings(jsonb_populate_record(null::orchestrator.destination, v_given))
    , orchestrator.check_secrets(v_name, p_signing_secret, p_secret_headers))
  end;
  if v_problem is null then
    -- Again, if another session deletes it in between.
    loop
      v_lane := orchestrator.ensure_dedicated_lane(v_name, true);
      select * into v_before from orchestrator.destination d where d.name = v_name for update;
      exit when found;
    end loop;
    v_after := orchestrator.with_settings(v_before, v_given, p_clear);
    v_after.changed_at := v_now;
    v_problem := orchestrator.check_together(v_after);
  end if;
  if v_problem is not null then
    raise exception '%', v_problem using errcode = 'invalid_parameter_value';
  end if;

  perform orchestrator.store_destination(v_after);
  -- The state of a limit that has changed begins again.
  update orchestrator.lane l
  set limited = orchestrator.needs_destination_row(v_after)
    , next_slot_at = case when c.rate_stays then l.next_slot_at end
    , parallel_now = case when c.bound_stays then l.parallel_now end
    , held_by = case when c.rate_stays and c.bound_stays then l.held_by end
  from (
    select (v_after.rate_per_second, v_after.burst)
        is not distinct from (v_before.rate_per_second, v_before.burst) as rate_stays
      , (v_after.max_parallel, v_after.adaptive)
        is not distinct from (v_before.max_parallel, v_before.adaptive) as bound_stays) c
  where l.lane = v_lane
  returning l.* into v_state;
  perform orchestrator.tell_due(v_now);

  v_waiting := orchestrator.count_waiting(v_name);
  return query
  select v_name, v_lane
    , v_after.rate_per_second, v_after.burst, v_after.max_parallel, v_after.adaptive, v_after.timeout
    , v_after.retry_policy, v_after.signing_secret, v_after.secret_headers, v_after.spread
    , coalesce(v_after.breaker_failures, 0), coalesce(v_after.breaker_ratio, 0), v_after.breaker_minimum
    , v_after.breaker_window, v_after.breaker_cooldown, v_after.breaker_max_cooldown
    , v_waiting
    , orchestrator.overlapping_destinations(v_name)
    , orchestrator.configuration_note(p_name, v_after, v_state, v_waiting);
end $$;
comment on function orchestrator.configure_destination(
  text, double precision, integer, integer, boolean, interval, text, text, jsonb, interval, integer, double precision
, integer, interval, interval, interval, text[]) is
  'Sets the given settings of a host, URL, kafka:topic, or of all names that match a pattern with *; p_clear names '
  'those to reset. '
  'Returns the settings in force, the number of waiting events, and other destinations that overlap';

create or replace function orchestrator.delete_destination(p_name text)
returns table (name text, waiting bigint, note text)
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_name constant text := orchestrator.as_destination(p_name);
  v_waiting bigint;
  v_instead text;
begin
  -- First, as everywhere: whoever makes or deletes a destination locks its name before its row.
  perform pg_advisory_xact_lock(hashtext('orchestrator.destination'), hashtext(v_name));
  perform from orchestrator.destination d where d.name = v_name and d.configured for update;
  if not found then
    return;
  end if;
  v_waiting := orchestrator.count_waiting(v_name);
  perform orchestrator.forget_destination(v_name);
  v_instead := case when not orchestrator.is_pattern(v_name) then orchestrator.destination_for(v_name) end;
  return query
  select v_name, v_waiting
    , case
        when v_instead is null then 'what waits moves to shared lanes as it falls due, without limits'
        else format('what waits moves to %s as it falls due', v_instead)
      end || '; attempts under way are left alone';
end $$;
comment on function orchestrator.delete_destination(text) is
  'Deletes the settings of a destination, its pause and the state of its breaker; events that wait for it are '
  'delivered all the same. '
  'No row: it was not configured';

create or replace function orchestrator.standstills()
returns table (paused_at timestamptz, destinations_paused bigint, breakers_open bigint)
language sql stable security definer
set search_path = orchestrator, pg_temp as $$
  select (select c.paused_at from orchestrator.control_now() c)
    , count(*) filter (where l.paused_at is not null)
      + (select count(*)
         from orchestrator.noted_pauses() n
         left join orchestrator.lane l on l.name = n.name
         where l.paused_at is null)
    , count(*) filter (where l.breaker <> 'closed')
  from orchestrator.lane l
  where l.name is not null and (l.paused_at is not null or l.breaker <> 'closed')
$$;
comment on function orchestrator.standstills() is
  'Since when everything is paused (null: it is not), how many destinations are paused, and how many have a breaker '
  'that is not closed';

create or replace function orchestrator.destination_json(p_name text) returns json
language sql volatile security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set enable_seqscan = off
set enable_bitmapscan = off as $$
  select json_build_object(
    'name', d.name
  , 'configured', d.configured
  , 'state', d.state
  , 'rate_per_second', d.rate_per_second
  , 'burst', d.burst
  , 'max_parallel', d.max_parallel
  , 'adaptive', d.adaptive
  , 'timeout_seconds', extract(epoch from d.timeout)::double precision
  , 'retry_policy', d.retry_policy
  , 'signing_secret', d.signing_secret
  , 'secret_headers', d.secret_headers
  , 'spread_seconds', extract(epoch from d.spread)::double precision
  , 'breaker_failures', d.breaker_failures
  , 'breaker_ratio', d.breaker_ratio
  , 'breaker_minimum', d.breaker_minimum
  , 'breaker_window_seconds', extract(epoch from d.breaker_window)::double precision
  , 'breaker_cooldown_seconds', extract(epoch from d.breaker_cooldown)::double precision
  , 'breaker_max_cooldown_seconds', extract(epoch from d.breaker_max_cooldown)::double precision
  , 'paused_at', d.paused_at
  , 'breaker', d.breaker
  , 'opened_at', d.opened_at
  , 'next_try_at', d.next_try_at
  , 'failures', d.failures
  , 'held_by', d.held_by
  , 'parallel_now', d.parallel_now
  , 'in_flight', d.in_flight
  , 'due', d.due
  , 'changed_at', d.changed_at)
  from orchestrator.destinations d
  where d.name = p_name
$$;
comment on function orchestrator.destination_json(text) is
  'A destination by its exact name, with its settings and its present state; times are in seconds';

create or replace function orchestrator.get_destination(p_name text) returns json
language sql volatile security definer
set search_path = orchestrator, pg_temp as $$
  select orchestrator.destination_json(orchestrator.as_destination(p_name))
$$;
comment on function orchestrator.get_destination(text) is
  'A destination by any name that as_destination() takes; null: there is no such destination';

create or replace function orchestrator.list_destinations(p_limit integer default 100, p_after_name text default null)
returns setof json
language sql volatile security definer
set search_path = orchestrator, pg_temp as $$
  select orchestrator.destination_json(d.name)
  from (
    select d.name from orchestrator.destination d
    where p_after_name is null or d.name > p_after_name
    order by d.name
    limit p_limit) d
$$;
comment on function orchestrator.list_destinations(integer, text) is
  'Destinations by name. The next page starts after the last name seen';

-- Destinations as operators see them: their settings, pauses and breakers. Called from psql, the CLI and the API.
-- Each function locks the destination's name and row first, then its lane, as 28_dedicated_lanes.sql says: two who configure one at once wait for
-- one another, and neither deadlocks. Pausing, resuming and closing a breaker wait for nobody: what they cannot lock, they note. All of it holds from the next claim on; attempts under way are left alone.

-- One scan of timer, and one event for each host in it: a scan of all events would cost a hundred times as much.
create or replace function orchestrator.count_waiting(p_name text) returns bigint
language plpgsql stable security definer set search_path = orchestrator, pg_temp as $$
declare
  v_now constant timestamptz := orchestrator.now();
begin
  -- A claim that carries a note over has nobody to tell, and no time to count.
  if current_setting('orchestrator.folding', true) = 'on' then
    return null;
  end if;
  if not orchestrator.is_pattern(p_name) then
    return (select count(*) from orchestrator.timer t
            where t.destination = hashtextextended(p_name, 0) and (t.lease_until is null or t.lease_until <= v_now));
  end if;
  return (
    select coalesce(sum(g.waiting), 0)
    from (select t.destination, count(*) as waiting, any_value(t.event_id) as event_id from orchestrator.timer t
          where t.lease_until is null or t.lease_until <= v_now group by t.destination) g
    cross join lateral orchestrator.destination_of(g.event_id) e
    where orchestrator.matches(e.name, p_name)
      and (select l.name from orchestrator.lane l where l.lane = orchestrator.lane_for(e.name)) = p_name);
end $$;
comment on function orchestrator.count_waiting(text) is 'Events that wait for a destination, due or not, and that no dispatcher holds; null within fold_destination()';

-- The values themselves are never quoted where a secret may stand by mistake.
create or replace function orchestrator.check_secrets(p_name text, p_signing_secret text, p_secret_headers jsonb) returns text
language sql immutable parallel safe as $$
  select case
    when p_signing_secret !~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$' or p_signing_secret ^@ 'whsec_'
      then 'signing_secret: expected the name of a secret, a file of SECRETS_DIRECTORY: 1 to 100 letters, digits, dots, underscores and hyphens'
    when orchestrator.check_headers(p_secret_headers) is not null
      then 'secret_headers: ' || orchestrator.check_headers(p_secret_headers)
    when exists (select from jsonb_each_text(p_secret_headers) h where h.value !~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$')
      then (select format('secret_headers: expected for %s the name of a secret, a file of SECRETS_DIRECTORY: 1 to 100 letters, digits, dots, underscores and hyphens', min(h.key))
            from jsonb_each_text(p_secret_headers) h where h.value !~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$')
    when p_name ^@ 'kafka:' and p_signing_secret is not null then 'signing_secret: expected none for a topic: only webhooks are signed'
    when p_name ^@ 'kafka:' and p_secret_headers <> '{}' then 'secret_headers: expected none for a topic: they are headers of webhooks'
  end
$$;
comment on function orchestrator.check_secrets(text, text, jsonb) is 'Why these cannot be the secrets of a destination; null: they can';

create or replace function orchestrator.configure_destination(
  p_name text, p_rate_per_second double precision default null, p_burst integer default null, p_max_parallel integer default null
, p_adaptive boolean default null, p_timeout interval default null, p_retry_policy text default null, p_signing_secret text default null
, p_secret_headers jsonb default null, p_spread interval default null, p_breaker_failures integer default null
, p_breaker_ratio double precision default null, p_breaker_minimum integer default null, p_breaker_window interval default null
, p_breaker_cooldown interval default null, p_breaker_max_cooldown interval default null, p_clear text[] default '{}')
returns table (name text, lane integer, rate_per_second double precision, burst integer, max_parallel integer, adaptive boolean, timeout interval
  , retry_policy text, signing_secret text, secret_headers jsonb, spread interval, breaker_failures integer, breaker_ratio double precision
  , breaker_minimum integer, breaker_window interval, breaker_cooldown interval, breaker_max_cooldown interval, waiting bigint, overlaps text[], note text)
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_settings constant text[] := '{rate_per_second,burst,max_parallel,adaptive,timeout,retry_policy,signing_secret,secret_headers,spread,breaker_failures,breaker_ratio,breaker_minimum,breaker_window,breaker_cooldown,breaker_max_cooldown}';
  v_given constant jsonb := jsonb_strip_nulls(jsonb_build_object('rate_per_second', p_rate_per_second::text, 'burst', p_burst, 'max_parallel', p_max_parallel
    , 'adaptive', p_adaptive, 'timeout', p_timeout, 'retry_policy', p_retry_policy, 'signing_secret', p_signing_secret, 'secret_headers', p_secret_headers
    , 'spread', p_spread, 'breaker_failures', p_breaker_failures, 'breaker_ratio', p_breaker_ratio::text, 'breaker_minimum', p_breaker_minimum
    , 'breaker_window', p_breaker_window, 'breaker_cooldown', p_breaker_cooldown, 'breaker_max_cooldown', p_breaker_max_cooldown));
  v_now constant timestamptz := orchestrator.now();
  v_name constant text := orchestrator.as_destination(p_name);
  v_lane integer;
  v_before orchestrator.destination;
  v_after orchestrator.destination;
  v_state orchestrator.lane;
  v_waiting bigint;
  v_under_way bigint;
  v_problem text;
begin
  v_problem := case
    when cardinality(p_clear) > 100 then format('p_clear: expected names of settings, got %s of them', cardinality(p_clear))
    when p_clear is null or not p_clear <@ v_settings then format('p_clear: expected names of settings (%s), got %s', array_to_string(v_settings, ', '), left(p_clear::text, 200))
    when v_given ?| p_clear then (select format('%s: given, and in p_clear: leave one of them out', min(c)) from unnest(p_clear) c where v_given ? c)
    when not (p_rate_per_second > 0 and p_rate_per_second <= 100000) then format('rate_per_second: expected more than 0 and at most 100000, got %s', p_rate_per_second)
    when p_rate_per_second < 1e-6 then format('rate_per_second: expected at least 0.000001, one in eleven days, got %s', p_rate_per_second)
    when p_burst not between 1 and 1000000 then format('burst: expected 1 to 1000000, got %s', p_burst)
    when p_max_parallel not between 1 and 100000 then format('max_parallel: expected 1 to 100000, got %s', p_max_parallel)
    when p_timeout not between '0.1 s' and '10 min' then format('timeout: expected 0.1 s to 10 min, got %s', p_timeout)
    when not exists (select from orchestrator.retry_policy r where r.name = p_retry_policy) and p_retry_policy is not null
      then format('retry_policy: there is no policy named %s; see table orchestrator.retry_policy', left(p_retry_policy, 63))
    when not (p_spread > '0 s' and p_spread <= '7 days') then format('spread: expected more than 0 and at most 7 days, got %s', p_spread)
    when p_breaker_failures not between 0 and 1000000 then format('breaker_failures: expected 0 (not by that) to 1000000, got %s', p_breaker_failures)
    when not (p_breaker_ratio >= 0 and p_breaker_ratio <= 1) then format('breaker_ratio: expected 0 (not by that) to 1, got %s', p_breaker_ratio)
    when p_breaker_minimum not between 1 and 1000000 then format('breaker_minimum: expected 1 to 1000000, got %s', p_breaker_minimum)
    when p_breaker_window not between '1 s' and '1 hour' then format('breaker_window: expected 1 s to 1 hour, got %s', p_breaker_window)
    when p_breaker_cooldown not between '0.1 s' and '1 hour' then format('breaker_cooldown: expected 0.1 s to 1 hour, got %s', p_breaker_cooldown)
    when p_breaker_max_cooldown not between '0.1 s' and '1 day' then format('breaker_max_cooldown: expected 0.1 s to 1 day, got %s', p_breaker_max_cooldown)
    else orchestrator.check_secrets(v_name, p_signing_secret, p_secret_headers)
  end;
  if v_problem is null then
    -- Again, where another has deleted it just then.
    loop
      v_lane := orchestrator.ensure_dedicated_lane(v_name, true);
      select * into v_before from orchestrator.destination d where d.name = v_name for update;
      exit when found;
    end loop;
    v_problem := case
      when coalesce(p_max_parallel, case when 'max_parallel' <> all (p_clear) then v_before.max_parallel end) is null
          and coalesce(p_adaptive, 'adaptive' <> all (p_clear) and v_before.adaptive)
        then 'adaptive: expected max_parallel with it, the most that it may find'
      when coalesce(p_burst, case when 'burst' = any (p_clear) then 1 else v_before.burst end)
          / coalesce(p_rate_per_second, case when 'rate_per_second' <> all (p_clear) then v_before.rate_per_second end) > 2592000
        then format('burst: expected no more than 30 days of the rate, got %s', coalesce(p_burst, v_before.burst))
      when coalesce(p_breaker_cooldown, case when 'breaker_cooldown' = any (p_clear) then '5 s' else v_before.breaker_cooldown end)
          > coalesce(p_breaker_max_cooldown, case when 'breaker_max_cooldown' = any (p_clear) then '5 min' else v_before.breaker_max_cooldown end)
        then format('breaker_cooldown: expected at most breaker_max_cooldown, got %s', coalesce(p_breaker_cooldown, v_before.breaker_cooldown))
    end;
  end if;
  if v_problem is not null then
    raise exception '%', v_problem using errcode = 'invalid_parameter_value';
  end if;
  update orchestrator.destination d
  set rate_per_second = case when 'rate_per_second' <> all (p_clear) then coalesce(p_rate_per_second, d.rate_per_second) end
    , burst = case when 'burst' = any (p_clear) then 1 else coalesce(p_burst, d.burst) end
    , max_parallel = case when 'max_parallel' <> all (p_clear) then coalesce(p_max_parallel, d.max_parallel) end
    , adaptive = 'adaptive' <> all (p_clear) and coalesce(p_adaptive, d.adaptive)
    , timeout = case when 'timeout' <> all (p_clear) then coalesce(p_timeout, d.timeout) end
    , retry_policy = case when 'retry_policy' <> all (p_clear) then coalesce(p_retry_policy, d.retry_policy) end
    , signing_secret = case when 'signing_secret' <> all (p_clear) then coalesce(p_signing_secret, d.signing_secret) end
    , secret_headers = case when 'secret_headers' <> all (p_clear) then nullif(coalesce(
        (select jsonb_object_agg(lower(h.key collate "C"), h.value) from jsonb_each(p_secret_headers) h), p_secret_headers, d.secret_headers), '{}') end
    , spread = case when 'spread' <> all (p_clear) then coalesce(p_spread, d.spread) end
    , breaker_failures = case when 'breaker_failures' = any (p_clear) then 10 else nullif(coalesce(p_breaker_failures, d.breaker_failures), 0) end
    , breaker_ratio = case when 'breaker_ratio' = any (p_clear) then 0.5 else nullif(coalesce(p_breaker_ratio, d.breaker_ratio), 0) end
    , breaker_minimum = case when 'breaker_minimum' = any (p_clear) then 20 else coalesce(p_breaker_minimum, d.breaker_minimum) end
    , breaker_window = case when 'breaker_window' = any (p_clear) then '30 s' else coalesce(p_breaker_window, d.breaker_window) end
    , breaker_cooldown = case when 'breaker_cooldown' = any (p_clear) then '5 s' else coalesce(p_breaker_cooldown, d.breaker_cooldown) end
    , breaker_max_cooldown = case when 'breaker_max_cooldown' = any (p_clear) then '5 min' else coalesce(p_breaker_max_cooldown, d.breaker_max_cooldown) end
    , changed_at = v_now
  where d.name = v_name
  returning * into v_after;
  update orchestrator.lane l
  set limited = orchestrator.is_limited(v_after)
    , next_slot_at = case when (v_after.rate_per_second, v_after.burst) is not distinct from (v_before.rate_per_second, v_before.burst) then l.next_slot_at end
    , parallel_now = case when (v_after.max_parallel, v_after.adaptive) is not distinct from (v_before.max_parallel, v_before.adaptive) then l.parallel_now end
    , held_by = case when (v_after.rate_per_second, v_after.burst, v_after.max_parallel, v_after.adaptive)
        is not distinct from (v_before.rate_per_second, v_before.burst, v_before.max_parallel, v_before.adaptive) then l.held_by end
  where l.lane = v_lane
  returning * into v_state;
  perform orchestrator.tell_due(v_now);
  v_waiting := orchestrator.count_waiting(v_name);
  v_under_way := (select count(*) from orchestrator.timer t where t.slot = v_lane and t.lease_until > v_now);
  return query
  select v_name, v_lane, v_after.rate_per_second, v_after.burst, v_after.max_parallel, v_after.adaptive, v_after.timeout, v_after.retry_policy
    , v_after.signing_secret, v_after.secret_headers, v_after.spread, coalesce(v_after.breaker_failures, 0), coalesce(v_after.breaker_ratio, 0)
    , v_after.breaker_minimum, v_after.breaker_window, v_after.breaker_cooldown, v_after.breaker_max_cooldown, v_waiting
    , orchestrator.overlapping_destinations(v_name)
    , concat_ws('; '
      , 'it holds from the next claim on, and attempts under way are left alone'
      , case when lower(p_name collate "C") ~ '^https?://[^/?#]+[/?#].' then 'it holds for all of the host: paths have no limits of their own' end
      , case when v_waiting = 0 then 'no event waits that it would hold for at present' end
      , case when v_after.burst > 1 and v_after.rate_per_second is null then 'burst does nothing without rate_per_second' end
      , case when v_under_way > v_after.max_parallel then format('%s attempts are under way: the next starts when fewer than %s are', v_under_way, v_after.max_parallel) end
      , case when v_state.paused_at is not null then 'it is paused' end
      , case when v_state.breaker <> 'closed' then format('its breaker is %s', replace(v_state.breaker, '_', ' ')) end
      , case when (select c.paused_at from orchestrator.control_now() c) is not null then 'everything is paused' end);
end $$;
comment on function orchestrator.configure_destination(text, double precision, integer, integer, boolean, interval, text, text, jsonb, interval, integer, double precision, integer, interval, interval, interval, text[]) is
  'Sets the settings of a destination that are given, leaves the others, and sets those that p_clear names back to their defaults (limits: none); see \d+ orchestrator.destination. Breakers: 0 failures, or a ratio of 0, is not by that. p_name: example.com, localhost:8443, a URL, kafka:topic, or with * for any characters: all names that match are one destination. Answers what is in force now, how many events wait for it, and which other destinations overlap';

create or replace function orchestrator.delete_destination(p_name text)
returns table (name text, waiting bigint, note text)
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_name constant text := orchestrator.as_destination(p_name);
  v_waiting bigint;
  v_instead text;
begin
  -- First, as everywhere: whoever makes or deletes a destination has this before its row.
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
    , case when v_instead is null then 'what waits moves to shared lanes as it falls due, without limits' else format('what waits moves to %s as it falls due', v_instead) end
      || '; attempts under way are left alone';
end $$;
comment on function orchestrator.delete_destination(text) is
  'Takes away a destination''s settings, its pause and the state of its breaker. Answers how many events waited for it; they are delivered all the same. No row: it was not configured';

create or replace function orchestrator.standstills()
returns table (paused_at timestamptz, destinations_paused bigint, breakers_open bigint)
language sql stable security definer set search_path = orchestrator, pg_temp as $$
  select (select c.paused_at from orchestrator.control_now() c)
    , count(*) filter (where l.paused_at is not null) + (select count(*) from orchestrator.noted_pauses() n left join orchestrator.lane l on l.name = n.name where l.paused_at is null)
    , count(*) filter (where l.breaker <> 'closed')
  from orchestrator.lane l
  where l.name is not null and (l.paused_at is not null or l.breaker <> 'closed')
$$;
comment on function orchestrator.standstills() is 'What stands still: everything (since when; null: it does not), and how many destinations by a pause, and by their breaker';

create or replace function orchestrator.destination_json(p_name text) returns json
language sql volatile security definer set search_path = orchestrator, pg_temp set timezone = 'UTC' set enable_seqscan = off set enable_bitmapscan = off as $$
  select json_build_object(
    'name', d.name, 'configured', d.configured, 'state', d.state, 'rate_per_second', d.rate_per_second, 'burst', d.burst
  , 'max_parallel', d.max_parallel, 'adaptive', d.adaptive, 'timeout_seconds', extract(epoch from d.timeout)::double precision
  , 'retry_policy', d.retry_policy, 'signing_secret', d.signing_secret, 'secret_headers', d.secret_headers
  , 'spread_seconds', extract(epoch from d.spread)::double precision
  , 'breaker_failures', d.breaker_failures, 'breaker_ratio', d.breaker_ratio, 'breaker_minimum', d.breaker_minimum
  , 'breaker_window_seconds', extract(epoch from d.breaker_window)::double precision
  , 'breaker_cooldown_seconds', extract(epoch from d.breaker_cooldown)::double precision
  , 'breaker_max_cooldown_seconds', extract(epoch from d.breaker_max_cooldown)::double precision
  , 'paused_at', d.paused_at, 'breaker', d.breaker, 'opened_at', d.opened_at, 'next_try_at', d.next_try_at, 'failures', d.failures
  , 'held_by', d.held_by, 'parallel_now', d.parallel_now, 'in_flight', d.in_flight, 'due', d.due, 'changed_at', d.changed_at)
  from orchestrator.destinations d
  where d.name = p_name
$$;
comment on function orchestrator.destination_json(text) is 'A destination by its exact name, with its settings and what it does at present; times are in seconds';

create or replace function orchestrator.get_destination(p_name text) returns json
language sql volatile security definer set search_path = orchestrator, pg_temp
as $$ select orchestrator.destination_json(orchestrator.as_destination(p_name)) $$;
comment on function orchestrator.get_destination(text) is 'One destination, by any name that as_destination() takes; null: there is no such destination';

create or replace function orchestrator.list_destinations(p_limit integer default 100, p_after_name text default null)
returns setof json
language sql volatile security definer set search_path = orchestrator, pg_temp as $$
  select orchestrator.destination_json(d.name)
  from (select d.name from orchestrator.destination d where p_after_name is null or d.name > p_after_name order by d.name limit p_limit) d
$$;
comment on function orchestrator.list_destinations(integer, text) is 'Destinations by name; the next page starts after the last name seen';

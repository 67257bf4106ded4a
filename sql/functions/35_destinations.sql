-- Destinations as operators see them: their settings, pauses and breakers. Called from psql, the CLI and the API.
-- Each function locks the destination's name and row first, then its lane, as 28_lanes.sql says: two who configure one at once wait for
-- one another, and neither deadlocks. Pausing, resuming and closing a breaker wait for nobody: what they cannot lock, they note. All of it holds from the next claim on; attempts under way are left alone.

create or replace function orchestrator.as_destination(p_name text) returns text
language plpgsql stable security definer set search_path = orchestrator, pg_temp as $$
declare
  v_name text;
  v_problem text;
begin
  if exists (select from orchestrator.destination d where d.name = p_name) then
    return p_name;
  end if;
  v_name := case
    when lower(p_name collate "C") ^@ 'kafka:' then 'kafka:' || substr(p_name, 7)
    when lower(p_name collate "C") ~ '^https?://' then orchestrator.destination_name('HTTP', lower(p_name collate "C"))
    else regexp_replace(lower(p_name collate "C"), ':(443|80)$', '') end;
  v_problem := case
    when coalesce(p_name, '') = '' then 'nothing'
    when length(v_name) > 300 then format('%s characters', length(v_name))
    when v_name ~ '@' then 'one with an @: a user name and password are no part of it'
    when v_name ~ '[[:space:][:cntrl:]]' then 'one with white space or a control character'
    when v_name ~ '^[*]+$' then '* alone: limits are per destination; orchestrator.pause_all() pauses everything'
    when v_name ^@ 'kafka:' and v_name !~ '^kafka:[A-Za-z0-9._*-]{0,249}$'
      then format('%s: a topic has at most 249 letters, digits, dots, underscores and hyphens', orchestrator.shown(v_name, 80))
    when v_name in ('kafka:.', 'kafka:..') then format('%s: no topic has such a name', v_name)
    when v_name ^@ 'kafka:' then null
    when v_name ~ E'[^\\x01-\\x7f]' then format('%s: URLs hold the xn-- form of such a host, so give that', orchestrator.shown(v_name, 80))
    when v_name ~ E'[/?#\\\\]' then format('%s: limits go by host and port, not by path', orchestrator.shown(v_name, 80))
    when v_name !~ E'^(\\[[0-9a-f:.*]+\\]|[^]:[]+)(:[0-9*]{1,5})?$' then orchestrator.shown(coalesce(nullif(v_name, ''), p_name), 80)
    when v_name ~ ':[0-9]+$' and substring(v_name from ':([0-9]+)$') !~ '^[1-9]' or substring(v_name from ':([0-9]+)$')::integer > 65535
      then format('%s: a port is from 1 to 65535', orchestrator.shown(v_name, 80))
    when v_name ~ '[*]' then case when v_name ~ '[^][a-z0-9_.:*-]|[.][.]' then format('%s: no host has such a name', orchestrator.shown(v_name, 80)) end
    when v_name ^@ '[' then case when not pg_input_is_valid(substring(v_name from '^.(.*)]'), 'inet') then format('%s: no address is written so', orchestrator.shown(v_name, 80)) end
    -- As orchestrator/urls.py has it: the last part is no number, unless all four are.
    when split_part(v_name, ':', 1) !~ '^([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?[.])*([a-z_]([a-z0-9_-]{0,61}[a-z0-9_])?|[0-9]+[a-wyz_]([a-z0-9_-]{0,30}[a-z0-9_])?)[.]?$'
        and split_part(v_name, ':', 1) !~ '^((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])[.]){3}(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])$'
      then format('%s: no host has such a name', orchestrator.shown(v_name, 80))
  end;
  if v_problem is not null then
    raise exception 'name: expected a host such as example.com or example.com:8443, a URL, kafka: and a topic, or a pattern such as *.example.com, got %', v_problem
      using errcode = 'invalid_parameter_value';
  end if;
  return v_name;
end $$;
comment on function orchestrator.as_destination(text) is
  'The name of a destination that an operator means: a URL without its path, in lower case, without a default port; refuses what can be none';

create or replace function orchestrator.destination_for(p_name text) returns text
language sql stable security definer set search_path = orchestrator, pg_temp
as $$ select l.name from orchestrator.lane l where l.lane = orchestrator.lane_for(orchestrator.as_destination(p_name)) $$;
comment on function orchestrator.destination_for(text) is 'The destination whose limits hold for a host, URL or topic: itself, or the pattern it belongs to; null: none';

-- One scan of timer, and one event for each host in it: a scan of all events would cost a hundred times as much.
create or replace function orchestrator.waiting_for(p_name text) returns bigint
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
comment on function orchestrator.waiting_for(text) is 'Events that wait for a destination, due or not, and that no dispatcher holds; null within fold_destination()';

-- Without settings of its own, so that the planner inlines it; the limit leaves it no choice but to look each event up.
create or replace function orchestrator.destination_of(p_event_id uuid) returns table (name text)
language sql stable as $$
  select orchestrator.destination_name(e.delivery_type, e.destination) from orchestrator.event e
  where e.id = p_event_id and e.scheduled_at >= uuid_extract_timestamp(p_event_id) and e.scheduled_at < uuid_extract_timestamp(p_event_id) + interval '1 ms'
  limit 1
$$;
comment on function orchestrator.destination_of(uuid) is 'The destination_name() of an event';

-- Two patterns have a name in common just when one's beginning begins the other's, and likewise their ends.
create or replace function orchestrator.overlapping_destinations(p_name text) returns text[]
language sql stable security definer set search_path = orchestrator, pg_temp as $$
  with other as (
    select d.name, orchestrator.is_pattern(d.name) as is_pattern
    from orchestrator.destination d
    where d.configured and d.name <> p_name
      and case
        when not orchestrator.is_pattern(p_name) then orchestrator.is_pattern(d.name) and orchestrator.matches(p_name, d.name)
        when not orchestrator.is_pattern(d.name) then orchestrator.matches(d.name, p_name)
        else (split_part(d.name, '*', 1) ^@ split_part(p_name, '*', 1) or split_part(p_name, '*', 1) ^@ split_part(d.name, '*', 1))
          and (reverse(split_part(d.name, '*', -1)) ^@ reverse(split_part(p_name, '*', -1))
               or reverse(split_part(p_name, '*', -1)) ^@ reverse(split_part(d.name, '*', -1)))
      end
    order by d.name
  ), told as (
    select case
        when not orchestrator.is_pattern(p_name) then format('%s gives way: an exact name goes first', o.name)
        when not o.is_pattern then format('%s goes first: an exact name', o.name)
        when (-length(replace(o.name, '*', '')), o.name) < (-length(replace(p_name, '*', '')), p_name) then format('%s goes first where both match', o.name)
        else format('%s gives way where both match', o.name)
      end as overlap, row_number() over (order by o.name) as n
    from other o
  )
  select coalesce(array_agg(t.overlap order by t.n) filter (where t.n <= 20), '{}')
      || case when count(*) > 20 then array[format('and %s more', count(*) - 20)] else '{}' end
  from told t
$$;
comment on function orchestrator.overlapping_destinations(text) is
  'Other configured destinations that a name matches or that match a pattern, and which goes first: an exact name before patterns, then the pattern with most characters besides *, then by name';

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
      v_lane := orchestrator.own_lane(v_name, true);
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
  v_waiting := orchestrator.waiting_for(v_name);
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
  v_waiting := orchestrator.waiting_for(v_name);
  perform orchestrator.forget_destination(v_name);
  v_instead := case when not orchestrator.is_pattern(v_name) then orchestrator.destination_for(v_name) end;
  return query
  select v_name, v_waiting
    , case when v_instead is null then 'what waits moves to shared lanes as it falls due, without limits' else format('what waits moves to %s as it falls due', v_instead) end
      || '; attempts under way are left alone';
end $$;
comment on function orchestrator.delete_destination(text) is
  'Takes away a destination''s settings, its pause and the state of its breaker. Answers how many events waited for it; they are delivered all the same. No row: it was not configured';

-- Pausing

-- A host that is part of a pattern takes the pattern's settings along: resumed, it must not be without limits.
create or replace function orchestrator.pause_destination(p_name text)
returns table (name text, paused_at timestamptz, in_flight bigint, waiting bigint, note text)
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_name constant text := orchestrator.as_destination(p_name);
  v_part_of constant text := (select d.name from orchestrator.destination d where d.name = orchestrator.destination_for(v_name) and d.name <> v_name);
  v_lane integer;
  v_since timestamptz;
begin
  if not orchestrator.await_destination(v_name) or orchestrator.is_pattern(v_name) and not (
    select coalesce(bool_and(orchestrator.try_destination(d.name)), true) from orchestrator.destination d where not d.configured and orchestrator.matches(d.name, v_name)) then
    select l.lane into v_lane from orchestrator.lane l where l.name = v_name;
    if v_lane is null and orchestrator.is_pattern(v_name) then
      raise exception 'name: % cannot be paused yet: %', v_name, orchestrator.note_destination(v_name, 'pause') using errcode = 'lock_not_available';
    end if;
    perform orchestrator.hold_lane(h.lane)
    from unnest(case when orchestrator.is_pattern(v_name) then array[null::integer] else array[v_lane, (hashtextextended(v_name, 0) & 63)::integer] end) as h (lane)
    where h.lane is not null or orchestrator.is_pattern(v_name);
    return query
    select v_name, v_now, (select count(*) from orchestrator.timer t where t.destination = hashtextextended(v_name, 0) and t.lease_until > v_now)
      , orchestrator.waiting_for(v_name)
      , concat_ws('; ', 'no attempt begins until it is resumed; those under way are left alone', orchestrator.note_destination(v_name, 'pause'));
    return;
  end if;
  perform orchestrator.fold_destination(v_name) where exists (select from orchestrator.control_note n where n.name = v_name);
  v_lane := orchestrator.own_lane(v_name, true);
  if v_part_of is not null then
    update orchestrator.destination d
    set (rate_per_second, burst, max_parallel, adaptive, timeout, retry_policy, signing_secret, secret_headers, spread
        , breaker_failures, breaker_ratio, breaker_minimum, breaker_window, breaker_cooldown, breaker_max_cooldown)
      = (select o.rate_per_second, o.burst, o.max_parallel, o.adaptive, o.timeout, o.retry_policy, o.signing_secret, o.secret_headers, o.spread
        , o.breaker_failures, o.breaker_ratio, o.breaker_minimum, o.breaker_window, o.breaker_cooldown, o.breaker_max_cooldown
         from orchestrator.destination o where o.name = v_part_of)
    where d.name = v_name;
  end if;
  update orchestrator.lane l
  set paused_at = coalesce(l.paused_at, v_now)
    , limited = (select orchestrator.is_limited(d) from orchestrator.destination d where d.name = v_name)
  where l.lane = v_lane
  returning l.paused_at into v_since;
  -- What dispatchers were given before it had this lane, they know by another.
  perform orchestrator.hold_lane(h.lane)
  from unnest(case when orchestrator.is_pattern(v_name) or v_part_of is not null then array[null::integer]
    else array[v_lane, (hashtextextended(v_name, 0) & 63)::integer] end) as h (lane);
  return query
  select v_name, v_since, d.in_flight, orchestrator.waiting_for(v_name)
    , concat_ws('; ', 'no attempt begins until it is resumed; those under way are left alone'
      , case when v_since < v_now then 'it was paused before' end
      , case when v_part_of is not null then format('it was part of %s, and has its settings as its own now', v_part_of) end)
  from orchestrator.destinations d
  where d.name = v_name;
end $$;
comment on function orchestrator.pause_destination(text) is
  'Has no attempt begin to a destination until resume_destination(), through restarts too; it need not be configured. Dispatchers hand back what they hold for it. It is noted while another session has the destination locked; a pattern that has no lane yet is refused then';

create or replace function orchestrator.resume_destination(p_name text)
returns table (name text, paused_at timestamptz, resumed boolean, waiting bigint, note text)
language plpgsql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC' as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_name constant text := orchestrator.as_destination(p_name);
  v_has boolean;
  v_before timestamptz;
  v_breaker text;
begin
  v_has := orchestrator.await_destination(v_name);
  perform orchestrator.fold_destination(v_name) where v_has and exists (select from orchestrator.control_note n where n.name = v_name);
  -- A pattern's pause stays a note while one that it matches is held.
  if not v_has or exists (select from orchestrator.control_note n where n.name = v_name) then
    return query select v_name, null::timestamptz, true, orchestrator.waiting_for(v_name), orchestrator.note_destination(v_name, 'resume');
    return;
  end if;
  update orchestrator.lane l
  set paused_at = null
    , last_paused_at = coalesce(l.paused_at, l.last_paused_at)
    , resumed_at = case when l.paused_at is null then l.resumed_at else v_now end
  where l.name = v_name
  returning old.paused_at, l.breaker into v_before, v_breaker;
  if not found then
    return;
  end if;
  perform orchestrator.tell_due(v_now);
  return query
  select v_name, null::timestamptz, v_before is not null, orchestrator.waiting_for(v_name)
    , concat_ws('; ', case when v_before is null then 'it was not paused' else format('it was paused since %s', to_json(v_before) #>> '{}') end
      , case when v_breaker <> 'closed' then format('its breaker is %s', replace(v_breaker, '_', ' ')) end
      , case when (select c.paused_at from orchestrator.control_now() c) is not null then 'everything is paused, and so is it' end);
end $$;
comment on function orchestrator.resume_destination(text) is 'Ends the pause of a destination; what is due goes at once, under its limits. No row: there is no such destination';

create or replace function orchestrator.pause_all()
returns table (paused_at timestamptz, in_flight bigint, note text)
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_since timestamptz;
begin
  perform orchestrator.note_control('pause');
  v_since := (select c.paused_at from orchestrator.control_now() c);
  perform orchestrator.hold_lane(null);
  return query
  select v_since, (select count(*) from orchestrator.timer t where t.lease_until > v_now)
    , concat_ws('; ', 'no attempt begins anywhere until everything is resumed; those under way are left alone'
      , case when v_since < v_now then 'it was paused before' end);
end $$;
comment on function orchestrator.pause_all() is 'Has no attempt begin at all until resume_all(), through restarts too; submissions are kept all the same';

create or replace function orchestrator.resume_all()
returns table (paused_at timestamptz, resumed boolean, destinations_paused bigint, breakers_open bigint, note text)
language plpgsql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC' as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_before constant timestamptz := (select c.paused_at from orchestrator.control_now() c);
begin
  perform orchestrator.note_control('resume');
  perform orchestrator.tell_due(v_now);
  return query
  select s.paused_at, v_before is not null, s.destinations_paused, s.breakers_open
    , concat_ws('; ', case when v_before is null then 'it was not paused' else format('it was paused since %s', to_json(v_before) #>> '{}') end
      , case when s.destinations_paused > 0 then 'destinations that were paused by themselves still are' end)
  from orchestrator.standstills() s;
end $$;
comment on function orchestrator.resume_all() is 'Ends the pause of everything; destinations that were paused by themselves stay so';

create or replace function orchestrator.close_breaker(p_name text)
returns table (name text, closed boolean, waiting bigint, note text)
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_name constant text := orchestrator.as_destination(p_name);
  v_before text;
  v_paused boolean;
begin
  if not orchestrator.await_destination(v_name) then
    return query select v_name, true, orchestrator.waiting_for(v_name), orchestrator.note_destination(v_name, 'close_breaker');
    return;
  end if;
  perform orchestrator.fold_destination(v_name) where exists (select from orchestrator.control_note n where n.name = v_name);
  update orchestrator.lane l
  set breaker = 'closed', open_until = '-infinity', openings = 0, failures = 0, window_at = null, window_attempts = 0, window_failures = 0
    , closed_at = case when l.breaker = 'closed' then l.closed_at else v_now end
  where l.name = v_name
  returning old.breaker, new.paused_at is not null into v_before, v_paused;
  if not found then
    return;
  end if;
  perform orchestrator.tell_due(v_now);
  return query
  select v_name, v_before <> 'closed', orchestrator.waiting_for(v_name)
    , concat_ws('; ', case when v_before = 'closed' then 'it was closed' else 'it opens again when attempts go on failing' end
      , case when v_paused then 'the destination is paused' end);
end $$;
comment on function orchestrator.close_breaker(text) is 'Closes a destination''s breaker without waiting for its next try. No row: there is no such destination';

-- Asking

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

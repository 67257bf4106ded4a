-- Names of destinations: which host, topic or pattern an event goes by, and which lane that name waits in.
-- Used by submission, claims and operators.

-- Without a sub-select, so that the planner inlines it: it is computed for each submission. Default ports are
-- rare, and cost a regular expression. Hosts are ASCII, and are folded as such: in a Turkish database
-- lower('I') would be ı.
create or replace function orchestrator.destination_name(p_delivery_type text, p_destination text) returns text
language sql immutable parallel safe
return case
  when p_delivery_type = 'KAFKA' then 'kafka:' || coalesce(p_destination, '')
  when strpos(p_destination, ':443') = 0 and strpos(p_destination, ':80') = 0
    and strpos(lower(p_destination collate "C"), '//kafka:') = 0
    then lower(split_part(split_part(split_part(p_destination, '/', 3), '?', 1), '#', 1) collate "C")
  else regexp_replace(
    regexp_replace(
      lower(split_part(split_part(split_part(p_destination, '/', 3), '?', 1), '#', 1) collate "C")
    , case when p_destination ^@ 'https:' then ':443$' else ':80$' end, '')
  , '^kafka:', 'kafka.:')
end;
comment on function orchestrator.destination_name(text, text) is
  'What limits, breakers and fairness go by: host and port of a URL in lower case without a default port, or kafka: '
  'and the topic. '
  'The ready topic is empty; a host called kafka is written with the dot of the DNS root, kafka.:9092';

create or replace function orchestrator.is_pattern(p_name text) returns boolean
language sql immutable parallel safe
return strpos(p_name, '*') > 0;
comment on function orchestrator.is_pattern(text) is
  'Whether the name of a destination stands for all names that match it';

create or replace function orchestrator.matches(p_name text, p_pattern text) returns boolean
language sql immutable parallel safe
return p_name like replace(replace(replace(replace(p_pattern, '\', '\\'), '%', '\%'), '_', '\_'), '*', '%');
comment on function orchestrator.matches(text, text) is
  'Whether a name matches a pattern, in which * stands for any characters';

create or replace function orchestrator.pattern_lane(p_name text) returns integer
language sql stable security definer
set search_path = orchestrator, pg_temp as $$
  select l.lane from orchestrator.lane l
  where l.name is not null and l.hash is null and orchestrator.matches(p_name, l.name)
  order by length(replace(l.name, '*', '')) desc, l.name
  limit 1
$$;
comment on function orchestrator.pattern_lane(text) is
  'Lane of the pattern that a name belongs to; null: none. '
  'Of several it is the one with most characters besides *, then the first by name';

create or replace function orchestrator.lane_for(p_name text) returns integer
language sql stable security definer
set search_path = orchestrator, pg_temp as $$
  select coalesce(
    (select l.lane from orchestrator.lane l where l.hash = hashtextextended(p_name, 0))
  , orchestrator.pattern_lane(p_name)
  , (hashtextextended(p_name, 0) & 63)::integer)
$$;
comment on function orchestrator.lane_for(text) is
  'Lane of a destination by its name: its dedicated lane, that of a pattern, or a shared lane';

create or replace function orchestrator.as_destination(p_name text) returns text
language plpgsql stable security definer
set search_path = orchestrator, pg_temp as $$
declare
  v_name text;
  v_problem text;
begin
  if exists (select from orchestrator.destination d where d.name = p_name) then
    return p_name;
  end if;
  v_name := case
    when lower(p_name collate "C") ^@ 'kafka:' then 'kafka:' || substr(p_name, 7)
    when lower(p_name collate "C") ~ '^https?://'
      then orchestrator.destination_name('HTTP', lower(p_name collate "C"))
    else regexp_replace(lower(p_name collate "C"), ':(443|80)$', '') end;
  v_problem := case
    when coalesce(p_name, '') = '' then 'nothing'
    when length(v_name) > 300 then format('%s characters', length(v_name))
    when v_name ~ '@' then 'one with an @: a user name and password are no part of it'
    when v_name ~ '[[:space:][:cntrl:]]' then 'one with white space or a control character'
    when v_name ~ '^[*]+$' then '* alone: limits are per destination; orchestrator.pause_all() pauses everything'
    when v_name ^@ 'kafka:' and v_name !~ '^kafka:[A-Za-z0-9._*-]{0,249}$'
      then format('%s: a topic has at most 249 letters, digits, dots, underscores and hyphens'
        , orchestrator.shown(v_name, 80))
    when v_name in ('kafka:.', 'kafka:..') then format('%s: no topic has such a name', v_name)
    when v_name ^@ 'kafka:' then null
    when v_name ~ E'[^\\x01-\\x7f]'
      then format('%s: URLs hold the xn-- form of such a host, so give that', orchestrator.shown(v_name, 80))
    when v_name ~ E'[/?#\\\\]'
      then format('%s: limits go by host and port, not by path', orchestrator.shown(v_name, 80))
    when v_name !~ E'^(\\[[0-9a-f:.*]+\\]|[^]:[]+)(:[0-9*]{1,5})?$'
      then orchestrator.shown(coalesce(nullif(v_name, ''), p_name), 80)
    when v_name ~ ':[0-9]+$' and substring(v_name from ':([0-9]+)$') !~ '^[1-9]'
      or substring(v_name from ':([0-9]+)$')::integer > 65535
      then format('%s: a port is from 1 to 65535', orchestrator.shown(v_name, 80))
    when v_name ~ '[*]'
      then case
        when v_name ~ '[^][a-z0-9_.:*-]|[.][.]'
          then format('%s: no host has such a name', orchestrator.shown(v_name, 80)) end
    when v_name ^@ '['
      then case
        when not pg_input_is_valid(substring(v_name from '^.(.*)]'), 'inet')
          then format('%s: no address is written so', orchestrator.shown(v_name, 80)) end
    -- As in orchestrator/events/urls.py: the last part is no number, unless all four are.
    when split_part(v_name, ':', 1) !~ (
          '^([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?[.])*'
          '([a-z_]([a-z0-9_-]{0,61}[a-z0-9_])?|[0-9]+[a-wyz_]([a-z0-9_-]{0,30}[a-z0-9_])?)[.]?$')
        and split_part(v_name, ':', 1) !~ (
          '^((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])[.]){3}'
          '(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])$')
      then format('%s: no host has such a name', orchestrator.shown(v_name, 80))
  end;
  if v_problem is not null then
    raise exception 'name: expected a host such as example.com or example.com:8443, a URL, kafka: and a topic, '
      'or a pattern such as *.example.com, got %', v_problem
      using errcode = 'invalid_parameter_value';
  end if;
  return v_name;
end $$;
comment on function orchestrator.as_destination(text) is
  'The name of the destination that an operator means: a URL without its path, in lower case, without a default port. '
  'Refuses what cannot be a name';

create or replace function orchestrator.destination_for(p_name text) returns text
language sql stable security definer
set search_path = orchestrator, pg_temp as $$
  select l.name from orchestrator.lane l
  where l.lane = orchestrator.lane_for(orchestrator.as_destination(p_name))
$$;
comment on function orchestrator.destination_for(text) is
  'The destination whose limits hold for a host, URL or topic: itself, or the pattern it belongs to; null: none';

-- Without settings of its own, so that the planner inlines it. The limit makes it look each event up by its
-- key.
create or replace function orchestrator.destination_of(p_event_id uuid) returns table (name text)
language sql stable as $$
  select orchestrator.destination_name(e.delivery_type, e.destination) from orchestrator.event e
  where e.id = p_event_id
    and orchestrator.in_millisecond_of(p_event_id, e.scheduled_at)
  limit 1
$$;
comment on function orchestrator.destination_of(uuid) is 'The destination_name() of an event';

create or replace function orchestrator.overlapping_destinations(p_name text) returns text[]
language sql stable security definer
set search_path = orchestrator, pg_temp as $$
  with other as (
    select d.name, orchestrator.is_pattern(d.name) as is_pattern
    from orchestrator.destination d
    where d.configured and d.name <> p_name
      and case
        when not orchestrator.is_pattern(p_name)
          then orchestrator.is_pattern(d.name) and orchestrator.matches(p_name, d.name)
        when not orchestrator.is_pattern(d.name) then orchestrator.matches(d.name, p_name)
        -- Two patterns have a name in common just when the beginning of one begins the other's, and so do
        -- their ends.
        else (split_part(d.name, '*', 1) ^@ split_part(p_name, '*', 1)
            or split_part(p_name, '*', 1) ^@ split_part(d.name, '*', 1))
          and (reverse(split_part(d.name, '*', -1)) ^@ reverse(split_part(p_name, '*', -1))
            or reverse(split_part(p_name, '*', -1)) ^@ reverse(split_part(d.name, '*', -1)))
      end
    order by d.name
  ), described as (
    -- Which goes first, as in pattern_lane().
    select row_number() over (order by o.name) as n
      , case
          when not orchestrator.is_pattern(p_name) then format('%s gives way: an exact name goes first', o.name)
          when not o.is_pattern then format('%s goes first: an exact name', o.name)
          when (-length(replace(o.name, '*', '')), o.name) < (-length(replace(p_name, '*', '')), p_name)
            then format('%s goes first where both match', o.name)
          else format('%s gives way where both match', o.name)
        end as overlap
    from other o
  )
  select coalesce(array_agg(d.overlap order by d.n) filter (where d.n <= 20), '{}')
    || case when count(*) > 20 then array[format('and %s more', count(*) - 20)] else '{}' end
  from described d
$$;
comment on function orchestrator.overlapping_destinations(text) is
  'Other configured destinations that match the same names, and which goes first. '
  'An exact name goes before patterns, then the pattern with most characters besides *, then by name';

-- The clock and the event id. Used by every other function; event_id() has a twin in orchestrator/events.py.

create or replace function orchestrator.now() returns timestamptz
language sql volatile parallel safe
return coalesce(nullif(current_setting('orchestrator.now', true), '')::timestamptz, clock_timestamp());
comment on function orchestrator.now() is
  'The only clock. Tests set it for their session: set orchestrator.now = ''2030-01-01T00:00:00Z''';

-- Invariant: equal triples give equal ids everywhere; the length of source keeps ('ab','c') apart from ('a','bc').
create or replace function orchestrator.event_id(p_source text, p_external_job_id text, p_scheduled_at timestamptz) returns uuid
language sql immutable strict parallel safe
begin atomic
  select encode(
      set_byte(set_byte(b.bytes, 6, (get_byte(b.bytes, 6) & 15) | 112), 8, (get_byte(b.bytes, 8) & 63) | 128), 'hex')::uuid
  from (select (extract(epoch from p_scheduled_at) * 1000000)::bigint as micros) t
  cross join lateral (
    select substr(int8send(t.micros / 1000), 3)
        || substr(sha256(convert_to(format('%s:%s:', t.micros, octet_length(p_source)) || p_source || p_external_job_id, 'UTF8')), 1, 10)
        as bytes) b;
end;
comment on function orchestrator.event_id(text, text, timestamptz) is
  'The id of (source, external_job_id, scheduled_at): a UUID laid out as version 7 (RFC 9562), 48 bits of milliseconds of scheduled_at and 74 bits of a SHA-256 over the triple';

create or replace function orchestrator.random_event_id(p_scheduled_at timestamptz) returns uuid
language sql volatile strict parallel safe
return orchestrator.event_id('', gen_random_uuid()::text, p_scheduled_at);
comment on function orchestrator.random_event_id(timestamptz) is 'The id of an event that has no external_job_id';

-- Without a sub-select, so that the planner inlines it: it is computed for each submission. Default ports are rare, and cost a regular expression.
create or replace function orchestrator.destination_name(p_delivery_type text, p_destination text) returns text
language sql immutable parallel safe
return case
  when p_delivery_type = 'KAFKA' then 'kafka:' || coalesce(p_destination, '')
  when strpos(p_destination, ':443') = 0 and strpos(p_destination, ':80') = 0 and strpos(lower(p_destination), '//kafka:') = 0
    then lower(split_part(split_part(split_part(p_destination, '/', 3), '?', 1), '#', 1))
  else regexp_replace(
    regexp_replace(lower(split_part(split_part(split_part(p_destination, '/', 3), '?', 1), '#', 1)), case when p_destination ^@ 'https:' then ':443$' else ':80$' end, '')
    , '^kafka:', 'kafka.:')
end;
comment on function orchestrator.destination_name(text, text) is
  'What limits, breakers and fairness go by: host and port of a URL in lower case, without the scheme''s default port; kafka: and the topic, which is empty for the ready topic. A host called kafka is written as the root names it, kafka.:9092';

create or replace function orchestrator.spread_shift(p_id uuid, p_spread interval) returns interval
language sql immutable strict parallel safe
return p_spread * (('x' || right(p_id::text, 8))::bit(32)::bigint / 4294967296.0::double precision);
comment on function orchestrator.spread_shift(uuid, interval) is
  'How much of a spread an event is shifted by: a share from 0 to just under 1 that its id decides, so the same event is always shifted alike';

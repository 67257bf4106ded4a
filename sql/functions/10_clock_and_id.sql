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

create or replace function orchestrator.lane_of(p_destination text) returns integer
language sql immutable parallel safe
return hashtext(lower(coalesce(nullif(split_part(p_destination, '/', 3), ''), p_destination, ''))) & 63;
comment on function orchestrator.lane_of(text) is 'The shared lane of a URL, by its host and port, or of a topic; null: the ready topic';

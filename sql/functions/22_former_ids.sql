-- Ids that were made before the id held a bucket, while events with such ids may still be kept.

create or replace function orchestrator.former_event_id(
  p_source text, p_external_job_id text, p_scheduled_at timestamptz)
returns uuid
language sql immutable parallel safe
return encode(set_bit(set_bit(set_bit(set_bit(set_bit(set_bit(
    substr(int8send((extract(epoch from p_scheduled_at) * 1000000)::bigint / 1000), 3)
    || substr(sha256(convert_to(
         format('%s:%s:', (extract(epoch from p_scheduled_at) * 1000000)::bigint, octet_length(p_source))
         || p_source || p_external_job_id, 'UTF8')), 1, 10)
  , 55, 0), 54, 1), 53, 1), 52, 1), 71, 1), 70, 0), 'hex')::uuid;
comment on function orchestrator.former_event_id(text, text, timestamptz) is
  'The id of (source, external_job_id, scheduled_at) by the formula that had no bucket; see recognise_former_ids()';

-- Events kept by the formula that had no bucket keep their ids, and programs older than the bucket stage such
-- ids: whichever was kept first stays. Two that submit the same by different formulas at one instant do not
-- see each other, and both are kept.
create or replace function orchestrator.recognise_former_ids() returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
  v_until timestamptz;
begin
  with named as materialized (
    select s.ctid as place, s.id, s.scheduled_at, s.source, s.external_job_id, s.ordering_key
      , orchestrator.former_event_id(s.source, s.external_job_id, s.scheduled_at) as former
    from pg_temp.submission s
    where s.external_job_id is not null
      and s.scheduled_at between '1970-01-01 00:00:00+00' and '2200-12-31 23:59:59.999999+00'
  ),
  -- Their ids become those of the events that are kept by the other formula.
  other as (
    update pg_temp.submission s
    set id = k.id
    from (
      select n.place, e.id
      from named n
      cross join lateral (
        select case
          when n.id = n.former
            then orchestrator.event_id(n.source, n.external_job_id, n.scheduled_at, n.ordering_key)
          else n.former end as id offset 0) o
      cross join lateral (
        select e.id from orchestrator.event e
        where e.id = o.id and e.scheduled_at = n.scheduled_at and e.ordering_key is not distinct from n.ordering_key
        union all
        select h.id from orchestrator.horizon h
        where h.id = o.id and h.scheduled_at = n.scheduled_at
          and h.ordering_key is not distinct from n.ordering_key) e) k
    where s.ctid = k.place
  )
  select max(n.scheduled_at) filter (where n.id = n.former) into v_until from named n;
  -- Once a month at most, by a program older than the bucket.
  update orchestrator.control c set former_ids_until = v_until + interval '30 days' where c.former_ids_until < v_until;
end $$;
comment on function orchestrator.recognise_former_ids() is
  'Gives staged submissions the id under which their event is kept already, where that is the one of the other '
  'formula; see control.former_ids_until';

create or replace function orchestrator.forget_former_ids() returns void
language sql security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off as $$
  update orchestrator.control c
  set former_ids_until = null
  where c.former_ids_until < (select b.first_day from orchestrator.partition_bounds() b)
    and not exists (
      select from orchestrator.horizon h
      where h.id < orchestrator.first_id(c.former_ids_until + interval '1 ms'))
$$;
comment on function orchestrator.forget_former_ids() is
  'Lets submissions look under one id alone, once the days are gone that may have events under former_event_id()';

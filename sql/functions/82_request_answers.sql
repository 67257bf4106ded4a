-- Answers, stored with the changes that they report. Clients store one in the transaction of the change,
-- and ask for it when the reply was lost.

-- Two runs of one call cannot both commit: the second violates the primary key, and all that it did is
-- rolled back.
create or replace function orchestrator.keep_answer(p_request uuid, p_answer json) returns void
language sql security definer
set search_path = orchestrator, pg_temp
as $$
  insert into orchestrator.request (id, kept_at, answer)
  values (p_request, orchestrator.now(), coalesce(p_answer, '[]'))
$$;
comment on function orchestrator.keep_answer(uuid, json) is
  'Stores the answer of a call, in the transaction of its changes; null: no rows. '
  'Fails with unique_violation if this p_request has an answer already';

create or replace function orchestrator.kept_answer(p_request uuid) returns json
language sql stable security definer
set search_path = orchestrator, pg_temp
as $$
  select r.answer from orchestrator.request r where r.id = p_request
$$;
comment on function orchestrator.kept_answer(uuid) is
  'What that call answered; null: it did not commit, or not yet, or more than ten minutes ago';

create or replace function orchestrator.forget_requests(p_now timestamptz) returns bigint
language sql security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
  with gone as (
    delete from orchestrator.request r
    where r.ctid = any (array(
      select r.ctid from orchestrator.request r
      where r.kept_at < p_now - interval '10 minutes'
      limit 100000
      for update skip locked))
    returning 1)
  select count(*) from gone
$$;
comment on function orchestrator.forget_requests(timestamptz) is
  'Deletes up to 100,000 answers that are older than ten minutes; returns how many';

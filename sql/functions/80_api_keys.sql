-- Keys of the HTTP API. Called by the API (find_api_key) and by operators.

create or replace function orchestrator.find_api_key(p_key_hash bytea) returns table (name text, scopes text[])
language sql stable security definer
set search_path = orchestrator, pg_temp
as $$
  select k.name, k.scopes from orchestrator.api_key k where k.key_hash = p_key_hash
$$;
comment on function orchestrator.find_api_key(bytea) is 'The key with this SHA-256; no row: there is none';

create or replace function orchestrator.count_api_keys() returns bigint
language sql stable security definer
set search_path = orchestrator, pg_temp
as $$
  select count(*) from orchestrator.api_key
$$;
comment on function orchestrator.count_api_keys() is 'How many keys there are';

create or replace function orchestrator.create_api_key(p_name text, p_key_hash bytea, p_scopes text[]) returns void
language sql security definer
set search_path = orchestrator, pg_temp
as $$
  insert into orchestrator.api_key (name, key_hash, scopes) values (p_name, p_key_hash, p_scopes)
$$;
comment on function orchestrator.create_api_key(text, bytea, text[]) is
  'Stores the SHA-256 of a key that the caller made';

create or replace function orchestrator.revoke_api_key(p_name text) returns boolean
language sql security definer
set search_path = orchestrator, pg_temp
as $$
  with gone as (delete from orchestrator.api_key k where k.name = p_name returning 1)
  select exists (select from gone)
$$;
comment on function orchestrator.revoke_api_key(text) is
  'Deletes a key; running APIs notice within seconds. False: there is no such key';

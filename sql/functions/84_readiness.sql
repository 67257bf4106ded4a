-- Whether this session can do its work. Called by readiness probes, at most once a second for each process.

-- A logical message takes a transaction id and a flush of WAL, as any submission does, and leaves no row.
create or replace function orchestrator.prove_writing() returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
as $$
begin
  if current_setting('transaction_read_only')::boolean then
    raise exception '%'
      , case when pg_is_in_recovery() then 'it is a standby' else 'default_transaction_read_only is on' end
      using errcode = 'read_only_sql_transaction';
  end if;
  perform pg_logical_emit_message(true, 'orchestrator', '');
end $$;
comment on function orchestrator.prove_writing() is
  'Fails unless this session may write and the server can commit, and says why. '
  'A standby, a read-only session, or no room for WAL make it fail';

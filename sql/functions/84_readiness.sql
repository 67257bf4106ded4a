-- Whether this session can do its work. Called by readiness probes, at most once a second for each process.

-- The message goes into the log of the server's own making: it takes a transaction id and a flush of WAL, as any submission does, and no row.
create or replace function orchestrator.prove_writing() returns void
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
begin
  if current_setting('transaction_read_only')::boolean then
    raise exception '%', case when pg_is_in_recovery() then 'it is a standby' else 'default_transaction_read_only is on' end
      using errcode = 'read_only_sql_transaction';
  end if;
  perform pg_logical_emit_message(true, 'orchestrator', '');
end $$;
comment on function orchestrator.prove_writing() is
  'Proves that this session may write and that the server commits: not a standby, not read-only, with transaction ids and room for WAL left. Fails with what is in the way';

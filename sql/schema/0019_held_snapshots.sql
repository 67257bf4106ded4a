-- While another session's transaction stays open, vacuum removes nothing: whatever looks at ended timers, or
-- at former versions of a row, takes longer with each of them.

-- Counts of attempts under way begin at the floor of their lane.
drop index orchestrator.timer_slot;
create index timer_slot on orchestrator.timer (slot, due_at) where slot is not null;

-- The row that holds comes before its former versions: see newest_control().
create index control_newest on orchestrator.control (floors_at);

-- Nothing is ever looked for in these columns, and to analyze them takes longer than all others.
do $$
declare
  v_table regclass;
begin
  for v_table in select t.relid from pg_partition_tree('orchestrator.event') t loop
    execute format('alter table %s alter headers set statistics 0, alter payload set statistics 0', v_table);
  end loop;
  for v_table in select t.relid from pg_partition_tree('orchestrator.delivered_batch') t loop
    execute format('alter table %s alter ids set statistics 0, alter scheduled_us set statistics 0'
      ', alter due_us set statistics 0, alter claimed_us set statistics 0, alter started_us set statistics 0'
      ', alter finished_us set statistics 0, alter status_codes set statistics 0', v_table);
  end loop;
end $$;

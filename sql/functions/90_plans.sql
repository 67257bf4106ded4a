-- Plans of hot functions. A session makes a plan once, often while tables are small, and keeps it while
-- they grow. So a plan must be right by its shape, whatever statistics, costs or an operator's settings
-- say. A function that names one setting of the planner is pinned: it names those that differ from the
-- list below, and gets all the others here. Applied after all functions, whenever one of them was.

-- Material and memoize are off: a nested loop looks up by key what it needs, and never stores the other
-- side.
do $$
declare
  v_pins constant jsonb := '{
    "plan_cache_mode": "force_generic_plan",
    "jit": "off", "max_parallel_workers_per_gather": "0", "debug_parallel_query": "off",
    "enable_nestloop": "on", "enable_hashjoin": "on", "enable_mergejoin": "on",
    "enable_material": "off", "enable_memoize": "off",
    "enable_seqscan": "on", "enable_bitmapscan": "on", "enable_tidscan": "on",
    "enable_indexscan": "on", "enable_indexonlyscan": "on",
    "enable_sort": "on", "enable_incremental_sort": "on", "enable_hashagg": "on",
    "enable_partition_pruning": "on", "enable_partitionwise_join": "off", "enable_partitionwise_aggregate": "off",
    "join_collapse_limit": "8", "from_collapse_limit": "8",
    "seq_page_cost": "1", "random_page_cost": "4", "cpu_tuple_cost": "0.01", "cpu_index_tuple_cost": "0.005",
    "cpu_operator_cost": "0.0025", "effective_cache_size": "4GB"}';
  v_clauses text;
  v_function regprocedure;
begin
  for v_function, v_clauses in
    select p.oid, string_agg(format('set %I = %L', pin.key, pin.value), ' ' order by pin.key)
    from pg_proc p
    cross join lateral (select array_agg(split_part(c, '=', 1)) as names from unnest(p.proconfig) c) given
    cross join jsonb_each_text(v_pins) pin
    where p.pronamespace = 'orchestrator'::regnamespace
      and exists (select from jsonb_object_keys(v_pins) k where k = any (given.names))
      and pin.key <> all (given.names)
    group by p.oid
  loop
    execute format('alter function %s %s', v_function, v_clauses);
  end loop;
end $$;

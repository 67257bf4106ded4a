-- Where a lease's timer stands, so that its result need not search for it.

alter type orchestrator.leased add attribute at tid;
comment on column orchestrator.leased.at is
  'Where the timer stands in its table; null: it has moved since it was leased. A hint: event_id and attempt decide';

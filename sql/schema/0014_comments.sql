-- Plainer words for what \d+ shows.

-- Retry policies and workers.
comment on table orchestrator.retry_policy is
  'Named retry backoffs: how long after a failed attempt the next one is due';
comment on column orchestrator.retry_policy.name is
  'The name that events give as retry_policy; ''default'' applies to events that give none';
comment on column orchestrator.retry_policy.max_delay is
  'Longest delay, whether it is computed or asked for by a Retry-After header';
comment on column orchestrator.retry_policy.schedule is
  'Explicit delays, one for each failed attempt; the last one repeats. Replaces initial_delay and '
  'multiplier.';
comment on column orchestrator.retry_policy.dead_blocks is
  'Whether a dead event blocks later events of its ordering key, until it is redriven or pass_dead_letter() '
  'lets them go on';
comment on column orchestrator.worker.worker is
  'Number that timer and outcome refer to; 0: whoever claims by hand, in SQL';

-- Events. The columns of horizon get the same comments.
comment on table orchestrator.event is
  'What to deliver, where and when; never updated. Partitioned by UTC day of scheduled_at; retention drops '
  'whole days.';
comment on column orchestrator.event.id is
  'The idempotency key, laid out as UUID version 7 (RFC 9562) with the milliseconds of scheduled_at; see '
  'event_id(). Random without an external_job_id.';
comment on column orchestrator.event.retry_policy is
  'Name of its retry_policy; null: that of its destination, or ''default''';
comment on column orchestrator.event.payload is
  'Delivered byte for byte. The type is json, not jsonb: it keeps the client''s bytes and costs half.';
comment on column orchestrator.event.priority is
  '-9 to 9; among due events of a lane, those of the highest priority are claimed first. Null: 0.';
comment on column orchestrator.event.spread is
  'Window that such events are spread over: each is due spread_shift(id, spread) after scheduled_at. Null: '
  'its destination''s spread.';
comment on column orchestrator.event.ordering_key is
  'Events of one key are delivered one at a time, in order of scheduled_at. KAFKA: also the record''s key, '
  'which decides its partition; null: external_job_id is the key.';
comment on column orchestrator.event.expires_at is
  'No attempt begins at this time or later: the event ends as expired. Null: it never expires.';
do $$
declare
  v_comment text;
begin
  for v_comment in
    select format('comment on column orchestrator.horizon.%I is %L', h.attname, col_description(e.attrelid, e.attnum))
    from pg_attribute h
    join pg_attribute e on e.attname = h.attname and e.attrelid = 'orchestrator.event'::regclass
    where h.attrelid = 'orchestrator.horizon'::regclass and h.attnum > 0 and not h.attisdropped
  loop
    execute v_comment;
  end loop;
end $$;
comment on table orchestrator.horizon is
  'Events due after the last day that has a partition, and those that ended here. run_maintenance() moves '
  'them into event (and timer, or outcome) once their day has a partition.';

-- Timers.
comment on table orchestrator.timer is
  'The next thing to do for a live event: one narrow row, deleted when the event ends. A claim is a '
  'heap-only update: it changes no indexed column, and pages are kept half empty.';
comment on column orchestrator.timer.due_at is
  'When the next attempt is due: after the event''s spread, and never before it was accepted';
comment on column orchestrator.timer.destination is 'Hash of the event''s destination_name()';
comment on column orchestrator.timer.lane is
  'The lane that it is claimed from. Below 0 (-1 - lane): it waits behind an earlier event of its ordering '
  'key.';
comment on column orchestrator.timer.max_attempts is
  'Leases after which a failure is final: max_retries + 1, and one more for each lease that was released '
  'unused';
comment on column orchestrator.timer.attempt is
  'Leases given so far. It only grows, and is the fencing number: a result with any other number changes '
  'nothing.';
comment on column orchestrator.timer.worker is 'The worker that claimed it; null: none has';
comment on column orchestrator.timer.lease_until is
  'Nobody else may claim it before this time; null: not leased. A lease that has run out needs no repair: '
  'the event is due again.';
comment on column orchestrator.timer.ordering is 'Hash of event.ordering_key; null: it has none';
comment on column orchestrator.timer.slot is
  'While leased from a lane with max_parallel: that lane, where it counts as under way. It counts until the '
  'lease ends, so a crash needs no repair.';
comment on column orchestrator.timer.busy is
  'While leased: the same hash as ordering. No other event of that key is leased at the same time.';

-- Outcomes and dead letters.
comment on table orchestrator.outcome is
  'What happened: one row for each attempt, and one for whatever else ended or revived an event. '
  'Append-only; partitioned like event.';
comment on column orchestrator.outcome.started_at is
  'When the attempt began, by the database''s clock; null: no attempt was made';
comment on column orchestrator.outcome.attempt is 'Number of the attempt: timer.attempt of its lease';
comment on column orchestrator.outcome.result is
  'delivered, dead, cancelled, rescheduled and expired end the event. After retried and redriven another '
  'attempt follows.';
comment on column orchestrator.outcome.error is
  'Why the attempt failed; of a delivered event: what was wrong with the rest of the response';
comment on column orchestrator.outcome.successor is 'Of a rescheduled event: the event that replaced it';
comment on column orchestrator.outcome.waited is
  'Why it was claimed or started later than due: milliseconds by rate, parallel, breaker and pause. Null: '
  'none of them delayed it.';
comment on table orchestrator.dead_letter is 'Events that ran out of attempts, or failed permanently';
comment on column orchestrator.dead_letter.died_at is 'When it died';
comment on column orchestrator.dead_letter.reason is 'Error of the last attempt';
comment on column orchestrator.dead_letter.blocks is
  'Hash of the ordering key whose later events it blocks; null: it blocks none';

-- Statistics.
comment on column orchestrator.statistic.name is
  'What happened: accepted, duplicate, rejected, delivered, retried, dead, cancelled, redriven, rescheduled, '
  'expired, purged. retrying: by how much the number of retrying events changed.';
comment on column orchestrator.statistic.value is 'How many; all rows of a minute and name add up';
comment on column orchestrator.statistic.source_label is
  'event.source, for statistic_label; only with accepted and duplicate';
comment on column orchestrator.statistic.destination_label is
  'destination_name(), for statistic_label; only with accepted and duplicate';
comment on table orchestrator.statistic_label is 'The source or destination behind each hash in statistic';
comment on table orchestrator.statistic_folded is
  'Counts by minute, source and destination for three hours, then by hour, and past retention by day alone. '
  'Newer deltas are in statistic; see statistics_by().';
comment on column orchestrator.statistic_folded.source is 'event.source; empty: no longer known';
comment on column orchestrator.statistic_folded.destination is
  'destination_name(); empty: no longer known; *: sum of all pairs of source and destination beyond the '
  '1,000 most frequent of its time';

-- API keys and requests.
comment on column orchestrator.api_key.key_hash is
  'SHA-256 of the key. A key has 256 random bits, so nobody can search for it by an unsalted hash.';
comment on table orchestrator.request is
  'Answers of calls that would answer differently if repeated, stored with their changes for callers whose '
  'reply was lost. Kept for ten minutes.';
comment on column orchestrator.request.id is 'Chosen by the caller, a new one for each call';
comment on column orchestrator.request.answer is 'The rows of the answer, as an array of objects';

-- Kafka: what is read.
comment on table orchestrator.ingest_offset is
  'How far each partition of a topic has been read, moved in the transaction that keeps the rows. Offsets '
  'committed in Kafka only mirror it, for lag tools.';
comment on column orchestrator.ingest_offset.anchor_hash is
  'Hash of that record. Another hash shows that the topic was recreated under the same name.';
comment on table orchestrator.reject is
  'Records that could not become events or commands, with their bytes and the reason';
comment on column orchestrator.reject.reject is 'Its number, as orchestrator rejects shows it';
comment on column orchestrator.reject.topic is 'The topic that it was read from';
comment on column orchestrator.reject.key is 'Key of the record, unchanged';
comment on column orchestrator.reject.value is 'Value of the record, unchanged; null: it had none';
comment on column orchestrator.reject.field is 'The field that is wrong; body: the record as a whole';
comment on column orchestrator.reject.resubmitted_at is 'When it was submitted again; null: it was not';
comment on table orchestrator.submission_aside is
  'Records whose event another session was writing in an open transaction. Ingesters and run_maintenance() '
  'submit them later; until then they are neither events nor rejects.';
comment on column orchestrator.submission_aside.topic is 'The topic that it was read from';
comment on column orchestrator.submission_aside.key is 'Key of the record, unchanged';
comment on column orchestrator.submission_aside.value is 'Value of the record, unchanged';

-- Kafka: what is written.
comment on table orchestrator.topic_rule is
  'One row: this deployment''s own topics, and those that events may be delivered to. Set by '
  'configure_topics().';
comment on column orchestrator.topic_rule.one is 'Keeps it to one row';
comment on column orchestrator.topic_rule.ready is
  'Topic of KAFKA events without a destination; null: no dispatcher with Kafka has started yet';
comment on column orchestrator.topic_rule.own is
  'Topics that this deployment reads, or writes for other purposes than deliveries';
comment on column orchestrator.topic_rule.allowed is
  'KAFKA_ALLOW_TOPICS: patterns with * for any characters; empty: all but topics of Kafka itself and of '
  'deployments';
comment on table orchestrator.outbox_kind is
  'Kinds of messages that are written to the outbox, beside answers to commands. The publisher sets them '
  'from OUTBOX_TOPICS, by set_outbox().';
comment on table orchestrator.outbox is
  'Messages to publish to Kafka: written in the transaction that they report, deleted once a broker has '
  'acknowledged them';
comment on column orchestrator.outbox.written_by is
  'Transaction that wrote it: messages are published in this order, then by number. It tells the publisher '
  'below which bound no further message can appear; the number alone does not.';
comment on column orchestrator.outbox.event_id is 'The event that it reports on; null: none';
comment on table orchestrator.outbox_failure is
  'Messages that no broker accepts, set aside so that they hold up no others; retry_outbox_failures() sends '
  'them again';

-- Destinations.
comment on table orchestrator.destination is
  'Destinations that are configured, or failed lately; each has a dedicated lane. Its present state is in '
  'lane; view destinations shows both.';
comment on column orchestrator.destination.name is
  'Host and port of the URLs (hooks.example.com, localhost:8443), or kafka: and the topic. With * for any '
  'characters, all that match are one destination.';
comment on column orchestrator.destination.configured is
  'Set by configure_destination(); false: kept for its circuit breaker since an attempt failed, and deleted '
  'once it has recovered';
comment on column orchestrator.destination.rate_per_second is
  'Rate limit: attempts a second, by all dispatchers together; null: no limit';
comment on column orchestrator.destination.burst is
  'Attempts that may begin at once after a pause, under rate_per_second';
comment on column orchestrator.destination.max_parallel is
  'Attempts under way at once, by all dispatchers together; null: CUSTOMER_MAX_PARALLEL of the dispatchers';
comment on column orchestrator.destination.adaptive is
  'Whether max_parallel is only a ceiling: the limit shrinks by 429, 503 and time-outs, and grows by '
  'successes (AIMD)';
comment on column orchestrator.destination.timeout is
  'Longest time that an attempt may take; null: HTTP_TIMEOUT_SECONDS of the dispatchers';
comment on column orchestrator.destination.retry_policy is
  'Name of the retry_policy of events that name none; null: ''default''';
comment on column orchestrator.destination.spread is
  'Spread of events that have none of their own; null: they are due when scheduled';
comment on column orchestrator.destination.breaker_failures is
  'Its circuit breaker opens after this many consecutive failures; null: not for that reason';
comment on column orchestrator.destination.breaker_ratio is
  'Its circuit breaker opens when this share of the attempts in breaker_window failed; null: not for that '
  'reason';
comment on column orchestrator.destination.breaker_minimum is
  'Attempts in breaker_window before breaker_ratio applies';
comment on column orchestrator.destination.breaker_window is
  'Period that breaker_ratio is measured over, from the first failure on';
comment on column orchestrator.destination.breaker_cooldown is
  'How long an open breaker lets nothing through before it tries one event; doubles with each failed try';
comment on column orchestrator.destination.breaker_max_cooldown is 'Longest cooldown of its breaker';

-- Lanes.
comment on table orchestrator.lane is
  'Queues that share each claim fairly, with their present state: 64 that destinations share, and a '
  'dedicated one for each row of destination';
comment on column orchestrator.lane.lane is
  '0 to 63: shared, chosen by a hash of destination_name(); from 64 on: dedicated to one destination';
comment on column orchestrator.lane.name is
  'destination.name; null: a shared lane, or that of a deleted destination, kept until it is empty';
comment on column orchestrator.lane.hash is
  'Hash of the name, as in timer.destination; null: a shared lane, or a pattern';
comment on column orchestrator.lane.limited is
  'Whether claims must lock this row and read destination: for a rate, max_parallel, spread, time-out or '
  'secret';
comment on column orchestrator.lane.paused_at is 'When pause_destination() paused it; null: it is not paused';
comment on column orchestrator.lane.last_paused_at is 'Beginning of the last pause that has ended';
comment on column orchestrator.lane.resumed_at is 'End of the last pause that has ended';
comment on column orchestrator.lane.parallel_now is 'The limit that AIMD has found; null: max_parallel';
comment on column orchestrator.lane.throttled_at is 'When that limit was last lowered; at most once a second';
comment on column orchestrator.lane.held_by is
  'The limit that held back events at the last claim: rate or parallel; null: none';
comment on column orchestrator.lane.breaker is
  'Circuit breaker. closed: attempts go through; open: none before open_until; half_open: one event is being '
  'tried.';
comment on column orchestrator.lane.open_until is
  'open: nothing is claimed before this time; half_open: when the try is given up';
comment on column orchestrator.lane.opened_at is 'When the breaker last opened';
comment on column orchestrator.lane.tried_at is 'half_open: when the present try was let through';
comment on column orchestrator.lane.closed_at is 'When the breaker last closed';
comment on column orchestrator.lane.openings is
  'How often the breaker has opened since it was last closed; each time doubles the cooldown';
comment on column orchestrator.lane.failures is 'Consecutive failures';
comment on column orchestrator.lane.window_at is
  'Beginning of the present breaker_window; null: no recent failure';
comment on column orchestrator.lane.window_attempts is 'Attempts that finished in the present breaker_window';
comment on column orchestrator.lane.window_failures is 'Attempts that failed in the present breaker_window';
comment on column orchestrator.lane.floor is
  'Of a dedicated lane: no timer is due before this time, so claims begin here; see raise_floors(). Floors '
  'of shared lanes are in control.floors.';

-- Control.
comment on table orchestrator.control is 'One row: what applies to all claims, and how long data is kept';
comment on column orchestrator.control.paused_at is
  'When pause_all() paused all deliveries; null: they are not paused';
comment on column orchestrator.control.last_paused_at is 'Beginning of the last pause that has ended';
comment on column orchestrator.control.resumed_at is 'End of the last pause that has ended';
comment on column orchestrator.control.rerouted_by is
  'Transaction that last gave a destination a lane or took it away. Claims move timers that are in a wrong '
  'lane, until maintenance finds none; null: there are none.';
comment on column orchestrator.control.rerouted_writers is
  'Virtual transactions that were writing timers when maintenance first saw rerouted_by. Once they have '
  'ended, every writer knows the new lanes; null: maintenance has not looked yet.';
comment on column orchestrator.control.priorities is
  'Priorities that events have or had, highest first; claims look for each of them';
comment on column orchestrator.control.floors is
  'For each shared lane, from 0 on: no timer is due before this time. One row, because each claim reads all '
  'versions of a row while an old snapshot is held.';
comment on column orchestrator.control.own_floor is 'No timer of any dedicated lane is due before this time';
comment on column orchestrator.control.floors_at is
  'When the floors were last raised. If that is later than now, the clock was set back, and claims ignore '
  'the floors.';
comment on column orchestrator.control.marked_at is
  'The floors will be raised up to this time once marked_writers have ended. Transactions that began to '
  'write later write nothing due earlier.';
comment on column orchestrator.control.horizon_at is
  'No event due before this time is in horizon, so submissions of such events need not look there';
comment on column orchestrator.control.retention_days is
  'Days that a finished event is kept after its scheduled day (CLEANUP_RETENTION_DAYS). Null: not configured '
  'since an upgrade, so nothing is dropped.';
comment on column orchestrator.control.partition_days_ahead is
  'Days ahead that partitions are created for (PARTITION_DAYS_AHEAD); later events wait in horizon';
comment on column orchestrator.control.max_schedule_ahead_days is
  'How many days ahead events can be scheduled (MAX_SCHEDULE_AHEAD_DAYS)';
comment on column orchestrator.control.partitioned_by is
  'Who creates partitions: maintenance, or pg_partman (ops/pg_partman.sql)';
comment on column orchestrator.control.former_ids_until is
  'Events scheduled up to this time may have an id by former_event_id(), so submissions look for both ids. '
  'Null: there are no such events.';
comment on column orchestrator.control.cluster is
  'System identifier of the cluster whose transaction numbers are in rerouted_by and outbox.written_by; '
  'null: not known yet';
comment on table orchestrator.control_note is
  'Changes of control and lane that apply already, noted while another session had the row locked. Nobody '
  'waits to write one; usually empty.';
comment on column orchestrator.control_note.note is 'Its number; the latest note decides';
comment on column orchestrator.control_note.noted_at is 'When it was written';
comment on column orchestrator.control_note.kind is
  'pause, resume, close_breaker: what an operator asked for; reroute: destinations changed lanes; '
  'priorities: events have new ones';
comment on column orchestrator.control_note.name is
  'Name of the destination to pause, resume or close; null: all of them, or none';
comment on column orchestrator.control_note.priorities is 'The new priorities, if that is its kind';

-- Maintenance, rights and locks.
comment on table orchestrator.retired_partition is
  'Partitions past retention, detached. Each is archived, if that is configured, and dropped after an hour.';
comment on column orchestrator.maintenance_run.did is
  'What it did, with numbers: partitions_created, horizon_moved, events_expired and so on';
comment on column orchestrator.maintenance_run.problems is
  'Steps that failed, each rolled back alone: an array of step and problem';
comment on table orchestrator.granted is
  'Rights that roles.sql granted when it was last applied, as rights() shows them. A dump brings this table '
  'even if it brings no rights.';
comment on column orchestrator.granted.object is 'Kind and name of the object, such as function now()';
comment on column orchestrator.granted.rights is
  'Who may do what, such as orchestrator_submit EXECUTE; public: everybody';
comment on type orchestrator.lock_holder is
  'A session, or prepared transaction, that makes others wait or may do so; see lock_holders()';

-- Sessions that hold others up.
comment on column orchestrator.lock_holder.pid is 'Process id of the session; null: a prepared transaction';
comment on column orchestrator.lock_holder.username is 'The role that has logged in, or has prepared the transaction';
comment on column orchestrator.lock_holder.application_name is
  'application_name of the session; null: a prepared transaction';
comment on column orchestrator.lock_holder.state is
  'State of the session, as in pg_stat_activity, or prepared; null: the reader may not see it';
comment on column orchestrator.lock_holder.since is
  'When its transaction began, or was prepared; null: it is in none, or the reader may not see it';
comment on column orchestrator.lock_holder.query is
  'Its last query, without its literals and cut to 200 characters, or the name of a prepared transaction';
comment on column orchestrator.lock_holder.blocks is 'How many sessions wait for it';

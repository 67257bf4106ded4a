-- Kafka: what is read from it (ingest_offset, reject), what is to be written to it (outbox), and events that are delivered to it.

alter table orchestrator.event drop constraint event_delivery_type_check, drop constraint event_destination_check, alter column destination drop not null;
alter table orchestrator.event add column ordering_key text check (length(ordering_key) between 1 and 200);
alter table orchestrator.event add constraint event_destination_check check (
  case delivery_type
    when 'HTTP' then destination is not null and length(destination) <= 2048 and destination ~ '^https?://[^/]'
    when 'KAFKA' then destination is null or destination ~ '^(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}$'
    else false
  end);
comment on column orchestrator.event.delivery_type is 'How it is delivered: HTTP or KAFKA';
comment on column orchestrator.event.destination is 'HTTP: a URL. KAFKA: a topic; null: the deployment''s ready topic (KAFKA_TOPIC_READY)';
comment on column orchestrator.event.ordering_key is 'KAFKA: key of the record, which decides its partition; null: external_job_id is the key';

alter table orchestrator.outcome drop constraint outcome_result_check;
alter table orchestrator.outcome add constraint outcome_result_check check (result in ('delivered', 'retried', 'dead', 'cancelled', 'redriven'));
comment on column orchestrator.outcome.result is 'delivered, dead and cancelled end the event; retried and redriven: another attempt follows';

-- Their signatures change; functions/ makes them anew. A new database has none of them yet.
drop function if exists orchestrator.claim_due_events(integer, integer, interval, interval);
drop function if exists orchestrator.finish_events(uuid[], integer[], text[], integer[], double precision[], double precision[], text[], text[], double precision[], integer);
drop function if exists orchestrator.schedule_event(text, jsonb, timestamptz, text, text, integer, jsonb, text);
drop function if exists orchestrator.check_submission(timestamptz, text, text, text, text, json, integer, text, timestamptz, timestamptz);

create table orchestrator.ingest_offset
( topic text not null
, partition integer not null
, next_offset bigint not null check (next_offset >= 0)
, anchor_offset bigint
, anchor_hash bigint
, moved_at timestamptz not null
, primary key (topic, partition)
);
comment on table orchestrator.ingest_offset is 'How far each partition of a topic has been read. Moved in the transaction that keeps the rows, so that neither can be without the other; what Kafka holds as committed is a mirror for lag tools';
comment on column orchestrator.ingest_offset.topic is 'Topic of submissions or commands';
comment on column orchestrator.ingest_offset.partition is 'Its partition';
comment on column orchestrator.ingest_offset.next_offset is 'Offset of the first record that has not been read';
comment on column orchestrator.ingest_offset.anchor_offset is 'Offset of the last record that was read; null: unknown';
comment on column orchestrator.ingest_offset.anchor_hash is 'What that record hashed to: a topic made anew under the same name shows by another hash';
comment on column orchestrator.ingest_offset.moved_at is 'When it was last moved';

create table orchestrator.reject
( reject bigint generated always as identity primary key
, topic text not null
, partition integer not null
, "offset" bigint not null
, received_at timestamptz not null
, key bytea
, value bytea
, field text not null
, reason text not null
, event_id uuid
, resubmitted_at timestamptz
);
comment on table orchestrator.reject is 'Records that could not become events or commands, as they came and with the reason';
comment on column orchestrator.reject.reject is 'Its number, for: orchestrator rejects';
comment on column orchestrator.reject.topic is 'Where it was read from';
comment on column orchestrator.reject.partition is 'Partition of the topic';
comment on column orchestrator.reject."offset" is 'Offset in the partition';
comment on column orchestrator.reject.received_at is 'When it was read';
comment on column orchestrator.reject.key is 'Key of the record, as it came';
comment on column orchestrator.reject.value is 'Value of the record, as it came; null: it had none';
comment on column orchestrator.reject.field is 'What is wrong with it: a field, or body';
comment on column orchestrator.reject.reason is 'Why it is wrong';
comment on column orchestrator.reject.event_id is 'The event it became when it was submitted again, corrected';
comment on column orchestrator.reject.resubmitted_at is 'When that was; null: it was not';

create table orchestrator.outbox_kind
( kind text primary key check (kind in ('scheduled', 'timestamp', 'dlq'))
);
comment on table orchestrator.outbox_kind is 'Which messages are written to the outbox, beside the answers to commands; set by set_outbox(), which the publisher calls with OUTBOX_TOPICS';
comment on column orchestrator.outbox_kind.kind is 'scheduled, timestamp or dlq';

create table orchestrator.outbox
( written_by xid8 not null default pg_current_xact_id()
, message bigint generated always as identity
, created_at timestamptz not null
, event_id uuid
, kind text not null check (kind in ('scheduled', 'timestamp', 'dlq', 'answer'))
, headers json
, key bytea
, value bytea
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
create index outbox_order on orchestrator.outbox (written_by, message);
comment on table orchestrator.outbox is 'Messages to publish to Kafka, written in the transaction they tell of and deleted once a broker has acknowledged them';
comment on column orchestrator.outbox.written_by is 'Transaction that wrote it. Messages are published in this order and then by number, which is the order of what happened to any one event; unlike the number alone, it tells the publisher below which bound no further message can appear';
comment on column orchestrator.outbox.message is 'Its number, in the order of writing';
comment on column orchestrator.outbox.created_at is 'When it was written';
comment on column orchestrator.outbox.event_id is 'The event it tells of, if it is one';
comment on column orchestrator.outbox.kind is 'Which topic: scheduled (KAFKA_TOPIC_SCHEDULED), timestamp (KAFKA_TOPIC_TIMESTAMP), dlq (KAFKA_TOPIC_DLQ), answer (KAFKA_TOPIC_ANSWERS)';
comment on column orchestrator.outbox.headers is 'Headers of the record: an object of strings';
comment on column orchestrator.outbox.key is 'Key of the record';
comment on column orchestrator.outbox.value is 'Value of the record';

create table orchestrator.outbox_failure
( message bigint primary key
, failed_at timestamptz not null
, reason text not null
, created_at timestamptz not null
, event_id uuid
, kind text not null
, headers json
, key bytea
, value bytea
);
comment on table orchestrator.outbox_failure is 'Messages that no broker will take, set aside so that they hold up no others; see retry_outbox_failures()';
comment on column orchestrator.outbox_failure.message is 'outbox.message';
comment on column orchestrator.outbox_failure.failed_at is 'When it was set aside';
comment on column orchestrator.outbox_failure.reason is 'What the broker said';
comment on column orchestrator.outbox_failure.created_at is 'outbox.created_at';
comment on column orchestrator.outbox_failure.event_id is 'outbox.event_id';
comment on column orchestrator.outbox_failure.kind is 'outbox.kind';
comment on column orchestrator.outbox_failure.headers is 'outbox.headers';
comment on column orchestrator.outbox_failure.key is 'outbox.key';
comment on column orchestrator.outbox_failure.value is 'outbox.value';

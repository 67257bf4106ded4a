-- What calls that changed something have answered, for the caller whose reply was lost.

create table orchestrator.request
( id uuid primary key
, kept_at timestamptz not null
, answer json not null
);
comment on table orchestrator.request is 'Answers of calls that would answer differently when done again, written with what they changed: whose reply is lost asks for it. Kept for ten minutes';
comment on column orchestrator.request.id is 'Made by the caller, for one call';
comment on column orchestrator.request.kept_at is 'When it was answered';
comment on column orchestrator.request.answer is 'The rows that it answered, as an array of objects';

-- Reconciliation with Stripe's API.

-- When an event has to be looked at again: a thin event's object is to be fetched, or a payment's invoice to be asked for.
-- 0: not looked at yet; null: done, or nothing to do.
alter table events add column ask_due_ms integer default 0;
alter table events add column ask_attempts integer not null default 0;
create index events_to_fetch on events (ask_due_ms)
    where event_type >= 'v1.' and event_type < 'v1/' and ask_due_ms is not null;
create index events_to_link on events (ask_due_ms)
    where event_type >= 'charge.' and event_type < 'charge/' and outcome = 'recorded' and ask_due_ms is not null;
create index intents_to_link on events (ask_due_ms)
    where event_type >= 'payment_intent.' and event_type < 'payment_intent/' and outcome = 'recorded' and ask_due_ms is not null;
create index refunds_to_link on events (ask_due_ms)
    where event_type >= 'refund.' and event_type < 'refund/' and outcome = 'recorded' and ask_due_ms is not null;

-- When an invoice is to be compared with Stripe's (0: never was; null: settled), was compared, was found to agree, and since
-- when it differs.
alter table invoices add column check_due_ms integer default 0;
alter table invoices add column checked_ms integer;
alter table invoices add column confirmed_ms integer;
alter table invoices add column differs_since_ms integer;
create index invoices_by_check on invoices (check_due_ms) where check_due_ms is not null;
create index invoices_by_last_check on invoices (checked_ms) where check_due_ms is null;

-- How far each kind of work has come.
create table progress (
    name  text    not null primary key,
    value integer not null
) without rowid;

-- What is done by one process at a time.
create table leases (
    name       text    not null primary key,
    holder     text    not null,
    expires_ms integer not null
) without rowid;

-- Passes, and their reports as JSON.
create table runs (
    id         text    not null primary key,
    started_ms integer not null,
    ended_ms   integer not null,
    report     text    not null
) without rowid;
create index runs_by_start on runs (started_ms desc, id);

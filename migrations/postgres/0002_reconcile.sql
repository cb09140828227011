-- Reconciliation with Stripe's API.

-- When an event has to be looked at again: a thin event's object is to be fetched, or a payment's invoice to be asked for.
-- 0: not looked at yet; null: done, or nothing to do.
alter table events add column ask_due_ms bigint default 0;
alter table events add column ask_attempts bigint not null default 0;
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
alter table invoices add column check_due_ms bigint default 0;
alter table invoices add column checked_ms bigint;
alter table invoices add column confirmed_ms bigint;
alter table invoices add column differs_since_ms bigint;
create index invoices_by_check on invoices (check_due_ms) where check_due_ms is not null;
create index invoices_by_last_check on invoices (checked_ms) where check_due_ms is null;

-- How far each kind of work has come.
create table progress (
    name  text   collate "C" not null primary key,
    value bigint not null
);

-- What is done by one process at a time.
create table leases (
    name       text   collate "C" not null primary key,
    holder     text   collate "C" not null,
    expires_ms bigint not null
);

-- Passes, and their reports as JSON.
create table runs (
    id         text   collate "C" not null primary key,
    started_ms bigint not null,
    ended_ms   bigint not null,
    report     text    not null
);
create index runs_by_start on runs (started_ms desc, id);

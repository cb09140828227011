-- What the person on call is told: gathered from the log bit by bit, beside the deliveries and never by them.

-- When something last happened: a delivery by mode and by secret, a refusal by reason, a pass that failed.
create table moments (
    name  text    not null primary key,
    at_ms integer not null
) without rowid;

-- Hours (since 1970) in which webhooks came: by them it is known what is usual.
create table delivery_hours (
    hour integer not null primary key
);

-- Stripe invoices that events name and that nobody stored, and when the first of these events came.
create table awaited (
    stripe_invoice_id text    not null primary key,
    received_ms       integer not null
) without rowid;
create index awaited_by_receipt on awaited (received_ms);

-- Of rare rows only: no ordinary delivery writes to them.
create index events_unreadable on events (received_ms, key) where outcome = 'unreadable';
create index invoices_differing on invoices (differs_since_ms) where differs_since_ms is not null;

-- Times are integers (seconds: _s, milliseconds: _ms); keys are bytes; see src/store/ for what each column means.

-- The log: every authentic delivery once. `body` stands last because it is large.
create table events (
    key               blob    not null primary key,
    id                text,
    event_type        text,
    api_version       text,
    object_id         text,
    created_s         integer,
    received_ms       integer not null,
    source            text    not null,
    secret_label      text,
    outcome           text    not null,
    unreadable_reason text,
    telling           text,
    linked            text,
    body              blob
);
create index events_by_receipt on events (received_ms, key);

-- Which objects an event names: what histories are gathered by. `events.linked` holds those that are no invoices, as JSON: from
-- them the gathering goes on. (An index from events to objects would cost every delivery a page more.)
create table mentions (
    object_id text not null,
    event_key blob not null,
    primary key (object_id, event_key)
) without rowid;

create table invoices (
    tenant_uid        text    not null,
    invoice_uid       text    not null,
    stripe_invoice_id text unique,
    document          text    not null,
    imported_states   text    not null,
    stored_ms         integer not null,
    revision          integer not null,
    primary key (tenant_uid, invoice_uid)
) without rowid;
create index invoices_by_storing on invoices (stored_ms desc, tenant_uid, invoice_uid);
create index invoices_of_tenant_by_storing on invoices (tenant_uid, stored_ms desc, invoice_uid);

create table api_keys (
    id            text    not null primary key,
    secret_sha256 blob    not null unique,
    tenant_uid    text,
    created_ms    integer not null,
    expires_ms    integer,
    revoked_ms    integer
);

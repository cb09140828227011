-- Times are integers (seconds: _s, milliseconds: _ms); keys are bytes; see src/store/ for what each column means. Ids compare
-- by their bytes (collate "C"), as they do in SQLite.

-- The log: every authentic delivery once. `body` stands last because it is large.
create table events (
    key               bytea  not null primary key,
    id                text   collate "C",
    event_type        text   collate "C",
    api_version       text   collate "C",
    object_id         text   collate "C",
    created_s         bigint,
    received_ms       bigint not null,
    source            text   collate "C" not null,
    secret_label      text   collate "C",
    outcome           text   collate "C" not null,
    unreadable_reason text,
    telling           text,
    linked            text,
    body              bytea
);
create index events_by_receipt on events (received_ms, key);
-- Bodies are compressed already, and small enough to stay in their row: no second table to write to for each of them.
alter table events alter column body set storage external;
-- The log only grows: without this, vacuum would visit a table of hundreds of millions of rows after 20 % more have come.
alter table events set (
    toast_tuple_target = 8160,
    autovacuum_vacuum_insert_threshold = 1000000,
    autovacuum_vacuum_insert_scale_factor = 0.02
);

-- Which objects an event names: what histories are gathered by. `events.linked` holds those that are no invoices, as JSON: from
-- them the gathering goes on. (An index from events to objects would cost every delivery a page more.)
create table mentions (
    object_id text  collate "C" not null,
    event_key bytea not null,
    primary key (object_id, event_key)
);
alter table mentions set (autovacuum_vacuum_insert_threshold = 1000000, autovacuum_vacuum_insert_scale_factor = 0.02);

create table invoices (
    tenant_uid        text   collate "C" not null,
    invoice_uid       text   collate "C" not null,
    stripe_invoice_id text   collate "C" unique,
    document          text   not null,
    imported_states   text   not null,
    stored_ms         bigint not null,
    revision          bigint not null,
    primary key (tenant_uid, invoice_uid)
);
create index invoices_by_storing on invoices (stored_ms desc, tenant_uid, invoice_uid);
create index invoices_of_tenant_by_storing on invoices (tenant_uid, stored_ms desc, invoice_uid);

create table api_keys (
    id            text   collate "C" not null primary key,
    secret_sha256 bytea  not null unique,
    tenant_uid    text   collate "C",
    created_ms    bigint not null,
    expires_ms    bigint,
    revoked_ms    bigint
);

-- Who looks for an invoice knows its uid, and seldom the tenant.
create index invoices_by_uid on invoices (invoice_uid, tenant_uid);

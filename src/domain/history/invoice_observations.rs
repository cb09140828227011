//! The one place that decides which observations count for an invoice (rule 3.6.4).
//!
//! Accounts and modes do not mix. `payment_details.order_reference` is free text. The owner of a
//! connected account, or anybody in test mode, can set it to the id of another party's invoice. So
//! an observation in which Stripe itself does not name the invoice counts only if it comes from the
//! account and mode of one in which Stripe does.
//!
//! Histories, evidence and comparisons all start from [`InvoiceObservations::select`].

use std::collections::HashSet;

use super::entry::in_order;
use super::payment_links::PaymentLinks;
use crate::domain::stripe::event::{Observation, StoredObservation};

/// The observations that count for one invoice.
pub struct InvoiceObservations<'a> {
    /// Earliest first.
    counted: Vec<&'a StoredObservation>,
    /// Links among the observations of the invoice's accounts and modes.
    links: PaymentLinks<'a>,
    is_test_mode: bool,
    account: Option<&'a str>,
    livemode: Option<bool>,
}

impl<'a> InvoiceObservations<'a> {
    /// Selects the observations of an invoice. `known` may hold more, in any order, repeated.
    pub fn select(invoice_id: &str, known: &'a [StoredObservation]) -> InvoiceObservations<'a> {
        let known = without_twins(known);
        let own: Vec<&StoredObservation> = known
            .iter()
            .copied()
            .filter(|stored| stored.observation.object.named_invoice() == Some(invoice_id))
            .collect();
        let origins = Origins::read(&own);

        // Remove foreign observations before reading the links, so that they cannot join payments.
        let admitted: Vec<&StoredObservation> = known
            .into_iter()
            .filter(|stored| {
                stored.observation.object.named_invoice() == Some(invoice_id)
                    || origins.admit(&stored.observation)
            })
            .collect();
        let links = PaymentLinks::read(admitted.iter().map(|stored| &stored.observation));
        let counted = admitted
            .into_iter()
            .filter(|stored| links.invoice_of(&stored.observation.object) == Some(invoice_id))
            .collect();

        InvoiceObservations {
            counted,
            links,
            is_test_mode: own
                .iter()
                .any(|stored| stored.observation.livemode == Some(false)),
            account: connected_account(&own),
            livemode: own
                .iter()
                .rev()
                .find_map(|stored| stored.observation.livemode),
        }
    }

    /// Returns the observations that count, earliest first.
    pub fn counted(&self) -> &[&'a StoredObservation] {
        &self.counted
    }

    /// Returns the links among the observations of the invoice's accounts and modes.
    pub fn links(&self) -> &PaymentLinks<'a> {
        &self.links
    }

    /// Returns whether any own observation is of test mode.
    pub fn is_test_mode(&self) -> bool {
        self.is_test_mode
    }

    /// Returns the mode that the newest own observation names.
    pub fn livemode(&self) -> Option<bool> {
        self.livemode
    }

    /// Returns the connected account, or `None` if an own event is of the key's own account.
    pub fn connected_account(&self) -> Option<&'a str> {
        self.account
    }
}

/// Returns the account of the earliest own observation if every own observation has one.
///
/// An object of Stripe's API has one only if it was fetched on behalf of a connected account, so an
/// object without an account proves nothing.
fn connected_account<'a>(own: &[&'a StoredObservation]) -> Option<&'a str> {
    let mut accounts = own
        .iter()
        .filter(|stored| !is_api_object_without_account(&stored.observation))
        .map(|stored| stored.observation.account.as_deref());
    let first = accounts.next()??;
    accounts.all(|account| account.is_some()).then_some(first)
}

fn is_api_object_without_account(observation: &Observation) -> bool {
    observation.fetched && observation.account.is_none()
}

/// Account and mode of an observation.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Origin<'a> {
    is_api_object: bool,
    /// The connected account. `None` means the own account, or an unknown one for an API object.
    account: Option<&'a str>,
    livemode: Option<bool>,
}

impl<'a> Origin<'a> {
    fn of(observation: &'a Observation) -> Origin<'a> {
        Origin {
            is_api_object: observation.fetched,
            account: observation.account.as_deref(),
            livemode: observation.livemode,
        }
    }

    fn has_unknown_account(&self) -> bool {
        self.is_api_object && self.account.is_none()
    }

    fn has_unknown_mode(&self) -> bool {
        self.is_api_object && self.livemode.is_none()
    }
}

/// The different accounts and modes of an invoice's own observations.
struct Origins<'a> {
    own: HashSet<Origin<'a>>,
    has_event: bool,
}

impl<'a> Origins<'a> {
    fn read(own: &[&'a StoredObservation]) -> Origins<'a> {
        let own: HashSet<Origin> = own
            .iter()
            .map(|stored| Origin::of(&stored.observation))
            .collect();
        Origins {
            has_event: own.iter().any(|origin| !origin.is_api_object),
            own,
        }
    }

    /// Returns whether an observation comes from an account and mode of the own observations.
    ///
    /// An API object without an account matches every account: the key decides what it reads. If
    /// only such objects are known of the invoice, the mode decides. Without own observations
    /// nothing matches, so all other observations are held back until one arrives.
    fn admit(&self, observation: &Observation) -> bool {
        let other = Origin::of(observation);
        self.own.iter().any(|own| {
            let same_account = if own.has_unknown_account() {
                !self.has_event || other.has_unknown_account()
            } else {
                own.account == other.account || other.has_unknown_account()
            };
            let same_mode = own.livemode == other.livemode
                || other.has_unknown_mode()
                || own.has_unknown_mode();
            same_account && same_mode
        })
    }
}

/// Drops thin events whose snapshot twin is known, and repetitions. Earliest first.
fn without_twins(known: &[StoredObservation]) -> Vec<&StoredObservation> {
    let snapshots: HashSet<&str> = known
        .iter()
        .filter(|stored| !stored.observation.thin && !stored.observation.fetched)
        .map(|stored| stored.observation.id.as_str())
        .collect();
    let kept = known.iter().filter(|stored| {
        let twin = stored.observation.snapshot_event.as_deref();
        !twin.is_some_and(|id| snapshots.contains(id))
    });

    let mut kept = in_order(kept.collect());
    kept.dedup_by_key(|stored| stored.key);
    kept
}

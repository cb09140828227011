//! How a metric comes into the registry: with our prefix, and with a value for every label value that is known.

use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry,
};

pub(super) struct MetricRegistrar<'r>(pub &'r Registry);

/// Names are constants; `tests/api/metrics.rs` sees them all.
const RIGHT: &str = "names are well-formed and each is given once";

impl MetricRegistrar<'_> {
    fn keep<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let metric = made.expect(RIGHT);
        self.0.register(Box::new(metric.clone())).expect(RIGHT);
        metric
    }

    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.keep(IntCounter::with_opts(options(name, help)))
    }

    /// One for each of these values.
    pub fn counters(&self, name: &str, help: &str, label: &str, values: &[&str]) -> IntCounterVec {
        let family = self.counter_family(name, help, &[label]);
        values
            .iter()
            .for_each(|value| drop(family.with_label_values(&[*value])));
        family
    }

    pub fn counter_family(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.keep(IntCounterVec::new(options(name, help), labels))
    }

    pub fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.keep(IntGauge::with_opts(options(name, help)))
    }

    pub fn gauges(&self, name: &str, help: &str, label: &str, values: &[&str]) -> IntGaugeVec {
        let family = self.keep(IntGaugeVec::new(options(name, help), &[label]));
        values
            .iter()
            .for_each(|value| drop(family.with_label_values(&[*value])));
        family
    }

    pub fn float(&self, name: &str, help: &str) -> Gauge {
        self.keep(Gauge::with_opts(options(name, help)))
    }

    pub fn floats(&self, name: &str, help: &str, label: &str, values: &[&str]) -> GaugeVec {
        let family = self.keep(GaugeVec::new(options(name, help), &[label]));
        values
            .iter()
            .for_each(|value| drop(family.with_label_values(&[*value])));
        family
    }

    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let options = HistogramOpts {
            common_opts: options(name, help),
            buckets: buckets.to_vec(),
        };
        self.keep(Histogram::with_opts(options))
    }
}

fn options(name: &str, help: &str) -> Opts {
    Opts::new(format!("stripe_reconciler_{name}"), help)
}

//! Registers metrics with our prefix and with a series for every known label value.

use prometheus::core::Collector;
#[cfg(target_os = "linux")]
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry,
};

/// A registry under construction.
pub(super) struct MetricRegistrar<'r>(pub &'r Registry);

/// Proof that registration succeeds: names are constants, and `tests/api/metrics.rs` registers all
/// of them.
const UNIQUE: &str = "names are well-formed and unique";

impl MetricRegistrar<'_> {
    /// Registers the metrics of the process itself, such as its memory and open files. They have no
    /// prefix, because dashboards for any program use them.
    pub fn process(&self) {
        #[cfg(target_os = "linux")]
        self.0
            .register(Box::new(ProcessCollector::for_self()))
            .expect(UNIQUE);
    }

    fn register<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let metric = made.expect(UNIQUE);
        self.0.register(Box::new(metric.clone())).expect(UNIQUE);
        metric
    }

    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::with_opts(options(name, help)))
    }

    /// Registers a counter with a series for each of these label values.
    pub fn counters(&self, name: &str, help: &str, label: &str, values: &[&str]) -> IntCounterVec {
        let family = self.counter_family(name, help, &[label]);
        for value in values {
            drop(family.with_label_values(&[*value]));
        }
        family
    }

    pub fn counter_family(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.register(IntCounterVec::new(options(name, help), labels))
    }

    pub fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::with_opts(options(name, help)))
    }

    pub fn gauges(&self, name: &str, help: &str, label: &str, values: &[&str]) -> IntGaugeVec {
        let family = self.register(IntGaugeVec::new(options(name, help), &[label]));
        for value in values {
            drop(family.with_label_values(&[*value]));
        }
        family
    }

    pub fn float(&self, name: &str, help: &str) -> Gauge {
        self.register(Gauge::with_opts(options(name, help)))
    }

    pub fn floats(&self, name: &str, help: &str, label: &str, values: &[&str]) -> GaugeVec {
        let family = self.register(GaugeVec::new(options(name, help), &[label]));
        for value in values {
            drop(family.with_label_values(&[*value]));
        }
        family
    }

    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let options = HistogramOpts {
            common_opts: options(name, help),
            buckets: buckets.to_vec(),
        };
        self.register(Histogram::with_opts(options))
    }
}

fn options(name: &str, help: &str) -> Opts {
    Opts::new(format!("stripe_reconciler_{name}"), help)
}

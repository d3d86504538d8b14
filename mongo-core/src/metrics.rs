//! Metrics that any host can receive: register once, then pay an atomic addition.
//!
//! A crate of the family registers its metrics with the sink it is given and keeps the handles. Names carry their base
//! unit (`_seconds`, `_bytes`) and counters end in `_total`, as Prometheus and OpenMetrics ask. Label sets are closed:
//! no namespace, `_id` or address becomes a label unless the host asks for it.

#[cfg(feature = "metrics")]
mod facade;
#[cfg(feature = "opentelemetry")]
mod opentelemetry;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

#[cfg(feature = "metrics")]
pub use facade::MetricsFacade;
#[cfg(feature = "opentelemetry")]
pub use opentelemetry::OpenTelemetryMetrics;

use crate::lock::lock;

/// Makes handles for metrics.
///
/// Asking twice for the same name and labels gives handles to the same metric.
pub trait MetricsSink: fmt::Debug + Send + Sync + 'static {
    /// A number that only grows.
    fn counter(&self, name: &'static str, help: &'static str, labels: &[(&'static str, &str)]) -> Arc<dyn Counter>;

    /// A number that goes up and down.
    fn gauge(&self, name: &'static str, help: &'static str, labels: &[(&'static str, &str)]) -> Arc<dyn Gauge>;

    /// A distribution; `boundaries` are the upper bounds of the buckets in rising order, without infinity.
    fn histogram(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[(&'static str, &str)],
        boundaries: &[f64],
    ) -> Arc<dyn Histogram>;
}

/// A handle to a counter.
pub trait Counter: fmt::Debug + Send + Sync {
    /// Adds to it.
    fn add(&self, by: u64);
}

/// A handle to a gauge.
pub trait Gauge: fmt::Debug + Send + Sync {
    /// Sets it.
    fn set(&self, value: f64);
}

/// A handle to a histogram.
pub trait Histogram: fmt::Debug + Send + Sync {
    /// Records one observation.
    fn record(&self, value: f64);
}

/// Receives nothing: the default everywhere.
#[derive(Clone, Copy, Debug, Default)]
#[expect(clippy::exhaustive_structs, reason = "it will never hold anything")]
pub struct NoMetrics;

impl MetricsSink for NoMetrics {
    fn counter(&self, _: &'static str, _: &'static str, _: &[(&'static str, &str)]) -> Arc<dyn Counter> {
        Arc::new(Self)
    }

    fn gauge(&self, _: &'static str, _: &'static str, _: &[(&'static str, &str)]) -> Arc<dyn Gauge> {
        Arc::new(Self)
    }

    fn histogram(&self, _: &'static str, _: &'static str, _: &[(&'static str, &str)], _: &[f64]) -> Arc<dyn Histogram> {
        Arc::new(Self)
    }
}

impl Counter for NoMetrics {
    fn add(&self, _: u64) {}
}

impl Gauge for NoMetrics {
    fn set(&self, _: f64) {}
}

impl Histogram for NoMetrics {
    fn record(&self, _: f64) {}
}

/// Keeps every metric in memory, for tests and for hosts without a metrics system.
///
/// ```
/// use mongo_core::metrics::{MemoryMetrics, MetricsSink};
///
/// let metrics = MemoryMetrics::default();
/// metrics.counter("mongo_backup_documents_total", "documents read", &[]).add(3);
/// assert_eq!(metrics.counter_value("mongo_backup_documents_total", &[]), Some(3));
/// ```
#[derive(Debug, Default)]
pub struct MemoryMetrics {
    counters: Mutex<BTreeMap<Key, Arc<MemoryCounter>>>,
    gauges: Mutex<BTreeMap<Key, Arc<MemoryGauge>>>,
    histograms: Mutex<BTreeMap<Key, Arc<MemoryHistogram>>>,
}

type Key = (&'static str, Vec<(String, String)>);

#[derive(Debug, Default)]
struct MemoryCounter(AtomicU64);

#[derive(Debug, Default)]
struct MemoryGauge(AtomicU64);

#[derive(Debug, Default)]
struct MemoryHistogram(Mutex<Vec<f64>>);

impl MemoryMetrics {
    /// The value of a counter, if it was registered.
    pub fn counter_value(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Option<u64> {
        lock(&self.counters).get(&key(name, labels)).map(|counter| counter.0.load(Relaxed))
    }

    /// The value of a gauge, if it was registered.
    pub fn gauge_value(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Option<f64> {
        lock(&self.gauges).get(&key(name, labels)).map(|gauge| f64::from_bits(gauge.0.load(Relaxed)))
    }

    /// Every observation of a histogram, if it was registered.
    pub fn observations(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Option<Vec<f64>> {
        lock(&self.histograms).get(&key(name, labels)).map(|histogram| lock(&histogram.0).clone())
    }
}

impl MetricsSink for MemoryMetrics {
    fn counter(&self, name: &'static str, _: &'static str, labels: &[(&'static str, &str)]) -> Arc<dyn Counter> {
        Arc::<MemoryCounter>::clone(lock(&self.counters).entry(key(name, labels)).or_default())
    }

    fn gauge(&self, name: &'static str, _: &'static str, labels: &[(&'static str, &str)]) -> Arc<dyn Gauge> {
        Arc::<MemoryGauge>::clone(lock(&self.gauges).entry(key(name, labels)).or_default())
    }

    fn histogram(&self, name: &'static str, _: &'static str, labels: &[(&'static str, &str)], _: &[f64]) -> Arc<dyn Histogram> {
        Arc::<MemoryHistogram>::clone(lock(&self.histograms).entry(key(name, labels)).or_default())
    }
}

impl Counter for MemoryCounter {
    fn add(&self, by: u64) {
        self.0.fetch_add(by, Relaxed);
    }
}

impl Gauge for MemoryGauge {
    fn set(&self, value: f64) {
        self.0.store(value.to_bits(), Relaxed);
    }
}

impl Histogram for MemoryHistogram {
    fn record(&self, value: f64) {
        lock(&self.0).push(value);
    }
}

fn key(name: &'static str, labels: &[(&'static str, &str)]) -> Key {
    let mut labels: Vec<_> = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    labels.sort_unstable();
    (name, labels)
}

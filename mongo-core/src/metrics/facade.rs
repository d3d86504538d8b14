//! Into the [`metrics`] ecosystem.

use std::sync::Arc;

use ::metrics::Label;

use super::{Counter, Gauge, Histogram, MetricsSink};

/// Hands everything to the recorder that the process has installed for the crate [`metrics`], version 0.24: Prometheus, StatsD, or another.
///
/// Install the recorder first: what is registered before goes nowhere. That facade has no boundaries of histograms, the recorder sets them.
///
/// ```
/// use mongo_core::metrics::{MetricsFacade, MetricsSink};
///
/// let documents = MetricsFacade.counter("mongo_backup_documents_total", "documents read", &[("phase", "scan")]);
/// documents.add(3);
/// ```
#[derive(Clone, Copy, Debug, Default)]
#[expect(clippy::exhaustive_structs, reason = "it will never hold anything")]
pub struct MetricsFacade;

struct Handle<T>(T, &'static str);

impl<T> std::fmt::Debug for Handle<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Handle").field(&self.1).finish()
    }
}

fn labels(labels: &[(&'static str, &str)]) -> Vec<Label> {
    labels.iter().map(|(name, value)| Label::new(*name, (*value).to_owned())).collect()
}

impl MetricsSink for MetricsFacade {
    fn counter(&self, name: &'static str, help: &'static str, of: &[(&'static str, &str)]) -> Arc<dyn Counter> {
        ::metrics::describe_counter!(name, help);
        Arc::new(Handle(::metrics::counter!(name, labels(of)), name))
    }

    fn gauge(&self, name: &'static str, help: &'static str, of: &[(&'static str, &str)]) -> Arc<dyn Gauge> {
        ::metrics::describe_gauge!(name, help);
        Arc::new(Handle(::metrics::gauge!(name, labels(of)), name))
    }

    fn histogram(&self, name: &'static str, help: &'static str, of: &[(&'static str, &str)], _: &[f64]) -> Arc<dyn Histogram> {
        ::metrics::describe_histogram!(name, help);
        Arc::new(Handle(::metrics::histogram!(name, labels(of)), name))
    }
}

impl Counter for Handle<::metrics::Counter> {
    fn add(&self, by: u64) {
        self.0.increment(by);
    }
}

impl Gauge for Handle<::metrics::Gauge> {
    fn set(&self, value: f64) {
        self.0.set(value);
    }
}

impl Histogram for Handle<::metrics::Histogram> {
    fn record(&self, value: f64) {
        self.0.record(value);
    }
}

#[cfg(test)]
mod tests {
    use metrics_util::{
        CompositeKey,
        debugging::{DebugValue, DebuggingRecorder},
    };

    use super::*;

    #[test]
    fn a_recorder_of_the_process_gets_what_is_counted() {
        let recorder = DebuggingRecorder::new();
        let snapshotter = recorder.snapshotter();
        ::metrics::with_local_recorder(&recorder, || {
            MetricsFacade.counter("documents_total", "documents", &[("phase", "scan")]).add(3);
            MetricsFacade.counter("documents_total", "documents", &[("phase", "scan")]).add(4);
            MetricsFacade.gauge("lag_seconds", "lag", &[]).set(2.5);
            MetricsFacade.histogram("wait_seconds", "wait", &[], &[1.0]).record(0.5);
        });
        let mut seen: Vec<(String, usize, DebugValue)> = snapshotter
            .snapshot()
            .into_vec()
            .into_iter()
            .map(|(key, _, _, value): (CompositeKey, _, _, _)| (key.key().name().to_owned(), key.key().labels().len(), value))
            .collect();
        seen.sort_by(|one, other| one.0.cmp(&other.0));
        let expected = [
            ("documents_total".to_owned(), 1, DebugValue::Counter(7)),
            ("lag_seconds".to_owned(), 0, DebugValue::Gauge(2.5.into())),
            ("wait_seconds".to_owned(), 0, DebugValue::Histogram(vec![0.5.into()])),
        ];
        assert_eq!(seen, expected);
    }
}

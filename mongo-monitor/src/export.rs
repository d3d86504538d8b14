//! Handing readings on to a host's own metrics.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use mongo_core::metrics::{Counter, Gauge, MetricsSink};

use crate::{
    METRICS,
    metric::{Kind, Metric},
    monitor::View,
    reading::{Reading, Value},
};

/// A sink with what was handed to it.
pub(crate) struct Export {
    sink: Arc<dyn MetricsSink>,
    counters: BTreeMap<Key, Counted>,
    gauges: BTreeMap<Key, Arc<dyn Gauge>>,
}

/// Server, position in the table, and the values of the labels.
type Key = (Option<String>, usize, Vec<String>);

struct Counted {
    handles: Vec<Arc<dyn Counter>>,
    before: Vec<f64>,
    /// For how many rounds it has not been there.
    missed: u32,
}

/// Labels whose values come and go.
const OF_NAMESPACES: [&str; 4] = ["database", "collection", "db_namespace", "db_collection_name"];
const MISSED: u32 = 1000;

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export").field("sink", &self.sink).finish_non_exhaustive()
    }
}

impl Export {
    pub(crate) fn to(sink: Arc<dyn MetricsSink>) -> Self {
        Self { sink, counters: BTreeMap::new(), gauges: BTreeMap::new() }
    }

    pub(crate) fn take(&mut self, view: &View) {
        let of_servers =
            view.members.iter().flat_map(|member| member.readings.iter().map(|reading| (Some(&member.host), reading)));
        let mut shown = BTreeSet::new();
        for (server, reading) in of_servers.chain(view.client.iter().map(|reading| (None, reading))) {
            if reading.metric.labels.iter().any(|label| OF_NAMESPACES.contains(label)) {
                continue;
            }
            let Some(position) = METRICS.iter().position(|metric| metric == reading.metric) else { continue };
            let key = (server.cloned(), position, reading.labels.clone());
            self.hand_on(&key, reading);
            shown.insert(key);
        }
        // A sink has no way to take a gauge back: what is no longer known is no number.
        for (key, gauge) in self.gauges.iter().filter(|(key, _)| !shown.contains(*key)) {
            tracing::trace!(?key, "a series is no longer read");
            gauge.set(f64::NAN);
        }
        self.gauges.retain(|key, _| shown.contains(key));
        // What grew while it could not be read counts when it can be again.
        self.counters.retain(|key, counted| {
            counted.missed = if shown.contains(key) { 0 } else { counted.missed + 1 };
            counted.missed < MISSED
        });
    }

    fn hand_on(&mut self, key: &Key, reading: &Reading) {
        let metric = reading.metric;
        let mut labels: Vec<(&'static str, &str)> = Vec::new();
        labels.extend(key.0.as_ref().map(|server| ("server", &**server)));
        labels.extend(metric.labels.iter().copied().zip(reading.labels.iter().map(String::as_str)));
        match (&reading.value, metric.kind) {
            (Value::Number(number), Kind::Counter) => self.count(key, &[metric.name], metric, &labels, &[*number]),
            (Value::Number(number), _) => {
                let make = || self.sink.gauge(metric.name, metric.help, &labels);
                self.gauges.entry(key.clone()).or_insert_with(make).set(*number);
            }
            (Value::Histogram(histogram), _) => {
                let Some(names) = of_histogram(metric.name) else { return };
                let values = [reading.as_number(), histogram.sum];
                self.count(key, &names, metric, &labels, &values);
            }
        }
    }

    fn count(&mut self, key: &Key, names: &[&'static str], metric: &Metric, labels: &[(&'static str, &str)], values: &[f64]) {
        let make = || Counted {
            handles: names.iter().map(|name| self.sink.counter(name, metric.help, labels)).collect(),
            before: values.to_vec(),
            missed: 0,
        };
        let counted = self.counters.entry(key.clone()).or_insert_with(make);
        for ((handle, before), now) in counted.handles.iter().zip(&mut counted.before).zip(values) {
            // One that is smaller than it was began anew, and has grown by all that it is.
            let grown = if *now >= *before { *now - *before } else { *now };
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count that has grown")]
            let whole = grown.max(0.0) as u64;
            if whole > 0 {
                handle.add(whole);
            }
            // What is left of a fraction counts the next time.
            #[expect(clippy::cast_precision_loss, reason = "a count that has grown")]
            let counted = if *now >= *before { *before + whole as f64 } else { whole as f64 };
            *before = counted;
        }
    }
}

/// What the count and the sum of a histogram are called as counters.
fn of_histogram(name: &str) -> Option<[&'static str; 2]> {
    macro_rules! named {
        ($($histogram:literal),*) => {
            match name {
                $($histogram => Some([concat!($histogram, "_count_total"), concat!($histogram, "_sum_total")]),)*
                _ => None,
            }
        };
    }
    named!(
        "mongodb_operation_duration_seconds",
        "db_client_operation_duration_seconds",
        "db_client_connection_create_time_seconds",
        "db_client_connection_wait_time_seconds",
        "db_client_connection_use_time_seconds",
        "mongodb_client_heartbeat_duration_seconds"
    )
}

#[cfg(test)]
mod tests {
    use mongo_core::{bson::DateTime, metrics::MemoryMetrics};

    use super::*;
    use crate::{monitor::MemberView, reading::HistogramValue, table::metric};

    fn view(readings: Vec<Reading>) -> View {
        let member = MemberView {
            host: "a:1".to_owned(),
            takes_writes: false,
            collectors: Vec::new(),
            readings,
            slow_operations: Vec::new(),
        };
        View { at: DateTime::from_millis(0), members: vec![member], client: Vec::new() }
    }

    fn number(name: &str, labels: &[&str], value: f64) -> Reading {
        crate::reading::reading(name, labels, value).unwrap()
    }

    #[test]
    fn counters_are_handed_on_by_what_they_grew_also_by_parts_and_over_a_restart() {
        let metrics = Arc::new(MemoryMetrics::default());
        let mut export = Export::to(Arc::<MemoryMetrics>::clone(&metrics));
        let at = [("server", "a:1")];
        let requests = || metrics.counter_value("mongodb_network_requests_total", &at);
        for (value, expected) in [(100.0, 0), (130.0, 30), (5.0, 35)] {
            export.take(&view(vec![number("mongodb_network_requests_total", &[], value)]));
            assert_eq!(requests(), Some(expected));
        }
        for (value, expected) in [(0.0, 0), (0.75, 0), (1.5, 1), (2.25, 2)] {
            export.take(&view(vec![number("mongodb_journal_sync_seconds_total", &[], value)]));
            assert_eq!(metrics.counter_value("mongodb_journal_sync_seconds_total", &at), Some(expected));
        }
    }

    #[test]
    fn a_gauge_that_is_no_longer_read_is_no_number() {
        let metrics = Arc::new(MemoryMetrics::default());
        let mut export = Export::to(Arc::<MemoryMetrics>::clone(&metrics));
        export.take(&view(vec![number("mongodb_connections", &["current"], 7.0)]));
        let labels = [("server", "a:1"), ("state", "current")];
        assert_eq!(metrics.gauge_value("mongodb_connections", &labels), Some(7.0));
        export.take(&view(Vec::new()));
        assert!(metrics.gauge_value("mongodb_connections", &labels).unwrap().is_nan());
    }

    #[test]
    fn every_histogram_of_the_table_is_handed_on() {
        for metric in METRICS.iter().filter(|metric| metric.kind == Kind::Histogram) {
            assert!(of_histogram(metric.name).is_some(), "{}", metric.name);
        }
        let metrics = Arc::new(MemoryMetrics::default());
        let mut export = Export::to(Arc::<MemoryMetrics>::clone(&metrics));
        for count in [3, 5] {
            let value = Value::Histogram(HistogramValue { buckets: Vec::new(), count, sum: count as f64 * 2.0 });
            let metric = metric("mongodb_operation_duration_seconds").unwrap();
            export.take(&view(vec![Reading { metric, labels: vec!["reads".to_owned()], value }]));
        }
        let labels = [("server", "a:1"), ("class", "reads")];
        assert_eq!(metrics.counter_value("mongodb_operation_duration_seconds_count_total", &labels), Some(2));
        assert_eq!(metrics.counter_value("mongodb_operation_duration_seconds_sum_total", &labels), Some(4));
    }
}

//! Into [OpenTelemetry](https://opentelemetry.io).

use std::sync::Arc;

use ::opentelemetry::{KeyValue, global, metrics::Meter};

use super::{Counter, Gauge, Histogram, MetricsSink};

/// Hands everything to the meter provider that the process has set for the crate `opentelemetry`, version 0.33.
///
/// Set the provider first: what is registered before goes nowhere. Units are told by how names end.
///
/// ```
/// use mongo_core::metrics::{MetricsSink, OpenTelemetryMetrics};
///
/// let metrics = OpenTelemetryMetrics::default();
/// metrics.gauge("mongo_backup_lag_seconds", "how far behind", &[]).set(1.5);
/// ```
#[derive(Clone)]
pub struct OpenTelemetryMetrics {
    meter: Meter,
}

impl std::fmt::Debug for OpenTelemetryMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenTelemetryMetrics").finish_non_exhaustive()
    }
}

impl Default for OpenTelemetryMetrics {
    fn default() -> Self {
        Self { meter: global::meter("mongo") }
    }
}

struct Handle<T> {
    instrument: T,
    name: &'static str,
    attributes: Vec<KeyValue>,
}

impl<T> std::fmt::Debug for Handle<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").field("name", &self.name).field("attributes", &self.attributes).finish_non_exhaustive()
    }
}

fn attributes(labels: &[(&'static str, &str)]) -> Vec<KeyValue> {
    labels.iter().map(|(name, value)| KeyValue::new(*name, (*value).to_owned())).collect()
}

/// The unit of a name, as UCUM writes it.
fn unit(name: &str) -> &'static str {
    let stem = name.strip_suffix("_total").unwrap_or(name);
    if stem.ends_with("_seconds") {
        "s"
    } else if stem.ends_with("_bytes") {
        "By"
    } else {
        "1"
    }
}

impl MetricsSink for OpenTelemetryMetrics {
    fn counter(&self, name: &'static str, help: &'static str, labels: &[(&'static str, &str)]) -> Arc<dyn Counter> {
        let instrument = self.meter.u64_counter(name).with_description(help).with_unit(unit(name)).build();
        Arc::new(Handle { instrument, name, attributes: attributes(labels) })
    }

    fn gauge(&self, name: &'static str, help: &'static str, labels: &[(&'static str, &str)]) -> Arc<dyn Gauge> {
        let instrument = self.meter.f64_gauge(name).with_description(help).with_unit(unit(name)).build();
        Arc::new(Handle { instrument, name, attributes: attributes(labels) })
    }

    fn histogram(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[(&'static str, &str)],
        boundaries: &[f64],
    ) -> Arc<dyn Histogram> {
        let builder = self.meter.f64_histogram(name).with_description(help).with_unit(unit(name));
        let instrument = builder.with_boundaries(boundaries.to_vec()).build();
        Arc::new(Handle { instrument, name, attributes: attributes(labels) })
    }
}

impl Counter for Handle<::opentelemetry::metrics::Counter<u64>> {
    fn add(&self, by: u64) {
        self.instrument.add(by, &self.attributes);
    }
}

impl Gauge for Handle<::opentelemetry::metrics::Gauge<f64>> {
    fn set(&self, value: f64) {
        self.instrument.record(value, &self.attributes);
    }
}

impl Histogram for Handle<::opentelemetry::metrics::Histogram<f64>> {
    fn record(&self, value: f64) {
        self.instrument.record(value, &self.attributes);
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry_sdk::metrics::{
        InMemoryMetricExporter, PeriodicReader, SdkMeterProvider,
        data::{AggregatedMetrics, MetricData},
    };

    use super::*;

    #[test]
    fn the_provider_of_the_process_gets_what_is_counted() {
        let exporter = InMemoryMetricExporter::default();
        let provider = SdkMeterProvider::builder().with_reader(PeriodicReader::builder(exporter.clone()).build()).build();
        global::set_meter_provider(provider.clone());
        let metrics = OpenTelemetryMetrics::default();
        metrics.counter("documents_total", "documents", &[("phase", "scan")]).add(3);
        metrics.counter("documents_total", "documents", &[("phase", "scan")]).add(4);
        metrics.gauge("lag_seconds", "lag", &[]).set(2.5);
        metrics.histogram("wait_seconds", "wait", &[], &[1.0, 2.0]).record(1.5);
        provider.force_flush().unwrap();
        let finished = exporter.get_finished_metrics().unwrap();
        let mut seen = Vec::new();
        for metric in finished.iter().flat_map(|resource| resource.scope_metrics()).flat_map(|scope| scope.metrics()) {
            let values: Vec<f64> = match metric.data() {
                AggregatedMetrics::U64(MetricData::Sum(sum)) => sum.data_points().map(|point| point.value() as f64).collect(),
                AggregatedMetrics::F64(MetricData::Gauge(gauge)) => gauge.data_points().map(|point| point.value()).collect(),
                AggregatedMetrics::F64(MetricData::Histogram(of)) => of
                    .data_points()
                    .flat_map(|point| point.bucket_counts().map(|count| count as f64).collect::<Vec<_>>())
                    .collect(),
                other => panic!("{other:?}"),
            };
            seen.push((metric.name().to_owned(), metric.unit().to_owned(), values));
        }
        seen.sort_by(|one, other| one.0.cmp(&other.0));
        let expected = [
            ("documents_total".to_owned(), "1".to_owned(), vec![7.0]),
            ("lag_seconds".to_owned(), "s".to_owned(), vec![2.5]),
            ("wait_seconds".to_owned(), "s".to_owned(), vec![0.0, 1.0, 0.0]),
        ];
        assert_eq!(seen, expected);
    }
}

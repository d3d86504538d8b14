//! Readings of metrics, and everything that was read of one member at one time.

use std::time::Duration;

use mongo_core::bson::DateTime;
use serde::{Serialize, Serializer, ser::SerializeMap as _};

use crate::{
    metric::Metric,
    table::{METRICS, metric},
};

/// One value of a metric.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Reading {
    /// The metric.
    #[serde(rename = "name", serialize_with = "name_only")]
    pub metric: &'static Metric,
    /// The values of its labels, in the order of [`Metric::labels`].
    #[serde(skip)]
    pub labels: Vec<String>,
    /// What was read.
    pub value: Value,
}

/// What was read.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum Value {
    /// A number, in the unit of the metric.
    Number(f64),
    /// How many were not above each bound.
    Histogram(HistogramValue),
}

/// A distribution.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct HistogramValue {
    /// Upper bounds in rising order, each with how many were not above it.
    pub buckets: Vec<(f64, u64)>,
    /// How many there were.
    pub count: u64,
    /// Their sum.
    pub sum: f64,
}

impl Reading {
    /// A reading of a number.
    pub(crate) fn number(metric: &'static Metric, labels: Vec<String>, value: f64) -> Self {
        Self { metric, labels, value: Value::Number(value) }
    }

    /// The value of a label.
    ///
    /// `None` for a label that the metric does not have.
    pub fn label(&self, name: &str) -> Option<&str> {
        let position = self.metric.labels.iter().position(|label| *label == name)?;
        self.labels.get(position).map(String::as_str)
    }

    /// The number; for a histogram how many there were.
    #[expect(clippy::cast_precision_loss, reason = "a count of operations, whose last digits do not matter")]
    pub fn as_number(&self) -> f64 {
        match &self.value {
            Value::Number(number) => *number,
            Value::Histogram(histogram) => histogram.count as f64,
        }
    }
}

/// A reading of a number of the metric of a name. All names that are asked for stand in the table.
pub(crate) fn reading(name: &str, labels: &[&str], value: f64) -> Option<Reading> {
    Some(Reading::number(metric(name)?, labels.iter().map(|label| (*label).to_owned()).collect(), value))
}

/// Puts readings into the order of the table.
pub(crate) fn sort(readings: &mut [Reading]) {
    readings.sort_by_cached_key(|reading| METRICS.iter().position(|metric| metric == reading.metric));
}

/// Which run of a process readings are of. Counters begin anew with each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub(crate) struct Epoch {
    /// The process id.
    pub(crate) pid: i64,
    /// When the process began, by the server's wall clock. That can be set while the process runs.
    pub(crate) started: DateTime,
    /// How long it has been running.
    pub(crate) uptime: Duration,
}

impl Epoch {
    /// Whether this is of the same run as another, which was read so long before.
    ///
    /// Looks at no wall clock of ours: one may be set. The process id alone does not tell, as in a container it is always the same; but whoever has run
    /// on has run for longer by as much as has passed. (A server whose own clock is set back tells a shorter time, and is taken for another run: one gap.)
    pub(crate) fn goes_on_from(&self, before: &Self, passed: Duration) -> bool {
        let has_run_on = self.uptime >= before.uptime && self.uptime + TOLERANCE >= before.uptime + passed;
        self.pid == before.pid && has_run_on
    }
}

/// What a collector has read of a member.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub(crate) struct Sample {
    /// When it was read, by the wall clock of this host.
    pub(crate) taken: DateTime,
    /// The same by a clock that never goes back: what rates are worked out with.
    #[serde(skip)]
    pub(crate) at: Duration,
    /// The run of the server's process, where the answer tells it.
    pub(crate) epoch: Option<Epoch>,
    /// The readings.
    #[serde(serialize_with = "with_labels")]
    pub(crate) readings: Vec<Reading>,
}

impl Sample {
    /// The readings of a metric.
    pub(crate) fn of<'a>(&'a self, metric: &'a str) -> impl Iterator<Item = &'a Reading> + 'a {
        self.readings.iter().filter(move |reading| reading.metric.name == metric)
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn name_only<S: Serializer>(metric: &&'static Metric, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(metric.name)
}

struct Labelled<'a>(&'a Reading);

impl Serialize for Labelled<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", self.0.metric.name)?;
        if !self.0.labels.is_empty() {
            let labels: std::collections::BTreeMap<&str, &String> =
                self.0.metric.labels.iter().copied().zip(&self.0.labels).collect();
            map.serialize_entry("labels", &labels)?;
        }
        map.serialize_entry("value", &self.0.value)?;
        map.end()
    }
}

pub(crate) fn with_labels<S: Serializer>(readings: &[Reading], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(readings.iter().map(Labelled))
}

/// An answer may take a while, either time. No server ends and begins again within it.
const TOLERANCE: Duration = Duration::from_secs(2);

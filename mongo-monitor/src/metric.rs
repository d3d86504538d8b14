//! What a metric is: its name, kind, unit and labels, and where its readings come from.

use std::fmt;

use serde::Serialize;

/// A metric as the [table](crate::METRICS) declares it. Names, units and labels do not change with the server's version.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Metric {
    /// Its name, which ends with the unit, and for counters with `_total`.
    pub name: &'static str,
    /// What it says, in one line.
    pub help: &'static str,
    /// How its readings follow each other.
    pub kind: Kind,
    /// What its readings are measured in.
    pub unit: Unit,
    /// The names of its labels, in the order of a reading's.
    pub labels: &'static [&'static str],
    /// Where its readings stand.
    #[serde(skip)]
    pub(crate) source: Source,
}

/// How the readings of a metric follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Kind {
    /// Only grows, until the process ends: what matters is its rate.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Durations or sizes by how many are not above each bound; grows like a counter.
    Histogram,
    /// Always 1; what it tells stands in its labels.
    Info,
    /// 1 for the state that holds, 0 for all others. The label `state` names it; in OpenMetrics that is named as the metric.
    StateSet,
}

impl fmt::Display for Kind {
    /// As OpenMetrics names it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Info => "info",
            Self::StateSet => "stateset",
        })
    }
}

/// What readings are measured in. There are only base units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Unit {
    /// A count, or something that has no unit.
    None,
    /// Seconds.
    Seconds,
    /// Bytes.
    Bytes,
}

impl Unit {
    /// What a name of this unit ends with, before `_total`.
    pub(crate) fn suffix(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Seconds => Some("seconds"),
            Self::Bytes => Some("bytes"),
        }
    }
}

/// Where the readings of a metric come from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Source {
    /// Fields of `serverStatus`.
    ServerStatus(&'static [Field]),
    /// The latencies of `serverStatus`, with their histograms.
    Latencies,
    /// Fields of a server's diagnostic data, which are of its machine.
    Machine(&'static [Field]),
    /// Something that a collector works out; what it reads from, for the documentation.
    WorkedOut(&'static str),
}

/// A field, or all that a pattern finds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Field {
    /// Names separated by dots. `*` stands for any name, which becomes the value of a label.
    pub(crate) path: &'static str,
    /// What `*` may stand for; empty for anything.
    pub(crate) only: &'static [&'static str],
    /// The values of the labels that the path does not give, which come before those it does.
    pub(crate) labels: &'static [&'static str],
    /// What the number is multiplied with to be in the metric's unit.
    pub(crate) scale: f64,
}

impl Metric {
    /// Where its readings stand in the server's answers, for a person.
    pub fn sources(&self) -> Vec<String> {
        match &self.source {
            Source::ServerStatus(fields) => fields.iter().map(|field| format!("serverStatus: {}", field.path)).collect(),
            Source::Machine(fields) => fields.iter().map(|field| format!("getDiagnosticData: {}", field.path)).collect(),
            Source::Latencies => vec!["serverStatus: opLatencies, with histograms".to_owned()],
            Source::WorkedOut(from) => vec![(*from).to_owned()],
        }
    }
}

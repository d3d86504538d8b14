//! How the rooms of the table declare a metric.

use crate::metric::{Field, Kind, Metric, Source, Unit};

pub(super) const fn counter(
    name: &'static str,
    help: &'static str,
    unit: Unit,
    labels: &'static [&'static str],
    fields: &'static [Field],
) -> Metric {
    Metric { name, help, kind: Kind::Counter, unit, labels, source: Source::ServerStatus(fields) }
}

pub(super) const fn gauge(
    name: &'static str,
    help: &'static str,
    unit: Unit,
    labels: &'static [&'static str],
    fields: &'static [Field],
) -> Metric {
    Metric { name, help, kind: Kind::Gauge, unit, labels, source: Source::ServerStatus(fields) }
}

pub(super) const fn worked_out(
    name: &'static str,
    help: &'static str,
    kind: Kind,
    unit: Unit,
    labels: &'static [&'static str],
    from: &'static str,
) -> Metric {
    Metric { name, help, kind, unit, labels, source: Source::WorkedOut(from) }
}

pub(super) const fn machine(
    name: &'static str,
    help: &'static str,
    kind: Kind,
    unit: Unit,
    labels: &'static [&'static str],
    fields: &'static [Field],
) -> Metric {
    Metric { name, help, kind, unit, labels, source: Source::Machine(fields) }
}

pub(super) const fn as_is(path: &'static str) -> Field {
    labelled(path, &[])
}

pub(super) const fn among(path: &'static str, only: &'static [&'static str]) -> Field {
    Field { path, only, labels: &[], scale: 1.0 }
}

pub(super) const fn scaled(path: &'static str, scale: f64) -> Field {
    Field { path, only: &[], labels: &[], scale }
}

pub(super) const fn labelled(path: &'static str, labels: &'static [&'static str]) -> Field {
    Field { path, only: &[], labels, scale: 1.0 }
}

pub(super) const fn micros(path: &'static str, labels: &'static [&'static str]) -> Field {
    Field { path, only: &[], labels, scale: 1e-6 }
}

pub(super) const fn millis(path: &'static str, labels: &'static [&'static str]) -> Field {
    Field { path, only: &[], labels, scale: 1e-3 }
}

pub(super) const fn kibibytes(path: &'static str, labels: &'static [&'static str]) -> Field {
    Field { path, only: &[], labels, scale: 1024.0 }
}

pub(super) const fn mebibytes(path: &'static str, labels: &'static [&'static str]) -> Field {
    Field { path, only: &[], labels, scale: 1_048_576.0 }
}

//! What the monitor says of itself.

use super::declare::worked_out;
use crate::metric::{Kind, Metric, Unit};

pub(super) const METRICS: &[Metric] = &[
    worked_out(
        "mongodb_monitor_collect_duration_seconds",
        "How long the last collection took",
        Kind::Gauge,
        Unit::Seconds,
        &["collector"],
        "this crate",
    ),
    worked_out(
        "mongodb_monitor_snapshot_age_seconds",
        "How old what is shown is",
        Kind::Gauge,
        Unit::Seconds,
        &["collector"],
        "this crate",
    ),
    worked_out(
        "mongodb_monitor_overdue_ratio",
        "The same as a share of the age from which on it is no longer shown; of what was never read, since the member is watched",
        Kind::Gauge,
        Unit::None,
        &["collector"],
        "this crate",
    ),
    worked_out("mongodb_monitor_series", "Series that are shown", Kind::Gauge, Unit::None, &["collector"], "this crate"),
    worked_out(
        "mongodb_monitor_series_dropped",
        "Series that are left out because there are too many",
        Kind::Gauge,
        Unit::None,
        &["collector"],
        "this crate",
    ),
];

//! What the dashboard draws.

use std::time::Duration;

use serde::Serialize;

use crate::{history::Point, monitor::Monitor, table::metric};

/// A drawing with lines.
#[derive(Debug, Serialize)]
pub(crate) struct Chart {
    id: &'static str,
    title: &'static str,
    unit: &'static str,
    lines: Vec<Line>,
}

/// What one member was over a while.
#[derive(Debug, Serialize)]
struct Line {
    member: String,
    /// Which of several that a chart has of each member.
    series: Option<String>,
    points: Vec<Point>,
}

/// What a chart shows.
struct Plan {
    id: &'static str,
    title: &'static str,
    unit: &'static str,
    metric: &'static str,
    /// The label by which its lines differ, and those of its values that are shown; none for all.
    by: Option<(&'static str, &'static [&'static str])>,
    shows: Shows,
}

/// What of a metric is shown.
enum Shows {
    All,
    /// Series with a value of another label.
    Only(&'static str, &'static str),
    /// Each divided by the series with this value of the label by which lines differ.
    ShareOf(&'static str),
    /// Each divided by the same series of another metric, where both were read at once.
    Per(&'static str),
}

/// The drawings, over the newest while of a length.
pub(crate) fn charts(monitor: &Monitor, last: Duration) -> Vec<Chart> {
    let (now, _) = monitor.shared().now();
    PLANS.iter().map(|plan| plan.draw(monitor, last, now)).collect()
}

impl Plan {
    fn draw(&self, monitor: &Monitor, last: Duration, now: Duration) -> Chart {
        let mut lines = Vec::new();
        if let Some(metric) = metric(self.metric) {
            let label = |labels: &[String], name: &str| {
                let position = metric.labels.iter().position(|label| *label == name)?;
                labels.get(position).cloned()
            };
            let all = monitor.points(metric, last, now);
            let per = match self.shows {
                Shows::Per(other) => {
                    crate::table::metric(other).map(|other| monitor.points(other, last, now)).unwrap_or_default()
                }
                _ => Vec::new(),
            };
            for (member, labels, points) in &all {
                let series = self.by.and_then(|(name, _)| label(labels, name));
                let is_shown = match (self.by, &series) {
                    (Some((_, wanted)), Some(series)) => wanted.is_empty() || wanted.contains(&series.as_str()),
                    _ => true,
                };
                let is_meant = match self.shows {
                    Shows::Only(name, value) => label(labels, name).as_deref() == Some(value),
                    _ => true,
                };
                if !is_shown || !is_meant {
                    continue;
                }
                // Lag is told by the primary of others.
                let member = label(labels, "member").unwrap_or_else(|| member.clone());
                let points = match (&self.shows, self.by) {
                    (Shows::ShareOf(whole), Some((name, _))) => {
                        let whole = all
                            .iter()
                            .find(|(other, labels, _)| *other == member && label(labels, name).as_deref() == Some(whole));
                        let Some(whole) = whole.and_then(|(_, _, points)| points.last()?.1).filter(|whole| *whole > 0.0) else {
                            continue;
                        };
                        points.iter().map(|(at, value)| (*at, value.map(|value| value / whole))).collect()
                    }
                    (Shows::Per(_), _) => {
                        let Some((_, _, whole)) = per.iter().find(|(other, of, _)| *other == member && of == labels) else {
                            continue;
                        };
                        points.iter().map(|point| ratio(point, whole)).collect()
                    }
                    _ => points.clone(),
                };
                lines.push(Line { member, series, points });
            }
        }
        Chart { id: self.id, title: self.title, unit: self.unit, lines }
    }
}

/// A point divided by that of another series at the same time, of which the points are in order.
fn ratio((at, value): &Point, whole: &[Point]) -> Point {
    let same = whole.binary_search_by(|(other, _)| other.total_cmp(at)).ok().and_then(|position| whole.get(position)?.1);
    (*at, value.zip(same).filter(|(_, whole)| *whole > 0.0).map(|(value, whole)| value / whole))
}

const PLANS: &[Plan] = &[
    Plan {
        id: "operations",
        title: "Operations",
        unit: "per_second",
        metric: "mongodb_operations_total",
        by: Some(("type", &[])),
        shows: Shows::All,
    },
    Plan {
        id: "latency",
        title: "Mean latency",
        unit: "seconds",
        metric: "mongodb_timed_operations_seconds_total",
        by: Some(("class", &["reads", "writes", "commands"])),
        shows: Shows::Per("mongodb_timed_operations_total"),
    },
    Plan {
        id: "lag",
        title: "Replication lag",
        unit: "seconds",
        metric: "mongodb_replica_lag_seconds",
        by: None,
        shows: Shows::All,
    },
    Plan {
        id: "connections",
        title: "Connections",
        unit: "count",
        metric: "mongodb_connections",
        by: None,
        shows: Shows::Only("state", "current"),
    },
    Plan {
        id: "cache",
        title: "Cache",
        unit: "ratio",
        metric: "mongodb_cache_bytes",
        by: Some(("kind", &["used", "dirty"])),
        shows: Shows::ShareOf("max"),
    },
    Plan {
        id: "tickets",
        title: "Tickets in use",
        unit: "count",
        metric: "mongodb_tickets",
        by: Some(("op", &[])),
        shows: Shows::Only("state", "out"),
    },
    Plan {
        id: "queue",
        title: "Operations that wait",
        unit: "count",
        metric: "mongodb_global_lock_queue",
        by: Some(("kind", &[])),
        shows: Shows::All,
    },
    Plan {
        id: "network",
        title: "Network",
        unit: "bytes_per_second",
        metric: "mongodb_network_bytes_total",
        by: Some(("direction", &[])),
        shows: Shows::All,
    },
    Plan {
        id: "memory",
        title: "Memory",
        unit: "bytes",
        metric: "mongodb_memory_bytes",
        by: None,
        shows: Shows::Only("kind", "resident"),
    },
];

#[cfg(test)]
mod tests {
    use mongo_core::bson::DateTime;

    use super::*;
    use crate::{
        history::History,
        reading::{Reading, Sample},
    };

    #[test]
    fn series_that_were_read_at_once_are_divided_point_by_point() {
        let read = ["mongodb_timed_operations_seconds_total", "mongodb_timed_operations_total"].map(|name| metric(name).unwrap());
        let mut history = History::new(Duration::from_secs(600));
        for step in 0..20_u32 {
            let at = Duration::from_nanos(1_000_000_007) * step;
            let grown = f64::from(step);
            let numbers = read.iter().zip([grown, grown * 4.0]);
            let readings = numbers.map(|(metric, number)| Reading::number(metric, vec!["reads".to_owned()], number)).collect();
            history.record(&Sample { taken: DateTime::from_millis(0), at, epoch: None, readings });
        }
        let now = Duration::from_nanos(25_123_456_789);
        let [took, count] = read.map(|metric| {
            let mut all = history.points(metric, Duration::from_secs(600), now, Duration::from_secs(60));
            all.remove(0).1
        });
        let divided: Vec<Option<f64>> = took.iter().map(|point| ratio(point, &count).1).collect();
        assert!(divided.len() > 2 && divided[0].is_none(), "a counter has no rate at first: {divided:?}");
        assert!(divided[1..].iter().all(|value| value.is_some_and(|value| (value - 0.25).abs() < 1e-9)), "{divided:?}");
    }

    #[test]
    fn what_was_not_read_at_the_same_time_is_divided_by_nothing() {
        let whole = [(-30.0, Some(4.0)), (-20.0, None), (-10.0, Some(0.0)), (0.0, Some(5.0))];
        let divided: Vec<_> = [-30.0, -25.0, -20.0, -10.0, 0.0].map(|at| ratio(&(at, Some(10.0)), &whole).1).to_vec();
        assert_eq!(divided, [Some(2.5), None, None, None, Some(2.0)]);
        assert_eq!(ratio(&(-30.0, None), &whole), (-30.0, None));
    }
}

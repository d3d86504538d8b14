//! What readings were over a while, and the rates of counters, which know when a process began anew.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use serde::Serialize;

use crate::{
    metric::{Kind, Metric},
    reading::{Epoch, Sample},
    table::metric,
};

/// The readings of one member over a while.
///
/// Memory: 32 bytes for each reading that is kept. What was not read for the whole while is forgotten.
#[derive(Debug)]
pub(crate) struct History {
    keep: Duration,
    series: HashMap<Key, VecDeque<Kept>>,
    /// The run of the process that was seen last, and how many there were before.
    run: (Option<(Epoch, Duration)>, u32),
    newest: Duration,
}

type Key = (&'static str, Vec<String>);

#[derive(Clone, Copy, Debug)]
struct Kept {
    at: Duration,
    value: f64,
    run: u32,
}

/// A point of a series as it is drawn: how many seconds before now, and the value, of a counter its rate;
/// none where there is a gap.
pub(crate) type Point = (f64, Option<f64>);

/// What a metric was over a while.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Summary {
    /// The smallest reading.
    pub min: f64,
    /// The largest reading.
    pub max: f64,
    /// The mean of the readings.
    pub mean: f64,
    /// The newest reading.
    pub last: f64,
    /// How many there were.
    pub readings: usize,
    /// Of a counter, by how much it grew in a second, over the time in which that is known: not over a restart, and not where it was reset.
    /// `None` for others, and before there are two readings of one run.
    pub rate: Option<f64>,
    /// Over how much of the while the rate is known, in seconds.
    pub known_seconds: f64,
    /// Whether a part of the while is missing from the rate, because the process began anew or the counter was reset.
    pub has_gap: bool,
}

impl History {
    /// One that keeps readings for this long.
    pub(crate) fn new(keep: Duration) -> Self {
        Self { keep, series: HashMap::new(), run: (None, 0), newest: Duration::ZERO }
    }

    /// Takes a sample in. One that is not newer than the last, as by a late answer, is left out.
    pub(crate) fn record(&mut self, sample: &Sample) {
        if let Some(epoch) = sample.epoch {
            // What a server had collected may be a little older than what it was asked for last.
            if self.run.0.is_some_and(|(_, at)| sample.at <= at) {
                return;
            }
            let goes_on = |(before, at): (Epoch, Duration)| epoch.goes_on_from(&before, sample.at.saturating_sub(at));
            if self.run.0.is_some_and(|before| !goes_on(before)) {
                self.run.1 += 1;
            }
            self.run.0 = Some((epoch, sample.at));
        }
        self.newest = self.newest.max(sample.at);
        for reading in &sample.readings {
            let points = self.series.entry((reading.metric.name, reading.labels.clone())).or_default();
            if points.back().is_none_or(|last| last.at < sample.at) {
                points.push_back(Kept { at: sample.at, value: reading.as_number(), run: self.run.1 });
            }
        }
        let oldest = self.newest.saturating_sub(self.keep);
        self.series.retain(|_, points| {
            while points.front().is_some_and(|point| point.at < oldest) {
                points.pop_front();
            }
            !points.is_empty()
        });
    }

    /// What a metric was over the newest while of a length; `labels` are the values of its labels in their order.
    ///
    /// `None` if it was not read in it.
    pub(crate) fn summary(&self, metric: &Metric, labels: &[&str], last: Duration) -> Option<Summary> {
        let labels: Vec<String> = labels.iter().map(|label| (*label).to_owned()).collect();
        self.summary_of(metric, self.series.get(&(metric.name, labels))?, last)
    }

    fn summary_of(&self, metric: &Metric, points: &VecDeque<Kept>, last: Duration) -> Option<Summary> {
        let from = self.newest.saturating_sub(last);
        // They are in the order of time.
        let begin = points.partition_point(|point| point.at < from);
        let within = || points.range(begin..);
        let newest = points.back().filter(|_| begin < points.len())?;
        let values = || within().map(|point| point.value);
        let readings = points.len() - begin;
        let mut summary = Summary {
            min: values().fold(f64::INFINITY, f64::min),
            max: values().fold(f64::NEG_INFINITY, f64::max),
            #[expect(clippy::cast_precision_loss, reason = "some thousands of readings")]
            mean: values().sum::<f64>() / readings as f64,
            last: newest.value,
            readings,
            rate: None,
            known_seconds: 0.0,
            has_gap: false,
        };
        if matches!(metric.kind, Kind::Counter | Kind::Histogram) {
            let (mut grown, mut known) = (0.0, Duration::ZERO);
            for (before, now) in within().zip(within().skip(1)) {
                // A counter that is smaller than it was, was reset: without its having said so when there is no epoch.
                if before.run != now.run || now.value < before.value {
                    summary.has_gap = true;
                    continue;
                }
                grown += now.value - before.value;
                known += now.at.saturating_sub(before.at);
            }
            summary.known_seconds = known.as_secs_f64();
            summary.rate = (!known.is_zero()).then(|| grown / known.as_secs_f64());
        }
        Some(summary)
    }

    /// What is to be drawn of all series of a metric over the newest while of a length: a hundred and some points of each, whatever the length.
    /// What is further apart than `gap` is not connected.
    pub(crate) fn points(&self, metric: &Metric, last: Duration, now: Duration, gap: Duration) -> Vec<(Vec<String>, Vec<Point>)> {
        let series = self.series.iter().filter(|((name, _), _)| *name == metric.name);
        let draw = |points: &VecDeque<Kept>| {
            let from = now.saturating_sub(last);
            let step = last / DRAWN;
            let mut drawn: Vec<Point> = Vec::new();
            let mut before: Option<Kept> = None;
            // Whatever lies between two points is a part of the later one.
            let mut due = Duration::ZERO;
            for point in points.iter().filter(|point| point.at >= from) {
                let is_gap = before.is_some_and(|before| before.run != point.run || point.at > before.at + gap.max(step * 3));
                if point.at < due && !is_gap {
                    continue;
                }
                let value = match (metric.kind, before) {
                    (Kind::Counter | Kind::Histogram, Some(before)) if !is_gap && point.value >= before.value => {
                        Some((point.value - before.value) / (point.at - before.at).as_secs_f64())
                    }
                    (Kind::Counter | Kind::Histogram, _) => None,
                    _ => Some(point.value),
                };
                let ago = |at: Duration| -now.saturating_sub(at).as_secs_f64();
                if is_gap && !matches!(metric.kind, Kind::Counter | Kind::Histogram) {
                    drawn.extend(before.map(|before| (ago(before.at + (point.at - before.at) / 2), None)));
                }
                drawn.push((ago(point.at), value));
                before = Some(*point);
                due = point.at + step;
            }
            drawn
        };
        let mut series: Vec<_> = series.map(|((_, labels), points)| (labels.clone(), draw(points))).collect();
        series.retain(|(_, points)| !points.is_empty());
        series.sort_by(|one, other| one.0.cmp(&other.0));
        series
    }

    /// What all series of a metric that are wanted were over the newest while of a length, each with the values of its labels. Not those that
    /// were no longer read at the end of it.
    pub(crate) fn current(
        &self,
        metric: &Metric,
        last: Duration,
        current: Duration,
        is_wanted: impl Fn(&[String]) -> bool,
    ) -> Vec<(Vec<String>, Summary)> {
        let since = self.newest.saturating_sub(current);
        let series = self.series.iter().filter(|((name, labels), points)| {
            *name == metric.name && is_wanted(labels) && points.back().is_some_and(|point| point.at >= since)
        });
        series.filter_map(|((_, labels), points)| Some((labels.clone(), self.summary_of(metric, points, last)?))).collect()
    }

    /// What every series was over the newest while of a length.
    pub(crate) fn summaries(&self, last: Duration) -> Vec<(&'static Metric, Vec<String>, Summary)> {
        let summary = |((name, labels), points): (&Key, &VecDeque<Kept>)| {
            let metric = metric(name)?;
            Some((metric, labels.clone(), self.summary_of(metric, points, last)?))
        };
        let mut summaries: Vec<_> = self.series.iter().filter_map(summary).collect();
        summaries.sort_by(|(a, labels, _), (b, others, _)| (a.name, labels).cmp(&(b.name, others)));
        summaries
    }
}

/// How many points are drawn of a series.
const DRAWN: u32 = 150;

#[cfg(test)]
mod tests {
    use mongo_core::bson::DateTime;
    use proptest::prelude::*;

    use super::*;
    use crate::reading::Reading;

    /// Runs of a process are told apart by where they began; it is always the same process id, as in a container.
    fn sample(seconds: u64, began: u64, requests: f64) -> Sample {
        let metric = metric("mongodb_network_requests_total").unwrap();
        Sample {
            taken: DateTime::from_millis(0),
            at: Duration::from_secs(seconds),
            epoch: Some(Epoch { pid: 1, started: DateTime::from_millis(0), uptime: Duration::from_secs(seconds - began) }),
            readings: vec![Reading::number(metric, Vec::new(), requests)],
        }
    }

    fn rate(history: &History, last: u64) -> Option<Summary> {
        history.summary(metric("mongodb_network_requests_total").unwrap(), &[], Duration::from_secs(last))
    }

    #[test]
    fn a_restart_is_a_gap_and_no_negative_rate() {
        let mut history = History::new(Duration::from_secs(100));
        for (seconds, pid, requests) in [(1000, 0, 1000.0), (1010, 0, 1100.0), (1020, 1019, 5.0), (1030, 1019, 105.0)] {
            history.record(&sample(seconds, pid, requests));
        }
        let summary = rate(&history, 100).unwrap();
        assert_eq!((summary.rate, summary.has_gap, summary.last), (Some(10.0), true, 105.0));
        assert_eq!(rate(&history, 10).unwrap().rate, Some(10.0));
        assert_eq!(rate(&history, 5).unwrap().rate, None, "one reading has no rate");
    }

    #[test]
    fn a_process_that_began_anew_and_counted_further_is_noticed_too() {
        let mut history = History::new(Duration::from_secs(100));
        history.record(&sample(1000, 0, 10.0));
        history.record(&sample(1010, 1009, 500.0));
        let summary = rate(&history, 100).unwrap();
        assert_eq!((summary.rate, summary.has_gap), (None, true));
    }

    #[test]
    fn what_is_older_than_what_is_known_is_left_out_and_is_no_restart() {
        let mut history = History::new(Duration::from_secs(100));
        for (seconds, requests) in [(1000, 10.0), (1010, 110.0), (1009, 100.0), (1020, 210.0)] {
            history.record(&sample(seconds, 0, requests));
        }
        let summary = rate(&history, 100).unwrap();
        assert_eq!((summary.rate, summary.has_gap, summary.readings), (Some(10.0), false, 3));
    }

    #[test]
    fn a_clock_that_is_set_is_no_restart() {
        let mut history = History::new(Duration::from_secs(100));
        for (seconds, clock) in [(1000, 0), (1010, 3_600_000), (1020, -86_400_000)] {
            let mut sample = sample(seconds, 0, seconds as f64);
            sample.epoch.as_mut().unwrap().started = DateTime::from_millis(clock);
            sample.taken = DateTime::from_millis(clock);
            history.record(&sample);
        }
        let summary = rate(&history, 100).unwrap();
        assert_eq!((summary.rate, summary.has_gap), (Some(1.0), false));
    }

    #[test]
    fn old_readings_and_series_that_ended_are_forgotten() {
        let mut history = History::new(Duration::from_secs(30));
        (0..10).for_each(|second| history.record(&sample(second, 0, 0.0)));
        let mut other = sample(60, 0, 0.0);
        other.readings[0].metric = metric("mongodb_ttl_passes_total").unwrap();
        history.record(&other);
        assert_eq!(history.series.len(), 1);
        assert!(rate(&history, 100).is_none());
    }

    proptest! {
        #[test]
        fn no_rate_is_negative_or_larger_than_the_fastest_second(
            steps in proptest::collection::vec((3..20_u64, 0..1000_u32, any::<bool>()), 1..50),
        ) {
            let mut history = History::new(Duration::from_secs(10_000));
            let (mut at, mut count, mut began, mut fastest) = (100, 0.0, 0, 0.0_f64);
            for (seconds, more, restarts) in steps {
                at += seconds;
                if restarts {
                    (began, count) = (at, 0.0);
                } else {
                    fastest = fastest.max(f64::from(more) / seconds as f64);
                }
                count += f64::from(more);
                history.record(&sample(at, began, count));
            }
            let summary = rate(&history, 10_000).unwrap();
            if let Some(rate) = summary.rate {
                prop_assert!(rate >= 0.0 && rate <= fastest * (1.0 + 1e-9), "{rate} {fastest}");
            }
        }
    }
}

//! How long things took.

use std::time::Duration;

use crate::reading::HistogramValue;

/// Durations by how many were not above each bound. The bounds are those that OpenTelemetry advises for database clients.
#[derive(Clone, Debug, Default)]
pub(super) struct Distribution {
    /// How many fell between each bound and the one before.
    counts: [u64; BOUNDS.len()],
    count: u64,
    sum: f64,
}

impl Distribution {
    pub(super) fn add(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        if let Some(count) = BOUNDS.iter().position(|bound| seconds <= *bound).and_then(|position| self.counts.get_mut(position))
        {
            *count += 1;
        }
        self.count += 1;
        self.sum += seconds;
    }

    pub(super) fn value(&self) -> HistogramValue {
        let cumulated = self.counts.iter().scan(0, |below, count| {
            *below += count;
            Some(*below)
        });
        HistogramValue { buckets: BOUNDS.into_iter().zip(cumulated).collect(), count: self.count, sum: self.sum }
    }
}

const BOUNDS: [f64; 9] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_in_the_bucket_of_its_bound_and_all_above() {
        let mut distribution = Distribution::default();
        [1, 2, 5, 60_000].into_iter().for_each(|millis| distribution.add(Duration::from_millis(millis)));
        let value = distribution.value();
        assert_eq!(value.buckets[..3], [(0.001, 1), (0.005, 3), (0.01, 3)]);
        assert_eq!((value.buckets[8], value.count, value.sum), ((10.0, 3), 4, 60.008));
    }
}

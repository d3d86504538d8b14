//! How often work may come: the generic cell rate algorithm.
//!
//! A theoretical arrival time is kept that moves on by one interval with each arrival. Whoever comes earlier than a burst before it is too
//! early. (ITU-T I.371, Annex A; the form is that of virtual scheduling.)

use std::time::Duration;

use crate::class::Rate;

/// One rate limit. Time is given to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RateLimit {
    interval: Duration,
    tolerance: Duration,
    /// When the next arrival would be due if they came evenly.
    due: Duration,
}

impl RateLimit {
    pub(crate) fn new(rate: Rate) -> Self {
        // A rate of next to nothing is an interval of an age, not of infinity.
        let interval = Duration::try_from_secs_f64(1.0 / rate.per_second).unwrap_or(AN_AGE).min(AN_AGE);
        Self { interval, tolerance: interval.saturating_mul(rate.burst.saturating_sub(1)), due: Duration::ZERO }
    }

    /// Takes an arrival in, or says how long to wait.
    pub(crate) fn admit(&mut self, now: Duration) -> Result<(), Duration> {
        let earliest = self.due.saturating_sub(self.tolerance);
        if now < earliest {
            return Err(earliest - now);
        }
        self.due = self.due.max(now).saturating_add(self.interval);
        Ok(())
    }
}

const AN_AGE: Duration = Duration::from_secs(365 * 24 * 60 * 60);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_burst_passes_and_then_one_for_each_interval() {
        let mut limit = RateLimit::new(Rate::new(10.0, 3));
        let at = Duration::from_millis;
        assert_eq!([0, 0, 0].map(|now| limit.admit(at(now))), [Ok(()); 3]);
        assert_eq!(limit.admit(at(0)), Err(at(100)));
        assert_eq!(limit.admit(at(99)), Err(at(1)));
        assert_eq!(limit.admit(at(100)), Ok(()));
        assert_eq!(limit.admit(at(100)), Err(at(100)));
        // A long rest gives the burst back, and no more.
        assert_eq!([9000, 9000, 9000].map(|now| limit.admit(at(now))), [Ok(()); 3]);
        assert!(limit.admit(at(9000)).is_err());
    }

    proptest! {
        #[test]
        fn no_window_holds_more_than_its_rate_and_a_burst(
            per_second in 0.5_f64..500.0,
            burst in 1_u32..20,
            gaps in proptest::collection::vec(0_u64..200, 1..300),
        ) {
            let mut limit = RateLimit::new(Rate::new(per_second, burst));
            let mut now = Duration::ZERO;
            let mut admitted = Vec::new();
            for gap in gaps {
                now += Duration::from_millis(gap);
                match limit.admit(now) {
                    Ok(()) => admitted.push(now),
                    // Whoever waits as long as was said is let in.
                    Err(wait) => prop_assert!(limit.clone().admit(now + wait).is_ok()),
                }
            }
            for (first, from) in admitted.iter().enumerate() {
                for (last, until) in admitted.iter().enumerate().skip(first) {
                    let allowed = (*until - *from).as_secs_f64() * per_second + f64::from(burst);
                    prop_assert!((last - first + 1) as f64 <= allowed + 1e-3);
                }
            }
        }
    }
}

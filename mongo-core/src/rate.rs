//! How often work may come: the generic cell rate algorithm.
//!
//! A theoretical arrival time is kept that moves on by one interval with each arrival. Whoever comes earlier than a burst before it is too
//! early. (ITU-T I.371, Annex A; the form is that of virtual scheduling.)

use std::time::Duration;

use crate::{Error, Result};

/// How often something may happen.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct Rate {
    /// So often a second, in the long run.
    pub per_second: f64,
    /// So often at once, after a quiet time; at least 1.
    pub burst: u32,
}

impl Rate {
    /// So often a second in the long run, and `burst` times at once.
    pub fn new(per_second: f64, burst: u32) -> Self {
        Self { per_second, burst }
    }

    /// Checks that it is one.
    ///
    /// # Errors
    /// `InvalidInput` for a number that is not above 0, or a burst of nothing.
    pub fn check(self) -> Result<()> {
        if self.per_second.is_finite() && self.per_second > 0.0 && self.burst > 0 {
            return Ok(());
        }
        Err(Error::invalid("a rate is a number above 0 a second and a burst of at least 1"))
    }
}

/// One rate limit. Time is given to it, as what has passed since some fixed moment.
///
/// ```
/// use std::time::Duration;
/// use mongo_core::rate::{Rate, RateLimit};
///
/// let mut limit = RateLimit::new(Rate::new(10.0, 1));
/// assert_eq!(limit.admit(Duration::ZERO), Ok(()));
/// assert_eq!(limit.admit(Duration::ZERO), Err(Duration::from_millis(100)));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct RateLimit {
    interval: Duration,
    tolerance: Duration,
    /// When the next arrival would be due if they came evenly.
    due: Duration,
}

impl RateLimit {
    /// A limit that nothing has come to yet.
    pub fn new(rate: Rate) -> Self {
        // A rate of next to nothing is an interval of an age, not of infinity.
        let interval = Duration::try_from_secs_f64(1.0 / rate.per_second).unwrap_or(AN_AGE).min(AN_AGE);
        Self { interval, tolerance: interval.saturating_mul(rate.burst.saturating_sub(1)), due: Duration::ZERO }
    }

    /// Takes an arrival in.
    ///
    /// # Errors
    /// How long to wait before it is time for one.
    pub fn admit(&mut self, now: Duration) -> Result<(), Duration> {
        self.admit_within(now, Duration::ZERO).map(drop)
    }

    /// Takes in an arrival that can wait so long, and says how long it has to. Those that wait do so in the order in which they came.
    ///
    /// # Errors
    /// How long it would have to wait, if that is longer than it can; it is not taken in then.
    pub fn admit_within(&mut self, now: Duration, patience: Duration) -> Result<Duration, Duration> {
        let wait = self.due.saturating_sub(self.tolerance).saturating_sub(now);
        if wait > patience {
            return Err(wait);
        }
        self.due = self.due.max(now).saturating_add(self.interval);
        Ok(wait)
    }

    /// A mark of what was taken in last, for [`give_back`](Self::give_back).
    pub fn mark(&self) -> Duration {
        self.due
    }

    /// Gives back what was taken in last, for it has not happened. If something has been taken in after this mark, nothing is given back: that has been told
    /// for when it is due already.
    pub fn give_back(&mut self, mark: Duration) {
        if self.due == mark {
            self.due = self.due.saturating_sub(self.interval);
        }
    }

    /// Whether it is as if nothing had ever come to it.
    pub fn is_rested(&self, now: Duration) -> bool {
        self.due <= now
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

    #[test]
    fn who_can_wait_is_taken_in_for_later_and_in_order() {
        let mut limit = RateLimit::new(Rate::new(10.0, 1));
        let at = Duration::from_millis;
        let patience = at(250);
        assert_eq!([(); 3].map(|()| limit.admit_within(at(0), patience)), [Ok(at(0)), Ok(at(100)), Ok(at(200))]);
        // Who is not taken in leaves nothing behind.
        assert_eq!([(); 2].map(|()| limit.admit_within(at(0), patience)), [Err(at(300)); 2]);
        assert_eq!(limit.admit_within(at(100), patience), Ok(at(200)));
        assert!(!limit.is_rested(at(399)) && limit.is_rested(at(400)));
        let mark = limit.mark();
        limit.give_back(mark);
        assert_eq!(limit.admit_within(at(100), patience), Ok(at(200)));
        // Somebody has come since.
        limit.admit_within(at(200), patience).unwrap();
        limit.give_back(mark);
        assert_eq!(limit.admit(at(400)), Err(at(100)));
    }

    #[test]
    fn a_rate_is_a_number_above_nothing() {
        for rate in
            [Rate::new(0.0, 1), Rate::new(-1.0, 1), Rate::new(f64::NAN, 1), Rate::new(f64::INFINITY, 1), Rate::new(1.0, 0)]
        {
            assert!(rate.check().is_err(), "{rate:?}");
        }
        assert!(Rate::new(0.001, 1).check().is_ok());
    }

    proptest! {
        #[test]
        fn no_window_holds_more_than_its_rate_and_a_burst(
            per_second in 0.5_f64..500.0,
            burst in 1_u32..20,
            gaps in proptest::collection::vec((0_u64..200, 0_u64..100, proptest::bool::ANY), 1..300),
        ) {
            let mut limit = RateLimit::new(Rate::new(per_second, burst));
            let mut now = Duration::ZERO;
            let mut admitted = Vec::new();
            let mut waiting: Vec<(Duration, Duration)> = Vec::new();
            for (gap, patience, gives_up) in gaps {
                now += Duration::from_millis(gap);
                match limit.admit_within(now, Duration::from_millis(patience)) {
                    Ok(wait) => {
                        admitted.push(now + wait);
                        waiting.push((now + wait, limit.mark()));
                    }
                    // Whoever waits as long as was said is let in.
                    Err(wait) => prop_assert!(limit.clone().admit(now + wait).is_ok()),
                }
                // Somebody who waits goes away, the first or the last.
                waiting.retain(|(due, _)| *due > now);
                if gives_up && !waiting.is_empty() {
                    let (due, mark) = waiting.remove(if gap % 2 == 0 { 0 } else { waiting.len() - 1 });
                    limit.give_back(mark);
                    let at = admitted.iter().rposition(|admitted| *admitted == due).unwrap();
                    admitted.remove(at);
                }
            }
            admitted.sort_unstable();
            for (first, from) in admitted.iter().enumerate() {
                for (last, until) in admitted.iter().enumerate().skip(first) {
                    let allowed = (*until - *from).as_secs_f64() * per_second + f64::from(burst);
                    prop_assert!((last - first + 1) as f64 <= allowed + 1e-3);
                }
            }
        }
    }
}

//! When a second member is asked as well.

use std::{collections::HashMap, sync::Mutex, time::Duration};

use mongo_core::{RetryBudget, lock::lock};

/// Knows how long reads take, and pays for second ones.
#[derive(Debug)]
pub(super) struct Hedges {
    budget: RetryBudget,
    shapes: Mutex<HashMap<String, Recent>>,
}

impl Default for Hedges {
    fn default() -> Self {
        Self { budget: RetryBudget::new(SHARE, RESERVE), shapes: Mutex::default() }
    }
}

impl Hedges {
    /// For each read.
    pub(super) fn earn(&self) {
        self.budget.deposit();
    }

    /// After how long a second member is asked. `None` as long as too little is known of reads of this shape.
    pub(super) fn delay(&self, shape: &str) -> Option<Duration> {
        self.with(shape, |recent| recent.delay)
    }

    /// A read took so long, or at least so long, if another member was quicker. That makes no difference: a read that lost took longer than the delay, and the delay depends only on how many do.
    pub(super) fn took(&self, shape: &str, took: Duration) {
        self.with(shape, |recent| recent.note(took));
    }

    /// Whether a second member may be asked.
    pub(super) fn pay(&self) -> bool {
        self.budget.withdraw()
    }

    fn with<T>(&self, shape: &str, see: impl FnOnce(&mut Recent) -> T) -> T {
        let mut shapes = lock(&self.shapes);
        if let Some(recent) = shapes.get_mut(shape) {
            return see(recent);
        }
        // Whoever makes a new name for each read does not fill the memory.
        let name = if shapes.len() < MOST_SHAPES { shape } else { OTHERS };
        see(shapes.entry(name.to_owned()).or_default())
    }
}

/// How long the last reads of a shape took.
#[derive(Debug, Default)]
struct Recent {
    /// In a ring.
    took: Vec<Duration>,
    seen: usize,
    delay: Option<Duration>,
}

impl Recent {
    fn note(&mut self, took: Duration) {
        if self.took.len() < WINDOW {
            self.took.push(took);
        } else {
            self.took[self.seen % WINDOW] = took;
        }
        self.seen += 1;
        if self.seen.is_multiple_of(BETWEEN_LOOKS) && self.seen >= ENOUGH {
            let mut sorted = self.took.clone();
            let (_, slow, _) = sorted.select_nth_unstable(self.took.len() * 95 / 100);
            self.delay = Some((*slow).max(SHORTEST));
        }
    }
}

/// Of all reads that may be hedged, so many are.
const SHARE: f64 = 0.05;
/// And so many at once after a quiet time.
const RESERVE: u32 = 10;
const MOST_SHAPES: usize = 1000;
const OTHERS: &str = "";
/// Reads that are remembered of a shape.
const WINDOW: usize = 128;
/// Reads that must be known before any is hedged.
const ENOUGH: usize = 32;
/// After so many it is found out again.
const BETWEEN_LOOKS: usize = 16;
/// Below this, another member is not quicker: it is a way there and back.
const SHORTEST: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_delay_is_what_nineteen_of_twenty_of_the_last_reads_took_at_most(micros in proptest::collection::vec(1_u64..100_000, 0..400)) {
            let hedges = Hedges::default();
            for micros in &micros {
                hedges.took("find", Duration::from_micros(*micros));
            }
            let known = micros.len() - micros.len() % BETWEEN_LOOKS;
            let last = &micros[known.saturating_sub(WINDOW)..known];
            match hedges.delay("find") {
                None => prop_assert!(known < ENOUGH),
                Some(delay) => {
                    let slower = last.iter().filter(|took| Duration::from_micros(**took) > delay).count();
                    prop_assert!(known >= ENOUGH && slower * 20 <= last.len(), "{slower} of {}", last.len());
                    let as_slow = last.iter().filter(|took| Duration::from_micros(**took) >= delay).count();
                    prop_assert!(delay == SHORTEST || as_slow * 20 >= last.len(), "{as_slow} of {}", last.len());
                }
            }
        }
    }

    #[test]
    fn one_in_twenty_is_paid_for_and_ten_after_a_quiet_time() {
        let hedges = Hedges::default();
        let mut paid = 0;
        for _ in 0..2000 {
            hedges.earn();
            paid += u32::from(hedges.pay());
        }
        assert!((100..=110).contains(&paid), "{paid}");
    }

    #[test]
    fn names_without_end_do_not_fill_the_memory() {
        let hedges = Hedges::default();
        for number in 0..5000 {
            hedges.took(&format!("find {number}"), Duration::from_millis(7));
        }
        assert_eq!(hedges.shapes.lock().unwrap().len(), MOST_SHAPES + 1);
        assert_eq!(hedges.delay("another still"), Some(Duration::from_millis(7)), "these are taken for alike");
    }
}

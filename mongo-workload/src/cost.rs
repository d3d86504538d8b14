//! What an operation will cost, by experience: how long operations of its kind have taken. And how slow everything is just now, whatever the mix.
//!
//! That some operations are dear and others cheap says nothing of how busy the server is. So for each shape it is learned what it takes *in relation to the other shapes*
//! of its kind of access, and how slow everything is, is what a window of operations took divided by what the same operations take in this relation. A
//! mix that changes does not change that. It is relative itself: it has no unit, and only its changes say something.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, BuildHasherDefault, Hasher, RandomState},
    time::Duration,
};

use crate::{class::ClassIndex, schedule::Access};

/// What is known of each shape of each class.
#[derive(Debug, Default)]
pub(crate) struct Costs {
    hasher: RandomState,
    by_shape: HashMap<u64, Shape, BuildHasherDefault<IsHash>>,
    /// The shapes that the window of each access has seen.
    seen: [Vec<u64>; 2],
}

/// Times are in microseconds.
#[derive(Debug)]
struct Shape {
    /// Exponentially weighted.
    average: f64,
    /// What it takes in relation to others. None until its first window has ended.
    relative: Option<f64>,
    /// Of the window.
    count: u32,
    took: f64,
}

/// Names a shape of operations within a class.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShapeKey(u64);

/// For keys that are hashes already, of a secret key.
#[derive(Debug, Default)]
struct IsHash(u64);

impl Hasher for IsHash {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

impl Costs {
    pub(crate) fn key(&self, class: ClassIndex, access: Access, shape: &str) -> ShapeKey {
        let own = self.hasher.hash_one((class, access, shape));
        // Beyond that somebody makes shapes out of values, and all that is new is taken for alike.
        let is_told_apart = self.by_shape.len() < MOST_SHAPES || self.by_shape.contains_key(&own);
        ShapeKey(if is_told_apart { own } else { self.hasher.hash_one((class, access)) })
    }

    /// What the next one will cost. What was never seen is taken for cheap: it is put right when it ends.
    pub(crate) fn expected(&self, key: ShapeKey) -> f64 {
        self.by_shape.get(&key.0).map_or(UNKNOWN, |shape| shape.average)
    }

    pub(crate) fn learn(&mut self, key: ShapeKey, took: Duration) {
        let took = micros(took);
        if let Some(shape) = self.by_shape.get_mut(&key.0) {
            shape.average += (took - shape.average) * WEIGHT_OF_NEW;
        } else {
            self.by_shape.insert(key.0, Shape { average: took, relative: None, count: 0, took: 0.0 });
        }
    }

    /// Counts an operation to the window of its access. False for a shape that is not known.
    pub(crate) fn count(&mut self, key: ShapeKey, access: Access, took: Duration) -> bool {
        let Some(shape) = self.by_shape.get_mut(&key.0) else { return false };
        if shape.count == 0 {
            self.seen[access.position()].push(key.0);
        }
        shape.count += 1;
        shape.took += micros(took);
        true
    }

    /// Forgets the window of an access.
    pub(crate) fn forget_window(&mut self, access: Access) {
        for key in self.seen[access.position()].drain(..) {
            if let Some(shape) = self.by_shape.get_mut(&key) {
                (shape.count, shape.took) = (0, 0.0);
            }
        }
    }

    /// Ends the window of an access: how slow everything was in it, if there was anything to tell it by.
    pub(crate) fn end_window(&mut self, access: Access) -> Option<f64> {
        let (mut took, mut relative) = (0.0, 0.0);
        let window = std::mem::take(&mut self.seen[access.position()]);
        for shape in window.iter().filter_map(|key| self.by_shape.get(key)) {
            if let Some(usual) = shape.relative {
                took += shape.took;
                relative += usual * f64::from(shape.count);
            }
        }
        let slowness = if relative > 0.0 { took / relative } else { 1.0 };
        if slowness > 0.0 {
            self.relate(&window, slowness, relative);
        }
        for key in &window {
            if let Some(shape) = self.by_shape.get_mut(key) {
                (shape.count, shape.took) = (0, 0.0);
            }
        }
        (relative > 0.0 && slowness > 0.0).then_some(slowness)
    }

    /// Learns from a window what shapes take in relation to each other, and nothing of how slow they are together.
    fn relate(&mut self, window: &[u64], slowness: f64, before: f64) {
        let mut after = 0.0;
        for key in window {
            let Some(shape) = self.by_shape.get_mut(key) else { continue };
            let count = f64::from(shape.count);
            let now = shape.took / count / slowness;
            match &mut shape.relative {
                Some(usual) => {
                    *usual += (now - *usual) * count / (count + STEADINESS);
                    after += *usual * count;
                }
                usual => *usual = (now > 0.0).then_some(now),
            }
        }
        let drift = if after > 0.0 { before / after } else { 1.0 };
        for key in window {
            if let Some(Shape { relative: Some(usual), .. }) = self.by_shape.get_mut(key) {
                *usual *= drift;
            }
        }
    }
}

pub(crate) fn micros(took: Duration) -> f64 {
    took.as_secs_f64() * 1e6
}

const UNKNOWN: f64 = 1000.0;
const WEIGHT_OF_NEW: f64 = 0.1;
const MOST_SHAPES: usize = 4096;
/// So many operations weigh as much as all that was known before.
const STEADINESS: f64 = 64.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_follows_what_operations_take_and_shapes_are_bounded() {
        let mut costs = Costs::default();
        let key = |costs: &Costs, shape: &str| costs.key(ClassIndex(0), Access::Read, shape);
        let find = key(&costs, "find");
        assert_eq!(costs.expected(find), UNKNOWN);
        costs.learn(find, Duration::from_millis(10));
        assert_eq!(costs.expected(find), 10_000.0);
        for _ in 0..100 {
            costs.learn(find, Duration::from_millis(50));
        }
        assert!((costs.expected(find) - 50_000.0).abs() < 100.0);
        assert_eq!(costs.expected(costs.key(ClassIndex(0), Access::Write, "find")), UNKNOWN);
        for shape in 0..10_000 {
            let key = key(&costs, &shape.to_string());
            costs.learn(key, Duration::from_millis(1));
        }
        // And one for all that came later.
        assert_eq!(costs.by_shape.len(), MOST_SHAPES + 1);
        let late = key(&costs, "came too late");
        assert!((costs.expected(late) - 1000.0).abs() < 1.0 && costs.count(late, Access::Read, Duration::from_millis(1)));
    }

    #[test]
    fn another_mix_is_not_slowness_and_slowness_is_not_another_mix() {
        let mut costs = Costs::default();
        let [find, scan] = ["find", "scan"].map(|shape| costs.key(ClassIndex(0), Access::Read, shape));
        let mut window = |finds: u32, scans: u32, slower: u64| {
            for (key, number, millis) in [(find, finds, 1), (scan, scans, 100)] {
                for _ in 0..number {
                    let took = Duration::from_millis(millis * slower);
                    costs.learn(key, took);
                    assert!(costs.count(key, Access::Read, took));
                }
            }
            costs.end_window(Access::Read)
        };
        assert_eq!(window(20, 1, 1), None, "there is nothing to compare with");
        let close = |slowness: Option<f64>, to: f64| assert!((slowness.unwrap() - to).abs() < 0.02 * to, "{slowness:?} {to}");
        for (finds, scans) in [(20, 1), (0, 15), (500, 0), (3, 30)] {
            close(window(finds, scans, 1), 1.0);
            close(window(finds, scans, 3), 3.0);
        }
        assert_eq!(window(0, 0, 1), None);
    }

    #[test]
    fn a_window_that_was_forgotten_says_nothing() {
        let mut costs = Costs::default();
        let find = costs.key(ClassIndex(0), Access::Read, "find");
        assert!(!costs.count(find, Access::Read, Duration::from_millis(1)), "it was never learned");
        let mut window = |took: Duration, forgotten: bool| {
            costs.learn(find, took);
            costs.count(find, Access::Read, took);
            if forgotten {
                costs.forget_window(Access::Read);
            }
            costs.end_window(Access::Read)
        };
        assert_eq!(window(Duration::from_millis(1), false), None);
        assert_eq!(window(Duration::from_millis(9), true), None);
        assert_eq!(window(Duration::from_millis(2), false), Some(2.0));
        assert_eq!(window(Duration::ZERO, false), None, "what takes no time is no measure");
    }
}

//! What an operation will cost, by experience: how long operations of its kind have taken.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    time::Duration,
};

use crate::{class::ClassIndex, schedule::Access};

/// Exponentially weighted averages by class, access and shape, in microseconds.
#[derive(Debug, Default)]
pub(crate) struct Costs {
    hasher: RandomState,
    by_shape: HashMap<u64, f64>,
}

/// Names a shape of operations within a class.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShapeKey(u64);

impl Costs {
    pub(crate) fn key(&self, class: ClassIndex, access: Access, shape: &str) -> ShapeKey {
        ShapeKey(self.hasher.hash_one((class, access, shape)))
    }

    /// What the next one will cost. What was never seen is taken for cheap: it is put right when it ends.
    pub(crate) fn expected(&self, key: ShapeKey) -> f64 {
        self.by_shape.get(&key.0).copied().unwrap_or(UNKNOWN)
    }

    pub(crate) fn learn(&mut self, key: ShapeKey, took: Duration) {
        let took = micros(took);
        if let Some(average) = self.by_shape.get_mut(&key.0) {
            *average += (took - *average) * WEIGHT_OF_NEW;
        } else if self.by_shape.len() < MOST_SHAPES {
            // Beyond that somebody makes shapes out of values, and all that is new stays unknown.
            self.by_shape.insert(key.0, took);
        }
    }
}

pub(crate) fn micros(took: Duration) -> f64 {
    took.as_secs_f64() * 1e6
}

const UNKNOWN: f64 = 1000.0;
const WEIGHT_OF_NEW: f64 = 0.1;
const MOST_SHAPES: usize = 4096;

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
        assert_eq!(costs.by_shape.len(), MOST_SHAPES);
    }
}

//! The metrics of a manager.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use mongo_core::metrics::{Counter, Gauge, Histogram, MetricsSink};

use crate::{
    class::{Classes, Rule},
    schedule::Access,
};

/// All metrics of a manager.
#[derive(Debug)]
pub(crate) struct Instruments {
    /// In the order of the classes.
    classes: Vec<ClassInstruments>,
    slots: [Arc<dyn Gauge>; 2],
}

#[derive(Debug)]
pub(crate) struct ClassInstruments {
    /// The newest count that was told.
    counted: AtomicU64,
    waiting: Arc<dyn Gauge>,
    running: Arc<dyn Gauge>,
    wait: Arc<dyn Histogram>,
    service: Arc<dyn Histogram>,
    outcomes: [Arc<dyn Counter>; 4],
    refusals: [Arc<dyn Counter>; 4],
    would: [Arc<dyn Counter>; 6],
    would_wait: Arc<dyn Counter>,
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Completed,
    Failed,
    TimedOut,
    Cancelled,
}

/// Why an operation was not even let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RefusedFor {
    Rate,
    Queue,
    Deadline,
    Memory,
}

impl Instruments {
    pub(crate) fn new(sink: &dyn MetricsSink, classes: &Classes) -> Self {
        let slots =
            |access: &str| sink.gauge("mongo_workload_slots", "Operations that may be under way at once.", &[("access", access)]);
        Self {
            classes: classes.iter().map(|class| ClassInstruments::new(sink, &class.name)).collect(),
            slots: ["read", "write"].map(slots),
        }
    }

    pub(crate) fn slots(&self, access: Access, slots: u32) {
        self.slots[access.position()].set(f64::from(slots));
    }

    pub(crate) fn of(&self, class: usize) -> Option<&ClassInstruments> {
        self.classes.get(class)
    }
}

impl ClassInstruments {
    fn new(sink: &dyn MetricsSink, class: &str) -> Self {
        let labels = [("class", class)];
        let outcome = |outcome: &str| {
            let help = "Operations that ended, by how.";
            sink.counter("mongo_workload_operations_total", help, &[("class", class), ("outcome", outcome)])
        };
        let refusal = |reason: &str| {
            let help = "Operations that were not let in, by why.";
            sink.counter("mongo_workload_refused_total", help, &[("class", class), ("reason", reason)])
        };
        let would = |rule: &str| {
            let help = "Operations that a rule would have refused, held up or ended, had it not only observed.";
            sink.counter("mongo_workload_observed_total", help, &[("class", class), ("rule", rule)])
        };
        Self {
            counted: AtomicU64::new(0),
            waiting: sink.gauge("mongo_workload_waiting", "Operations that wait.", &labels),
            running: sink.gauge("mongo_workload_running", "Operations under way.", &labels),
            wait: sink.histogram(
                "mongo_workload_wait_seconds",
                "How long operations waited before they began.",
                &labels,
                SECONDS,
            ),
            service: sink.histogram("mongo_workload_service_seconds", "How long operations took once begun.", &labels, SECONDS),
            outcomes: ["completed", "failed", "timed_out", "cancelled"].map(outcome),
            refusals: ["rate", "queue", "deadline", "memory"].map(refusal),
            would: Rule::ALL.map(Rule::as_str).map(would),
            would_wait: would("slots"),
        }
    }

    pub(crate) fn would(&self, rule: Rule) {
        if let Some((_, counter)) = Rule::ALL.iter().zip(&self.would).find(|(known, _)| **known == rule) {
            counter.add(1);
        }
    }

    pub(crate) fn would_wait(&self) {
        self.would_wait.add(1);
    }

    pub(crate) fn counts(&self, number: u64, (running, waiting): (u32, u32)) {
        if self.counted.fetch_max(number, Relaxed) < number {
            self.running.set(f64::from(running));
            self.waiting.set(f64::from(waiting));
        }
    }

    pub(crate) fn began(&self, waited: Duration) {
        self.wait.record(waited.as_secs_f64());
    }

    pub(crate) fn served(&self, took: Duration) {
        self.service.record(took.as_secs_f64());
    }

    pub(crate) fn ended(&self, outcome: Outcome) {
        let [completed, failed, timed_out, cancelled] = &self.outcomes;
        match outcome {
            Outcome::Completed => completed,
            Outcome::Failed => failed,
            Outcome::TimedOut => timed_out,
            Outcome::Cancelled => cancelled,
        }
        .add(1);
    }

    pub(crate) fn refused(&self, reason: RefusedFor) {
        let [rate, queue, deadline, memory] = &self.refusals;
        match reason {
            RefusedFor::Rate => rate,
            RefusedFor::Queue => queue,
            RefusedFor::Deadline => deadline,
            RefusedFor::Memory => memory,
        }
        .add(1);
    }
}

/// From a quarter of a millisecond to a minute and a bit, by factors of two.
const SECONDS: &[f64] = &[
    0.000_25, 0.000_5, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192, 16.384,
    32.768, 65.536,
];

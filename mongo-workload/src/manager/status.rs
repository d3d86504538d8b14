//! What a manager tells: an operation of its limits, and everybody of how it stands.

use std::time::Duration;

/// What an operation is to keep to.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// The class in which it runs: a lower one than it was submitted with after a timeout.
    pub class: String,
    /// What is left of its time, for `maxTimeMS`. Whatever takes half a second longer is dropped.
    pub max_time: Duration,
    /// Documents in a batch.
    pub batch_size: u32,
    /// For the operation's `comment`, so that it is found in the server's log and by `$currentOp`: the class and the attempt.
    pub comment: String,
    /// Which attempt this is, from 1.
    pub attempt: u32,
}

/// How many operations of a kind may be under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Slots {
    /// At once.
    pub total: u32,
    /// Now.
    pub busy: u32,
}

/// How it stands with a class.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClassStatus {
    /// Its name.
    pub class: String,
    /// Operations under way.
    pub running: u32,
    /// Operations that wait.
    pub waiting: u32,
    /// How long the oldest of them has waited.
    pub oldest_wait: Option<Duration>,
}

//! What is asked of a manager.

use std::{borrow::Cow, time::Duration};

use crate::schedule::Access;

/// Says of an operation what its manager needs to know.
///
/// ```
/// use std::time::Duration;
/// use mongo_workload::Submission;
///
/// let checkout = Submission::write("critical").shape("insert orders");
/// let export = Submission::read("low").memory(64 << 20).within(Duration::from_secs(600));
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct Submission {
    pub(crate) class: Cow<'static, str>,
    pub(crate) access: Access,
    pub(crate) shape: Cow<'static, str>,
    pub(crate) memory_bytes: u64,
    pub(crate) within: Option<Duration>,
    pub(crate) is_idempotent: bool,
}

impl Submission {
    /// An operation of `class` that only reads. It may be tried again.
    pub fn read(class: impl Into<Cow<'static, str>>) -> Self {
        Self::new(class.into(), Access::Read, true)
    }

    /// An operation of `class` that writes, or may. Once begun it is not tried again, unless it is [idempotent](Self::idempotent): what timed out
    /// may have been done.
    pub fn write(class: impl Into<Cow<'static, str>>) -> Self {
        Self::new(class.into(), Access::Write, false)
    }

    fn new(class: Cow<'static, str>, access: Access, is_idempotent: bool) -> Self {
        Self { class, access, shape: Cow::Borrowed(""), memory_bytes: 0, within: None, is_idempotent }
    }

    /// What operations like this one have in common, as `"find orders by customer"`: what they cost is learned for each shape. Never values of
    /// documents: at most 4096 shapes are told apart. Default: all of a class are alike.
    pub fn shape(mut self, shape: impl Into<Cow<'static, str>>) -> Self {
        self.shape = shape.into();
        self
    }

    /// Bytes that it will need, counted against the budget of its class; a petabyte at most. Default 0.
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory_bytes = bytes.min(1 << 50);
        self
    }

    /// How long each attempt may take, with waiting, instead of the time limit of its class; at most a day. At a lower class the shorter of both holds.
    pub fn within(mut self, time: Duration) -> Self {
        self.within = Some(time);
        self
    }

    /// Says that a write can be done twice without harm, so that it may be tried again.
    pub fn idempotent(mut self) -> Self {
        self.is_idempotent = true;
        self
    }
}
